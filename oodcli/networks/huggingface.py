"""Classifiers of Hugging Face transformers, from a folder with ``config.json``.

The library makes the network and loads the weights, because it knows the names in older files. It
gets the tensors, not the folder: it opens no file but ``preprocessor_config.json``, and no
connection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from oodcli.errors import CheckpointError, OodcliError, first_sentence
from oodcli.files.hub import CONFIG, PROCESSORS, read_json
from oodcli.images.pixels import INTERPOLATION, fit
from oodcli.networks.architectures import Inputs
from oodcli.networks.inputs import guess_inputs
from oodcli.networks.network import Network
from oodcli.networks.preprocessing import Preprocessing, Resize
from oodcli.networks.state_dict import some_of

LARGEST_SIDE = 4096
"""Pixels of a side in ``preprocessor_config.json``."""

LEFT_OUT = frozenset(
    (
        *("_attn_implementation", "_attn_implementation_internal", "attn_implementation"),
        *("_experts_implementation", "experts_implementation", "use_kernels", "kernel_config"),
        *("fusion_config", "distributed_config", "transformers_weights", "name_or_path"),
        *("_name_or_path", "dtype", "torch_dtype", "_commit_hash"),
        *("output_hidden_states", "output_attentions", "return_dict", "use_return_dict"),
    )
)
"""Keys of a configuration that choose other code or outputs, not another network."""

NO_IMAGES = {
    "ImageGPTForImageClassification": "reads each pixel as one of a few colours, not as numbers: "
    "oodcli cannot use it",
    "Siglip2ForImageClassification": "takes patches of pictures in their own shape (NaFlex): give "
    "a SigLIP 2 checkpoint of a fixed size, whose model_type is siglip",
}
"""Classifiers that take no batch of images (N, C, H, W), and what they take."""

PICTURES = (103, 150), (159, 120), (131, 131)
"""Height and width of the pictures by which preparations are compared."""

CLOSE = 2.0
"""Mean difference in grey levels below which two preparations are the same; ``noise`` that is
shifted by a pixel, or resized another way, differs by 10 and more."""


def network_of_transformers(
    config: Mapping[str, Any], head: str, state: dict[str, Tensor], folder: Path
) -> Network:
    """The classifier that a configuration describes, with its weights. head: name of its class.
    Raises CheckpointError when it is no classifier of images, or weights are missing."""
    try:
        import transformers
        from transformers.models.auto import modeling_auto
    except ImportError as error:
        raise CheckpointError(
            f"{folder / CONFIG} describes a network of transformers, which cannot be imported "
            f"({first_sentence(error)}): pip install 'oodcli[hf]'"
        ) from error
    heads: set[str] = set()
    for each in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values():
        heads |= {each} if isinstance(each, str) else set(each)
    if head not in heads:
        raise CheckpointError(
            f"{folder / CONFIG} describes {head or 'no architecture'}, which is no classifier of "
            "images in transformers (…ForImageClassification): oodcli needs one"
        )
    if head in NO_IMAGES:
        raise CheckpointError(f"{folder / CONFIG} describes {head}, which {NO_IMAGES[head]}")
    with _apart():
        network, notes = _load(transformers, head, config, state, folder)
        inputs, reverse = _inputs(transformers, network, folder)
    if reverse:
        network.register_forward_pre_hook(_reverse_channels)
        notes.append(f"the network gets the channels in the order BGR, {inputs.size_source}")
    return Network(network, f"transformers:{head}", inputs, tuple(notes))


@contextmanager
def _apart() -> Iterator[None]:
    """Within it, transformers neither connects to a hub nor prints."""
    from huggingface_hub import constants
    from transformers.utils import logging

    offline, verbosity = constants.HF_HUB_OFFLINE, logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load(
    transformers: Any,
    head: str,
    config: Mapping[str, Any],
    state: dict[str, Tensor],
    folder: Path,
) -> tuple[nn.Module, list[str]]:
    """The network with its weights in float32, and sentences about weights that it does not use."""
    try:
        kind = transformers.CONFIG_MAPPING[config["model_type"]]
        network, report = getattr(transformers, head).from_pretrained(
            None,
            config=kind.from_dict(_plain(config)),
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
        )
    except OodcliError:
        raise
    except Exception as error:  # a damaged configuration can raise almost anything
        raise CheckpointError(
            f"{folder / CONFIG} and the weights beside it make no {head}: {first_sentence(error)}"
        ) from error
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise CheckpointError(
            f"{folder} lacks weights of {head}: {some_of(missing)} not in it, so it was saved "
            "without its classifier, or is incomplete"
        )
    unused = sorted(map(str, report["unexpected_keys"]))
    return network, [f"{some_of(unused)} not part of {head} and left out"] if unused else []


def _plain(value: Any) -> Any:
    """A configuration, and those within it, without the keys that are LEFT_OUT."""
    if not isinstance(value, Mapping):
        return value
    return {key: _plain(each) for key, each in value.items() if key not in LEFT_OUT}


def _reverse_channels(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].flip(1), *args[1:])


# --- how images are prepared --------------------------------------------------------------------


def _inputs(transformers: Any, network: nn.Module, folder: Path) -> tuple[Inputs, bool]:
    """What the image processor of a folder does, by what it makes of a few pictures; and whether
    it reverses the channels."""
    name = next((each for each in PROCESSORS if (folder / each).is_file()), None)
    if name is None:
        return _of_config(network), False
    where = folder / name
    said = read_json(where)
    said = said.get("image_processor", said)
    if not isinstance(said, dict) or "auto_map" in said:
        raise CheckpointError(
            f"{where} asks for Python code that comes with the checkpoint (auto_map), which oodcli "
            "does not run: give --input-size, --mean and --std, and move it away"
        )
    sides = _sides(said)
    if not sides <= set(range(1, LARGEST_SIDE + 1)) or not 0.05 <= _share(said) <= 1:
        raise CheckpointError(f"{where} asks for images of an impossible size: copy it again")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, backend="pil"
        )
        channels = 1 if getattr(network.config, "num_channels", 3) == 1 else 3
        return _measured(processor, sides, _share(said), channels, name)
    except OodcliError:
        raise
    except Exception as error:  # a damaged configuration can raise almost anything
        raise CheckpointError(
            f"{where} cannot be used by transformers ({first_sentence(error)}): correct it, or "
            "move it away and give --input-size, --mean and --std"
        ) from error


def _of_config(network: nn.Module) -> Inputs:
    """Without a processor: the size that the configuration names, the rest guessed."""
    size = getattr(getattr(network.config, "vision_config", network.config), "image_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        return guess_inputs(network, None)
    return replace(guess_inputs(network, sides), size_source="from config.json")


def _sides(value: Any) -> set[int]:
    """The lengths in a processor's configuration."""
    if not isinstance(value, dict):
        return {value} if isinstance(value, int) and not isinstance(value, bool) else set()
    found: set[int] = set()
    for key, each in value.items():
        if key in ("size", "crop_size", "pad_size") or "edge" in key or key in ("height", "width"):
            for number in each if isinstance(each, list) else [each]:
                found |= _sides(number)
    return found


