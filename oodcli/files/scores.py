"""The scores file: one row per input, in input order.

Columns: ``path,label,predicted,confidence,<detector>…,error``. ``label`` and ``predicted`` are
class names, ``label`` empty where unknown. Higher = more out of distribution, for every detector.
With a verdict there are ``<detector>.p``, ``<detector>.ood`` and ``<detector>.basis`` (what it
rests on) too, the first two empty where the detector has none on the predicted class; with an
explanation ``<detector>.why``, and for a detector that has learnt from OOD data
``<detector>.saw``, which says from which; they are no detectors. One that was fitted twice has the
columns ``<detector>[virtual]`` and ``<detector>[real]``; ``<detector>[stream]`` depends on the
other rows of its job. A row that could not be scored keeps its place: empty cells and the reason in
``error``.

Decisions:

* Floats have 9 significant digits in all three formats (enough for float32). A score that is not
  finite is written as ``inf``; in JSON, which has no infinity, as the string ``"inf"``.
* A path is written exactly as it is, quoted where CSV needs it. One that starts with ``=``, ``+``,
  ``-`` or ``@`` is not defused with a quote mark: the file is for programs, which must find the
  image again. A spreadsheet may read such a cell as a formula, so import the column as text.
* The files are valid UTF-8. The bytes of a file name that are not appear as ``\\udcff``.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import reprlib
import shutil
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TextIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from oodcli.errors import FileError, first_line
from oodcli.files.made import read_made

Format: TypeAlias = Literal["csv", "jsonl", "parquet"]

LEADING = ("path", "label", "predicted", "confidence")
TRAILING = ("error",)
DERIVED = (".p", ".ood", ".basis", ".why", ".saw")
WORDS = (".basis", ".why", ".saw")
"""Endings of the columns that belong to a detector without being one."""

STREAM = "[stream]"
"""Ending of a detector's column that depends on the other rows: see ``score --stream``."""

_SUFFIXES: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
_ROW_GROUP = 8192
_UNPACKED = 1 << 28
"""Bytes that the texts of so many rows may have in a parquet file."""


def is_detector(column: str) -> bool:
    """Whether a column of a scores file holds a detector's scores."""
    return column not in LEADING + TRAILING and not column.endswith(DERIVED)


def format_of(path: Path) -> Format:
    """The format by suffix; CSV without one (``/dev/stdout``, a pipe). Raises FileError."""
    suffix = path.suffix.lower()
    if not suffix:
        return "csv"
    if suffix not in _SUFFIXES:
        raise FileError(f"{path}: expected a scores file, .csv, .jsonl or .parquet")
    return _SUFFIXES[suffix]


@dataclass(frozen=True)
class ScoreBlock:
    """N inputs in order, R of them without an error.

    paths, labels, errors: N strings, empty where there is none. predicted: R strings. confidence:
    (R,) float64. scores: R numbers or strings for every column between ``confidence`` and
    ``error``. sketches: R rows that images are compared by; they are not written.
    """

    paths: Sequence[str]
    labels: Sequence[str]
    errors: Sequence[str]
    predicted: Sequence[str]
    confidence: NDArray[np.float64]
    scores: Mapping[str, NDArray[np.float64] | Sequence[str]]
    sketches: NDArray[np.float32] | None = None


