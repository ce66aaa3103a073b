"""A linear SVM on indicators (Begon & Geurts 2021, §3): what labelled OOD rows could give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.class_statistics import column_moments
from oodcli.detectors.hyperparameters import require_positive
from oodcli.detectors.one_class_sum import SUMMED, OneClassSum, indicators, standardised
from oodcli.errors import DetectorError
from oodcli.features import Features

INDICATORS = (*SUMMED, "in-dms", "in-dms-aos", "in-dss", "in-dss-ext")
"""Every indicator of the paper that the one forward pass gives: all but ODIN."""


@dataclass(frozen=True)
class Supervised(Detector):
    """Signed distance from the plane that separates the rows fitted on, w·(h − μ)/σ + b, over
    18 indicators: those of ``1c-sum`` and the four of the image alone.

    mean, sd, weight: (18,), in the order of ``INDICATORS``; bias: (). mean and sd are those of all
    rows; both groups weigh the same in the loss, however many rows they have. An upper bound on
    what the indicators can do on OOD data that are known beforehand.
    """

    name = "supervised"
    source = "Begon & Geurts 2021, §3"
    about = "linear SVM on 18 indicators, trained on labelled ID and OOD rows"
    formula = r"s = w^\top \frac{h - \mu}{\sigma} + b"
    needs = OneClassSum.needs
    fitted = True
    uses_ood = True
    needs_ood = True

    mean: Tensor
    sd: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        ood: Blocks | None = None,
        C: Annotated[float, "inverse strength of the SVM's penalty, above 0"] = 1.0,  # noqa: N803
    ) -> Self:
        """One pass over each; 18 numbers a row are kept. Raises DetectorError when a record or
        one of the two groups is missing."""
        from sklearn.svm import LinearSVC

        require_positive(cls.name, C=C)
        if ood is None:
            raise DetectorError(
                f"{cls.name} also needs OOD rows: oodcli fit CACHE.h5 -d {cls.name} --ood OOD.h5"
            )
        groups = [
            torch.cat([indicators(b, INDICATORS) for b in finite_rows(blocks, cls.needs, cls.name)])
            for blocks in (train, ood)
        ]
        rows = torch.cat(groups)
        label = np.repeat([0, 1], [len(group) for group in groups])
        finite = torch.isfinite(rows).all(1)
        mean, sd = column_moments(rows)
        svm = LinearSVC(C=C, dual=False, class_weight="balanced", tol=1e-8, max_iter=10_000)
        svm.fit(standardised(rows[finite], mean, sd).numpy(), label[finite.numpy()])
        return cls(
            mean,
            sd,
            torch.from_numpy(svm.coef_[0]),
            torch.tensor(float(svm.intercept_[0])).double(),
        )

    def _score(self, test: Features) -> Tensor:
        h = indicators(test, INDICATORS)
        return standardised(h, self.mean, self.sd) @ self.weight + self.bias
