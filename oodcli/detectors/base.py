"""What every detector is: a frozen object whose fields are its fitted state."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from types import UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from oodcli.detectors.bank import Bank
from oodcli.errors import DetectorError
from oodcli.features import Features, OdinStep
from oodcli.memory import let_go, ran_out

Blocks = Features | Iterable[Features]
"""Rows to fit on: whole, or in blocks that can be iterated more than once."""


class Detector(ABC):
    """Subclasses are frozen dataclasses. Fields that are tensors, mappings of tensors, banks or
    detectors are the fitted state; the others are settings. Saving, loading, listing and the
    command line work from the class alone."""

    name: ClassVar[str]
    source: ClassVar[str]
    about: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    fitted: ClassVar[bool] = False
    uses_ood: ClassVar[bool] = False
    """``fit`` takes out-of-distribution rows, too: its argument ``ood``."""

    needs_ood: ClassVar[bool] = False
    """``fit`` cannot do without them."""

    reference_images: ClassVar[str | None] = None
    """IMAGES to fit on where nobody named any: the detector needs no data of the user's."""

    noise_images: ClassVar[str | None] = None
    """IMAGES whose rows ``fit`` takes, too: its argument ``noise``."""

    needs_pool: ClassVar[bool] = False
    """``fit`` takes the rows that thresholds are calibrated on, too: its argument ``pool``."""

    heavy: ClassVar[bool] = False
    """So much work a row that it is scored on the GPU, where there is one."""

    explains: ClassVar[bool] = False
    """``contributions`` says what made a score."""

    strict_on_virtual: ClassVar[bool] = False
    """Rests on what virtual images are made to match, so that a threshold on them is no good."""

    @classmethod
    def fit(cls, train: Blocks, *args: Any, **hyperparameters: Any) -> Self:
        """A detector that needs no fitting is made from its hyper-parameters alone. Those that do
        name theirs, keyword-only, with their defaults."""
        return cls(*args, **hyperparameters)

    @classmethod
    def fit_needs(cls, **hyperparameters: Any) -> frozenset[str]:
        """What the rows to fit on must have recorded, given the hyper-parameters."""
        return cls.needs if cls.fitted else frozenset()

    @property
    def score_needs(self) -> frozenset[str]:
        """What the rows to score must have recorded, given how the detector was made."""
        return self.needs

    @property
    def odin_step(self) -> OdinStep | None:
        """The perturbation with which ``odin.logits`` must have been recorded."""
        return None

    @abstractmethod
    def _score(self, test: Features) -> Tensor:
        """(N,) float64, higher = more OOD. What it gives for rows with NaN or infinity, and its
        own non-finite values, become +inf."""

    def score(self, test: Features) -> Tensor:
        """(N,) float64, higher = more out of distribution, +inf where the row or its score is not
        finite. Raises DetectorError when something that it needs was not recorded."""
        test.require(self.score_needs, self.name)
        if not len(test):
            return torch.zeros(0, dtype=torch.float64)
        if not self.fitted:
            # It is its settings, and often asked twice: alone and as an indicator of 1c-sum.
            return test.shared(_score_of, self)
        scores = self._if_it_fits(test)
        if scores is not None:
            return scores
        let_go(next(iter(test.rows().values())).device)
        half = len(test) // 2
        halves = (test.select(slice(half)), test.select(slice(half, None)))
        return torch.cat([self.score(each) for each in halves])

    def _if_it_fits(self, test: Features) -> Tensor | None:
        """None where the memory is too short, which is a GPU's."""
        try:
            scores = self._finite_score(test)
            if scores.shape != (len(test),):
                raise ValueError(f"scores of shape {tuple(scores.shape)} for {len(test)} rows")
            return scores
        except (RuntimeError, LookupError, TypeError, ValueError, MemoryError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if not ran_out(error):
                raise DetectorError(
                    f"the fitted {self.name} does not go with these features ({reason}): fit it "
                    "again, on features of this network"
                ) from error
            if len(test) == 1:
                raise DetectorError(
                    f"the memory is too short to score one image with {self.name} ({reason}): try "
                    "--device cpu"
                ) from error
        # Outside of the handler, whose error holds on to what was allocated.
        return None

    def _finite_score(self, test: Features) -> Tensor:
        scores = self._score(test).double()
        good = torch.isfinite(scores) & test.finite(self.score_needs).to(scores.device)
        return torch.where(good, scores, torch.inf)

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        """What a score is the sum of: names in a user's words, and (N, terms) float64."""
        return (), torch.zeros(len(test), 0, dtype=torch.float64)

    @property
    def always_explains(self) -> bool:
        """``score`` adds ``<detector>.why`` without being asked."""
        return False

    def explain(self, test: Features) -> list[str]:
        """For each row the three terms that raise its score most, in words."""
        names, terms = self.contributions(test)
        top = terms.topk(min(3, len(names)), dim=1)
        return [
            "; ".join(f"{names[i]} ({value:+.2g})" for i, value in zip(which, values, strict=True))
            for which, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def learn(self, labelled: Sequence[Features], ood: Tensor) -> Self:
        """The detector with its weights learnt from rows that somebody marked; most have none and
        stay as they are. ood: (N,) bool, of the rows of all blocks in turn."""
        return self

    def to(self, device: torch.device) -> Self:
        """The same detector with its fitted tensors on another device."""
        moved: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor | Bank | Detector):
                moved[field.name] = value.to(device)
            elif isinstance(value, Mapping):
                moved[field.name] = {key: tensor.to(device) for key, tensor in value.items()}
        return replace(self, **moved)  # type: ignore[type-var]

    @classmethod
    def hyperparameters(cls) -> dict[str, tuple[Any, Any]]:
        """Name → (type, default) of everything that ``-p NAME.KEY=VALUE`` may set."""
        maker = cls.fit if cls.fitted else cls.__init__
        hints = get_type_hints(maker)
        return {
            name: (hints[name], parameter.default)
            for name, parameter in inspect.signature(maker).parameters.items()
            if name not in ("self", "train", "ood")
            and parameter.default is not inspect.Parameter.empty
        }

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> dict[str, Any]:
        """Hyper-parameters from the command line's strings. Raises DetectorError for an unknown
        key or a value of the wrong type."""
        known = cls.hyperparameters()
        unknown = sorted(given.keys() - known.keys())
        if unknown:
            raise DetectorError(
                f"{cls.name} has no hyper-parameter '{unknown[0]}': known are "
                f"{', '.join(known) or 'none'}"
            )
        return {key: _convert(cls.name, key, value, known[key][0]) for key, value in given.items()}

    @classmethod
    def banks(cls) -> frozenset[str]:
        """The fitted state that may be too large for the memory."""
        return frozenset(name for name, hint in get_type_hints(cls).items() if hint is Bank)

    def state(self) -> dict[str, Tensor | Bank]:
        """The fitted tensors; those of a mapping or a detector are named ``field/key``."""
        tensors: dict[str, Tensor | Bank] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor | Bank):
                tensors[field.name] = value
            elif isinstance(value, Mapping | Detector):
                inside = value.state() if isinstance(value, Detector) else value
                tensors |= {f"{field.name}/{key}": tensor for key, tensor in inside.items()}
        return tensors

    def settings(self) -> dict[str, Any]:
        """The fields that are not tensors, as JSON can hold them; of a detector, its settings."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {
            name: value.settings() if isinstance(value, Detector) else value
            for name, value in values.items()
            if not isinstance(value, Tensor | Bank | Mapping)
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor | Bank], settings: Mapping[str, Any]) -> Self:
        """The inverse of state and settings; a bank may come as a tensor. Raises DetectorError when
        something is missing or superfluous."""
        hints = get_type_hints(cls)
        values: dict[str, Any] = {}
        left = set(tensors)
        for field in fields(cls):  # type: ignore[arg-type]
            hint = hints[field.name]
            if hint in (Tensor, Bank) and field.name in tensors:
                tensor = tensors[field.name]
                values[field.name] = (
                    Bank.of(tensor) if hint is Bank and isinstance(tensor, Tensor) else tensor
                )
                left.discard(field.name)
            elif get_origin(hint) is Mapping:
                values[field.name] = inside = _inside(tensors, field.name)
                left -= {f"{field.name}/{key}" for key in inside}
            elif field.name in settings:
                value = settings[field.name]
                if isinstance(hint, type) and issubclass(hint, Detector):
                    inside = _inside(tensors, field.name)
                    left -= {f"{field.name}/{key}" for key in inside}
                    value = hint.restore(inside, value if isinstance(value, Mapping) else {})
                elif not _is_kind(value, hint):
                    raise DetectorError(f"{cls.name}: '{field.name}' is of the wrong type")
                values[field.name] = tuple(value) if isinstance(value, list) else value
            else:
                raise DetectorError(f"{cls.name}: '{field.name}' is missing from the artefact")
        superfluous = sorted(left | (settings.keys() - {field.name for field in fields(cls)}))  # type: ignore[arg-type]
        if superfluous:
            raise DetectorError(f"{cls.name}: the artefact has an unknown '{superfluous[0]}'")
        return cls(**values)


def _inside(tensors: Mapping[str, Tensor | Bank], field: str) -> dict[str, Tensor | Bank]:
    """The tensors of a field that has several, named ``field/key``, by key."""
    start = f"{field}/"
    return {name[len(start) :]: tensors[name] for name in tensors if name.startswith(start)}


def _is_kind(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is what a field is declared as."""
    if get_origin(hint) in (Union, UnionType):
        return any(_is_kind(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return isinstance(value, list | tuple) and all(_is_kind(each, item) for each in value)
    if hint in (float, int, str, bool):
        kinds = (int, float) if hint is float else hint
        return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))
    return value is None if hint is type(None) else True