class ScoresWriter:
    """Writes a scores file as its rows come; what is kept in memory does not grow with them.

    target: an open text stream (standard output; CSV or JSON lines), or the path of a file, which
    is overwritten: give it what ``atomic`` yields. columns: those between ``confidence`` and
    ``error``. Used in a ``with``, which closes the file, but not a stream.

        with atomic(path) as partial, ScoresWriter(partial, ("msp", "energy")) as writer:
            writer.write(block)

    Raises ValueError when two columns have one name or parquet is to go to a stream, FileError when
    the suffix is unknown or pyarrow is missing.
    """

    def __init__(
        self, target: TextIO | Path, columns: Sequence[str], format: Format | None = None
    ) -> None:
        header = (*LEADING, *columns, *TRAILING)
        if len(set(header)) != len(header):
            raise ValueError(
                f"two columns of a scores file have the same name: {', '.join(header)}"
            )
        if isinstance(target, Path):
            self._format = format or format_of(target)
        else:
            self._format = format or "csv"
            if self._format == "parquet":
                raise ValueError("parquet needs a path, not a text stream")
        self._target = target
        self._columns = tuple(columns)
        self._names = frozenset(columns)
        self._header = header

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._sink = self._opened(stack)
            self._open = stack.pop_all()
        return self

    def _opened(self, stack: ExitStack) -> _Sink:
        stream = self._target
        if isinstance(stream, Path):
            if self._format == "parquet":
                return stack.enter_context(_ParquetSink(stream, self._header))
            stream = stack.enter_context(stream.open("w", encoding="utf-8", newline=""))
        return (_CsvSink if self._format == "csv" else _JsonSink)(stream, self._header)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def write(self, block: ScoreBlock) -> None:
        """Appends rows. Raises ValueError when they have other columns than the file, or when a
        column has not one cell for each row without an error."""
        if block.scores.keys() != self._names:
            raise ValueError(
                f"{block.paths[:1]}: expected scores for {', '.join(self._columns)}, "
                f"but got {', '.join(block.scores) or 'none'}"
            )
        readable = sum(not error for error in block.errors)
        lengths = {
            "path": (len(block.paths), len(block.errors)),
            "label": (len(block.labels), len(block.errors)),
            "predicted": (len(block.predicted), readable),
            "confidence": (len(block.confidence), readable),
            **{name: (len(cells), readable) for name, cells in block.scores.items()},
        }
        for name, (length, expected) in lengths.items():
            if length != expected:
                raise ValueError(f"column {name}: {length} cells, expected {expected}")
        columns = [
            _text_cells(block.predicted),
            np.where(np.isfinite(block.confidence), block.confidence, np.nan),
            *(_cells(column, block.scores[column]) for column in self._columns),
        ]
        self._sink.write(
            _text_cells(block.paths),
            _text_cells(block.labels),
            columns,
            _text_cells(block.errors),
        )


_Column: TypeAlias = list[str] | NDArray[np.float64] | NDArray[np.int64]
"""Cells that are NaN or masked are written empty."""


