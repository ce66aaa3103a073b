"""Out of memory: recognise it, release memory, retry with smaller batches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

Result = TypeVar("Result")

NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")
"""Parts of torch's messages, in lower case; the last one is from CUDA's libraries."""


def ran_out(error: BaseException) -> bool:
    """Whether an exception means out of memory, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(each in words for each in NO_MEMORY)


def let_go(device: torch.device) -> None:
    """Release torch's cached blocks, which are fragmented after an out-of-memory error. Call it
    after the handler of the error, which still references what was allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def too_short(device: torch.device, size: tuple[int, int]) -> str:
    """Error message for a device that cannot hold even one image (H, W)."""
    elsewhere = "" if device.type == "cpu" else "--device cpu, "
    return (
        f"out of memory on {device} with a single image of {size[0]}×{size[1]}: try {elsewhere}a "
        "smaller --input-size, or fewer records or detectors"
    )


def halving(
    run: Callable[[int], Result],
    size: int,
    device: torch.device,
    hopeless: Callable[[BaseException], Exception],
    *,
    level: int = logging.INFO,
) -> tuple[Result, int]:
    """``run(size)`` and the size, which is halved while memory runs out. device: the device of the
    memory. hopeless: what to raise if a size of 1 is too large. level: log level of each
    halving."""
    while True:
        try:
            return run(size), size
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            if size <= 1:
                raise hopeless(error) from error
        # Outside the handler: its error references what was allocated.
        let_go(device)
        words = "out of memory at batch size %d; retrying with %d"
        log.log(level, words, size, size // 2)
        size //= 2
