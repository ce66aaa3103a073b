"""``oodcli evaluate``: scores files to metrics, feature caches to figures. Only the figures of
layers import torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from oodcli import notes
from oodcli.files.scores import read_scores
from oodcli.metrics import MEAN
from oodcli.report import refuse_existing_report, write_report
from oodcli.report.evaluation import Evaluation, evaluate_files

if TYPE_CHECKING:
    from oodcli.report.layer_figures import LayerReport
    from oodcli.stages.watching import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """evaluation: all metrics. files: the files written."""

    evaluation: Evaluation
    files: Sequence[Path]

    @property
    def mean_auroc(self) -> Mapping[str, float]:
        """Detector → mean over the OOD sets."""
        found = self.evaluation
        return {name: found.get(name, MEAN, "auroc").value for name in found.detectors}


def evaluate(
    id_file: Path,
    ood: Mapping[str, Path],
    *,
    detectors: Sequence[str] = (),
    output: Path | None = None,
    resamples: int = 1000,
    thumbnails: bool = True,
    seed: int = 0,
    force: bool = False,
    watch: Watch | None = None,
    command: str = "",
) -> Evaluated:
    """Compute how well scores separate in-distribution from OOD images. detectors: the detectors to
    compare, by default all. output: folder of the report."""
    if output is not None:
        refuse_existing_report(output, force=force)
    id_scores = read_scores(id_file)
    ood_scores = {name: read_scores(path) for name, path in ood.items()}
    for name, scores in {"ID": id_scores, **ood_scores}.items():
        log.debug(
            "%s: %s, %d rows, %d unreadable, detectors %s",
            *(name, scores.source, len(scores.paths), scores.unreadable),
            ", ".join(scores.detectors),
        )
    notes.done(log, "scores")
    if detectors:
        id_scores = id_scores.only(detectors)
        ood_scores = {name: scores.only(detectors) for name, scores in ood_scores.items()}
    if watch is not None:
        watch(0, len(id_scores.detectors))
    evaluation = evaluate_files(
        id_scores, ood_scores, resamples=resamples, seed=seed, progress=watch
    )
    evaluation = replace(evaluation, command=command)
    notes.done(log, "metrics")
    written: Sequence[Path] = ()
    if output is not None:
        written = write_report(
            evaluation, id_scores, ood_scores, output, force=force, thumbnails=thumbnails
        )
    for note in evaluation.notes:
        notes.say(log, note)
    return Evaluated(evaluation, tuple(written))


def draw_layers(
    id_cache: Path,
    ood: Mapping[str, Path],
    output: Path,
    *,
    virtual: Path | None = None,
    images: Path | None = None,
    lsgm: Path | None = None,
    method: str = "pca",
    seed: int = 0,
    force: bool = False,
) -> LayerReport:
    """Draw the papers' figures of layers, from feature caches of ID images, OOD sets and virtual
    images. images: the virtual images. lsgm: an artefact whose transitions to draw. method: the
    projection, pca or tsne."""
    from oodcli.files.artefact import read_artefact
    from oodcli.files.cache import open_cache
    from oodcli.report.layer_figures import refuse_existing_figures, write_layer_figures
    from oodcli.report.layers import LayerInputs

    refuse_existing_figures(output, force=force)
    with ExitStack() as stack:
        inputs = LayerInputs(
            id=stack.enter_context(open_cache(id_cache)),
            ood={name: stack.enter_context(open_cache(path)) for name, path in ood.items()},
            virtual=stack.enter_context(open_cache(virtual)) if virtual else None,
            images=images,
            lsgm=read_artefact(lsgm) if lsgm else None,
        )
        report = write_layer_figures(inputs, output, method=method, seed=seed, force=force)
    for note in report.notes:
        notes.say(log, note)
    return report
