"""RG, table 4: the energy's temperature."""

from __future__ import annotations

from itertools import pairwise

from benchmarks.papers.runs import Runs
from benchmarks.papers.table import Claim, Figures, Rows, Table, Verdict

METRICS = ("fpr95", "auroc")
TEMPERATURES = ("0.5", "1", "2", "4", "8", "16", "32", "64")


def measure(runs: Runs) -> Rows:
    rows: Rows = {}
    for t in TEMPERATURES:
        words = ["-d", "rg", "-p", f"rg.T={t}"]
        rows |= runs.compare(f"rg-table-4/{t}", words, runs.sets(), METRICS, {"rg": f"T = {t}"})
    return rows


def one_is_best(figures: Figures) -> Verdict:
    best = max(figures.rows, key=figures.of)
    return best == "T = 1", (
        f"AUROC: best at {best}, {figures.said(best)}; at T = 1 {figures.said('T = 1')}"
    )


def hot_is_bad(figures: Figures) -> Verdict:
    hot = [name for name in figures.rows if float(name.split(" = ")[1]) >= 2]
    falling = all(figures.of(a) >= figures.of(b) for a, b in pairwise(hot))
    return falling, f"AUROC: {hot[0]} {figures.of(hot[0]):.1f}, {hot[-1]} {figures.of(hot[-1]):.1f}"


TABLE = Table(
    paper="RG",
    place="table 4",
    about="`-p rg.T=…`, k = 1.",
    records=("rg",),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim("T = 1 is the best", one_is_best),
        Claim("AUROC falls with every higher temperature from 2 on", hot_is_bad),
    ),
)