def _utf8(text: str) -> str:
    """The bytes of a file name that Python could not decode are lone surrogates: escaped."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _text_cells(cells: Sequence[str]) -> list[str]:
    return list(cells) if "".join(cells).isascii() else [_utf8(cell) for cell in cells]


def _cells(column: str, cells: NDArray[np.float64] | Sequence[str]) -> _Column:
    if not isinstance(cells, np.ndarray):
        return _text_cells(cells)
    if column.endswith(".ood"):
        silent = np.isnan(cells)  # rows without a verdict
        whole: NDArray[np.int64] = np.where(silent, 0, cells).astype(np.int64)
        return np.ma.array(whole, mask=silent) if silent.any() else whole
    # Never as ID: a score that is NaN or -inf came out of a network that overflowed.
    missing = np.nan if column.endswith(".p") else np.inf
    return np.where(np.isfinite(cells), cells, missing)


class _Sink(ABC):
    """columns of ``write``: those from ``predicted`` on, of the rows whose error is empty."""

    @abstractmethod
    def write(
        self, paths: list[str], labels: list[str], columns: list[_Column], errors: list[str]
    ) -> None: ...


class _CsvSink(_Sink):
    # Quoted here, not by csv.writer: that leaves a carriage return bare unless lines end in one,
    # and with "\r\n" the last column, error, would never be empty for awk and cut.
    def __init__(self, stream: TextIO, header: Sequence[str]) -> None:
        self._stream = stream
        self._blank = "," * (len(header) - len(LEADING) + 2)
        stream.write(",".join(map(_quoted, header)) + "\n")

    def write(
        self, paths: list[str], labels: list[str], columns: list[_Column], errors: list[str]
    ) -> None:
        good = list(_joined(columns))
        if not any(errors):
            cells = (_csv_cells(paths), _csv_cells(labels), *good)
            self._stream.write(",\n".join([*map(",".join, zip(*cells, strict=True)), ""]))
            return
        rows = zip(*good, strict=True)
        self._stream.writelines(
            f"{path},{label}{self._blank}{_quoted(error)}\n"
            if error
            else f"{path},{label},{','.join(next(rows))},\n"
            for path, label, error in zip(
                _csv_cells(paths), _csv_cells(labels), errors, strict=True
            )
        )


def _joined(columns: list[_Column]) -> Iterator[list[str]]:
    """Texts of a row each: of columns of words, and of all numbers between two of these."""
    for numbers, some in groupby(columns, lambda column: isinstance(column, np.ndarray)):
        if numbers:
            yield _lines(np.column_stack([_filled(column) for column in some]))
        else:
            yield from (_csv_cells(list(map(str, column))) for column in some)


def _lines(table: NDArray[np.float64]) -> list[str]:
    """table: (N, C), C > 0. N texts, each the cells of a row with commas between them; a cell that
    is NaN is empty."""
    rows, columns = table.shape
    # One format for the whole block is faster than one for each row.
    form = (",".join(["%.9g"] * columns) + "\n") * rows
    text: str = form % tuple(table.ravel().tolist())
    return text.replace("nan", "").splitlines()


def _filled(column: _Column) -> NDArray[np.float64]:
    """NaN where there is no number."""
    return np.ma.filled(np.ma.asarray(column).astype(np.float64), np.nan)


_SPECIAL = re.compile(r'[,"\r\n]')


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if _SPECIAL.search(cell) else cell


def _csv_cells(cells: list[str]) -> list[str]:
    return [_quoted(cell) for cell in cells] if _SPECIAL.search("\0".join(cells)) else cells


class _JsonSink(_Sink):
    def __init__(self, stream: TextIO, header: Sequence[str]) -> None:
        self._stream = stream
        self._header = header

    def write(
        self, paths: list[str], labels: list[str], columns: list[_Column], errors: list[str]
    ) -> None:
        good = zip(*map(_values, columns), strict=True)
        blank = ("", *[None] * (len(self._header) - len(LEADING)))
        for path, label, error in zip(paths, labels, errors, strict=True):
            cells = blank if error else map(_json_cell, next(good))
            record = dict(zip(self._header, (path, label, *cells, error), strict=True))
            self._stream.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _json_cell(cell: object) -> object:
    return "inf" if cell == math.inf else cell


def _values(column: _Column) -> Sequence[object]:
    """With the 9 significant digits that CSV has, for formats that hold numbers; None for NaN."""
    if isinstance(column, list):
        return column
    if column.dtype == np.int64:
        return list(column.tolist())
    return [float(f"{cell:.9g}") if cell == cell else None for cell in column.tolist()]


class _ParquetSink(_Sink):
    def __init__(self, path: Path, header: Sequence[str]) -> None:
        arrow = _pyarrow(path)
        import pyarrow.parquet

        text = {"path", "label", "predicted", "error"}
        self._schema = arrow.schema(
            [
                (name, _parquet_type(arrow, name, name in text or name.endswith(WORDS)))
                for name in header
            ]
        )
        self._arrow = arrow
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)
        self._waiting: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._writer.close()

    def write(
        self, paths: list[str], labels: list[str], columns: list[_Column], errors: list[str]
    ) -> None:
        good = np.array([not error for error in errors])
        cells: list[Any] = [paths, labels]
        for number, column in enumerate(columns):
            whole = np.full(len(paths), None if number else "", dtype=object)
            whole[good] = _values(column)
            cells.append(whole)
        arrays = [
            self._arrow.array(column, type=kind, from_pandas=False)
            for column, kind in zip((*cells, errors), self._schema.types, strict=True)
        ]
        self._waiting.append(self._arrow.table(arrays, schema=self._schema))
        if sum(map(len, self._waiting)) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(self._arrow.concat_tables(self._waiting))
            self._waiting.clear()


def _parquet_type(arrow: Any, column: str, text: bool) -> Any:
    if text:
        return arrow.string()
    return arrow.int8() if column.endswith(".ood") else arrow.float64()


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise FileError(
            f"{path}: parquet needs pyarrow: pip install 'oodcli[parquet]', or use .csv"
        ) from None
    return pyarrow


@dataclass(frozen=True)
class Scores:
    """A scores file in memory, its rows in order.

    paths, labels, predicted, errors: N strings. confidence: (N,) float64, NaN where there is none.
    detectors: for each name the (R,) float64 scores of the R readable rows alone, those without an
    error; ``readable`` says which they are. verdicts: for each name with a column ``.ood`` how many
    of those rows it calls OOD, and what that rests on. unjudged: for each name that leaves some of
    those rows without a verdict, which, (R,) bool. p_values: for each name with a column ``.p`` the
    (R,) float64 p-values of those rows, NaN where there is none. saw: for each name that
    has learnt from OOD data, from which. columns: the file's header. made: how the file was made,
    if it is known.
    """

    source: str
    paths: tuple[str, ...]
    labels: tuple[str, ...]
    predicted: tuple[str, ...]
    confidence: NDArray[np.float64]
    detectors: Mapping[str, NDArray[np.float64]]
    errors: tuple[str, ...]
    verdicts: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    unjudged: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    p_values: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    saw: Mapping[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    made: Mapping[str, Any] | None = None

    def only(self, detectors: Sequence[str]) -> Scores:
        """The same rows with these detectors, in this order. Raises FileError when one is not in
        the file."""
        for name in detectors:
            if name not in self.detectors:
                raise FileError(
                    f"{self.source}: no column {name!r}: it has {', '.join(self.detectors)}"
                )
        return replace(self, detectors={name: self.detectors[name] for name in detectors})

    @property
    def readable(self) -> NDArray[np.bool_]:
        """(N,)"""
        return np.array([not error for error in self.errors], dtype=np.bool_)

    @property
    def unreadable(self) -> int:
        return sum(bool(error) for error in self.errors)


def read_scores(path: Path, kind: Format | None = None) -> Scores:
    """Reads a scores file whole. Raises FileError as ``score_rows`` does, and when the file has no
    row."""
    return _collect(score_rows(path, kind))


class ScoreRow(NamedTuple):
    """A row of a scores file. scores, verdicts, p_values, words: in the order of the names in
    ``ScoreRows``, NaN or empty where there is none; all empty in a row with an error."""

    path: str
    label: str
    predicted: str
    error: str
    confidence: float
    scores: Sequence[float] = ()
    verdicts: Sequence[float] = ()
    p_values: Sequence[float] = ()
    words: Sequence[str] = ()


@dataclass(frozen=True)
class ScoreRows:
    """A scores file, read row by row. columns: the file's header. detectors: its detectors.
    verdicts, p_values: those that have a column ``.ood`` or ``.p``. words: columns of text that
    belong to a detector, such as ``energy.why``. rows: can be read once."""

    path: Path
    columns: Sequence[str]
    detectors: Sequence[str]
    verdicts: Sequence[str]
    p_values: Sequence[str]
    words: Sequence[str]
    rows: Iterator[ScoreRow]


def score_rows(path: Path, kind: Format | None = None) -> ScoreRows:
    """Opens a .csv, .jsonl or .parquet scores file; the columns may come in any order. kind: where
    the suffix does not say it.

    Raises FileError, naming file and line, here or from ``rows``, when the file is missing or cut
    off, when a column is missing, doubled or when there is none of a detector, and when a score of
    a row without an error is no number, NaN or −inf.
    """
    kind = kind or format_of(path)
    if not path.exists():
        raise FileError(f"{path} does not exist: write it with oodcli score -o")
    if path.is_dir():
        raise FileError(f"{path} is a folder, expected a scores file")
    cells = _read_cells(path, kind)
    where, header = next(cells, ("", ()))
    if not header:
        raise FileError(f"{path} is empty: expected a scores file, as oodcli score writes it")
    doubled = sorted({name for name in header if list(header).count(name) > 1})
    if doubled:
        raise FileError(f"{path}, {where}: column {doubled[0]!r} occurs more than once")
    if "" in header:
        raise FileError(f"{path}, {where}: a column has no name: remove it")
    missing = [name for name in LEADING + TRAILING if name not in header]
    if missing:
        raise FileError(
            f"{path}, {where}: no column {', '.join(missing)}: "
            "expected path,label,predicted,confidence,<detector>…,error"
        )
    detectors = [name for name in header if is_detector(name)]
    if not detectors:
        raise FileError(f"{path}, {where}: no column of a detector's scores: score with -d NAME")
    columns = {
        ending: [name for name in detectors if f"{name}{ending}" in header] for ending in DERIVED
    }
    words = [f"{name}{ending}" for ending in WORDS for name in columns[ending]]
    opened = ScoreRows(
        path, tuple(header), detectors, columns[".ood"], columns[".p"], words, iter(())
    )
    return replace(opened, rows=_score_rows(opened, cells))


def _read_cells(path: Path, kind: Format) -> Iterator[_Numbered]:
    """First the header, then the rows."""
    try:
        yield from _READERS[kind](path)
    except UnicodeDecodeError:
        raise FileError(f"{path} is not UTF-8 text: expected a scores file ({kind})") from None
    except OSError as error:
        raise FileError(f"{path} could not be read: {error.strerror or error}") from error


def _score_rows(opened: ScoreRows, rows: Iterator[_Numbered]) -> Iterator[ScoreRow]:
    path = opened.path
    place = {name: index for index, name in enumerate(opened.columns)}
    texts = [place[name] for name in ("path", "label", "predicted", "error")]
    detectors = [(name, place[name]) for name in opened.detectors]
    verdicts = [(f"{name}.ood", place[f"{name}.ood"]) for name in opened.verdicts]
    p_values = [(f"{name}.p", place[f"{name}.p"]) for name in opened.p_values]
    words = [place[name] for name in opened.words]

    def numbers(
        where: str, cells: Sequence[Any], columns: Sequence[tuple[str, int]]
    ) -> list[float]:
        return [
            math.nan
            if (cell := cells[index]) is None or cell == ""
            else _number(path, where, name, cell)
            for name, index in columns
        ]

    for where, cells in rows:
        name, label, predicted, error = [_text(cells[index]) for index in texts]
        [confidence] = numbers(where, cells, [("confidence", place["confidence"])])
        if error:
            yield ScoreRow(name, label, predicted, error, confidence)
            continue
        scores = [_number(path, where, column, cells[index]) for column, index in detectors]
        if not all(-math.inf < score for score in scores):
            column, score = next(
                pair
                for pair in zip(opened.detectors, scores, strict=True)
                if not -math.inf < pair[1]
            )
            raise FileError(
                f"{path}, {where}: {column} is {score}: a score is a number or inf; "
                "score the row again, or give the reason in the column error"
            )
        flags = numbers(where, cells, verdicts)
        chances = numbers(where, cells, p_values)
        for chance, (column, index) in zip(chances, p_values, strict=True):
            if not (0 <= chance <= 1 or cells[index] is None or cells[index] == ""):
                raise FileError(f"{path}, {where}: {column} is {chance:g}, expected 0 to 1")
        told = [_text(cells[index]) for index in words]
        yield ScoreRow(name, label, predicted, error, confidence, scores, flags, chances, told)


def join_scores(parts: Sequence[Path], target: Path, kind: Format) -> str:
    """Writes the rows of scores files, as ``score`` has written them, one file after the other;
    returns the SHA-256 of their paths, a NUL after each. Raises FileError when the files have not
    the same columns, or are damaged."""
    paths = hashlib.sha256()
    header: Sequence[Any] = ()
    for part in parts:
        rows = _READERS[kind](part)
        _, found = next(rows, ("", ()))
        if found and header and list(found) != list(header):
            raise FileError(
                f"{parts[0]} has the columns {', '.join(header)}, but {part} has "
                f"{', '.join(found)}: score all parts alike"
            )
        header = header or found
        place = list(found).index("path") if "path" in found else 0
        for _, cells in rows:
            paths.update(f"{_text(cells[place])}\0".encode())
    if kind == "parquet":
        _join_parquet(parts, target)
        return paths.hexdigest()
    with target.open("wb") as stream:
        for number, part in enumerate(parts):
            with part.open("rb") as source:
                first = source.readline() if kind == "csv" else b""
                stream.write(b"" if number else first)
                shutil.copyfileobj(source, stream)
    return paths.hexdigest()


def _join_parquet(parts: Sequence[Path], target: Path) -> None:
    _pyarrow(target)
    from pyarrow.parquet import ParquetFile, ParquetWriter

    with ExitStack() as stack:
        writer = None
        for part in parts:
            with ParquetFile(part) as file:
                if writer is None:
                    writer = stack.enter_context(ParquetWriter(target, file.schema_arrow))
                for batch in file.iter_batches(batch_size=_ROW_GROUP):
                    writer.write_batch(batch)


_Numbered: TypeAlias = tuple[str, Sequence[Any]]
"""Where a row stands ("line 7"), and its cells in the order of the header."""


def _collect(opened: ScoreRows) -> Scores:
    path = opened.path
    paths, labels, predicted, errors = [], [], [], []
    confidence = array("d")
    detectors, flags, chances = (
        {name: array("d") for name in names}
        for names in (opened.detectors, opened.verdicts, opened.p_values)
    )
    appends = [column.append for column in detectors.values()]
    words: dict[str, dict[str, None]] = {name: {} for name in opened.words}
    # An explanation is a different one in each row.
    told = [place for place, name in enumerate(opened.words) if not name.endswith(".why")]
    for row in opened.rows:
        paths.append(row.path)
        labels.append(row.label)
        predicted.append(row.predicted)
        errors.append(row.error)
        confidence.append(row.confidence)
        for append, score in zip(appends, row.scores, strict=False):
            append(score)
        for name, flag in zip(opened.verdicts, row.verdicts, strict=False):
            flags[name].append(flag)
        for name, chance in zip(opened.p_values, row.p_values, strict=False):
            chances[name].append(chance)
        for place in told if row.words else ():
            words[opened.words[place]][row.words[place]] = None
    made = read_made(path)
    if not paths and not (made or {}).get("shard"):  # of which some are empty
        raise FileError(f"{path} has no row below its header: was anything scored?")
    saw = {name: [*filter(None, words.get(f"{name}.saw", ()))] for name in detectors}
    return Scores(
        source=str(path),
        paths=tuple(paths),
        labels=tuple(labels),
        predicted=tuple(predicted),
        confidence=np.array(confidence, dtype=np.float64),
        detectors={name: np.array(scores, dtype=np.float64) for name, scores in detectors.items()},
        errors=tuple(errors),
        verdicts={
            name: (
                sum(flag > 0 for flag in column),
                next(reversed(words.get(f"{name}.basis") or {"": None})),
            )
            for name, column in flags.items()
        },
        unjudged={
            name: np.isnan(np.array(column))
            for name, column in flags.items()
            if any(flag != flag for flag in column)
        },
        p_values={name: np.array(column, dtype=np.float64) for name, column in chances.items()},
        saw={name: " | ".join(found) for name, found in saw.items() if found},
        columns=tuple(opened.columns),
        made=made,
    )


def _text(cell: object) -> str:
    return "" if cell is None else str(cell)


def _number(path: Path, where: str, column: str, cell: Any) -> float:
    try:
        if isinstance(cell, bool):
            raise ValueError
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        shown = "empty" if cell is None or cell == "" else reprlib.repr(cell)
        raise FileError(f"{path}, {where}: {column} is {shown}, expected a number") from None


def _csv_rows(path: Path) -> Iterator[_Numbered]:
    # utf-8-sig: a spreadsheet that saved the file again put a byte order mark before it.
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        width = 0
        line = 1
        try:
            for cells in reader:
                where = f"line {line}"
                line = reader.line_num + 1  # a cell may span lines
                if not cells:
                    continue
                width = width or len(cells)
                if len(cells) != width:
                    raise FileError(
                        f"{path}, {where}: {len(cells)} cells where the header has {width}: "
                        "the file is truncated or was edited; score again"
                    )
                yield where, cells
        except csv.Error as error:
            raise FileError(
                f"{path}, line {line}: not CSV ({error}): the file is truncated or was edited; "
                "score again"
            ) from None


def _json_rows(path: Path) -> Iterator[_Numbered]:
    header: list[str] = []
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"line {number}"
            if not line.strip():
                continue
            try:
                pairs = json.loads(line, object_pairs_hook=_Pairs)
            except (ValueError, RecursionError) as error:  # also of a number of 5000 digits
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise FileError(
                    f"{path}, {where}: not JSON ({reason}): the file is truncated or was edited; "
                    "score again"
                ) from None
            if not isinstance(pairs, _Pairs):
                raise FileError(f"{path}, {where}: expected an object, one a line")
            names = [name for name, _ in pairs]
            if not header:
                header = names
                yield where, header
            record = dict(pairs)
            if len(names) != len(header) or record.keys() != set(header):
                raise FileError(
                    f"{path}, {where}: the keys are not those of the first line: "
                    "the file was edited; score again"
                )
            yield where, [record[name] for name in header]


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its keys as they stand there, the doubled ones too."""


