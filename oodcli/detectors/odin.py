"""ODIN (Liang et al. 2018): temperature and a small step against the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.hyperparameters import require_positive
from oodcli.detectors.msp import max_softmax
from oodcli.features import Features, OdinStep, Where, recorded


@dataclass(frozen=True)
class ODIN(Detector):
    """1 − max softmax(z'/T), z' the logits of x' = x − ε sign(∇ₓ CE(z/T, argmax z)).

    epsilon is in pixel units of [0, 1]; the recording divides it by the preprocessing's std. The
    logits of x' are recorded, so a cache holds them for one epsilon and T.
    """

    name = "odin"
    source = "Liang et al. 2018"
    about = "softmax at T = 1000 after a small step that lowers the loss"
    formula = r"""
        s = 1 - \max_c \operatorname{softmax}\bigl(z(x') / T\bigr)_c

        x' = x - \varepsilon
        \operatorname{sign}\bigl(\nabla_x \operatorname{CE}(z(x) / T, k)\bigr)
    """
    needs = frozenset({"odin.logits"})

    epsilon: Annotated[float, "length of the step, in pixel units of [0, 1]"] = 0.0014
    T: Annotated[float, "temperature of the loss and of the softmax, above 0"] = 1000.0
    where: Annotated[
        Where, "which values of the image change: all, or the one of largest gradient (i-ODIN)"
    ] = "all"

    later: ClassVar[Mapping[str, Any]] = {"where": "all"}

    def __post_init__(self) -> None:
        require_positive(self.name, T=self.T)

    @property
    def made_with(self) -> OdinStep:
        return OdinStep(self.epsilon, self.T, self.where)

    def _score(self, test: Features) -> Tensor:
        return max_softmax(recorded(test.odin_logits), self.T)
