"""LSGM, figure 6: a mixture on one layer, or the trace through all."""

from __future__ import annotations

from benchmarks.papers.lsgm_table_1 import fitted
from benchmarks.papers.runs import Runs
from benchmarks.papers.table import Claim, Figures, Rows, Table, Verdict, listed

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
    best = {on: max(_alone(figures), key=lambda n: figures.of(n, on=on)) for on in figures.sets()}
    said = listed(f"{on}: {name}" for on, name in best.items())
    return len(set(best.values())) > 1, f"best layer by set: {said}"


def trace_is_best(figures: Figures) -> Verdict:
    found = {name: figures.of(name) for name in figures.rows}
    said = listed(f"{name} {value:.1f}" for name, value in found.items())
    return found[ALL] > max(found[name] for name in _alone(figures)), f"AUROC: {said}"


TABLE = Table(
    paper="LSGM",
    place="figure 6",
    about="AUROC of a mixture on one stage (`-p lsgm.layers=…`), and of LSGM on all of them. The "
    "figure prints no numbers.",
    records=("lsgm",),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim("No single layer is the best for every set", layers_vary),
        Claim("The trace through all layers beats each of them on average", trace_is_best),
    ),
)
