"""Virtual images made as hard as real ones: blurred until the network errs as often as published.

White noise does it, too, but leaves thresholds more lenient; blur takes away the high frequencies
of which virtual images have more than real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from oodcli.errors import OodcliError

STEPS = 20
LARGEST = 64.0
"""In pixels; a network that is still right beyond it looks at nothing but colours."""


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Images convolved with a Gaussian of standard deviation ``sigma`` pixels, cut at 3 sigma;
    edges are repeated. images: (N, C, H, W)."""
    reach = math.ceil(3 * sigma)
    if reach == 0:
        return images
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    channels = images.shape[1]
    weight = (kernel / kernel.sum()).to(images).expand(channels, 1, 1, -1)
    across = F.pad(images, (reach, reach, 0, 0), mode="replicate")
    images = F.conv2d(across, weight, groups=channels)
    down = F.pad(images, (0, 0, reach, reach), mode="replicate")
    return F.conv2d(down, weight.transpose(2, 3), groups=channels)


def match_accuracy(accuracy: Callable[[float], float], target: float) -> tuple[float, float]:
    """The strength of a degradation at which the accuracy is nearest to ``target``, by bisection,
    and that accuracy. accuracy: strength → share that the network gets right.

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
        if high > LARGEST:
            raise OodcliError(
                f"no blur brings the network down to {target:.1%} on these virtual images: check "
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
