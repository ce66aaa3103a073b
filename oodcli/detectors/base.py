"""The base class of detectors: a frozen object whose fields are its fitted state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from oodcli.detectors.bank import moved
from oodcli.detectors.blocks import Blocks, largest_in_words, score_in_halves
from oodcli.features import Features, Making


class Detector(ABC):
    """Subclasses are frozen dataclasses with ``name``, ``needs`` and ``_score``; those that learn
    from rows also have ``fitted = True`` and ``fit``. Fields that are tensors, mappings of tensors,
    banks or detectors are the fitted state; the others are settings. Saving, loading, listing and
    the command line work from the class alone."""

    name: ClassVar[str]
    source: ClassVar[str] = ""
    about: ClassVar[str] = ""
    """Paper and equation, and one line for the listing."""

    formula: ClassVar[str] = ""
    """The score as LaTeX, with a blank line between equations. The detector's page in the docs is
    made from this, the first paragraph of the class's docstring, which explains the signs, and the
    ``Annotated[TYPE, "meaning"]`` of each setting. Optional for detectors outside this package."""

    superseded_by: ClassVar[str | None] = None
    """The detector that does better wherever both can be used, by the figures in docs/research."""

    needs: ClassVar[frozenset[str]]
    """Records that ``_score`` reads, such as logits, embedding, head: records.KNOWN_RECORDS."""

    fit_also: ClassVar[frozenset[str]] = frozenset()
    """Further records that ``fit`` reads."""

    fitted: ClassVar[bool] = False
    later: ClassVar[Mapping[str, Any]] = {}
    """Fields that artefacts of an earlier version lack, with the values that they had."""

    heavy: ClassVar[bool] = False
    """Slow enough to score on the GPU, if there is one."""

    uses_ood: ClassVar[bool] = False
    needs_ood: ClassVar[bool] = False
    """``fit`` has an argument ``ood``, out-of-distribution rows; and cannot do without them."""

    needs_pool: ClassVar[bool] = False
    """``fit`` has an argument ``pool``, the rows that thresholds are calibrated on."""

    noise_images: ClassVar[str | None] = None
    """``fit`` has an argument ``noise``, rows of these IMAGES."""

    reference_images: ClassVar[str | None] = None
    """IMAGES to fit on by default: the detector needs no data of the user's."""

    widens: ClassVar[bool] = False
    """``fit`` has an argument ``widen``, with which rows become as different as real ones:
    ``widened``. Virtual rows need it."""

    better_on_real: ClassVar[bool] = False
    """It reads spreads, tails or neighbours, which virtual images do not share with real ones, or
    labels that the network may get wrong."""

    explains: ClassVar[bool] = False
    """``contributions`` lists the terms of a score."""

    multi_label: ClassVar[bool] = False
    """It also fits networks with a sigmoid for each label instead of one softmax."""

    @classmethod
    def fit(cls, train: Blocks, *args: Any, **hyperparameters: Any) -> Self:
        """A detector without fitted state is made from its hyper-parameters alone. The others name
        theirs, keyword-only, with types and defaults, such as ``k: Annotated[int, "which
        neighbour"] = 50``."""
        return cls(*args, **hyperparameters)

    @classmethod
    def fit_needs(cls, **hyperparameters: Any) -> frozenset[str]:
        """Records that ``fit`` reads with these hyper-parameters."""
        return cls.needs | cls.fit_also if cls.fitted else frozenset()

    @classmethod
    def records_with(cls, **hyperparameters: Any) -> Making | None:
        """``made_with`` of a detector that is fitted with these hyper-parameters."""
        return None if cls.fitted else cls(**hyperparameters).made_with

    @property
    def score_needs(self) -> frozenset[str]:
        """Records that ``_score`` reads with these settings."""
        return self.needs

    @property
    def layers_read(self) -> frozenset[str] | None:
        """Names of the layers whose means and standard deviations ``_score`` reads, ``LAST_MAP``
        for the last map, so that no others are computed; None for all."""
        return None

    @property
    def every_class(self) -> bool:
        """Whether it scores images of classes that had no rows to fit on as well as others."""
        return False

    @property
    def strict_on_virtual(self) -> bool:
        """Whether it reads statistics that inversion matches, so that thresholds from virtual
        images flag most real ones."""
        return False

    @property
    def made_with(self) -> Making | None:
        """How its records must have been made; None where there is but one way."""
        return None

    @abstractmethod
    def _score(self, test: Features) -> Tensor:
        """(N,), higher = more OOD. ``score`` makes +inf of values that are not finite, and of what
        it returns for rows with NaN or infinity."""

    def score(self, test: Features) -> Tensor:
        """(N,) float64, higher = more out of distribution, +inf where the row or its score is not
        finite. Raises DetectorError when a record that it needs is missing."""
        test.require(self.score_needs, self.name)
        test.require_made_with(self.made_with, self.name)
        if not len(test):
            return torch.zeros(0, dtype=torch.float64)
        if not self.fitted:
            # Often asked twice for the same block: alone and as an indicator of 1c-sum.
            return test.shared(_finite_score, self)
        return score_in_halves(lambda rows: _finite_score(rows, self), test, self.name)

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        """Terms whose sum is the score: names in words for a user, and (N, terms) float64."""
        return (), torch.zeros(len(test), 0, dtype=torch.float64)

    @property
    def always_explains(self) -> bool:
        """Whether ``oodcli score`` adds ``<detector>.why`` without ``--explain``."""
        return False

    def explain(self, test: Features) -> list[str]:
        """For each row, the three terms that raise its score most, as text."""
        return largest_in_words(*self.contributions(test))

    def learn(self, labelled: Sequence[Features], ood: Tensor) -> Self:
        """The detector with weights learnt from hand-labelled rows; most have none and return
        themselves. ood: (N,) bool, for the rows of all blocks in turn."""
        return self

    def to(self, device: torch.device) -> Self:
        """The same detector with its fitted tensors on another device."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{name: moved(value, device) for name, value in state.items()})  # type: ignore[type-var]


def _finite_score(test: Features, detector: Detector) -> Tensor:
    scores = detector._score(test).double()
    good = torch.isfinite(scores) & test.finite(detector.score_needs).to(scores.device)
    return torch.where(good, scores, torch.inf)
