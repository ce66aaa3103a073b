"""What the papers' figures of layers show, in numbers, from feature caches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodcli.detectors.blocks import finite_rows
from oodcli.detectors.lsgm import LSGM, Projection, count_steps
from oodcli.errors import FileError, OodcliError
from oodcli.features import INPUT, BatchNorm, Features, recorded
from oodcli.files.artefact import Artefact
from oodcli.files.cache import FeatureCache
from oodcli.files.hdf5 import damage, dataset, reading
from oodcli.files.origin import Origin, Words
from oodcli.files.virtual import FORMAT, MADE_BY, read_provenance
from oodcli.metrics import MEAN
from oodcli.records import lacking
from oodcli.report.evaluation import ID

VIRTUAL = "virtual"
BATCHNORM = "BatchNorm"
SHOWN = 2000
"""Rows of a set in the map, taken evenly."""
PER_CLASS = 5
"""Images of a class in a row of the impressions, real ones and virtual ones."""
METHODS = ("pca", "tsne")

_MEANS = frozenset({"batchnorm.mean", "batchnorm.running", "logits"})
_FEATURES = frozenset({"embedding", "logits"})


@dataclass(frozen=True)
class LayerInputs:
    """Feature caches of one checkpoint: of ID images, of OOD sets by name, and of virtual images.
    images: the virtual images themselves. lsgm: an artefact of that detector.

    Raises FileError when one of them is of another checkpoint or preprocessing than the ID cache,
    or of another kind; OodcliError when a set has a name that is ours.
    """

    id: FeatureCache
    ood: Mapping[str, FeatureCache]
    virtual: FeatureCache | None = None
    images: Path | None = None
    lsgm: Artefact | None = None

    def __post_init__(self) -> None:
        for name in self.ood:
            if name in (ID, VIRTUAL, BATCHNORM, MEAN):
                raise OodcliError(
                    f"--ood {name}: the figures use this name for another set: choose another"
                )
        others = [*self.ood.values(), *([self.virtual] if self.virtual else [])]
        for cache in others:
            self._require_same(cache.path, "extracted", cache.provenance.origin)
        if self.virtual is not None and not self.virtual.provenance.virtual:
            raise FileError(
                f"{self.virtual.path} holds features of real images, but --virtual needs virtual "
                "ones: extract a file from 'oodcli invert'"
            )
        if self.images is not None:
            self._require_same(self.images, "made", read_provenance(self.images).origin)
        if self.lsgm is not None:
            where = self.lsgm.path or Path(self.lsgm.detector.name)
            if not isinstance(self.lsgm.detector, LSGM):
                raise FileError(
                    f"{where} is of {self.lsgm.detector.name}, but only lsgm has transitions: give "
                    "an artefact of lsgm, or leave -d out"
                )
            fitted = self.lsgm
            origin = Origin(fitted.checkpoint_sha256, fitted.averaged, fitted.preprocessing)
            self._require_same(where, "fitted", origin)

    def _require_same(self, path: Path, verb: str, origin: Origin) -> None:
        words = Words(f"{path} was {verb} with", f"{self.id.path} with")
        origin.require_same(self.id.provenance.origin, words)

    @property
    def named(self) -> dict[str, FeatureCache]:
        """The ID cache first, the virtual images last."""
        virtual = {} if self.virtual is None else {VIRTUAL: self.virtual}
        return {ID: self.id, **self.ood, **virtual}

    def lacking(self, needs: Iterable[str], who: str) -> str:
        """What the first cache that lacks something lacks and how to record it, in words; empty
        where all have it. who: a detector that needs the same."""
        for cache in self.named.values():
            missing = sorted(frozenset(needs) - cache.recorded)
            if missing:
                # A cache without any layer does not say that the network has none.
                named = [need for need in missing if need != "batchnorm.running"] or missing
                return f"{cache.path} has no {lacking(named, who)}"
        return ""


@dataclass(frozen=True)
class Curves:
    """Set → layer → number, see ``deviation`` and ``class_deviation``."""

    from_batchnorm: Mapping[str, Mapping[str, float]]
    from_id_class: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Map:
    """points: set → (n, 2). classes: (n,) of the ID points. share: of the variance, where the map
    is a projection."""

    points: Mapping[str, NDArray[np.float64]]
    classes: NDArray[np.int64]
    method: str
    share: float | None


@dataclass(frozen=True)
class ClassMeans:
    """Of one set. rows: (K,) how many each class has. sums: BatchNorm layer → (K, C) float64, sums
    over these rows of the spatial means of the layer's input. norms: what the network remembers."""

    rows: Tensor
    sums: Mapping[str, Tensor]
    norms: Mapping[str, BatchNorm]

    def mean(self, layer: str) -> Tensor:
        """(C,) over all rows."""
        return self.sums[layer].sum(0) / self.rows.sum()

    def by_class(self, layer: str) -> Tensor:
        """(K, C); zeros for a class without rows."""
        return self.sums[layer] / self.rows.clamp(min=1)[:, None]


