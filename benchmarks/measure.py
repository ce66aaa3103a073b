"""What the benchmarks share: taking turns, ratios of paired rounds, peak memory, the machine.

Run as a program it measures a command, for ``peak``:

    python benchmarks/measure.py COMMAND …
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def in_turns(
    work: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every round of each. All take turns, so that a noisy machine is as noisy for all;
    the rounds to warm up come first and do not count."""
    import torch

    def seconds(run: Callable[[], object]) -> float:
        start = clock()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock() - start

    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(warm_up + rounds):
        for name, run in work.items():
            spent = seconds(run)
            if turn >= warm_up:
                times[name].append(spent)
    return times


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The median over rounds of first / second. What slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def peak(words: Sequence[str]) -> tuple[float, float]:
    """Seconds and the largest resident memory in MB of a command. Raises SystemExit with what it
    printed when it fails."""
    found = usage(words)
    return found["seconds"], found["peak_mb"]


def usage(words: Sequence[str]) -> dict[str, float]:
    """Of a command: ``seconds``, ``processor_seconds`` and ``peak_mb``, the largest resident
    memory. Raises SystemExit with what it printed when it fails."""
    # Through a small process: Linux counts what a process was forked from as its own, and here
    # that may be hundreds of MB of torch.
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _measure(words: Sequence[str]) -> int:
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(words, stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if process.returncode:
            output.seek(0)
            sys.stderr.write(output.read().decode(errors="replace"))
            return 1
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    found = {
        "seconds": seconds,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss * unit / 1e6,
    }
    print(json.dumps(found))
    return 0


def pinned(threads: int) -> dict[str, str]:
    """This process's environment, with the number of threads in it."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads))}


def machine() -> dict[str, Any]:
    """What figures depend on; empty where the system does not tell."""
    import torch

    import oodcli

    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    lines = (line.partition(":") for line in text.splitlines())
    cpu = {key.strip(): value.strip() for key, _, value in lines}
    flags = cpu.get("flags", "").split()
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    )
    return {
        "processor": cpu.get("model name") or platform.processor(),
        "logical_cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "oodcli": oodcli.__version__,
    }


if __name__ == "__main__":
    sys.exit(_measure(sys.argv[1:]))
