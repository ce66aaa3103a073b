"""Recorded rows to a scores file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from oodcli.detectors.base import Detector
from oodcli.features import Features, Rows, recorded
from oodcli.files.atomic import atomic
from oodcli.files.scores import ScoreRow, ScoresWriter
from oodcli.stages.chosen import Chosen, score_views
from oodcli.stages.verdict import Rule, StreamRule


@dataclass(frozen=True)
class ScoreSummary:
    """rows: all inputs. unreadable, infinite: how many had no score, or +inf for some detector.
    flagged: detector → how many are OOD by its rule. thresholds: those found in the stream."""

    rows: int
    unreadable: int
    infinite: int
    flagged: dict[str, int]
    thresholds: dict[str, float]

    @property
    def ood_fraction(self) -> dict[str, float]:
        """Of the rows that could be scored."""
        scored = max(self.rows - self.unreadable, 1)
        return {name: count / scored for name, count in self.flagged.items()}


def score_to_file(
    rows: Iterable[Rows],
    chosen: Sequence[Chosen],
    class_names: Sequence[str],
    target: Path | TextIO,
    *,
    rules: Mapping[str, Rule] | None = None,
    stream_rule: StreamRule | None = None,
    mirror: bool = False,
    explain: bool = False,
    force: bool = False,
) -> ScoreSummary:
    """Scores rows as they come. rules: detector → how it decides, which adds ``<detector>.ood`` and
    with a calibration ``<detector>.p``. stream_rule: thresholds from the whole stream, which is
    then kept in memory. explain: adds ``<detector>.why``. A detector that has learnt from OOD data
    has ``<detector>.saw``. ``<detector>`` is the name of the chosen one, such as ``knn[real]``."""
    rules = dict(rules or {})
    if stream_rule is not None:
        rules |= {each.name: Rule() for each in chosen}
    columns: list[str] = []
    for each in chosen:
        columns.append(each.name)
        if each.name in rules:
            columns += rules[each.name].columns(each.name, torch.zeros(0))
        if each.saw:
            columns.append(f"{each.name}.saw")
        if _explained(each.detector, explain):
            columns.append(f"{each.name}.why")
    total = unreadable = infinite = 0
    flagged = dict.fromkeys(rules, 0)
    thresholds: dict[str, float] = {}

    def blocks() -> Iterator[list[ScoreRow]]:
        scored = (
            _score_block(block, chosen, class_names, rules, mirror=mirror, explain=explain)
            for block in rows
        )
        if stream_rule is None:
            yield from scored
            return
        kept = [row for block in scored for row in block]
        for each in chosen:
            values = torch.tensor([r.scores[each.name] for r in kept if not r.error]).double()
            thresholds[each.name] = stream_rule(values)
            for column, cells in Rule(thresholds[each.name]).columns(each.name, values).items():
                for row, cell in zip((r for r in kept if not r.error), cells, strict=True):
                    row.scores[column] = cell
        yield kept

    with ExitStack() as stack:
        if isinstance(target, Path):
            target = stack.enter_context(atomic(target, force=force))
        writer = stack.enter_context(ScoresWriter(target, columns))
        for scored in blocks():
            writer.write(scored)
            for row in scored:
                total += 1
                unreadable += bool(row.error)
                infinite += any(row.scores[each.name] == math.inf for each in chosen if row.scores)
                for name in flagged:
                    flagged[name] += row.scores.get(f"{name}.ood") == 1
    return ScoreSummary(total, unreadable, infinite, flagged, thresholds)


def _explained(detector: Detector, wanted: bool) -> bool:
    return detector.always_explains or (wanted and detector.explains)


def _score_block(
    block: Rows,
    chosen: Sequence[Chosen],
    class_names: Sequence[str],
    rules: Mapping[str, Rule],
    *,
    mirror: bool,
    explain: bool,
) -> list[ScoreRow]:
    scores: dict[str, Sequence[float | str]] = {}
    predicted: list[int] = []
    confidence: list[float] = []
    features = block.features
    if features is not None and len(features):
        top = torch.softmax(recorded(features.logits).double(), 1).max(1)
        predicted, confidence = top.indices.tolist(), top.values.tolist()
        there: dict[torch.device | None, Features] = {None: features}
        for each in chosen:
            if each.device not in there:
                there[each.device] = features.to(each.device or torch.device("cpu"))
            values = score_views(each.detector, there[each.device], mirror=mirror).cpu()
            scores[each.name] = values.tolist()
            if each.name in rules:
                scores |= rules[each.name].columns(each.name, values)
            if each.saw:
                scores[f"{each.name}.saw"] = [each.saw] * len(values)
            if _explained(each.detector, explain):
                scores[f"{each.name}.why"] = each.detector.explain(there[each.device])
    found = []
    index = 0
    for path, label, error in zip(block.paths, block.labels.tolist(), block.errors, strict=True):
        name = class_names[label] if 0 <= label < len(class_names) else ""
        if error is not None:
            found.append(ScoreRow(path, name, error=error))
            continue
        found.append(
            ScoreRow(
                path,
                name,
                class_names[predicted[index]],
                confidence[index],
                {column: values[index] for column, values in scores.items()},
            )
        )
        index += 1
    return found
