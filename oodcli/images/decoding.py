"""Decoding images one by one: where the caller is, or in processes that may hang or die."""

from __future__ import annotations

import math
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from oodcli.errors import ImagesError
from oodcli.images.pixels import Fitted, Load, Target, UnreadableError, fitted
from oodcli.images.source import Rows
from oodcli.images.words import unreadable_file
from oodcli.images.worker import Answer, Fault, Start, read_answer
from oodcli.networks.preprocessing import Preprocessing

LONGEST_TIMEOUT = 86400.0
"""Seconds. Sockets take a few weeks at most."""

SECONDS_TO_START = 60.0
TRIES_TO_START = 3
SECONDS_TO_END = 1.0
GRACE = 10.0
"""Seconds after its time by which a process ends of itself: whoever started it has been killed."""

LOST = (OSError, EOFError, ValueError)
"""What asking a process raises that has died, maybe in the middle of an answer, or that an image
has made to answer nonsense."""

LONGEST_TEXT = 1 << 20
"""Bytes of an answer that is no image."""

COMMAND = (
    "-P",  # nothing is imported from the working directory, where anything may lie
    "-c",
    "import sys; sys.path[:] = sys.argv[1:]; from oodcli.images.worker import main; main()",
)
"""Arguments of the interpreter; our own sys.path follows."""


@dataclass(frozen=True)
class Encoded:
    """Rows whose images are decoded one by one; a Decode. labels: (n,). loads: n."""

    labels: Tensor
    loads: Sequence[Load]

    def __call__(self, preprocessing: Preprocessing) -> Rows:
        return decode_rows(self.labels, self.loads, preprocessing)


def decode_rows(
    labels: Tensor,
    loads: Sequence[Load],
    preprocessing: Preprocessing,
    crew: Crew | None = None,
) -> Rows:
    """Decode and fit one image after another, in this thread or in a process. labels: (n,)."""
    errors: list[str | None] = []
    readable: list[NDArray[np.uint8]] = []
    dim: list[float] = []
    for load in loads:
        try:
            found = fitted(load, preprocessing) if crew is None else crew.decode(load)
            readable.append(found.pixels)
            errors.append(None)
            if found.dim is not None:
                dim.append(found.dim)
        except UnreadableError as reason:
            errors.append(str(reason))
    shape = (0, *preprocessing.input_size, preprocessing.channels)
    stacked = np.stack(readable) if readable else np.empty(shape, np.uint8)
    return Rows(labels, errors, torch.from_numpy(stacked), tuple(dim))


