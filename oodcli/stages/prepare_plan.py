"""What ``oodcli prepare`` would do: which detectors, and the steps that make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from oodcli import detectors
from oodcli.detectors.c2ir_z import MANY_CLASSES
from oodcli.inversion.invert import HALVED_FROM
from oodcli.networks.card import Overrides
from oodcli.networks.classifier import Classifier
from oodcli.stages.extract_job import ExtractRequest
from oodcli.stages.fit_job import FitRequest
from oodcli.stages.invert_job import InvertRequest
from oodcli.stages.model import Model

REAL_FROM = 100
"""Real images from which detectors are fitted on them: ``fit`` holds out every fifth, and
``--fpr 0.05`` needs 19 held out."""

ROWS_A_CLASS = 10
"""Real images per class from which detectors are fitted on them instead of on virtual ones: the
mean of ten images has a tenth of their variance."""


FIVE_PERCENT_FROM = 19
"""Real images from which ``--fpr 0.05`` is possible without a pool: 1/(19 + 1)."""

POOL_FROM = 10
"""Real images from which they scale the parts of c2ir-peak, if there is no pool: it takes their
quartiles."""

PER_CLASS = 50
"""Virtual images per class by default."""

STEPS = 24
"""Steps of a small virtual image with BatchNorm and few classes, half of those of ``invert``:
c2ir-peak then detects about as well (docs/research/cost.md)."""

STEPS_UP_TO = 0.97
"""Accuracy up to which those are made: a pool starts from images on which the network is right more
often than that. On the demo's network, 99 % right, 24 steps came to 98.8 %."""

PIXELS = 300 * 224 * 224
"""Pixels of all virtual images where there are many classes."""

WEAK = 0.7
"""Accuracy below which peak-energy gets no threshold from virtual images alone."""

STEPS_OF_MANY = 60
"""Steps without BatchNorm where there are many classes. On SqueezeNet, 30 steps reached the wanted
class for 56 % of 32 images, less than the network's accuracy, and 60 for 94 % of 16."""


@dataclass(frozen=True)
class Effort:
    """How many virtual images are made, and how. total: images in all; None for per_class of each
    class. steps, mirror, objective: as of ``invert``."""

    per_class: int = PER_CLASS
    total: int | None = None
    steps: int | None = None
    mirror: bool | None = None
    objective: str = "kl"


