"""What a table is, and which there are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.papers.runs import Runs

Cell = list[float]
"""A value with the ends of its interval, in percent, or a value alone."""

Rows = dict[str, dict[str, dict[str, Cell]]]
"""Method → OOD set, or ``mean`` → metric → cell."""


@dataclass(frozen=True)
class Figures:
    """The rows of a table on one network."""

    rows: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]

    def of(self, method: str, metric: str = "auroc", on: str = "mean") -> float:
        return self.rows[method][on][metric][0]

    def said(self, method: str, metric: str = "auroc") -> str:
        """The mean over sets, with its interval."""
        value, *ends = self.rows[method]["mean"][metric]
        return f"{value:.1f}" + (f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "")

    def seeds(self, method: str) -> list[str]:
        """The methods ``METHOD, seed N``."""
        return [name for name in self.rows if re.fullmatch(rf"{re.escape(method)}, seed \d+", name)]

    def over_seeds(self, method: str, metric: str = "auroc", on: str = "mean") -> float:
        names = self.seeds(method)
        return sum(self.of(name, metric, on) for name in names) / len(names)

    def sets(self) -> list[str]:
        first = next(iter(self.rows.values()))
        return [name for name in first if name != "mean"]


Verdict = tuple[bool | None, str]
"""Whether it holds (None: it could not be tested), and the figures that say so."""


@dataclass(frozen=True)
class Claim:
    """What a paper says of a table, in our words, and its test on one network's figures."""

    text: str
    test: Callable[[Figures], Verdict]


def untested(why: str) -> Callable[[Figures], Verdict]:
    return lambda figures: (None, why)


@dataclass(frozen=True)
class Table:
    """paper, place: what it is taken after. about: how ours is taken, for the page. records:
    detectors whose features must be recorded. metrics: as ``evaluate`` names them. noise: kinds of
    noise among the OOD sets. real: whether it needs training images, and virtual: or virtual
    ones."""

    paper: str
    place: str
    about: str
    records: tuple[str, ...]
    metrics: tuple[str, ...]
    measure: Callable[[Runs], Rows]
    claims: tuple[Claim, ...]
    noise: tuple[str, ...] = ()


TABLES: dict[str, str] = {
    "c2ir-table-1": "c2ir_table_1",
    "c2ir-table-2": "c2ir_table_2",
    "c2ir-figure-2d": "c2ir_figure_2d",
    "indicators-tables-4-5": "indicators_tables_4_5",
    "thinkback-table-1": "thinkback_table_1",
    "lsgm-table-1": "lsgm_table_1",
    "lsgm-figure-5": "lsgm_figure_5",
    "lsgm-figure-6": "lsgm_figure_6",
    "lsgm-figure-7": "lsgm_figure_7",
    "rg-tables-1-6-7": "rg_tables_1_6_7",
    "rg-table-2": "rg_table_2",
    "rg-table-3": "rg_table_3",
    "rg-table-4": "rg_table_4",
    "rg-table-5": "rg_table_5",
    "data-free": "data_free",
}
"""Name → the module that has it as TABLE."""


def get(name: str) -> Table:
    found: Any = import_module(f"benchmarks.papers.{TABLES[name]}")
    table: Table = found.TABLE
    return table


def listed(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def mean_over_sets(rows: Rows) -> Rows:
    """With the plain mean of every metric over the sets, without an interval, as ``mean``: for rows
    whose sets were not evaluated together."""
    for on in rows.values():
        metrics = next(iter(on.values())).keys()
        on["mean"] = {m: [round(sum(c[m][0] for c in on.values()) / len(on), 2)] for m in metrics}
    return rows
