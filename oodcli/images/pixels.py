"""One image file → the pixels for the network. Only this module uses Pillow."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from oodcli.images.words import unreadable_file

if TYPE_CHECKING:  # torch is not imported here, as processes that decode images do without it
    from oodcli.networks.preprocessing import Preprocessing

# fmt: off
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc",
    ".tga", ".ico", ".avif", ".heic", ".heif", ".hif", ".mpo",
))
"""Suffixes of images in folders and archives."""

RAW = (
    ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2",
    ".rwl", ".pef", ".srw", ".x3f", ".3fr", ".fff", ".iiq", ".erf", ".kdc", ".dcr", ".mrw", ".mef",
    ".mos", ".raw",
)
OTHER_PICTURES = (
    ".jxl", ".jxr", ".wdp", ".hdp", ".psd", ".psb", ".xcf", ".exr", ".hdr", ".pfm", ".dds", ".pcx",
    ".sgi", ".xbm", ".xpm", ".qoi", ".bpg", ".flif", ".pct", ".pict",
)
UNREADABLE = {
    **dict.fromkeys(RAW, "camera raw data: develop it"),
    **dict.fromkeys(OTHER_PICTURES, "in an unsupported image format: convert it"),
    **dict.fromkeys((".dcm", ".dicom"), "a DICOM file: export it"),
    **dict.fromkeys((".svg", ".svgz", ".wmf", ".emf"), "a vector drawing: render it"),
}
"""Suffixes of pictures that are rows, but cannot be read; the reason and the next step."""

TEXTS = frozenset((
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".md", ".rst", ".xml", ".yaml", ".yml",
    ".toml", ".ini", ".cfg", ".conf", ".log", ".html", ".htm", ".cls", ".lst", ".list", ".xmp",
    ".aae", ".sha256", ".md5", ".py", ".sh", ".ipynb",
))
TEXT_NAMES = frozenset(("thumbs.db", "readme", "license", "licence", "makefile"))
"""Files beside images that are plainly none; others may hold what a gate should see."""
NO_SUFFIX = "no suffix"
_SUFFIX = re.compile(r"\.(?=[0-9_-]*[a-z])[a-z0-9_-]{1,10}", re.ASCII)

RASTER = (
    "JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "TGA", "ICO",
    "AVIF",
)
# fmt: on
HEIF = "HEIF"
"""Pillow's name for HEIC and HEIF, once pillow-heif has told it of them."""
# Pillow looks at the content, not at the suffix. Of all it knows, only plain raster formats: an
# EPS named .png would run Ghostscript.
Image.init()
FORMATS = tuple(name for name in RASTER if name in Image.OPEN)
INTERPOLATION = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LARGEST_RESIZED = 1 << 25
"""Pixels of a resized image before its crop; above it only the crop is computed."""

FULL = {True: 65535.0, False: 1.0}
"""The highest value, of integers and of floating-point numbers."""

DIM = 16
"""An image of more than 8 bits is dim if no value is above the highest one divided by this."""

AT_ONCE = 1 << 20
"""Pixels that are scaled together: an image may have 10⁸."""


def limit_pixels(most: int | None) -> None:
    """Make this Pillow's limit against decompression bombs, in this process."""
    Image.MAX_IMAGE_PIXELS = most


def most_pixels() -> int | None:
    """Pillow's limit in this process; None where it was lifted."""
    return Image.MAX_IMAGE_PIXELS


class UnreadableError(Exception):
    """Reason why one image cannot be read: the text in its row's error."""


Load = Callable[..., Image.Image]
"""Decodes one image. Takes nothing, or ``least`` as ``decode`` does. Raises UnreadableError. Those
of an ``Encoded`` can be pickled."""


class Target(NamedTuple):
    """The part of a Preprocessing that ``fit`` needs; unlike that, it comes without torch."""

    input_size: tuple[int, int]
    channels: int
    resize: int | tuple[int, int] | None
    interpolation: str
    exif: str
    image_range: tuple[float, float] | None
    crop_rounding: str = "even"
    decode: str = "full"


class Fitted(NamedTuple):
    """pixels: (H, W, C). dim: the highest value of an image of more than 8 bits where that is so
    low that the pixels are nearly black, else None."""

    pixels: NDArray[np.uint8]
    dim: float | None


def refuse(reason: str, least: int | None = None) -> NoReturn:
    """A Load of an image that is known to be unreadable."""
    raise UnreadableError(reason)


def suffix_of(name: str) -> str:
    """The suffix in lower case."""
    return os.path.splitext(name)[1].lower()


def is_picture(name: str) -> bool:
    """Whether a file is a row, by its suffix: an image, or a picture that cannot be read."""
    suffix = suffix_of(name)
    return suffix in SUFFIXES or suffix in UNREADABLE


def is_text(suffix: str) -> bool:
    """Whether a file that is left out is plainly no picture. suffix: as ``left_out`` counts it."""
    return suffix in TEXTS or suffix in TEXT_NAMES


