"""A state dict → the network that it belongs to: recognised, or named by the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from oodcli.errors import CheckpointError
from oodcli.networks import architectures, heads
from oodcli.networks.card import Overrides
from oodcli.networks.network import (
    Network,
    fill,
    named,
    require_classes,
    standing_in,
    transform_notes,
)
from oodcli.networks.replaced_heads import fit_head
from oodcli.networks.state_dict import Found, Layouts, layouts_of, some_of, untrusted
from oodcli.networks.timm_models import likely

SLICES = "group_slices"
"""Where MOS's training script says which outputs belong to which group."""

HEAD_NAMES = ("fc", "linear", "classifier", "head", "heads.head")
"""What the last linear layer is called where nothing but the backbone was saved under its names."""


def network_of(
    state: dict[str, Tensor], given: Overrides, path: Path, slices: Any = None
) -> Network:
    """The network that the user named, or that the state dict is recognised as, with its weights;
    with a retrained head where there is one. slices: MOS's, if kept beside the state dict."""
    arch, head = heads.split(given.arch)
    given = replace(given, arch=arch)
    if not head and ".py:" in (arch or ""):  # the user's code makes the head that it wants
        return _plain(state, given, path)
    backbone, deconf = heads.take_deconf(state)
    if head.startswith("deconf") or (deconf and not head):
        return _deconf(backbone, deconf, head, given, path)
    key = next((key for key in state if key.rpartition(".")[2] == SLICES), None)
    if key is not None:
        slices = state.pop(key)
    if head or isinstance(slices, Tensor):
        return _mos(state, slices, head, given, path)
    return _plain(state, given, path)


def require_named(weights: Found, given: Overrides, path: Path) -> None:
    """Raises CheckpointError for a pickled module without ``--arch``: its class says what it
    computes, and that class is code."""
    if given.arch is not None:
        return
    known = filter(None, map(architectures.recognise, (s for s, _ in layouts_of(weights.state))))
    like = next((f"{each.name}, whose names and shapes it has" for each in known), "")
    raise untrusted(
        path,
        weights.pickled,
        f"read its weights, and run nothing, with --arch {like or 'FILE.py:FACTORY'}; or ",
    )


def _plain(state: dict[str, Tensor], given: Overrides, path: Path) -> Network:
    layouts = layouts_of(state)
    if given.arch is not None:
        return named(given.arch, layouts, given, path)
    found = _recognised(layouts, given, path)
    if found is None:
        name, differing = architectures.nearest(layouts[-1][0])
        found = _with_another_head(name, layouts, given, path)
        if found is None:
            raise _unrecognised(layouts, path, name, differing)
    return found


def _with_another_head(name: str, layouts: Layouts, given: Overrides, path: Path) -> Network | None:
    """The network of that name whose head was replaced, or has others beside it."""
    if not name:
        return None
    expected = architectures.skeleton(name, 1000).state_dict()
    for layout, dropped in layouts:
        fitted = fit_head(expected, architectures.rename(name, layout))
        found = fitted and _recognised([(fitted.state, dropped)], given, path)
        if fitted and found:
            return replace(found, assumptions=(*found.assumptions, *fitted.notes))
    return None


def _deconf(
    backbone: dict[str, Tensor],
    tensors: dict[str, Tensor],
    head: str,
    given: Overrides,
    path: Path,
) -> Network:
    """The network with a DeConf head: recognised with a linear layer of the same shape in its
    place. head: as the user wrote it, or empty."""
    form = heads.form_of(head) if head else "inner" if "h.h.bias" in tensors else "cosine"
    if not tensors:
        raise CheckpointError(
            f"{path} has no DeConf head (h.h.weight, g.0.weight …): leave +{head} out of --arch"
        )
    weight = tensors["h.h.weight"]
    layouts = layouts_of(backbone)
    if given.arch is not None:
        found = named(given.arch, layouts, given, path, stand_in=weight)
    else:
        made = (standing_in(layouts, name, weight) for name in HEAD_NAMES)
        known = next(filter(None, (_recognised(each, given, path) for each in made)), None)
        if known is None:
            standing = standing_in(layouts, HEAD_NAMES[0], weight)
            raise _unrecognised(standing, path, *architectures.nearest(standing[-1][0]))
        found = known
    retrained = heads.DeconfHead(form, weight.shape[1], weight.shape[0])
    differing = architectures.compare(retrained.state_dict(), tensors)
    if differing:
        raise CheckpointError(
            f"{path}: its DeConf head does not fit +deconf-{form}: {'; '.join(differing[:3])}"
        )
    fill(retrained, tensors)
    found.module.set_submodule(heads.last_linear(found.module, found.arch), retrained)
    note = (
        f"a DeConf head with a bias: +deconf-{form}"
        if form == "inner"
        else f"a DeConf head without a bias is read as +deconf-{form} (override: "
        f"--arch {found.arch}+deconf-euclid)"
    )
    return _with_head(found, retrained, "" if head else note)


