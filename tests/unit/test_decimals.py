"""The fast text of numbers: the bytes of Python's, whatever the number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from oodcli.files import decimals


def in_python(table: np.ndarray) -> list[str]:
    return [",".join("" if math.isnan(x) else f"{x:.9g}" for x in row) for row in table.tolist()]


tables = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats() | st.floats(-1e10, 1e10) | st.integers(-(10**10), 10**10).map(float),
)


@given(tables)
@example(np.array([[-1.23456789e-100, 1.0], [0.5, -0.0]]))
@example(np.array([[999999999.4999999, 999999999.5, 1e9, 9.999999999e-5, 1e-4, 0.00099999999999]]))
def test_any_number_is_written_as_python_writes_it(table: np.ndarray) -> None:
    assert decimals.lines(table) == in_python(table)


@pytest.mark.parametrize("exponent", range(-7, 12))
def test_numbers_of_every_size_ends_and_halves(exponent: int) -> None:
    random = np.random.default_rng(exponent + 7)
    digits = random.integers(10**8, 10**9, 4000).astype(np.float64)
    some = [digits, np.nextafter(digits + 0.5, 0), digits + 0.5, np.nextafter(digits + 0.5, 1e10)]
    for power in range(1, 9):  # which end in zeros
        some.append(np.floor(digits / 10**power) * 10**power)
    numbers = np.concatenate(some) * 10.0 ** (exponent - 8)
    edges = 10.0**exponent * np.array([1, 1 - 1e-16, 1 - 1e-10, 1 - 4e-10, 1 - 6e-10, 1 + 1e-10])
    numbers = np.concatenate([numbers, edges])
    table = np.stack([numbers, -numbers, numbers.astype(np.float32)], axis=1)
    assert decimals.lines(table) == in_python(table)


def test_more_rows_than_are_worked_on_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decimals, "_CELLS", 7)
    table = np.random.default_rng(0).standard_normal((11, 3))
    table[4, 1], table[10, 0] = math.inf, math.nan
    assert decimals.lines(table) == in_python(table)
    assert decimals.lines(table[:0]) == []
    assert decimals.lines(table[:, :1]) == in_python(table[:, :1])
