"""Our own detectors, and whether they reach what docs/protocol.md aims at."""

from __future__ import annotations

from itertools import pairwise

from benchmarks.papers.runs import Runs
from benchmarks.papers.table import Claim, Figures, Rows, Table, Verdict, listed

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
    test = (checkpoint, runs.network.test)
    return rows | runs.compare("data-free/mirror", words, sets, METRICS, names, test)


def aurocs(figures: Figures) -> Verdict:
    ours, theirs = figures.of("c2ir-peak, mirror"), figures.of("knn, real")
    return ours >= theirs + 2, f"AUROC {ours:.1f} and {theirs:.1f}"


def tnrs(figures: Figures) -> Verdict:
    best = _best(figures)
    ours, theirs = figures.of("c2ir-peak, mirror", "tnr95"), figures.of(best, "tnr95")
    return ours >= theirs + 20, f"TNR95 {ours:.1f} and {theirs:.1f} (`{best}`)"


def each_part_gains(figures: Figures) -> Verdict:
    steps = ("c2ir-z", "c2ir-peak", "c2ir-peak, mirror")
    found = [figures.of(name) for name in steps]
    rising = all(before < after for before, after in pairwise(found))
    return rising, f"AUROC / TNR95: {listed(_pair(figures, name) for name in steps)}"


def better_than_trio(figures: Figures) -> Verdict:
    ours, theirs = (figures.of(name) for name in ("c2ir-peak", "trio"))
    return ours > theirs, listed(_pair(figures, name) for name in ("c2ir-peak", "trio"))


def one_pass_is_enough(figures: Figures) -> Verdict:
    names = ("peak-energy", _best(figures))
    ours, theirs = (figures.of(name, "tnr95") for name in names)
    return ours > theirs, listed(_pair(figures, name) for name in names)


def _best(figures: Figures) -> str:
    return max(KNOWN, key=lambda name: figures.of(name, "tnr95"))


def _pair(figures: Figures, name: str) -> str:
    return f"`{name}` {figures.of(name):.1f} / {figures.of(name, 'tnr95'):.1f}"


TABLE = Table(
    paper="oodcli",
    place="data free",
    about="Of no paper: our own detectors, after [the protocol](protocol.md), which says what they "
    "were designed on. `c2ir-z` is fitted on virtual images, `1c-sum` on noise; `c2ir-peak`, `duo` "
    "and `trio` add such on the scale of a pool of accuracy-matched virtual images. `peak` and "
    "`peak-energy` are fitted on nothing; `knn` has 10,000 training images.",
    records=("msp", "odin", "energy", "knn", "duo", "trio"),  # with peaks
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim("`c2ir-peak` is 2 points of AUROC above `knn` on training images", aurocs),
        Claim("`c2ir-peak` is 20 points of TNR95 above the best of MSP, ODIN and energy", tnrs),
        Claim(
            "`c2ir-peak` has a higher AUROC than `c2ir-z`, and more with the mirror image",
            each_part_gains,
        ),
        Claim("`c2ir-peak` has a higher AUROC than `trio`", better_than_trio),
        Claim(
            "`peak-energy`, one pass and nothing fitted, has a higher TNR95 than the best of "
            "MSP, ODIN and energy",
            one_pass_is_enough,
        ),
    ),
)
