"""Which part of a network's outputs are its logits, and networks that change their input.

Detectors work on logits. Many networks return something else: probabilities, log-probabilities,
``(features, logits)``, a dictionary. One trial image tells, and hooks on the network make it return
its logits from then on: in recording, in ODIN's second pass and in inversion alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.errors import CheckpointError

Key = str | int | None
"""Where an output is in what a network returns; None where it returns a tensor."""

CLOSE = 1e-3
"""How far a sum of probabilities may be from 1."""

EQUAL = 1e-4
"""How far log-probabilities, or outputs of a sigmoid, may be from those of the logits."""

SMALLEST = -60.0
"""Log-probability below which float32 probabilities are not compared."""

SMALL = 1 << 16
"""Numbers in an output that is copied, so that what is done to it in place does not show."""


@dataclass(frozen=True)
class Call:
    """One call of a module in the trial pass. shape: of its output. output, given: copies of the
    output and of the first argument; None where they are large. mean: that of each channel of a map
    (1, C, H, W), (C,); None for other outputs."""

    name: str
    module: nn.Module
    shape: torch.Size
    output: Tensor | None
    given: Tensor | None
    mean: Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """Where a network's logits are. key: of the output. module: the module whose last output they
    are; None where the network returns them. level: whether their level is known, or only their
    differences, as with log-probabilities. note: what was assumed; empty where nothing was."""

    key: Key = None
    module: str | None = None
    level: bool = True
    note: str = ""


def copied(tensor: Tensor | None) -> Tensor | None:
    """A copy of a small tensor, None of a large one."""
    return tensor.detach().clone() if tensor is not None and tensor.numel() <= SMALL else None


def first_tensor(output: Any) -> Tensor | None:
    """What a module computed: the tensor that it returned, or the first in a tuple."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None


def with_first(output: Any, tensor: Tensor | None) -> Any:
    """A module's output with another first tensor; None where that is None."""
    if tensor is None or not isinstance(output, tuple):
        return tensor
    return (tensor, *output[1:])


def outputs_of(returned: Any) -> dict[Key, Tensor]:
    """The tensors in what a network returned: a tensor, a tuple, a dictionary, or an object with
    fields, such as a Hugging Face ``ModelOutput``."""
    if isinstance(returned, Tensor):
        return {None: returned}
    if isinstance(returned, Mapping):
        found: dict[Key, Any] = dict(returned)
    elif isinstance(returned, tuple | list):
        found = dict(enumerate(returned))
    else:
        found = dict(getattr(returned, "__dict__", {}))
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def as_logits(returned: Any) -> Tensor:
    """What a network returned, which must be logits (N, K). Raises CheckpointError."""
    if not isinstance(returned, Tensor) or returned.ndim != 2:
        raise CheckpointError(
            f"the network returned {_shapes(returned)} where logits of shape (N, classes) were "
            "expected: oodcli works on image classifiers"
        )
    return returned


def find_logits(
    network: nn.Module,
    image: Tensor,
    returned: Any,
    calls: Sequence[Call],
    *,
    classes: int | None = None,
) -> tuple[Reading, Tensor]:
    """Where the logits are, and those of the trial image, (1, K).

    network: the one that returned this of ``image``, (1, C, H, W), by these calls. classes: how
    many there are, where that is known. Raises CheckpointError when no output can be the logits,
    when several can, or when probabilities are returned whose logits cannot be read.
    """
    outputs = {
        key: output
        for key, output in outputs_of(returned).items()
        if output.ndim == 2 and len(output) == 1 and output.is_floating_point()
    }
    if not outputs:
        as_logits(returned)  # raises the sentence, but for integers
        raise CheckpointError(
            f"the network returned {_shapes(returned)} without fractions where logits were "
            "expected: return the logits, not classes"
        )
    key, note = _choose(network, image, outputs, calls, classes)
    logits = outputs[key].float()
    if bool((logits == 1).all()):
        raise CheckpointError(
            "the network returns 1 for every class of a single image, as a softmax over the images "
            "of a batch does: return the logits"
        )
    if _linear(logits, calls) is not None:
        return Reading(key, note=note), logits
    activation = _activation(network, image, key, logits)
    if activation is None:
        return Reading(key, note=note), logits
    for other, output in outputs.items():
        if activation.undone_by(output.float(), logits):
            return Reading(
                other,
                note=f"the network's output {_named(other)} is used as its logits: {_named(key)} "
                f"is its {activation.name}",
            ), output.float()
    module, before = _module_before(activation, logits, calls)
    if module is not None:
        several = activation is SIGMOID and logits.shape[1] > 2
        return Reading(
            None,
            module,
            note=f"the network returns {activation.words}: the output of {module}, before its "
            f"{activation.name}, is used as the logits"
            + "; if an image can have several labels, give --multi-label"
            * several,
        ), before
    if activation is LOG_SOFTMAX:
        return Reading(
            key,
            level=False,
            note=f"the network returns {activation.words}, which are used as logits up to a "
            "constant: detectors that need their level (energy, mls, peak-energy) are left out; "
            "return logits to use them",
        ), logits
    if activation is SIGMOID and not _ends_in(network, image, key, "Sigmoid"):
        return Reading(
            key,
            note="all outputs of the trial images lie between 0 and 1 and are used as logits; if "
            "they are probabilities, return the logits instead",
        ), logits
    raise CheckpointError(
        f"the network returns {activation.words}, and its logits cannot be recovered: return the "
        f"logits from before the {activation.name}"
    )