def kind_of_left_out(name: str) -> str:
    """What a file that is no row is counted as: its suffix, or its name where that says more.
    Empty for what is not counted: hidden files, and what oodcli writes on the way."""
    name = os.path.basename(name).lower()
    if name.startswith(".") or name.endswith(".partial"):
        return ""
    if name in TEXT_NAMES:
        return name
    suffix = suffix_of(name)
    if suffix and not _SUFFIX.fullmatch(suffix):  # "photo.0001", "Mr. Smith"
        return "other suffix"
    return suffix or NO_SUFFIX


def refuse_suffix(name: str) -> None:
    """Raises UnreadableError for a picture that cannot be read. Its content is not tried: Pillow
    would take raw data of a camera for a TIFF, and show the small preview in it."""
    suffix = suffix_of(name)
    if suffix in UNREADABLE:
        raise UnreadableError(f"{suffix} is {UNREADABLE[suffix]} to PNG, TIFF or JPEG first")


def load_file(path: str | Path, least: int | None = None) -> Image.Image:
    """Decode the image in a file; least: see ``decode``. Raises UnreadableError, also for what is
    not a regular file: a pipe would wait for ever, a device never end."""
    refuse_suffix(str(path))
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableError("not a regular file")
        with open(path, "rb") as stream:
            return decode(stream, least)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UnreadableError(unreadable_file(error)) from error


def load_bytes(encoded: bytes, least: int | None = None) -> Image.Image:
    """Decode an image that has been read; least: see ``decode``. Raises UnreadableError."""
    return decode(io.BytesIO(encoded), least)


def decode(stream: IO[bytes], least: int | None = None) -> Image.Image:
    """The first frame of an image, as stored. Raises UnreadableError for data that is not an image,
    damaged, truncated, or larger than Pillow's limit against decompression bombs.

    least: pixels. A JPEG is decoded at a half, a quarter or an eighth of its size where its shorter
    side keeps that many, by libjpeg's scaling in the DCT domain; None is the full size.
    """
    try:
        formats = (*FORMATS, HEIF) if _is_heif(stream) and heif_is_read() else FORMATS
        with Image.open(stream, formats=formats) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise UnreadableError(
                    f"{image.width}x{image.height} pixels, more than Pillow's limit of {limit} "
                    "(a decompression bomb?): --max-pixels raises the limit"
                )
            if least is not None:
                image.draft(None, (least, least))  # does nothing for other formats
            image.load()
            return image
    except UnreadableError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableError(f"{unreadable_file(error)} --max-pixels raises the limit") from error
    except UnidentifiedImageError as error:  # its text has an address in memory
        reason = "not an image, or damaged"
        if stream.seek(0, os.SEEK_END) == 0:
            reason = "empty file"
        elif _is_heif(stream) and not heif_is_read():
            reason = "HEIC needs pillow-heif: pip install 'oodcli[heic]', or convert it to JPEG"
        raise UnreadableError(reason) from error
    except Exception as error:  # on damaged files Pillow's decoders raise almost anything
        raise UnreadableError(f"damaged image: {unreadable_file(error)}") from error


_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
"""Kinds of an ISO base media file that are HEIF (ISO/IEC 23008-12, annex B)."""


def _is_heif(stream: IO[bytes]) -> bool:
    """By the first of its bytes; the stream is at its beginning afterwards."""
    stream.seek(0)
    head = stream.read(32)
    stream.seek(0)
    # An AVIF may name mif1 first, and itself among the compatible brands after that.
    return head[4:8] == b"ftyp" and head[8:12] in _BRANDS and b"avif" not in head[16:]


