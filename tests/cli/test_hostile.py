"""Broken and hostile input: one sentence, never a traceback, a hang, or memory by a header."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path
from random import Random

import h5py
import numpy as np
import pytest
import torch
from commands import Result, oodcli
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutated
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from samples import PARSERS, SLOW, Parser, write_samples

from oodcli.detectors.energy import Energy
from oodcli.errors import FileError, OodcliError
from oodcli.files.artefact import Artefact, read_artefact, write_artefact
from oodcli.files.scores import read_scores
from oodcli.images import batches, open_images, reading
from oodcli.images import files as image_files
from oodcli.networks.architectures import build
from oodcli.networks.preprocessing import Preprocessing

PLAIN = Preprocessing((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def refused(result: Result, *words: str, status: int = 1) -> None:
    """One sentence on standard error, and the exit status."""
    complaints = [line for line in result.err.splitlines() if line.startswith("oodcli: ")]
    assert result.status == status, result.err
    assert "Traceback" not in result.err
    assert len(complaints) == (status == 1), result.err
    for word in words:
        assert word in result.err


# --- at random ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parser(tmp_path_factory: pytest.TempPathFactory) -> Parser:
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder)
    with warnings.catch_warnings():
        return Parser(folder)


@pytest.mark.parametrize("kind", PARSERS)
def test_samples_are_valid(parser: Parser, kind: str, tmp_path: Path) -> None:
    how, name = PARSERS[kind]
    shutil.copy(parser.samples / name, tmp_path / name)
    parser.parse(how, tmp_path / name)


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(st.sampled_from([kind for kind in PARSERS if kind not in SLOW]), st.integers(0, 10**9))
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_mutated_files_are_read_or_refused(parser: Parser, kind: str, seed: int) -> None:
    how, name = PARSERS[kind]
    folder = parser.samples.parent / "mutated"
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(mutated((parser.samples / name).read_bytes(), name, Random(seed)))
    sentence = "read"
    try:
        parser.parse(how, path)
    except OodcliError as error:
        sentence = str(error)
    assert sentence.strip()
    assert os.listdir(folder) == [name]
    path.unlink()


# --- checkpoints and model cards -----------------------------------------------------------------


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A copy of the demo's, with its card."""
    for name in ("digits.pt", "digits.toml"):
        shutil.copy(trained / name, tmp_path / name)
    return tmp_path / "digits.pt"


def inspect(path: Path) -> Result:
    return oodcli("inspect", path)


def test_code_in_a_pickle_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "canary"),))

    for protocol in (0, 2, 4):
        checkpoint.write_bytes(pickle.dumps({"state_dict": Hostile()}, protocol))
        refused(inspect(checkpoint), "digits.pt")
        refused(oodcli("score", checkpoint, "noise:uniform?n=2"), "digits.pt")
    assert not (tmp_path / "canary").exists()


def test_a_checkpoint_that_unpacks_to_a_hundred_times_its_size(checkpoint: Path) -> None:
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("net/data/0", "w") as member:
            for _ in range(300):
                member.write(bytes(1 << 20))
        archive.writestr("net/data.pkl", b"")
    refused(inspect(checkpoint), "decompression bomb", "torch.save")


