"""From an image to the network's input: the numbers that say how."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from torch import Tensor

from oodcli.errors import CheckpointError

LARGEST_INPUT = 1 << 24

LARGEST_RESIZE = 1 << 14
"""Pixels, of an image and of a side; more is a damaged file."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")

EXIF = ("turn", "keep")

CROP_ROUNDING = ("even", "down")

DECODE = ("full", "fast")


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
    is the range of their type. crop_rounding: of half a pixel before the middle: even, as
    torchvision rounds, or down, as transformers does. decode: a large JPEG in full, or fast, at a
    half, a quarter or an eighth of its size where that is twice the resize. Raises CheckpointError
    where the numbers make no sense.
    """

    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = None
    interpolation: str = "bilinear"
    exif: str = "turn"
    image_range: tuple[float, float] | None = None
    crop_rounding: str = "even"
    decode: str = "full"

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
                "has such an input"
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
            ("crop_rounding", self.crop_rounding, CROP_ROUNDING),
            ("decode", self.decode, DECODE),
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
            crop_rounding=str(fields.get("crop_rounding", "even")),
            decode=str(fields.get("decode", "full")),
        )


def _resize(found: Any) -> Resize:
    if isinstance(found, list | tuple):
        return int(found[0]), int(found[1])
    return None if found is None else int(found)
