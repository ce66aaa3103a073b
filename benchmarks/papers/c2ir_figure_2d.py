"""C2IR, figure 2d: weights of layers and channels, and where the means come from."""

from __future__ import annotations

from benchmarks.papers.runs import Rows, Runs
from benchmarks.papers.table import Claim, Figures, Table, Verdict, listed

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
    pairs = [(_mean(figures, each), _mean(figures, each, "batchnorm")) for each in WEIGHTS]
    return all(virtual > batchnorm for virtual, batchnorm in pairs), listed(pairs)


def mgi_wins(figures: Figures) -> Verdict:
    mgi, *others = [_mean(figures, each) for each in WEIGHTS]
    return mgi > max(others), listed([mgi, *others], 2)


def mgi_beats_some(figures: Figures) -> Verdict:
    mgi, *others = [_mean(figures, each) for each in ("mgi", "random", "penultimate")]
    return mgi > max(others), listed([mgi, *others])


TABLE = Table(
    paper="C2IR",
    place="figure 2d",
    about="Our `uniform` is the paper's mean. `batchnorm` uses the layers' running averages for "
    "every class. The figure prints no numbers.",
    records=("c2ir",),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim(
            "Virtual images beat BatchNorm's averages with any weights",
            "AUROC with virtual images/BatchNorm: MGI, uniform, random, penultimate",
            virtual_wins,
        ),
        Claim(
            "MGI beats random weights and the last layer alone",
            "AUROC of MGI, random, penultimate",
            mgi_beats_some,
        ),
        Claim(
            "MGI beats uniform weights",
            "AUROC of MGI, uniform, random, penultimate",
            mgi_wins,
        ),
    ),
)
