"""A classifier as everything else sees it: a frozen network, its preprocessing, its layers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from oodcli.architectures.heads import RetrainedHead
from oodcli.errors import CheckpointError, OodcliError
from oodcli.features import LinearHead
from oodcli.memory import ran_out, too_short
from oodcli.outputs import (
    Call,
    Reading,
    as_logits,
    copied,
    find_logits,
    matches_weights,
    returning_logits,
    sparing_input,
)

LARGEST_INPUT = 1 << 24
LARGEST_RESIZE = 1 << 14
"""Pixels, of an image and of a side; more is a damaged file."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
EXIF = ("turn", "keep")

Resize: TypeAlias = int | tuple[int, int] | None
"""Before a centre crop: length of the shorter side, or height and width; None resizes straight to
the input, without a crop."""


INPUTS = ("input_size", "mean", "std")
"""Fields of a Preprocessing that concern images which are the network's inputs already."""


@dataclass(frozen=True)
class Preprocessing:
    """From an image to the network's input.

    input_size: height, width. mean, std: one number a channel, of pixels in [0, 1]; one channel
    means grey images. exif: whether an image is turned upright as its EXIF block says, or kept as
    it is stored. image_range: values that become 0 and 255, of images with more than 8 bits; None
    is the range of their type. Raises CheckpointError where the numbers make no sense.
    """

    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = None
    interpolation: str = "bilinear"
    exif: str = "turn"
    image_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise CheckpointError(
                f"mean has {len(self.mean)} and std {len(self.std)} numbers: give one for grey "
                "or three for RGB, the same count for both"
            )
        if not all(math.isfinite(number) for number in (*self.mean, *self.std)):
            raise CheckpointError(f"mean {self.mean} and std {self.std} must be finite numbers")
        if not all(deviation > 0 for deviation in self.std):
            raise CheckpointError(f"std {self.std} must be positive")
        if len(self.input_size) != 2 or min(self.input_size) < 1:
            raise CheckpointError(f"input_size {self.input_size} must be two positive integers")
        if self.input_size[0] * self.input_size[1] > LARGEST_INPUT:
            raise CheckpointError(
                f"input_size {self.input_size} is more than {LARGEST_INPUT} pixels: no classifier "
                "takes such images"
            )
        if self.resize is not None:
            sides = (self.resize,) if isinstance(self.resize, int) else self.resize
            if len(sides) > 2 or min(sides) < 1:
                raise CheckpointError(
                    f"resize {self.resize} must be a positive integer, or height and width"
                )
            if max(sides) > LARGEST_RESIZE:
                raise CheckpointError(f"resize={self.resize} is more than {LARGEST_RESIZE} pixels")
        for name, given, known in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("exif", self.exif, EXIF),
        ):
            if given not in known:
                raise CheckpointError(f"{name} '{given}' is not one of {', '.join(known)}")
        if self.image_range is not None:
            low, high = self.image_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise CheckpointError(
                    f"image range {low:g},{high:g}: expected two numbers, the first below the "
                    "second"
                )

    @property
    def channels(self) -> int:
        return len(self.mean)

    def normalise(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) pixels in [0, 1] → the network's input, the same shape."""
        mean, std = self._constants(pixels)
        return (pixels - mean) / std

    def to_pixels(self, normalised: Tensor) -> Tensor:
        """The way back; nothing is clipped."""
        mean, std = self._constants(normalised)
        return normalised * std + mean

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (like.new_tensor(numbers).view(-1, 1, 1) for numbers in (self.mean, self.std))
        return mean, std

    def unlike(self, other: Preprocessing) -> tuple[str, str] | None:
        """The first field in which the two differ, with the value of each; None if in none."""
        for name, mine in asdict(self).items():
            theirs = getattr(other, name)
            if mine != theirs:
                return f"{name} {mine}", f"{name} {theirs}"
        return None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Preprocessing:
        """The fields of to_dict, or of an older one. Raises KeyError, TypeError, IndexError or
        ValueError for others."""
        limits = fields.get("image_range")
        return cls(
            input_size=(int(fields["input_size"][0]), int(fields["input_size"][1])),
            mean=tuple(float(number) for number in fields["mean"]),
            std=tuple(float(number) for number in fields["std"]),
            resize=_resize(fields.get("resize")),
            interpolation=str(fields.get("interpolation", "bilinear")),
            exif=str(fields.get("exif", "turn")),
            image_range=None if limits is None else (float(limits[0]), float(limits[1])),
        )


