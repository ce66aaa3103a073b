"""Our own detectors, and whether they reach the aims of docs/research/protocol.md."""

from __future__ import annotations

from itertools import pairwise

from benchmarks.papers.runs import Rows, Runs
from benchmarks.papers.table import Claim, Figures, Table, Verdict, listed

METRICS = ("tnr95", "auroc")
KNOWN = ("msp", "odin", "energy")
FREE = (*KNOWN, "peak", "peak-energy")
FITTED = ("c2ir-z", "1c-sum", "duo", "trio", "c2ir-peak")
MIRRORED = ("trio", "c2ir-peak")
POOL_SEED = 7
"""Of the inversion whose images the pool is made of: none that something is fitted on."""


def measure(runs: Runs) -> Rows:
    seed, checkpoint = runs.config.seeds[0], runs.network.checkpoint
    real = runs.fit("data-free/real", runs.train(), "-d", "knn")
    free = [word for name in FREE for word in ("-d", name)]
    words = [*free, "-d", f"{real}/knn.safetensors"]
    rows = runs.compare("data-free/others", words, runs.sets(), METRICS, {"knn": "knn, real"})
    images = runs.invert(POOL_SEED)
    accuracy = f"{runs.accuracy:.4f}"  # as it is published with such checkpoints
    words = ["--match-accuracy", accuracy, "--for", "trio", *runs.precision, "--quiet"]
    pool = runs.write("pool.h5", "extract", checkpoint, images, *words)
    noise = ("--noise", runs.noise("uniform", seed=0), "--calibrate", pool)
    chosen = [word for name in FITTED for word in ("-d", name)]
    folder = runs.fit("data-free/virtual", runs.virtual(seed), *chosen, *noise)
    words = [word for name in FITTED for word in ("-d", f"{folder}/{name}.safetensors")]
    rows |= runs.compare("data-free/ours", words, runs.sets(), METRICS)
    words = [word for name in MIRRORED for word in ("-d", f"{folder}/{name}.safetensors")]
    words += ["-d", "peak-energy", "--mirror", *runs.precision]
    names = {name: f"{name}, mirror" for name in (*MIRRORED, "peak-energy")}
    sets = {name: (checkpoint, each.images) for name, each in runs.network.sets.items()}
    test = (checkpoint, runs.network.test.images)
    return rows | runs.compare("data-free/mirror", words, sets, METRICS, names, test)


def aurocs(figures: Figures) -> Verdict:
    ours, theirs = figures.of("c2ir-peak, mirror"), figures.of("knn, real")
    return ours >= theirs + 2, listed([ours, theirs])


def tnrs(figures: Figures) -> Verdict:
    best = max(KNOWN, key=lambda name: figures.of(name, "tnr95"))
    ours, theirs = figures.of("c2ir-peak, mirror", "tnr95"), figures.of(best, "tnr95")
    return ours >= theirs + 20, listed([ours, theirs]) + f" (`{best}`)"


def each_part_gains(figures: Figures) -> Verdict:
    steps = [figures.of(name) for name in ("c2ir-z", "c2ir-peak", "c2ir-peak, mirror")]
    return all(before < after for before, after in pairwise(steps)), listed(steps)


def better_than_trio(figures: Figures) -> Verdict:
    ours, theirs = figures.of("c2ir-peak"), figures.of("trio")
    return ours > theirs, listed([ours, theirs], 2)


def one_pass_is_enough(figures: Figures) -> Verdict:
    ours = figures.of("peak-energy", "tnr95")
    best = max(figures.of(name, "tnr95") for name in KNOWN)
    return ours > best, listed([ours, best])


TABLE = Table(
    paper="Our own detectors",
    place="data free",
    about="[The protocol](protocol.md) says what they were designed on. `c2ir-z` is fitted on "
    "virtual images, `1c-sum` on noise. `c2ir-peak`, `duo` and `trio` add scores on the scale of a "
    "pool of accuracy-matched virtual images. `peak` and `peak-energy` need no fit. `knn` has "
    "10,000 training images. On ResNet-34 `c2ir-peak` has `nci=0`, and the pool 1 patch an image.",
    records=("msp", "odin", "energy", "knn", "duo", "trio"),  # with peaks
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim(
            "`c2ir-peak --mirror` is 2 points of AUROC above `knn` on training images",
            "AUROC of the two",
            aurocs,
        ),
        Claim(
            "`c2ir-peak --mirror` is 20 points of TNR95 above the best of MSP, ODIN and energy",
            "TNR95 of the two",
            tnrs,
        ),
        Claim(
            "`c2ir-peak` has a higher AUROC than `c2ir-z`, and `--mirror` raises it",
            "AUROC of `c2ir-z`, `c2ir-peak`, `c2ir-peak --mirror`",
            each_part_gains,
        ),
        Claim(
            "`c2ir-peak` has a higher AUROC than `trio`",
            "AUROC of `c2ir-peak`, `trio`",
            better_than_trio,
        ),
        Claim(
            "`peak-energy` (one pass, no fit) has a higher TNR95 than the best of MSP, ODIN and "
            "energy",
            "TNR95 of the two",
            one_pass_is_enough,
        ),
    ),
)
