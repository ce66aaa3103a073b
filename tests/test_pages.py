"""The heads of the pages of parquet files, which say what a page unpacks to."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oodcli.errors import FileError, ImagesError
from oodcli.files.pages import largest_page
from oodcli.files.scores import read_scores
from oodcli.images.pieces import chunks, pieces

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_the_largest_page_is_found(
    version: str, compression: str, dictionary: bool, tmp_path: Path
) -> None:
    numbers = np.random.default_rng(0).integers(0, 100, 5000).astype(np.float64)
    texts = [f"image-{number:.0f}-" + "é" * 2000 for number in numbers]  # long minima and maxima
    schema = arrow.schema(
        [arrow.field("number", arrow.float64(), nullable=False), ("text", arrow.string())]
    )
    parquet.write_table(
        arrow.table({"number": numbers, "text": texts}, schema=schema),
        tmp_path / "t.parquet",
        compression=compression,
        use_dictionary=dictionary,
        data_page_version=version,
        data_page_size=8000,
        write_batch_size=100,
        row_group_size=2500,
        write_page_index=True,
    )
    file = parquet.ParquetFile(tmp_path / "t.parquet")
    with (tmp_path / "t.parquet").open("rb") as stream:
        for group in range(2):
            number, text = (file.metadata.row_group(group).column(i) for i in range(2))
            # 100 numbers at a time, until there are 8,000 bytes; or 2,500 places of 7 bits in a
            # dictionary, and the heads of runs of them.
            expected = 2188 if dictionary else 8000
            assert expected <= largest_page(stream, number) <= expected + 20 * dictionary
            assert text.total_uncompressed_size / 26 < largest_page(stream, text)
            assert largest_page(stream, text) < text.total_uncompressed_size
    assert file.read().num_rows == 5000


def natural(number: int, length: int = 0) -> bytes:
    """A number as thrift writes it, in so many bytes."""
    found = bytearray()
    while number > 127 or len(found) + 1 < length:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def understated(path: Path, chunk: object) -> None:
    """The file says that a column unpacks to 50 bytes; its page says what is true."""
    data = path.read_bytes()
    true = natural(2 * chunk.total_uncompressed_size)
    place = data.rindex(true, 0, len(data))
    path.write_bytes(data[:place] + natural(100, len(true)) + data[place + len(true) :])


def test_scores_in_a_page_that_unpacks_to_more_than_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    many = 400_000
    texts = {"path": "x" * 1000, "label": "", "predicted": "cat", "error": ""}
    table = arrow.table(
        {name: arrow.array([text]).take(arrow.array([0] * many)) for name, text in texts.items()}
        | {name: np.zeros(many) for name in ("confidence", "msp")}
    )
    parquet.write_table(
        table, path, use_dictionary=False, compression="zstd", data_page_size=1 << 30,
        write_batch_size=many, row_group_size=many, max_rows_per_page=many,
    )  # fmt: skip
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    assert path.stat().st_size < 1_000_000
    assert chunk.total_uncompressed_size > 400_000_000
    understated(path, chunk)
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    assert chunk.total_uncompressed_size == 50
    with pytest.raises(FileError, match="column 'path' unpacks to more than 256 MB"):
        read_scores(path)


def test_images_in_a_page_that_unpacks_to_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    path = tmp_path / "i.parquet"
    parquet.write_table(arrow.table({"image": [b"x" * 5000] * 3}), path, use_dictionary=False)
    (piece,) = pieces(str(path), 10)
    (chunk,) = chunks(piece, 10)
    assert len(chunk.paths) == 3
    monkeypatch.setattr("oodcli.images.pieces.LARGEST_MEMBER", 10_000)
    for where in (str(path), path.as_uri()):
        (piece,) = pieces(where, 10)
        with pytest.raises(ImagesError, match="a page that unpacks to more than"):
            list(chunks(piece, 10))


@given(st.binary(max_size=60), st.integers(0, 100))
def test_any_bytes_are_heads_or_damaged(data: bytes, length: int) -> None:
    chunk = SimpleNamespace(
        data_page_offset=0, has_dictionary_page=False, total_compressed_size=length
    )
    try:
        assert largest_page(io.BytesIO(data), chunk) >= 0
    except ValueError as error:
        assert "head of" in str(error)  # noqa: PT017


def test_fields_of_every_kind_are_passed_over() -> None:
    fields = [
        b"\x25\x0a\x15\x08",  # fields 2 and 3: 5 and 4 bytes
        b"\x11\x12\x13\x07\x14\x81\x01\x17" + bytes(8),  # true, false, a byte, 129, a double
        b"\x18\x03abc\x19\x31\x01\x02\x01\x19\xf6\x10" + b"\x81\x01" * 16,  # text, lists
        b"\x1c\x06\x28\x04\x11\x00",  # fields; one of them with its number, 20, written out
    ]
    first = b"".join(fields) + b"\x00" + b"data"
    data = first + first.replace(b"\x25\x0a", b"\x25\x12", 1)
    chunk = SimpleNamespace(
        data_page_offset=0, has_dictionary_page=False, total_compressed_size=len(data)
    )
    assert largest_page(io.BytesIO(data), chunk) == 9


def test_a_head_that_goes_on_and_on() -> None:
    deep = SimpleNamespace(
        data_page_offset=0, has_dictionary_page=False, total_compressed_size=1 << 20
    )
    for data in (b"\x1c" * 20_000, b"\x15" + b"\xff" * 20_000, b"\x19\xfc" + b"\xff\x7f" * 20_000):
        with pytest.raises(ValueError, match="head of"):
            largest_page(io.BytesIO(data), deep)
    empty = b"\x15\x00\x15\x00\x15\x00\x00"
    with pytest.raises(ValueError, match="head of"):
        largest_page(io.BytesIO(empty * 70_000), deep)