def _parquet_rows(path: Path) -> Iterator[_Numbered]:
    arrow = _pyarrow(path)
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            texts = _parquet_texts(path, file)
        # A text that many rows have may be stored once, which a few bytes can make any size of.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            header = file.schema_arrow.names
            yield "header", header
            number = 0
            for batch in file.iter_batches(batch_size=_ROW_GROUP):
                columns = [_parquet_cells(path, *each) for each in zip(header, batch, strict=True)]
                for cells in zip(*columns, strict=True):
                    number += 1
                    yield f"row {number}", cells
    # Besides Arrow's own: ValueError and OverflowError for a time that Python cannot hold.
    except (arrow.ArrowException, ValueError, OverflowError, MemoryError, LookupError) as error:
        reason = first_line(error)
        raise FileError(f"{path} is not parquet, or is truncated ({reason}): score again") from None


def _parquet_texts(path: Path, file: Any) -> list[str]:
    """The columns of texts. Raises FileError where a column holds lists or the like, or says that
    it unpacks to more than scores have; ValueError where one of its pages is damaged."""
    from pyarrow import types

    for column in file.schema_arrow:
        if types.is_nested(column.type):
            raise FileError(f"{path}: column {column.name!r} is of the type {column.type}")
    # Not column by column: pyarrow ends the process where what the file says of one is damaged.
    for group in map(file.metadata.row_group, range(file.num_row_groups)):
        if group.total_byte_size > max(_UNPACKED, 4096 * group.num_rows * group.num_columns):
            raise _too_large(path, "a group of rows")
    kinds = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return [each.name for each in file.schema_arrow if any(kind(each.type) for kind in kinds)]


def _parquet_cells(path: Path, name: str, column: Any) -> list[Any]:
    """The cells of one column of a batch."""
    from pyarrow import compute, types

    if types.is_dictionary(column.type):
        lengths = compute.binary_length(column.dictionary)
        if (compute.sum(lengths.take(column.indices)).as_py() or 0) > _UNPACKED:
            raise _too_large(path, f"column {name!r}")
        column = column.dictionary_decode()
    return list(column.to_pylist())


def _too_large(path: Path, what: str) -> FileError:
    return FileError(
        f"{path}: {what} unpacks to more than {_UNPACKED >> 20} MB for a few rows: it is not a "
        "scores file"
    )


_READERS: Mapping[Format, Callable[[Path], Iterator[_Numbered]]] = {
    "csv": _csv_rows,
    "jsonl": _json_rows,
    "parquet": _parquet_rows,
}
