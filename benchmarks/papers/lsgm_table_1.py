"""LSGM, table 1."""

from __future__ import annotations

from benchmarks.papers.runs import Rows, Runs
from benchmarks.papers.table import Claim, Figures, Table, Verdict, listed, untested

METRICS = ("tnr95", "auroc", "aupr-in")
FREE = ("msp", "odin")
FITTED = ("mds", "mds-sum", "lsgm")
NOISE = ("gaussian", "rademacher", "blob")


def measure(runs: Runs) -> Rows:
    folder = fitted(runs)
    words = [word for name in FREE for word in ("-d", name)]
    words += [word for name in FITTED for word in ("-d", f"{folder}/{name}.safetensors")]
    return runs.compare("lsgm-table-1", words, runs.sets(NOISE), METRICS)


def fitted(runs: Runs) -> str:
    words = [word for name in FITTED for word in ("-d", name)]
    return runs.fit("lsgm-table-1/real", runs.train(), *words)


def _won(figures: Figures, sets: list[str]) -> list[str]:
    others = [name for name in figures.rows if name != "lsgm"]
    return [
        on
        for on in sets
        if figures.of("lsgm", on=on) >= max(figures.of(name, on=on) for name in others)
    ]


def best_in_most(figures: Figures) -> Verdict:
    won, sets = _won(figures, figures.sets()), figures.sets()
    return 2 * len(won) > len(sets), f"{len(won)} of {len(sets)}"


def dominant_on_noise(figures: Figures) -> Verdict:
    found = [figures.of("lsgm", on=on) for on in NOISE]
    return min(found) > 99, listed(found)


def best_on_real_sets(figures: Figures) -> Verdict:
    real = [on for on in figures.sets() if on not in NOISE]
    *others, lsgm = [
        sum(figures.of(name, on=on) for on in real) / len(real) for name in (*FREE, *FITTED)
    ]
    return lsgm > max(others), listed([*others, lsgm])


TABLE = Table(
    paper="LSGM",
    place="table 1",
    about="Nothing is tuned on OOD data: `odin` has its usual settings, `mds` uses the last layer, "
    "`mds-sum` all stages with weight 1. `lsgm`, `mds` and `mds-sum` are fitted on training images "
    "and use spatial means.",
    records=(*FREE, *FITTED),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim(
            "LSGM has the best AUROC in most cases",
            "sets with the highest AUROC, or as high",
            best_in_most,
        ),
        Claim(
            "LSGM finds noise almost without error (AUROC over 99)",
            f"AUROC on {', '.join(NOISE)}",
            dominant_on_noise,
        ),
        Claim(
            "LSGM is the best on average over real sets",
            "AUROC of `msp`, `odin`, `mds`, `mds-sum`, `lsgm`",
            best_on_real_sets,
        ),
        untested("LSGM beats Generalized ODIN", "we have no network trained for it"),
    ),
    noise=NOISE,
)
