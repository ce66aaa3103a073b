"""Computing in float64 where the device of the network cannot."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT = ("mps",)
"""Types of devices that have no float64: Apple's GPUs."""


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64."""
    return device.type not in WITHOUT


def in_float64(x: Tensor) -> Tensor:
    """The same numbers in float64; on the processor, where the device of x has none."""
    return (x if has_float64(x.device) else x.cpu()).double()
