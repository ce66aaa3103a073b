"""The same command resumes after a fault in any write, and gives the same bytes."""

from __future__ import annotations

import pytest
from faults import Process, check_resumes, every, first_middle_last

NOISE = "noise:uniform?n=9"
JOBS = {
    "invert": ("invert net.pt --per-class 3 --batch-size 3 --steps 1 -o v.h5", first_middle_last),
    "extract": (
        f"extract net.pt {NOISE} --batch-size 3 --record logits,embedding -o f.h5",
        every,
    ),
    "score": (f"score net.pt {NOISE} --batch-size 3 -d energy -d msp -o s.csv", first_middle_last),
    "score jsonl": (
        f"score net.pt {NOISE} --batch-size 3 -d energy --threshold split -o s.jsonl",
        first_middle_last,
    ),
    "score over an old file": (
        f"score net.pt {NOISE} --batch-size 3 -d msp --force -o old.csv",
        first_middle_last,
    ),
    "score a cache": ("score c.h5 -d energy -o s.parquet", first_middle_last),
}
"""Command, and the changes of the disk at which it is interrupted."""


@pytest.fixture(scope="module")
def process():
    with Process() as found:
        yield found


@pytest.mark.parametrize("name", JOBS)
def test_a_job_resumes_after_a_fault_in_a_write(small, process, tmp_path, name):
    command, where = JOBS[name]
    check_resumes(process, command, small, tmp_path, where)
