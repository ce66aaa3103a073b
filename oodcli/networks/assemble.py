"""A network → a Classifier, by one image that runs through it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from oodcli.errors import CheckpointError, OodcliError, first_line
from oodcli.features import LinearHead
from oodcli.networks.classifier import Classifier, Tap
from oodcli.networks.conv_head import find_conv_head
from oodcli.networks.frozen_norms import thaw
from oodcli.networks.heads import RetrainedHead
from oodcli.networks.joint_head import NAME, find_joint_head
from oodcli.networks.outputs import (
    Call,
    Reading,
    as_logits,
    copied,
    find_logits,
    first_tensor,
    matches_weights,
    returning_logits,
    sparing_input,
)
from oodcli.networks.preprocessing import Preprocessing
from oodcli.networks.thinned import drops
from oodcli.out_of_memory import ran_out, too_short


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
    thaw(network)
    height, width = preprocessing.input_size
    parameter = next(network.parameters(), None)
    image = torch.randn(
        (1, preprocessing.channels, height, width), generator=torch.Generator().manual_seed(0)
    )
    image = image if parameter is None else image.to(parameter.device)
    classes = num_classes or (None if class_names is None else len(class_names))
    with _one_sentence(
        image,
        f"{arch} does not run on {preprocessing.channels}x{height}x{width} images (%s): give "
        "--input-size and --mean (one number for grey, three for RGB)",
    ):
        calls, returned = _trial(network, image)
        reading, logits = _read(network, image, returned, calls, classes)
    found = logits.shape[1]
    if found == 1 and _two_logits(network, calls, logits):
        note = (
            "one logit z, of a network for two classes, becomes the logits 0 and z: its sigmoid is "
            "the probability of class 1"
        )
        return assemble(
            network,
            arch=arch,
            preprocessing=preprocessing,
            class_names=class_names,
            sha256=sha256,
            assumptions=(*assumptions, note),
            layers=layers,
            num_classes=num_classes,
        )
    returning_logits(network, reading)
    if found < 2:
        raise CheckpointError(
            f"{arch} has {found} output, and not of a linear layer: detectors need at least two "
            "classes; return torch.cat([torch.zeros_like(z), z], 1) for the logit z of two classes"
        )
    if class_names is not None and len(class_names) != found:
        raise CheckpointError(
            f"{len(class_names)} class names were given but the network has {found} classes: "
            "correct --class-names or class_names in the model card"
        )
    notes = [reading.note, _by_batch(calls)]
    head_name, head = _find_head(calls, logits)
    joint = None if head_name is not None else find_joint_head(calls, logits)
    if joint is not None:
        joint.join(network)
        head_name, head = NAME, joint.linear()
        notes.append("the logits are the mean of two heads; the embedding is the input of both")
    elif head_name is None:
        with torch.no_grad():
            head_name, head = find_conv_head(network, image, calls, logits)
    final = {
        call.name
        for call in calls
        if f"{head_name}.".startswith(f"{call.name}.")
        or (call.output is not None and torch.equal(call.output, logits))
    }
    taps = _find_taps(network, calls, layers, preprocessing.input_size, final)
    with _one_sentence(
        image,
        f"{arch} runs on one image, but not on a batch of two (%s): give an --arch whose code "
        "takes batches of any size",
    ):
        taps = _image_by_image(network, image, calls, taps)
    classifier = Classifier(
        network=network,
        arch=arch,
        num_classes=found,
        class_names=tuple(class_names or (str(index) for index in range(found))),
        preprocessing=preprocessing,
        sha256=sha256,
        assumptions=(*assumptions, *filter(None, notes)),
        taps=taps,
        head_name=head_name,
        head=head,
        logits_level=reading.level,
        named=class_names is not None,
    )
    dropped = [call for call in calls if drops(call.module)]
    return replace(
        classifier,
        pooled=_is_pooled(classifier, calls),
        dropouts=tuple(dict.fromkeys(call.name for call in dropped)),
        drops_embedding=len(dropped) == 1 and _is_before_head(dropped[0], classifier, calls),
    )


FAILURES = (
    *(RuntimeError, MemoryError, ValueError, AssertionError, TypeError),
    *(LookupError, AttributeError, ArithmeticError),
)
"""Exceptions of a network that cannot run on an image."""


@contextmanager
def _one_sentence(image: Tensor, sentence: str) -> Iterator[None]:
    """Runs a network without gradients. Raises CheckpointError with the sentence, whose ``%s`` is
    the reason, where the network fails, OodcliError where the memory is too short."""
    try:
        with torch.no_grad():
            yield
    except FAILURES as error:
        if ran_out(error):
            height, width = image.shape[2:]
            raise OodcliError(too_short(image.device, (height, width))) from error
        raise CheckpointError(sentence.replace("%s", first_line(error))) from error


def _trial(network: nn.Module, image: Tensor) -> tuple[list[Call], Any]:
    """The calls of modules that return a tensor, in their order, and what the network returned. If
    it changes its input, it works on a copy from now on."""
    calls: list[Call] = []
    handles = []

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = first_tensor(output)
            if first is not None:
                given = args[0] if args and isinstance(args[0], Tensor) else None
                mean = first.detach().mean((0, 2, 3)) if first.ndim == 4 else None
                calls.append(Call(name, module, first.shape, copied(first), copied(given), mean))

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
        f"BatchNorm layer {next(iter(found))}{more} has no running statistics, so an image's "
        "scores depend on the rest of its batch: --batch-size 1 scores each image alone"
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


def _is_pooled(classifier: Classifier, calls: Sequence[Call]) -> bool:
    """Whether the head's input is the mean of the last map over its positions."""
    tap = classifier.last_map
    if tap is None or classifier.head_name is None or tap.channel_dim != 1:
        return False
    means = [call.mean for call in calls if call.name == tap.module]
    given = [call.given for call in calls if call.name == classifier.head_name]
    if not means or not given or means[-1] is None or given[-1] is None:
        return False
    mean, embedding = means[-1].float(), given[-1].float().flatten()
    if mean.shape != embedding.shape:
        return False
    return bool((mean - embedding).abs().max() <= 1e-4 * embedding.abs().max())