def _mos(state: dict[str, Tensor], slices: Any, head: str, given: Overrides, path: Path) -> Network:
    """The network whose last layer has one output more for each of MOS's groups. slices: where the
    groups begin and end; head: as the user wrote it, or empty."""
    sizes = heads.sizes_of(head) if head else heads.sizes_from(slices)
    require_classes(given.num_classes, sum(sizes), path)
    found = _plain(state, replace(given, num_classes=None), path)
    name = heads.last_linear(found.module, found.arch)
    linear = found.module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    if linear.out_features != sum(sizes) + len(sizes):
        raise CheckpointError(
            f"{path}: its last layer has {linear.out_features} outputs, but {len(sizes)} groups of "
            f"{', '.join(map(str, sizes))} classes, each with one for others, have "
            f"{sum(sizes) + len(sizes)}: correct the groups with --arch {found.arch}+mos:SIZES"
        )
    retrained = heads.GroupHead(linear, sizes)
    found.module.set_submodule(name, retrained)
    note = (
        f"a MOS head +{retrained.suffix}, from {SLICES}: classes are numbered group by group "
        f"(override: --arch {found.arch}+mos:SIZES)"
    )
    return _with_head(found, retrained, "" if head else note)


def _with_head(found: Network, head: heads.RetrainedHead, note: str) -> Network:
    notes = (*found.assumptions, note) if note else found.assumptions
    return replace(found, arch=f"{found.arch}+{head.suffix}", assumptions=notes)


def _recognised(layouts: Layouts, given: Overrides, path: Path) -> Network | None:
    for layout, dropped in reversed(layouts):
        known = architectures.recognise(layout)
        if known is None:
            continue
        require_classes(given.num_classes, known.num_classes, path)
        _require_clear(known.name, known.num_classes, path)
        network = known.network
        fill(network, known.state_dict)
        notes = [
            f"architecture {known.name} recognised from {len(layout)} tensors (override: --arch)",
            *_stem_notes(known.name, known.num_classes),
        ]
        if dropped:
            notes.append(f"{some_of(dropped)} not part of it and ignored")
        return Network(network, known.name, architectures.inputs(known.name, network), tuple(notes))
    return None


def _require_clear(name: str, num_classes: int, path: Path) -> None:
    """Raises CheckpointError for CIFAR's number of classes where two networks have the same names
    and shapes."""
    base, plus, options = name.partition("+")
    small = architectures.AMBIGUOUS.get(base)
    if small is not None and num_classes in (10, 100):
        raise CheckpointError(
            f"{path}: two architectures have these names and shapes: give --arch {name} if it was "
            f"trained on 224x224 images, or --arch {small}{plus}{options} if on 32x32 images"
        )


def _unrecognised(
    layouts: Layouts, path: Path, name: str, differing: Sequence[str]
) -> CheckpointError:
    """name: of the nearest known architecture, or empty. differing: from it."""
    first, layout = layouts[0][0], layouts[-1][0]
    if not name or len(differing) > 3:
        names, others = likely(layout, path.name)
        if names and not others:
            more = f" or {', '.join(names[1:5])}" if names[1:] else ""
            return CheckpointError(
                f"{path}: the architecture is not recognised, but its {len(layout)} tensors fit "
                f"{names[0]}{more}: give the one that was trained with --arch"
            )
        if names and (not name or len(others) < len(differing)):
            name, differing = names[0], others
    if not name:
        like = f"no known architecture resembles it (its first keys: {', '.join([*first][:3])})"
    else:
        like = f"the nearest known one is {name}, but {'; '.join(differing[:3])}" + (
            f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        )
    return CheckpointError(
        f"{path}: the architecture is not recognised: {like}; give its name with --arch, or the "
        "code that builds it with --arch FILE.py:FACTORY"
    )


def _stem_notes(name: str, num_classes: int) -> list[str]:
    """What the keys and shapes of a recognised network cannot tell."""
    notes = []
    if "+cifar-stem" in name:
        pooled = name.replace("+cifar-stem", "+cifar-stem+max-pool")
        notes.append(
            "a 3x3 first convolution is read as stride 1 without max-pool "
            f"(override: --arch {pooled})"
        )
    if "-chenyaofo" in name and name.startswith(("mobilenet", "repvgg")):
        notes.append("strides are those for 32x32 images (override: --arch)")
    if "-cifar" in name and "-cifar-b" not in name and not name.startswith("torchvision:"):
        notes.append(
            "shortcuts without weights are read as option A, zeros on both sides (override: --arch)"
        )
    if name == "torchvision:resnet50":
        notes.append(
            "timm's resnetaa50 and resnetblur50 have the same names and shapes, but another "
            "forward pass (override: --arch timm:resnetaa50)"
        )
    return notes + transform_notes(name, num_classes)
