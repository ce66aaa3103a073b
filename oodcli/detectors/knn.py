"""Distance to the k-th nearest neighbour (Sun et al. 2022)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor

from oodcli.detectors.bank import Bank
from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.class_statistics import predicted_among, predicted_class
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


def nearest_squares(
    queries: Tensor, bank: Iterable[Tensor], k: int, classes: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """(N, k) float64: the squared Euclidean distances to the k nearest rows of a bank (Sun et al.
    2022, §3), exact, in any order. queries: (N, D) float64. bank: blocks (M, D), at least k rows in
    all. classes: of the queries, (N,), and of the rows; the others are infinitely far."""
    nearest = queries.new_full((len(queries), k), torch.inf)
    lengths = queries.square().sum(1)
    step = max(1, PAIRS // max(len(queries), 1))
    done = 0
    for block in bank:
        for start in range(0, len(block), step):
            rows = block[start : start + step].to(queries)
            squares = torch.addmm(rows.square().sum(1), queries, rows.T, alpha=-2)
            squares += lengths[:, None]
            if classes is not None:
                wanted, of = classes
                others = of[done : done + len(rows)] != wanted[:, None]
                squares = squares.masked_fill_(others, torch.inf)
            done += len(rows)
            both = torch.cat([nearest, squares], 1)
            nearest = both.topk(k, dim=1, largest=False, sorted=False).values
    return nearest


@dataclass(frozen=True)
class KNN(Detector):
    """Distance between u/‖u‖ and its k-th nearest neighbour among the rows fitted on, exact.
    ``mean``: the mean distance to the k nearest. ``among=predicted``: neighbours are rows predicted
    as the same class; where there are fewer than k, the farthest of them is the k-th.

    bank: (N, D) float32, rows of length 1; a large one stays in its file and is read in blocks.
    predicted: (N,) int64, the predicted class of each, only with ``among=predicted``.
    """

    name = "knn"
    source = "Sun et al. 2022"
    about = "distance of the normalised embedding to its k-th nearest neighbour"
    formula = r"s = \left\lVert \frac{u}{\lVert u \rVert} - r_{(k)} \right\rVert"
    needs = frozenset({"embedding"})
    fit_also = frozenset({"logits"})
    fitted = True
    better_on_real = True
    heavy = True
    later: ClassVar = {"mean": False, "predicted": torch.zeros(0, dtype=torch.int64)}

    bank: Bank
    k: int
    mean: bool
    predicted: Tensor

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        k: Annotated[
            int | None,
            "which neighbour; by default 50, or half the rows of an average class if that is less",
        ] = None,
        mean: Annotated[
            bool, "mean distance to the k nearest; by default that to the k-th, as in the paper"
        ] = False,
        among: Annotated[
            Literal["all", "predicted"],
            "predicted: rows that are predicted alike; by default all, as in the paper",
        ] = "all",
    ) -> Self:
        """Two passes; a large bank is only read when it is saved. k: 50 where it is not given, or
        half the rows of an average class where that is less, which is said: neighbours are to be
        of the same class. Raises DetectorError when there are fewer than k rows."""
        if k is not None:
            require_positive(cls.name, k=k)
        rows = width = classes = 0
        predicted = [torch.zeros(0, dtype=torch.int64)]
        for block in finite_rows(train, cls.fit_needs(), cls.name):
            rows, width = rows + len(block), recorded(block.embedding).shape[1]
            classes = recorded(block.logits).shape[1]
            if among == "predicted":
                predicted.append(predicted_class(block))
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

        return cls(Bank((rows, width), normalised).settled(), k, mean, torch.cat(predicted))

    @property
    def score_needs(self) -> frozenset[str]:
        return self.needs | ({"logits"} if len(self.predicted) else set())

    def _score(self, test: Features) -> Tensor:
        classes = None
        if len(self.predicted):
            logits = recorded(test.logits)
            present = torch.bincount(self.predicted, minlength=logits.shape[1]) > 0
            classes = predicted_among(logits, present), self.predicted
        queries = unit(recorded(test.embedding))
        squares = nearest_squares(queries, self.bank.blocks(), self.k, classes)
        found = torch.isfinite(squares)
        distances = torch.where(found, squares, 0.0).clamp_min(0).sqrt()
        return distances.sum(1) / found.sum(1) if self.mean else distances.amax(1)