def _resize(found: Any) -> Resize:
    if isinstance(found, list | tuple):
        return int(found[0]), int(found[1])
    return None if found is None else int(found)


@dataclass(frozen=True)
class Tap:
    """One call of one module whose output is recorded.

    name: dotted path of the module; ``@2`` is appended for its second call in a forward pass.
    kind: batchnorm, block, stage or other. channels: C. channel_dim: 1, or -1 for tokens.
    spatial_size: number of positions.
    """

    name: str
    module: str
    kind: str
    channels: int
    channel_dim: int
    spatial_size: int


@dataclass(frozen=True)
class Classifier:
    """A network in evaluation mode with frozen weights, and what must be known to use it.

    class_names: one a class, "0", "1", … where nobody said; ``named`` is true where somebody did.
    sha256: of the checkpoint file.
    assumptions: sentences about what was not given. head: None when the last layer is not linear.
    head_name: also that of a retrained head, whose input is the embedding, too.
    taps: in the order of the forward pass. averaged: whether these are the averaged (EMA) weights
    of a checkpoint that has plain ones, too. logits_level: False where the network returns
    log-probabilities, which are logits up to a constant for each image.
    """

    network: nn.Module
    arch: str
    num_classes: int
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    sha256: str
    assumptions: tuple[str, ...]
    taps: tuple[Tap, ...]
    head_name: str | None
    head: LinearHead | None
    averaged: bool = False
    logits_level: bool = True
    named: bool = False

    @property
    def device(self) -> torch.device:
        parameter = next(self.network.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def batchnorms(self) -> dict[str, _BatchNorm]:
        """The BatchNorm layers that take part in the forward pass, by tap name."""
        modules = dict(self.network.named_modules())
        found = {tap.name: modules[tap.module] for tap in self.taps if tap.kind == "batchnorm"}
        return {name: norm for name, norm in found.items() if isinstance(norm, _BatchNorm)}

    @property
    def last_map(self) -> Tap | None:
        """The last tap with several positions: what a pooling makes the embedding of."""
        return next((tap for tap in reversed(self.taps) if tap.spatial_size > 1), None)

    @property
    def retrained(self) -> RetrainedHead | None:
        """The head, where it was trained to tell what is out of distribution."""
        found = None if self.head_name is None else self.network.get_submodule(self.head_name)
        return found if isinstance(found, RetrainedHead) else None

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())


def assemble(
    network: nn.Module,
    *,
    arch: str,
    preprocessing: Preprocessing,
    class_names: Sequence[str] | None = None,
    sha256: str = "",
    assumptions: Sequence[str] = (),
    layers: str | None = None,
    num_classes: int | None = None,
) -> Classifier:
    """Freeze a network and find its head and its taps by running one random image through it.

    layers: a regular expression of module names; those that match are tapped in place of blocks
    and stages (BatchNorm layers always are). num_classes: tells which of several outputs are the
    logits. A network that returns its logits among other things returns nothing else afterwards,
    and one that changes its input in place works on a copy of it.

    Raises CheckpointError when the network cannot run on the preprocessing's input size, does not
    return logits, or when class_names do not fit, OodcliError when the memory is too short for
    that image.
    """
    network = network.eval().requires_grad_(False)
    height, width = preprocessing.input_size
    parameter = next(network.parameters(), None)
    image = torch.randn(
        (1, preprocessing.channels, height, width), generator=torch.Generator().manual_seed(0)
    )
    image = image if parameter is None else image.to(parameter.device)
    classes = num_classes or (None if class_names is None else len(class_names))
    try:
        with torch.no_grad():
            calls, returned = _trial(network, image)
            reading, logits = _read(network, image, returned, calls, classes)
    except (RuntimeError, MemoryError, ValueError, AssertionError, IndexError, TypeError) as error:
        if ran_out(error):
            raise OodcliError(too_short(image.device, preprocessing.input_size)) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{arch} does not run on {preprocessing.channels}x{height}x{width} images "
            f"({reason}): give --input-size and --mean (one number for grey, three for RGB)"
        ) from error
    returning_logits(network, reading)
    found = logits.shape[1]
    if found < 2:
        raise CheckpointError(
            f"{arch} has {found} output: detectors need a classifier with at least two classes"
        )
    if class_names is not None and len(class_names) != found:
        raise CheckpointError(
            f"{len(class_names)} class names were given but the network has {found} classes: "
            "correct --class-names or class_names in the model card"
        )
    head_name, head = _find_head(calls, logits)
    notes = [reading.note, _by_batch(calls)]
    return Classifier(
        network=network,
        arch=arch,
        num_classes=found,
        class_names=tuple(class_names or (str(index) for index in range(found))),
        preprocessing=preprocessing,
        sha256=sha256,
        assumptions=(*assumptions, *filter(None, notes)),
        taps=_image_by_image(
            network, image, calls, _find_taps(network, calls, layers, preprocessing.input_size)
        ),
        head_name=head_name,
        head=head,
        logits_level=reading.level,
        named=class_names is not None,
    )


