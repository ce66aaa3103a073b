"""LSGM, table 1."""

from __future__ import annotations

from benchmarks.papers.runs import Runs
from benchmarks.papers.table import Claim, Figures, Rows, Table, Verdict, listed, untested

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
    won = _won(figures, figures.sets())
    said = f" ({', '.join(won)})" if won else ""
    return 2 * len(won) > len(figures.sets()), (
        f"AUROC is the highest, or as high, on {len(won)} of {len(figures.sets())} sets{said}"
    )


def dominant_on_noise(figures: Figures) -> Verdict:
    found = {on: figures.of("lsgm", on=on) for on in NOISE}
    return min(found.values()) > 99, "AUROC: " + listed(f"{on} {v:.1f}" for on, v in found.items())


def best_on_real_sets(figures: Figures) -> Verdict:
    real = [on for on in figures.sets() if on not in NOISE]
    means = {n: sum(figures.of(n, on=on) for on in real) / len(real) for n in figures.rows}
    said = listed(f"`{name}` {value:.1f}" for name, value in means.items())
    return max(means, key=lambda name: means[name]) == "lsgm", f"mean AUROC without noise: {said}"


TABLE = Table(
    paper="LSGM",
    place="table 1",
    about="Nothing is tuned on OOD data: `odin` is at its usual settings, `mds` takes the last "
    "layer, `mds-sum` all stages with weight 1. `lsgm`, `mds` and `mds-sum` are fitted on training "
    "images and take spatial means. The paper's Generalized ODIN needs a network trained for it.",
    records=(*FREE, *FITTED),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim("LSGM has the best AUROC in most cases", best_in_most),
        Claim("LSGM finds noise almost without error (AUROC over 99)", dominant_on_noise),
        Claim("LSGM is the best on average over real sets", best_on_real_sets),
        Claim("LSGM is ahead of Generalized ODIN", untested("no network trained for it is here")),
    ),
    noise=NOISE,
)
