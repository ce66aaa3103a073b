"""What tests skip where an optional package is missing."""

from __future__ import annotations

import pytest
from samples import HAS_PARQUET

needs_parquet = pytest.mark.skipif(not HAS_PARQUET, reason="no pyarrow")

SUFFIXES = ["csv", "jsonl", pytest.param("parquet", marks=needs_parquet)]
"""Of files of scores."""
