"""Distance to the k-th nearest neighbour (Sun et al. 2022)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.bank import Bank
from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.hyperparameters import require_positive
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded

log = logging.getLogger(__name__)

K = 50

PAIRS = 1 << 24
"""So many distances are in memory at once."""


def unit(rows: Tensor) -> Tensor:
    """(N, D) float64 rows of length 1; rows of zeros stay zeros."""
    rows = rows.double()
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, 1.0)


def kth_distance(queries: Tensor, bank: Iterable[Tensor], k: int) -> Tensor:
    """(N,) float64: the exact Euclidean distance to the k-th nearest row of a bank (Sun et al.
    2022, §3). queries: (N, D) float64. bank: blocks (M, D), at least k rows in all."""
    nearest = queries.new_full((len(queries), k), torch.inf)  # squared
    lengths = queries.square().sum(1)
    step = max(1, PAIRS // max(len(queries), 1))
    for block in bank:
        for start in range(0, len(block), step):
            rows = block[start : start + step].to(queries)
            squares = torch.addmm(rows.square().sum(1), queries, rows.T, alpha=-2)
            squares += lengths[:, None]
            both = torch.cat([nearest, squares], 1)
            nearest = both.topk(k, dim=1, largest=False, sorted=False).values
    return nearest.amax(1).clamp_min(0).sqrt()


@dataclass(frozen=True)
class KNN(Detector):
    """Distance between u/‖u‖ and its k-th nearest neighbour among the rows fitted on, exact.

    bank: (N, D) float32, rows of length 1; a large one stays in its file and is read in blocks.
    """

    name = "knn"
    source = "Sun et al. 2022"
    about = "distance of the normalised embedding to its k-th nearest neighbour"
    formula = r"s = \left\lVert \frac{u}{\lVert u \rVert} - r_{(k)} \right\rVert"
    needs = frozenset({"embedding"})
    fitted = True
    better_on_real = True
    heavy = True

    bank: Bank
    k: int

    @classmethod
    def fit_needs(cls, **hyperparameters: object) -> frozenset[str]:
        return cls.needs | {"logits"}

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        k: Annotated[
            int | None,
            "which neighbour; by default 50, or half the rows of an average class if that is less",
        ] = None,
    ) -> Self:
        """Two passes; a large bank is only read when it is saved. k: 50 where it is not given, or
        half the rows of an average class where that is less, which is said: neighbours are to be
        of the same class. Raises DetectorError when there are fewer than k rows."""
        if k is not None:
            require_positive(cls.name, k=k)
        rows = width = classes = 0
        for block in finite_rows(train, cls.fit_needs(), cls.name):
            rows, width = rows + len(block), recorded(block.embedding).shape[1]
            classes = recorded(block.logits).shape[1]
        if k is None:
            k = min(K, max(1, rows // (2 * classes)))
            if k < K:
                log.info(
                    f"{cls.name}: k = {k}, half of the {rows / classes:.3g} rows a class that were "
                    f"fitted on, not {K}"
                )
        if k > rows:
            raise DetectorError(
                f"{cls.name}.k={k}, but there are only {rows} rows to fit on: choose a smaller k, "
                "or more rows"
            )

        def normalised() -> Iterable[Tensor]:
            for block in finite_rows(train, cls.fit_needs(), cls.name):
                yield unit(recorded(block.embedding)).float()

        return cls(Bank((rows, width), normalised).settled(), k)

    def _score(self, test: Features) -> Tensor:
        return kth_distance(unit(recorded(test.embedding)), self.bank.blocks(), self.k)
