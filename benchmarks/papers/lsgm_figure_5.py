"""LSGM, figure 5: how many components, or a Dirichlet process that finds out."""

from __future__ import annotations

from benchmarks.papers.lsgm_table_1 import fitted
from benchmarks.papers.runs import Rows, Runs
from benchmarks.papers.table import Claim, Figures, Table, Verdict, listed

METRICS = ("auroc",)
COMPONENTS = (10, 25, 50, 100, 200)
PROCESS = "Dirichlet process"


def measure(runs: Runs) -> Rows:
    sets = runs.sets()
    words = ["-d", f"{fitted(runs)}/lsgm.safetensors"]
    rows = runs.compare("lsgm-figure-5/dp", words, sets, METRICS, {"lsgm": PROCESS})
    for count in COMPONENTS:
        output = f"lsgm-figure-5/{count}"
        given = ["-p", "lsgm.mixture=em", "-p", f"lsgm.components={count}"]
        folder = runs.fit(output, runs.train(), "-d", "lsgm", *given)
        words = ["-d", f"{folder}/lsgm.safetensors"]
        name = {"lsgm": f"K = {count}"}
        rows |= runs.compare(f"{output}/scores", words, sets, METRICS, name)
    return rows


def _fixed(figures: Figures) -> list[str]:
    return [name for name in figures.rows if name != PROCESS]


def steady(figures: Figures) -> Verdict:
    found = [figures.of(name) for name in _fixed(figures)]
    return max(found) - min(found) < 3, listed(found)


def process_is_good(figures: Figures) -> Verdict:
    gaps = {
        on: max(figures.of(name, on=on) for name in _fixed(figures)) - figures.of(PROCESS, on=on)
        for on in figures.sets()
    }
    worst = max(gaps, key=lambda on: gaps[on])
    return gaps[worst] < 1, f"{gaps[worst]:.1f} ({worst})"


TABLE = Table(
    paper="LSGM",
    place="figure 5",
    about="K Gaussian components in every layer (`-p lsgm.mixture=em`), or a Dirichlet process of "
    "at most 50 (default). We fit on 10,000 training images, the paper on 50,000, which matters "
    "most with many components. The figure prints no numbers.",
    records=("lsgm",),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim(
            "The number of components changes little (3 points, our number)",
            f"AUROC at K = {', '.join(map(str, COMPONENTS))}",
            steady,
        ),
        Claim(
            "The Dirichlet process is within a point of the best K everywhere",
            "largest gap to the best K, points of AUROC",
            process_is_good,
        ),
    ),
)
