"""The processes that torchrun has started for one job. They meet in its key-value store alone: no
tensor goes from one to another, so neither gloo nor nccl is needed."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from oodcli import notes
from oodcli.errors import OodcliError, first_line
from oodcli.jobs.shards import Share

log = logging.getLogger(__name__)

Listen = Callable[[int], None]
"""Raises what a signal has asked for: a progress callback, which is told of no progress."""


def _nobody(_: int) -> None:
    """Signals act at once."""


PATIENCE = 600.0
"""Seconds that processes may start after one another."""

POLL = 0.1
"""Seconds between two looks at the store; signals are heard in between."""


_stage: ContextVar[str] = ContextVar("_stage", default="")


@contextmanager
def stage(name: str) -> Iterator[None]:
    """While open, what a team says is about the stage of this name: for jobs of several stages,
    whose processes stay the same."""
    token = _stage.set(f"{name}/")
    try:
        yield
    finally:
        _stage.reset(token)


def launched() -> bool:
    """Whether torchrun has started this process, and others with it."""
    return "TORCHELASTIC_RUN_ID" in os.environ and _size() > 1


def local_rank() -> int:
    """Number of this process among those of its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class Store(Protocol):
    """What is needed of torch.distributed's."""

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool: ...

    def get(self, key: str) -> bytes: ...


@dataclass(frozen=True)
class Team:
    """Processes ``rank`` 0 to ``size`` - 1 of one job. Each stores the batches of its share in the
    same folder; the first one then writes the output from all of them."""

    rank: int
    size: int
    store: Store

    @classmethod
    def assemble(cls) -> Team | None:
        """Of the processes that torchrun has started; None where it has not, or just this one.
        Raises OodcliError when its store cannot be reached."""
        if not launched():
            return None
        from torch.distributed.rendezvous import rendezvous

        try:
            store, rank, size = next(rendezvous("env://"))
        except (RuntimeError, ValueError, OSError) as error:
            reason = first_line(error)
            raise OodcliError(f"the other processes of torchrun are out of reach: {reason}") from (
                error
            )
        team = cls(rank, size, store)
        team._call_the_roll()
        return team

    def _call_the_roll(self) -> None:
        """Raises OodcliError when the others do not come: a process of another program may have
        started this one, with torchrun's variables in its environment."""
        self.say(f"here/{self.rank}", True)
        keys = [_key(f"here/{rank}") for rank in range(self.size)]
        last = time.monotonic() + PATIENCE
        while not self.store.check(keys):
            if time.monotonic() > last:
                raise OodcliError(
                    f"torchrun has started {self.size} processes, but not all of them run this: "
                    "to start oodcli from within one of them, take TORCHELASTIC_RUN_ID out of "
                    "its environment"
                )
            time.sleep(POLL)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @staticmethod
    def first_try() -> bool:
        """Whether torchrun has not had to start them again."""
        return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    @property
    def share(self) -> Share:
        return Share(self.rank + 1, self.size)

    def agree(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the first process finds out, for all of them."""
        if self.leads:
            self.say(name, make())
        return dict(self.hear(name))

    def gather(self, listen: Listen) -> None:
        """In the first process: returns when every other one has done its share. In the others:
        says so of this one."""
        if not self.leads:
            self.say(f"done/{self.rank}", True)
            return
        for rank in range(1, self.size):
            self.hear(f"done/{rank}", listen)

    def say(self, name: str, value: Any) -> None:
        """value: what JSON can hold."""
        self.store.set(_key(name), json.dumps(value))

    def hear(self, name: str, listen: Listen = _nobody) -> Any:
        """What a process has said, once it has."""
        key = _key(name)
        while not self.store.check([key]):
            listen(0)
            time.sleep(POLL)
        return json.loads(self.store.get(key))


def _key(name: str) -> str:
    return f"oodcli/{_stage.get()}{name}"


def part_of(shard: str | None, images: str | None = None) -> tuple[Share, Team | None]:
    """The part of a job that ``--shard`` names, and the team that shares the job. Raises
    OodcliError when there are both, or when images are to be listed on a standard input that no
    process has."""
    share = Share.parse(shard)
    team = Team.assemble()
    if team is None:
        return share, None
    notes.rank(log, team.rank, team.size)
    if shard is not None:
        raise OodcliError(
            f"--shard {shard} is for jobs without a launcher: torchrun's processes share the work "
            "by themselves"
        )
    if images == "-":
        raise OodcliError(
            "-: torchrun's processes have no standard input of their own: give a file with the list"
        )
    return share, team