def _share(said: Mapping[str, Any]) -> float:
    share = said.get("crop_pct")
    return float(share) if isinstance(share, int | float) else 1.0


def _measured(
    processor: Any, sides: set[int], share: float, channels: int, name: str
) -> tuple[Inputs, bool]:
    """What a processor does. It is tried, not only read: several have rules of their own. Of the
    resizes that its numbers allow, the one that gives the same pixels is it."""
    mean, std, reverse = _normalisation(processor, channels)
    pictures = [_noise(height, width, channels) for height, width in PICTURES]
    theirs = [_run(processor, picture) for picture in pictures]
    size = (theirs[-1].shape[1], theirs[-1].shape[2])
    method = getattr(processor, "resample", None)
    kinds = [kind for kind, value in INTERPOLATION.items() if method is None or value == method]
    shares = {1.0, share, 224 / 256}  # the last by LeViT's own rule
    lengths = sorted({math.floor(side / each) for side in sides for each in shares})
    resizes: list[Resize] = [None, *lengths, *product(lengths, lengths)]
    found = Inputs(
        *(size, mean, std),
        interpolation=kinds[0] if len(kinds) == 1 else "bilinear",
        size_source=f"from {name}",
        normalisation_source=f"from {name},",
    )
    far: list[tuple[float, Preprocessing]] = []
    for resize, kind, rounding in product(resizes, kinds, ("down", "even")):
        prep = Preprocessing(size, mean, std, resize, kind, crop_rounding=rounding)
        pairs = zip(pictures, theirs, strict=True)
        far.append((max(_difference(prep, *pair, reverse) for pair in pairs), prep))
        if far[-1][0] < CLOSE:
            found = replace(found, resize=resize, interpolation=kind, crop_rounding=rounding)
            return found, reverse
    if any(each.shape != theirs[0].shape for each in theirs):
        sentence = (
            f"{_kind(processor)} gives pictures of other shapes other sizes, and oodcli needs one: "
            f"give --crop center or --crop squash, for images of {size[0]}x{size[1]}, or another "
            "--input-size"
        )
        return replace(found, cannot={"resize": sentence}), reverse
    sentence = (
        f"{_kind(processor)} prepares images for this network in a way that oodcli cannot: say how "
        f"with --resize and --interpolation; {_options(min(far, key=itemgetter(0))[1])} is nearest"
    )
    return replace(found, cannot={"resize": sentence}), reverse


