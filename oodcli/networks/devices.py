"""Capabilities of devices."""

from __future__ import annotations

import os

import torch

_most: int | None = None
"""As ``limit_threads`` has set it."""


def processors() -> int:
    """Processors that this process may use, at least 1: by its affinity, the CPU quota of its
    container (cgroup v1 or v2), its share among the processes that torchrun started on this host,
    and ``limit_threads``."""
    from joblib import cpu_count

    share = max(1, int(cpu_count()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return share if _most is None else min(share, _most)


def limit_threads(most: int | None = None) -> None:
    """Set how many processor threads networks, detectors and the decoding of images use in this
    process. None: as many as there are ``processors()``, unless ``OMP_NUM_THREADS`` is set. Raises
    ValueError for fewer than 1."""
    global _most
    if most is not None and most < 1:
        raise ValueError(f"limit_threads({most}): expected a number of at least 1")
    _most = most
    if most is not None:
        torch.set_num_threads(most)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), processors()))


def multiplies_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware. Emulation is slower than float32."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # torch has no public name for this that reaches back to 2.11.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)
