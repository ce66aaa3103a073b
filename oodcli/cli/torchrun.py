"""What a command prints in one of torchrun's processes."""

from __future__ import annotations

import os

from oodcli.cli import console
from oodcli.jobs.torchrun import launched


def speak_for_all() -> bool:
    """Whether torchrun has started this process. If so, its errors name its rank, and all processes
    but the first print nothing else."""
    if not launched():
        return False
    rank = int(os.environ.get("RANK", "0"))
    console.who = f"rank {rank}"
    console.quiet = console.quiet or rank > 0
    return True
