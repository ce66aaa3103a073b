"""A table of a paper: how it is measured, and what the paper claims of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.papers.runs import Rows, Runs


@dataclass(frozen=True)
class Figures:
    """The rows of a table on one network."""

    rows: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]

    def of(self, method: str, metric: str = "auroc", on: str = "mean") -> float:
        return self.rows[method][on][metric][0]

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
"""Whether a claim holds, and its figures. None: it could not be tested, and why."""


@dataclass(frozen=True)
class Claim:
    """text: the claim in our words. figures: names the figures that ``test`` returns."""

    text: str
    figures: str
    test: Callable[[Figures], Verdict]


def untested(text: str, why: str) -> Claim:
    return Claim(text, "", lambda figures: (None, why))


@dataclass(frozen=True)
class Table:
    """about: how our measurement differs from the paper's. records: detectors whose features
    ``extract`` records. metrics: as ``evaluate`` names them. noise: kinds of noise among the OOD
    sets."""

    paper: str
    place: str
    about: str
    records: tuple[str, ...]
    metrics: tuple[str, ...]
    measure: Callable[[Runs], Rows]
    claims: tuple[Claim, ...]
    noise: tuple[str, ...] = ()


def listed(values: Iterable[float | tuple[float, ...]], digits: int = 1) -> str:
    """Figures separated by commas; those of a tuple by slashes."""
    groups = (value if isinstance(value, tuple) else (value,) for value in values)
    return ", ".join("/".join(f"{each:.{digits}f}" for each in group) for group in groups)


def mean_over_sets(rows: Rows) -> Rows:
    """Adds the set ``mean``: the plain mean of every metric over the sets, without an interval,
    for rows whose sets were not evaluated together."""
    for on in rows.values():
        metrics = next(iter(on.values())).keys()
        on["mean"] = {m: [round(sum(c[m][0] for c in on.values()) / len(on), 2)] for m in metrics}
    return rows
