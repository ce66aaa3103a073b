"""Rows labelled as in- or out-of-distribution by hand."""

from __future__ import annotations

import csv
from pathlib import Path

from oodcli.errors import FileError


def read_marks(path: Path) -> dict[str, bool]:
    """path → whether it is labelled OOD, from a CSV file with the columns ``path`` and ``ood`` (0
    or 1; other columns are ignored, rows with an empty ``ood`` are left out). Raises FileError for
    another file."""
    marks: dict[str, bool] = {}
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            if not {"path", "ood"} <= set(reader.fieldnames or ()):
                raise FileError(f"{path}: expected the columns path and ood, 0 (ID) or 1 (OOD)")
            for row in reader:
                mark = (row["ood"] or "").strip()
                if mark not in ("", "0", "1"):
                    raise FileError(f"{path}, line {reader.line_num}: ood is '{mark}', not 0 or 1")
                if mark:
                    marks[row["path"]] = mark == "1"
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path} cannot be read ({error}): expected a CSV file") from error
    if not marks:
        raise FileError(f"{path} labels no row: set ood to 0 (ID) or 1 (OOD)")
    return marks
