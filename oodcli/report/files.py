"""The report as a folder of files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from oodcli.errors import FileError
from oodcli.files.atomic import atomic, make_folder
from oodcli.files.scores import Scores
from oodcli.report import figures, tables
from oodcli.report.evaluation import Evaluation

NAMES = (
    "metrics.csv",
    "metrics.json",
    "metrics.md",
    "metrics.tex",
    "roc.png",
    "histograms.png",
    "heatmap.png",
)


def refuse_existing_report(directory: Path, *, force: bool = False) -> None:
    """Ask this before the evaluation. Raises FileError when ``directory`` is a file, or one of the
    files that would be written exists."""
    if directory.exists() and not directory.is_dir():
        raise FileError(f"{directory} is a file, expected a folder: choose another -o")
    for name in NAMES:
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
) -> list[Path]:
    """Writes metrics.csv, .json, .md and .tex, roc.png, histograms.png and heatmap.png into
    ``directory``, which is made where it is missing: all of them appear, or none.

    Returns their paths. Raises FileError when one exists and ``force`` is not set, or when the disk
    refuses.
    """
    refuse_existing_report(directory, force=force)
    with make_folder(directory), ExitStack() as stack:
        # All are moved into place when the last is written: the stack unwinds only then.
        csv, json, markdown, latex, roc, histograms, heatmap = (
            stack.enter_context(atomic(directory / name, force=force)) for name in NAMES
        )
        tables.write_csv(evaluation, csv)
        tables.write_json(evaluation, json)
        tables.write_markdown(evaluation, markdown)
        tables.write_latex(evaluation, latex)
        figures.save(figures.roc_figure(evaluation, id_scores, ood_scores), roc)
        figures.save(figures.histogram_figure(evaluation, id_scores, ood_scores), histograms)
        figures.save(figures.heatmap_figure(evaluation), heatmap)
    return [directory / name for name in NAMES]
