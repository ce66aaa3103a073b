"""The scores file: what is written is read back, and what is broken is refused in one sentence."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import tracemalloc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oodcli import detectors
from oodcli.errors import FileError
from oodcli.features import Features, Rows
from oodcli.files.scores import ScoreBlock, ScoresWriter, format_of, is_detector, read_scores
from oodcli.stages.chosen import Chosen
from oodcli.stages.score import score_to_file


@dataclass(frozen=True)
class ScoreRow:
    path: str
    label: str = ""
    predicted: str = ""
    confidence: float = math.nan
    scores: dict[str, float | str] = field(default_factory=dict)
    error: str = ""


def block(rows: Iterable[ScoreRow], columns: Sequence[str] | None = None) -> ScoreBlock:
    rows = list(rows)
    good = [row for row in rows if not row.error]
    if columns is None:
        columns = list(good[0].scores)
    cells = {name: [row.scores[name] for row in good] for name in columns}
    return ScoreBlock(
        [row.path for row in rows],
        [row.label for row in rows],
        [row.error for row in rows],
        [row.predicted for row in good],
        np.array([row.confidence for row in good]),
        {
            name: [str(cell) for cell in column]
            if any(isinstance(cell, str) for cell in column)
            else np.array(column, dtype=np.float64)
            for name, column in cells.items()
        },
    )


ROWS = [
    ScoreRow("a.png", "cat", "dog", 0.75, {"msp": 0.25, "energy": -12.3456789012}),
    ScoreRow("b.png", "cat", error="cannot identify image file"),
    ScoreRow("c.png", "", "cat", 1.0, {"msp": math.nan, "energy": math.inf}),
]
TEXT = (
    "path,label,predicted,confidence,msp,energy,error\n"
    "a.png,cat,dog,0.75,0.25,-12.3456789,\n"
    "b.png,cat,,,,,cannot identify image file\n"
    "c.png,,cat,1,inf,inf,\n"
)


@pytest.fixture(params=["csv", "jsonl", "parquet"])
def suffix(request: pytest.FixtureRequest) -> str:
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return str(request.param)


def write(path: Path, rows: Iterable[ScoreRow], columns: tuple[str, ...]) -> Path:
    with ScoresWriter(path, columns) as writer:
        rows = iter(rows)
        while some := list(islice(rows, 1000)):
            writer.write(block(some, columns))
    return path


def test_csv_to_the_letter(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", ROWS, ("msp", "energy"))
    assert path.read_bytes() == TEXT.encode()


@given(st.lists(st.floats() | st.floats(-1e10, 1e10), min_size=1, max_size=20))
def test_numbers_are_written_with_nine_digits(numbers: list[float]) -> None:
    """As Python writes each alone: a score that is not finite is inf, such a probability empty."""
    stream = io.StringIO()
    values = np.array(numbers)
    blank = [""] * len(numbers)
    some = {"msp.p": values, "msp": values}
    with ScoresWriter(stream, ("msp.p", "msp")) as writer:
        writer.write(ScoreBlock(blank, blank, blank, blank, np.ones(len(values)), some))
    assert stream.getvalue().splitlines()[1:] == [
        f",,,1,{x:.9g},{x:.9g}," if math.isfinite(x) else ",,,1,,inf," for x in numbers
    ]


def test_a_stream_is_csv_and_stays_open() -> None:
    stream = io.StringIO()
    with ScoresWriter(stream, ("msp", "energy")) as writer:
        for row in ROWS:
            writer.write(block([row], ("msp", "energy")))
    assert stream.getvalue() == TEXT


def test_json_lines_to_the_letter(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", ROWS, ("msp", "energy"))
    first, second, third = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {
        "path": "a.png",
        "label": "cat",
        "predicted": "dog",
        "confidence": 0.75,
        "msp": 0.25,
        "energy": -12.3456789,
        "error": "",
    }
    assert (second["msp"], second["confidence"]) == (None, None)
    assert second["error"] == "cannot identify image file"
    assert (third["msp"], third["energy"]) == ("inf", "inf")


def test_parquet_has_types(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [ScoreRow("a", "", "cat", 0.5, {"msp": 0.25, "msp.p": 0.5, "msp.ood": 1})]
    path = write(tmp_path / "s.parquet", rows, ("msp", "msp.p", "msp.ood"))
    table = pyarrow.parquet.read_table(path)
    assert [str(kind) for kind in table.schema.types] == (
        ["string"] * 3 + ["double"] * 3 + ["int8", "string"]
    )
    assert table.to_pylist()[0]["msp.ood"] == 1


@pytest.mark.parametrize("typed", [True, False])
def test_a_parquet_file_that_unpacks_to_much_more_is_refused(tmp_path: Path, typed: bool) -> None:
    """8 GB of paths in a few kB: one, which all rows have."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    many = 8192
    path = arrow.DictionaryArray.from_arrays(
        arrow.array([0] * many, arrow.int32()), arrow.array(["x" * 10**6])
    )
    rest = {"label": [""], "predicted": ["cat"], "confidence": [0.5], "msp": [0.25], "error": [""]}
    table = arrow.table({"path": path, **{name: cell * many for name, cell in rest.items()}})
    made = tmp_path / "s.parquet"
    pyarrow.parquet.write_table(table, made, store_schema=typed)
    assert made.stat().st_size < 200_000
    with pytest.raises(FileError, match=r"s.parquet: column 'path' unpacks to more than 256 MB"):
        read_scores(made)
    short = table.slice(0, 100)
    pyarrow.parquet.write_table(short, made, store_schema=typed)
    assert len(read_scores(made).paths) == 100


