"""Virtual images made as hard as real ones: patches of other images are put into them until the
network errs as often as published.

All patches are of one size, up to a pixel. With sizes that differ some images keep all that invert
made, and on one network of four the pool was too easy. Blur, white noise, grey squares or blends of
whole images, brought to the same accuracy, make thresholds more lenient (measured:
docs/concepts.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from oodcli.errors import OodcliError
from oodcli.images.arrays import VirtualImages
from oodcli.images.source import Decode, Fetch, ImageSource, Rows
from oodcli.networks.preprocessing import Preprocessing

STEPS = 20
SEQUENCE = (0.8191725133961645, 0.6710436067037893, 0.5497004779019703)
"""Powers of the root of x⁴ = x + 1: their multiples modulo 1 fill the cube evenly (Roberts 2018,
the R₃ sequence), so that size and place of a patch follow from an image's number alone."""


VERSIONS = 4
"""Rows of each image, with patches of as many others. With one, all images of a class had patches
of the same other class, and the 95 % quantile of 200 rows depended on which."""


class Patched(ImageSource):
    """Virtual images with a square patch of another one in each, at the same place: of one of
    another class, as far as the labels say. Its sides are the same share of the image's everywhere,
    in whole pixels: up or down, so that the mean is that share.

    All N images come once, then again, ``versions`` times; the patches of a row's image come from
    another image each time. Each row depends on its number alone: neither on batches nor on shards.
    """

    def __init__(self, source: VirtualImages, side: float, versions: int = VERSIONS) -> None:
        self.name, self.labelled, self.note = source.name, source.labelled, source.note
        self.grain = source.grain
        self._source, self._side, self._versions = source, side, versions
        self._distances = [self._distance(version) for version in range(VERSIONS)]

    def __len__(self) -> int:
        return self._versions * len(self._source)

    def paths(self, start: int, stop: int) -> list[str]:
        found = [self._source.paths(*part) for part in self._parts(start, stop)]
        return [path for part in found for path in part]

    def weight(self, start: int, stop: int) -> int:
        parts = list(self._parts(start, stop))
        return (1 + VERSIONS) * sum(self._source.weight(*part) for part in parts)

    def _distance(self, version: int) -> int:
        """How many images further on the patches are from: about half of all, so that as many as
        possible are of another class, and of different ones in different versions."""
        labels, count = self._source.labels, len(self._source)
        half, reach = count // 2, max(len(torch.unique(labels)), VERSIONS)
        ways = range(half, min(half + reach, count - 1) + 1)
        others = [int((labels.roll(-way) != labels).sum()) for way in ways]
        best = [way for way, other in zip(ways, others, strict=True) if other == max(others)]
        return best[version * len(best) // VERSIONS]

    @contextmanager
    def reading(self) -> Iterator[Fetch]:
        with self._source.reading() as fetch:

            def together(start: int, stop: int) -> Decode:
                own, *others = (
                    [fetch(*part) for part in self._parts(start + far, stop + far)]
                    for far in (0, *self._distances)
                )
                rows = torch.arange(start, stop)
                each = (rows // len(self._source) + rows % len(self._source)) % VERSIONS
                return _Patching(own, others, rows, each, self._side)

            yield together

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The images of the rows [start, stop), in their order."""
        count = len(self._source)
        while start < stop:
            first = start % count
            last = min(first + stop - start, count)
            yield first, last
            start += last - first


class _Patching:
    """own: of the rows. others: of each version. version: (n,), of the rows."""

    def __init__(
        self,
        own: list[Decode],
        others: list[list[Decode]],
        rows: Tensor,
        version: Tensor,
        side: float,
    ) -> None:
        self._own, self._others, self._rows, self._side = own, others, rows, side
        self._version = version

    def __call__(self, preprocessing: Preprocessing) -> Rows:
        parts = [part(preprocessing) for part in self._own]
        labels = torch.cat([part.labels for part in parts])
        errors = [error for part in parts for error in part.errors]
        pixels = torch.cat([part.pixels for part in parts])
        others = torch.empty_like(pixels)
        for version, decodes in enumerate(self._others):
            mine = self._version == version
            others[mine] = torch.cat([part(preprocessing).pixels for part in decodes])[mine]
        return Rows(labels, errors, patched(pixels, others, self._rows, self._side))


def patched(images: Tensor, others: Tensor, numbers: Tensor, side: float) -> Tensor:
    """Images with a patch of others[i] in images[i], of the same place. images, others:
    (N, C, H, W). numbers: (N,), of the images, from which place and rounding of the size follow.
    side: of the patches, in sides of an image, in [0, 1]; with 1 all images are replaced whole."""
    spread = (numbers[:, None].double() + 0.5) * torch.tensor(SEQUENCE, dtype=torch.float64) % 1
    whole = torch.tensor(images.shape[2:], dtype=torch.float64)  # height, width
    size = (side * whole + spread[:, :1]).floor()  # (N, 2)
    first = (spread[:, 1:] * (whole - size + 1)).floor()
    inside = [
        (first[:, d, None] <= torch.arange(extent))
        & (torch.arange(extent) < (first + size)[:, d, None])
        for d, extent in enumerate(images.shape[2:])
    ]  # (N, H), (N, W)
    mask = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(mask, others, images)


def match_accuracy(accuracy: Callable[[float], float], target: float) -> tuple[float, float]:
    """The strength of a degradation at which the accuracy is nearest to ``target``, by bisection,
    and that accuracy. accuracy: strength in [0, 1] → share that the network gets right.

    Raises OodcliError when the target is out of reach.
    """
    if not 0 < target < 1:
        raise OodcliError(f"--match-accuracy {target:g}: expected a share between 0 and 1")
    low, high = 0.0, 1.0
    tried = {strength: accuracy(strength) for strength in (low, high)}
    if tried[low] < target:
        raise OodcliError(
            f"the network is right on {tried[low]:.1%} of these virtual images, less than the "
            f"{target:.1%} to match: invert with more --steps, or check the published accuracy"
        )
    if tried[high] > target:
        raise OodcliError(
            f"no patches bring the network down to {target:.1%} on these virtual images: check "
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
