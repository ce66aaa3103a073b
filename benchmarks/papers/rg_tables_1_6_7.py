"""RG, tables 1, 6 and 7: RG beside other detectors, on several networks."""

from __future__ import annotations

from benchmarks.papers.runs import Runs
from benchmarks.papers.table import Claim, Figures, Rows, Table, Verdict, listed, untested

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
    ours = figures.of("rg, k = 1")
    return ours > figures.of(best), (
        f"AUROC {ours:.1f}, the best of the others {figures.of(best):.1f} (`{best}`); "
        f"FPR95 {figures.of('rg, k = 1', 'fpr95'):.1f} and {figures.of(best, 'fpr95'):.1f}"
    )


def against_gradnorm(figures: Figures) -> Verdict:
    return _ahead(figures, "gradnorm")


def against_knn(figures: Figures) -> Verdict:
    return _ahead(figures, "knn")


def _ahead(figures: Figures, name: str) -> Verdict:
    ours, theirs = figures.of("rg, k = 1"), figures.of(name)
    return ours > theirs, f"AUROC {ours:.1f} against {theirs:.1f}"


def even(figures: Figures) -> Verdict:
    spans = {
        name: max(v := [figures.of(name, on=on) for on in figures.sets()]) - min(v)
        for name in ("rg, k = 1", "energy", "gradnorm", "msp")
    }
    said = listed(f"`{name}` {value:.1f}" for name, value in spans.items())
    return min(spans, key=lambda n: spans[n]) == "rg, k = 1", f"AUROC, best less worst set: {said}"


TABLE = Table(
    paper="RG",
    place="tables 1, 6 and 7",
    about="The paper's networks are ImageNet's. `energy-norm` is what its tables call Conor Igoe. "
    "`klm`, `react`, `mds` and `knn` are fitted on training images. ID images are the positive "
    "class of FPR95. MOS needs a network trained for it.",
    records=(*FREE, *FITTED),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim("RG has the best average AUROC of all", best),
        Claim("RG is ahead of GradNorm", against_gradnorm),
        Claim("RG is ahead of kNN", against_knn),
        Claim("RG differs less from set to set than its rivals", even),
        Claim("RG is ahead of MOS", untested("no network trained for it is here")),
    ),
)
