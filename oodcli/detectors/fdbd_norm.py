"""fDBD (Liu & Qin 2024) without data: the distance from the origin in place of the mean."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.fdbd import FDBD, regularised
from oodcli.detectors.head_geometry import mean_distances
from oodcli.detectors.latent_space import predicted_products
from oodcli.features import Features


@dataclass(frozen=True)
class FDBDNorm(Detector):
    """Minus the mean distance of u to the boundaries between the predicted class k and the others,
    divided by the length of u. It is ``fdbd`` with μ = 0, which needs no rows to fit on."""

    name = "fdbd-norm"
    source = "Liu & Qin 2024 (ICML), arXiv 2312.11536"
    about = "mean distance to the decision boundaries, by the length of the embedding"
    formula = r"""
        s = -\frac{1}{\lVert u \rVert} \operatorname*{mean}_{c \neq k}
        \frac{z_k - z_c}{\lVert w_k - w_c \rVert}
    """
    needs = FDBD.needs

    def _score(self, test: Features) -> Tensor:
        length = test.shared(predicted_products, False).uu.sqrt()
        return regularised(test.shared(mean_distances), length)
