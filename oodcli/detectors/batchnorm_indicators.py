"""What dms, dms-aos, dss and dss-ext share: how far the inputs of BatchNorm layers are from the
layers' running statistics (Begon & Geurts 2021, §2.2).

y = (input − running mean)/√(running variance + eps), before the layer's own weight and bias, which
may be 0. M is the spatial mean of y and S its spatial standard deviation with divisor HW − 1, one
each per image and channel. The channels of all layers stand side by side, C_S in all, the
normalised image first: it is a layer of its own with running mean 0, running variance 1, eps 0. A
layer that is called twice counts twice. Layers with one position have no S: they add nothing to
dss and dss-ext, but their channels count in C_S, which is the same for all four indicators.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.features import INPUT, BatchNorm, Features, recorded

TINY = torch.finfo(torch.float32).tiny
"""A running variance of 0 with eps 0 is divided by as this: a channel that was dead and wakes up is
far out, but finite."""

STANDARDISED = r"""

    y = \frac{a - \mu_\text{running}}{\sqrt{\sigma^2_\text{running} + \epsilon}},
    \qquad M = \operatorname{mean}_{h,w} y,
    \qquad S^2 = \frac{1}{HW - 1} \sum_{h,w} (y - M)^2
"""
"""What the formulas of the four share."""

Shape = tuple[tuple[int, int], ...]
"""Number of positions and number of channels of each layer."""


@lru_cache(maxsize=16)
def channel_positions(shape: Shape) -> Tensor:
    """HW of every channel: (C_S,) float64."""
    positions = torch.tensor([positions for positions, _ in shape]).double()
    return positions.repeat_interleave(torch.tensor([width for _, width in shape]))


def _norms(block: Features, only_input: bool) -> Sequence[BatchNorm]:
    return [block.batchnorm[INPUT]] if only_input else list(block.batchnorm.values())


def shape_of(block: Features, only_input: bool) -> Shape:
    return tuple((n.spatial_size, len(n.running_mean)) for n in _norms(block, only_input))


def _remembered_variance(norms: Sequence[BatchNorm]) -> Tensor:
    """(C_S,) float64, running variance + eps."""
    eps = [norm.running_var.double() + norm.eps for norm in norms]
    return torch.cat(eps).clamp_min(TINY)


def standardised_mean(block: Features, only_input: bool) -> Tensor:
    """(N, C_S) float64, M of every channel."""
    norms = _norms(block, only_input)
    mean = torch.cat([recorded(norm.mean) for norm in norms], 1).double()
    remembered = torch.cat([norm.running_mean for norm in norms]).double()
    return (mean - remembered).div_(_remembered_variance(norms).sqrt())


def standardised_variance(block: Features, only_input: bool) -> Tensor:
    """(N, C_S) float64, S² of every channel."""
    norms = _norms(block, only_input)
    variance = torch.cat([recorded(norm.var) for norm in norms], 1).double()
    return variance.div_(_remembered_variance(norms))


class BatchNormIndicator(Detector):
    """An indicator of M and S of all layers or, with ``only_input``, of the image alone; a mean
    over channels, so that each layer's part in it can be told."""

    only_input: ClassVar[bool] = False
    explains = True

    @property
    def strict_on_virtual(self) -> bool:
        return True

    @abstractmethod
    def _of(self, test: Features, channels: slice) -> Tensor:
        """(N,) the indicator of some of the channels."""

    def _score(self, test: Features) -> Tensor:
        return self._of(test, slice(None))

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        """Each layer's part of the mean over all channels."""
        widths = [width for _, width in shape_of(test, self.only_input)]
        names = [INPUT] if self.only_input else list(test.batchnorm)
        parts = []
        start = 0
        for width in widths:
            channels = slice(start, start + width)
            parts.append(self._of(test, channels) * (width / sum(widths)))
            start += width
        words = ["the image itself" if name == INPUT else f"input of {name}" for name in names]
        return words, torch.stack(parts, 1)

    def _mean(self, test: Features) -> Tensor:
        return test.shared(standardised_mean, self.only_input)

    def _variance(self, test: Features) -> Tensor:
        return test.shared(standardised_variance, self.only_input)

    def _positions(self, test: Features) -> Tensor:
        return channel_positions(shape_of(test, self.only_input)).to(self._variance(test).device)
