"""LSGM, figure 6: a mixture on one layer, or the trace through all."""

from __future__ import annotations

from collections import Counter

from benchmarks.papers.lsgm_table_1 import fitted
from benchmarks.papers.runs import Rows, Runs
from benchmarks.papers.table import Claim, Figures, Table, Verdict, listed

METRICS = ("auroc",)
ALL = "all stages"


def measure(runs: Runs) -> Rows:
    sets = runs.sets()
    rows: Rows = {}
    for stage in runs.network.stages:
        output = f"lsgm-figure-6/{stage}"
        folder = runs.fit(output, runs.train(), "-d", "lsgm", "-p", f"lsgm.layers={stage}")
        words = ["-d", f"{folder}/lsgm.safetensors"]
        rows |= runs.compare(f"{output}/scores", words, sets, METRICS, {"lsgm": f"{stage} alone"})
    words = ["-d", f"{fitted(runs)}/lsgm.safetensors"]
    return rows | runs.compare("lsgm-figure-6/all", words, sets, METRICS, {"lsgm": ALL})


def _alone(figures: Figures) -> list[str]:
    return [name for name in figures.rows if name != ALL]


def layers_vary(figures: Figures) -> Verdict:
    names = _alone(figures)
    best = Counter(max(names, key=lambda n: figures.of(n, on=on)) for on in figures.sets())
    return len(best) > 1, ", ".join(str(best[name]) for name in names)


def trace_is_best(figures: Figures) -> Verdict:
    alone = [figures.of(name) for name in _alone(figures)]
    return figures.of(ALL) > max(alone), listed([*alone, figures.of(ALL)])


TABLE = Table(
    paper="LSGM",
    place="figure 6",
    about="A mixture on one stage (`-p lsgm.layers=…`), or LSGM on all stages. The figure prints "
    "no numbers.",
    records=("lsgm",),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim(
            "No single layer is the best for every set",
            "sets on which each stage is the best",
            layers_vary,
        ),
        Claim(
            "The trace through all layers beats each of them on average",
            "AUROC of each stage alone, of all",
            trace_is_best,
        ),
    ),
)
