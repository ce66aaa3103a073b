"""Reading in parallel and ahead of the network, in bounded memory."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch

from oodcli.images.decoding import LONGEST_TIMEOUT, Crew, Encoded, decode_rows
from oodcli.images.source import Batch, Decode, Fetch, ImageSource, Rows
from oodcli.networks.devices import processors
from oodcli.networks.preprocessing import Preprocessing

log = logging.getLogger(__name__)

BATCHES_AHEAD = 2
BYTES_AHEAD = 1 << 28
"""Bytes fetched and not yet decoded: an archive of a few kilobytes can unpack to any size."""

MOST_WORKERS = 32


def batches(
    source: ImageSource,
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    timeout: float | None = None,
) -> Generator[Batch, None, None]:
    """The rows [start, stop) of a source, in order, ``batch_size`` at a time; by default all.

    One thread fetches bytes in input order, ``workers`` threads (as many as this process has
    processors, at most 32) decode and resize them: Pillow lets go of the interpreter's lock for
    that, so that processes would gain nothing. Two batches wait ready, more only where they are so
    small that threads would idle, and of large files at most 256 MB: memory does not depend on the
    number of images. Closing the generator ends the threads and closes the files.

    timeout: seconds for one image to be read and decoded. Where it is given, a source's
    ``Encoded`` images are decoded in processes, one to a thread: an image that takes longer, or
    that twice kills its decoder, is a row with an error. Closing the generator kills them.

    Raises ImagesError when a file breaks off in the middle, or when no process can be started; any
    other exception is a fault in the program and is passed on.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if timeout is not None and not 0 < timeout <= LONGEST_TIMEOUT:
        raise ValueError(f"timeout={timeout} must be above 0 and at most {LONGEST_TIMEOUT:g} s")
    workers = workers or min(MOST_WORKERS, processors())
    end = len(source) if stop is None else min(stop, len(source))
    ahead = max(BATCHES_AHEAD, 2 * workers * source.grain // batch_size)
    pending: deque[Future[Batch]] = deque()
    dim: list[float] = []
    room = _Room()

    def next_one() -> Batch:
        batch = pending.popleft().result()
        dim.extend(batch.dim)
        return batch

    with (
        source.reading() as fetch,
        ThreadPoolExecutor(1, "oodcli-fetch") as reader,
        ThreadPoolExecutor(workers, "oodcli-decode") as pool,
        nullcontext() if timeout is None else Crew(preprocessing, timeout) as crew,
    ):
        try:
            for first in range(start, end, batch_size):
                last = min(first + batch_size, end)
                pending.append(
                    _submit(source, preprocessing, first, last, fetch, reader, pool, room, crew)
                )
                if len(pending) > ahead:
                    yield next_one()
            while pending:
                yield next_one()
            note_dim(dim)
        finally:
            room.close()
            reader.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)


DEPTHS = (255, 1023, 4095)
"""Highest values of 8, 10 and 12 bits, which are often stored in 16 or 32."""


def note_dim(highest: Sequence[float]) -> None:
    """Warns, once, of images of more than 8 bits that are nearly black. highest: the highest value
    of each; whole numbers, or fractions where the image has floating-point numbers."""
    whole = [value for value in highest if value >= 1]
    fractions = [value for value in highest if value < 1]
    if whole:
        _warn(len(whole), "16 or 32 bits", next(top for top in DEPTHS if top >= max(whole)))
    if fractions:
        top = math.ceil(1000 * max(fractions)) / 1000
        _warn(len(fractions), "floating-point numbers", top)


def _warn(count: int, kind: str, top: float) -> None:
    what = f"1 image of {kind} has" if count == 1 else f"{count} images of {kind} have"
    log.warning(
        f"{what} no value above {top:g}, so {'it looks' if count == 1 else 'they look'} nearly "
        f"black: give --image-range 0,{top:g}"
    )


class _Room:
    """Limits the bytes that are fetched and not yet decoded."""

    def __init__(self) -> None:
        self._used = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until there is room, or no other thread holds any."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not self._used or self._used + size <= BYTES_AHEAD
            )
            self._used += size

    def give(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Wake every waiting thread: decoding may have been cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _submit(
    source: ImageSource,
    preprocessing: Preprocessing,
    first: int,
    last: int,
    fetch: Fetch,
    reader: ThreadPoolExecutor,
    pool: ThreadPoolExecutor,
    room: _Room,
    crew: Crew | None,
) -> Future[Batch]:
    """Queue the rows [first, last). A task waits only for tasks queued before it, so that the pool
    cannot lock up, however few its threads are."""

    def read(start: int, stop: int) -> Future[Rows]:
        size = source.weight(start, stop)

        def fetch_with_room() -> Decode:
            room.take(size)
            return fetch(start, stop)

        def decode() -> Rows:
            try:
                found = fetched.result()
                if isinstance(found, Encoded):
                    return decode_rows(found.labels, found.loads, preprocessing, crew)
                return found(preprocessing)
            finally:
                room.give(size)

        fetched = reader.submit(fetch_with_room)
        return pool.submit(decode)

    parts = [
        read(start, min(start + source.grain, last)) for start in range(first, last, source.grain)
    ]
    return pool.submit(_assemble, source.paths(first, last), parts, preprocessing)


def _assemble(paths: list[str], parts: list[Future[Rows]], preprocessing: Preprocessing) -> Batch:
    return assembled(paths, [part.result() for part in parts], preprocessing)


def assembled(paths: list[str], rows: list[Rows], preprocessing: Preprocessing) -> Batch:
    """Decoded rows, at least one part of them, together as the network takes them."""
    pixels = rows[0].pixels if len(rows) == 1 else torch.cat([part.pixels for part in rows])
    if pixels.dtype == torch.uint8:
        pixels = pixels.permute(0, 3, 1, 2).float().div_(255)  # (M, C, H, W), channels last
    return Batch(
        paths=tuple(paths),
        labels=torch.cat([part.labels for part in rows]),
        errors=tuple(error for part in rows for error in part.errors),
        images=preprocessing.normalise(pixels),
        dim=tuple(value for part in rows for value in part.dim),
    )