def effort(
    classes: int,
    size: tuple[int, int],
    per_class: int | None = None,
    steps: int | None = None,
    mirror: bool | None = None,
    *,
    batchnorm: bool = True,
    accuracy: float | None = None,
) -> Effort:
    """The virtual images for a network. size: height and width. per_class, steps, mirror: what the
    user asks for. batchnorm, accuracy: as of ``Situation``. 50 images of each of 1,000 classes take
    days on a CPU at 224 pixels: with many classes, all images together have ``PIXELS``, but are not
    more than otherwise."""
    total = None
    if per_class is None and classes > MANY_CLASSES:
        total = min(PIXELS // (size[0] * size[1]), PER_CLASS * classes)
    objective = "patches" if not batchnorm else "kl" if total is None else "short"
    if objective == "patches" and total is not None:
        steps = steps or STEPS_OF_MANY
    elif objective == "kl" and classes <= MANY_CLASSES and min(size) < HALVED_FROM:
        steps = steps or (STEPS if (accuracy or 0) <= STEPS_UP_TO else None)
    return Effort(per_class or PER_CLASS, total, steps, mirror, objective)


@dataclass(frozen=True)
class Situation:
    """What there is to prepare from. available: records that the network can give. batchnorm: it
    has BatchNorm statistics. classes: their number. accuracy: the published one. rows: real images.
    complete: no class is known to lack images."""

    available: frozenset[str]
    batchnorm: bool
    classes: int
    accuracy: float | None = None
    rows: int = 0
    complete: bool = True

    def allows(self, name: str) -> bool:
        """Whether the network gives all that a detector needs to be fitted and to score."""
        kind = detectors.get(name)
        one_label = "multi-label" not in self.available
        needs = kind.needs | kind.fit_needs()
        return needs <= self.available | {"label"} and (one_label or kind.multi_label)


@dataclass(frozen=True)
class Choice:
    """names: detectors to fit, the default first. fitted_on: virtual, images, noise or nothing
    (empty). pool, images: whether accuracy-matched virtual images and real ones calibrate."""

    names: tuple[str, ...]
    fitted_on: str = ""
    pool: bool = False
    images: bool = False

    @property
    def virtual(self) -> bool:
        return self.fitted_on == "virtual"

    @property
    def calibrated(self) -> bool:
        return self.pool or self.images or self.fitted_on == "images"

    @property
    def artefacts(self) -> bool:
        """Whether there is anything to write; otherwise the default needs no artefact."""
        return self.calibrated or bool(self.fitted_on)


def choose(given: Situation) -> Choice:
    """The detectors, by the measurements of docs/choosing.md."""

    def among(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if given.allows(name))

    # With many classes, c2ir-peak flags nearly all real images, and 1c-sum, which ranks best, gets
    # a good threshold from real images alone (docs/research/many-classes.md).
    many = given.classes > MANY_CLASSES
    real = given.rows >= REAL_FROM
    # Without BatchNorm nothing is fitted on virtual images, because nothing was reliably better for
    # it (docs/research/without-batchnorm.md); they only calibrate, if there are few real ones.
    invertible = "multi-label" not in given.available and (given.batchnorm or not real)
    pool = given.accuracy is not None and invertible
    # Without BatchNorm peak-energy was better than energy on every network, but virtual images
    # alone gave it no threshold on weak ones, and with many classes to gen alone
    # (docs/research/without-batchnorm.md).
    alone = pool and given.rows < FIVE_PERCENT_FROM
    strongest_free: tuple[str, ...]
    if given.batchnorm:
        strongest_free = ("ang++", "gen") if many else ()
    elif alone and many:
        strongest_free = ("gen",)
    else:
        weak = alone and given.accuracy is not None and given.accuracy < WEAK
        strongest_free = () if weak else ("peak-energy",)
    free = among("joint-energy") or among(*strongest_free, "energy", "msp")
    enough = given.complete and given.rows >= max(REAL_FROM, ROWS_A_CLASS * given.classes)
    handful = given.rows >= (FIVE_PERCENT_FROM if pool else 1)
    if many and handful and given.allows("1c-sum"):
        fitted = among("c2ir-z", "knn") if enough else among("c2ir-z") if real else ()
        names = ("1c-sum", *fitted, *free)
        return Choice(names, "images") if fitted else Choice(names, "noise", images=True)
    if enough and not many and given.allows("c2ir-peak"):
        return Choice((*among("c2ir-peak", "c2ir-z", "knn"), *free), "images")
    if invertible and not many and given.allows("c2ir-z") and (pool or not enough):
        scaled = pool or given.rows >= POOL_FROM
        strongest = among("c2ir-peak") if scaled else ()
        more = free if pool or given.rows else ()
        names = (*strongest, "c2ir-z", *among("knn"), *more)
        return Choice(names, "virtual", pool, given.rows > 0)
    # Without BatchNorm, knn on real images was worse than detectors that need no fit, which all
    # images calibrate.
    if real and not pool and given.batchnorm and given.allows("knn"):
        names = (*among("c2ir-z", "knn"), *free) if enough else (*free, "knn")
        return Choice(names, "images")
    if pool or given.rows:
        return Choice(free, "", pool, given.rows > 0)
    default = among("joint-energy") or among("1c-sum", *free)
    noise = detectors.get(default[0]).reference_images is not None
    return Choice(default[:1], "noise" if noise else "")


@dataclass(frozen=True)
class Places:
    """model: of all commands. folder: that all files are in. images: as ``--images``."""

    model: Model
    folder: Path
    images: str


Request = InvertRequest | ExtractRequest | FitRequest


@dataclass(frozen=True)
class Step:
    """One command of the plan. outputs: names of files in the folder. inputs: steps that it
    reads."""

    name: str
    request: Request
    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        return words_of(self.request)


def steps_of(
    choice: Choice,
    places: Places,
    virtual: Effort,
    accuracy: float | None = None,
) -> list[Step]:
    """The steps, in order. accuracy: of the pool."""
    model, folder = places.model, places.folder
    found: list[Step] = []

    def add(name: str, request: Request, *inputs: str, also: str = "") -> None:
        outputs = (f"{name}.h5", *filter(None, [also]))
        found.append(Step(name, request, outputs, inputs))

    def invert(name: str, one: Model) -> None:
        request = InvertRequest(
            one,
            folder / f"{name}.h5",
            per_class=virtual.per_class,
            steps=virtual.steps,
            mirror=virtual.mirror,
            objective=virtual.objective,
            sensitivity=False,  # c2ir, the only detector that needs them, is not fitted
        )
        if virtual.total is not None:
            # To compile takes as long as a hundred images.
            request = replace(request, total=virtual.total, compiled=False)
        add(name, request, also=f"{name}.png")

    def extract(
        images: str, name: str, names: Sequence[str], *inputs: str, matched: float | None = None
    ) -> None:
        output = folder / f"{name}.h5"
        request = ExtractRequest(
            model, images, output, for_detectors=tuple(names), match_accuracy=matched
        )
        add(name, request, *inputs)

    if choice.virtual:
        invert("virtual", model)
        extract(str(folder / "virtual.h5"), "virtual.features", choice.names, "virtual")
    if choice.pool:
        invert("pool", with_next_seed(model))
        extract(*(str(folder / "pool.h5"), "pool.features", choice.names, "pool"), matched=accuracy)
    noisy = [name for name in choice.names if _noise(name)]
    if noisy:
        extract(_noise(noisy[0]), "noise.features", noisy)
    if choice.images or choice.fitted_on == "images":
        extract(places.images, "images.features", choice.names)
    if choice.artefacts:
        found.append(_fit(choice, folder, noisy=bool(noisy)))
    return found


def _fit(choice: Choice, folder: Path, *, noisy: bool) -> Step:
    cache = f"{choice.fitted_on}.features" if choice.fitted_on else None
    pools = [name for name in ("pool", "images") if getattr(choice, name)]
    calibrate = [f"{name}.features" for name in pools]
    noise = "noise.features" if noisy and choice.fitted_on != "noise" else None
    request = FitRequest(
        None if cache is None else folder / f"{cache}.h5",
        choice.names,
        {},
        calibrate=[folder / f"{name}.h5" for name in calibrate],
        noise=None if noise is None else folder / f"{noise}.h5",
        output=folder,
    )
    outputs = tuple(f"{name}.safetensors" for name in choice.names)
    return Step("fit", request, outputs, tuple(filter(None, [cache, noise, *calibrate])))


def _noise(name: str) -> str:
    """Noise images that a detector is fitted on; empty if none."""
    kind = detectors.get(name)
    return kind.noise_images or kind.reference_images or ""


def with_next_seed(model: Model) -> Model:
    """For virtual images other than those to fit on."""
    return replace(model, running=replace(model.running, seed=model.running.seed + 1))


# --- command lines ----------------------------------------------------------------------------


def words_of(request: Request) -> tuple[str, ...]:
    """The command line of a request, without ``oodcli``."""
    match request:
        case InvertRequest():
            mirror = {None: (), True: ("--mirror",), False: ("--no-mirror",)}[request.mirror]
            words = ["invert", str(request.model.path)]
            if request.total is None:
                words += ["--per-class", str(request.per_class)]
            else:
                words += ["--total", str(request.total)]
            words += [] if request.objective == "kl" else ["--objective", request.objective]
            words += [] if request.sensitivity else ["--no-sensitivity"]
            words += [] if request.compiled is None else [_switch("compile", on=request.compiled)]
            words += [] if request.steps is None else ["--steps", str(request.steps)]
            return (*words, *mirror, "-o", str(request.path), *options_of(request.model))
        case ExtractRequest():
            words = ["extract", str(request.model.path), request.images]
            words += ["--for", ",".join(request.for_detectors)]
            if request.match_accuracy is not None:
                words += ["--match-accuracy", repr(request.match_accuracy)]
            return (*words, "-o", str(request.path), *options_of(request.model))
        case FitRequest():
            words = ["fit"] if request.cache is None else ["fit", str(request.cache)]
            words += [word for name in request.detectors for word in ("-d", name)]
            if request.noise is not None:
                words += ["--noise", str(request.noise)]
            words += [word for path in request.calibrate for word in ("--calibrate", str(path))]
            return (*words, "-o", str(request.output))


def _switch(name: str, *, on: bool) -> str:
    return f"--{name}" if on else f"--no-{name}"


def options_of(model: Model) -> tuple[str, ...]:
    """The options of a command that describe a checkpoint and how to run it, without defaults."""
    given = model.checkpoint
    if isinstance(given, Classifier):
        return ()
    running = model.running
    values = {
        **_of_network(given.overrides),
        "--ema": given.prefer_ema,
        "--trust-pickle": given.trust_pickle,
        "--device": None if running.device == "auto" else running.device,
        "--batch-size": running.batch_size,
        "--precision": running.precision,
        "--seed": running.seed or None,
    }
    words: list[str] = []
    for option, value in values.items():
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words += [option, _word(value)]
    return tuple(words)


def _of_network(given: Overrides) -> dict[str, object]:
    return {
        "--arch": given.arch,
        "--num-classes": given.num_classes,
        "--input-size": given.input_size,
        "--mean": given.mean,
        "--std": given.std,
        "--resize": given.resize,
        "--interpolation": given.interpolation,
        "--crop": given.crop,
        "--exif": given.exif,
        "--image-range": given.image_range,
        "--decode": given.decode,
        "--class-names": given.names_file or given.class_names,
        "--layers": given.layers,
        "--card": given.card,
        "--state-key": given.state_key,
        "--multi-label": given.multi_label,
    }


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_word, value))
    return repr(value) if isinstance(value, float) else str(value)
