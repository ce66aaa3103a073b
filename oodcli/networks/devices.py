"""Capabilities of devices."""

from __future__ import annotations

import torch


def multiplies_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware. Emulation is slower than float32."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # torch has no public name for this that reaches back to 2.11.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)
