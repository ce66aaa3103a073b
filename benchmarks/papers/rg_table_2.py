"""RG, table 2: what comes from the output (U), what from the embedding (V)."""

from __future__ import annotations

from benchmarks.papers.runs import Runs
from benchmarks.papers.table import Claim, Figures, Rows, Table, Verdict, listed

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
    names = (NAMES["rg"], NAMES["energy"], V_ALONE)
    said = listed(f"{name} {figures.of(name):.1f}" for name in names)
    return figures.of(names[0]) > max(map(figures.of, names[1:])), f"AUROC: {said}"


def output_leads(figures: Figures) -> Verdict:
    first, other = figures.of(NAMES["energy"]), figures.of(V_ALONE)
    return first > other, f"AUROC: U alone {first:.1f}, V alone {other:.1f}"


def energy_for_u(figures: Figures) -> Verdict:
    first, other = figures.of(NAMES["energy-norm"]), figures.of(NAMES["gradnorm"])
    return first > other, f"AUROC: {first:.1f} against {other:.1f}"


def clipping_for_v(figures: Figures) -> Verdict:
    first, other = figures.of(NAMES["rg"]), figures.of(NAMES["energy-norm"])
    return first > other, f"AUROC, with U of RG: {first:.1f} against {other:.1f}"


TABLE = Table(
    paper="RG",
    place="table 2",
    about="V alone is `rg` at T = 10⁶, where U no longer tells images apart. U of GradNorm with V "
    "of RG is no detector of oodcli.",
    records=("gradnorm", "energy-norm", "energy", "rg"),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim("U and V together do better than either alone", both_are_needed),
        Claim("The output tells more than the embedding", output_leads),
        Claim("The energy is a better U than GradNorm's", energy_for_u),
        Claim("The clipped length is a better V than GradNorm's", clipping_for_v),
    ),
)