def _trial(network: nn.Module, image: Tensor) -> tuple[list[Call], Any]:
    """The calls of modules that return a tensor, in their order, and what the network returned. If
    it changes its input, it works on a copy from now on."""
    calls: list[Call] = []
    handles = []

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                given = args[0] if args and isinstance(args[0], Tensor) else None
                calls.append(Call(name, module, output.shape, copied(output), copied(given)))

        return hook

    for name, module in network.named_modules():
        if name:
            handles.append(module.register_forward_hook(remember(name)))
    given = image.clone()
    version = given._version
    try:
        returned = network(given)
    finally:
        for handle in handles:
            handle.remove()
    if given._version != version or not torch.equal(given, image):
        sparing_input(network)
    return calls, returned


def _read(
    network: nn.Module, image: Tensor, returned: Any, calls: Sequence[Call], classes: int | None
) -> tuple[Reading, Tensor]:
    if any(isinstance(call.module, RetrainedHead) for call in calls):
        return Reading(), as_logits(returned)  # MOS's are log-probabilities of several groups
    return find_logits(network, image, returned, calls, classes=classes)


def _by_batch(calls: Sequence[Call]) -> str:
    """A note on layers that normalise by the batch; empty where there is none."""
    found = dict.fromkeys(
        call.name
        for call in calls
        if isinstance(call.module, _BatchNorm) and call.module.running_mean is None
    )
    if not found:
        return ""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"BatchNorm layer {next(iter(found))}{more} has no running statistics, so the scores of an "
        "image depend on those in its batch: --batch-size 1 scores each image alone"
    )


def _find_head(calls: Sequence[Call], logits: Tensor) -> tuple[str | None, LinearHead | None]:
    for call in reversed(calls):
        module = call.module
        if isinstance(module, RetrainedHead):
            return call.name, None
        if not isinstance(module, nn.Linear) or call.output is None:
            continue
        same = torch.equal(call.output.float().reshape(-1), logits.reshape(-1))
        if same and matches_weights(call):
            weight = module.weight.detach().float()
            bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach().float()
            return call.name, LinearHead(weight.cpu(), bias.cpu())
    return None, None


def _find_taps(
    network: nn.Module, calls: Sequence[Call], layers: str | None, input_size: tuple[int, int]
) -> tuple[Tap, ...]:
    height, width = input_size
    modules = dict(network.named_modules())
    for head in [name for name, module in modules.items() if isinstance(module, RetrainedHead)]:
        # Its layers are no features: neither its two linear ones a block, nor its BatchNorm.
        modules = {n: m for n, m in modules.items() if not f"{n}.".startswith(f"{head}.")}
        calls = [call for call in calls if call.name in modules]
    blocks = _blocks(modules) or _plain_layers(calls)
    stages = _stages(modules, blocks, calls)
    seen: dict[str, int] = {}
    taps: list[Tap] = []
    try:
        pattern = None if layers is None else re.compile(layers)
    except re.error as error:
        raise CheckpointError(f"--layers '{layers}' is no regular expression: {error}") from error
    for call in calls:
        name, module, shape = call.name, call.module, call.shape
        if isinstance(module, _BatchNorm):
            kind = "batchnorm" if module.running_mean is not None else None
        elif pattern is not None:
            kind = "other" if pattern.search(name) and len(shape) >= 2 else None
        else:
            kind = "stage" if name in stages else "block" if name in blocks else None
        if kind is None:
            continue
        seen[name] = seen.get(name, 0) + 1
        dim = 1 if kind == "batchnorm" else _channel_dim(shape, height / width)
        taps.append(
            Tap(
                name=name if seen[name] == 1 else f"{name}@{seen[name]}",
                module=name,
                kind=kind,
                channels=shape[dim],
                channel_dim=dim,
                spatial_size=shape.numel() // shape[dim],
            )
        )
    if pattern is not None and not any(tap.kind == "other" for tap in taps):
        raise CheckpointError(
            f"--layers '{layers}' matches no module of the network: 'oodcli inspect --json' "
            "lists the names"
        )
    return tuple(taps)


