"""Thinkback, table 1."""

from __future__ import annotations

from benchmarks.papers.runs import Runs
from benchmarks.papers.table import Claim, Figures, Rows, Table, Verdict, listed, untested

METRICS = ("tpr10", "fpr95-ood", "auroc", "aupr-out")
AS_PRINTED = "thinkback-norm, T = 5"


def measure(runs: Runs) -> Rows:
    sets = runs.sets()
    rows = runs.compare("thinkback-table-1", ["-d", "msp", "-d", "energy"], sets, METRICS)
    for temperature in ("5", "1"):
        free = ["-d", "thinkback", "-p", f"thinkback.T={temperature}"]
        name = {"thinkback": f"thinkback, T = {temperature}"}
        rows |= runs.compare(f"thinkback-table-1/free-{temperature}", free, sets, METRICS, name)
        output = f"thinkback-table-1/norm-{temperature}"
        given = ["-p", f"thinkback-norm.T={temperature}"]
        folder = runs.fit(output, runs.train(), "-d", "thinkback-norm", *given)
        words = ["-d", f"{folder}/thinkback-norm.safetensors"]
        name = {"thinkback-norm": f"thinkback-norm, T = {temperature}"}
        rows |= runs.compare(f"{output}/scores", words, sets, METRICS, name)
    return rows


def _against(figures: Figures, name: str) -> Verdict:
    pairs = {m: (figures.of(AS_PRINTED, m), figures.of(name, m)) for m in METRICS}
    better = {m: (a < b if m == "fpr95-ood" else a > b) for m, (a, b) in pairs.items()}
    said = listed(f"{m} {a:.1f} against {b:.1f}" for m, (a, b) in pairs.items())
    return all(better.values()), said


def beats_softmax(figures: Figures) -> Verdict:
    return _against(figures, "msp")


def beats_energy(figures: Figures) -> Verdict:
    return _against(figures, "energy")


TABLE = Table(
    paper="Thinkback",
    place="table 1",
    about="OOD images are the positive class: TPR at 10 % FPR, FPR at 95 % TPR, AUROC and AUPR (by "
    "steps). `thinkback-norm` at T = 5 is the paper's: its eq. 6, with expected gradients of "
    "training images; `thinkback` is its eq. 5, which needs none.",
    records=("msp", "thinkback", "thinkback-norm"),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim("Thinkback is ahead of the softmax on average, in all four metrics", beats_softmax),
        Claim("Thinkback is ahead of the energy on average, in all four metrics", beats_energy),
        Claim(
            "A score takes 1.25 times as long as a forward pass with softmax or energy",
            untested("not comparable: ours is a closed form, without a backward pass"),
        ),
    ),
)