def deviation(mean: Tensor, norm: BatchNorm) -> float:
    """mean_c |m_c − μ_c| / √(σ²_c + ε): how far a set's means of the channels lie from BatchNorm's
    running means, in its standard deviations. mean: (C,) float64."""
    return float(((mean - norm.running_mean.double()).abs() / _deviations(norm)).mean())


def class_deviation(
    means: Tensor, rows: Tensor, of: Tensor, of_rows: Tensor, norm: BatchNorm
) -> float:
    """Σ_k n_k mean_c |m_kc − r_kc| / √(σ²_c + ε) / Σ_k n_k over the classes k that both have: how
    far means of a class lie from those of the same class in another set.

    means, of: (K, C) float64, m and r; rows, of_rows: (K,), rows is n. NaN where they share no
    class.
    """
    both = (rows > 0) & (of_rows > 0)
    apart = ((means - of).abs() / _deviations(norm)).mean(1)[both]  # (k,)
    weights = rows[both].double()
    return float((weights * apart).sum() / weights.sum())


def _deviations(norm: BatchNorm) -> Tensor:
    return (norm.running_var.double() + norm.eps).sqrt()


def layer_curves(inputs: LayerInputs) -> Curves:
    """How far each set lies from BatchNorm's averages, layer by layer; and from the ID images of
    the same class, where BatchNorm's averages are the same for all classes. A class is the label of
    ID and virtual images, where it is known, else the predicted one."""
    ours = class_means(inputs.id, labelled=True)
    far = {ID: {name: deviation(ours.mean(name), norm) for name, norm in ours.norms.items()}}
    near = {
        BATCHNORM: {
            name: class_deviation(
                norm.running_mean.double().expand_as(ours.sums[name]),
                ours.rows,
                ours.by_class(name),
                ours.rows,
                norm,
            )
            for name, norm in ours.norms.items()
        }
    }
    for name, cache in inputs.named.items():
        if name != ID:  # one at a time: with a thousand classes the sums are large
            theirs = class_means(cache, labelled=name == VIRTUAL)
            layers = [layer for layer in ours.norms if layer in theirs.norms]
            far[name] = {
                layer: deviation(theirs.mean(layer), ours.norms[layer]) for layer in layers
            }
            near[name] = {
                layer: class_deviation(
                    theirs.by_class(layer),
                    theirs.rows,
                    ours.by_class(layer),
                    ours.rows,
                    ours.norms[layer],
                )
                for layer in layers
            }
    return Curves(far, near)


def class_means(cache: FeatureCache, *, labelled: bool) -> ClassMeans:
    """Reads the cache in blocks. Raises FileError when there is no finite row."""
    count = len(cache.provenance.class_names)
    rows = torch.zeros(count, dtype=torch.int64)
    sums: dict[str, Tensor] = {}
    norms: dict[str, BatchNorm] = {}
    for block in cache.rows(_MEANS):
        good = block.select(block.finite(_MEANS))
        classes = _classes(good, labelled)
        rows += classes.bincount(minlength=count)
        for name, norm in good.batchnorm.items():
            if name != INPUT and norm.mean is not None:
                values = norm.mean.double()  # (N, C)
                if name not in sums:
                    sums[name] = torch.zeros(count, values.shape[1], dtype=torch.float64)
                sums[name].index_add_(0, classes, values)
                norms[name] = norm
    _require_rows(cache, int(rows.sum()))
    return ClassMeans(rows, sums, norms)


def _classes(block: Features, labelled: bool) -> Tensor:
    """(N,) the label where there is one and ``labelled`` is set, else the predicted class."""
    logits, label = recorded(block.logits), block.label
    predicted = logits.argmax(1)
    if not labelled or label is None:
        return predicted
    return torch.where((label >= 0) & (label < logits.shape[1]), label, predicted)


