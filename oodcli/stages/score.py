"""Recorded rows to a scores file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from oodcli.detectors.base import Detector
from oodcli.detectors.msp import probabilities
from oodcli.features import Features, Rows, recorded
from oodcli.files.atomic import atomic
from oodcli.files.made import made_path, write_made
from oodcli.files.scores import ScoreBlock, ScoresWriter, format_of
from oodcli.images.pixels import is_text
from oodcli.jobs.kept import Stored
from oodcli.stages.chosen import Chosen, score_views
from oodcli.stages.record import ALONE, Progress, Work, no_progress
from oodcli.stages.stream import WIDTH, detector_of, sketch, smoothed, stream_name
from oodcli.stages.verdict import Rule, StreamRule, rule_of


@dataclass(frozen=True)
class ScoreSummary:
    """rows: all inputs. unreadable, infinite: rows without a score, or with +inf for some detector.
    flagged: detector → OOD rows. thresholds: thresholds found in the stream. unjudged: detector →
    rows with a score, but without a verdict."""

    rows: int
    unreadable: int
    infinite: int
    flagged: dict[str, int]
    thresholds: dict[str, float]
    unjudged: dict[str, int]

    @property
    def ood_fraction(self) -> dict[str, float]:
        """Detector → share of OOD rows among those with a verdict."""
        scored = self.rows - self.unreadable
        return {
            name: count / max(scored - self.unjudged[name], 1)
            for name, count in self.flagged.items()
        }


@dataclass(frozen=True)
class Doubts:
    """Rows not known to be in-distribution, by one detector. left_out: files that are not rows, but
    may be pictures."""

    rows: int
    flagged: int
    unjudged: int
    unreadable: int
    left_out: int

    @property
    def share(self) -> float:
        """Share among the rows and the files left out."""
        doubtful = self.flagged + self.unjudged + self.unreadable + self.left_out
        return doubtful / max(self.rows + self.left_out, 1)

    @property
    def words(self) -> str:
        """The counts that make up the share."""
        parts = (
            (self.flagged, "OOD"),
            (self.unjudged, "without a verdict"),
            (self.unreadable, "unreadable"),
            (self.left_out, "left out"),
        )
        made = ", ".join(f"{count} {what}" for count, what in parts if count) or "0 OOD"
        return f"{made}, of {self.rows + self.left_out}"


def doubts(
    rows: int,
    unreadable: int,
    flagged: Mapping[str, int],
    unjudged: Mapping[str, int],
    left_out: Mapping[str, int],
) -> dict[str, Doubts]:
    """Detector → its doubts. left_out: suffix → files; plain text files do not count."""
    hidden = sum(count for kind, count in left_out.items() if not is_text(kind))
    return {
        name: Doubts(rows, count, unjudged.get(name, 0), unreadable, hidden)
        for name, count in flagged.items()
    }


def score_to_file(
    rows: Callable[[int, int], Iterable[Rows]],
    count: int,
    unit: int,
    chosen: Sequence[Chosen],
    class_names: Sequence[str],
    target: Path | TextIO,
    *,
    rules: Mapping[str, Rule] | None = None,
    stream_rule: StreamRule | None = None,
    mirror: bool = False,
    stream: bool = False,
    explain: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
    work: Work = ALONE,
    made: Mapping[str, Any] | None = None,
) -> ScoreSummary | None:
    """Score ``count`` rows; None in a process that writes no file. rows: those of [start, stop), in
    blocks of ``unit``. made: metadata for the file beside the scores. rules: detector → its rule,
    which adds ``<detector>.ood`` and with a calibration ``<detector>.p``. stream_rule: finds
    thresholds in the whole stream, which is then held in memory. explain: add ``<detector>.why``. A
    detector that has learnt from OOD data adds ``<detector>.saw``. ``<detector>`` is the name of
    the column, such as ``knn[real]``. stream: add ``<detector>[stream]``, see ``smoothed``, with
    thresholds of the stream rule; all rows are held in memory, too."""
    scoring = Scoring.of(
        chosen,
        class_names,
        rules or {},
        streamed=stream_rule is not None,
        mirror=mirror,
        stream=stream,
        explain=explain,
    )
    columns, rules = scoring.columns, scoring.rules
    total = unreadable = infinite = 0
    paths = hashlib.sha256()
    flagged, unjudged = dict.fromkeys(rules, 0), dict.fromkeys(rules, 0)
    thresholds: dict[str, float] = {}

    def score(start: int, stop: int) -> Iterator[ScoreBlock]:
        for block in rows(start, stop):
            yield scoring(block, chosen)

    scored = work.blocks(count, unit, _restored, stored_scores, score, progress)
    if scored is None:
        return None
    scored = work.readable(scored)
    kept = work.kept

    def blocks() -> Iterator[ScoreBlock]:
        if stream_rule is None and not stream:
            yield from scored
            return
        names = [each.name for each in chosen]
        held = list(scored)
        if stream:
            held = smoothed(held, names)
            names = [*names, *map(stream_name, names)]
        if stream_rule is None:
            yield from held
            return
        for name in names:
            values, verdicts = (
                np.concatenate([block.scores[column] for block in held])
                for column in (name, f"{detector_of(name)}.ood")
            )
            judged = torch.from_numpy(values[~np.isnan(verdicts)])
            thresholds[name] = stream_rule(judged)
        for block in held:
            found = dict(block.scores)
            for name, threshold in thresholds.items():
                silent = torch.tensor(np.isnan(block.scores[f"{detector_of(name)}.ood"]))
                rule = replace(rules[name], threshold=threshold)
                found |= rule.columns_without(name, torch.tensor(found[name]), silent)
            yield replace(block, scores=found)

    with ExitStack() as stack:
        unfinished, kind = target, None
        force = force or (kept is not None and kept.about.complete)
        if isinstance(target, Path):
            kind = format_of(target)
            unfinished = stack.enter_context(atomic(target, force=force))
        found = blocks()
        first = list(islice(found, 1))  # a detector may fail: before anything is printed
        with ScoresWriter(unfinished, columns, kind) as writer:
            for block in chain(first, found):
                writer.write(block)
                total += len(block.paths)
                unreadable += sum(map(bool, block.errors))
                finite = [np.isfinite(block.scores[each.name]) for each in chosen]
                infinite += int((~np.all(finite, axis=0)).sum())
                for name in flagged:
                    verdicts = np.asarray(block.scores[f"{name}.ood"], np.float64)
                    flagged[name] += int(np.nansum(verdicts))
                    unjudged[name] += int(np.isnan(verdicts).sum())
                paths.update("".join(f"{path}\0" for path in block.paths).encode())
        if made is not None and isinstance(target, Path) and isinstance(unfinished, Path):
            beside = stack.enter_context(atomic(made_path(target), force=True))
            about = {
                **made,
                "rows": total,
                "unreadable": unreadable,
                "infinite": infinite,
                "flagged": flagged,
                "unjudged": unjudged,
                "paths_sha256": paths.hexdigest(),
            }
            write_made(about, unfinished, beside)
        if kept is not None and isinstance(target, Path):
            kept.finish(target, force=force)
    return ScoreSummary(total, unreadable, infinite, flagged, thresholds, unjudged)


def stored_scores(block: ScoreBlock) -> Stored:
    """Scores, for ``_restored``."""
    arrays: dict[str, NDArray[Any]] = {"confidence": block.confidence}
    if block.sketches is not None:
        arrays["sketches"] = block.sketches
    words: dict[str, Any] = {}
    for name, cells in block.scores.items():
        if isinstance(cells, np.ndarray):
            arrays[f"scores/{name}"] = cells
        else:
            words[name] = list(cells)
    texts = {name: list(getattr(block, name)) for name in _TEXTS}
    return Stored(len(block.paths), arrays, {**texts, "scores": words})


_TEXTS = ("paths", "labels", "errors", "predicted")


def _restored(stored: Stored) -> ScoreBlock:
    arrays = dict(stored.arrays)
    confidence, sketches = arrays.pop("confidence"), arrays.pop("sketches", None)
    scores = {name.removeprefix("scores/"): cells for name, cells in arrays.items()}
    texts = {name: stored.words[name] for name in _TEXTS}
    scores |= stored.words["scores"]
    return ScoreBlock(**texts, confidence=confidence, scores=scores, sketches=sketches)


def _explained(detector: Detector, wanted: bool) -> bool:
    return detector.always_explains or (wanted and detector.explains)


@dataclass(frozen=True)
class Scoring:
    """Recorded rows → scores. columns: columns of the file between confidence and error. stream:
    each block also has the sketches of its rows."""

    columns: tuple[str, ...]
    class_names: tuple[str, ...]
    rules: Mapping[str, Rule]
    mirror: bool
    explain: bool
    stream: bool = False

    @classmethod
    def of(
        cls,
        chosen: Sequence[Chosen],
        class_names: Sequence[str],
        rules: Mapping[str, Rule],
        *,
        streamed: bool = False,
        mirror: bool = False,
        stream: bool = False,
        explain: bool = False,
    ) -> Scoring:
        """streamed: every detector gets a threshold from the whole stream, and with ``stream`` its
        scores that borrow from similar images get another."""
        if streamed:
            rules = {**rules, **{each.name: rule_of(each, class_names) for each in chosen}}
            if stream:
                rules |= {stream_name(each.name): rules[each.name] for each in chosen}
        columns: list[str] = []
        for each in chosen:
            columns.append(each.name)
            if each.name in rules:
                columns += rules[each.name].columns(each.name, torch.zeros(0))
            if each.saw:
                columns.append(f"{each.name}.saw")
            if _explained(each.detector, explain):
                columns.append(f"{each.name}.why")
            if stream:
                name = stream_name(each.name)
                columns.append(name)
                if name in rules:
                    columns += rules[name].columns(name, torch.zeros(0))
                if each.saw:
                    columns.append(f"{name}.saw")
        return cls(tuple(columns), tuple(class_names), dict(rules), mirror, explain, stream)

    def _columns_of(self, one: Chosen) -> tuple[str, ...]:
        """The detector's columns of scores."""
        return (one.name, stream_name(one.name)) if self.stream else (one.name,)

    def __call__(self, block: Rows, chosen: Sequence[Chosen]) -> ScoreBlock:
        """chosen: the same detectors, on any device."""
        scores: dict[str, NDArray[np.float64] | Sequence[str]] = {}
        predicted: list[str] = []
        confidence = np.zeros(0)
        sketches = np.zeros((0, WIDTH), np.float32) if self.stream else None
        features = block.features
        if features is None or not len(features):
            scores = {column: np.zeros(0) for column in self.columns}
        else:
            sure = recorded(features.logits).double().sigmoid() if features.multi_label else None
            top = (features.shared(probabilities) if sure is None else sure).max(1)
            predicted = [self.class_names[index] for index in top.indices.tolist()]
            confidence = top.values.numpy()
            if self.stream:
                sketches = sketch(features)
            there: dict[torch.device | None, Features] = {None: features}
            for each in chosen:
                if each.device not in there:
                    there[each.device] = features.to(each.device or torch.device("cpu"))
                values = score_views(each.detector, there[each.device], mirror=self.mirror).cpu()
                scores[each.name] = values.double().numpy()
                if each.name in self.rules:
                    scores |= self.rules[each.name].columns(each.name, values, top.indices)
                for name in self._columns_of(each) if each.saw else ():
                    scores[f"{name}.saw"] = [each.saw] * len(values)
                if _explained(each.detector, self.explain):
                    scores[f"{each.name}.why"] = each.detector.explain(there[each.device])
        return ScoreBlock(
            block.paths,
            [
                self.class_names[i] if 0 <= i < len(self.class_names) else ""
                for i in block.labels.tolist()
            ],
            [error or "" for error in block.errors],
            predicted,
            confidence,
            scores,
            sketches,
        )
