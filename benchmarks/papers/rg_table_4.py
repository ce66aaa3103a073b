"""RG, table 4: the energy's temperature."""

from __future__ import annotations

from itertools import pairwise

from benchmarks.papers.runs import Rows, Runs
from benchmarks.papers.table import Claim, Figures, Table, Verdict, listed

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
    at = f"T = {best.removeprefix('T = ')}"
    return best == "T = 1", f"{at}: {listed([figures.of(best), figures.of('T = 1')], 2)}"


def hot_is_bad(figures: Figures) -> Verdict:
    hot = [figures.of(name) for name in figures.rows if float(name.split(" = ")[1]) >= 2]
    return all(a >= b for a, b in pairwise(hot)), listed(hot)


TABLE = Table(
    paper="RG",
    place="table 4",
    about="`-p rg.T=…`, k = 1.",
    records=("rg",),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim("T = 1 is the best", "best T: AUROC there, AUROC at 1", one_is_best),
        Claim(
            "AUROC falls with every higher temperature from 2 on",
            f"AUROC at T = {', '.join(TEMPERATURES[2:])}",
            hot_is_bad,
        ),
    ),
)
