"""From a checkpoint file to a Classifier: what the user said, then the model card, then what the
tensors themselves tell.

Files are read with ``weights_only=True``: nothing in them is run unless the user trusts them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import inspect
import json
import math
import pathlib
import pickle
import re
import reprlib
import sys
import tomllib
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from oodcli import architectures
from oodcli.architectures import Inputs, heads
from oodcli.classifier import INTERPOLATIONS, Classifier, Preprocessing, Resize, assemble
from oodcli.errors import CheckpointError

PLAIN = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "teacher",
    "student",
    "generator_state_dict",
)
AVERAGED = (
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema",
    "ema_model",
    "model_ema_state_dict",
    "ema_model_state_dict",
    "params_ema",
)
"""Where a training script keeps the weights, and their exponential moving average (EMA)."""

PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.", "backbone.", "online_model.")
AVERAGED_PREFIXES = ("ema_model.", "model_ema.", "ema.", "averaged_model.")
SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt", ".safetensors", ".pt2")
SLICES = "group_slices"
"""Where MOS's training script says which outputs belong to which group."""

HEAD_NAMES = ("fc", "linear", "classifier", "head", "heads.head")
"""What the last linear layer is called where nothing but the backbone was saved under its names."""

LARGEST_CARD = 1 << 22
"""Bytes of a model card; the names of 20,000 classes take a fifth of it."""

UNPACKED = 20, 1 << 28
"""An archive that unpacks to so many times its size, and to so many bytes, is no checkpoint:
torch.save does not compress."""

NOT_WEIGHTS = re.compile(r"n_averaged$|(criterion|loss|loss_fn|loss_function)\.")


@dataclass(frozen=True)
class Overrides:
    """What the command line gave; None = not given."""

    arch: str | None = None
    num_classes: int | None = None
    input_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: Resize = None
    interpolation: str | None = None
    crop: str | None = None
    exif: str | None = None
    image_range: tuple[float, float] | None = None
    class_names: tuple[str, ...] | None = None
    layers: str | None = None
    card: Path | None = None


@dataclass(frozen=True)
class _Network:
    """A network with its weights, and what is known of it. inputs: None where nothing is. averaged:
    as of a Classifier."""

    module: nn.Module
    arch: str
    inputs: Inputs
    assumptions: tuple[str, ...] = ()
    averaged: bool = False


