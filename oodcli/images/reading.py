"""Reading in parallel and ahead of the network, in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from oodcli.classifier import Preprocessing
from oodcli.images.source import Batch, Fetch, ImageSource, Rows

BATCHES_AHEAD = 2
MOST_WORKERS = 8


def batches(
    source: ImageSource,
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int | None = None,
    *,
    start: int = 0,
) -> Generator[Batch, None, None]:
    """The rows of a source from ``start`` on, in order, ``batch_size`` at a time.

    One thread fetches bytes in input order, ``workers`` threads (as many as processors, at most 8)
    decode and resize them. Two batches wait ready, more only where they are so small that threads
    would idle: memory does not depend on the number of images. Closing the generator ends the
    threads and closes the files.

    Raises ImagesError when a file breaks off in the middle; any other exception is a fault in the
    program and is passed on.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    workers = workers or min(MOST_WORKERS, os.cpu_count() or 1)
    ahead = max(BATCHES_AHEAD, 2 * workers * source.grain // batch_size)
    pending: deque[Future[Batch]] = deque()
    with (
        source.reading() as fetch,
        ThreadPoolExecutor(1, "oodcli-fetch") as reader,
        ThreadPoolExecutor(workers, "oodcli-decode") as pool,
    ):
        try:
            for first in range(start, len(source), batch_size):
                last = min(first + batch_size, len(source))
                pending.append(_submit(source, preprocessing, first, last, fetch, reader, pool))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            reader.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)


def _submit(
    source: ImageSource,
    preprocessing: Preprocessing,
    first: int,
    last: int,
    fetch: Fetch,
    reader: ThreadPoolExecutor,
    pool: ThreadPoolExecutor,
) -> Future[Batch]:
    """Queue the rows [first, last). A task waits only for tasks queued before it, so that the pool
    cannot lock up, however few its threads are."""

    def read(start: int, stop: int) -> Future[Rows]:
        fetched = reader.submit(fetch, start, stop)
        return pool.submit(lambda: fetched.result()(preprocessing))

    parts = [
        read(start, min(start + source.grain, last)) for start in range(first, last, source.grain)
    ]
    return pool.submit(_assemble, source.paths(first, last), parts, preprocessing)


def _assemble(paths: list[str], parts: list[Future[Rows]], preprocessing: Preprocessing) -> Batch:
    rows = [part.result() for part in parts]
    pixels = rows[0].pixels if len(rows) == 1 else torch.cat([part.pixels for part in rows])
    if pixels.dtype == torch.uint8:
        pixels = pixels.permute(0, 3, 1, 2).float().div_(255)  # (M, C, H, W), channels last
    return Batch(
        paths=tuple(paths),
        labels=torch.cat([part.labels for part in rows]),
        errors=tuple(error for part in rows for error in part.errors),
        images=preprocessing.normalise(pixels),
    )
