"""What runs in a process that decodes images one at a time, for ``decoding.Crew``. Without torch:
importing that would take the process seconds.

Requests come pickled through the socket that is its standard input, answers go back through it.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from oodcli.images.pixels import Load, Target, UnreadableError, fit


class Start(NamedTuple):
    """The first request. seconds: after so many on one image the process ends of itself."""

    target: Target
    most_pixels: int | None
    seconds: float


class Fault(NamedTuple):
    """An answer: a fault of the program, as its traceback."""

    traceback: str


def main() -> None:
    """Answers until the socket is closed, which it is when whoever started this has died.

    The first answer is None: ready. The answer to a Load is the pixels (H, W, C) uint8, or why
    there are none: a text if the image is at fault, a Fault if the program is.
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
        send(answers, None)
        while True:
            send(answers, _answer(requests, start))


def _answer(requests: IO[bytes], start: Start) -> NDArray[np.uint8] | str | Fault:
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
        return fit(load(), start.target)
    except UnreadableError as reason:
        return str(reason)
    except Exception:
        return Fault(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def send(stream: IO[bytes], message: Any) -> None:
    """Large arrays and bytes are not copied for it, as they would be by pickle.dumps."""
    pickle.dump(message, stream, pickle.HIGHEST_PROTOCOL)
    stream.flush()
