"""The report as a folder of files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from oodcli.errors import FileError
from oodcli.files.atomic import atomic, make_folder
from oodcli.files.scores import Scores
from oodcli.report import figures, page, tables
from oodcli.report.evaluation import Evaluation

NAMES = (
    "report.html",
    "metrics.csv",
    "metrics.json",
    "metrics.md",
    "metrics.tex",
    "roc.png",
    "roc.svg",
    "histograms.png",
    "histograms.svg",
    "heatmap.png",
    "heatmap.svg",
)
CALIBRATION = ("calibration.png", "calibration.svg")
"""Written besides where the ID rows have p-values."""


def refuse_existing_report(directory: Path, *, force: bool = False) -> None:
    """Ask this before the evaluation. Raises FileError when ``directory`` is a file, or one of the
    files that would be written exists."""
    if directory.exists() and not directory.is_dir():
        raise FileError(f"{directory} is a file, expected a folder: choose another -o")
    for name in NAMES + CALIBRATION:
        if (directory / name).exists() and not force:
            raise FileError(
                f"{directory / name} exists: choose another -o, or overwrite it with --force"
            )


def write_report(
    evaluation: Evaluation,
    id_scores: Scores,
    ood_scores: Mapping[str, Scores],
    directory: Path,
    *,
    force: bool = False,
    thumbnails: bool = True,
) -> list[Path]:
    """Writes report.html, metrics.csv, .json, .md and .tex, and the figures as .png and .svg into
    ``directory``, which is made where it is missing: all of them appear, or none. Figures of a
    calibration that is not in these scores are taken away.

    thumbnails: whether report.html shows images, opened anew under their paths. Returns the paths.
    Raises FileError when one exists and ``force`` is not set, or when the disk refuses.
    """
    refuse_existing_report(directory, force=force)
    calibrated = any(name in id_scores.p_values for name in evaluation.detectors)
    names = NAMES + CALIBRATION if calibrated else NAMES
    with make_folder(directory), ExitStack() as stack:
        # All are moved into place when the last is written: the stack unwinds only then.
        paths = {name: stack.enter_context(atomic(directory / name, force=force)) for name in names}
        tables.write_csv(evaluation, paths["metrics.csv"])
        tables.write_json(evaluation, paths["metrics.json"])
        tables.write_markdown(evaluation, paths["metrics.md"])
        tables.write_latex(evaluation, paths["metrics.tex"])
        drawings = {
            "roc": figures.roc_figure(evaluation, id_scores, ood_scores),
            "histograms": figures.histogram_figure(evaluation, id_scores, ood_scores),
            "heatmap": figures.heatmap_figure(evaluation),
        }
        if calibrated:
            drawings["calibration"] = figures.calibration_figure(evaluation, id_scores)
        drawn = {}
        for name, figure in drawings.items():
            figures.save(figure, paths[f"{name}.png"])
            drawn[name] = figures.svg(figure)
            paths[f"{name}.svg"].write_text(drawn[name], encoding="utf-8")
        text = page.page(evaluation, id_scores, ood_scores, drawn, thumbnails=thumbnails)
        paths["report.html"].write_text(text, encoding="utf-8")
    for name in CALIBRATION:
        if not calibrated:
            (directory / name).unlink(missing_ok=True)
    return [directory / name for name in names]