@cache
def heif_is_read() -> bool:
    """Whether pillow-heif is there, which is imported when the first such image comes."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF block says; unchanged when that block is damaged."""
    try:
        method = ORIENTATIONS.get(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # a damaged EXIF block does not spoil the pixels
        return image
    return image if method is None else image.transpose(method)


def colours(
    image: Image.Image, channels: int, image_range: tuple[float, float] | None = None
) -> Image.Image:
    """The image as 8-bit RGB, or grey for one channel. Raises UnreadableError.

    Alpha is dropped, as Pillow's ``convert("RGB")`` and torchvision's loader do: what a network
    was trained on. Grey of more than 8 bits is scaled to 0…255 from image_range and clipped;
    without it, integers from 0…65535 and floating-point numbers from [0, 1]: other ranges would
    have to be guessed. CMYK is converted without a colour profile.
    """
    if is_deep(image):
        image = Image.fromarray(_eight_bits(np.asarray(image), image_range))
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    if "transparency" in image.info:  # of a palette: Pillow would warn, and drop it all the same
        image = image.copy()
        del image.info["transparency"]
    premultiplied = {"RGBa": "RGBA", "La": "LA"}
    if image.mode in premultiplied:
        image = image.convert(premultiplied[image.mode])
    try:
        return image.convert(mode)
    except ValueError as error:
        raise UnreadableError(f"colour mode {image.mode} cannot be converted to {mode}") from error


def is_deep(image: Image.Image) -> bool:
    """Whether the image has grey levels of more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def dim(image: Image.Image) -> float | None:
    """The highest value of an image of more than 8 bits where that is above 0 and at most a
    sixteenth of the range of its type: pictures of 12 bits in 16, for example. Else None."""
    if not is_deep(image):
        return None
    values = np.asarray(image)
    highest = float(values.max())
    full = FULL[values.dtype.kind != "f"]
    return highest if 0 < highest <= full / DIM else None


def _eight_bits(values: NDArray[Any], image_range: tuple[float, float] | None) -> NDArray[np.uint8]:
    """Grey levels → 0…255, rounded. Pillow holds 16-bit grey in 16- or 32-bit integers."""
    if np.isnan(values.min()):
        raise UnreadableError("floating-point pixels that are not numbers (NaN)")
    whole = values.dtype.kind != "f"
    low, high = (0.0, FULL[whole]) if image_range is None else image_range
    if image_range is None and not (values.min() >= low and values.max() <= high):
        kind, limits = ("32-bit", "0…65535") if whole else ("floating-point", "[0, 1]")
        raise UnreadableError(
            f"{kind} pixels outside {limits}: save them as 8 or 16 bits, or give --image-range "
            "LOW,HIGH"
        )
    flat = values.reshape(-1)
    scaled = np.empty(flat.shape, np.uint8)
    for start in range(0, len(flat), AT_ONCE):
        part = flat[start : start + AT_ONCE].astype(np.float64)
        np.clip(part, low, high, out=part)
        part -= low
        part *= 255 / (high - low)
        scaled[start : start + AT_ONCE] = np.rint(part, out=part)
    return scaled.reshape(values.shape)


def fit(image: Image.Image, preprocessing: Preprocessing | Target) -> NDArray[np.uint8]:
    """The pixels (H, W, C) at the network's input size, C = preprocessing.channels.

    The same as torchvision's Resize and CenterCrop on a Pillow image (antialiased). Raises
    UnreadableError when the colour mode cannot be converted.
    """
    if preprocessing.exif == "turn":
        image = upright(image)
    image = colours(image, preprocessing.channels, preprocessing.image_range)
    height, width = preprocessing.input_size
    method = INTERPOLATION[preprocessing.interpolation]
    if preprocessing.resize is None:
        if image.size != (width, height):
            image = image.resize((width, height), method)
    else:
        resized = _resized(image.size, preprocessing.resize)
        down = preprocessing.crop_rounding == "down"
        image = _resize_and_crop(image, resized, height, width, method, down=down)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def fitted(load: Load, preprocessing: Preprocessing | Target) -> Fitted:
    """Decode and fit. Raises UnreadableError."""
    image = load(_least(preprocessing)) if preprocessing.decode == "fast" else load()
    unsaid = preprocessing.image_range is None
    return Fitted(fit(image, preprocessing), dim(image) if unsaid else None)


def _least(preprocessing: Preprocessing | Target) -> int:
    """Pixels that the shorter side of an image needs for a good resize: twice those after it, as in
    Pillow's ``thumbnail``."""
    resize = preprocessing.resize
    return 2 * (resize if isinstance(resize, int) else max(resize or preprocessing.input_size))


def _resized(size: tuple[int, int], resize: int | tuple[int, int]) -> tuple[int, int]:
    """Width and height after the resize of an image of that width and height."""
    if not isinstance(resize, int):
        return resize[1], resize[0]
    longer = int(resize * max(size) / min(size))
    return (resize, longer) if size[0] <= size[1] else (longer, resize)


def _resize_and_crop(
    image: Image.Image,
    resized: tuple[int, int],
    height: int,
    width: int,
    method: Image.Resampling,
    *,
    down: bool,
) -> Image.Image:
    left, top = _before(resized[0], width, down), _before(resized[1], height, down)
    crop = (left, top, left + width, top + height)
    if resized[0] * resized[1] > LARGEST_RESIZED:
        return _cropped_alone(image, resized, crop, method)
    if image.size != resized:
        image = image.resize(resized, method)
    return image if image.size == (width, height) else image.crop(crop)


def _before(length: int, wanted: int, down: bool) -> int:
    """Where the middle of a side begins; below 0 where a black border is added. down: half a pixel
    is rounded down, not to an even number."""
    if length < wanted:
        return -((wanted - length) // 2)
    return (length - wanted) // 2 if down else round((length - wanted) / 2)


def _cropped_alone(
    image: Image.Image,
    resized: tuple[int, int],
    crop: tuple[int, int, int, int],
    method: Image.Resampling,
) -> Image.Image:
    """The crop of an image that is not resized as a whole: a strip of 1x100,000 pixels would become
    one of 256x25,600,000. It differs from the crop of the whole by rounding only (one grey level in
    few pixels)."""
    seen = [max(edge, 0) if i < 2 else min(edge, resized[i - 2]) for i, edge in enumerate(crop)]
    scale = (image.width / resized[0], image.height / resized[1])
    box = [min(edge * scale[i % 2], image.size[i % 2]) for i, edge in enumerate(seen)]
    size = (seen[2] - seen[0], seen[3] - seen[1])
    part = image.resize(size, method, box=(box[0], box[1], box[2], box[3]))
    left, top = seen[0] - crop[0], seen[1] - crop[1]
    return part.crop((-left, -top, crop[2] - crop[0] - left, crop[3] - crop[1] - top))
