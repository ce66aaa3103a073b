"""What tests skip: where an optional package is missing, or by default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from samples import HAS_PARQUET

needs_parquet = pytest.mark.skipif(not HAS_PARQUET, reason="no pyarrow")

SUFFIXES = ["csv", "jsonl", pytest.param("parquet", marks=needs_parquet)]
"""Of files of scores."""


def one_in(many: int, cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test: one in so many cases by default, all in the slow tier."""
    return [
        case
        if place % many == 0
        else pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow)
        for place, case in enumerate(cases)
    ]