def rebuilt(checkpoint: Path, **changes: object) -> None:
    state = torch.load(checkpoint, weights_only=True)
    torch.save(
        {**state, **{key.replace("__", "."): value for key, value in changes.items()}}, checkpoint
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("conv1__weight", torch.zeros(()), marks=pytest.mark.slow),
        pytest.param("conv1__weight", torch.zeros(3), marks=pytest.mark.slow),
        pytest.param("linear__weight", torch.zeros(()), marks=pytest.mark.slow),
        ("linear__weight", torch.zeros(0, 16)),
        ("conv1__weight", torch.zeros(1).expand(1 << 30)),
        ("bn1__running_mean", torch.zeros(1).expand(10**12)),
        ("bn1__weight", torch.ones(4).to_sparse()),
        ("bn1__running_var", torch.ones(16, dtype=torch.complex64)),
        ("bn1__bias", torch.zeros(16, device="meta")),
    ],
)
def test_tensors_of_impossible_shapes_and_kinds(
    checkpoint: Path, key: str, value: torch.Tensor
) -> None:
    rebuilt(checkpoint, **{key: value})
    card = checkpoint.with_suffix(".toml")
    refused(inspect(checkpoint), "digits.pt")
    card.unlink()  # recognised, not named
    refused(inspect(checkpoint), "digits.pt")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("mean = [" + "9" * 400 + "]", "mean must be"),
        ("mean = " + "9" * 5000, "TOML"),
        ("num_classes = 0x" + "f" * 5000, "num_classes must be"),
        ("num_classes = 99999999999999", "num_classes must be"),
        ("input_size = [100000, 100000]", "no classifier has such an input"),
        ("resize = 1000000", "resize"),
        ("arch = " + "[" * 5000, "TOML"),
        ('"a\\nb\\u001b[2J" = 1', r"a\nb\x1b[2J"),
    ],
)
def test_hostile_model_cards(checkpoint: Path, text: str, word: str) -> None:
    checkpoint.with_suffix(".toml").write_text(text, encoding="utf-8")
    refused(inspect(checkpoint), "oodcli: ", word)


def test_a_model_card_of_a_hundred_megabytes(checkpoint: Path) -> None:
    with checkpoint.with_suffix(".toml").open("w") as file:
        file.write('arch = "')
        for _ in range(100):
            file.write("x" * (1 << 20))
    refused(inspect(checkpoint), "is not a model card")


