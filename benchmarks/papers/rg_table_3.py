"""RG, table 3: where the embedding is clipped."""

from __future__ import annotations

from itertools import pairwise

from benchmarks.papers.runs import Runs
from benchmarks.papers.table import Claim, Figures, Rows, Table, Verdict

METRICS = ("fpr95", "auroc")
CLIPS = ("0.1", "0.3", "0.5", "0.7", "1", "2", "3", "5")
UNCLIPPED = "k = ∞"


def measure(runs: Runs) -> Rows:
    rows: Rows = {}
    for k in CLIPS:
        words = ["-d", "rg", "-p", f"rg.k={k}"]
        rows |= runs.compare(f"rg-table-3/{k}", words, runs.sets(), METRICS, {"rg": f"k = {k}"})
    words = ["-d", "energy-norm"]
    name = {"energy-norm": UNCLIPPED}
    return rows | runs.compare("rg-table-3/unclipped", words, runs.sets(), METRICS, name)


def _best(figures: Figures) -> str:
    return max(figures.rows, key=figures.of)


def peak_inside(figures: Figures) -> Verdict:
    values = [figures.of(name) for name in figures.rows]
    top = values.index(max(values))
    rising = all(a <= b for a, b in pairwise(values[: top + 1]))
    falling = all(a >= b for a, b in pairwise(values[top:]))
    holds = 0 < top < len(values) - 1 and rising and falling
    ends = f"{values[0]:.1f} and {values[-1]:.1f} at the ends"
    return holds, f"AUROC: {max(values):.1f} at {_best(figures)}, {ends}"


def below_one(figures: Figures) -> Verdict:
    best = _best(figures)
    return best in ("k = 0.5", "k = 0.7"), f"AUROC: best at {best}, {figures.said(best)}"


def clipping_helps(figures: Figures) -> Verdict:
    first, other = figures.of("k = 1"), figures.of(UNCLIPPED)
    said = f"k = 1 {figures.said('k = 1')}, unclipped {figures.said(UNCLIPPED)}"
    return first > other, f"AUROC: {said}"


TABLE = Table(
    paper="RG",
    place="table 3",
    about="`-p rg.k=…`; k = ∞ is `energy-norm`.",
    records=("rg", "energy-norm"),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim("There is one best k, and AUROC falls on both sides of it", peak_inside),
        Claim("The best k is 0.5 or 0.7", below_one),
        Claim("Clipping at 1 does better than none", clipping_helps),
    ),
)