# --- activations at the end -------------------------------------------------------------------


@dataclass(frozen=True)
class Activation:
    """What may be done to logits at the end of a network. words: for its outputs. shows: whether
    outputs (N, K) look as if it was done. gap: the largest difference between outputs and those
    that logits would give."""

    name: str
    words: str
    shows: Callable[[Tensor], bool]
    gap: Callable[[Tensor, Tensor], Tensor]

    def undone_by(self, before: Tensor, after: Tensor) -> bool:
        """Whether ``after`` is this of ``before``, which are logits and not normalised already.
        Both: (1, K)."""
        if before.shape != after.shape:
            return False
        # The logits of a sigmoid may look so by chance: a single one is 0 or 1, two are 0 and 1.
        if self is not SIGMOID and (SOFTMAX.shows(before) or LOG_SOFTMAX.shows(before)):
            return False
        return bool(self.gap(before.double(), after.double()).abs().max() <= EQUAL)


def _sum_to_one(outputs: Tensor) -> bool:
    sums = outputs.sum(1)
    return bool((outputs >= 0).all() and ((sums - 1).abs() <= CLOSE).all())


SOFTMAX = Activation(
    "softmax",
    "probabilities",
    _sum_to_one,
    lambda z, p: z.log_softmax(1).clamp_min(SMALLEST) - p.log().clamp_min(SMALLEST),
)
LOG_SOFTMAX = Activation(
    "log_softmax",
    "log-probabilities",
    lambda outputs: bool((outputs <= CLOSE).all()) and _sum_to_one(outputs.exp()),
    lambda z, log_p: z.log_softmax(1) - log_p,
)
SIGMOID = Activation(
    "sigmoid",
    "sigmoid outputs",
    lambda outputs: bool(((outputs >= 0) & (outputs <= 1)).all()),
    lambda z, p: torch.sigmoid(z) - p,
)
ACTIVATIONS = (SOFTMAX, LOG_SOFTMAX, SIGMOID)


def _activation(network: nn.Module, image: Tensor, key: Key, output: Tensor) -> Activation | None:
    """The activation that outputs seem to come from, on this and on other images; None for none."""
    seen = [each for each in ACTIVATIONS if each.shows(output)]
    if not seen:
        return None
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([0.0, 0.3, 1.0, 3.0, 10.0]).view(-1, 1, 1, 1)
    images = scales * torch.randn((5, *image.shape[1:]), generator=generator)
    with torch.no_grad():
        # One at a time: a softmax over the batch is none.
        further = [outputs_of(network(each[None].to(image.device)))[key] for each in images]
    whole = torch.cat([output, *(each.float().reshape(output.shape) for each in further)])
    return next((each for each in seen if each.shows(whole)), None)


def _module_before(
    activation: Activation, output: Tensor, calls: Sequence[Call]
) -> tuple[str | None, Tensor]:
    """The last module whose output is the logits of which ``output`` is the activation."""
    later: set[str] = set()
    for call in reversed(calls):
        if call.name not in later and call.output is not None:
            before = call.output.float().reshape(1, -1)
            if activation.undone_by(before, output):
                return call.name, before
        later.add(call.name)
    return None, output


def _ends_in(network: nn.Module, image: Tensor, key: Key, name: str) -> bool:
    """Whether the last operation that made an output is of this name; False where no graph is."""
    output = _with_graph(network, image).get(key)
    return output is not None and name in type(output.grad_fn).__name__


def _with_graph(network: nn.Module, image: Tensor) -> dict[Key, Tensor]:
    """The outputs of an image with the graph that made them; none where there can be none."""
    try:
        with torch.enable_grad():
            given = image.detach().clone().requires_grad_().clone()  # may be changed in place
            return outputs_of(network(given))
    except RuntimeError:
        return {}


# --- which of several outputs -----------------------------------------------------------------


