"""When memory runs out: how to tell, and what to let go of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

Result = TypeVar("Result")

NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")
"""In what torch says, in lower case; the last is said by CUDA's libraries."""


def ran_out(error: BaseException) -> bool:
    """Whether memory was too short, of whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(each in words for each in NO_MEMORY)


def let_go(device: torch.device) -> None:
    """Gives back what torch keeps of freed memory, which is in pieces of the wrong size. To be
    called after the handler of the error, which holds on to what was allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def too_short(device: torch.device, size: tuple[int, int]) -> str:
    """One sentence for a memory that does not even hold one image (H, W)."""
    elsewhere = "" if device.type == "cpu" else "--device cpu, "
    return (
        f"the memory of {device} is too short for one image of {size[0]}×{size[1]}: try "
        f"{elsewhere}a smaller --input-size, or less at once"
    )


def halving(
    run: Callable[[int], Result],
    size: int,
    device: torch.device,
    hopeless: Callable[[BaseException], Exception],
    *,
    level: int = logging.INFO,
) -> tuple[Result, int]:
    """``run(size)`` and the size, which is halved for as long as memory runs out. device: whose
    memory that is. hopeless: what to raise where a size of 1 is too large. level: at which each
    halving is logged."""
    while True:
        try:
            return run(size), size
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            if size <= 1:
                raise hopeless(error) from error
        # Outside of the handler, whose error holds on to what was allocated.
        let_go(device)
        words = "out of memory at batch size %d; retrying with %d"
        log.log(level, words, size, size // 2)
        size //= 2
