"""RG, table 3: where the embedding is clipped."""

from __future__ import annotations

from itertools import pairwise

from benchmarks.papers.runs import Rows, Runs
from benchmarks.papers.table import Claim, Figures, Table, Verdict, listed

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
    return 0 < top < len(values) - 1 and rising and falling, listed(values)


def below_one(figures: Figures) -> Verdict:
    best = _best(figures)
    return best in ("k = 0.5", "k = 0.7"), best.removeprefix("k = ")


def clipping_helps(figures: Figures) -> Verdict:
    first, other = figures.of("k = 1"), figures.of(UNCLIPPED)
    return first > other, listed([first, other])


TABLE = Table(
    paper="RG",
    place="table 3",
    about="`-p rg.k=…`; k = ∞ is `energy-norm`.",
    records=("rg", "energy-norm"),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim(
            "There is one best k, and AUROC falls on both sides of it",
            f"AUROC at k = {', '.join(CLIPS)}, ∞",
            peak_inside,
        ),
        Claim("The best k is 0.5 or 0.7", "best k", below_one),
        Claim("Clipping at 1 beats no clipping", "AUROC at k = 1, ∞", clipping_helps),
    ),
)