def _choose(
    network: nn.Module,
    image: Tensor,
    outputs: Mapping[Key, Tensor],
    calls: Sequence[Call],
    classes: int | None,
) -> tuple[Key, str]:
    """The output that is the logits, and a note where that had to be decided."""
    keys = list(outputs)
    if len(keys) == 1:
        return keys[0], ""
    if "logits" in keys:
        return "logits", ""
    fitting = [key for key in keys if classes in (None, outputs[key].shape[1])]
    keys = fitting or keys
    features = _upstream(network, image, keys) | _inputs_of_linear(outputs, calls)
    keys = [key for key in keys if key not in features]
    activated = {
        key
        for key in keys
        for other in keys
        for activation in ACTIVATIONS
        if activation.undone_by(outputs[other].float(), outputs[key].float())
    }
    keys = [key for key in keys if key not in activated]
    linear = [key for key in keys if _linear(outputs[key].float(), calls) is not None]
    keys = linear or keys
    if len({outputs[key].shape[1] for key in keys}) > 1:
        listed = " and ".join(f"{_named(key)} {_size(outputs[key])}" for key in keys)
        raise CheckpointError(
            f"the network returns several outputs, and {listed} could each be its logits: give "
            "--num-classes, or return the logits alone"
        )
    others = ", ".join(_named(key) for key in outputs if key != keys[0])
    return keys[0], (
        f"the network's output {_named(keys[0])}, {outputs[keys[0]].shape[1]} wide, is used as "
        f"its logits, not {others}"
    )


def _upstream(network: nn.Module, image: Tensor, keys: Sequence[Key]) -> set[Key]:
    """Outputs that others are computed from, as features are that are returned beside the logits;
    but not logits that are returned beside their own probabilities."""
    outputs = _with_graph(network, image)
    found: set[Key] = set()
    for key in keys:
        for other in keys:
            if other == key or key not in outputs or other not in outputs:
                continue
            before, after = outputs[key], outputs[other]
            if before.grad_fn is None or after.grad_fn is None:
                continue
            plain = (before.detach().float(), after.detach().float())
            if any(each.undone_by(*plain) for each in ACTIVATIONS):
                continue
            if _depends(after, before):
                found.add(key)
    return found


def _inputs_of_linear(outputs: Mapping[Key, Tensor], calls: Sequence[Call]) -> set[Key]:
    """Outputs from which a linear layer made another output; without a graph, which a network may
    leave out for its frozen layers."""
    found: set[Key] = set()
    for key, before in outputs.items():
        for other, after in outputs.items():
            call = None if other == key else _linear(after.float(), calls)
            if call is not None and call.given is not None and call.given.shape == before.shape:
                found |= {key} if torch.equal(call.given, before) else set()
    return found


def _depends(after: Tensor, before: Tensor) -> bool:
    try:
        (gradient,) = torch.autograd.grad(
            after, before, torch.ones_like(after), retain_graph=True, allow_unused=True
        )
    except RuntimeError:  # an operation without a derivative
        return False
    return gradient is not None


def _linear(output: Tensor, calls: Sequence[Call]) -> Call | None:
    """The last call of a linear layer that gave this output, (1, K), if one did."""
    for call in reversed(calls):
        if isinstance(call.module, nn.Linear) and call.output is not None:
            given = call.output.float().reshape(1, -1)
            if given.shape == output.shape and torch.equal(given, output):
                return call
    return None


def _named(key: Key) -> str:
    return f"'{key}'" if isinstance(key, str) else f"{key}"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _shapes(returned: Any) -> str:
    if isinstance(returned, Tensor):
        return str(tuple(returned.shape))
    found = outputs_of(returned)
    listed = ", ".join(f"{_named(key)} {tuple(each.shape)}" for key, each in found.items())
    return f"{type(returned).__name__} ({listed})" if listed else type(returned).__name__


# --- hooks ------------------------------------------------------------------------------------


def returning_logits(network: nn.Module, reading: Reading) -> None:
    """From now on the network returns its logits alone."""
    if reading.module is not None:
        kept = _Kept()
        network.get_submodule(reading.module).register_forward_hook(kept.keep)
        network.register_forward_hook(kept.give)
    elif reading.key is not None:
        network.register_forward_hook(_Picked(reading.key))


def sparing_input(network: nn.Module) -> None:
    """From now on the network works on a copy of its input, which it changes in place."""
    network.register_forward_pre_hook(copy_input)


def copy_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A pre-hook: the module gets a copy of its first argument."""
    return (args[0].clone(), *args[1:])


@dataclass(frozen=True)
class _Picked:
    key: str | int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], returned: Any) -> Tensor:
        return outputs_of(returned)[self.key]


class _Kept:
    """The last output of a module, which the network returns in place of its own."""

    output: Tensor

    def keep(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.output = output.clone()  # a softmax in place would change it

    def give(self, module: nn.Module, args: tuple[Any, ...], returned: Any) -> Tensor:
        return self.output.flatten(1)


def matches_weights(call: Call) -> bool:
    """Whether a linear layer's output is its weights times its input and no more: a subclass may
    normalise both, as cosine classifiers do."""
    linear = call.module
    if call.given is None or call.output is None or not isinstance(linear, nn.Linear):
        return False
    expected = F.linear(call.given, linear.weight, linear.bias)
    scale = expected.abs().max().clamp_min(1e-6)
    return bool((call.output - expected).abs().max() <= CLOSE * scale)
