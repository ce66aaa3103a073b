"""Parts of all pages: they need nothing else, neither a network nor a framework.

Everything that comes from a file is escaped. A browser is told, besides, to load nothing and to run
no script but ours (``Content-Security-Policy``).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_FOLDER = Path(__file__).parent


def render(template: str, styles: Sequence[str], scripts: Sequence[str], **values: Any) -> str:
    """A page of a template that extends ``base.html.jinja``. styles, scripts: names of files beside
    it; the scripts run as one."""
    import jinja2

    script = "".join(_text(name) for name in scripts)
    digest = encoded(hashlib.sha256(script.encode()).digest())
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        finalize=_utf8,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template(template).render(
        policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        style="".join(_text(name) for name in styles),
        script=script,
        **values,
    )


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _utf8(value: object) -> object:
    """What is no UTF-8 is spelt out."""
    if type(value) is not str:  # HTML, or a number
        return value
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def encoded(content: bytes) -> str:
    """base64"""
    return base64.b64encode(content).decode("ascii")


def jpeg(content: bytes) -> str:
    """An image as a data URL."""
    return f"data:image/jpeg;base64,{encoded(content)}"


def json_in_html(value: object) -> str:
    """JSON inside <script type="application/json">, which no text in it can end."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Cell(NamedTuple):
    """value: what a number is sorted by; a cell without it is sorted as text."""

    text: object
    value: str = ""
    interval: str = ""
    best: bool = False


TableRows = list[tuple[str, list[Cell]]]
"""Rows of a table, each with its heading."""


class Shown(NamedTuple):
    """One image. picture: a data URL, or empty."""

    path: str
    predicted: str
    score: float
    picture: str = ""
    p: str = ""
    why: str = ""


def shared_folder(paths: Sequence[str]) -> str:
    """The folder that all have in common, up to its slash; empty for a single path."""
    prefix = os.path.commonprefix(list(paths))  # noqa: RUF071, cut at a slash below
    return prefix[: prefix.rfind("/") + 1] if len(paths) > 1 else ""


def counted(things: int, word: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{things:,} {word}" + ("s" if things != 1 else "")


def origin(made: Mapping[str, Any]) -> str:
    """What is beside a scores file, as far as a reader of a page needs it."""
    words = {
        "command": "",
        "source": "images",
        "arch": "architecture",
        "checkpoint_sha256": "checkpoint SHA-256",
        "oodcli_version": "oodcli",
        "torch_version": "torch",
        "seed": "seed",
    }
    return "; ".join(f"{word} {made[key]}".strip() for key, word in words.items() if key in made)
