"""A network with its weights: named by the user or a configuration, and filled."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from oodcli.errors import CheckpointError
from oodcli.networks import architectures, heads
from oodcli.networks.architectures import Inputs
from oodcli.networks.card import Overrides
from oodcli.networks.makers import Maker, maker_of
from oodcli.networks.replaced_heads import fit_head
from oodcli.networks.state_dict import Layouts, some_of


@dataclass(frozen=True)
class Network:
    """A network with its weights, and what is known of it. inputs: None where nothing is. averaged:
    as of a Classifier. class_names: those beside the weights; names_source says where. multi_label:
    whether a configuration says that an image has several labels."""

    module: nn.Module
    arch: str
    inputs: Inputs
    assumptions: tuple[str, ...] = ()
    averaged: bool = False
    class_names: tuple[str, ...] | None = None
    names_source: str = ""
    multi_label: bool = False


def named(
    arch: str,
    layouts: Layouts,
    given: Overrides,
    path: Path,
    *,
    stand_in: Tensor | None = None,
    maker: Maker | None = None,
) -> Network:
    """The network that ``--arch`` names, with the weights of the layout that fits it best.
    stand_in: weight of a linear layer in a retrained head's place. maker: of that network."""
    maker = maker or maker_of(arch)
    probe = maker.skeleton(architectures.PROBED)
    if stand_in is not None:
        layouts = standing_in(layouts, heads.last_linear(probe, arch), stand_in)
    options = [(architectures.rename(arch, state), dropped) for state, dropped in layouts]
    state, dropped = min(
        options, key=lambda option: len(architectures.compare(probe.state_dict(), option[0]))
    )
    expected = probe.state_dict()
    notes: tuple[str, ...] = ()
    if expected.keys() ^ {*state, *(k for k in expected if k.endswith("num_batches_tracked"))}:
        fits = ((fit_head(expected, each), left_out) for each, left_out in options)
        fitted, left_out = next((fit for fit in fits if fit[0]), (None, ()))
        if fitted:
            (state, notes), dropped = fitted, left_out
    classes = architectures.head_classes(expected, state) or given.num_classes
    if classes is not None:
        require_classes(given.num_classes, classes, path)
    network = maker.build(classes)
    differing = architectures.compare(network.state_dict(), state)
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(
            f"{path} does not fit {arch}: {'; '.join(differing[:3])}{more}; give another --arch, "
            "or leave it out to have it recognised"
        )
    fill(network, state)
    notes = (*transform_notes(arch, classes or 0), *notes)
    if dropped:
        notes += (f"{some_of(dropped)} not part of {arch} and ignored",)
    return Network(network, arch, maker.inputs(network), notes)


def standing_in(layouts: Layouts, name: str, weight: Tensor) -> Layouts:
    """Layouts with a plain linear layer where a retrained head was taken out."""
    linear = {f"{name}.weight": weight, f"{name}.bias": weight.new_zeros(len(weight))}
    return [(state | linear, dropped) for state, dropped in layouts]


def require_classes(given: int | None, found: int, path: Path) -> None:
    if given is not None and given != found and (given, found) != (2, 1):
        raise CheckpointError(
            f"{path} has {found} classes, but {given} were given: correct --num-classes or "
            "num_classes in the model card"
        )


def transform_notes(name: str, num_classes: int) -> list[str]:
    base = name.removeprefix("torchvision:").split("+")[0]
    if base not in ("googlenet", "inception_v3") or "transform-input" in name or "+grey" in name:
        return []
    on = num_classes == 1000
    return [
        f"transform_input is {'on, as for' if on else 'off, unlike for'} torchvision's own weights "
        f"(override: --arch {name}+{'no-' * on}transform-input)"
    ]


def fill(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights whose names and shapes have been compared. A network on the meta device takes
    the tensors themselves. Raises CheckpointError when they are of a type it cannot hold."""
    meta = any(tensor.is_meta for tensor in network.state_dict().values())
    current = OrderedDict(state)
    # The names and shapes are today's, so the layout is: MNASNet asks, and refuses if nobody says.
    # A BatchNorm that is not told makes up its counter where an old checkpoint has none.
    versions = {
        name: {"version": module._version}
        for name, module in network.named_modules()
        if not isinstance(module, _BatchNorm)
    }
    current._metadata = versions  # type: ignore[attr-defined]
    try:
        network.load_state_dict(current, strict=False, assign=meta)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the weights cannot be loaded: {reason}") from error
    network.float()
