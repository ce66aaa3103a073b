"""LSGM, figure 5: how many components, or a Dirichlet process that finds out."""

from __future__ import annotations

from benchmarks.papers.lsgm_table_1 import fitted
from benchmarks.papers.runs import Runs
from benchmarks.papers.table import Claim, Figures, Rows, Table, Verdict, listed

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
    found = {name: figures.of(name) for name in _fixed(figures)}
    said = listed(f"{name} {value:.1f}" for name, value in found.items())
    return max(found.values()) - min(found.values()) < 3, f"AUROC: {said}"


def process_is_good(figures: Figures) -> Verdict:
    gaps = {
        on: max(figures.of(name, on=on) for name in _fixed(figures)) - figures.of(PROCESS, on=on)
        for on in figures.sets()
    }
    worst = max(gaps, key=lambda on: gaps[on])
    return gaps[worst] < 1, f"at most {gaps[worst]:.1f} points behind the best K ({worst})"


TABLE = Table(
    paper="LSGM",
    place="figure 5",
    about="AUROC with K Gaussian components in every layer (`-p lsgm.mixture=em`), and with a "
    "Dirichlet process of at most 50, the default. Our training images are fewer than the paper's "
    "50,000, which matters more the more components there are. The figure prints no numbers.",
    records=("lsgm",),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim("The number of components changes little (3 points, we say)", steady),
        Claim("The Dirichlet process is within a point of the best K everywhere", process_is_good),
    ),
)