def _score_of(test: Features, detector: Detector) -> Tensor:
    return detector._finite_score(test)


def _convert(detector: str, key: str, value: str, kind: Any) -> Any:
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    words = [word for each in options if get_origin(each) is Literal for word in get_args(each)]
    if value in words or str in options:
        return value
    number = next((each for each in options if each in (bool, int, float)), None)
    if number is None:
        raise DetectorError(f"{detector}.{key}={value}: expected one of {', '.join(words)}")
    truth = {"true": True, "false": False}
    try:
        return truth[value.lower()] if number is bool else number(value)
    except (KeyError, ValueError) as error:
        expected = " or ".join([number.__name__, *words])
        raise DetectorError(f"{detector}.{key}={value}: expected {expected}") from error


def require_positive(detector: str, **values: float) -> None:
    """Raises DetectorError for a hyper-parameter that is not a positive number."""
    for key, value in values.items():
        if not value > 0:
            raise DetectorError(f"{detector}.{key}={value:g} must be positive")


def in_blocks(train: Blocks) -> Iterable[Features]:
    """Rows to fit on as blocks, without the empty ones."""
    return (block for block in ([train] if isinstance(train, Features) else train) if len(block))


ROWS_IN_CACHE = 256
"""For each thread: rows of which a few float64 copies stay in a core's cache."""


def by_rows(compute: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """``compute(*rows)`` for rows that know nothing of each other, some at a time: float64 copies
    of all would go through the memory at each of its steps, those of a few stay in the processor's
    cache. rows: (N, …) each. Returns (N, …)."""
    if rows[0].device.type != "cpu":
        found: Tensor = compute(*rows)
        return found
    some = ROWS_IN_CACHE * torch.get_num_threads()
    parts = zip(*(torch.split(each, some) for each in rows), strict=True)
    return torch.cat([compute(*part) for part in parts])


def finite_rows(train: Blocks, needs: Iterable[str], who: str) -> Iterator[Features]:
    """Rows to fit on as blocks, without those in which something of ``needs`` is not finite.
    Raises DetectorError when a record is missing, or at the end when there was no row."""
    count = 0
    for block in in_blocks(train):
        block.require(needs, who)
        finite = block.finite(needs)
        kept = block if finite.all() else block.select(finite)
        count += len(kept)
        if len(kept):
            yield kept
    if not count:
        raise DetectorError(f"{who}: there is no row to fit on")
