"""Jobs at once: their order, progress, errors and threads."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from oodcli.inversion.side_by_side import side_by_side


def ignore(_: int) -> None:
    pass


def test_results_come_in_order_and_progress_in_the_callers_thread():
    second_is_done = threading.Event()
    told = []

    def first(thread, tell):
        assert second_is_done.wait(60)  # so they do run at once
        tell(1)
        return "first", thread, torch.get_num_threads()

    def second(thread, tell):
        tell(10)
        second_is_done.set()
        return "second", thread, torch.get_num_threads()

    def hear(count: int) -> None:
        told.append((count, threading.get_ident()))

    before = torch.get_num_threads()
    found = list(side_by_side([first, second], 2, 3, hear))
    assert [name for name, *_ in found] == ["first", "second"]
    assert {thread for _, thread, _ in found} == {0, 1}
    assert {threads for *_, threads in found} == {3}
    assert torch.get_num_threads() == before
    assert sum(count for count, _ in told) == 11
    assert {thread for _, thread in told} == {threading.get_ident()}


def test_an_error_comes_after_the_results_before_it():
    def job(number, thread, tell):
        if number == 2:
            raise ValueError("the third")
        return number

    found = side_by_side([partial(job, number) for number in range(9)], 2, 1, ignore)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(found)


def test_jobs_end_when_the_caller_stops():
    """A job that goes on for ever, and one that has not begun."""
    began = []

    def for_ever(thread, tell):
        while True:
            tell(1)

    def never(thread, tell):
        began.append(thread)

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(side_by_side([for_ever, for_ever, never], 2, 1, interrupted))
    assert not began
    given_up = side_by_side([lambda *_: 1, for_ever, for_ever, never], 2, 1, ignore)
    assert next(given_up) == 1
    given_up.close()
    assert not began
    assert not [each for each in threading.enumerate() if each.name.startswith("invert")]
