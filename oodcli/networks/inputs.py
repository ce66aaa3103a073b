"""Preprocessing for a network: from options, the model card, and defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from oodcli.errors import CheckpointError
from oodcli.networks import architectures
from oodcli.networks.architectures import Inputs
from oodcli.networks.card import Overrides
from oodcli.networks.preprocessing import Preprocessing, Resize

CROPS = ("center", "squash")


def preprocessing_of(
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
    rounding = "even" if resize is None else default.crop_rounding
    limits, decode = given["image_range"], given["decode"] or "full"
    found = Preprocessing(size, mean, std, resize, interpolation, exif, limits, rounding, decode)
    _require_unit_scale(mean, std)
    return found, assumed


_PREPARING = ("input_size", "mean", "std", "interpolation", "exif", "image_range", "decode")


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
    """Whether an image may be smaller than the crop after the resize."""
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


def guess_inputs(network: nn.Module, size: tuple[int, int] | None = None) -> Inputs:
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


def of_ultralytics(content: Any) -> Inputs:
    """As its ``classify_transforms`` prepares pictures. content: a checkpoint of its trainer, whose
    ``train_args`` have the input's size."""
    args = content.get("train_args") if isinstance(content, Mapping) else None
    side = args.get("imgsz") if isinstance(args, Mapping) else None
    side = side if type(side) is int else 224
    source = "of Ultralytics' classifiers"
    return Inputs((side, side), (0.0,) * 3, (1.0,) * 3, side, "bilinear", source, source)
