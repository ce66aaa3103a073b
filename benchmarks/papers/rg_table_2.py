"""RG, table 2: what comes from the output (U), what from the embedding (V)."""

from __future__ import annotations

from benchmarks.papers.runs import Rows, Runs
from benchmarks.papers.table import Claim, Figures, Table, Verdict, listed

METRICS = ("fpr95", "auroc")
NAMES = {
    "gradnorm": "U of GradNorm, V of GradNorm",
    "energy-norm": "U of RG, V of GradNorm",
    "energy": "U of RG alone",
    "rg": "U of RG, V of RG",
}
V_ALONE = "V of RG alone"


def measure(runs: Runs) -> Rows:
    words = [word for name in NAMES for word in ("-d", name)]
    rows = runs.compare("rg-table-2", words, runs.sets(), METRICS, NAMES)
    words = ["-d", "rg", "-p", "rg.T=1000000"]
    alone = runs.compare("rg-table-2/v-alone", words, runs.sets(), METRICS, {"rg": V_ALONE})
    return {**rows, **alone}


def both_are_needed(figures: Figures) -> Verdict:
    both, u, v = (figures.of(name) for name in (NAMES["rg"], NAMES["energy"], V_ALONE))
    return both > max(u, v), listed([both, u, v])


def output_leads(figures: Figures) -> Verdict:
    return _first_wins(figures, NAMES["energy"], V_ALONE)


def energy_for_u(figures: Figures) -> Verdict:
    return _first_wins(figures, NAMES["energy-norm"], NAMES["gradnorm"])


def clipping_for_v(figures: Figures) -> Verdict:
    return _first_wins(figures, NAMES["rg"], NAMES["energy-norm"])


def _first_wins(figures: Figures, *names: str) -> Verdict:
    first, other = map(figures.of, names)
    return first > other, listed([first, other])


TABLE = Table(
    paper="RG",
    place="table 2",
    about="V alone is `rg` at T = 10⁶, where U is the same for all images. We have no detector "
    "with GradNorm's U and RG's V.",
    records=("gradnorm", "energy-norm", "energy", "rg"),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim("U and V together beat either alone", "AUROC of both, U, V", both_are_needed),
        Claim("The output tells more than the embedding", "AUROC of U, V", output_leads),
        Claim(
            "The energy is a better U than GradNorm's",
            "AUROC of the two, with GradNorm's V",
            energy_for_u,
        ),
        Claim(
            "The clipped length is a better V than GradNorm's",
            "AUROC of the two, with RG's U",
            clipping_for_v,
        ),
    ),
)
