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
from oodcli.images.words import printable
from oodcli.stages.chosen import Chosen


@dataclass(frozen=True)
class Rule:
    """How scores become decisions. A calibration gives p-values, and what has p ≤ rate is OOD;
    otherwise what exceeds the threshold is. An infinite score always is. silent: predicted classes
    without a verdict, whatever the score. more: what the basis says of classes."""

    threshold: float = torch.inf
    calibration: Calibration | None = None
    rate: float = 0.0
    silent: tuple[int, ...] = ()
    more: str = ""

    @property
    def basis(self) -> str:
        """What a verdict rests on, in words."""
        if self.calibration is None:
            return f"score above {self.threshold:.6g}{self.more}"
        return f"{self.calibration.words}; nominal {self.rate:g}{self.more}"

    def columns(
        self, name: str, scores: Tensor, predicted: Tensor | None = None
    ) -> dict[str, NDArray[np.float64] | Sequence[str]]:
        """``<detector>.p`` (with a calibration), ``.ood`` and ``.basis``; NaN where there is no
        verdict. scores, predicted: (N,), the score and the class of each row; without classes
        every row has a verdict."""
        silent = torch.zeros(len(scores), dtype=torch.bool)
        if predicted is not None and self.silent:
            silent = torch.isin(predicted.cpu(), torch.tensor(self.silent))
        return self.columns_without(name, scores, silent)

    def columns_without(
        self, name: str, scores: Tensor, silent: Tensor
    ) -> dict[str, NDArray[np.float64] | Sequence[str]]:
        """The same. silent: (N,), which rows have no verdict."""
        basis = [self.basis] * len(scores)

        def cells(values: Tensor) -> NDArray[np.float64]:
            found: NDArray[np.float64] = values.double().masked_fill(silent, torch.nan).numpy()
            return found

        if self.calibration is None:
            flags = ~(scores <= self.threshold) | torch.isinf(scores)
            return {f"{name}.ood": cells(flags), f"{name}.basis": basis}
        p = self.calibration.p_value(scores)
        flags = (p <= self.rate) | torch.isinf(scores)
        return {f"{name}.p": cells(p), f"{name}.ood": cells(flags), f"{name}.basis": basis}


SHOWN = 5
"""So many classes are named, the others counted."""


def classes_in_words(classes: Sequence[int], class_names: Sequence[str]) -> str:
    """``cat, dog``, at most five of them and the count of the others."""
    names = [class_names[k] if k < len(class_names) else str(k) for k in classes]
    more = f" and {len(names) - SHOWN} more classes" if names[SHOWN:] else ""
    return ", ".join(printable(name) for name in names[:SHOWN]) + more


def rule_of(
    chosen: Chosen,
    class_names: Sequence[str],
    *,
    threshold: float = torch.inf,
    calibration: Calibration | None = None,
    rate: float = 0.0,
) -> Rule:
    """The rule of a detector. It has no verdict on a predicted class without rows among those that
    the detector was fitted on, or among those to calibrate on."""
    fitted = chosen.without_rows
    calibrated = () if calibration is None else calibration.without_verdict
    lacking = {"fit": fitted, "calibrate": calibrated}
    if fitted == calibrated:
        lacking = {"fit or calibrate": fitted}
    more = [
        f"no verdict on predictions of {classes_in_words(classes, class_names)}: no rows to {what} "
        "on"
        for what, classes in lacking.items()
        if classes
    ]
    if calibration is not None and calibration.without_rows and not calibrated:
        few = f"{len(calibration.without_rows)} of {calibration.classes} classes"
        more.append(f"no rows to calibrate on of {few}")
    silent = tuple(sorted({*fitted, *calibrated}))
    return Rule(threshold, calibration, rate, silent, "".join(f"; {each}" for each in more))


def calibrated_rules(
    chosen: Sequence[Chosen], rate: float, class_names: Sequence[str], *, mirror: bool
) -> dict[str, Rule]:
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
        rules[each.name] = rule_of(each, class_names, calibration=calibration, rate=rate)
    return rules


StreamRule = Callable[[Tensor], float]
"""All finite and infinite scores of a stream → the threshold."""
