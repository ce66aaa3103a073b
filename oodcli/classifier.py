"""A classifier as everything else sees it: a frozen network, its preprocessing, its layers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from oodcli.architectures.heads import RetrainedHead
from oodcli.errors import CheckpointError, OodcliError
from oodcli.features import LinearHead
from oodcli.memory import ran_out, too_short

LARGEST_INPUT = 1 << 24
LARGEST_RESIZE = 1 << 14
"""Pixels, of an image and of a side; more is a damaged file."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """From an image to the network's input.

    input_size: height, width. mean, std: one number a channel, of pixels in [0, 1]; one channel
    means grey images. resize: length of the shorter side before a centre crop to input_size; None
    resizes straight to input_size. Raises CheckpointError where the numbers make no sense.
    """

    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    interpolation: str = "bilinear"

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
        if self.resize is not None and self.resize > LARGEST_RESIZE:
            raise CheckpointError(f"resize={self.resize} is more than {LARGEST_RESIZE} pixels")
        if self.resize is not None and self.resize < max(self.input_size):
            raise CheckpointError(
                f"resize={self.resize} is smaller than the crop of {self.input_size[0]}x"
                f"{self.input_size[1]}: make it at least {max(self.input_size)}"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise CheckpointError(
                f"interpolation '{self.interpolation}' is not one of {', '.join(INTERPOLATIONS)}"
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
        """Raises KeyError, TypeError or ValueError when the fields are not those of to_dict."""
        return cls(
            input_size=(int(fields["input_size"][0]), int(fields["input_size"][1])),
            mean=tuple(float(number) for number in fields["mean"]),
            std=tuple(float(number) for number in fields["std"]),
            resize=None if fields.get("resize") is None else int(fields["resize"]),
            interpolation=str(fields.get("interpolation", "bilinear")),
        )


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
    of a checkpoint that has plain ones, too.
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


def as_logits(output: Any) -> Tensor:
    """The logits (N, K) in whatever a network returns: a tensor, an object with ``logits``, or a
    tuple or dictionary that has them first."""
    if isinstance(output, dict) and output:
        output = output.get("logits", next(iter(output.values())))
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise CheckpointError(
            f"the network returned {shape} where logits of shape (N, classes) were expected: "
            "oodcli works on image classifiers"
        )
    return output


def assemble(
    network: nn.Module,
    *,
    arch: str,
    preprocessing: Preprocessing,
    class_names: Sequence[str] | None = None,
    sha256: str = "",
    assumptions: Sequence[str] = (),
    layers: str | None = None,
) -> Classifier:
    """Freeze a network and find its head and its taps by running one random image through it.

    layers: a regular expression of module names; those that match are tapped in place of blocks
    and stages (BatchNorm layers always are). Raises CheckpointError when the network cannot run
    on the preprocessing's input size, does not return logits, or when class_names do not fit,
    OodcliError when the memory is too short for that image.
    """
    network = network.eval().requires_grad_(False)
    calls: list[tuple[str, nn.Module, Tensor, Tensor | None]] = []
    handles = []

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                given = args[0] if args and isinstance(args[0], Tensor) else None
                calls.append((name, module, output, given))

        return hook

    for name, module in network.named_modules():
        if name:
            handles.append(module.register_forward_hook(remember(name)))
    height, width = preprocessing.input_size
    parameter = next(network.parameters(), None)
    image = torch.randn(
        (1, preprocessing.channels, height, width), generator=torch.Generator().manual_seed(0)
    )
    try:
        with torch.no_grad():
            output = network(image if parameter is None else image.to(parameter.device))
    except (RuntimeError, MemoryError, ValueError, AssertionError, IndexError, TypeError) as error:
        if ran_out(error):
            device = torch.device("cpu") if parameter is None else parameter.device
            raise OodcliError(too_short(device, preprocessing.input_size)) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{arch} does not run on {preprocessing.channels}x{height}x{width} images "
            f"({reason}): give --input-size and --mean (one number for grey, three for RGB)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    logits = as_logits(output)
    classes = logits.shape[1]
    if classes < 2:
        raise CheckpointError(
            f"{arch} has {classes} output: detectors need a classifier with at least two classes"
        )
    if class_names is not None and len(class_names) != classes:
        raise CheckpointError(
            f"{len(class_names)} class names were given but the network has {classes} classes: "
            "correct --class-names or class_names in the model card"
        )
    head_name, head = _find_head(calls, logits)
    return Classifier(
        network=network,
        arch=arch,
        num_classes=classes,
        class_names=tuple(class_names or (str(index) for index in range(classes))),
        preprocessing=preprocessing,
        sha256=sha256,
        assumptions=tuple(assumptions),
        taps=_find_taps(network, calls, layers, preprocessing.input_size),
        head_name=head_name,
        head=head,
        named=class_names is not None,
    )


Calls = list[tuple[str, nn.Module, Tensor, Tensor | None]]


def _find_head(calls: Calls, logits: Tensor) -> tuple[str | None, LinearHead | None]:
    for name, module, output, _ in reversed(calls):
        if isinstance(module, RetrainedHead):
            return name, None
        if isinstance(module, nn.Linear) and torch.equal(output.reshape(-1), logits.reshape(-1)):
            weight = module.weight.detach().float()
            bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach().float()
            return name, LinearHead(weight.cpu(), bias.cpu())
    return None, None


def _find_taps(
    network: nn.Module, calls: Calls, layers: str | None, input_size: tuple[int, int]
) -> tuple[Tap, ...]:
    height, width = input_size
    modules = dict(network.named_modules())
    for head in [name for name, module in modules.items() if isinstance(module, RetrainedHead)]:
        # Its layers are no features: neither its two linear ones a block, nor its BatchNorm.
        modules = {n: m for n, m in modules.items() if not f"{n}.".startswith(f"{head}.")}
        calls = [call for call in calls if call[0] in modules]
    blocks = _blocks(modules) or _plain_layers(calls)
    stages = _stages(modules, blocks, calls)
    seen: dict[str, int] = {}
    taps: list[Tap] = []
    try:
        pattern = None if layers is None else re.compile(layers)
    except re.error as error:
        raise CheckpointError(f"--layers '{layers}' is no regular expression: {error}") from error
    for name, module, output, _ in calls:
        if isinstance(module, _BatchNorm):
            kind = "batchnorm" if module.running_mean is not None else None
        elif pattern is not None:
            kind = "other" if pattern.search(name) and output.ndim >= 2 else None
        else:
            kind = "stage" if name in stages else "block" if name in blocks else None
        if kind is None:
            continue
        seen[name] = seen.get(name, 0) + 1
        dim = _channel_dim(output.shape, height / width)
        taps.append(
            Tap(
                name=name if seen[name] == 1 else f"{name}@{seen[name]}",
                module=name,
                kind=kind,
                channels=output.shape[dim],
                channel_dim=dim,
                spatial_size=output[0].numel() // output.shape[dim],
            )
        )
    if pattern is not None and not any(tap.kind == "other" for tap in taps):
        raise CheckpointError(
            f"--layers '{layers}' matches no module of the network: 'oodcli inspect --json' "
            "lists the names"
        )
    return tuple(taps)


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


def _plain_layers(calls: Calls) -> set[str]:
    """For a network without blocks (VGG, AlexNet): its activations over feature maps, or its
    convolutions where activations are functions."""
    maps = [(name, module) for name, module, output, _ in calls if output.ndim == 4]
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


def _stages(modules: dict[str, nn.Module], blocks: set[str], calls: Calls) -> set[str]:
    """The last block before each change of resolution, and the last of all. Where that block ends
    a plain sequence, the sequence's name is taken (layer1, not layer1.2)."""
    outputs = [(name, output) for name, _, output, _ in calls if name in blocks]
    found: set[str] = set()
    for index, (name, output) in enumerate(outputs):
        following = outputs[index + 1][1] if index + 1 < len(outputs) else None
        if following is not None and output.shape[2:] == following.shape[2:]:
            continue
        parent = name.rpartition(".")[0]
        last = isinstance(modules.get(parent), nn.Sequential) and name == f"{parent}." + str(
            list(dict(modules[parent].named_children()))[-1]
        )
        found.add(parent if parent and last else name)
    return found