def test_a_safetensors_header_of_an_exabyte(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(inspect(path), "net.safetensors")
    refused(oodcli("score", checkpoint, "noise:uniform?n=2", "-d", path), "net.safetensors")


def test_a_program_with_broken_weights(parser: Parser, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    with zipfile.ZipFile(parser.samples / "program.pt2") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    weights = [name for name in members if "/weights/" in name and not name.endswith(".json")]
    members[weights[0]] = b"\xff" * len(members[weights[0]])  # NaN
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused(inspect(path), "net.pt2")


# --- images ---------------------------------------------------------------------------------------


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, "#123456").save(stream, "PNG")
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def giant_png() -> bytes:
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


def giant_tiff() -> bytes:
    tags = ((256, 2**31 - 1), (257, 2**31 - 1), (258, 8), (259, 1), (262, 1), (273, 8), (279, 99))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def test_every_kind_of_broken_image_is_a_row(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    bad = {
        "cut.png": png((64, 64))[:100],
        "empty.png": b"",
        "giant.png": giant_png(),
        "giant.tif": giant_tiff(),
        "text.jpg": b"no image",
    }
    good = {
        "1x1.png": png((1, 1)),
        "wide.png": png((65_500, 1)),
        "a\nb,c.png": png(),
        "=1+1.png": png(),
    }
    for name, content in {**bad, **good, "wrong.gif": png()}.items():
        (folder / name).write_bytes(content)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("#ff0000", "#00ff00")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "me.png").symlink_to("me.png")
    output = tmp_path / "out.csv"
    result = oodcli("score", trained / "digits.pt", folder, "-d", "msp", "-o", output)
    refused(result, "6 unreadable", status=3)
    with output.open(newline="", encoding="utf-8") as stream:
        rows = {Path(row["path"]).name: row for row in csv.DictReader(stream)}
    assert {name for name, row in rows.items() if row["error"]} == {*bad, "me.png"}
    assert {*good, "wrong.gif", "moving.gif"} <= rows.keys()
    assert all(row["error"] or math.isfinite(float(row["msp"])) for row in rows.values())
    assert sorted(os.listdir(tmp_path)) == ["in", "out.csv", "out.csv.json"]


def test_paths_that_lead_out_of_an_archive_are_names(trained: Path, tmp_path: Path) -> None:
    names = ("../../out.png", "/abs/out.png", "a/../../out.png", "a\nb.png", "=cmd().png")
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with zipfile.ZipFile(inside / "x.zip", "w") as archive:
        for name in names:
            archive.writestr(name, png())
    with tarfile.open(inside / "x.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(png())
            tar.addfile(info, io.BytesIO(png()))
        link = tarfile.TarInfo("up.png")
        link.type, link.linkname = tarfile.SYMTYPE, "../../../etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    for name, status in (("x.zip", 0), ("x.tar", 3)):
        output = tmp_path / "scores.csv"
        result = oodcli("score", trained / "digits.pt", inside / name, "-d", "msp", "-o", output)
        refused(result, status=status)
        scores = read_scores(output)
        assert {path.split(name, 1)[1][1:] for path in scores.paths} >= set(names)
        output.unlink()
        output.with_name("scores.csv.json").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_bombs_in_an_archive_are_read_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, count = 8 << 20, 24
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(count):
            archive.writestr(f"{number:02d}.png", bytes(size))
    monkeypatch.setattr(reading, "BYTES_AHEAD", 1)
    decode = image_files.load_bytes

    def slowly(content: bytes) -> Image.Image:
        time.sleep(0.1)
        return decode(content)

    monkeypatch.setattr(image_files, "load_bytes", slowly)
    source = open_images(str(tmp_path / "x.zip"), PLAIN, ("a", "b"))
    tracemalloc.start()
    try:
        found = [error for batch in batches(source, PLAIN, 4, 2) for error in batch.errors]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == ["not an image, or damaged"] * count
    assert peak < 8 * size  # the four that are fetched together, and what zipfile copies


def test_closing_early_does_not_wait_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number in range(40):
            archive.writestr(f"{number:02d}.png", png())
    monkeypatch.setattr(reading, "BYTES_AHEAD", 1)
    stream = batches(open_images(str(tmp_path / "x.zip"), PLAIN, ("a", "b")), PLAIN, 4, 1)
    next(stream)
    stream.close()


def test_a_tar_whose_name_is_longer_than_names_are(trained: Path, tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    before = tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "x.tar").write_bytes(before + info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    refused(oodcli("score", trained / "digits.pt", tmp_path / "x.tar"), "x.tar", "an entry of type")


def npy(shape: tuple[int, ...], kind: str = "|u1", order: bool = False) -> bytes:
    stream = io.BytesIO()
    header = {"descr": kind, "fortran_order": order, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + bytes(64)


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"images": npy((10**12, 8, 8, 3))}, "too large"),
        ({"images": npy((1, 10**6, 10**6, 3))}, "too large"),
        ({"images": npy((10**8, 8, 8, 3), order=True)}, "Fortran"),
        ({"images": npy((-1, 8, 8, 3))}, "x.npz"),
        ({"images": npy((2, 2, 2)), "labels": npy((10**12,), "<i8")}, "labels"),
        ({"images": npy((2, 2, 2)), "labels": npy((2,), f"<U{5 * 10**8}")}, "labels"),
        ({"images": npy((2, 2, 2)), "classes": npy((10**12,), "<U9")}, "classes"),
        ({"images": npy((100, 8, 8, 3))}, "damaged at image"),
        ({"images": b"\x93NUMPY\2\0\xff\xff\xff\xff"}, "format 2.0"),
        ({"images": b"\x93NUMPY\1\0\x10\0{'descr': ('|u1'"}, "x.npz"),
        ({"images": b"\x93NUMPY\1\0\x10\0" + b"(" * 16}, "x.npz"),
        ({"images": b""}, "x.npz"),
    ],
)
def test_an_npz_that_claims_more_than_it_has(
    trained: Path, tmp_path: Path, arrays: dict[str, bytes], word: str
) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    tracemalloc.start()
    try:
        refused(oodcli("score", trained / "digits.pt", tmp_path / "x.npz"), word)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


# --- HDF5 -----------------------------------------------------------------------------------------


