"""Several batches at once on one processor, each by a thread of its own.

Small batches leave some of two cores idle: one thread takes only 1.4 times as long as two for a
step of ResNet-20 (docs/research/cost.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import count
from queue import SimpleQueue
from typing import TypeAlias, TypeVar

import torch

Result = TypeVar("Result")

Progress: TypeAlias = Callable[[int], None]

Job: TypeAlias = Callable[[int, Progress], Result]
"""Is called with the number of its thread, from 0, and with a callback for its progress."""


def side_by_side(
    jobs: Sequence[Job[Result]], workers: int, threads: int, progress: Progress
) -> Iterator[Result]:
    """The results, in order. workers: jobs at a time; threads: of torch, for each of them.
    ``progress`` is called in the caller's thread with what the jobs told. Raises what a job raised;
    jobs that run then, or when the caller stops, end when they next tell their progress."""
    told: SimpleQueue[int] = SimpleQueue()
    stopped = threading.Event()
    numbers, own = count(), threading.local()
    whole = torch.get_num_threads()

    def begin() -> None:
        own.number = next(numbers)
        torch.set_num_threads(threads)

    def tell(done: int) -> None:
        if stopped.is_set():
            raise CancelledError
        told.put(done)

    def run(job: Job[Result]) -> Result:
        return job(own.number, tell)

    pool = ThreadPoolExecutor(workers, "invert", begin)
    try:
        futures = [pool.submit(run, job) for job in jobs]
        for future in futures:
            future.add_done_callback(lambda _: told.put(0))
        for future in futures:
            while not future.done():
                progress(told.get())
            for _ in range(told.qsize()):
                progress(told.get())
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # first, so that no thread begins another
        stopped.set()
        pool.shutdown()
        torch.set_num_threads(whole)
