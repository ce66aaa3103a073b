"""Estimates for the steps of ``oodcli prepare``, by short trials."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from oodcli.images import open_images
from oodcli.inversion.degrade import VERSIONS
from oodcli.networks.classifier import Classifier
from oodcli.recording.recorder import Recorder
from oodcli.stages import invert_job
from oodcli.stages.extract_job import ExtractRequest, records_of
from oodcli.stages.invert_job import InvertRequest
from oodcli.stages.prepare_plan import Request
from oodcli.stages.record import record_images

TRIAL = 32
"""Images of a trial."""

FITTED_A_SECOND = 1000.0
"""Rows per second on which all detectors are fitted and calibrated, roughly, on two cores."""


@dataclass(frozen=True)
class Clock:
    """Estimates for the steps of one plan, in their order; alike trials run once. rows: file →
    rows that the plan writes into it."""

    classifier: Classifier
    rows: dict[Path, int] = field(default_factory=dict)
    inversions: list[float] = field(default_factory=list)

    def seconds(self, request: Request) -> float:
        """Estimate for a step."""
        if isinstance(request, InvertRequest):
            every = request.per_class * self.classifier.num_classes
            self.rows[request.path] = every if request.total is None else request.total
            if not self.inversions:
                self.inversions.append(invert_job.seconds_of(request))
            return self.inversions[0]
        if isinstance(request, ExtractRequest):
            return self._extraction(request)
        caches = [request.cache, request.noise, *request.calibrate]
        return sum(self.rows.get(path, 0) for path in caches if path) / FITTED_A_SECOND

    def _extraction(self, request: ExtractRequest) -> float:
        known = self.rows.get(Path(request.images))
        classifier, size = self.classifier, min(TRIAL, request.model.batch_size(self.classifier))
        what, made_with = records_of(request, classifier)
        recorder = Recorder(
            classifier,
            what | {"logits"},
            made_with=made_with,
            precision=request.model.precision(),
        )
        preprocessing = classifier.preprocessing
        inputs = torch.zeros(size, preprocessing.channels, *preprocessing.input_size)
        each = _second(lambda: recorder(inputs)) / size
        if known is None:
            source = open_images(request.images, preprocessing, classifier.class_names)
            known, few = len(source), min(size, len(source))
            each = (
                _second(lambda: list(record_images(classifier, source, recorder, few, stop=few)))
                / few
            )
        matched = request.match_accuracy is not None
        self.rows[request.path] = VERSIONS * known if matched else known
        passes = VERSIONS + 3 + math.log2(known) if matched else 1
        return each * known * passes


def _second(work: Callable[[], object]) -> float:
    """Seconds of the second of two runs."""
    work()
    start = time.monotonic()
    work()
    return time.monotonic() - start