def load_classifier(
    path: Path,
    overrides: Overrides = Overrides(),
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
    _check_file(path)
    card = _card_of(path, overrides, trust=trust_pickle)
    fill = {key: value for key, value in card.items() if getattr(overrides, key) is None}
    given = replace(overrides, **fill)
    found = _read(path, given, prefer_ema=prefer_ema, trust_pickle=trust_pickle)
    preprocessing, _ = _preprocessing(overrides, card, found.inputs)
    try:
        module = found.module.to(device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"--device {device} cannot be used: {_line(error)}") from error
    classifier = assemble(
        module,
        arch=found.arch,
        preprocessing=preprocessing,
        class_names=given.class_names,
        sha256=file_sha256(path),
        layers=given.layers,
        num_classes=given.num_classes,
    )
    inputs = architectures.for_classes(found.inputs, classifier.num_classes)
    preprocessing, assumed = _preprocessing(overrides, card, inputs)
    classifier = replace(
        classifier,
        preprocessing=preprocessing,
        assumptions=(*found.assumptions, *assumed, *classifier.assumptions),
        averaged=found.averaged,
    )
    _agree(given.num_classes, classifier.num_classes, path)
    categories = architectures.categories(found.arch, classifier.num_classes)
    grouped = heads.split(found.arch)[1].startswith("mos")  # so in another order than ImageNet's
    if given.class_names is None and categories is not None and not grouped:
        note = "class names: ImageNet's, from torchvision's weights (override: --class-names)"
        notes = (*classifier.assumptions, note)
        classifier = replace(classifier, class_names=categories, assumptions=notes)
    return classifier


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- model card -------------------------------------------------------------------------------


def read_card(path: Path) -> dict[str, Any]:
    """The keys of a model card, with tuples for lists. Raises CheckpointError when the file is not
    TOML, or has an unknown key or a value of the wrong kind."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_CARD + 1)
        if len(content) > LARGEST_CARD:
            raise CheckpointError(
                f"{path} is larger than {LARGEST_CARD >> 20} MB, so it is no model card: remove "
                "it, or name the right one with --card"
            )
        card = tomllib.loads(content.decode("utf-8").replace("\r\n", "\n"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    # ValueError: not TOML, not UTF-8, or a number of more than 4300 digits.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid TOML: {_line(error)}") from error
    kinds = {
        "arch": (_is_text, "a string"),
        "num_classes": (_is_count, "a positive integer"),
        "class_names": (lambda v: _is_list(v, _is_text), "a list of strings"),
        "input_size": (lambda v: _is_list(v, _is_count) and len(v) == 2, "[height, width]"),
        "mean": (lambda v: _is_list(v, _is_number), "a list of numbers"),
        "std": (lambda v: _is_list(v, _is_number), "a list of numbers"),
        "resize": (_is_resize, "a positive integer, or [height, width]"),
        "interpolation": (_is_text, "a string"),
        "crop": (_is_text, "a string"),
        "exif": (_is_text, "a string"),
        "image_range": (lambda v: _is_list(v, _is_number) and len(v) == 2, "[low, high]"),
    }
    for key, value in card.items():
        if key not in kinds:
            raise CheckpointError(
                f"{path}: '{key}' is not a key of a model card: use {', '.join(kinds)}"
            )
        fits, kind = kinds[key]
        if not fits(value):
            raise CheckpointError(f"{path}: {key} must be {kind}, but is {_shown(value)}")
    names, classes = card.get("class_names"), card.get("num_classes")
    if names is not None and classes is not None and len(names) != classes:
        raise CheckpointError(f"{path}: {len(names)} class_names, but num_classes = {classes}")
    for key in ("mean", "std", "image_range"):
        if key in card:
            card[key] = [float(number) for number in card[key]]
    return {key: tuple(v) if isinstance(v, list) else v for key, v in card.items()}


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not write integers of more than 4300 digits
        return "a number of thousands of digits"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _is_resize(value: Any) -> bool:
    return _is_count(value) or (_is_list(value, _is_count) and len(value) == 2)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 31


def _is_list(value: Any, fits: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(fits(item) for item in value)


def write_card(classifier: Classifier, path: Path) -> None:
    """Write the model card with which the same checkpoint gives the same classifier, where
    ``atomic`` says. Raises OSError when the disk refuses."""
    prep = classifier.preprocessing
    card: dict[str, Any] = {}
    if _is_arch(classifier.arch):
        card["arch"] = classifier.arch
    card["num_classes"] = classifier.num_classes
    if classifier.class_names != tuple(str(index) for index in range(classifier.num_classes)):
        card["class_names"] = list(classifier.class_names)
    card["input_size"] = list(prep.input_size)
    card["mean"], card["std"] = list(prep.mean), list(prep.std)
    if prep.resize is not None:
        card["resize"] = prep.resize
    card["interpolation"] = prep.interpolation
    if prep.exif != "turn":
        card["exif"] = prep.exif
    if prep.image_range is not None:
        card["image_range"] = prep.image_range
    # A JSON string, number or list is TOML as well, but for the one control character that JSON
    # leaves as it is.
    lines = (
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n".replace("\x7f", "\\u007f")
        for key, value in card.items()
    )
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def _card_of(path: Path, overrides: Overrides, *, trust: bool) -> dict[str, Any]:
    """The keys of a checkpoint's model card; none where it has no card. trust: run code that the
    card names; it came with the checkpoint, and whoever uses that has not asked for it."""
    where = overrides.card or path.with_suffix(".toml")
    card = read_card(where) if overrides.card is not None or where.is_file() else {}
    if ".py:" in card.get("arch", "") and overrides.arch is None and not trust:
        raise CheckpointError(
            f"{where} names code, arch = {_shown(card['arch'])}, which can do anything when it is "
            "run: read it, then name it yourself with --arch, or add --trust-pickle"
        )
    return card


# --- preprocessing ----------------------------------------------------------------------------

CROPS = ("center", "squash")


def _preprocessing(
    said: Overrides, card: Mapping[str, Any], default: Inputs
) -> tuple[Preprocessing, list[str]]:
    """What was said, filled up from the card, then with the network's defaults; a sentence for each
    of those. Raises CheckpointError where it makes no sense, or the defaults cannot be obeyed."""
    given = {key: card.get(key) for key in _PREPARING}
    given |= {key: getattr(said, key) for key in _PREPARING if getattr(said, key) is not None}
    assumed = []
    size = given["input_size"] or default.input_size
    resize, why = _resize(said, card, default, size)
    interpolation = given["interpolation"] or default.interpolation
    if given["interpolation"] is None and "interpolation" in default.cannot:
        raise CheckpointError(default.cannot["interpolation"])
    how = {"resize": architectures.resizing(resize)} if why else {}
    known = default.resize is not None or default.interpolation != "bilinear"
    if known and given["interpolation"] is None:
        how["interpolation"] = interpolation
    if given["input_size"] is None:
        words = ", ".join((default.size_source, *how.values()))
        assumed.append(f"input size {size[0]}x{size[1]}, {words} (override: --input-size)")
    elif how:
        words = ", ".join((*how.values(), why or default.size_source))
        assumed.append(f"{words} (override: {' '.join(f'--{name}' for name in how)})")
    if _may_be_smaller(resize, size):
        assumed.append(
            f"pictures smaller than {size[0]}x{size[1]} after the resize get a black border, as "
            "torchvision's CenterCrop adds it (override: --resize)"
        )
    mean, std = given["mean"] or default.mean, given["std"] or default.std
    missing = [name for name in ("mean", "std") if given[name] is None]
    if missing:
        numbers = " and ".join(
            f"{name} {' '.join(f'{number:g}' for number in getattr(default, name))}"
            for name in missing
        )
        options = " ".join(f"--{name}" for name in missing)
        assumed.append(
            f"normalisation: {default.normalisation_source} {numbers} (override: {options})"
        )
    exif = given["exif"] or "turn"
    found = Preprocessing(size, mean, std, resize, interpolation, exif, given["image_range"])
    _require_unit_scale(mean, std)
    return found, assumed


_PREPARING = ("input_size", "mean", "std", "interpolation", "exif", "image_range")


def _resize(
    said: Overrides, card: Mapping[str, Any], default: Inputs, size: tuple[int, int]
) -> tuple[Resize, str]:
    """The resize before the crop to ``size``, and half a sentence on where it comes from where it
    was not given so. A card that names the input's size and no resize means: straight to it."""
    crop = said.crop or card.get("crop")
    if crop not in (None, *CROPS):
        raise CheckpointError(f"crop '{crop}' is not one of {', '.join(CROPS)}")
    resize, base, why, share = said.resize, size, "", None
    together = said.resize is not None or (said.crop is None and "resize" in card)
    if said.resize is None and "resize" in card:
        resize, base = card["resize"], card.get("input_size") or default.input_size
        why = "" if base == size else "the model card's"
    elif said.resize is None and "input_size" not in card:
        resize, base, share = default.resize, default.input_size, default.crop_share
        why = "" if resize is None else default.size_source
        if crop is None and "resize" in default.cannot:
            raise CheckpointError(default.cannot["resize"])
    if base != size and resize is not None:
        why = f"as {_listed(resize)} for an input of {_listed(base)}, {why}"
        resize = _scaled(resize, base, size, share)
    if crop == "squash" and isinstance(resize, int):
        height, width = (round(resize * side / min(size)) for side in size)
        resize = height, width
    elif crop == "center" and resize is None:
        resize = max(size)
    elif crop == "center" and isinstance(resize, tuple) and not together:
        resize = max(resize)
    return None if resize == size else resize, why


def _scaled(
    resize: int | tuple[int, int],
    base: tuple[int, int],
    size: tuple[int, int],
    share: float | None,
) -> int | tuple[int, int]:
    """The resize for another input size than ``base``: in proportion, or as timm computes it from
    its share of the picture."""

    def along(length: int, before: int, now: int) -> int:
        return round(length * now / before) if share is None else math.floor(now / share)

    if isinstance(resize, int):
        return along(resize, max(base), max(size))
    return along(resize[0], base[0], size[0]), along(resize[1], base[1], size[1])


def _listed(size: int | tuple[int, int]) -> str:
    return str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"


def _may_be_smaller(resize: Resize, size: tuple[int, int]) -> bool:
    """Whether a picture may be smaller than the crop after the resize."""
    if isinstance(resize, int):
        return resize < max(size)
    return resize is not None and (resize[0] < size[0] or resize[1] < size[1])


def _require_unit_scale(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises CheckpointError for statistics of pixels in 0…255, which many configurations have: no
    mean and no standard deviation of pixels in [0, 1] is above 1."""
    far = max(map(abs, mean)) > 1
    if not far and max(std) <= 1:
        return
    wide = max(std) > 1 or (far and min(std) == 1)  # 1: Caffe's networks, which do not divide
    numbers = {"mean": (mean, far), "std": (std, wide)}
    said = " and ".join(f"{name} {_numbers(each)}" for name, (each, _) in numbers.items())
    divided = " ".join(
        f"--{name} {_numbers([number / 255 for number in each] if divide else each)}"
        for name, (each, divide) in numbers.items()
    )
    raise CheckpointError(
        f"{said} are of pixels in 0…255, but here pixels are in [0, 1]: divide by 255, as in "
        f"{divided}"
    )


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:.6g}" for value in values)


def _guess_inputs(network: nn.Module, size: tuple[int, int] | None = None) -> Inputs:
    """For a network that says nothing of its input: CIFAR's where the image is small, or the first
    convolution neither has a large kernel nor skips pixels; ImageNet's elsewhere."""
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    small = first is not None and max(first.kernel_size) <= 3 and max(first.stride) == 1
    if size is not None:
        small = max(size) <= 64
    side = 32 if small else 224
    found = Inputs(
        size or (side, side),
        architectures.CIFAR_MEAN if small else architectures.IMAGENET_MEAN,
        architectures.CIFAR_STD if small else architectures.IMAGENET_STD,
        size_source="a guess from the first convolution",
        normalisation_source="CIFAR-10's" if small else "ImageNet's",
    )
    return architectures.grey(found) if first is not None and first.in_channels == 1 else found


# --- file → network ---------------------------------------------------------------------------


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the checkpoint file in it")
    try:
        with open(path, "rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if empty:
        raise CheckpointError(f"{path} is empty: copy the checkpoint again")


def _read(path: Path, given: Overrides, *, prefer_ema: bool, trust_pickle: bool) -> _Network:
    members = _zip_members(path)
    _check_unpacked(path, members)
    if any(name.endswith("/constants.pkl") for name in members):
        raise CheckpointError(
            f"{path} is a TorchScript archive, which oodcli does not run: save the state dict of "
            "the Python model, or export it with torch.export.save to a .pt2 file"
        )
    if path.suffix == ".pt2" or any(
        name.endswith(("archive_format", "serialized_exported_program.json")) for name in members
    ):
        from oodcli.exported import load_program

        module, shape = load_program(path, trust=trust_pickle)
        _check_finite(module.state_dict(), path)
        return _Network(
            module,
            "torch.export",
            replace(
                _guess_inputs(module, (shape[1], shape[2])),
                size_source="that of the program's example",
            ),
        )
    if path.suffix == ".safetensors":
        content: Any = _read_safetensors(path)
    else:
        content = _read_torch(path, trust_pickle)
    module_found = _find_module(content)
    if module_found is not None:
        return _Network(module_found, type(module_found).__name__, _guess_inputs(module_found))
    state, notes, averaged = _find_state(content, path, prefer_ema)
    slices = content.get(SLICES)
    _check_values({SLICES: slices, **state} if isinstance(slices, Tensor) else state, path)
    found = _network(state, given, path, slices)
    return replace(found, assumptions=(*notes, *found.assumptions), averaged=averaged)


def _zip_members(path: Path) -> dict[str, int]:
    """Names in a zip archive, which torch's files are, and their unpacked bytes; empty for any
    other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename: info.file_size for info in archive.infolist()}
    except Exception:  # damaged archives raise almost anything, and torch is asked next
        return {}


def _check_unpacked(path: Path, members: Mapping[str, int]) -> None:
    """Raises CheckpointError for a decompression bomb."""
    times, least = UNPACKED
    unpacked = sum(members.values())
    if unpacked > least and unpacked > times * path.stat().st_size:
        raise CheckpointError(
            f"{path} would unpack to {unpacked} bytes, more than {times} times its size (a "
            "decompression bomb?): save it again with torch.save, which does not compress"
        )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({_line(error)}): copy it again"
        ) from error


def _read_torch(path: Path, trust_pickle: bool) -> Any:
    try:
        # Arguments of a command line and paths, which many training scripts save, are inert.
        with torch.serialization.safe_globals([argparse.Namespace, pathlib.PosixPath]):
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except Exception as error:  # a damaged pickle can raise almost anything
        text = str(error)
        refused = re.search(r"GLOBAL ([\w.]+)|(?:unrecognized function|but got) ([^\n]+)", text)
        if isinstance(error, pickle.UnpicklingError) and not trust_pickle and refused:
            raise CheckpointError(
                f"{path} holds a pickled {refused[1] or refused[2]}, not only tensors, and "
                "unpickling can run any code that its author put there: save model.state_dict() "
                "alone, or give --trust-pickle if you trust whoever made the file"
            ) from error
        if trust_pickle and isinstance(error, ImportError | AttributeError):
            raise CheckpointError(
                f"{path} cannot be unpickled without the code that made it ({_line(error)}): run "
                "oodcli where that code can be imported (PYTHONPATH), or save the state dict"
            ) from error
        no_pickle = isinstance(error, pickle.UnpicklingError | KeyError)  # an unknown opcode
        reason = "no pickle" if no_pickle else _line(error)
        raise CheckpointError(
            f"{path} is not a checkpoint that torch can read, or it is damaged "
            f"({reason}): oodcli reads {' '.join(SUFFIXES)}"
        ) from error


def _line(error: BaseException) -> str:
    """The first sentence of somebody else's error, short enough for a line of ours."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text.split(". ")[0][:160].rstrip(".")


def _find_module(content: Any) -> nn.Module | None:
    """A pickled network: the content itself, or where a training script keeps it."""
    if isinstance(content, Mapping):
        content = next(
            (content[k] for k in (*PLAIN, *AVERAGED) if isinstance(content.get(k), nn.Module)),
            None,
        )
    if not isinstance(content, nn.Module):
        return None
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(content, wrappers):
        content = content.module
    network: nn.Module = content.float()
    return network


# --- state dict -------------------------------------------------------------------------------


def _is_state(content: Any) -> bool:
    """Whether this is a state dict: strings to tensors, but for a few counters."""
    if not isinstance(content, Mapping) or not content:
        return False
    tensors = sum(isinstance(value, Tensor) and value.ndim > 0 for value in content.values())
    return tensors > 0 and all(
        isinstance(key, str) and (isinstance(value, Tensor | int | float) or key == "_metadata")
        for key, value in content.items()
    )


def _find_state(
    content: Any, path: Path, prefer_ema: bool
) -> tuple[dict[str, Tensor], list[str], bool]:
    """The state dict in what a training script saved, sentences about the choice, and whether it is
    the averaged one of two."""
    notes: list[str] = []
    averaged = both = False
    for _ in range(4):  # wrapped in a wrapper, as frameworks do
        if _is_state(content):
            break
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{path} holds a {type(content).__name__} where a state dict was expected: save "
                "model.state_dict()"
            )
        usable = [k for k in (*PLAIN, *AVERAGED) if isinstance(content.get(k), Mapping)]
        usable = [key for key in usable if content[key]]
        ema = [key for key in usable if key in AVERAGED]
        plain = [key for key in usable if key in PLAIN]
        if not usable:
            # Only strings: a tuple of a hostile pickle can be endless when printed.
            names = [key for key in content if isinstance(key, str)]
            keys = ", ".join(names[:6]) or "nothing"
            only = {"optimizer", "param_groups", "optimizer_state_dict", "state"} & set(names)
            raise CheckpointError(
                f"{path} holds {'the state of an optimizer' if only else 'no weights'} (its keys: "
                f"{keys}), not a network's state dict: save model.state_dict()"
            )
        chosen = (ema or plain)[0] if prefer_ema else (plain or ema)[0]
        averaged = averaged or chosen in AVERAGED
        if ema and plain:
            both = True
            other = "override: leave out --ema" if prefer_ema else "override: --ema"
            notes.append(f"weights taken from '{chosen}'; there are also others ({other})")
        content = content[chosen]
    if not _is_state(content):
        raise CheckpointError(f"{path} holds no state dict where one was expected")
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    ema_prefix = next((p for p in AVERAGED_PREFIXES if any(k.startswith(p) for k in state)), None)
    if ema_prefix is not None:
        rest = {k: v for k, v in state.items() if not k.startswith(ema_prefix)}
        if prefer_ema or not rest:
            state = {
                k.removeprefix(ema_prefix): v for k, v in state.items() if k.startswith(ema_prefix)
            }
            averaged, both = True, both or bool(rest)
        else:
            state = rest
            notes.append(f"averaged weights '{ema_prefix}*' were left out (override: --ema)")
    if prefer_ema and not averaged:
        notes.append("there are no averaged (EMA) weights: the plain ones were taken")
    return state, notes, averaged and both


def _check_values(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError naming tensors that no trained network has."""
    odd = [key for key, value in state.items() if _is_odd(value)]
    if odd:
        raise CheckpointError(
            f"{path}: {_some(odd)} no plain tensor of numbers with all its elements in the file "
            "(sparse, quantised, complex, on the meta device, or damaged): save the "
            "floating-point state dict of the whole network"
        )
    _check_finite(state, path)
    whole = [
        key
        for key, value in state.items()
        if key.endswith(("weight", "bias")) and not value.is_floating_point()
    ]
    if whole:
        raise CheckpointError(
            f"{path}: {_some(whole)} of type {str(state[whole[0]].dtype).removeprefix('torch.')}, "
            "as in a quantised network: use the floating-point checkpoint"
        )
    negative = [
        key
        for key, value in state.items()
        if key.endswith("running_var") and bool((value < 0).any())
    ]
    if negative:
        raise CheckpointError(
            f"{path}: {_some(negative)} negative, which a variance cannot be: the file is damaged"
        )


def _check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    broken = [
        key
        for key, value in state.items()
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all())
    ]
    if broken:
        raise CheckpointError(
            f"{path}: {_some(broken)} not finite (NaN or infinity): training diverged, or the "
            "file is damaged; use an earlier checkpoint"
        )


def _is_odd(value: Tensor) -> bool:
    """Whether arithmetic with it may fail, or take more memory than the file does: a header can
    claim any shape for elements that are not there."""
    if value.layout is not torch.strided or value.is_nested or value.device.type != "cpu":
        return True
    if value.is_quantized or value.is_complex() or not value.numel():
        return True
    if str(value.dtype).startswith(("torch.bits", "torch.float4")):
        return True
    claimed = value.numel() * value.element_size()
    return claimed > max(value.untyped_storage().nbytes(), 1 << 20)


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:3])
    if len(keys) > 3:
        shown += f" and {len(keys) - 3} more"
    return f"{shown} {'is' if len(keys) == 1 else 'are'}"


def _layouts(state: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], tuple[str, ...]]]:
    """The state dict under the names it may have had before it was wrapped: as it is, then with
    one prefix less each time. With each, the keys that were left out as not the network's."""
    found: list[tuple[dict[str, Tensor], tuple[str, ...]]] = [(state, ())]
    dropped = tuple(key for key in state if NOT_WEIGHTS.match(key))
    state = {key: value for key, value in state.items() if key not in dropped}
    if dropped:
        found.append((state, dropped))
    for _ in range(6):
        heads = {key.partition(".")[0] + "." for key in state}
        if len(heads) == 1 and all("." in key for key in state):
            (prefix,) = heads
        else:
            prefix = next((p for p in PREFIXES if any(k.startswith(p) for k in state)), "")
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        outside = {k: v for k, v in state.items() if not k.startswith(prefix)}
        if not prefix or not inside or inside.keys() & outside.keys():
            break
        if outside:  # either a head beside the backbone, or something else altogether
            found.append((inside, (*dropped, *outside)))
        state = inside | outside
        found.append((state, dropped))
    return found


_Layouts = Sequence[tuple[dict[str, Tensor], tuple[str, ...]]]


def _network(
    state: dict[str, Tensor], given: Overrides, path: Path, slices: Any = None
) -> _Network:
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


def _plain(state: dict[str, Tensor], given: Overrides, path: Path) -> _Network:
    layouts = _layouts(state)
    if given.arch is not None:
        return _named(given.arch, layouts, given, path)
    found = _recognised(layouts, given, path)
    if found is None:
        raise _unrecognised(layouts, path)
    return found


def _deconf(
    backbone: dict[str, Tensor],
    tensors: dict[str, Tensor],
    head: str,
    given: Overrides,
    path: Path,
) -> _Network:
    """The network with a DeConf head: recognised with a linear layer of the same shape in its
    place. head: as the user wrote it, or empty."""
    form = heads.form_of(head) if head else "inner" if "h.h.bias" in tensors else "cosine"
    if not tensors:
        raise CheckpointError(
            f"{path} has no DeConf head (h.h.weight, g.0.weight …): leave +{head} out of --arch"
        )
    weight = tensors["h.h.weight"]
    layouts = _layouts(backbone)
    if given.arch is not None:
        found = _named(given.arch, layouts, given, path, stand_in=weight)
    else:
        made = (_standing_in(layouts, name, weight) for name in HEAD_NAMES)
        known = next(filter(None, (_recognised(each, given, path) for each in made)), None)
        if known is None:
            raise _unrecognised(_standing_in(layouts, HEAD_NAMES[0], weight), path)
        found = known
    retrained = heads.DeconfHead(form, weight.shape[1], weight.shape[0])
    differing = architectures.compare(retrained.state_dict(), tensors)
    if differing:
        raise CheckpointError(
            f"{path}: its DeConf head does not fit +deconf-{form}: {'; '.join(differing[:3])}"
        )
    _fill(retrained, tensors)
    found.module.set_submodule(heads.last_linear(found.module, found.arch), retrained)
    note = (
        f"a DeConf head with a bias: +deconf-{form}"
        if form == "inner"
        else f"a DeConf head without a bias was taken for +deconf-{form} (override: "
        f"--arch {found.arch}+deconf-euclid)"
    )
    return _with_head(found, retrained, "" if head else note)


def _mos(
    state: dict[str, Tensor], slices: Any, head: str, given: Overrides, path: Path
) -> _Network:
    """The network whose last layer has one output more for each of MOS's groups. slices: where the
    groups begin and end; head: as the user wrote it, or empty."""
    sizes = heads.sizes_of(head) if head else heads.sizes_from(slices)
    _agree(given.num_classes, sum(sizes), path)
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
        f"a MOS head +{retrained.suffix}, as {SLICES} says, so classes are numbered group by group "
        f"(override: --arch {found.arch}+mos:SIZES)"
    )
    return _with_head(found, retrained, "" if head else note)


def _with_head(found: _Network, head: heads.RetrainedHead, note: str) -> _Network:
    notes = (*found.assumptions, note) if note else found.assumptions
    return replace(found, arch=f"{found.arch}+{head.suffix}", assumptions=notes)


def _standing_in(layouts: _Layouts, name: str, weight: Tensor) -> _Layouts:
    """Layouts with a plain linear layer where a retrained head was taken out."""
    linear = {f"{name}.weight": weight, f"{name}.bias": weight.new_zeros(len(weight))}
    return [(state | linear, dropped) for state, dropped in layouts]


def _recognised(layouts: _Layouts, given: Overrides, path: Path) -> _Network | None:
    for layout, dropped in reversed(layouts):
        known = architectures.recognise(layout)
        if known is None:
            continue
        _agree(given.num_classes, known.num_classes, path)
        network = architectures.skeleton(known.name, known.num_classes)
        _fill(network, known.state_dict)
        notes = [
            f"architecture {known.name} recognised from {len(layout)} tensors (override: --arch)",
            *_stem_notes(known.name, known.num_classes),
        ]
        if dropped:
            notes.append(f"{_some(dropped)} not part of it and left out")
        return _Network(
            network, known.name, architectures.inputs(known.name, network), tuple(notes)
        )
    return None


def _unrecognised(layouts: _Layouts, path: Path) -> CheckpointError:
    first, layout = layouts[0][0], layouts[-1][0]
    name, differing = architectures.nearest(layout)
    if not name:
        like = f"no known architecture resembles it (its first keys: {', '.join([*first][:3])})"
    else:
        like = f"the nearest known one is {name}, but {'; '.join(differing[:3])}" + (
            f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        )
    return CheckpointError(
        f"{path}: the architecture is not recognised: {like}; name it with --arch, or give the "
        "code that builds it with --arch FILE.py:FACTORY"
    )


def _agree(given: int | None, found: int, path: Path) -> None:
    if given is not None and given != found:
        raise CheckpointError(
            f"{path} has {found} classes, but {given} were given: correct --num-classes or "
            "num_classes in the model card"
        )


def _is_arch(name: str) -> bool:
    """Whether ``--arch`` takes the name (a pickled module's class or a program's is none)."""
    base = heads.split(name)[0] or ""
    return base.startswith("timm:") or ".py:" in base or architectures.known(base)


def _stem_notes(name: str, num_classes: int) -> list[str]:
    """What the keys and shapes of a recognised network cannot tell."""
    notes = []
    if "+cifar-stem" in name:
        notes.append(
            "a 3x3 first convolution was taken to mean stride 1 and no max-pool (override: --arch)"
        )
    if "-cifar" in name and "-cifar-b" not in name and not name.startswith("torchvision:"):
        notes.append(
            "shortcuts without weights were taken for option A, zeros on both sides "
            "(override: --arch)"
        )
    return notes + _transform_notes(name, num_classes)


def _transform_notes(name: str, num_classes: int) -> list[str]:
    base = name.removeprefix("torchvision:").split("+")[0]
    if base not in ("googlenet", "inception_v3") or "transform-input" in name or "+grey" in name:
        return []
    on = num_classes == 1000
    return [
        f"transform_input is {'on, as for' if on else 'off, unlike for'} torchvision's own weights "
        f"(override: --arch {name}+{'no-' * on}transform-input)"
    ]


def _named(
    arch: str,
    layouts: _Layouts,
    given: Overrides,
    path: Path,
    *,
    stand_in: Tensor | None = None,
) -> _Network:
    """The network that ``--arch`` names, with the weights of the layout that fits it best.
    stand_in: weight of a linear layer in a retrained head's place."""
    maker = _maker(arch)
    probe = maker.skeleton(1000 if given.num_classes is None else given.num_classes)
    if stand_in is not None:
        layouts = _standing_in(layouts, heads.last_linear(probe, arch), stand_in)
    options = [(architectures.rename(arch, state), dropped) for state, dropped in layouts]
    state, dropped = min(
        options, key=lambda option: len(architectures.compare(probe.state_dict(), option[0]))
    )
    classes = _head_classes(maker, probe, state) or given.num_classes
    if classes is not None:
        _agree(given.num_classes, classes, path)
    network = maker.build(classes)
    differing = architectures.compare(network.state_dict(), state)
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(
            f"{path} does not fit {arch}: {'; '.join(differing[:3])}{more}; give another --arch, "
            "or leave it out to have it recognised"
        )
    _fill(network, state)
    notes = _transform_notes(arch, classes or 0)
    if dropped:
        notes.append(f"{_some(dropped)} not part of {arch} and left out")
    return _Network(network, arch, maker.inputs(network), tuple(notes))


def _fill(network: nn.Module, state: Mapping[str, Tensor]) -> None:
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


class _BuiltIn:
    """How to make a network that :mod:`oodcli.architectures` knows."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def skeleton(self, num_classes: int) -> nn.Module:
        return architectures.skeleton(self.arch, num_classes)

    def build(self, num_classes: int | None) -> nn.Module:
        return self.skeleton(num_classes or 1000)  # its weights come from the checkpoint

    def inputs(self, network: nn.Module) -> Inputs:
        return architectures.inputs(self.arch, network)


class _Timm(_BuiltIn):
    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        try:
            import timm
        except ImportError as error:
            raise CheckpointError(
                f"--arch {arch} needs timm, which is not installed: pip install 'oodcli[timm]'"
            ) from error
        self.timm: Any = timm

    def skeleton(self, num_classes: int) -> nn.Module:
        return self.build(num_classes)

    def build(self, num_classes: int | None) -> nn.Module:
        name = self.arch.removeprefix("timm:")
        count = {} if num_classes is None else {"num_classes": num_classes}
        try:
            network: nn.Module = self.timm.create_model(name, pretrained=False, **count)
        except Exception as error:  # timm raises RuntimeError, TypeError, …, by model
            raise CheckpointError(f"--arch {self.arch}: {_line(error)}") from error
        return network

    def inputs(self, network: nn.Module) -> Inputs:
        """What timm's ``create_transform`` does with this model's configuration when it evaluates.
        Resize, crop mode and interpolation that cannot be so are in ``cannot``."""
        config = self.timm.data.resolve_model_data_config(network)
        height, width = config["input_size"][1:]
        share, mode = config["crop_pct"], config["crop_mode"]
        scaled = (math.floor(height / share), math.floor(width / share))
        cannot = {}
        if mode == "border":
            cannot["resize"] = (
                f"timm shows {self.arch} whole pictures with a border, which oodcli does not do: "
                "say how it was trained with --crop squash or --crop center"
            )
        elif mode != "squash" and height != width:
            cannot["resize"] = (
                f"timm resizes pictures for {self.arch} until they cover {height}x{width}, which "
                "oodcli does not do: say how it was trained with --crop squash or --resize N"
            )
        kind = config["interpolation"]
        if kind not in INTERPOLATIONS:
            cannot["interpolation"] = (
                f"timm's interpolation for {self.arch} is '{kind}', which oodcli does not do: give "
                f"--interpolation, one of {', '.join(INTERPOLATIONS)}"
            )
        return Inputs(
            (height, width),
            tuple(config["mean"]),
            tuple(config["std"]),
            scaled[0] if mode != "squash" and height == width else scaled,
            kind,
            "timm's for this model",
            "timm's for this model",
            crop_share=share,
            cannot=cannot,
        )


class _Factory(_BuiltIn):
    """``FILE.py:FACTORY``, called with num_classes where it takes that."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        file, _, name = arch.rpartition(":")
        if not Path(file).is_file():
            raise CheckpointError(f"--arch {arch}: there is no file {file} (in {Path.cwd().name}/)")
        spec = importlib.util.spec_from_file_location("oodcli_user_architecture", file)
        if spec is None or spec.loader is None:
            raise CheckpointError(f"--arch {arch}: {file} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(Path(file).resolve().parent))  # it may import its neighbours
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise CheckpointError(
                f"--arch {arch}: {file} fails with {type(error).__name__}: {_line(error)}"
            ) from error
        finally:
            sys.path.pop(0)
        self.factory = getattr(module, name, None)
        if not callable(self.factory):
            raise CheckpointError(f"--arch {arch}: {file} has no function or class '{name}'")
        self.takes_classes = "num_classes" in inspect.signature(self.factory).parameters

    def skeleton(self, num_classes: int) -> nn.Module:
        return self.build(num_classes)

    def build(self, num_classes: int | None) -> nn.Module:
        assert self.factory is not None
        count = {"num_classes": num_classes} if self.takes_classes and num_classes else {}
        try:
            network = self.factory(**count)
        except Exception as error:
            raise CheckpointError(
                f"--arch {self.arch} fails with {type(error).__name__}: {_line(error)}"
            ) from error
        if not isinstance(network, nn.Module):
            raise CheckpointError(
                f"--arch {self.arch} returned {type(network).__name__}, expected a torch.nn.Module"
            )
        return network

    def inputs(self, network: nn.Module) -> Inputs:
        return _guess_inputs(network)


def _maker(arch: str) -> _BuiltIn:
    if arch.startswith("timm:"):
        return _Timm(arch)
    return _Factory(arch) if ".py:" in arch else _BuiltIn(arch)


def _head_classes(maker: _BuiltIn, probe: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """The number of classes in a state dict: the length of a tensor whose length follows the
    number of classes that the network is made for. None where no tensor's does."""
    before = probe.state_dict()
    for key, tensor in maker.skeleton(997).state_dict().items():  # a number that nobody uses
        known = before.get(key)
        if known is not None and known.shape != tensor.shape and len(tensor) == 997:
            return len(state[key]) if key in state and state[key].ndim else None
    return None
