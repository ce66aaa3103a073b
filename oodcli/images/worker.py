"""What runs in a process that decodes images one at a time, for ``decoding.Crew``. Without torch:
importing that would take the process seconds.

Requests come pickled through the socket that is its standard input. Answers go back through it as
plain bytes: an image may have taken this process over, and shall not get further.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import socket
import struct
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

from oodcli.images.pixels import DIM, FULL, Fitted, Load, Target, UnreadableError, fitted


class Start(NamedTuple):
    """The first request. seconds: after so many on one image the process ends of itself."""

    target: Target
    most_pixels: int | None
    seconds: float


class Fault(NamedTuple):
    """An answer: a fault of the program, as its traceback."""

    traceback: str


Answer = Fitted | str | Fault
"""The pixels; or why there are none: a text if the image is at fault, else a Fault."""

_FRAME = struct.Struct("<cIIId")
"""Before an answer: what it is, the shape of its bytes, and the ``dim`` of pixels, NaN for None."""


def write_answer(stream: IO[bytes], answer: Answer) -> None:
    """What ``read_answer`` reads. Large arrays are not copied."""
    if isinstance(answer, Fitted):
        dim = math.nan if answer.dim is None else answer.dim
        stream.write(_FRAME.pack(b"P", *answer.pixels.shape, dim))
        stream.write(np.ascontiguousarray(answer.pixels).data)
    else:
        kind, text = (b"F", answer.traceback) if isinstance(answer, Fault) else (b"T", answer)
        words = text.encode("utf-8", "backslashreplace")
        stream.write(_FRAME.pack(kind, len(words), 1, 1, math.nan) + words)
    stream.flush()


def read_answer(stream: IO[bytes], most: int) -> Answer:
    """most: bytes that it may have. Raises EOFError when it breaks off, ValueError when it is
    none."""
    kind, *shape, dim = _FRAME.unpack(_exactly(stream, _FRAME.size))
    size = math.prod(shape)
    if kind not in (b"P", b"F", b"T") or size > most:
        raise ValueError(f"an answer {kind!r} of {size} bytes")
    data = _exactly(stream, size)
    if kind == b"P":
        pixels = np.frombuffer(data, np.uint8).reshape(shape)
        return Fitted(pixels, dim if 0 < dim <= FULL[True] // DIM else None)
    text = data.decode("utf-8", "replace")
    return Fault(text) if kind == b"F" else text


def _exactly(stream: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        view = view[count:]
    return data


def main() -> None:
    """Answers until the socket is closed, which it is when whoever started this has died.

    The first answer is an empty text: ready.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this
    with suppress(OSError):  # where memory runs out, the kernel should rather end this, not that
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
    # OSError: whoever started this has gone without reading the last answer.
    with socket.socket(fileno=0) as connection, suppress(EOFError, OSError):
        requests, answers = connection.makefile("rb"), connection.makefile("wb")
        start: Start = pickle.load(requests)
        Image.MAX_IMAGE_PIXELS = start.most_pixels
        # Start-up is over: nobody reads what libraries say of damaged images.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        write_answer(answers, "")
        while True:
            write_answer(answers, _answer(requests, start))


def _answer(requests: IO[bytes], start: Start) -> Answer:
    """To the next request. Raises EOFError or OSError when there is none."""
    try:
        load: Load = pickle.load(requests)
    except (EOFError, OSError):
        raise
    except Exception:  # what only the main module has, for one
        return Fault(traceback.format_exc())
    # Unlike a thread, it also ends a decoder that keeps the interpreter's lock.
    signal.setitimer(signal.ITIMER_REAL, start.seconds)
    try:
        return fitted(load, start.target)
    except UnreadableError as reason:
        return str(reason)
    except Exception:
        return Fault(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