def _options(prep: Preprocessing) -> str:
    """Of a command, for that resize and interpolation."""
    sides = prep.resize or prep.input_size
    resize = sides if isinstance(sides, int) else f"{sides[0]}x{sides[1]}"
    return f"--resize {resize} --interpolation {prep.interpolation}"


def _kind(processor: Any) -> str:
    return f"transformers' {type(processor).__name__.removesuffix('Pil')}"


def _run(processor: Any, picture: Image.Image) -> NDArray[np.float64]:
    """The network's input, (C, H, W)."""
    found = processor(picture, return_tensors="np")["pixel_values"]
    return np.asarray(found, np.float64).reshape(found.shape[-3:])


def _normalisation(
    processor: Any, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Mean and standard deviation of pixels in [0, 1], and whether the channels are reversed: by
    what becomes of pictures of one colour."""

    def middle(*colour: int) -> NDArray[np.float64]:
        picture = Image.fromarray(np.full((64, 64, channels), colour, np.uint8).squeeze())
        found = _run(processor, picture)
        return found[:, found.shape[1] // 2, found.shape[2] // 2]

    black = middle(*(0,) * channels)
    gains = np.stack([middle(*row) - black for row in np.eye(channels, dtype=int) * 255])
    reverse = channels == 3 and not np.allclose(gains, np.diag(np.diag(gains)), atol=1e-6)
    if reverse:
        gains, black = gains[:, ::-1], black[::-1]
    gain = np.diag(gains)
    if not np.allclose(gains, np.diag(gain), atol=1e-6) or not (gain > 0).all():
        raise CheckpointError(
            f"{_kind(processor)} prepares colours in a way that oodcli cannot, or pads images: "
            "move its configuration away, and give --input-size, --mean, --std and --resize"
        )
    return _rounded(-black / gain), _rounded(1 / gain), reverse


def _rounded(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, ...]:
    """Without the digits that float32 does not hold: 0.485, not 0.48500001."""
    return tuple(float(f"{value:.6g}") + 0.0 for value in values)


def _noise(height: int, width: int, channels: int) -> Image.Image:
    """A picture in which every resize and crop shows."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (height // 4, width // 4, channels), dtype=np.uint8)
    return Image.fromarray(coarse.squeeze()).resize((width, height), Image.Resampling.BICUBIC)


def _difference(
    prep: Preprocessing, picture: Image.Image, theirs: NDArray[np.float64], reverse: bool
) -> float:
    """Between the pixels of a picture that a preparation gives and theirs: the mean, in grey
    levels."""
    if theirs.shape[1:] != prep.input_size:
        return math.inf
    scale, shift = (np.array(each)[:, None, None] for each in (prep.std, prep.mean))
    pixels = (theirs[::-1] if reverse else theirs) * scale + shift
    ours = fit(picture, prep).transpose(2, 0, 1)
    return float(np.abs(255 * pixels - ours).mean())
