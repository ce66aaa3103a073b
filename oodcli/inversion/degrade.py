"""Virtual images made as hard as real ones: noise until the network errs as often as published."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oodcli.errors import OodcliError

STEPS = 20


def add_noise(images: Tensor, strength: float, first_row: int, seed: int) -> Tensor:
    """images + strength × white noise, in normalised space; the noise of a row depends on the seed
    and the row's number alone. images: (N, C, H, W), of which the first is row ``first_row``."""
    noise = [
        torch.randn(
            images.shape[1:], generator=torch.Generator().manual_seed(seed * 1_000_003 + row)
        )
        for row in range(first_row, first_row + len(images))
    ]
    return images + strength * torch.stack(noise) if noise else images


def match_accuracy(accuracy: Callable[[float], float], target: float) -> tuple[float, float]:
    """The strength of noise at which the accuracy is nearest to ``target``, by bisection, and that
    accuracy. accuracy: strength → share that the network gets right.

    Raises OodcliError when the target is out of reach.
    """
    if not 0 < target < 1:
        raise OodcliError(f"--match-accuracy {target:g}: expected a share between 0 and 1")
    tried = {0.0: accuracy(0.0)}
    if tried[0.0] < target:
        raise OodcliError(
            f"the network is right on {tried[0.0]:.1%} of these virtual images, less than the "
            f"{target:.1%} to match: invert with more --steps, or check the published accuracy"
        )
    low, high = 0.0, 0.5
    while tried.setdefault(high, accuracy(high)) > target:
        low, high = high, 2 * high
        if high > 1e3:
            raise OodcliError(
                f"no noise brings the network down to {target:.1%} on these virtual images: check "
                "the published accuracy"
            )
    for _ in range(STEPS):
        middle = (low + high) / 2
        tried[middle] = accuracy(middle)
        if tried[middle] == target:
            break
        low, high = (middle, high) if tried[middle] > target else (low, middle)
        if tried[low] == tried[high]:
            break
    strength = min(tried, key=lambda s: abs(tried[s] - target))
    return strength, tried[strength]