def claim(file: h5py.File, name: str, shape: tuple[int, ...], kind: object = "float32") -> None:
    """A dataset without data."""
    if name in file:
        del file[name]
    chunks = tuple(min(length, 16) for length in shape)
    file.create_dataset(name, shape, kind, chunks=chunks)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("path", (10**12,), h5py.string_dtype()),
        ("label", (10**12,), "int64"),
        ("logits", (10**12, 10), "float32"),
        ("logits", (100, 10**12), "float32"),
        ("head/weight", (10, 10**12), "float32"),
        ("embedding", (100, 3), "float32"),
        ("embedding", (100,), "float32"),
        ("logits", (100, 11), "float32"),
        ("path", (100, 2), h5py.string_dtype()),
        ("logits", (100, 10), "S3"),
        ("logits", (100, 10), "complex64"),
        ("label", (100,), "float32"),
        ("label", (100, 2), "int64"),
        ("batchnorm/bn1/running_var", (10**12,), "float32"),
        ("batchnorm/bn1/running_var", (3,), "float32"),
        ("batchnorm/bn1/running_mean", (8, 2), "float32"),
        ("batchnorm/bn1/spatial_size", (10**9,), "uint8"),
        ("layers", (10**12,), "float32"),
        ("batchnorm", (10**12,), "float32"),
    ],
)
def test_a_cache_that_claims_what_it_has_not(
    fitted: Path, tmp_path: Path, name: str, shape: tuple[int, ...], kind: object
) -> None:
    path = tmp_path / "c.h5"
    shutil.copy(fitted / "v.features.h5", path)
    with h5py.File(path, "a") as file:
        claim(file, name, shape, kind)
    refused(oodcli("score", path, "-d", "msp"), "c.h5")
    refused(oodcli("fit", path, "-d", "mds", "-o", tmp_path / "d"), "c.h5")


def test_a_cache_without_the_statistics_of_the_input(fitted: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    shutil.copy(fitted / "v.features.h5", path)
    with h5py.File(path, "a") as file:
        file.move("batchnorm/input", "batchnorm/other")
    refused(oodcli("score", path, "-d", "in-dms"), "c.h5", "/batchnorm/input is missing")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_names", '"cat"'),
        ("class_names", "[1, 2]"),
        ("class_names", "[" * 5000),
        ("preprocessing", "[]"),
        ("preprocessing", '{"input_size": [8, 8], "mean": [0.1, 0.2], "std": [1, 1]}'),
        ("preprocessing", '{"input_size": [1e999, 8], "mean": [0.1], "std": [1]}'),
        ("seed", "x"),
        ("version", 2),
        ("version", [1, 1]),
        ("format", [1.0, 2.0]),
        ("format", h5py.Empty("f")),
    ],
)
@pytest.mark.parametrize("kind", ["v.features.h5", "v.h5"])
def test_attributes_of_another_kind(
    fitted: Path, tmp_path: Path, kind: str, name: str, value: object
) -> None:
    path = tmp_path / "c.h5"
    shutil.copy(fitted / kind, path)
    with h5py.File(path, "a") as file:
        file.attrs[name] = value
    if kind == "v.h5":
        result = oodcli("extract", fitted / "digits.pt", path, "-o", tmp_path / "out.h5")
    else:
        result = oodcli("score", path, "-d", "msp")
    refused(result, "c.h5")


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("images", (10**12, 1, 8, 8), "float16"),
        ("images", (100, 1, 10**6, 10**6), "float16"),
        ("images", (100, 1, 8, 8), "S4"),
        ("label", (10**12,), "int64"),
        ("label", (100,), "S4"),
    ],
)
def test_virtual_images_that_are_not_there(
    fitted: Path, tmp_path: Path, name: str, shape: tuple[int, ...], kind: str
) -> None:
    path = tmp_path / "c.h5"
    shutil.copy(fitted / "v.h5", path)
    with h5py.File(path, "a") as file:
        claim(file, name, shape, kind)
    refused(oodcli("score", fitted / "digits.pt", path, "-d", "msp"), "c.h5", "oodcli invert")


