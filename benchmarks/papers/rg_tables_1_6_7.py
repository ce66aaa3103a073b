"""RG, tables 1, 6 and 7: RG beside other detectors, on several networks."""

from __future__ import annotations

from benchmarks.papers.runs import Rows, Runs
from benchmarks.papers.table import Claim, Figures, Table, Verdict, listed, untested

METRICS = ("fpr95", "auroc")
FREE = ("msp", "energy", "odin", "energy-norm", "gradnorm", "rg")
FITTED = ("klm", "react", "mds", "knn")


def measure(runs: Runs) -> Rows:
    sets = runs.sets()
    output = "rg-tables-1-6-7"
    fitted = [word for name in FITTED for word in ("-d", name)]
    folder = runs.fit(f"{output}/real", runs.train(), *fitted, "-p", "react.c=1")
    words = [word for name in FREE for word in ("-d", name)]
    words += [word for name in FITTED for word in ("-d", f"{folder}/{name}.safetensors")]
    rows = runs.compare(output, words, sets, METRICS, {"react": "react, c = 1", "rg": "rg, k = 1"})
    for k in ("0.7", "0.5"):
        words = ["-d", "rg", "-p", f"rg.k={k}"]
        rows |= runs.compare(f"{output}/k-{k}", words, sets, METRICS, {"rg": f"rg, k = {k}"})
    return rows


def best(figures: Figures) -> Verdict:
    others = [name for name in figures.rows if not name.startswith("rg")]
    best = max(others, key=figures.of)
    ours, theirs = figures.of("rg, k = 1"), figures.of(best)
    return ours > theirs, listed([ours, theirs]) + f" (`{best}`)"


def against_gradnorm(figures: Figures) -> Verdict:
    return _ahead(figures, "gradnorm")


def against_knn(figures: Figures) -> Verdict:
    return _ahead(figures, "knn")


def _ahead(figures: Figures, name: str) -> Verdict:
    ours, theirs = figures.of("rg, k = 1"), figures.of(name)
    return ours > theirs, listed([ours, theirs])


def even(figures: Figures) -> Verdict:
    values = (
        [figures.of(name, on=on) for on in figures.sets()]
        for name in ("rg, k = 1", "energy", "gradnorm", "msp")
    )
    rg, *others = [max(each) - min(each) for each in values]
    return rg <= min(others), listed([rg, *others])


TABLE = Table(
    paper="RG",
    place="tables 1, 6 and 7",
    about="The paper's networks are for ImageNet. `energy-norm` is Conor Igoe in its tables. "
    "`klm`, `react`, `mds` and `knn` are fitted on training images.",
    records=(*FREE, *FITTED),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim(
            "RG has the best average AUROC of all",
            "AUROC of `rg` and of the best other",
            best,
        ),
        Claim("RG beats GradNorm", "AUROC of the two", against_gradnorm),
        Claim("RG beats kNN", "AUROC of the two", against_knn),
        Claim(
            "RG differs less from set to set than its rivals",
            "best minus worst set, AUROC: `rg`, `energy`, `gradnorm`, `msp`",
            even,
        ),
        untested("RG beats MOS", "we have no network trained for it"),
    ),
)
