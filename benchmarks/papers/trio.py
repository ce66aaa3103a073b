"""Our own detectors, and whether they reach what docs/protocol.md aims at."""

from __future__ import annotations

from itertools import pairwise

from benchmarks.papers.runs import Runs
from benchmarks.papers.table import Claim, Figures, Rows, Table, Verdict, listed

METRICS = ("tnr95", "auroc")
FREE = ("msp", "odin", "energy", "peak")
PARTS = ("c2ir-z", "1c-sum", "duo", "trio")
POOL_SEED = 7
"""Of the inversion whose images the pool is made of: none that something is fitted on."""


def measure(runs: Runs) -> Rows:
    seed, checkpoint = runs.config.seeds[0], runs.network.checkpoint
    real = runs.fit("trio/real", runs.train(), "-d", "knn")
    words = [word for name in FREE for word in ("-d", name)]
    words += ["-d", f"{real}/knn.safetensors"]
    rows = runs.compare("trio/others", words, runs.sets(), METRICS, {"knn": "knn, real"})
    images = runs.invert(POOL_SEED)
    accuracy = f"{runs.accuracy:.4f}"  # as it is published with such checkpoints
    words = ["--match-accuracy", accuracy, "--for", "trio", *runs.precision, "--quiet"]
    pool = runs.write("pool.h5", "extract", checkpoint, images, *words)
    noise = ("--noise", runs.noise("uniform", seed=0), "--calibrate", pool)
    chosen = [word for name in PARTS for word in ("-d", name)]
    folder = runs.fit("trio/virtual", runs.virtual(seed), *chosen, *noise)
    words = [word for name in PARTS for word in ("-d", f"{folder}/{name}.safetensors")]
    rows |= runs.compare("trio/ours", words, runs.sets(), METRICS)
    words = [word for name in PARTS[2:] for word in ("-d", f"{folder}/{name}.safetensors")]
    names = {name: f"{name}, mirror" for name in PARTS[2:]}
    sets = {name: (checkpoint, each.images) for name, each in runs.network.sets.items()}
    test = (checkpoint, runs.network.test)
    words += ["--mirror", *runs.precision]
    return rows | runs.compare("trio/mirror", words, sets, METRICS, names, test)


def aurocs(figures: Figures) -> Verdict:
    ours, theirs = figures.of("trio, mirror"), figures.of("knn, real")
    return ours >= theirs + 2, f"AUROC {ours:.1f} and {theirs:.1f}"


def tnrs(figures: Figures) -> Verdict:
    best = max(("msp", "odin", "energy"), key=lambda name: figures.of(name, "tnr95"))
    ours, theirs = figures.of("trio, mirror", "tnr95"), figures.of(best, "tnr95")
    return ours >= theirs + 20, f"TNR95 {ours:.1f} and {theirs:.1f} (`{best}`)"


def each_part_gains(figures: Figures) -> Verdict:
    steps = ("c2ir-z", "duo", "trio", "trio, mirror")
    found = {name: (figures.of(name), figures.of(name, "tnr95")) for name in steps}
    values = list(found.values())
    said = listed(f"`{name}` {auroc:.1f} / {tnr:.1f}" for name, (auroc, tnr) in found.items())
    rising = all(a[0] < b[0] for a, b in pairwise(values))
    return rising, f"AUROC / TNR95: {said}"


TABLE = Table(
    paper="oodcli",
    place="trio",
    about="Of no paper: our own detectors, after [the protocol](protocol.md), which says what they "
    "were designed on. `c2ir-z` is fitted on virtual images, `1c-sum` on noise, and `duo` and "
    "`trio` add these and `peak` on the scale of a pool of accuracy-matched virtual images. `knn` "
    "has 10,000 training images.",
    records=("msp", "odin", "energy", "knn", "duo", "trio"),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim("`trio` is 2 points of AUROC above `knn` on training images", aurocs),
        Claim("`trio` is 20 points of TNR95 above the best of MSP, ODIN and energy", tnrs),
        Claim(
            "Each part, and the mirror image, adds to the AUROC of those before", each_part_gains
        ),
    ),
)