def test_a_parquet_file_that_says_it_unpacks_to_much_more_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    monkeypatch.setattr("oodcli.files.scores._UNPACKED", 1 << 20)
    cells = {"path": ["x" * (1 << 21)], "label": [""], "predicted": ["cat"], "confidence": [0.5]}
    table = arrow.table({**cells, "msp": [0.25], "error": [""]})
    pyarrow.parquet.write_table(table, tmp_path / "s.parquet")
    with pytest.raises(FileError, match=r"s.parquet: a group of rows unpacks to more than 1 MB"):
        read_scores(tmp_path / "s.parquet")
    nested = table.set_column(0, "path", arrow.array([["a", "b"]]))
    pyarrow.parquet.write_table(nested, tmp_path / "s.parquet")
    with pytest.raises(FileError, match=r"column 'path' is of the type list<"):
        read_scores(tmp_path / "s.parquet")


def test_a_parquet_file_that_contradicts_itself_does_not_end_the_process(tmp_path: Path) -> None:
    """A column that is said to have no empty cells, and counts of them."""
    pytest.importorskip("pyarrow")
    path = write(tmp_path / "s.parquet", ROWS, ("msp", "energy"))
    content = path.read_bytes()
    optional, required = b"\x25\x02\x18\x04path", b"\x25\x00\x18\x04path"  # in Thrift
    assert content.count(optional) == 1
    path.write_bytes(content.replace(optional, required))
    with pytest.raises(FileError, match=r"s.parquet"):
        read_scores(path)


def test_read_back(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"s.{suffix}", ROWS, ("msp", "energy"))
    scores = read_scores(path)
    assert scores.source == str(path)
    assert scores.paths == ("a.png", "b.png", "c.png")
    assert scores.labels == ("cat", "cat", "")
    assert scores.predicted == ("dog", "", "cat")
    np.testing.assert_array_equal(scores.confidence, [0.75, np.nan, 1.0])
    assert list(scores.detectors) == ["msp", "energy"]
    np.testing.assert_array_equal(scores.detectors["msp"], [0.25, np.inf])
    np.testing.assert_array_equal(scores.detectors["energy"], [-12.3456789, np.inf])
    assert scores.detectors["msp"].dtype == np.float64
    assert scores.errors == ("", "cannot identify image file", "")
    assert scores.unreadable == 1
    assert scores.readable.tolist() == [True, False, True]


