"""What the shell completes.

A script (see :mod:`.shells`) runs ``oodcli`` with the line up to the cursor in ``_OODCLI_LINE``.
What it gets back is a word a line, and after a tab what the word means, if there is something to
say. Files are the shell's own business, which knows of quotes and of ``~``: a word that ends with
``<files>`` asks for them. What stands before that was typed so far, without its quotes, and what
follows the tab are suffixes; ``/`` means folders only, ``=`` that the path begins after the ``=``.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

LINE = "_OODCLI_LINE"
FILES = "<files>"
CHECKPOINTS = (".pt", ".pth", ".th", ".bin", ".ckpt", ".safetensors", ".pt2")
SCORES = (".csv", ".jsonl", ".parquet")
FEATURES = (".h5", ".hdf5")
RECORDS = (
    "logits",
    "embedding",
    "layers.mean",
    "layers.std",
    "layers.gram",
    "layers.peak",
    "layers.gradient",
    "batchnorm.mean",
    "batchnorm.var",
    "odin.logits",
    "deconf.h",
    "mos.others",
)
NOISES = ("gaussian", "uniform", "rademacher", "blob")
"""Kept apart from the modules that know what to do with them, which take long to import."""

Complete = Callable[[str], list[str | tuple[str, str]]]
"""What was typed so far → words, or words and what they mean."""


def words(*known: str) -> Complete:
    """Always the same words."""

    def complete(incomplete: str) -> list[str | tuple[str, str]]:
        return [word for word in known if word.startswith(incomplete)]

    return complete


def files(*suffixes: str) -> Complete:
    """Folders, and files with these suffixes; without one, all files."""

    def complete(incomplete: str) -> list[str | tuple[str, str]]:
        # Typer's own scripts know nothing of this, and offer all files where we offer no word.
        return [(incomplete + FILES, " ".join(suffixes))] if LINE in os.environ else []

    return complete


def detectors_and_files(incomplete: str) -> list[str | tuple[str, str]]:
    """What ``-d`` takes."""
    return [*_detectors(incomplete), *files(".safetensors")(incomplete)]


def detectors_with_commas(incomplete: str) -> list[str | tuple[str, str]]:
    """What ``--for`` takes."""
    return _after_commas(incomplete, [name for name in _detectors("") if name != "all"])


def records_with_commas(incomplete: str) -> list[str | tuple[str, str]]:
    """What ``--record`` takes."""
    return [*_after_commas(incomplete, RECORDS), *words("all")(incomplete)]


def architectures_and_files(incomplete: str) -> list[str | tuple[str, str]]:
    """What ``--arch`` takes."""
    from oodcli.cli.options import complete_architectures

    names = complete_architectures(incomplete)
    return [*names, *([] if ":" in incomplete else files(".py")(incomplete))]


def scores_of_a_set(incomplete: str) -> list[str | tuple[str, str]]:
    """What ``--ood`` takes: NAME=FILE, of scores or, with ``--layers``, of features."""
    return files("=", *SCORES, *FEATURES)(incomplete) if "=" in incomplete else []


def images(incomplete: str) -> list[str | tuple[str, str]]:
    """What IMAGES can be: files, or ``noise:KIND``, ``torchvision:DATASET``."""
    scheme, colon, _ = incomplete.partition(":")
    if colon and scheme == "noise":
        return words(*(f"noise:{kind}" for kind in NOISES))(incomplete)
    if colon and scheme == "torchvision":
        return words(*(f"torchvision:{name}" for name in _datasets()))(incomplete)
    return [*words("noise:", "torchvision:")(incomplete), *files()(incomplete)]


def _after_commas(incomplete: str, known: Iterable[str]) -> list[str | tuple[str, str]]:
    """The last of several words; none that is there already."""
    before, comma, last = incomplete.rpartition(",")
    given = before.split(",")
    return [before + comma + word for word in known if word.startswith(last) and word not in given]


def _detectors(incomplete: str) -> list[str]:
    from oodcli.cli.options import complete_detectors

    return complete_detectors(incomplete)


def _datasets() -> list[str]:
    """torchvision's, without importing it."""
    spec = importlib.util.find_spec("torchvision")
    for folder in spec.submodule_search_locations or () if spec else ():
        text = Path(folder, "datasets", "__init__.py").read_text("utf-8")
        listed = re.search(r"^__all__ = (\(.*?\))", text, re.M | re.S)
        if listed:
            return sorted(name for name in ast.literal_eval(listed[1]) if not name[0].islower())
    return []


BY_METAVAR: Mapping[str, Complete] = {
    "CHECKPOINT": files(*CHECKPOINTS),
    "CHECKPOINT|CACHE.h5": files(*CHECKPOINTS, *FEATURES),
    "CACHE.h5": files(*FEATURES),
    "F.h5": files(*FEATURES),
    "SHARD": files(*FEATURES, *SCORES),
    "F.csv": files(".csv"),
    "F": files(*SCORES),
    "FILE": files(),
    "A,B,…|FILE": files(),
    "DIR": files("/"),
    "IMAGES": images,
    "NAME|FILE": detectors_and_files,
    "NAME,NAME": detectors_with_commas,
    "WORD,WORD": records_with_commas,
    "NAME=F": scores_of_a_set,
}
"""What is completed where the help says so."""

BY_NAME: Mapping[str, Complete] = {
    "arch": architectures_and_files,
    "card": files(".toml"),
    "crop": words("center", "squash"),
    "device": words("auto", "cpu", "cuda", "mps"),
    "exif": words("turn", "keep"),
    "interpolation": words("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"),
    "objective": words("kl", "paper", "deepinversion"),
    "output": files(),
    "precision": words("auto", "float32", "bfloat16"),
}
"""The same for parameters of these names that have no metavar."""


def completing(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command's parameters the completions of the two tables."""
    signature = inspect.signature(command, eval_str=True)
    for name, parameter in signature.parameters.items():
        for info in getattr(parameter.annotation, "__metadata__", ()):
            found = BY_METAVAR.get(info.metavar) if info.metavar else BY_NAME.get(name)
            info.autocompletion = found or info.autocompletion
    # Evaluated anew, the annotations would be as before.
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {
        name: parameter.annotation for name, parameter in signature.parameters.items()
    } | {"return": None}
    return command


def prepare() -> None:
    """Before typer completes: makes it ready, and without what nobody needs for that. Typer
    converts the values before the word to be completed and passes over what fails; nobody reads
    them, and pydantic, which converts them, takes longer than all the rest. Rich would break the
    lines of what words mean."""
    from typer.completion import completion_init  # type: ignore[attr-defined]

    for name in ("pydantic", "rich"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    completion_init()
    if LINE in os.environ:  # ours; of typer's answers, that for fish is the plainest
        os.environ["_OODCLI_COMPLETE"] = "complete_fish"
        os.environ["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
        os.environ["_TYPER_COMPLETE_ARGS"] = os.environ[LINE]
