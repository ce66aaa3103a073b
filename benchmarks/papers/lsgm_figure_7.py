"""LSGM, figure 7: time by the number of components, and by the number of layers."""

from __future__ import annotations

import math
import re
import statistics

from benchmarks.papers.runs import Rows, Runs
from benchmarks.papers.table import Claim, Figures, Table, Verdict, listed

METRICS = ("fit, s", "score, s")
COMPONENTS = (50, 100, 150, 200, 250)
AT = 50
ROUNDS = 3


def measure(runs: Runs) -> Rows:
    stages = runs.network.stages
    rows: Rows = {}
    for count in COMPONENTS:
        rows |= _timed(runs, f"m = {len(stages)}, K = {count}", len(stages), count)
    for layers in range(1, len(stages)):
        rows |= _timed(runs, f"m = {layers}, K = {AT}", layers, AT)
    return rows


def _timed(runs: Runs, name: str, layers: int, components: int) -> Rows:
    output = f"lsgm-figure-7/{layers}-{components}"
    chosen = "|".join(runs.network.stages[:layers])
    given = ["-p", "lsgm.mixture=em", "-p", "lsgm.covariance=diag"]
    given += ["-p", f"lsgm.components={components}", "-p", f"lsgm.layers={chosen}"]
    folder = runs.fit(output, runs.train(), "-d", "lsgm", *given)
    words = ["-d", f"{folder}/lsgm.safetensors", "--quiet"]
    test = runs.test()
    scores = [runs.write(f"{output}/{turn}.csv", "score", test, *words) for turn in range(ROUNDS)]
    fit = [runs.seconds(f"{runs.folder}/{output}")]
    score = [min(runs.seconds(path) for path in scores)]
    return {name: {"mean": {"fit, s": fit, "score, s": score}}}


def _growth(figures: Figures, which: str, fixed: str) -> Verdict:
    """Fits time as a power of m or K, the other fixed, by a line through logarithms."""
    names = [name for name in figures.rows if fixed in name.split(", ")]
    x = [math.log(float(re.findall(rf"{which} = (\d+)", name)[0])) for name in names]
    if len(x) < 3:
        return None, "needs three numbers of layers"
    powers = []
    for metric in METRICS:
        y = [math.log(max(figures.of(name, metric), 0.01)) for name in names]
        powers.append(statistics.linear_regression(x, y).slope)
    return max(powers) < 1.3, listed(powers)


def linear_in_components(figures: Figures) -> Verdict:
    return _growth(figures, "K", max(name.split(", ")[0] for name in figures.rows))


def linear_in_layers(figures: Figures) -> Verdict:
    return _growth(figures, "m", f"K = {AT}")


TABLE = Table(
    paper="LSGM",
    place="figure 7",
    about="Processor seconds of one thread, with plain mixtures and diagonal covariances: `fit` on "
    "the training images (two fits, one to calibrate), and the best of three runs of `score` on "
    "the features of all test images. Later layers are wider.",
    records=("lsgm",),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim(
            "Time grows linearly with the number of components (a power below 1.3, our number)",
            "power of K: `fit`, `score`",
            linear_in_components,
        ),
        Claim(
            "Time grows linearly with the number of layers (the same)",
            "power of the number of layers: `fit`, `score`",
            linear_in_layers,
        ),
    ),
)
