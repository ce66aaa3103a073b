"""How scores become decisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodcli.calibration import Calibration
from oodcli.errors import DetectorError
from oodcli.stages.chosen import Chosen


@dataclass(frozen=True)
class Rule:
    """How scores become decisions. A calibration gives p-values, and what has p ≤ rate is OOD;
    otherwise what exceeds the threshold is. An infinite score always is."""

    threshold: float = torch.inf
    calibration: Calibration | None = None
    rate: float = 0.0

    @property
    def basis(self) -> str:
        """What a verdict rests on, in words."""
        if self.calibration is None:
            return f"score above {self.threshold:.6g}"
        return f"{self.calibration.words}; nominal {self.rate:g}"

    def columns(self, name: str, scores: Tensor) -> dict[str, NDArray[np.float64] | Sequence[str]]:
        """``<detector>.p`` (with a calibration), ``.ood`` and ``.basis``. scores: (N,)."""
        basis = [self.basis] * len(scores)
        if self.calibration is None:
            flags = ~(scores <= self.threshold) | torch.isinf(scores)
            return {f"{name}.ood": flags.double().numpy(), f"{name}.basis": basis}
        p = self.calibration.p_value(scores)
        flags = (p <= self.rate) | torch.isinf(scores)
        return {
            f"{name}.p": p.double().numpy(),
            f"{name}.ood": flags.double().numpy(),
            f"{name}.basis": basis,
        }


def calibrated_rules(chosen: Sequence[Chosen], rate: float, *, mirror: bool) -> dict[str, Rule]:
    """Rules with a nominal false-alarm rate. Raises DetectorError when an artefact knows none."""
    rules = {}
    view = "mirror" if mirror else "plain"
    for each in chosen:
        calibration = each.calibrations.get(view)
        if calibration is None:
            how = "'oodcli extract … --mirror' records both views of the rows to --calibrate on"
            if not mirror or not each.calibrations:
                how = (
                    f"'oodcli fit … -d {each.detector.name} --calibrate FILE.h5' makes a "
                    "calibrated artefact, from real images or from accuracy-matched virtual ones "
                    "(oodcli extract … --match-accuracy)"
                )
            raise DetectorError(f"{each.name} has no calibration for --fpr: {how}")
        rules[each.name] = Rule(calibration=calibration, rate=rate)
    return rules


StreamRule = Callable[[Tensor], float]
"""All finite and infinite scores of a stream → the threshold."""
