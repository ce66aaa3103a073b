"""The records of one block of images. A detector sees nothing else."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from oodcli.errors import DetectorError
from oodcli.records import LAYER_PARTS, NORM_PARTS, WHOLE, field_of, lacking, word_of

INPUT = "input"
"""Name of the BatchNorm pseudo-layer: the normalised image itself."""

LAST_MAP = "last"
"""Stands for the name of the last layer with several positions."""


@dataclass(frozen=True)
class LinearHead:
    """The final linear layer: logits = embedding @ weight.T + bias. weight: (K, D), bias: (K,)."""

    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"head: expected weight (K, D) and bias (K,), but got {tuple(self.weight.shape)} "
                f"and {tuple(self.bias.shape)}"
            )

    @cached_property
    def double(self) -> LinearHead:
        """The same in float64, made once: with 1,000 classes, a copy takes as long as a detector
        takes to score some images."""
        return LinearHead(self.weight.double(), self.bias.double())

    def to(self, device: torch.device) -> LinearHead:
        if self.weight.device == device:
            return self
        return LinearHead(self.weight.to(device), self.bias.to(device))


Record = TypeVar("Record", Tensor, LinearHead)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Layer:
    """One tapped layer. mean, std: (N, C), over the spatial positions of its output (std with
    divisor HW). gradient: (N, C), spatial mean of ∂y_c/∂A. sensitivity: (N, C), virtual images
    only: gradient/Δy averaged over the trajectory (C2IR, eq. 8-9). gram: (N, 10·C), stages only:
    row sums of the Gram matrices of orders 1 to 10, order by order. peak: (N, C), the last layer
    with positions only: the largest of each channel over them, 0 where none is positive. rank1:
    (N, C), the same layer: what its first singular triplet adds to the mean. nonzero: (N, C) in
    0 … 1, BatchNorm layers only: at which share of the positions the gradient of the largest logit
    by the output is not 0. kind: batchnorm, block, stage or other."""

    kind: str
    mean: Tensor | None = None
    std: Tensor | None = None
    gradient: Tensor | None = None
    sensitivity: Tensor | None = None
    gram: Tensor | None = None
    peak: Tensor | None = None
    rank1: Tensor | None = None
    nonzero: Tensor | None = None


@dataclass(frozen=True)
class BatchNorm:
    """The *input* of one BatchNorm layer, and the layer's own statistics.

    mean, var: (N, C), spatial mean and unbiased spatial variance (0 if there is one position).
    running_mean, running_var, weight, bias: (C,). spatial_size: number of positions, H·W. The
    pseudo-layer ``input`` is the normalised image: running mean 0, running variance 1, eps 0.
    """

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    spatial_size: int
    mean: Tensor | None = None
    var: Tensor | None = None


Where = Literal["all", "largest"]
Confidence = Literal["gen", "msp", "entropy"]


@dataclass(frozen=True)
class OdinStep:
    """ODIN's perturbation: epsilon in pixel units of [0, 1], temperature of the cross entropy.
    where: whether all values of the image change, or the one of largest gradient."""

    group: ClassVar[str] = "odin"

    epsilon: float = 0.0014
    temperature: float = 1000.0
    where: Where = "all"


@dataclass(frozen=True)
class ProSteps:
    """PRO's perturbations: ``steps`` of length epsilon, in units of the normalised image, against a
    confidence of softmax(z/temperature). gamma, M: those of ``gen``."""

    group: ClassVar[str] = "pro"

    confidence: Confidence = "gen"
    epsilon: float = 0.0001
    steps: int = 3
    temperature: float = 1.0
    gamma: float = 0.1
    M: int = 100


@dataclass(frozen=True)
class AdaScaleStep:
    """AdaSCALE's perturbation: by epsilon, in units of the normalised image, of the fraction of its
    values with the smallest gradients."""

    group: ClassVar[str] = "adascale"

    epsilon: float = 0.5
    fraction: float = 0.05


@dataclass(frozen=True)
class DropoutPasses:
    """Passes with dropout. seed: of their masks, which all images share."""

    group: ClassVar[str] = "dropout"

    passes: int = 5
    seed: int = 0


Making = OdinStep | ProSteps | AdaScaleStep | DropoutPasses
"""How a record was made. ``group`` is the first part of the record's place, and the key under which
``Features`` and the Recorder have it."""

MAKINGS: Mapping[str, type[Making]] = {
    kind.group: kind for kind in (OdinStep, ProSteps, AdaScaleStep, DropoutPasses)
}


@dataclass(frozen=True)
class Features:
    """One block of N rows, in input order. Records that do not exist are None or absent.

    mirror: the records of the mirrored images, if recorded. logits_level: False if the logits are
    log-probabilities, which lack an unknown constant per row. multi_label: True if each label has
    its own sigmoid. pooled: True if the embedding is the mean of the last map over its positions.
    made_with: group → how its records were made. Raises ValueError if the tensors disagree about N.
    """

    count: int
    label: Tensor | None = None  # (N,) int64, -1 = unknown
    logits: Tensor | None = None  # (N, K)
    embedding: Tensor | None = None  # (N, D)
    layers: Mapping[str, Layer] = field(default_factory=dict)
    batchnorm: Mapping[str, BatchNorm] = field(default_factory=dict)
    odin_logits: Tensor | None = None  # (N, K)
    pro_steps: Tensor | None = None  # (N, T + 1), the uncertainty before and after each step
    adascale_u: Tensor | None = None  # (N, D), the embedding of the changed image
    dropout_logits: Tensor | None = None  # (N, n·K), of n passes with dropout, pass by pass
    made_with: Mapping[str, Making] = field(default_factory=dict)
    logits_level: bool = True
    multi_label: bool = False
    pooled: bool = False
    deconf_h: Tensor | None = None  # (N, K), the numerators of a DeConf head
    mos_others: Tensor | None = None  # (N, G), log p(others) in each of MOS's groups
    head: LinearHead | None = None
    mirror: Features | None = None
    _shared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, rows in self.rows().items():
            if len(rows) != self.count:
                raise ValueError(f"/{name} has {len(rows)} rows, expected {self.count}")

    def __len__(self) -> int:
        return self.count

    def rows(self) -> dict[str, Tensor]:
        """Every recorded tensor with one row per image, by its name in the cache file."""
        named = {place: getattr(self, field_of(place)) for place in ("label", *WHOLE)}
        for name, layer in self.layers.items():
            for part in LAYER_PARTS:
                named[f"layers/{name}/{part}"] = getattr(layer, part)
        for name, norm in self.batchnorm.items():
            for part in NORM_PARTS:
                named[f"batchnorm/{name}/{part}"] = getattr(norm, part)
        if self.mirror is not None:
            views = self.mirror.rows()
            named |= {f"mirror/{name}": rows for name, rows in views.items() if name != "label"}
        return {name: rows for name, rows in named.items() if rows is not None}

    def map_rows(self, change: Callable[[str, Tensor], Tensor], count: int) -> Features:
        """The same records with every row tensor replaced by ``change(name, tensor)``."""

        def new(name: str, rows: Tensor | None) -> Tensor | None:
            return None if rows is None else change(name, rows)

        def changed(part: Any, where: str, places: Iterable[str]) -> dict[str, Any]:
            fields = ((place, field_of(place)) for place in places)
            return {field: new(f"{where}{place}", getattr(part, field)) for place, field in fields}

        return replace(
            self,
            count=count,
            **changed(self, "", ("label", *WHOLE)),
            layers={
                name: replace(layer, **changed(layer, f"layers/{name}/", LAYER_PARTS))
                for name, layer in self.layers.items()
            },
            batchnorm={
                name: replace(norm, **changed(norm, f"batchnorm/{name}/", NORM_PARTS))
                for name, norm in self.batchnorm.items()
            },
            mirror=None
            if self.mirror is None
            else self.mirror.map_rows(
                lambda name, rows: change(name if name == "label" else f"mirror/{name}", rows),
                count,
            ),
        )

    def to(self, device: torch.device) -> Features:
        """The same block on another device."""
        norms = {
            name: replace(
                norm,
                **{
                    part: getattr(norm, part).to(device)
                    for part in ("running_mean", "running_var", "weight", "bias")
                },
            )
            for name, norm in self.batchnorm.items()
        }
        moved = replace(
            self,
            batchnorm=norms,
            head=None if self.head is None else self.head.to(device),
            mirror=None if self.mirror is None else self.mirror.to(device),
        )
        return moved.map_rows(lambda _, rows: rows.to(device), self.count)

    def select(self, rows: slice | Tensor) -> Features:
        """Some of the rows: a slice, a boolean mask or a tensor of indices."""
        count = len(torch.arange(self.count)[rows.cpu() if isinstance(rows, Tensor) else rows])
        return self.map_rows(lambda _, tensor: tensor[rows], count)

    @cached_property
    def recorded(self) -> frozenset[str]:
        """The records among ``needs`` that this block has."""
        constants = {
            "head": self.head is not None,
            "logits.level": self.logits is not None and self.logits_level,
            "multi-label": self.multi_label,
            "pooled": self.pooled and self.embedding is not None,
            "batchnorm.running": any(name != INPUT for name in self.batchnorm),
            "mirror": self.mirror is not None,
        }
        own = {word_of(name) for name in self.rows() if not name.startswith("mirror/")}
        return frozenset(own) | {word for word, found in constants.items() if found}

    def require(self, needs: Iterable[str], who: str) -> None:
        """Raises DetectorError that names the missing records and the option that records them."""
        missing = sorted(frozenset(needs) - self.recorded)
        if missing:
            raise DetectorError(f"{who} needs {lacking(missing, who)}")

    def require_made_with(self, wanted: Making | None, who: str) -> None:
        """Raises DetectorError where the records of a group were made otherwise."""
        if wanted is None:
            return
        found = self.made_with.get(wanted.group)
        if found is None or not serves(found, wanted):
            made = "unknown settings" if found is None else in_words(found)
            raise DetectorError(
                f"{who} wants {in_words(wanted)}, but these rows were recorded with {made}: "
                f"extract again with -p {who}.KEY=VALUE, or set {who} as they were recorded"
            )

    def shared(self, compute: Callable[..., Value], *args: Hashable) -> Value:
        """``compute(self, *args)``, computed once per block for all detectors."""
        key = (compute, *args)
        if key not in self._shared:
            self._shared[key] = compute(self, *args)
        value: Value = self._shared[key]
        return value

    def finite(self, needs: Iterable[str]) -> Tensor:
        """(N,) bool: rows in which all records of ``needs`` are finite."""
        found = [self.shared(_finite, need) for need in needs]
        masks = [mask for mask in found if mask is not None]
        return torch.stack(masks).all(0) if masks else torch.ones(self.count, dtype=torch.bool)


def serves(found: Making, wanted: Making) -> bool:
    """Whether a record that was made in one way has the wanted one; PRO's may have more steps,
    and there may be more passes with dropout."""
    if isinstance(found, ProSteps) and isinstance(wanted, ProSteps):
        found = replace(found, steps=min(found.steps, wanted.steps))
    if isinstance(found, DropoutPasses) and isinstance(wanted, DropoutPasses):
        found = replace(found, passes=min(found.passes, wanted.passes))
    return found == wanted


def in_words(making: Making) -> str:
    """epsilon=0.0014, temperature=1000, where=all."""
    values = asdict(making).items()
    return ", ".join(f"{k}={v}" if isinstance(v, str) else f"{k}={v:g}" for k, v in values)


def _finite(block: Features, need: str) -> Tensor | None:
    """(N,) bool for one record of ``needs``; None if it has no rows."""
    matrices = [rows for rows in block.shared(_by_word).get(need, []) if rows.ndim > 1]
    found = [(rows * 0).sum(1) == 0 for rows in matrices]  # of isfinite, a fourth of the time
    return torch.stack(found).all(0) if found else None


def _by_word(block: Features) -> dict[str, list[Tensor]]:
    """The tensors of each record of ``needs``."""
    found: dict[str, list[Tensor]] = {}
    for name, rows in block.rows().items():
        found.setdefault(word_of(name), []).append(rows)
    return found


@dataclass(frozen=True)
class Rows:
    """Consecutive inputs, readable or not. paths, errors: one each, None if readable. labels: (N,)
    int64, -1 = unknown. features: the readable rows, in order."""

    paths: tuple[str, ...]
    labels: Tensor
    errors: tuple[str | None, ...]
    features: Features | None


def recorded(rows: Record | None) -> Record:
    """A record whose presence ``require`` has checked."""
    if rows is None:
        raise DetectorError("a record is missing that its block claims to have")
    return rows


def concatenate(blocks: Sequence[Features]) -> Features:
    """One block with the rows of all blocks. Raises ValueError without blocks, or if their records
    differ."""
    if not blocks:
        raise ValueError("no rows")
    rows = [block.rows() for block in blocks]
    if any(names.keys() != rows[0].keys() for names in rows):
        raise ValueError("the blocks differ in what was recorded")
    return blocks[0].map_rows(
        lambda name, _: torch.cat([block[name] for block in rows]),
        sum(block.count for block in blocks),
    )
