"""How scores become decisions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodcli import notes
from oodcli.detectors.c2ir_z import MANY_CLASSES
from oodcli.detectors.calibration import Calibration, contamination_threshold, split_threshold
from oodcli.errors import DetectorError, OodcliError
from oodcli.files.made import json_number
from oodcli.images.words import printable
from oodcli.stages.chosen import Chosen

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Deciding:
    """How to decide: by a nominal false-alarm rate, by thresholds (``NAME=NUMBER``, ``labelled`` or
    ``split``), or by the share of OOD images in the stream. At most one is given."""

    fpr: float | None = None
    threshold: Sequence[str] = ()
    contamination: float | None = None

    def __post_init__(self) -> None:
        if sum((self.fpr is not None, bool(self.threshold), self.contamination is not None)) > 1:
            raise OodcliError(
                "--fpr, --threshold and --contamination exclude each other: choose one"
            )

    @property
    def decides(self) -> bool:
        return self.fpr is not None or bool(self.threshold) or self.contamination is not None

    @property
    def stream_rule(self) -> StreamRule | None:
        """Finds thresholds in the whole stream; None where they are known in advance."""
        if self.contamination is not None:
            return partial(contamination_threshold, share=self.contamination)
        return split_threshold if list(self.threshold) == ["split"] else None

    def rules(
        self, chosen: Sequence[Chosen], class_names: Sequence[str], *, mirror: bool
    ) -> dict[str, Rule]:
        """Detector → its rule, if known before the stream. Raises OodcliError for a detector that
        has no calibration or learnt threshold, and for a malformed threshold."""
        if self.fpr is not None:
            return _at_rate(chosen, self.fpr, class_names, mirror=mirror)
        if self.stream_rule is not None:
            return {}
        rules: dict[str, Rule] = {}
        for text in self.threshold:
            if text == "labelled":
                rules |= _labelled_rules(chosen, class_names)
            else:
                one, value = _named_threshold(text, chosen)
                rules[one.name] = rule_of(one, class_names, threshold=value)
        return rules


TOO_STRICT = (
    "thresholds from virtual images are far too strict (one flagged 99 % of real images where 5 % "
    "were wanted): calibrate on real images"
)


def off_by(classes: int) -> str:
    """By how many percentage points false alarms missed 5 % with thresholds from virtual images
    (docs/concepts.md; docs/research/many-classes.md)."""
    return "−5 to +20" if classes > MANY_CLASSES else "−5 to +8"


def _at_rate(
    chosen: Sequence[Chosen], rate: float, class_names: Sequence[str], *, mirror: bool
) -> dict[str, Rule]:
    rules = calibrated_rules(chosen, rate, class_names, mirror=mirror)
    for name, rule in rules.items():
        if rule.calibration is not None and rule.calibration.resolution > rate:
            notes.say(
                log,
                f"{name}: the smallest p-value from {rule.calibration.images} is "
                f"{rule.calibration.resolution:.3g}, so --fpr {rate:g} flags only infinite scores: "
                "calibrate on more images",
            )
    virtual = [
        each
        for each in chosen
        if each.name in rules
        and (calibration := rules[each.name].calibration) is not None
        and calibration.virtual
    ]
    strict = [each.name for each in virtual if each.detector.strict_on_virtual]
    if len(virtual) > len(strict):
        off = off_by(len(class_names))
        notes.say(log, f"thresholds from virtual images were off by {off} points in our tests")
    if strict:
        notes.say(log, f"{', '.join(strict)}: {TOO_STRICT}")
    return rules


def _labelled_rules(chosen: Sequence[Chosen], class_names: Sequence[str]) -> dict[str, Rule]:
    for each in chosen:
        if each.threshold is None:
            raise OodcliError(
                f"{each.name} has learnt no threshold",
                hint="'oodcli fit … --labelled FILE.csv' learns one",
            )
    return {
        each.name: rule_of(each, class_names, threshold=each.threshold)
        for each in chosen
        if each.threshold is not None
    }


def _named_threshold(text: str, chosen: Sequence[Chosen]) -> tuple[Chosen, float]:
    """``energy=-5.2``: the detector and the number."""
    name, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if not equals or value != value:
        raise OodcliError(
            f"--threshold {text}: expected NAME=NUMBER (such as energy=-5.2), split or labelled"
        )
    by_name = {each.name: each for each in chosen}
    if name not in by_name:
        raise OodcliError(
            f"--threshold {text}: {name} is not scored; the detectors are {', '.join(by_name)}"
        )
    return by_name[name], value


@dataclass(frozen=True)
class Rule:
    """How scores become decisions. With a calibration a row is OOD if p ≤ rate, otherwise if its
    score exceeds the threshold. An infinite score is always OOD. silent: predicted classes without
    a verdict. more: part of the basis about classes."""

    threshold: float = torch.inf
    calibration: Calibration | None = None
    rate: float = 0.0
    silent: tuple[int, ...] = ()
    more: str = ""

    @property
    def basis(self) -> str:
        """Text of the column ``<detector>.basis``."""
        if self.calibration is None:
            return f"score above {self.threshold:.6g}{self.more}"
        return f"{self.calibration.words}; nominal {self.rate:g}{self.more}"

    @property
    def distribution(self) -> dict[str, Any] | None:
        """The calibration in numbers that JSON can hold, with the digits of a scores file; None
        without one."""
        if self.calibration is None:
            return None
        return {
            "images": self.calibration.words,
            "rate": self.rate,
            "threshold": json_number(self.calibration.threshold(self.rate)),
            "quantiles": [json_number(each) for each in self.calibration.quantiles().tolist()],
        }

    def columns(
        self, name: str, scores: Tensor, predicted: Tensor | None = None
    ) -> dict[str, NDArray[np.float64] | Sequence[str]]:
        """``<detector>.p`` (with a calibration), ``.ood`` and ``.basis``; NaN without a verdict.
        scores, predicted: (N,), the score and the predicted class of each row; without classes
        every row has a verdict."""
        silent = torch.zeros(len(scores), dtype=torch.bool)
        if predicted is not None and self.silent:
            silent = torch.isin(predicted.cpu(), torch.tensor(self.silent))
        return self.columns_without(name, scores, silent)

    def columns_without(
        self, name: str, scores: Tensor, silent: Tensor
    ) -> dict[str, NDArray[np.float64] | Sequence[str]]:
        """The same columns. silent: (N,), rows without a verdict."""
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
"""Classes listed by name before the others are only counted."""


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
    """The rule of a detector. It gives no verdict on a predicted class without fitting rows or
    without calibration rows."""
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
    """Rules with a nominal false-alarm rate, of the detectors that have a calibration; a note lists
    the others. Raises DetectorError if none has one."""
    rules, without = {}, []
    view = "mirror" if mirror else "plain"
    for each in chosen:
        calibration = each.calibrations.get(view)
        if calibration is None:
            without.append(each)
        else:
            rules[each.name] = rule_of(each, class_names, calibration=calibration, rate=rate)
    if rules and without:
        names = ", ".join(each.name for each in without)
        notes.say(log, f"no verdicts of {names}: without a calibration for --fpr")
    elif without:
        raise _uncalibrated(without, mirror=mirror)
    return rules


def _uncalibrated(without: Sequence[Chosen], *, mirror: bool) -> DetectorError:
    """The error if no detector has a calibration."""
    names = [each.name for each in without]
    have = "has" if len(names) == 1 else "have"
    how = "record both views of the calibration rows with 'oodcli extract … --mirror'"
    if not mirror or not any(each.calibrations for each in without):
        how = (
            f"calibrate with 'oodcli fit … -d {without[0].detector.name} --calibrate FILE.h5' on "
            "real images or accuracy-matched virtual ones, or run 'oodcli prepare' with --accuracy "
            "or --images"
        )
    return DetectorError(f"{', '.join(names)} {have} no calibration for --fpr", hint=how)


StreamRule = Callable[[Tensor], float]
"""All finite and infinite scores of a stream → the threshold."""


def basis_in_words(
    one: Chosen, rule: Rule, found: Mapping[str, float], class_names: Sequence[str]
) -> str:
    """The basis of a detector's verdicts and the false-alarm rates to expect. found: thresholds
    from the stream."""
    if one.name in found:
        lacks = rule_of(one, class_names).more
        return f"score above {found[one.name]:.6g}, found in these scores{lacks}"
    if rule.calibration is None:
        return f"score above {rule.threshold:.6g}{rule.more}"
    low, high = rule.calibration.achieved(rule.rate)
    return (
        f"calibrated on {rule.calibration.images}; expect {100 * low:.1f}–{high:.1%} false alarms"
        f"{rule.more}"
    )
