"""Scores that borrow from similar images of the same job, for ``score --stream``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodcli.features import Features, recorded
from oodcli.files.scores import STREAM, ScoreBlock

WIDTH = 64
"""Numbers in a sketch."""
NEIGHBOURS = 10
OWN = 6
"""Weight of an image's own score, where each neighbour has 1."""
LESS = 0.5
"""Share that counts of how much less suspicious a neighbour is: an OOD image of a kind of its own
has ID images for neighbours."""
SAMPLE = 20_000
"""Images among which neighbours are searched, at most."""
FEWEST = 100
"""Images in a stream, at least."""
ROUNDING = 1e-6
"""Distances that differ by less are equal; sketches have a length of 1."""
_BLOCK = 16_384

Floats = NDArray[np.float64]


def stream_name(detector: str) -> str:
    """The column of a detector's scores that borrow from the stream."""
    return f"{detector}{STREAM}"


def detector_of(column: str) -> str:
    """The detector of a column of scores, borrowing or not."""
    return column.removesuffix(STREAM)


def sketch(features: Features) -> NDArray[np.float32]:
    """(N, 64) random projections of the channel means of all layers, each layer's scaled to length
    1. Similar images have similar sketches; their order and number do not matter."""
    layers = {name: layer.mean for name, layer in features.layers.items() if layer.mean is not None}
    means = [recorded(layers[name]).float().nan_to_num(0, 0, 0) for name in sorted(layers)]
    scaled = torch.cat([torch.nn.functional.normalize(each, dim=1) for each in means], 1).cpu()
    projected = scaled @ _projection(scaled.shape[1])  # (N, 64)
    return np.asarray(projected.numpy(), np.float32)


@lru_cache(maxsize=2)
def _projection(channels: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(channels, WIDTH, generator=random)


def smoothed(blocks: Sequence[ScoreBlock], names: Sequence[str]) -> list[ScoreBlock]:
    """The same blocks, which have sketches, with a column ``stream_name(name)`` for each detector.

    The column is what ``borrowed`` makes of the detector's scores and the image's mutual
    neighbours: those among its 10 nearest which would have it among their 10 nearest. Neighbours
    are searched among 20,000 images, chosen by their paths.
    """
    sketches = [block.sketches for block in blocks if block.sketches is not None]
    cuts = np.cumsum([len(each) for each in sketches])[:-1]
    paths = [
        path
        for block in blocks
        for path, error in zip(block.paths, block.errors, strict=True)
        if not error
    ]
    index, mutual = mutual_neighbours(_comparable(np.concatenate(sketches)), _sample(paths))
    added: list[dict[str, Floats]] = [{} for _ in blocks]
    for name in names:
        scores = np.concatenate([np.asarray(block.scores[name], np.float64) for block in blocks])
        parts = np.split(borrowed(scores, index, mutual), cuts)
        for columns, part in zip(added, parts, strict=True):
            columns[stream_name(name)] = part
    return [
        replace(block, scores={**block.scores, **columns}, sketches=None)
        for block, columns in zip(blocks, added, strict=True)
    ]


def borrowed(scores: Floats, index: NDArray[np.int64], mutual: NDArray[np.bool_]) -> Floats:
    """Scores of which each borrows from its neighbours (N,), on the scale of the scores.

    z = Φ⁻¹((rank − 1/2)/N); then z'_i = z_i + Σ_j w_ij (z_j − z_i)/(6 + m_i), with w_ij = 1, or 1/2
    where z_j < z_i, and the result is the quantile Φ(z'_i) of the scores. An infinite score has the
    highest rank and stays infinite; an image without neighbours keeps its score. scores: (N,).
    index, mutual: (N, k), rows of the neighbours, and which of them count, m_i in number.
    """
    from scipy.stats import norm, rankdata

    finite = np.isfinite(scores)
    if not finite.any():
        return scores
    z = norm.ppf((rankdata(np.where(finite, scores, np.inf)) - 0.5) / len(scores))
    more = z[index] - z[:, None]  # (N, k)
    more = np.where(more < 0, LESS * more, more) * mutual
    z = z + more.sum(1) / (OWN + mutual.sum(1))
    known = np.sort(scores[finite])
    places = (np.arange(len(known)) + 0.5) / len(scores)
    found: Floats = np.where(finite, np.interp(norm.cdf(z), places, known), scores)
    return found


def _comparable(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each of 64 numbers less its median, over its interquartile range, then rows of length 1."""
    low, middle, high = np.quantile(points, [0.25, 0.5, 0.75], axis=0)
    scaled = (points - middle) / np.maximum(high - low, 1e-12)
    scaled /= np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-12)
    return np.asarray(scaled, np.float32)


def _sample(paths: Sequence[str]) -> NDArray[np.int64]:
    """Rows among which neighbours are searched: those whose paths have the lowest hashes."""
    if len(paths) <= SAMPLE:
        return np.arange(len(paths))
    hashes = np.array(
        [
            int.from_bytes(hashlib.blake2b(path.encode(errors="replace"), digest_size=8).digest())
            for path in paths
        ],
        np.uint64,
    )
    return np.sort(np.argsort(hashes, kind="stable")[:SAMPLE])


def mutual_neighbours(
    points: NDArray[np.float32], sample: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The nearest rows of a sample to each of N points, (N, k), and whether the point is as near to
    them as their own k-th neighbour in the sample. k: 10, or 0 in a smaller sample. Memory grows
    with N·k."""
    from sklearn.neighbors import NearestNeighbors

    if len(sample) <= NEIGHBOURS:  # almost all images are unreadable
        return np.empty((len(points), 0), np.int64), np.empty((len(points), 0), bool)
    place = np.full(len(points), -1)
    place[sample] = np.arange(len(sample))
    search = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, algorithm="brute").fit(points[sample])
    index = np.empty((len(points), NEIGHBOURS), np.int64)
    distance = np.empty((len(points), NEIGHBOURS), np.float32)
    for start in range(0, len(points), _BLOCK):
        rows = slice(start, start + _BLOCK)
        far, found = search.kneighbors(points[rows])
        itself = found == place[rows, None]
        itself[~itself.any(1), -1] = True  # not in the sample, or behind others like it
        index[rows] = found[~itself].reshape(-1, NEIGHBOURS)
        distance[rows] = far[~itself].reshape(-1, NEIGHBOURS)
    reach = distance[sample, -1]
    return sample[index], distance <= reach[index] + ROUNDING
