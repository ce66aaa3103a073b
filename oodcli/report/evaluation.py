"""Scores files → every metric of every detector on every OOD set, and what to know about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from oodcli.errors import FileError
from oodcli.files.made import SHA256, require_same_origin
from oodcli.files.scores import STREAM, Scores
from oodcli.metrics import CONVENTIONS, LOWER_IS_BETTER, MEAN, Estimate, evaluate_sets
from oodcli.report.thresholds import judged

ID = "ID"
"""The name of the in-distribution rows among the counts."""

FEW_ROWS = 20
"""Below this many ID rows, 95 % of them is all of them."""


@dataclass(frozen=True)
class Row:
    """One line of metrics.csv: fractions in [0, 1]; low and high are NaN without resamples."""

    detector: str
    set: str
    metric: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Counts:
    """What one scores file held. rows: all of them, the unreadable too. infinite: how many scores
    of each detector are infinite; left out where there is none."""

    set: str
    source: str
    rows: int
    unreadable: int
    infinite: Mapping[str, int]


@dataclass(frozen=True)
class Evaluation:
    """All that is reported. rows: by detector, set (``mean`` last), metric. counts: ID first, then
    the OOD sets. accuracy: share of the ``labelled`` readable ID rows whose class was predicted;
    None where no label is known. notes: sentences that belong beside the figures. saw: detector →
    the OOD data that it has learnt from; left out where there are none. command: the command line,
    where there is one."""

    rows: tuple[Row, ...]
    counts: tuple[Counts, ...]
    accuracy: float | None
    labelled: int
    notes: tuple[str, ...]
    resamples: int
    seed: int
    saw: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    @cached_property
    def detectors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.detector for row in self.rows))

    @cached_property
    def sets(self) -> tuple[str, ...]:
        """The OOD sets, without ``mean``."""
        return tuple(dict.fromkeys(row.set for row in self.rows if row.set != MEAN))

    @property
    def columns(self) -> tuple[str, ...]:
        """The sets that a table shows: with ``mean`` where there is something to average."""
        return self.sets if len(self.sets) == 1 else (*self.sets, MEAN)

    def get(self, detector: str, set_: str, metric: str) -> Estimate:
        """Raises KeyError when there is no such row."""
        return self._index[detector, set_, metric]

    def best(self, set_: str, metric: str) -> frozenset[str]:
        """The best detectors on a set. Those that a table of percents with two decimals cannot
        tell apart share the honour."""
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        shown = {
            detector: sign * round(100 * self.get(detector, set_, metric).value, 2)
            for detector in self.detectors
        }
        top = max(shown.values())
        return frozenset(detector for detector, value in shown.items() if value == top)

    def marked(self, detector: str) -> str:
        """The name, with an asterisk where the detector has learnt from OOD data."""
        return f"{detector}*" if detector in self.saw else detector

    @property
    def footnote(self) -> str:
        """What the asterisk means; empty where there is none."""
        if not self.saw:
            return ""
        others = ", unlike the others" if len(self.saw) < len(self.detectors) else ""
        listed = ", ".join(f"{detector} from {words}" for detector, words in self.saw.items())
        return f"* has learnt from OOD data{others}: {listed}."

    @cached_property
    def _index(self) -> Mapping[tuple[str, str, str], Estimate]:
        return {
            (row.detector, row.set, row.metric): Estimate(row.value, row.low, row.high)
            for row in self.rows
        }


def evaluate_files(
    id_scores: Scores,
    ood_scores: Mapping[str, Scores],
    *,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates the detectors that all files have in common, in the order of the ID file.

    ood_scores: by the name of the set. progress: called with (done, total) after each detector.
    The rows are resampled alike for all detectors (``metrics.evaluate_sets``).

    Raises FileError when no detector is in all files, when a file has no readable row, when there
    is no set, when a set is called ``mean`` or ``ID``, when two files were scored with different
    checkpoints, preprocessing or fits of a detector, and when files of two jobs have a column of
    ``score --stream`` in common.
    """
    if not ood_scores:
        raise FileError("no OOD set: give at least one, --ood NAME=F")
    for name in (MEAN, ID):
        if name in ood_scores:
            raise FileError(f"--ood {name}=…: the report uses this name itself; choose another")
    files = {ID: id_scores, **ood_scores}
    require_same_origin({scores.source: scores.made for scores in files.values()})
    for scores in files.values():
        if scores.unreadable == len(scores.paths):
            raise FileError(
                f"{scores.source}: none of its {len(scores.paths)} rows has scores; "
                f"the first says: {scores.errors[0]}"
            )
    detectors = _common(files)
    _require_one_stream(files, detectors)
    accuracy, labelled, notes = _accuracy(id_scores)
    rows = []
    for done, detector in enumerate(detectors, start=1):
        result = evaluate_sets(
            id_scores.detectors[detector],
            {name: scores.detectors[detector] for name, scores in ood_scores.items()},
            resamples=resamples,
            seed=seed,
        )
        rows += [
            Row(detector, name, metric, *estimates[metric])
            for name, estimates in result.items()
            for metric in CONVENTIONS
        ]
        if progress is not None:
            progress(done, len(detectors))
    counts = tuple(_counts(name, scores, detectors) for name, scores in files.items())
    return Evaluation(
        rows=tuple(rows),
        counts=counts,
        accuracy=accuracy,
        labelled=labelled,
        notes=(
            *_left_out(files, detectors),
            *_warnings(counts),
            *notes,
            *_verdicts(files, detectors),
        ),
        resamples=resamples,
        seed=seed,
        saw=_saw(files, detectors),
    )