class Crew:
    """Processes for images that may hang or kill their decoder. They start when they are needed,
    as many as threads ask for an image at the same time, and end with the ``with``.

    Not multiprocessing's: those import the main module again, which may be anybody's script, and
    write to our standard error while they start. None is forked: we may have threads and a GPU.
    """

    def __init__(self, preprocessing: Preprocessing, timeout: float) -> None:
        """timeout: seconds for one image."""
        self._target = Target(*(getattr(preprocessing, name) for name in Target._fields))
        self._shape = (*preprocessing.input_size, preprocessing.channels)
        self._timeout = timeout
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._closed = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Does not wait for images: what is being decoded ends in a CancelledError."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for process in self._busy:
                process.kill()  # the thread that waits for it ends it
        for process in idle:
            process.end()

    def decode(self, load: Load) -> Fitted:
        """What ``fitted`` makes of an image.

        A process that dies is replaced and the image tried once more, as something else may have
        killed it; at the second time it was the image. Raises UnreadableError, also for an image
        that takes too long; ImagesError when no process can be started.
        """
        how = ""
        for take in (self._any, self._new):
            process = take()
            try:
                answer = process.ask(load, self._timeout, self._shape)
            except TimeoutError:
                self._end(process)
                raise UnreadableError(f"took longer than {self._timeout:g} s") from None
            except LOST:
                how = self._end(process)
                continue
            except BaseException:
                self._end(process)
                raise
            if isinstance(answer, Fault):
                self._end(process)
                raise RuntimeError(f"a process for decoding images failed:\n{answer.traceback}")
            self._give_back(process)
            if isinstance(answer, str):
                raise UnreadableError(answer)
            return answer
        raise UnreadableError(f"its decoder crashed ({how})")

    def _any(self) -> _Process:
        """One that waits for an image, or a new one."""
        while True:
            with self._lock:
                if not self._idle:
                    break
                process = self._idle.pop()
                self._busy.add(process)
            if process.runs():
                return process
            self._end(process)
        return self._new()

    def _new(self) -> _Process:
        reason = ""
        for _ in range(TRIES_TO_START):
            try:
                with self._lock:
                    if self._closed:
                        raise CancelledError
                    process = _Process()
                    self._busy.add(process)
            except OSError as error:
                reason = unreadable_file(error)
                continue
            start = Start(self._target, Image.MAX_IMAGE_PIXELS, self._timeout + GRACE)
            try:
                process.start(start)
                return process
            except TimeoutError:
                self._end(process)
                reason = f"it takes longer than {SECONDS_TO_START:g} s"
            except LOST:
                reason = self._end(process)
        raise ImagesError(
            f"a process for decoding images cannot be started ({reason}): leave out "
            "--timeout-per-image to decode without one"
        )

    def _give_back(self, process: _Process) -> None:
        with self._lock:
            self._busy.discard(process)
            if not self._closed:
                self._idle.append(process)
                return
        process.end()

    def _end(self, process: _Process) -> str:
        with self._lock:
            self._busy.discard(process)
        return process.end()


class _Process:
    """One process, and the socket to it. Raises OSError when there can be no more of them."""

    def __init__(self) -> None:
        with ExitStack() as files:
            self._stderr = files.enter_context(tempfile.TemporaryFile())  # why it did not start
            ours, theirs = socket.socketpair()
            self._socket = files.enter_context(ours)
            self._requests = files.enter_context(ours.makefile("wb"))
            self._answers = files.enter_context(ours.makefile("rb"))
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, *COMMAND, *sys.path],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    # Ctrl-C is not for it, and during Ctrl-Z it goes on, as the clock does.
                    process_group=0,
                )
            self._files = files.pop_all()

    def start(self, first: Start) -> None:
        """Waits until it is ready. Raises one of LOST; TimeoutError after SECONDS_TO_START."""
        self.ask(first, SECONDS_TO_START, ())
        self._stderr.close()

    def ask(self, request: Load | Start, timeout: float, shape: tuple[int, ...]) -> Answer:
        """Its answer. shape: of the pixels that may be asked for. Raises one of LOST; TimeoutError
        after so many seconds."""
        self._socket.settimeout(timeout)
        pickle.dump(request, self._requests, pickle.HIGHEST_PROTOCOL)
        self._requests.flush()
        answer = read_answer(self._answers, max(math.prod(shape), LONGEST_TEXT))
        if isinstance(answer, Fitted) and answer.pixels.shape != shape:
            raise ValueError(f"pixels of shape {answer.pixels.shape}")
        return answer

    def runs(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Whoever waits for its answer gets EOFError, even if the kernel holds the process."""
        self._process.kill()
        with suppress(OSError):  # it has gone
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self) -> str:
        """Kills it unless it is dead. Returns how it ended, or the last it said while it started.

        A process that the kernel holds, for a file system that hangs, is left behind: it dies when
        it is let go.
        """
        self.kill()
        how = "it cannot be killed"
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(SECONDS_TO_END)
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
        if not self._stderr.closed:
            self._stderr.seek(0)
            said = self._stderr.read().decode("utf-8", "backslashreplace").strip()
            how = said.splitlines()[-1] if said else how
        with suppress(OSError):  # of what could not be sent
            self._files.close()
        return how
