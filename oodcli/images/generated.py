"""Images without a file of ours: noise, and torchvision's datasets."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from oodcli.errors import ImagesError
from oodcli.images.decoding import decode_rows
from oodcli.images.labels import UNKNOWN, Labels, match, unknown
from oodcli.images.pixels import Load, UnreadableError, load_file
from oodcli.images.source import Fetch, ImageSource, Rows
from oodcli.images.words import printable, unreadable_file
from oodcli.networks.preprocessing import Preprocessing

Pixels = NDArray[np.float64]


def gaussian(random: np.random.Generator, shape: tuple[int, int, int]) -> Pixels:
    """N(0.5, 1) a pixel and channel, clipped to [0, 1]. Returns shape = (C, H, W)."""
    return np.clip(random.normal(0.5, 1.0, shape), 0, 1)


def uniform(random: np.random.Generator, shape: tuple[int, int, int]) -> Pixels:
    """U[0, 1] a pixel and channel. Returns shape = (C, H, W)."""
    return random.random(shape)


def rademacher(random: np.random.Generator, shape: tuple[int, int, int]) -> Pixels:
    """0 or 1 with probability ½ each, a pixel and channel. Returns shape = (C, H, W)."""
    return random.integers(0, 2, shape).astype(np.float64)


def blob(random: np.random.Generator, shape: tuple[int, int, int]) -> Pixels:
    """Blobs with sharp edges (Hendrycks et al. 2019, Outlier Exposure): pixels that are 1 with
    probability 0.7, blurred by a Gaussian of σ = 1.5 over each channel's plane, then 0 where below
    0.75. Returns shape = (C, H, W)."""
    from scipy.ndimage import gaussian_filter

    ones = (random.random(shape) < 0.7).astype(np.float64)
    blurred: Pixels = gaussian_filter(ones, sigma=(0, 1.5, 1.5), mode="nearest")
    return np.where(blurred < 0.75, 0.0, blurred)


LEAVES = 300
"""Shapes of an image of dead leaves: enough that background is left on one pixel in a thousand."""

LEAF = (0.04, 0.4)
"""Smallest and largest radius of a leaf, in shorter sides of the image."""


def leaves(random: np.random.Generator, shape: tuple[int, int, int]) -> Pixels:
    """Dead leaves (Lee, Mumford and Huang 2001): discs, squares and diamonds of one colour each,
    every one upon those before it, with radii r of density r⁻³: edges, flat areas and occlusions as
    in photographs, without an object. Returns shape = (C, H, W)."""
    channels, height, width = shape
    smallest, largest = LEAF
    radii = random.uniform(largest**-2, smallest**-2, LEAVES) ** -0.5 * min(height, width)
    centres = random.random((LEAVES, 2)) * (height, width)
    kinds = random.integers(0, 3, LEAVES)
    colours = random.random((LEAVES + 1, channels, 1))
    found = np.broadcast_to(colours[-1, :, :, None], shape).copy()
    for radius, centre, kind, colour in zip(radii, centres, kinds, colours, strict=False):
        first = np.maximum(centre - radius, 0).astype(int)
        last = np.ceil(centre + radius).astype(int)
        part = found[:, first[0] : last[0], first[1] : last[1]]
        y, x = (
            np.abs(start + np.arange(extent) + 0.5 - middle)
            for start, extent, middle in zip(first, part.shape[1:], centre, strict=True)
        )
        far = (np.hypot, np.maximum, np.add)[kind](y[:, None], x)
        part[:, far < radius] = colour
    return found


def fractal(random: np.random.Generator, shape: tuple[int, int, int]) -> Pixels:
    """Gaussian noise whose amplitude falls with the spatial frequency as 1/f, as that of
    photographs does (Field 1987), with mean 0.5 and standard deviation 0.25, clipped to [0, 1];
    half of the variance is that of the grey image. Returns shape = (C, H, W)."""
    channels, height, width = shape
    white = random.normal(size=(channels + 1, height, width))
    mixed = white[:-1] + white[-1]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    pink = np.fft.irfft2(np.fft.rfft2(mixed) / frequency, s=(height, width))
    found: Pixels = np.clip(0.5 + 0.25 * pink / max(pink.std(), 1e-12), 0, 1)
    return found


NOISES: dict[str, Callable[[np.random.Generator, tuple[int, int, int]], Pixels]] = {
    "gaussian": gaussian,
    "uniform": uniform,
    "rademacher": rademacher,
    "blob": blob,
    "leaves": leaves,
    "fractal": fractal,
}


class Noise(ImageSource):
    """``KIND?n=2000&seed=0``: images of noise in [0, 1] at the network's input size.

    Every image has a generator of its own, seeded with (seed, row): an image does not depend on
    batch size or n, and nothing is kept, whatever n is.
    """

    grain = 32

    def __init__(self, name: str, rest: str) -> None:
        self.name = name
        kind, query = _parse(name, rest)
        if kind not in NOISES:
            raise ImagesError(f"{name}: the noise '{kind}' is not one of {', '.join(NOISES)}")
        _refuse_unknown(name, query, ("n", "seed"))
        self._kind = kind
        self._count = _number(name, query, "n", 2000, least=1)
        self._seed = _number(name, query, "seed", 0, least=0)

    def __len__(self) -> int:
        return self._count

    def paths(self, start: int, stop: int) -> list[str]:
        return [f"noise:{self._kind}[{row}]" for row in range(start, stop)]

    @contextmanager
    def reading(self) -> Iterator[Fetch]:
        yield lambda start, stop: partial(self._generate, start, stop)

    def _generate(self, start: int, stop: int, preprocessing: Preprocessing) -> Rows:
        shape = (preprocessing.channels, *preprocessing.input_size)
        pixels = np.empty((stop - start, *shape), np.float32)
        for row in range(start, stop):
            pixels[row - start] = NOISES[self._kind](
                np.random.default_rng((self._seed, row)), shape
            )
        count = stop - start
        return Rows(torch.full((count,), UNKNOWN), [None] * count, torch.from_numpy(pixels))


NO_KEYS = frozenset(
    ("self", "transform", "target_transform", "transforms", "loader", "is_valid_file", "extensions")
)
"""Parameters of datasets that no text can give."""


class TorchvisionImages(ImageSource):
    """``DATASET?root=…&split=…``: a dataset class of torchvision, the query as its arguments.

    Nothing is downloaded unless the query says ``download=true``. One thread reads the dataset,
    because datasets are written for processes of their own (FakeData reseeds torch's generator);
    resizing is parallel. Labels are known only where the dataset names its classes, and they are
    the network's.
    """

    labels_are_of_rows = False

    def __init__(self, name: str, rest: str, class_names: Sequence[str]) -> None:
        from torchvision import datasets

        self.name = name
        kind, query = _parse(name, rest)
        maker = getattr(datasets, kind, None) if kind in datasets.__all__ else None
        if not (inspect.isclass(maker) and issubclass(maker, datasets.VisionDataset)):
            raise ImagesError(
                f"{name}: torchvision has no dataset '{kind}': use a name from "
                "torchvision.datasets, such as CIFAR10"
            )
        parameters = _parameters(maker)
        _refuse_unknown(name, query, sorted(parameters))
        arguments = {key: _convert(text, parameters[key]) for key, text in query.items()}
        if "download" in parameters:  # some datasets download by default
            arguments.setdefault("download", False)
        try:
            self._dataset = cast(Any, maker(**arguments))
            self._count = len(self._dataset)
        except Exception as error:  # a dataset's own code, on the user's files
            raise ImagesError(
                f"{name}: the dataset cannot be opened ({unreadable_file(error)}): give its "
                "folder with root=FOLDER, or add download=true"
            ) from error
        if self._count == 0:
            raise ImagesError(f"{name} has no images")
        # torchvision's own loader forgets the EXIF block of some formats, and clips 16-bit grey.
        if getattr(self._dataset, "loader", None) is datasets.folder.default_loader:
            self._dataset.loader = load_file
        self._kind = kind
        classes = _classes(self._dataset)
        if classes:
            # Its numbers are those of a training with it, also where its classes are digits.
            what = "classes of the dataset"
            self.read_as(match(classes, class_names, what, own=True, certain=True))
        else:
            note = f"torchvision:{kind} does not name its classes: labels unknown"
            self.read_as(unknown(0, note))

    def __len__(self) -> int:
        return self._count

    def paths(self, start: int, stop: int) -> list[str]:
        return [f"torchvision:{self._kind}[{row}]" for row in range(start, stop)]

    @contextmanager
    def reading(self) -> Iterator[Fetch]:
        def fetch(start: int, stop: int) -> partial[Rows]:
            items = [self._item(row) for row in range(start, stop)]
            labels = torch.tensor([label for _, label in items], dtype=torch.int64)
            return partial(decode_rows, labels, [load for load, _ in items])

        yield fetch

    def _item(self, row: int) -> tuple[Load, int]:
        try:
            item = self._dataset[row]
        except Exception as error:  # a dataset's own code, on the user's files
            return partial(_image, unreadable_file(error)), UNKNOWN
        image, target = item[:2] if isinstance(item, tuple) and len(item) > 1 else (item, None)
        table = cast(Labels, self.known).values
        is_class = isinstance(target, int | np.integer) and 0 <= target < len(table)
        return partial(_image, image), int(table[int(target)]) if is_class else UNKNOWN


def _image(item: Any, least: int | None = None) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    raise UnreadableError(
        item if isinstance(item, str) else f"{type(item).__name__} is not an image"
    )


def _classes(dataset: Any) -> list[str]:
    """The names of a dataset's classes, in the order of its numbers; empty where it has none."""
    classes = [_class_name(entry) for entry in getattr(dataset, "classes", ())]
    if classes:
        return classes
    numbers = getattr(dataset, "class_to_idx", None)
    if not isinstance(numbers, dict):
        return []
    first = {number: str(name) for name, number in reversed(numbers.items())}  # of synonyms
    return [first[number] for number in sorted(first)] if set(first) == {*range(len(first))} else []


def _class_name(entry: Any) -> str:
    """ImageNet's classes are tuples of synonyms; the first is the name that weights come with."""
    return str(entry[0]) if isinstance(entry, tuple | list) and entry else str(entry)


def _parse(name: str, rest: str) -> tuple[str, dict[str, str]]:
    """``KIND?key=value&key=value``. Values are taken as typed: nothing is percent-decoded."""
    kind, _, query = rest.partition("?")
    pairs = [part.partition("=") for part in query.split("&") if part]
    for key, equals, _ in pairs:
        if not equals:
            raise ImagesError(f"{name}: '{printable(key)}' lacks a value: write {key}=VALUE")
    return kind, {key: value for key, _, value in pairs}


def _refuse_unknown(name: str, query: dict[str, str], known: Sequence[str]) -> None:
    for key in query:
        if key not in known:
            raise ImagesError(f"{name}: the key '{key}' is not one of {', '.join(known)}")


def _number(name: str, query: dict[str, str], key: str, default: int, least: int) -> int:
    text = query.get(key, str(default))
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
        raise ImagesError(f"{name}: {key}={text} must be an integer of at least {least}")
    return int(text)


def _parameters(maker: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class, and of its bases as long as each passes on what it is given."""
    found: dict[str, inspect.Parameter] = {}
    for kind in maker.__mro__:
        if "__init__" not in vars(kind):
            continue
        own = inspect.signature(vars(kind)["__init__"], eval_str=True).parameters
        found = {**own, **found}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
            break
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        key: parameter
        for key, parameter in found.items()
        if key not in NO_KEYS and parameter.kind not in variadic
    }


def _convert(text: str, parameter: inspect.Parameter) -> str | int | bool:
    """A value of the query: text where the argument is text (a year "2012"), else what it is."""
    if (
        parameter.annotation is str
        or isinstance(parameter.default, str)
        or parameter.name == "root"
    ):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else text
