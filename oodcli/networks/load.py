"""From a checkpoint file to a Classifier: by the options, then the model card, then the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from oodcli.errors import CheckpointError, first_sentence
from oodcli.files.foreign import foreign, is_onnx, is_safetensors
from oodcli.files.hub import checkpoint_sha256, weights_of
from oodcli.networks import architectures, heads, hub
from oodcli.networks.assemble import assemble
from oodcli.networks.card import NOTHING, Overrides, card_of
from oodcli.networks.class_names import names_in
from oodcli.networks.classifier import Classifier
from oodcli.networks.contents import (
    check_file,
    check_unpacked,
    find_module,
    read_safetensors,
    read_torch,
    zip_members,
)
from oodcli.networks.inputs import guess_inputs, of_ultralytics, preprocessing_of
from oodcli.networks.network import Network, require_classes
from oodcli.networks.recognition import SLICES, network_of, require_named
from oodcli.networks.state_dict import check_finite, check_values, find_state
from oodcli.networks.timm_models import network_of_script


def load_classifier(
    path: Path,
    overrides: Overrides = NOTHING,
    *,
    device: str = "cpu",
    prefer_ema: bool = False,
    trust_pickle: bool = False,
) -> Classifier:
    """Read a checkpoint. The overrides win over the model card, and the card over recognition;
    what was assumed is in the classifier's ``assumptions``, each with the option that overrides
    it.

    prefer_ema: take the averaged weights where there are any. trust_pickle: run the code in the
    file, for pickled modules, and the code that a model card names. Raises CheckpointError when
    anything does not fit.
    """
    path = Path(path)
    if path.is_dir() and (what := foreign(path)):
        raise CheckpointError(f"{path} is {what}")
    for file in weights_of(path):
        check_file(file)
    card = card_of(path, overrides, trust=trust_pickle)
    fill = {key: value for key, value in card.items() if getattr(overrides, key) is None}
    given = replace(overrides, **fill)
    found = _read(path, given, prefer_ema=prefer_ema, trust_pickle=trust_pickle)
    preprocessing, _ = preprocessing_of(overrides, card, found.inputs)
    try:
        module = found.module.to(device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"--device {device} cannot be used: {first_sentence(error)}"
        ) from error
    classifier = assemble(
        module,
        arch=found.arch,
        preprocessing=preprocessing,
        class_names=given.class_names,
        sha256=checkpoint_sha256(path),
        layers=given.layers,
        num_classes=given.num_classes,
    )
    inputs = architectures.for_classes(found.inputs, classifier.num_classes)
    preprocessing, assumed = preprocessing_of(overrides, card, inputs)
    classifier = replace(
        classifier,
        preprocessing=preprocessing,
        assumptions=(*found.assumptions, *assumed, *classifier.assumptions),
        averaged=found.averaged,
        multi_label=given.multi_label or found.multi_label,
    )
    require_classes(given.num_classes, classifier.num_classes, path)
    return classifier if given.class_names is not None else _with_names(classifier, found)


def _with_names(classifier: Classifier, found: Network) -> Classifier:
    """With the class names beside the weights, or ImageNet's for its 1,000 classes."""
    names, source = found.class_names, found.names_source
    if names is not None and len(names) != classifier.num_classes:
        note = (
            f"{len(names)} class names {source} ignored: the network has "
            f"{classifier.num_classes} classes (override: --class-names)"
        )
        return replace(classifier, assumptions=(*classifier.assumptions, note))
    if names is not None:
        shown = ", ".join(names[:3]) + ", …" * (len(names) > 3)
        note = f"class names {shown}, {source} (override: --class-names)"
    elif not heads.split(found.arch)[1].startswith("mos"):  # MOS's order is not ImageNet's
        names = architectures.categories(found.arch, classifier.num_classes)
        note = "class names: ImageNet's (override: --class-names)"
    if names is None:
        return classifier
    named = found.class_names is not None
    notes = (*classifier.assumptions, note)
    return replace(classifier, class_names=names, assumptions=notes, named=named)


