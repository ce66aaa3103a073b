"""Options that several subcommands share."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from oodcli.cli.completions import complete_architectures, complete_detectors, words
from oodcli.errors import OodcliError

if TYPE_CHECKING:
    from oodcli.api import Checkpoint as GivenCheckpoint


Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Checkpoint: a .pt, .pth, .th, .bin, .safetensors, .pt2 or .onnx file, or a folder of "
        "Hugging Face.",
    ),
]
_IMAGES = typer.Argument(
    metavar="IMAGES",
    help="Images: a folder, a list of paths, an .npz, .tar or .zip file, the .h5 of invert, "
    "torchvision:DATASET?…, noise:KIND?…, or - for a list on standard input.",
)
Images = Annotated[str, _IMAGES]
OptionalImages = Annotated[str | None, _IMAGES]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart", help="Discard partial results. By default an interrupted job resumes."
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="N/OF",
        help="Part of the job to run, such as 3/64. 'oodcli merge' merges the parts.",
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout-per-image",
        metavar="SECONDS",
        min=0.001,
        max=86400,
        help="Time limit for decoding an image, in a separate process. An image that exceeds it "
        "or crashes the process becomes a row with an error.",
    ),
]


def _limit_pixels(most: int | None) -> int | None:
    """Pillow's limit is one for the process, so the core has no parameter for it."""
    if most is not None:
        from oodcli.api import limit_pixels

        limit_pixels(most)
    return most


MaxPixels = Annotated[
    int | None,
    typer.Option(
        "--max-pixels",
        metavar="N",
        min=1,
        callback=_limit_pixels,
        help="Largest image to decode, in pixels. Larger ones become rows with an error; Pillow's "
        "limit is 89478485.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors to stderr.")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Also print decisions and the time of each step to stderr."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]
Detectors = Annotated[
    list[str] | None,
    typer.Option(
        "--detector",
        "-d",
        metavar="NAME|FILE",
        help="Detector: a name, an artefact's path, or FILE.py:CLASS for your own; 'all' for every "
        "detector that needs no fitting. Repeatable.",
        autocompletion=complete_detectors,
    ),
]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        "-p",
        metavar="NAME.KEY=VALUE",
        help="Hyper-parameter of a detector, such as knn.k=20. Repeatable.",
    ),
]

verdict = partial(typer.Option, rich_help_panel="Verdicts")
MaxOodFraction = Annotated[
    float | None,
    verdict(
        metavar="SHARE",
        min=0,
        max=1,
        help="Gate: exit with 4 when any detector calls more than this share OOD. Images "
        "without a verdict, unreadable or left out count as OOD.",
    ),
]


def mirroring(usual: str) -> Any:
    """The option --mirror of inversion. usual: its default, for the help."""
    return typer.Option(
        help="Mirror images at random while inverting. Turn it off for classes that mirroring "
        "changes, such as text or left and right hands.",
        show_default=usual,
    )


_model = partial(typer.Option, rich_help_panel="Model (overrides the model card)")
_run = partial(typer.Option, rich_help_panel="Execution")