def _common(files: Mapping[str, Scores]) -> list[str]:
    shared = [
        detector
        for detector in files[ID].detectors
        if all(detector in scores.detectors for scores in files.values())
    ]
    if not shared:
        columns = "; ".join(
            f"{scores.source}: {', '.join(scores.detectors)}" for scores in files.values()
        )
        raise FileError(f"no detector is in all files ({columns}): score with the same -d")
    return shared


def _require_one_stream(files: Mapping[str, Scores], detectors: Sequence[str]) -> None:
    """Raises FileError where scores that depend on the other rows of their job are of two jobs. The
    scores file that a job wrote identifies it, also beside a part of that file."""
    streams = [name for name in detectors if name.endswith(STREAM)]
    if not streams:
        return
    made = [(scores.made, scores.source) for scores in files.values()]
    jobs = {job[SHA256]: source for job, source in made if job is not None}
    if len(jobs) < 2:
        return
    one, other = list(jobs.values())[:2]
    plain = dict.fromkeys(name.removesuffix(STREAM) for name in detectors)
    raise FileError(
        f"{one} and {other} are of different jobs, but {streams[0]} compares within one job only: "
        "score ID and OOD images in one job and split its file, or compare the plain scores "
        f"({' '.join(f'-d {name}' for name in plain)})"
    )


def _left_out(files: Mapping[str, Scores], detectors: Sequence[str]) -> list[str]:
    every = dict.fromkeys(name for scores in files.values() for name in scores.detectors)
    return [
        f"{detector} is left out: it is not in the scores of "
        + ", ".join(name for name, scores in files.items() if detector not in scores.detectors)
        + "."
        for detector in every
        if detector not in detectors
    ]


def _saw(files: Mapping[str, Scores], detectors: Sequence[str]) -> dict[str, str]:
    """What each detector has learnt from, all of it where the files differ."""
    found = {}
    for detector in detectors:
        words = dict.fromkeys(scores.saw.get(detector, "") for scores in files.values())
        if any(words):
            found[detector] = " | ".join(word or "none" for word in words)
    return found


def _verdicts(files: Mapping[str, Scores], detectors: Sequence[str]) -> list[str]:
    """What share of each file a detector called OOD, and what that rests on."""
    notes = []
    for detector in detectors:
        shares, without = [], []
        bases: dict[str, None] = {}
        for name, scores in files.items():
            if detector in scores.verdicts:
                flagged, basis = scores.verdicts[detector]
                known = judged(scores, detector)
                shares.append(f"{name} {flagged / max(int(known.sum()), 1):.1%}")
                if not known.all():
                    without.append(f"{name} {int((~known).sum())}")
                bases[basis or "not said"] = None
        if shares:
            rest = " | ".join(bases)
            some = f"; rows without a verdict: {', '.join(without)}" if without else ""
            notes.append(
                f"{detector} calls OOD: {', '.join(shares)}{some} (verdicts rest on: {rest})."
            )
    return notes


def _counts(name: str, scores: Scores, detectors: Sequence[str]) -> Counts:
    infinite = {d: int(np.isinf(scores.detectors[d]).sum()) for d in detectors}
    return Counts(
        set=name,
        source=scores.source,
        rows=len(scores.paths),
        unreadable=scores.unreadable,
        infinite={detector: count for detector, count in infinite.items() if count},
    )


def _warnings(counts: Sequence[Counts]) -> list[str]:
    notes = []
    for count in counts:
        if count.unreadable:
            notes.append(
                f"{count.set}: {count.unreadable} of {count.rows} rows could not be read "
                "and are left out."
            )
        if count.infinite:
            listed = ", ".join(f"{name} {number}" for name, number in count.infinite.items())
            notes.append(f"{count.set}: infinite scores, counted as the most OOD: {listed}.")
    readable = counts[0].rows - counts[0].unreadable
    if readable < FEW_ROWS:
        notes.append(
            f"{ID}: only {readable} rows; 95 % of fewer than {FEW_ROWS} rows is all of them, so "
            "the thresholds at 95 % are single rows."
        )
    return notes


def _accuracy(scores: Scores) -> tuple[float | None, int, list[str]]:
    pairs = [
        (label, predicted)
        for label, predicted, error in zip(
            scores.labels, scores.predicted, scores.errors, strict=True
        )
        if label and not error
    ]
    if not pairs:
        return None, 0, []
    labels, predictions = (set(names) for names in zip(*pairs, strict=True))
    if labels.isdisjoint(predictions):
        return (
            None,
            len(pairs),
            [
                f"{ID}: no accuracy: no label ({min(labels)}, …) is among the predicted classes "
                f"({min(predictions)}, …); --class-names sets their names."
            ],
        )
    right = sum(label == predicted for label, predicted in pairs)
    return right / len(pairs), len(pairs), []
