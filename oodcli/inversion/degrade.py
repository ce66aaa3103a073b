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


class Patched(ImageSource):
    """Virtual images with a square patch of another one in each, at the same place: of one of
    another class, as far as the labels say. Its sides are the same share of the image's everywhere,
    in whole pixels: up or down, so that the mean is that share.

    Each image depends on its number alone: neither on batches nor on shards.
    """

    def __init__(self, source: VirtualImages, side: float) -> None:
        self.name, self.labelled, self.note = source.name, source.labelled, source.note
        self.grain = source.grain
        self._source, self._side = source, side
        self._next = self._distance()

    def __len__(self) -> int:
        return len(self._source)

    def paths(self, start: int, stop: int) -> list[str]:
        return self._source.paths(start, stop)

    def weight(self, start: int, stop: int) -> int:
        return 2 * self._source.weight(start, stop)

    def _distance(self) -> int:
        """How many images further on the patches are from: about half of all, so that as many as
        possible are of another class."""
        labels, count = self._source.labels, len(self._source)
        half = count // 2
        ways = range(half, min(half + len(torch.unique(labels)), count - 1) + 1)
        return max(ways, key=lambda way: int((labels.roll(-way) != labels).sum()), default=0)

    @contextmanager
    def reading(self) -> Iterator[Fetch]:
        with self._source.reading() as fetch:

            def both(start: int, stop: int) -> Decode:
                others = [fetch(*part) for part in self._others(start, stop)]
                return _Patching(fetch(start, stop), others, start, self._side)

            yield both

    def _others(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The images whose patches go into [start, stop), in their order."""
        count = len(self._source)
        first = (start + self._next) % count
        last = first + stop - start
        yield first, min(last, count)
        if last > count:
            yield 0, last - count


class _Patching:
    def __init__(self, own: Decode, others: list[Decode], start: int, side: float) -> None:
        self._own, self._others, self._start, self._side = own, others, start, side

    def __call__(self, preprocessing: Preprocessing) -> Rows:
        labels, errors, pixels, _ = self._own(preprocessing)
        others = torch.cat([other(preprocessing).pixels for other in self._others])
        numbers = torch.arange(self._start, self._start + len(pixels))
        return Rows(labels, errors, patched(pixels, others, numbers, self._side))


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
