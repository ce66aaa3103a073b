"""RG, table 5: U plus V, by their balance."""

from __future__ import annotations

from benchmarks.papers.runs import Rows, Runs
from benchmarks.papers.table import Claim, Figures, Table, Verdict, listed

METRICS = ("fpr95", "auroc")
RATIOS = ("0.3", "0.4", "0.5", "0.6", "0.8", "1", "1.2")
PRODUCT = "U × V (`rg`)"


def measure(runs: Runs) -> Rows:
    rows: Rows = {}
    for ratio in RATIOS:
        output = f"rg-table-5/{ratio}"
        given = ["-p", f"rg-add.ratio={ratio}"]
        folder = runs.fit(output, runs.train(), "-d", "rg-add", *given)
        words = ["-d", f"{folder}/rg-add.safetensors"]
        name = {"rg-add": f"α = {ratio} αₛ"}
        rows |= runs.compare(f"{output}/scores", words, runs.sets(), METRICS, name)
    product = runs.compare("rg-table-5/rg", ["-d", "rg"], runs.sets(), METRICS, {"rg": PRODUCT})
    return rows | product


def below_equal(figures: Figures) -> Verdict:
    sums = [name for name in figures.rows if name != PRODUCT]
    best = max(sums, key=figures.of)
    return best in ("α = 0.5 αₛ", "α = 0.6 αₛ"), listed(map(figures.of, sums))


def like_the_product(figures: Figures) -> Verdict:
    first, other = figures.of("α = 0.6 αₛ"), figures.of(PRODUCT)
    return abs(first - other) < 1, listed([first, other])


TABLE = Table(
    paper="RG",
    place="table 5",
    about="`rg-add` with `-p rg-add.ratio=…`; αₛ gives both terms the same spread on 1,000 "
    "training images.",
    records=("rg", "rg-add"),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim(
            "The best balance is 0.5 or 0.6 of αₛ",
            f"AUROC at {', '.join(RATIOS)} αₛ",
            below_equal,
        ),
        Claim(
            "Sum and product are within a point of each other",
            "AUROC of the sum at 0.6 αₛ, the product",
            like_the_product,
        ),
    ),
)
