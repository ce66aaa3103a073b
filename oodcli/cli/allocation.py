"""Memory of the process."""

from __future__ import annotations

import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 2**30
"""Bytes of the largest block that is kept."""


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks for the next ones. Otherwise activations of large images are new
    pages in every layer, which takes a fifth of the time of ``invert`` at 224 pixels, and up to
    half of that of ``score``. What lives longer than a batch must be small: it would lie between
    the kept blocks, and split them. Does nothing with another C library, or where the user has set
    malloc's own variables."""
    import ctypes

    given = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if sys.platform == "linux" and not given:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, -1)  # never give back
