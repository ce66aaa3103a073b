"""Feature maps and their gradients, reduced to a number or two for each channel."""

from __future__ import annotations

import torch
from torch import Tensor

from oodcli.features import BatchNorm
from oodcli.float64 import in_float64

SQUARES_IN_CACHE = 1 << 18
"""Squares that are in memory at once, if an image has no more."""


def spatial_moments(activation: Tensor, channel_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and population variance over the positions of (N, C, …) or (N, …, C): (N, C) each,
    float32. By sums: several times faster than torch.var_mean on a CPU; the subtraction of the
    squared mean is done in float64."""
    if activation.ndim == 2:
        return activation.float(), torch.zeros_like(activation, dtype=torch.float32)
    x, dim = by_position(activation, channel_dim)
    wide = x.float()
    mean = in_float64(wide.sum(dim)) / x.shape[dim]
    if dim == 2:
        squares = in_float64(torch.linalg.vector_norm(wide, dim=2)).square()
    else:
        squares = in_float64(_sums_of_squares(wide))
    variance = (squares / x.shape[dim] - mean.square()).clamp_min_(0)
    return mean.float().to(x.device), variance.float().to(x.device)


def _sums_of_squares(x: Tensor) -> Tensor:
    """(N, P, C) → (N, C). On a processor a few images at a time, whose squares stay in its cache:
    those of all would go through the memory twice."""
    if x.device.type != "cpu":
        return x.square().sum(1)
    some = max(1, SQUARES_IN_CACHE // (x.shape[1] * x.shape[2]))
    return torch.cat([part.square().sum(1) for part in torch.split(x, some)])


def by_position(activation: Tensor, channel_dim: int = 1) -> tuple[Tensor, int]:
    """(N, C), (N, C, …) or (N, …, C) in the order of its memory, (N, C, P) or (N, P, C), and the
    dimension of the positions."""
    x = activation.movedim(channel_dim, 1)
    if x.ndim == 2:
        return x[:, :, None], 2
    if x.is_contiguous():
        return x.flatten(2), 2
    return x.movedim(1, -1).flatten(1, -2), 1


def by_image(rows: Tensor, count: int, channel_dim: int = 1) -> Tensor:
    """Rows of which an image has several, as with tokens and windows, side by side in one more
    dimension behind the channels, (N·R, C, …) → (N, C, R, …), or before them, (N·R, …, C) → (N, R,
    …, C); as they are, where each is an image. count: N."""
    if len(rows) == count:
        return rows
    rows = rows.reshape(count, -1, *rows.shape[1:])
    return rows if channel_dim == -1 else rows.movedim(2, 1)


def peaks(activation: Tensor, channel_dim: int = 1) -> Tensor:
    """The largest of each channel of (N, C, …) or (N, …, C) over the positions, 0 where none is
    positive: (N, C) float32. NaN where a position is NaN."""
    return activation.movedim(channel_dim, 1).flatten(2).amax(2).clamp_min(0).float()


def nonzero_shares(gradient: Tensor, channel_dim: int = 1) -> Tensor:
    """At which share of the positions (N, C, …) or (N, …, C) is not 0: (N, C) float32."""
    flags = gradient.movedim(channel_dim, 1) != 0
    return flags.float() if flags.ndim == 2 else flags.flatten(2).float().mean(2)


def after_batchnorm(norm: BatchNorm, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (N, C) of a BatchNorm's output from those of its input: the layer is affine."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return (mean - norm.running_mean) * scale + norm.bias, variance * scale.square()


def before_batchnorm(norm: BatchNorm, gradient: Tensor) -> Tensor:
    """Gradient (N, C) by a BatchNorm's output, from that by its input; 0 where the output does not
    depend on the input."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return torch.where(scale == 0, 0, gradient / scale)