def _read(path: Path, given: Overrides, *, prefer_ema: bool, trust_pickle: bool) -> Network:
    config = hub.config_of(path)
    if path.is_dir() or config is not None:
        return _of_folder(path, config, given, prefer_ema=prefer_ema, trust_pickle=trust_pickle)
    members = zip_members(path)
    check_unpacked(path, members)
    if any(name.endswith("/constants.pkl") for name in members):
        from oodcli.networks.torchscript import load_torchscript

        module, note = load_torchscript(path, trust=trust_pickle)
        check_finite(module.state_dict(), path)
        return Network(module, "TorchScript", guess_inputs(module), (note,))
    if is_onnx(path):
        from oodcli.networks.onnx_graph import load_onnx

        module, size, note = load_onnx(path)
        check_finite(module.state_dict(), path)
        inputs = guess_inputs(module, size)
        if size is not None:
            inputs = replace(inputs, size_source="that of the graph's input")
        return Network(module, "ONNX", inputs, (note,))
    if path.suffix == ".pt2" or any(
        name.endswith(("archive_format", "serialized_exported_program.json")) for name in members
    ):
        from oodcli.networks.program import load_program

        module, shape = load_program(path, trust=trust_pickle)
        check_finite(module.state_dict(), path)
        return Network(
            module,
            "torch.export",
            replace(
                guess_inputs(module, (shape[1], shape[2])),
                size_source="that of the program's example",
            ),
        )
    content = _content(path, trust_pickle)
    module_found = find_module(content)
    if module_found is not None:
        kind = type(module_found)
        found = Network(module_found, kind.__name__, guess_inputs(module_found))
        return _beside(found, content, kind.__module__)
    weights = find_state(content, path, prefer_ema, given.state_key)
    state, notes = weights.state, weights.notes
    slices = content.get(SLICES) if isinstance(content, Mapping) else None
    check_values({SLICES: slices, **state} if isinstance(slices, Tensor) else state, path)
    if weights.pickled:
        require_named(weights, given, path)
        notes += (f"using the weights of the pickled {weights.pickled}, without its code",)
    script = network_of_script(content, state, given, path) if given.arch is None else None
    found = script or network_of(state, given, path, slices)
    found = replace(found, assumptions=(*notes, *found.assumptions), averaged=weights.averaged)
    return _beside(found, content, weights.pickled)


def _beside(found: Network, content: Any, kind: str) -> Network:
    """With what the checkpoint says besides the weights. kind: of a pickled module, its class."""
    key, names = names_in(content) or ("", None)
    inputs = of_ultralytics(content) if kind.startswith("ultralytics.") else found.inputs
    return replace(found, inputs=inputs, class_names=names, names_source=f"from {key}")


def _content(path: Path, trust_pickle: bool) -> Any:
    if is_safetensors(path) or (path.suffix == ".safetensors" and not zip_members(path)):
        return read_safetensors(path)
    return read_torch(path, trust_pickle)


def _of_folder(
    path: Path,
    config: dict[str, Any] | None,
    given: Overrides,
    *,
    prefer_ema: bool,
    trust_pickle: bool,
) -> Network:
    """The network of a folder of a model hub: as its configuration describes it, if no other is
    named with ``--arch``."""
    whole: dict[str, Tensor] = {}
    notes: tuple[str, ...] = ()
    averaged = False
    for part in weights_of(path):
        check_unpacked(part, zip_members(part))
        weights = find_state(_content(part, trust_pickle), part, prefer_ema, given.state_key)
        notes, averaged = weights.notes, weights.averaged
        check_values(weights.state, part)
        whole |= weights.state
    if config is not None and given.arch in (None, hub.arch_of(config, path)):
        found = hub.hub_network(config, whole, given, path)
    else:
        found = network_of(whole, given, path)
    return replace(found, assumptions=(*notes, *found.assumptions), averaged=averaged)