def test_only_some_detectors(tmp_path: Path) -> None:
    scores = read_scores(write(tmp_path / "s.csv", ROWS, ("msp", "energy")))
    assert list(scores.only(["energy", "msp"]).detectors) == ["energy", "msp"]
    assert list(scores.only(["energy"]).detectors) == ["energy"]
    assert scores.only(["energy"]).unreadable == 1
    with pytest.raises(FileError, match=r"s\.csv: no column 'knn': it has msp, energy"):
        scores.only(["energy", "knn"])


def test_columns_of_a_threshold_are_no_detectors(tmp_path: Path, suffix: str) -> None:
    cells = {"msp": 0.25, "msp.p": 0.04, "msp.ood": 1}
    rows = [ScoreRow("a", "", "cat", 0.5, cells), ScoreRow("b", error="gone")]
    path = write(tmp_path / f"s.{suffix}", rows, tuple(cells))
    assert list(read_scores(path).detectors) == ["msp"]
    if suffix == "csv":
        assert "a,,cat,0.5,0.25,0.04,1,\n" in path.read_text()
    if suffix == "jsonl":
        assert '"msp.ood": 1,' in path.read_text()


def test_which_columns_are_detectors() -> None:
    assert is_detector("norm+")
    assert is_detector("knn[real]")
    assert not any(map(is_detector, ["path", "error", "confidence", "msp.p", "msp.ood"]))
    assert not any(map(is_detector, ["knn[real].ood", "knn[real].saw", "msp.why", "msp.basis"]))


def test_what_a_detector_saw_is_read_back(tmp_path: Path, suffix: str) -> None:
    cells = {"a[real]": 1.0, "a[real].saw": "OOD images (x.h5)", "a[virtual]": 2.0, "b": 3.0}
    path = tmp_path / f"s.{suffix}"
    write(path, [ScoreRow("p", scores=cells), ScoreRow("q", error="gone")], tuple(cells))
    scores = read_scores(path)
    assert list(scores.detectors) == ["a[real]", "a[virtual]", "b"]
    assert scores.saw == {"a[real]": "OOD images (x.h5)"}
    other = cells | {"a[real].saw": "OOD images (y.h5)"}
    blank = cells | {"a[real].saw": ""}
    rows = [ScoreRow("p", scores=each) for each in (cells, other, blank, cells)]
    assert read_scores(write(path, rows, tuple(cells))).saw == {
        "a[real]": "OOD images (x.h5) | OOD images (y.h5)"
    }
    assert read_scores(write(path, [ScoreRow("p", scores=blank)], tuple(cells))).saw == {}


def test_detectors_are_told_by_name_not_by_place(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("error,msp,label,path,confidence,predicted\n,0.5,cat,a.png,,dog\n")
    scores = read_scores(path)
    assert scores.paths == ("a.png",)
    assert scores.detectors["msp"].tolist() == [0.5]
    assert math.isnan(scores.confidence[0])


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    cells=st.lists(
        st.tuples(text, text, text, text, st.floats(width=32, allow_nan=False)), min_size=1
    )
)
def test_any_text_survives(
    tmp_path: Path, suffix: str, cells: list[tuple[str, str, str, str, float]]
) -> None:
    rows = [
        ScoreRow(path, label, error=error)
        if error
        else ScoreRow(path, label, predicted, 0.5, {"msp": score})
        for path, label, predicted, error, score in cells
    ]
    scores = read_scores(write(tmp_path / f"s.{suffix}", rows, ("msp",)))
    assert scores.paths == tuple(row.path for row in rows)
    assert scores.labels == tuple(row.label for row in rows)
    assert scores.predicted == tuple(row.predicted for row in rows)
    assert scores.errors == tuple(row.error for row in rows)
    # 9 digits are exact for a float32.
    written = np.array([r.scores["msp"] for r in rows if not r.error], np.float32)
    written[np.isneginf(written)] = np.inf
    np.testing.assert_array_equal(scores.detectors["msp"].astype(np.float32), written)