def _image_by_image(
    network: nn.Module, image: Tensor, calls: Sequence[Call], taps: tuple[Tap, ...]
) -> tuple[Tap, ...]:
    """The taps whose outputs have the rows of one image after those of another: all where an image
    is one row; where it has several, as with windows and tokens, those for which two images show
    it. The others cannot be recorded by image."""
    several = {call.name for call in calls if call.shape and call.shape[0] != 1}
    doubtful = {tap.module for tap in taps} & several
    if not doubtful:
        return taps

    def outputs(images: Tensor) -> list[tuple[str, Tensor]]:
        found: list[tuple[str, Tensor]] = []
        handles = [
            network.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name: found.append((name, output.detach().clone()))
            )
            for name in doubtful
        ]
        try:
            with torch.no_grad():
                network(images)
        finally:
            for handle in handles:
                handle.remove()
        return found

    alone, second = outputs(image), outputs(torch.cat([image.flip(3), image]))
    fitting = {name: len(alone) == len(second) for name in doubtful}
    for (name, one), (_, both) in zip(alone, second, strict=False):
        same = both.shape == (2 * len(one), *one.shape[1:])
        close = 1e-3 * float(one.abs().max())
        fitting[name] &= same and bool((both[len(one) :] - one).abs().max() <= close)
    return tuple(tap for tap in taps if fitting.get(tap.module, True))


def _channel_dim(shape: Sequence[int], aspect: float) -> int:
    """1 for (N, C) and (N, C, H, W); -1 for tokens (N, T, C) and for (N, H, W, C). Of four
    dimensions those are H and W whose ratio is nearer to the image's, ``aspect``."""
    if len(shape) != 4:
        return -1 if len(shape) == 3 else 1
    first = abs(math.log(shape[2] / shape[3] / aspect))
    last = abs(math.log(shape[1] / shape[2] / aspect))
    return -1 if last < first else 1


def _blocks(modules: dict[str, nn.Module]) -> set[str]:
    """The outermost modules that are not mere containers and hold at least two weighted layers:
    residual blocks, dense blocks, inverted residuals, inception modules, transformer layers."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    found: set[str] = set()
    for name, module in modules.items():
        if not name or any(name.startswith(block + ".") for block in found):
            continue
        plain = isinstance(module, containers) and type(module).forward in (
            nn.Sequential.forward,
            nn.Module.forward,
        )
        weighted = sum(
            isinstance(child, nn.Conv1d | nn.Conv2d | nn.Linear) for child in module.modules()
        )
        if not plain and weighted >= 2 and not _is_trunk(module):
            found.add(name)
    return found


def _plain_layers(calls: Sequence[Call]) -> set[str]:
    """For a network without blocks (VGG, AlexNet): its activations over feature maps, or its
    convolutions where activations are functions."""
    maps = [(call.name, call.module) for call in calls if len(call.shape) == 4]
    convolutions = {name for name, module in maps if isinstance(module, nn.Conv2d)}
    kinds = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh)
    activations = {name for name, module in maps if isinstance(module, kinds)}
    found = activations if activations and convolutions else convolutions
    return found if len(found) > 1 else set()  # a lone layer has no depth to look into


def _is_trunk(module: nn.Module) -> bool:
    """Whether a module holds the blocks rather than being one: somewhere in it is a sequence of
    two or more modules that have two or more weighted layers each."""
    for child in module.modules():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            heavy = [
                part
                for part in child
                if sum(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear) for m in part.modules())
                >= 2
            ]
            if len(heavy) >= 2:
                return True
    return False


def _stages(modules: dict[str, nn.Module], blocks: set[str], calls: Sequence[Call]) -> set[str]:
    """The last block before each change of resolution, and the last of all. Where that block ends
    a plain sequence, the sequence's name is taken (layer1, not layer1.2)."""
    shapes = [(call.name, call.shape) for call in calls if call.name in blocks]
    found: set[str] = set()
    for index, (name, shape) in enumerate(shapes):
        following = shapes[index + 1][1] if index + 1 < len(shapes) else None
        if following is not None and shape[2:] == following[2:]:
            continue
        parent = name.rpartition(".")[0]
        last = isinstance(modules.get(parent), nn.Sequential) and name == f"{parent}." + str(
            list(dict(modules[parent].named_children()))[-1]
        )
        found.add(parent if parent and last else name)
    return found
