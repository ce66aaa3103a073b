"""Thinkback, table 1."""

from __future__ import annotations

from benchmarks.papers.runs import Rows, Runs
from benchmarks.papers.table import Claim, Figures, Table, Verdict, listed, untested

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
    pairs = [(figures.of(AS_PRINTED, each), figures.of(name, each)) for each in METRICS]
    better = [
        ours < theirs if metric == "fpr95-ood" else ours > theirs
        for metric, (ours, theirs) in zip(METRICS, pairs, strict=True)
    ]
    return all(better), listed(pairs)


def beats_softmax(figures: Figures) -> Verdict:
    return _against(figures, "msp")


def beats_energy(figures: Figures) -> Verdict:
    return _against(figures, "energy")


TABLE = Table(
    paper="Thinkback",
    place="table 1",
    about="OOD images are the positive class. `thinkback-norm` at T = 5 is the paper's score: its "
    "eq. 6, with expected gradients of training images. `thinkback` is its eq. 5, which needs "
    "none; the claims are about the first.",
    records=("msp", "thinkback", "thinkback-norm"),
    metrics=METRICS,
    measure=measure,
    claims=(
        Claim(
            "Thinkback beats the softmax on average, in all four metrics",
            "Thinkback/`msp`: TPR10, FPR95, AUROC, AUPR",
            beats_softmax,
        ),
        Claim(
            "Thinkback beats the energy on average, in all four metrics",
            "Thinkback/`energy`, as above",
            beats_energy,
        ),
        untested(
            "A score takes 1.25 times as long as a forward pass with softmax or energy",
            "ours is a closed form without a backward pass",
        ),
    ),
)
