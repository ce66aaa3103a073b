"""ViM (Wang et al. 2022): what of the embedding lies off the principal space, as one more logit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.energy import energy
from oodcli.detectors.sums import TILE, moments
from oodcli.detectors.widened import WIDEN, widened
from oodcli.errors import DetectorError
from oodcli.features import Features, LinearHead, recorded


def head_origin(head: LinearHead) -> Tensor:
    """(D,) o = −W⁺ b, where the head's logits are (nearest to) zero (Wang et al. 2022, §4.1)."""
    origin: Tensor = -torch.linalg.pinv(head.weight.double()) @ head.bias.double()
    return origin


def default_dim(width: int) -> int:
    """Half the width of the embedding, at most the 1,000 of the paper."""
    return min(width // 2, 1000)


def residual_norm(embedding: Tensor, origin: Tensor, basis: Tensor) -> Tensor:
    """(N,) ‖Rᵀ(u − o)‖: the part of u − o off the principal space. embedding: (N, D); basis: R,
    (D, D − dim), orthonormal."""
    residual: Tensor = ((embedding.double() - origin) @ basis).norm(dim=1)
    return residual


def null_space(
    train: Blocks, needs: frozenset[str], who: str, dim: int | None
) -> tuple[Tensor, Tensor]:
    """o, (D,), and R, (D, D − dim): the eigenvectors of Σ (u − o)(u − o)ᵀ but for the ``dim`` with
    the largest eigenvalues. One pass; one (D, D) sum is kept. Raises DetectorError for a dim that
    is not in 1 … D − 1, and when there is no row."""
    first = next(iter(finite_rows(train, needs, who)))
    origin = head_origin(recorded(first.head))
    width = len(origin)
    dim = default_dim(width) if dim is None else dim
    if not 0 < dim < width:
        raise DetectorError(
            f"{who}.dim={dim} must be at least 1 and below {width}, the width of the embedding"
        )
    sums = moments(train, needs, who, lambda block: recorded(block.embedding).double() - origin)
    return origin, torch.linalg.eigh(sums["square"]).eigenvectors[:, : width - dim].contiguous()


CLOSE = 1e-2
"""A residual of a smaller share of the length is computed in float64; of others, float32 has seven
digits, in half the time."""


def _sums(train: Blocks, origin: Tensor, basis: Tensor) -> tuple[float, float, float]:
    """Σ max z, Σ ‖Rᵀ(u − o)‖ and Σ ‖u − o‖ over rows, with the products of the type of R."""
    found = torch.zeros(3, dtype=torch.float64)
    for block in finite_rows(train, ViM.needs, ViM.name):
        rows = (recorded(block.embedding).double() - origin).to(basis.dtype)
        largest = recorded(block.logits).amax(1)
        values = [largest, (rows @ basis).norm(dim=1), rows.norm(dim=1)]
        found += torch.stack([each.double().sum() for each in values])
    largest_sum, residual, length = found.tolist()
    return largest_sum, residual, length


DIM = "dimensions of the principal space, below D; by default D/2, at most 1000"
"""Meaning of a setting."""


@dataclass(frozen=True)
class ViM(Detector):
    """Distance of u from the principal space, scaled to a logit, minus logsumexp z. The principal
    space: the ``dim`` eigenvectors of Σ (u − o)(u − o)ᵀ with the largest eigenvalues; R are the
    others, o = −W⁺b. α: mean of max z over mean of ‖Rᵀ(u − o)‖, over the rows fitted on.

    The softmax of eq. 7 rises with this. origin: (D,); basis: R, (D, D − dim); alpha: ().
    """

    name = "vim"
    source = "Wang et al. 2022, eq. 4-7"
    about = "virtual logit from the embedding's residual outside its principal subspace"
    formula = r"s = \alpha \lVert R^\top (u - o) \rVert - \log \sum_c e^{z_c}"
    needs = frozenset({"logits", "embedding", "head"})
    fitted = True
    better_on_real = True
    heavy = True
    widens = True

    origin: Tensor
    basis: Tensor
    alpha: Tensor

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        dim: Annotated[int | None, DIM] = None,
        widen: Annotated[float | None, WIDEN] = None,
    ) -> Self:
        """Two passes, two more to widen; one (D, D) sum is kept. dim: half the width, at most
        1,000, where it is not given. Raises DetectorError when it is not in 1 … D − 1, when nothing
        lies off that space, and for a share outside 0 … 1."""
        train = widened(train, cls.needs, cls.name, widen)
        origin, basis = null_space(train, cls.needs, cls.name, dim)
        single = len(origin) > TILE
        largest, residual, length = _sums(train, origin, basis.float() if single else basis)
        if single and residual < CLOSE * length:
            largest, residual, length = _sums(train, origin, basis)
        if not residual > 0:
            raise DetectorError(
                f"{cls.name}: no row fitted on leaves the space of its first "
                f"{len(basis) - basis.shape[1]} principal directions, so there is no residual to "
                f"scale: choose a smaller -p {cls.name}.dim"
            )
        return cls(origin, basis, torch.tensor(largest / residual, dtype=torch.float64))

    def _score(self, test: Features) -> Tensor:
        virtual = residual_norm(recorded(test.embedding), self.origin, self.basis)
        return self.alpha * virtual + energy(recorded(test.logits))