@pytest.mark.parametrize("path", ["=cmd()", "+1", "-1", "@x", ' "quoted", said\r\nhe', "ü\u2028"])
def test_a_path_is_kept_exactly(tmp_path: Path, suffix: str, path: str) -> None:
    row = ScoreRow(path, "", "cat", 0.5, {"msp": 0.5})
    written = write(tmp_path / f"s.{suffix}", [row], ("msp",))
    assert read_scores(written).paths == (path,)
    if suffix == "csv":  # for whoever reads it without us
        with written.open(newline="", encoding="utf-8") as stream:
            assert next(csv.DictReader(stream))["path"] == path


def test_a_name_that_is_not_utf8_is_escaped(tmp_path: Path, suffix: str) -> None:
    path = os.fsdecode(b"caf\xe9.png")
    written = write(tmp_path / f"s.{suffix}", [ScoreRow(path, error=f"{path}: gone")], ("msp",))
    assert read_scores(written).paths == ("caf\\udce9.png",)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, suffix: str) -> None:
    def peak(count: int) -> int:
        rows = (ScoreRow(f"{i}.png", "", "cat", 0.5, {"msp": i / 7}) for i in range(count))
        tracemalloc.start()
        try:
            write(tmp_path / f"{count}.{suffix}", rows, ("msp",))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is imported on first use
    assert peak(30_000) < 1.3 * peak(10_000) + 200_000


def test_parquet_in_several_row_groups(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = (ScoreRow(f"{i}.png", "", "cat", 0.5, {"msp": i}) for i in range(10_000))
    scores = read_scores(write(tmp_path / "s.parquet", rows, ("msp",)))
    np.testing.assert_array_equal(scores.detectors["msp"], np.arange(10_000))


def test_a_row_must_be_whole(tmp_path: Path) -> None:
    with ScoresWriter(tmp_path / "s.csv", ("msp", "energy")) as writer:
        with pytest.raises(ValueError, match=r"a\.png.* expected scores for msp, energy, .* msp"):
            writer.write(block([ScoreRow("a.png", "", "cat", 0.5, {"msp": 0.5})]))
        with pytest.raises(ValueError, match="got none"):
            writer.write(block([ScoreRow("a.png", "", "cat", 0.5)]))
        two = [ScoreRow(name, "", "cat", 0.5, {"msp": 1.0, "energy": 1.0}) for name in "ab"]
        for short in (
            {"predicted": ["cat"]},
            {"confidence": np.ones(1)},
            {"scores": {"msp": np.ones(2), "energy": np.ones(3)}},
            {"errors": ["", "gone"]},
            {"labels": [""]},
        ):
            with pytest.raises(ValueError, match=r"column \w+: \d cells?, expected \d"):
                writer.write(replace(block(two), **short))


def test_what_a_summary_counts(tmp_path: Path) -> None:
    logits = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [3.0, 1.0]])
    features = Features(3, label=torch.full((3,), -1), logits=logits)
    rows = Rows(("a", "b", "c", "d"), torch.full((4,), -1), (None, None, None, "gone"), features)
    chosen = [Chosen(detectors.get(name)()) for name in ("msp", "energy")]
    found = score_to_file(
        lambda start, stop: [rows, rows], 8, 4, chosen, ("0", "1"), tmp_path / "s.csv"
    )
    assert (found.rows, found.unreadable, found.infinite) == (8, 2, 2)


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two columns"):
        ScoresWriter(tmp_path / "s.csv", ("msp", "msp"))
    with pytest.raises(ValueError, match="two columns"):
        ScoresWriter(tmp_path / "s.csv", ("path",))
    with pytest.raises(ValueError, match="parquet needs a path"):
        ScoresWriter(io.StringIO(), ("msp",), "parquet")
    with pytest.raises(FileError, match=r"s\.xlsx: expected a scores file"):
        ScoresWriter(tmp_path / "s.xlsx", ("msp",))
    assert format_of(Path("/dev/fd/63")) == "csv"
    assert format_of(Path("A.CSV")) == "csv"


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "s.parquet"
    with pytest.raises(FileError, match=r"pip install 'oodcli\[parquet\]'"):
        write(path, ROWS, ("msp", "energy"))
    path.write_bytes(b"PAR1")
    with pytest.raises(FileError, match=r"pip install 'oodcli\[parquet\]'"):
        read_scores(path)


