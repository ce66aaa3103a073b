"""``oodcli --version``: versions and devices, for bug reports."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

from oodcli._version import __version__


def lines() -> Iterator[str]:
    """Lines of ``--version``. The devices come last: they need torch, which takes a second to
    import."""
    yield f"oodcli {__version__}"
    yield f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"torch {installed('torch')}, torchvision {installed('torchvision')}"
    try:
        yield from _devices()
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        yield f"torch cannot be used: {reason}"


def in_short() -> str:
    """The versions and the working folder in one line, without importing torch."""
    return (
        f"oodcli {__version__}, Python {platform.python_version()}, torch {installed('torch')}, in "
        f"{Path.cwd()}"
    )


def installed(package: str) -> str:
    """The version of a package, or ``is not installed``."""
    from importlib.metadata import PackageNotFoundError, version  # a tenth of the time of --help

    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"


def _devices() -> Iterator[str]:
    import torch

    from oodcli.networks.devices import limit_threads, multiplies_bfloat16

    limit_threads()
    how = "in hardware" if multiplies_bfloat16("cpu") else "emulated"
    count = torch.get_num_threads()
    threads = f"{count} thread" + "s" * (count != 1)
    yield f"cpu: {_processor()}, {threads}, bfloat16 {how}"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {found.name}, {found.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        yield "mps: Apple's GPU"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            key, _, name = line.partition(":")
            if key.strip() == "model name":
                return name.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