def _is_before_head(call: Call, classifier: Classifier, calls: Sequence[Call]) -> bool:
    """Whether the output of a call is the input of the linear head, with no module between."""
    inner = [each for each in calls if not list(each.module.children())]
    numbers = [number for number, each in enumerate(inner) if each is call]
    head = None if not numbers else dict(enumerate(inner)).get(numbers[0] + 1)
    if head is None or head.name != classifier.head_name or not isinstance(head.module, nn.Linear):
        return False
    if head.given is None or call.output is None or classifier.head is None:
        return False
    return torch.equal(head.given.flatten(), call.output.flatten())


def _two_logits(network: nn.Module, calls: Sequence[Call], logits: Tensor) -> bool:
    """Give a linear head of one row w a row of zeros before it; softmax(0, z) is sigmoid(z).
    False where the head is not linear."""
    name, head = _find_head(calls, logits)
    if name is None or head is None:
        return False
    old = network.get_submodule(name)
    assert isinstance(old, nn.Linear)
    two = nn.Linear(old.in_features, 2, device=old.weight.device, dtype=old.weight.dtype)
    for parameter, row in ((two.weight, head.weight), (two.bias, head.bias)):
        parameter.detach().copy_(torch.cat([torch.zeros_like(row), row]))
    network.set_submodule(name, two.requires_grad_(False))
    return True


def _find_taps(
    network: nn.Module,
    calls: Sequence[Call],
    layers: str | None,
    input_size: tuple[int, int],
    final: set[str],
) -> tuple[Tap, ...]:
    """final: modules that return logits or hold the head, and so are no blocks."""
    height, width = input_size
    modules = dict(network.named_modules())
    for head in [name for name, module in modules.items() if isinstance(module, RetrainedHead)]:
        # Its layers are no features: neither its two linear ones a block, nor its BatchNorm.
        modules = {n: m for n, m in modules.items() if not f"{n}.".startswith(f"{head}.")}
        calls = [call for call in calls if call.name in modules]
    blocks = _blocks(modules, {call.name for call in calls} - final)
    if all(call.shape[2:].numel() == 1 for call in calls if call.name in blocks):
        blocks = _plain_layers(calls) or blocks
    stages = _stages(modules, blocks, calls)
    seen: dict[str, int] = {}
    taps: list[Tap] = []
    try:
        pattern = None if layers is None else re.compile(layers)
    except re.error as error:
        raise CheckpointError(
            f"--layers '{layers}' is not a regular expression: {error}"
        ) from error
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

    def copy_of(output: Any) -> Tensor:
        first = first_tensor(output)
        assert first is not None  # it is a tap
        return first.detach().clone()

    def outputs(images: Tensor) -> list[tuple[str, Tensor]]:
        found: list[tuple[str, Tensor]] = []
        handles = [
            network.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name: found.append((name, copy_of(output)))
            )
            for name in doubtful
        ]
        try:
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


def _blocks(modules: dict[str, nn.Module], called: set[str]) -> set[str]:
    """The outermost modules that are not mere containers and hold at least two weighted layers:
    residual blocks, dense blocks, inverted residuals, inception modules, transformer layers.
    called: those that return a tensor."""
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
        if not plain and name in called and weighted >= 2 and not _is_trunk(module):
            found.add(name)
    return found


def _plain_layers(calls: Sequence[Call]) -> set[str]:
    """For a network without blocks (VGG, AlexNet): its activations over feature maps, or its
    convolutions where activations are functions."""
    maps = [(call.name, call.module) for call in calls if len(call.shape) == 4]
    convolutions = {name for name, module in maps if isinstance(module, nn.Conv2d)}
    kinds = (
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.PReLU,
        nn.ELU,
        nn.GELU,
        nn.SiLU,
        nn.Hardswish,
        nn.Tanh,
    )
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
    a plain sequence, the sequence's name is taken (layer1, not layer1.2); where a module around the
    stage's blocks alone changes the number of channels after them, that module's."""
    places = [(place, call) for place, call in enumerate(calls) if call.name in blocks]
    called = {call.name for call in calls}
    found: set[str] = set()
    own: set[str] = set()  # blocks of this stage
    for index, (place, call) in enumerate(places):
        end, following = places[index + 1] if index + 1 < len(places) else (len(calls), None)
        name, shape = call.name, call.shape
        own.add(name)
        if following is not None and shape[2:] == following.shape[2:]:
            continue
        around = [
            each.name
            for each in calls[place:end]
            if name.startswith(f"{each.name}.")
            and len(shape) == len(each.shape) == 4
            and shape[2:] == each.shape[2:]
            and shape[1] != each.shape[1]
            and all(block in own for block in blocks if block.startswith(f"{each.name}."))
        ]
        own = set()
        parent = name.rpartition(".")[0]
        last = isinstance(modules.get(parent), nn.Sequential) and name == f"{parent}." + str(
            list(dict(modules[parent].named_children()))[-1]
        )
        found.add(around[-1] if around else parent if parent in called and last else name)
    return found