HEADER = "path,label,predicted,confidence,msp,error\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (HEADER, "has no row below its header"),
        ("path,label,predicted,confidence,error\na,,,,\n", "line 1: no column of a detector"),
        ("path,label,predicted,confidence,msp.p,error\n", "line 1: no column of a detector"),
        ("path,msp\na,1\n", "line 1: no column label, predicted, confidence, error"),
        (
            "path,path,label,predicted,confidence,msp,error\n",
            "line 1: column 'path' occurs .* once",
        ),
        (",path,label,predicted,confidence,msp,error\n", "line 1: a column has no name"),
        (HEADER + "a,,c,1,0.5,\nb,,c,1,x,\n", "line 3: msp is 'x', expected a number"),
        (HEADER + '"a\nb",,c,1,0.5,\nb,,c,1,,\n', "line 4: msp is empty, expected a number"),
        (HEADER + "a,,c,1,nan,\n", "line 2: msp is nan"),
        (HEADER + "a,,c,1,-inf,\n", "line 2: msp is -inf"),
        (HEADER + "a,,c,high,1,\n", "line 2: confidence is 'high', expected a number"),
        (
            HEADER + "a,,c,1,0.5,\nb,,c,1,0.\n",
            "line 3: 5 cells where the header has 6: .* truncated",
        ),
        (HEADER + "a,,c,1,0.5,,\n", "line 2: 7 cells where the header has 6"),
        (HEADER + 'a,,c,1,0.5,\n"b,,c', "line 3: not CSV .* truncated"),
        (b"\x89HDF\r\n\x1a\n\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_broken_csv(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "s.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=f"^{path}.*{message}") as caught:
        read_scores(path)
    assert "\n" not in str(caught.value)


OBJECT = {"path": "a", "label": "", "predicted": "c", "confidence": 1, "msp": 0.5, "error": ""}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (json.dumps(OBJECT) + '\n{"path": "b', "line 2: not JSON .* truncated"),
        (json.dumps(OBJECT) + '\n{"path": "b"}\n', "line 2: the keys are not those"),
        ('{"path": 1, "path": 2}\n', "line 1: column 'path' occurs more than once"),
        ("[1]\n", "line 1: expected an object"),
        ("1\n", "line 1: expected an object"),
        (json.dumps(OBJECT | {"msp": math.nan}), "line 1: msp is nan"),
        (json.dumps(OBJECT | {"msp": None}), "line 1: msp is empty"),
        (json.dumps(OBJECT | {"msp": True}), "line 1: msp is True"),
        (json.dumps(OBJECT | {"msp": [1]}), r"line 1: msp is \[1\]"),
        (json.dumps(OBJECT | {"msp": 10**400}), "line 1: msp is 1000"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_broken_json_lines(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=f"^{path}.*{message}"):
        read_scores(path)


def test_broken_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    whole = write(tmp_path / "whole.parquet", ROWS, ("msp", "energy")).read_bytes()
    for name, content in {"cut": whole[:-20], "empty": b"", "other": b"path,label\n"}.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"is not parquet, or is truncated .*: score again"):
            read_scores(path)


def test_a_null_in_parquet_is_named_by_its_row(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [OBJECT, OBJECT | {"msp": None}]
    path = tmp_path / "s.parquet"
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), path)
    with pytest.raises(FileError, match=r"s\.parquet, row 2: msp is empty"):
        read_scores(path)


def test_missing_and_misplaced(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"s\.csv does not exist"):
        read_scores(tmp_path / "s.csv")
    with pytest.raises(FileError, match=r"cache\.h5: expected a scores file, \.csv"):
        read_scores(tmp_path / "cache.h5")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(FileError, match="is a folder"):
        read_scores(tmp_path / "folder.csv")


def test_what_a_spreadsheet_saved_again_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode() + b"\r\n")
    assert read_scores(path).paths == ("a.png", "b.png", "c.png")