def test_code_that_a_model_card_names_is_not_run_unasked(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    network = "from oodcli.networks.architectures import build\n\n\ndef make():\n"
    network += "    return build('resnet8-cifar-w4', 3)\n"
    (tmp_path / "net.py").write_text(f"open({str(canary)!r}, 'w').close()\n{network}")
    arch = f"{tmp_path / 'net.py'}:make"
    torch.save(build("resnet8-cifar-w4", 3).state_dict(), tmp_path / "net.pt")
    (tmp_path / "net.toml").write_text(f'arch = "{arch}"\ninput_size = [8, 8]\n')
    words = ("score", tmp_path / "net.pt", "noise:uniform?n=2", "-d", "msp")
    refused(oodcli(*words), "net.toml names code, arch = ", "--arch", "--trust-pickle")
    refused(oodcli("inspect", *words[1:2]), "net.toml names code")
    refused(oodcli(*words, "--card", tmp_path / "net.toml"), "net.toml names code")
    assert not canary.exists()
    for asked in (("--trust-pickle",), ("--arch", arch)):
        assert oodcli(*words, *asked).status == 0
        assert canary.exists()
        canary.unlink()


def test_a_dataset_in_place_of_layers_is_not_searched(fitted: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    for name in ("layers", "layers/layer1"):
        shutil.copy(fitted / "v.h5", path)
        with h5py.File(path, "a") as file:
            claim(file, name, (10**12,))
        out = ("-o", tmp_path / "out.h5", "--restart")
        words = ("extract", fitted / "digits.pt", path, *out)
        refused(oodcli(*words), "c.h5", "is not a group")
        refused(oodcli("inspect", path), "c.h5", "is not a group")
        refused(oodcli("inspect", "--verify", path), "c.h5", "is not a group")


@pytest.mark.slow
def test_a_damaged_index_of_chunks_does_not_end_the_process(fitted: Path, tmp_path: Path) -> None:
    """The library crashes where it is asked for the size of such an index, not where it reads."""
    path = tmp_path / "c.h5"
    shutil.copy(fitted / "v.h5", path)
    with h5py.File(path, "a", libver="latest") as file:
        file.create_dataset("more", (40, 4), "f4", chunks=(2, 2), maxshape=(None, None))[:] = 1
        file["more"].attrs["sha256"] = "0" * 64
    content = bytearray(path.read_bytes())
    content[content.index(b"BTHD\0\x0a") + 15] ^= 4
    path.write_bytes(content)
    words = [sys.executable, "-m", "oodcli", "inspect", "--verify", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    refused(Result(done.returncode, done.stdout, done.stderr), "c.h5", "is truncated, damaged")


def test_a_group_in_itself_has_an_end(fitted: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    shutil.copy(fitted / "v.h5", path)
    with h5py.File(path, "a") as file:
        file["again"] = file["/"]
    refused(oodcli("inspect", "--verify", path), "c.h5", "is too deep")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"path": ' + "[" * 3000),
        ("a.safetensors", (50_000).to_bytes(8, "little") + b"[" * 50_000),
        ("b.safetensors", (2).to_bytes(8, "little") + b"[]"),
    ],
)
def test_what_cannot_be_inspected_is_one_sentence(
    tmp_path: Path, name: str, content: str | bytes
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    refused(oodcli("inspect", tmp_path / name), name)


def test_virtual_images_of_a_newer_version(fitted: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    shutil.copy(fitted / "v.h5", path)
    with h5py.File(path, "a") as file:
        file.attrs["version"] = 2
    refused(oodcli("score", fitted / "digits.pt", path, "-d", "msp"), "newer oodcli")


# --- artefacts ------------------------------------------------------------------------------------


def changed(path: Path, target: Path, metadata: dict[str, str], tensors: dict[str, object]) -> None:
    with safe_open(path, framework="pt") as file:
        before = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = {k: v for k, v in file.metadata().items() if k != "tensors_sha256"}
    save_file({**before, **tensors}, target, {**about, **metadata})


@pytest.mark.parametrize(
    "metadata",
    [
        {"fitted_on": "[]"},
        {"fitted_on": "3"},
        {"hyperparameters": "[1]"},
        {"hyperparameters": "[" * 5000},
        {"hyperparameters": '{"T": true}'},
        {"hyperparameters": '{"T": [1]}'},
        {"calibration": "[]"},
        {"calibration": '{"plain": {"real": 1e999, "virtual": 0, "matched_accuracy": null}}'},
        {"calibration": '{"plain": {"real": 1, "virtual": 0, "matched_accuracy": null}}'},
        {"threshold": "high"},
    ],
)
def test_metadata_of_another_kind(tmp_path: Path, metadata: dict[str, str]) -> None:
    write_artefact(Artefact(Energy(), "abc", {}), tmp_path / "energy.safetensors")
    path = tmp_path / "x.safetensors"
    scores = {
        "calibration/plain/scores": torch.zeros(3, 2),
        "calibration/plain/weights": torch.zeros(3),
    }
    changed(
        tmp_path / "energy.safetensors",
        path,
        metadata,
        scores if "calibration" in metadata else {},
    )
    with pytest.raises(FileError, match=r"x\.safetensors is damaged"):
        read_artefact(path)


def test_a_fitted_detector_of_another_shape(fitted: Path, tmp_path: Path) -> None:
    good = fitted / "fitted" / "c2ir-z.safetensors"
    with safe_open(good, framework="pt") as file:
        name = next(name for name in sorted(file.keys()) if name.startswith("centre/"))
    path = tmp_path / "c2ir-z.safetensors"
    for wrong in (torch.zeros(10, 999), torch.zeros(3), torch.zeros(())):
        changed(good, path, {}, {name: wrong.to(torch.float64)})
        refused(oodcli("score", fitted / "v.features.h5", "-d", path), "c2ir-z", "fit it again")


# --- scores ---------------------------------------------------------------------------------------

HEADER = "path,label,predicted,confidence,msp,error\n"


def test_a_line_of_a_hundred_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    with path.open("w") as file:
        file.write(HEADER + "a,,c,1,")
        for _ in range(100):
            file.write("1" * (1 << 20))
    good = tmp_path / "good.csv"
    good.write_text(HEADER + "a,,c,1,0.5,\n")
    refused(oodcli("evaluate", "--id", good, "--ood", f"x={path}"), "s.csv, line 2: not CSV")


@pytest.mark.parametrize(
    ("cell", "word"),
    [("[" * 50_000, "not JSON"), ("9" * 5000, "not JSON"), ('"' + "x" * 10**6 + '"', "a number")],
)
def test_hostile_json_lines(tmp_path: Path, cell: str, word: str) -> None:
    record = {"path": "a", "label": "", "predicted": "c", "confidence": 1, "msp": 0, "error": ""}
    line = json.dumps(record).replace('"msp": 0', f'"msp": {cell}')
    (tmp_path / "s.jsonl").write_text(line + "\n")
    result = oodcli("evaluate", "--id", tmp_path / "s.jsonl", "--ood", f"x={tmp_path / 's.jsonl'}")
    refused(result, "s.jsonl, line 1", word)
    assert len(result.err) < 1000


def test_spreadsheet_formulas_are_kept_and_read_back(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "@SUM(A1).png").write_bytes(png())
    (tmp_path / "list.txt").write_text("@SUM(A1).png\n=cmd()!A0.png\n")
    output = tmp_path / "s.csv"
    words = ("score", trained / "digits.pt", tmp_path / "list.txt", "-d", "msp", "-o", output)
    refused(oodcli(*words), status=3)
    assert [Path(path).name for path in read_scores(output).paths] == [
        "@SUM(A1).png",
        "=cmd()!A0.png",
    ]
