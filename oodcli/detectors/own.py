"""Detectors of the user's own: ``FILE.py:CLASS`` on the command line, a class in Python."""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from oodcli import detectors
from oodcli.detectors import serial
from oodcli.detectors.base import Detector
from oodcli.detectors.hyperparameters import hyperparameters
from oodcli.errors import DetectorError, OodcliError, first_line
from oodcli.features import Features
from oodcli.out_of_memory import ran_out
from oodcli.records import KNOWN_RECORDS

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")
"""A detector's name is a column of scores, a file's name, and NAME in ``-p NAME.KEY=VALUE``."""

RESERVED = ("all", "path", "label", "predicted", "confidence", "error")
"""Words with another meaning for ``-d`` or in the columns of scores."""


def find(word: str) -> type[Detector]:
    """The class that the user names: a built-in detector by its name, one of their own by
    ``FILE.py:CLASS``, whose code is run. Never to be given what a file says."""
    return load(word) if detectors.is_code(word) else detectors.get(word)


def load(word: str) -> type[Detector]:
    """Runs the code of ``FILE.py:CLASS`` and registers the class. Raises DetectorError when the
    file or the class is missing, the code fails, or the class is no detector."""
    file, colon, name = word.rpartition(":")
    if not colon or not name.isidentifier():
        raise DetectorError(f"{word}: name the class as well, as {file or word}:CLASS")
    path = Path(file)
    if not path.is_file():
        raise DetectorError(f"{word}: no file {file} (in {Path.cwd().name}/)")
    try:
        code = path.read_bytes()
    except OSError as error:
        raise DetectorError(f"{word}: {file} cannot be read ({error.strerror})") from error
    module = _run(word, path.resolve(), code)
    kind = vars(module).get(name)
    if not isinstance(kind, type):
        classes = [
            each
            for each, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        others = f": it has {', '.join(classes)}" if classes else ""
        raise DetectorError(f"{word}: {file} has no class '{name}'{others}")
    if any(own.kind is kind for own in detectors.loaded.values()):
        return kind
    found = register(kind, word, hashlib.sha256(code).hexdigest())
    _explain_failures(found, word, path.resolve())
    return found


def register(kind: type, origin: str = "", sha256: str = "") -> type[Detector]:
    """Makes a class known by its name, so that artefacts of it can be read. Raises DetectorError
    for a class that is no detector, or whose name another one has."""
    origin = origin or f"{kind.__module__}:{kind.__qualname__}"
    if not issubclass(kind, Detector):
        raise DetectorError(f"{origin} is not a detector: derive it from oodcli.Detector")
    fault = _fault(kind)
    if fault is not None:
        raise DetectorError(f"{origin}: {fault}")
    if kind.name in detectors.names():
        if detectors.get(kind.name) is kind:
            return kind
        raise DetectorError(
            f"{origin}: a built-in detector is called '{kind.name}': choose another name"
        )
    other = detectors.loaded.get(kind.name)
    if other is not None and other.origin != origin:
        raise DetectorError(
            f"{origin}: {other.origin} is also called '{kind.name}': choose another name"
        )
    detectors.loaded[kind.name] = detectors.Own(kind, origin, sha256)
    return kind


def _fault(kind: type[Detector]) -> str | None:
    """What a class lacks of a detector, and what to write."""
    if kind.__abstractmethods__:
        return f"write its method {', '.join(sorted(kind.__abstractmethods__))}"
    made = vars(kind).get("__dataclass_params__")
    if not is_dataclass(kind) or made is None or not made.frozen:
        return f"write @dataclass(frozen=True) above class {kind.__name__}"
    name, needs = getattr(kind, "name", None), getattr(kind, "needs", None)
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in RESERVED:
        return (
            f"its name is {name!r}, expected letters, digits, '-', '_' and '+', and none of "
            f"{', '.join(RESERVED)}"
        )
    if not isinstance(needs, set | frozenset):
        return (
            'it does not declare what it needs: write needs = frozenset({"logits"}), for instance'
        )
    unknown = sorted(needs - KNOWN_RECORDS, key=str)
    if unknown:
        records = ", ".join(sorted(KNOWN_RECORDS))
        return f"it needs {unknown[0]!r}, which cannot be recorded: expected some of {records}"
    if kind.fitted and kind.fit.__func__ is Detector.fit.__func__:
        return "it is fitted, but has no fit: write a classmethod fit(cls, train) that returns one"
    if not kind.fitted:
        for field in fields(kind):
            if field.default is MISSING and field.default_factory is MISSING:
                return (
                    f"its field '{field.name}' has no default: give it one, or say fitted = True "
                    "and write fit"
                )
    try:
        hyperparameters(kind)
    except (NameError, AttributeError, TypeError) as error:
        return f"{error}, in an annotation of its hyper-parameters"
    return serial.fault_of_fields(kind)


def _run(word: str, path: Path, code: bytes) -> ModuleType:
    """The module of a file, which is run once for each content that it has."""
    key = hashlib.sha256(str(path).encode() + b"\0" + code).hexdigest()[:16]
    name = f"oodcli_own_{key}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # where dataclasses look for what annotations name
    sys.path.insert(0, str(path.parent))  # it may import its neighbours
    try:
        exec(compile(code, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failed(word, path, error) from error
    finally:
        with suppress(ValueError):
            sys.path.remove(str(path.parent))
    return module


def _failed(word: str, path: Path, error: BaseException) -> DetectorError:
    lines = [
        each.lineno
        for each in traceback.extract_tb(error.__traceback__)
        if each.filename == str(path)
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    where = f"in line {line} " if line else ""
    said = first_line(error)
    reason = type(error).__name__ + (f": {said}" if said != type(error).__name__ else "")
    return DetectorError(f"{word} fails {where}with {reason}")


def _explain_failures(kind: type[Detector], word: str, path: Path) -> None:
    """Makes what fails in the user's methods one sentence with the line of their file, in place of
    a traceback."""

    def explained(method: Callable[..., Any], check: Callable[..., str | None]) -> Any:
        @wraps(method)
        def call(*args: Any, **settings: Any) -> Any:
            try:
                found = method(*args, **settings)
            except Exception as error:
                if isinstance(error, OodcliError) or ran_out(error):
                    raise
                raise _failed(word, path, error) from error
            fault = check(found, *args)
            if fault is not None:
                raise DetectorError(f"{word}: {method.__name__} returned {fault}")
            return found

        return call

    def scores(found: Any, _: Detector, test: Features) -> str | None:
        if isinstance(found, Tensor) and found.shape == (len(test),):
            return None
        what = (
            f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        )
        return f"{what} for {len(test)} rows, expected a tensor ({len(test)},)"

    def fitted(found: Any, *_: Any) -> str | None:
        if not isinstance(found, kind):
            return f"{type(found).__name__}, expected a {kind.__name__}"
        return serial.fault_of_values(found)

    own: Any = kind
    own._score = explained(kind._score, scores)
    if "fit" in vars(kind):
        own.fit = classmethod(explained(vars(kind)["fit"].__func__, fitted))
    for name in ("__post_init__", "contributions", "explain"):
        if name in vars(kind):
            setattr(own, name, explained(vars(kind)[name], lambda *_: None))
