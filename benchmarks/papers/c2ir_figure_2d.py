"""C2IR, figure 2d: weights of layers and channels, and where the means come from."""

from __future__ import annotations

from benchmarks.papers.runs import Runs
from benchmarks.papers.table import Claim, Figures, Rows, Table, Verdict, listed

METRICS = ("auroc", "tnr95")
WEIGHTS = ("mgi", "uniform", "random", "penultimate")
STATISTICS = ("virtual", "batchnorm")


def measure(runs: Runs) -> Rows:
    rows: Rows = {}
    for seed in runs.config.seeds:
        for statistics in STATISTICS:
            for weights in WEIGHTS:
                output = f"c2ir-figure-2d/{weights}-{statistics}-{seed}"
                settings = {"weights": weights, "statistics": statistics, "seed": str(seed)}
                given = [w for k, value in settings.items() for w in ("-p", f"c2ir.{k}={value}")]
                folder = runs.fit(output, runs.virtual(seed), "-d", "c2ir", *given)
                words = ["-d", f"{folder}/c2ir.safetensors"]
                name = {"c2ir": f"{weights}, {statistics}, seed {seed}"}
                rows |= runs.compare(f"{output}/scores", words, runs.sets(), METRICS, name)
    return rows


def _mean(figures: Figures, weights: str, statistics: str = "virtual") -> float:
    return figures.over_seeds(f"{weights}, {statistics}")


def virtual_wins(figures: Figures) -> Verdict:
    pairs = {w: (_mean(figures, w), _mean(figures, w, "batchnorm")) for w in WEIGHTS}
    said = listed(f"{w} {first:.1f} against {other:.1f}" for w, (first, other) in pairs.items())
    return all(first > other for first, other in pairs.values()), f"AUROC: {said}"


def mgi_wins(figures: Figures) -> Verdict:
    found = {weights: _mean(figures, weights) for weights in WEIGHTS}
    said = listed(f"{weights} {value:.2f}" for weights, value in found.items())
    return found["mgi"] > max(found[w] for w in WEIGHTS[1:]), f"AUROC with virtual images: {said}"


def mgi_beats_some(figures: Figures) -> Verdict:
    found = {weights: _mean(figures, weights) for weights in WEIGHTS}
    said = listed(f"{w} {found[w]:.1f}" for w in ("mgi", "random", "penultimate"))
    return found["mgi"] > max(found["random"], found["penultimate"]), (
        f"AUROC with virtual images: {said}"
    )


TABLE = Table(
    paper="C2IR",
    place="figure 2d",
    about="The paper's mean is our uniform. `batchnorm` takes the layers' running averages for "
    "every class. The figure prints no numbers.",
    records=("c2ir",),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim("Virtual images beat BatchNorm's averages, whatever the weights", virtual_wins),
        Claim("MGI does better than random weights and than the last layer alone", mgi_beats_some),
        Claim("MGI does better than uniform weights, too", mgi_wins),
    ),
)
