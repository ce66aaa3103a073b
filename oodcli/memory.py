"""When memory runs out: how to tell, and what to let go of."""

from __future__ import annotations

import torch

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