def _require_rows(cache: FeatureCache, count: int) -> None:
    if not count:
        raise FileError(f"{cache.path} has no row with finite numbers: extract readable images")


def feature_map(inputs: LayerInputs, method: str, seed: int) -> Map:
    """The penultimate features of all sets in one plane: the two principal axes of all rows that
    are shown (``pca``), or t-SNE (``tsne``; van der Maaten and Hinton 2008), which uses ``seed``.
    Raises FileError when there are fewer than four rows, or one feature."""
    parts, classes = {}, torch.zeros(0, dtype=torch.int64)
    for name, cache in inputs.named.items():
        parts[name], found = _sample(cache, labelled=name == ID)
        classes = found if name == ID else classes
    features = torch.cat(list(parts.values()))  # (n, D)
    if len(features) < 4 or features.shape[1] < 2:
        raise FileError(
            f"{inputs.id.path}: {len(features)} rows of {features.shape[1]} features are too few "
            "to project: at least four rows of two are needed"
        )
    share = None
    if method == "pca":
        projection, share = Projection.fit(features, 2)
        points = projection(features).numpy()
    else:
        points = _tsne(features.numpy(), seed)
    ends = np.cumsum([len(rows) for rows in parts.values()])[:-1]
    split = dict(zip(parts, np.split(points, ends), strict=True))
    return Map(split, classes.numpy(), method, share)


def _tsne(features: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    perplexity = min(30.0, (len(features) - 1) / 3)
    model = TSNE(init="pca", perplexity=perplexity, random_state=seed, n_jobs=1)
    with threadpool_limits(1):  # several threads add in another order, and the map is another one
        points: NDArray[np.float64] = model.fit_transform(features).astype(np.float64)
    return points


def _sample(cache: FeatureCache, *, labelled: bool) -> tuple[Tensor, Tensor]:
    """(n, D) float64 and (n,) classes of at most ``SHOWN`` finite rows, evenly taken."""
    readable = sum(not error for _, _, errors in cache.listing() for error in errors)
    most = min(readable, SHOWN)
    wanted = torch.linspace(0, readable - 1, most, dtype=torch.float64).round().long()
    rows, classes = [], []
    for block in cache.rows(_FEATURES, lambda numbers: torch.isin(numbers, wanted)):
        good = block.select(block.finite(_FEATURES))
        rows.append(recorded(good.embedding).double())
        classes.append(_classes(good, labelled))
    _require_rows(cache, sum(map(len, rows)))
    return torch.cat(rows), torch.cat(classes)


def transitions(inputs: LayerInputs, detector: LSGM) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Set → later layer → (K', K) shares of the set's rows that go from a component of the layer
    before to one of this. Raises DetectorError when a layer was not recorded."""
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, cache in inputs.named.items():
        blocks = finite_rows(cache.rows(LSGM.needs), LSGM.needs, LSGM.name)
        counts = count_steps(blocks, detector.mixtures)
        found[name] = {
            layer: (counts[layer].double() / counts[layer].sum()).numpy()
            for layer in detector.layer_names[1:]
        }
    return found


def paths_of_half(shares: NDArray[np.float64]) -> int:
    """The least number of paths that half of the rows take together."""
    falling = np.sort(shares, axis=None)[::-1].cumsum()
    return int(np.searchsorted(falling, 0.5 - 1e-9)) + 1


def image_paths(inputs: LayerInputs) -> dict[int, tuple[Sequence[str], Sequence[str]]]:
    """Class → where the first real images of it are, and the first virtual ones; for the classes
    that the virtual images have. Real images count by their labels."""
    if inputs.images is None:
        return {}
    virtual: dict[int, list[str]] = {}
    with reading(inputs.images, FORMAT, MADE_BY) as file, damage(inputs.images):
        labels = dataset(file, "label", "iu")[()].tolist()
    classes = range(len(inputs.id.provenance.class_names))
    for row, label in enumerate(labels):
        if label in classes and len(virtual.setdefault(label, [])) < PER_CLASS:
            virtual[label].append(f"{inputs.images}[{row}]")
    real: dict[int, list[str]] = {label: [] for label in virtual}
    for paths, found, errors in inputs.id.listing():
        for path, label, error in zip(paths, found.tolist(), errors, strict=True):
            if not error and label in real and len(real[label]) < PER_CLASS:
                real[label].append(path)
    return {label: (real[label], virtual[label]) for label in sorted(virtual)}
