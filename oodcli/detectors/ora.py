"""ORA (Demirel et al. 2025): the angle between an embedding and the boundaries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, by_rows, finite_rows
from oodcli.detectors.class_statistics import class_means
from oodcli.detectors.head_geometry import Boundaries, boundaries
from oodcli.features import Features, LinearHead, recorded


def widest_angle(of: Boundaries, square: Tensor, bias: Tensor) -> Tensor:
    """(N,) max over c of the angle between v = u − μ and its nearest point v_c on the boundary to
    class c, over π (Demirel et al. 2025); 0 where a vector is 0.

    v_c = v − t (w_k − w_c) with t = (z_k − z_c)/‖w_k − w_c‖², so v·v_c = ‖v‖² − t a and ‖v_c‖² =
    ‖v‖² − 2 t a + t² ‖w_k − w_c‖², a = v·(w_k − w_c) = (z_k − z_c) − (m_k − m_c): no (N, K, D).

    square: ‖v‖², (N,) float64. bias: m = Wμ + b, the logits of μ, (K,) float64.
    """
    along = of.gap - (bias[of.predicted, None] - bias)  # a, (N, K)
    shift = of.gap / of.square * along  # t a; 0 where there is no boundary
    foot = square[:, None] - 2 * shift + of.gap.square() / of.square  # ‖v_c‖²
    lengths = (square[:, None] * foot.clamp_min(0)).sqrt()
    cosine = (square[:, None] - shift) / torch.where(lengths > 0, lengths, 1.0)
    cosine = torch.where(lengths > 0, cosine, 1.0)
    return torch.arccos(cosine.amin(1).clamp(-1, 1)) / math.pi


def centre_logits(head: LinearHead, centre: Tensor) -> Tensor:
    """(K,) float64: the logits of one embedding (D,)."""
    return head.double.weight @ centre + head.double.bias


@dataclass(frozen=True)
class ORA(Detector):
    """Minus the widest angle, seen from μ, between u and its nearest point u_c on the boundary
    between the predicted class k and another class c. μ is the mean of the class means of the rows
    fitted on. Classes are the labels, where unknown the predicted ones.

    centre: μ, (D,).
    """

    name = "ora"
    source = "Demirel et al. 2025 (NeurIPS), arXiv 2410.04525"
    about = "widest angle between the embedding and a decision boundary, seen from the mean"
    formula = r"""
        s = -\frac{1}{\pi} \max_{c \neq k} \arccos
        \frac{(u - \mu)^\top (u_c - \mu)}{\lVert u - \mu \rVert \lVert u_c - \mu \rVert}

        u_c = u - \frac{z_k - z_c}{\lVert w_k - w_c \rVert^2} (w_k - w_c)
    """
    needs = frozenset({"logits", "embedding", "head"})
    fitted = True

    centre: Tensor

    @classmethod
    def fit(cls, train: Blocks) -> Self:
        """One pass; a (K, D) sum is kept. Raises DetectorError when there is no row."""
        rows = finite_rows(train, cls.needs, cls.name)
        count, mean = class_means(rows, lambda block: recorded(block.embedding))
        return cls(mean[count > 0].mean(0))

    def _score(self, test: Features) -> Tensor:
        square = by_rows(
            lambda u: (u.double() - self.centre).square().sum(1), recorded(test.embedding)
        )
        bias = centre_logits(recorded(test.head), self.centre)
        return -widest_angle(test.shared(boundaries), square, bias)