@dataclass(frozen=True)
class ModelOptions:
    """Options that describe a checkpoint, and those that say how to run it."""

    arch: Annotated[
        str | None,
        _model(
            help="Architecture: a built-in name, torchvision:NAME, timm:NAME or FILE.py:FACTORY. "
            "Append a retrained head: +mos:4,3,3, +deconf-cosine, +deconf-euclid or "
            "+deconf-inner.",
            autocompletion=complete_architectures,
        ),
    ] = None
    num_classes: Annotated[
        int | None, _model(min=2, help="Number of classes; must match the head.")
    ] = None
    input_size: Annotated[
        str | None, _model(metavar="H,W", help="Input height and width, or one number for both.")
    ] = None
    mean: Annotated[str | None, _model(metavar="R,G,B", help="Mean of pixels in [0, 1].")] = None
    std: Annotated[
        str | None, _model(metavar="R,G,B", help="Standard deviation of pixels in [0, 1].")
    ] = None
    resize: Annotated[
        str | None,
        _model(
            metavar="N|H,W",
            help="Size before the centre crop: the shorter side, or height and width.",
        ),
    ] = None
    interpolation: Annotated[
        str | None,
        _model(
            help="Filter of the resize: nearest, bilinear, bicubic, lanczos, box or hamming.",
            autocompletion=words("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"),
        ),
    ] = None
    crop: Annotated[
        str | None,
        _model(
            help="Crop: center resizes the shorter side, then crops the centre; squash resizes "
            "both sides.",
            autocompletion=words("center", "squash"),
        ),
    ] = None
    exif: Annotated[
        str | None,
        _model(
            help="EXIF orientation: turn rotates photographs upright (default); keep leaves them "
            "as stored.",
            autocompletion=words("turn", "keep"),
        ),
    ] = None
    image_range: Annotated[
        str | None,
        _model(metavar="LOW,HIGH", help="Values of black and white in images of more than 8 bits."),
    ] = None
    decode: Annotated[
        str | None,
        _model(
            help="JPEG decoding: full (default), or fast, at a half, a quarter or an eighth of the "
            "size of large photographs.",
            autocompletion=words("full", "fast"),
        ),
    ] = None
    class_names: Annotated[
        str | None,
        _model(metavar="A,B,…|FILE", help="Class names, or a file with one name per line."),
    ] = None
    multi_label: Annotated[
        bool,
        _model(
            "--multi-label",
            help="Each label has its own sigmoid: an image can have several labels, or none.",
        ),
    ] = False
    card: Annotated[
        Path | None, _model(help="Model card to use instead of the one beside CHECKPOINT.")
    ] = None
    layers: Annotated[
        str | None, _model(metavar="REGEX", help="Modules to record instead of blocks and stages.")
    ] = None
    state_key: Annotated[
        str | None,
        _model(
            metavar="KEY", help="Where the weights are in the file, such as net or ema.state_dict."
        ),
    ] = None
    ema: Annotated[bool, _model("--ema", help="Use averaged (EMA) weights.")] = False
    trust_pickle: Annotated[
        bool,
        _model(
            "--trust-pickle",
            help="Load a pickled module, or run code that the model card names. Either can run any "
            "code: use it only for files that you trust.",
        ),
    ] = False
    device: Annotated[
        str,
        _run(
            help="Device, such as cpu or cuda:1.",
            autocompletion=words("auto", "cpu", "cuda", "mps"),
        ),
    ] = "auto"
    batch_size: Annotated[int | None, _run(min=1, help="Images per batch.")] = None
    precision: Annotated[
        str | None,
        _run(
            help="float32, bfloat16, or auto: bfloat16 where the device multiplies it in hardware. "
            "Default: float32, auto for virtual images.",
            autocompletion=words("auto", "float32", "bfloat16"),
        ),
    ] = None
    seed: Annotated[int, _run(min=0, help="Random seed.")] = 0
    threads: Annotated[
        int | None,
        _run(min=1, help="Processor threads. Default: as many as this process may use."),
    ] = None

    def checkpoint(self, path: Path) -> GivenCheckpoint:
        """The checkpoint with its overrides. Raises OodcliError for a malformed option."""
        from oodcli.api import Checkpoint, Overrides

        overrides = Overrides(
            arch=self.arch,
            num_classes=self.num_classes,
            input_size=_pair(_size("--input-size", self.input_size)),
            mean=_numbers("--mean", self.mean),
            std=_numbers("--std", self.std),
            resize=_size("--resize", self.resize),
            interpolation=self.interpolation,
            crop=self.crop,
            exif=self.exif,
            decode=self.decode,
            image_range=_range(self.image_range),
            class_names=_names(self.class_names),
            layers=self.layers,
            card=self.card,
            state_key=self.state_key,
            multi_label=self.multi_label,
            names_file=_file(self.class_names),
        )
        return Checkpoint(path, overrides, self.ema, self.trust_pickle)

    def running(self) -> dict[str, Any]:
        """Keyword arguments of the functions of ``oodcli.api`` that say how to run. Limits the
        threads of this process."""
        from oodcli.api import limit_threads

        limit_threads(self.threads)
        names = ("device", "batch_size", "precision", "seed")
        return {name: getattr(self, name) for name in names}


_HINTS = get_type_hints(ModelOptions, include_extras=True)


def takes_model(command: Callable[..., None]) -> Callable[..., None]:
    """Adds an option for each field of ModelOptions to a command with a parameter ``model``."""
    own = inspect.signature(command, eval_str=True)
    extra = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=_HINTS[field.name],
        )
        for field in fields(ModelOptions)
    ]
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in own.parameters.values()
        if parameter.name != "model"
    ] + extra

    @wraps(command)
    def wrapper(**values: Any) -> None:
        model = ModelOptions(
            **{field.name: values.pop(field.name) for field in fields(ModelOptions)}
        )
        command(**values, model=model)

    wrapper.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {
        "return": None
    }
    return wrapper


def parameters(given: list[str] | None) -> dict[str, dict[str, str]]:
    """``c2ir.weights=uniform`` → {"c2ir": {"weights": "uniform"}}. Raises OodcliError."""
    found: dict[str, dict[str, str]] = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        name, dot, field = key.partition(".")
        if not (equals and dot and name and field):
            raise OodcliError(f"-p {text}: expected NAME.KEY=VALUE, such as energy.T=2")
        found.setdefault(name, {})[field] = value
    return found


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise OodcliError(f"{option} {text}: expected numbers separated by commas") from error


def _size(option: str, text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdecimal() for part in parts):
        raise OodcliError(f"{option} {text}: expected H,W or one number")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size


def _range(text: str | None) -> tuple[float, float] | None:
    numbers = _numbers("--image-range", text)
    if numbers is None:
        return None
    if len(numbers) != 2:
        raise OodcliError(f"--image-range {text}: expected two numbers, LOW,HIGH")
    return numbers[0], numbers[1]


def _file(text: str | None) -> Path | None:
    """The file that an option names; None for a list of names, which may be longer than a path."""
    return Path(text) if text is not None and os.path.isfile(text) else None


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    file = _file(text)
    if file is not None:
        from oodcli.api import read_class_names

        return read_class_names(file)
    names = tuple(name.strip() for name in text.split(","))
    if len(names) == 1:
        raise OodcliError(
            f"--class-names {text}: there is no such file; give the names with commas between, or "
            "a file with one name a line"
        )
    if not all(names):
        raise OodcliError(f"--class-names {text}: one of the names is empty")
    return names
