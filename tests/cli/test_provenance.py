"""How files were made: said by each, shown by ``inspect``, checked by ``--verify``, compared by the
stages."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import chdir
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from commands import oodcli
from PIL import Image
from samples import HAS_PARQUET

from oodcli import __version__
from oodcli.files.scores import read_scores
from oodcli.networks.architectures import build

CACHES = ("v.features.h5", "photos.h5", "id.h5")
DETECTORS = ("virtual/c2ir-z.safetensors", "real/knn.safetensors", "real/energy.safetensors")
SCORES = ("photos.csv", "photos.jsonl", *(["photos.parquet"] if HAS_PARQUET else []))
VERIFIABLE = ("v.h5", *CACHES, *DETECTORS)


def pipeline(trained: Path, folder: Path) -> Path:
    """A file of every kind in a new folder, made by commands that name everything from there."""
    folder.mkdir()
    for name in ("digits.pt", "digits.toml"):
        shutil.copy(trained / name, folder / name)
    with np.load(trained / "test.npz") as arrays:
        parts = {name: arrays[name][:60] for name in ("images", "labels")}
        np.savez(folder / "id.npz", **parts, classes=arrays["classes"])
    (folder / "photos").mkdir()
    for row in range(5):
        Image.fromarray(parts["images"][row].squeeze()).save(folder / "photos" / f"{row}.png")
    (folder / "photos" / "3.png").write_bytes(b"no image")
    scored = ("-d", "virtual/c2ir-z.safetensors", "-d", "energy")
    with chdir(folder):
        for status, *words in (
            (0, "invert", "digits.pt", "--per-class", 2, "--steps", 3, "--no-compile"),
            (0, "extract", "digits.pt", "digits.virtual.h5", "-o", "v.features.h5"),
            (3, "extract", "digits.pt", "photos", "-o", "photos.h5"),
            (0, "extract", "digits.pt", "id.npz", "-o", "id.h5"),
            (0, "fit", "v.features.h5", "-d", "c2ir-z", "-o", "virtual"),
            (0, "fit", "id.h5", "-d", "knn", "-d", "energy", "-p", "knn.k=3", "-o", "real"),
            *((3, "score", "digits.pt", "photos", *scored, "-o", name) for name in SCORES),
            (0, "score", "id.h5", *scored, "-o", "id.csv"),
            (0, "evaluate", "--id", "id.csv", "--ood", "p=photos.csv", "--resamples", 9, "-o", "r"),
        ):
            result = oodcli(*words)
            assert result.status == status, result.err
        Path("digits.virtual.h5").rename("v.h5")
    return folder


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory) -> Path:
    return pipeline(trained, tmp_path_factory.mktemp("provenance") / "made")


@pytest.fixture(scope="module")
def others(made) -> Path:
    """``made``, with what comes of another checkpoint and of another preprocessing beside it."""
    state = torch.load(made / "digits.pt", weights_only=True)
    torch.save({name: value * 1.01 for name, value in state.items()}, made / "other.pt")
    shutil.copy(made / "digits.toml", made / "other.toml")
    with chdir(made):
        for words in (
            ("extract", "other.pt", "id.npz", "-o", "other.h5"),
            ("extract", "digits.pt", "id.npz", "--mean", "0.6", "-o", "bright.h5"),
        ):
            result = oodcli(*words)
            assert result.status == 0, result.err
    return made


@pytest.fixture
def copy(made, tmp_path):
    """A copy of one of the files, to be damaged."""

    def copied(name: str) -> Path:
        return Path(shutil.copy(made / name, tmp_path / Path(name).name))

    return copied


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def brief(path: Path) -> str:
    """As sentences name a checkpoint."""
    return sha256(path.read_bytes())[:12] + "…"


def fails(*words: object, says: tuple[str, ...]) -> None:
    result = oodcli(*words)
    assert result.status == 1, result
    (sentence,) = (line for line in result.err.splitlines() if line.startswith("oodcli: "))
    for part in says:
        assert part in sentence


# ---------------------------------------------------------------------------- inspect


@pytest.mark.parametrize(
    ("name", "kind", "shown"),
    [
        ("v.h5", "virtual", ("20, 0 unreadable, 20 labelled", "layers/*/sensitivity 7×", "kl")),
        (
            "v.features.h5",
            "features",
            ("20, 0 unreadable", "embedding 64", "batchnorm/*/var", "digits.virtual.h5"),
        ),
        ("photos.h5", "features", ("5, 1 unreadable, 0 labelled", "logits 10", "photos")),
        (
            "virtual/c2ir-z.safetensors",
            "detector",
            ("c2ir-z", "20 virtual images: v.features.h5, from digits.virtual.h5", "nothing"),
        ),
        (
            "real/knn.safetensors",
            "detector",
            ("knn", "k 3", "60 real images: id.h5, from id.npz", "12 real images", "id.npz"),
        ),
        ("real/energy.safetensors", "detector", ("needs no fitting", "60 real images")),
        *(
            (
                name,
                f"scores{Path(name).suffix}",
                ("5, 1 unreadable", "c2ir-z, energy", "oodcli score"),
            )
            for name in SCORES
        ),
        ("r/metrics.json", "metrics.json", ("evaluate --id", "auroc", "p: photos.csv, 5 rows")),
        ("r/metrics.csv", "metrics.csv", ("c2ir-z, energy", "auroc", "metrics.json")),
    ],
)
def test_every_kind_of_file_is_inspected(made, tmp_path, name, kind, shown):
    result = oodcli("inspect", made / name)
    assert result.status == 0, result.err
    text = " ".join(result.out.split())
    for part in shown:
        assert part in text
    assert max(map(len, result.out.splitlines())) <= 80
    found = json.loads(oodcli("inspect", made / name, "--json").out)
    assert found["kind"] == kind
    # By its content, whatever its name is.
    renamed = Path(shutil.copy(made / name, tmp_path / "file.txt"))
    if kind.startswith("scores."):  # what says how they were made goes along
        shutil.copy(made / f"{name}.json", tmp_path / "file.txt.json")
    again = json.loads(oodcli("inspect", renamed, "--json").out)
    assert {**again, "file": found["file"]} == found


def test_checkpoints_that_look_like_text_to_some_point(tmp_path):
    """In a zip archive, "ckpt/data.pkl" is 13 letters long, which as a byte ends a line."""
    state = build("resnet8-cifar-w4", 3).state_dict()
    for name in ("a.pt", "net.pt", "ckpt.pt", "model.pt", "script.pt", "check\npoint.pt"):
        torch.save(state, tmp_path / name)
        assert oodcli("inspect", tmp_path / name, "--input-size", 8).status == 0, name
    torch.save({"state_dict": state, "args": Path("a/b")}, tmp_path / "path.pt")
    assert oodcli("inspect", tmp_path / "path.pt", "--input-size", 8).status == 0


@pytest.mark.parametrize("name", VERIFIABLE)
def test_how_a_file_was_made_is_said(made, name):
    found = json.loads(oodcli("inspect", made / name, "--json").out)
    text = " ".join(oodcli("inspect", made / name).out.split())
    how = found["made"]
    recorded = found.get("recorded") if found["kind"] == "detector" else how
    assert how["checkpoint_sha256"] == sha256((made / "digits.pt").read_bytes())
    assert how["checkpoint_sha256"] in text.replace(" ", "")
    assert how["oodcli_version"] == __version__
    assert how["torch_version"] == torch.__version__
    assert how["command"].startswith("oodcli ")
    assert how["arch"] == "resnet8-cifar+grey"
    assert how["preprocessing"]["mean"] == [0.3]
    assert (recorded["seed"], recorded["device"]) == (0, "cpu")
    for part in (f"oodcli {__version__}, torch {torch.__version__}", "seed 0", " on cpu", "1×8×8"):
        assert part in text


def test_scores_say_what_is_in_them(made):
    found = json.loads(oodcli("inspect", made / "photos.csv", "--json").out)
    assert (found["rows"], found["unreadable"], found["labelled"]) == (5, 1, 0)
    columns = ["path", "label", "predicted", "confidence", "c2ir-z", "energy", "error"]
    assert found["columns"] == columns
    assert read_scores(made / "photos.csv").columns == tuple(columns)


def test_brackets_are_no_markup(made, copy):
    path = copy("photos.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["command"] = "oodcli extract '[bold]x'"
    assert "'[bold]x'" in oodcli("inspect", path).out


def test_what_is_none_of_these_is_one_sentence(made, tmp_path):
    (tmp_path / "notes.txt").write_text("path,label\n")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "list.json").write_text("{}")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.attrs["format"] = "other"
    for name in ("notes.txt", "empty", "list.json", "x.h5"):
        fails("inspect", tmp_path / name, says=(name, "can tell nothing about it"))
    fails("inspect", made / "photos" / "0.png", says=("can tell nothing about it",))
    fails("inspect", tmp_path, says=(f"{tmp_path} is a folder without model.safetensors",))
    fails("inspect", tmp_path / "none.h5", says=("none.h5 cannot be read: No such file",))
    fails("inspect", tmp_path / "none.pt", says=("none.pt does not exist",))
    (tmp_path / "cut.h5").write_bytes((made / "v.h5").read_bytes()[:3000])
    fails("inspect", tmp_path / "cut.h5", says=("truncated or damaged",))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((made / "real/knn.safetensors").read_bytes()[:-8])
    fails("inspect", cut, says=("cut.safetensors is damaged",))
    fails("inspect", made / "v.h5", made / "digits.pt", says=("only used with --verify",))
    fails("inspect", made / "v.h5", "--write-card", says=("--write-card needs a checkpoint",))


# ---------------------------------------------------------------------------- checksums


def assert_checked(file, but=()):
    """HDF5 has a checksum for every chunk of every dataset that is more than one number."""
    for name in listed_datasets(file):
        assert not file[name].shape or file[name].fletcher32 or name in but, name


@pytest.mark.parametrize("name", CACHES)
def test_the_list_of_images_has_a_hash(made, name):
    with h5py.File(made / name) as file:
        rows = zip(
            file["path"].asstr()[()], file["label"][()], file["error"].asstr()[()], strict=True
        )
        text = "".join(f"{path}\0{label}\0{error}\0" for path, label, error in rows)
        assert file.attrs["rows_sha256"] == sha256(text.encode())
        eps = file["batchnorm/bn1/eps"]
        assert eps.attrs["sha256"] == sha256(eps[()].tobytes())
        assert_checked(file, but=("path", "error"))  # which the hash is of


def test_virtual_images_have_a_hash(made):
    with h5py.File(made / "v.h5") as file:
        rows = zip(file["images"][()], file["label"][()], strict=True)
        data = b"".join(image.tobytes() + label.tobytes() for image, label in rows)
        assert file.attrs["rows_sha256"] == sha256(data)
        assert_checked(file)


def test_the_hash_does_not_depend_on_batches(made, tmp_path):
    out = tmp_path / "x.h5"
    with chdir(made):
        result = oodcli("extract", "digits.pt", "photos", "--batch-size", 2, "-o", out)
    assert result.status == 3, result.err
    with h5py.File(out) as one, h5py.File(made / "photos.h5") as other:
        assert one.attrs["rows_sha256"] == other.attrs["rows_sha256"]


@pytest.mark.parametrize("bad", ["a.png", "z.png"])
def test_batches_without_a_readable_image_belong_to_the_checksums(made, tmp_path, bad):
    (tmp_path / "p").mkdir()
    for name in ("m.png", "n.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "p" / name)
    (tmp_path / "p" / bad).write_bytes(b"bad")
    out = tmp_path / "x.h5"
    words = ("extract", made / "digits.pt", tmp_path / "p", "--batch-size", 1, "-o", out)
    assert oodcli(*words).status == 3
    verified = oodcli("inspect", "--verify", out)
    assert verified.status == 0, verified.err


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_name_their_rows_and_hash_their_tensors(made, name):
    found = json.loads(oodcli("inspect", made / name, "--json").out)
    data = (made / name).read_bytes()
    assert found["made"]["tensors_sha256"] == sha256(data[8 + int.from_bytes(data[:8], "little") :])
    if found["fitted_on"]:
        with h5py.File(made / found["fitted_on"]["file"]) as file:
            assert found["fitted_on"]["rows_sha256"] == file.attrs["rows_sha256"]


# ---------------------------------------------------------------------------- verify


@pytest.mark.parametrize("name", VERIFIABLE)
def test_fresh_files_hold(made, name):
    result = oodcli("inspect", "--verify", made / name, made / "digits.pt")
    assert result.status == 0, result.err
    assert "not checked" not in result.out
    assert brief(made / "digits.pt") in result.out
    found = json.loads(oodcli("inspect", "--verify", made / name, "--json").out)
    expected = ["tensors", "detector"] if name in DETECTORS else ["rows", "list", "contents"]
    assert [check["what"] for check in found["checks"]][: len(expected)] == expected


def changed(name, index, value):
    def change(file):
        rows = np.array(file[name][()])
        rows[index] = value
        file[name][...] = rows

    return change


def without_row(*names):
    def change(file):
        wanted = [name for name in (names or listed_datasets(file)) if file[name].shape[:1] == (5,)]
        for name in wanted:
            rows, attributes = file[name][:-1], dict(file[name].attrs)
            kind = file[name].dtype
            del file[name]
            file.create_dataset(name, data=rows, dtype=kind)
            file[name].attrs.update(attributes)

    return change


def listed_datasets(file):
    found = []
    file.visititems(lambda name, each: found.append(name) if hasattr(each, "shape") else None)
    return found


def changed_since(name, index, value):
    """Of an older file, where every dataset has its SHA-256."""

    def change(file):
        file[name].attrs["sha256"] = sha256(file[name][()].tobytes())
        changed(name, index, value)(file)

    return change


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("photos.h5", changed_since("logits", (1, 2), 0.5), "/logits was written with the sha256"),
        ("photos.h5", changed_since("head/weight", (3, 3), 0.5), "/head/weight was written"),
        ("photos.h5", changed("batchnorm/bn1/eps", (), 0.5), "/batchnorm/bn1/eps was written"),
        ("photos.h5", changed("path", 2, "other.png"), "paths, labels and errors give"),
        ("photos.h5", changed("label", 2, 7), "paths, labels and errors give"),
        ("photos.h5", changed("error", 3, ""), "paths, labels and errors give"),
        ("photos.h5", changed("logits", (1, 2), np.nan), "/logits holds nan in row 1"),
        ("photos.h5", without_row("logits"), "/logits has 4 rows, but /path has 5"),
        ("photos.h5", without_row(), "paths, labels and errors give"),
        ("v.h5", changed("images", (3, 0, 4, 4), 0.5), "images and labels give"),
        ("v.h5", changed("label", 3, 7), "images and labels give"),
        ("v.h5", changed_since("layers/bn1/sensitivity", (3, 3), 0.5), "sensitivity was written"),
    ],
)
def test_a_changed_file_is_refused(copy, name, change, says):
    path = copy(name)
    with h5py.File(path, "r+") as file:
        change(file)
    fails("inspect", "--verify", path, says=(str(path), says))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["virtual/c2ir-z.safetensors", "real/knn.safetensors"])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_flipped_bit_in_a_detector_is_refused(copy, name, place):
    path = copy(name)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    flip(path, start + int(place * (len(data) - start - 1)))
    recorded = json.loads(oodcli("inspect", path, "--json").out)["made"]["tensors_sha256"]
    found = sha256(path.read_bytes()[start:])
    fails("inspect", "--verify", path, says=(recorded[:12], found[:12]))


def flipped(path: Path, dataset: str) -> None:
    with h5py.File(path) as file:
        chunk = file[dataset].id.get_chunk_info(0)
    flip(path, chunk.byte_offset + chunk.size // 2)


@pytest.mark.parametrize("dataset", ["logits", "label", "head/weight", "batchnorm/bn1/running_var"])
def test_a_flipped_bit_in_a_cache_is_refused(made, copy, dataset):
    path = copy("id.h5")
    flipped(path, dataset)
    fails("inspect", "--verify", path, says=(str(path), "a checksum does not match"))
    words = ("score", path, "-d", "energy", "-d", made / "real" / "knn.safetensors")
    fails(*words, says=(str(path), "a checksum does not match"))


@pytest.mark.parametrize("dataset", ["images", "label", "layers/bn1/sensitivity"])
def test_a_flipped_bit_in_virtual_images_is_refused(made, copy, tmp_path, dataset):
    path = copy("v.h5")
    flipped(path, dataset)
    fails("inspect", "--verify", path, says=(str(path), "a checksum does not match"))
    words = ("extract", made / "digits.pt", path, "-o", tmp_path / "x.h5")
    remedy = "create it again" if "layers" in dataset else "run oodcli invert again"
    fails(*words, says=(str(path), "damaged", remedy))


@pytest.mark.parametrize("name", VERIFIABLE)
def test_another_checkpoint_is_refused(others, name):
    fails(
        *("inspect", "--verify", others / name, others / "other.pt"),
        says=(brief(others / "digits.pt"), brief(others / "other.pt"), name),
    )


def test_what_has_no_checksums(made):
    fails("inspect", "--verify", made / "r/metrics.json", says=("has no checksums",))
    fails("inspect", "--verify", made / "digits.pt", says=("is a checkpoint, which has no",))
    fails("inspect", "--verify", made / "v.h5", made / "none.pt", says=("none.pt cannot be read",))


def test_files_of_before_are_still_read(made, copy, tmp_path):
    path = copy("id.h5")
    with h5py.File(path, "r+") as file:
        del file.attrs["rows_sha256"]
        for name in listed_datasets(file):
            values, kind = file[name][()], file[name].dtype
            del file[name]
            file.create_dataset(name, data=values, dtype=kind)
    result = oodcli("inspect", "--verify", path)
    assert result.status == 0, result.err
    assert result.out.count("not checked: no checksum was stored") == 2
    assert "finite in all 60 rows" in result.out
    assert oodcli("inspect", path).status == 0
    fitted = oodcli("fit", path, "-d", "knn", "-o", tmp_path / "fitted", "--json")
    assert json.loads(fitted.out)[0]["fitted_on"]["rows_sha256"] is None
    assert oodcli("score", path, "-d", made / "real" / "knn.safetensors").status == 0


def test_detectors_of_before_are_still_read(made, tmp_path):
    path = tmp_path / "energy.safetensors"
    data = (made / "real" / "energy.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for name in ("tensors_sha256", "recorded", "preprocessing", "command", "torch_version"):
        del header["__metadata__"][name]
    words = json.dumps(header).encode()
    path.write_bytes(len(words).to_bytes(8, "little") + words + data[end:])
    assert "not checked" in oodcli("inspect", "--verify", path).out
    assert oodcli("inspect", path).status == 0
    assert oodcli("score", made / "id.h5", "-d", path, "--fpr", "0.1").status == 0


def test_a_name_that_is_not_utf8_does_not_spoil_a_file(made, tmp_path):
    folder = tmp_path / "\udcff"
    folder.mkdir()
    shutil.copy(made / "id.h5", folder / "id.h5")
    assert oodcli("fit", folder / "id.h5", "-d", "energy", "-o", tmp_path / "d").status == 0
    found = oodcli("inspect", "--json", tmp_path / "d" / "energy.safetensors")
    assert "\\xff/id.h5" in json.loads(found.out)["made"]["command"]
    scores = folder / "s.csv"
    assert oodcli("score", made / "id.h5", "-d", "energy", "-o", scores).status == 0
    words = ("--id", scores, "--ood", f"a={made / 'id.csv'}", "--resamples", 0, "-d", "energy")
    result = oodcli("evaluate", *words, "--json")
    assert "\\xff/s.csv" in json.loads(result.out)["command"]


# ---------------------------------------------------------------------------- the pipeline's joints


def test_mismatched_checkpoints_are_refused(others, tmp_path):
    both = (brief(others / "digits.pt"), brief(others / "other.pt"))
    knn = others / "real" / "knn.safetensors"
    out = ("-o", tmp_path / "x")
    for words in (
        ("extract", others / "other.pt", others / "v.h5", "-o", tmp_path / "x.h5"),
        ("fit", others / "v.features.h5", "--ood", others / "other.h5", "-d", "supervised", *out),
        ("fit", others / "v.features.h5", "--calibrate", others / "other.h5", "-d", "knn", *out),
        ("fit", "-d", knn, "--calibrate", others / "other.h5", *out),
        ("score", others / "other.pt", others / "id.npz", "-d", knn),
        ("score", others / "other.h5", "-d", knn),
    ):
        fails(*words, says=both)
    assert list(tmp_path.iterdir()) == []


def test_mismatched_preprocessing_is_refused(others, tmp_path):
    both = ("mean (0.3,)", "mean (0.6,)")
    knn = others / "real" / "knn.safetensors"
    out = ("-o", tmp_path / "x")
    bright = (others / "digits.pt", others / "id.npz", "--mean", "0.6")
    for words in (
        ("extract", others / "digits.pt", others / "v.h5", "--mean", "0.6", *out[:1], "x.h5"),
        ("fit", others / "v.features.h5", "--calibrate", others / "bright.h5", "-d", "knn", *out),
        ("fit", "-d", knn, "--calibrate", others / "bright.h5", *out),
        ("score", *bright, "-d", knn),
        ("score", others / "bright.h5", "-d", knn),
    ):
        fails(*words, says=both)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def averages(made) -> Path:
    """``made``, with what comes of a checkpoint that has plain and averaged weights beside it: of
    the plain ones plain.…, of the others ema.…; v are virtual images, f their features, id those of
    photographs, d an artefact, s scores; 1 and 2 shards."""
    state = torch.load(made / "digits.pt", weights_only=True)
    averaged = {name: value * 1.01 for name, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": averaged}, made / "both.pt")
    shutil.copy(made / "digits.toml", made / "both.toml")
    few = ("--per-class", 2, "--steps", 3, "--no-compile")
    with chdir(made):
        for name, option in (("plain", ()), ("ema", ("--ema",))):
            images = ("both.pt", "id.npz", *option)
            first, second = (("--shard", f"{part}/2", "--batch-size", 8) for part in (1, 2))
            artefact = f"{name}.d/c2ir-z.safetensors"
            for words in (
                ("invert", "both.pt", *few, *option, "-o", f"{name}.v.h5"),
                ("extract", "both.pt", f"{name}.v.h5", *option, "-o", f"{name}.f.h5"),
                ("extract", *images, "-o", f"{name}.id.h5"),
                ("extract", *images, "-o", f"{name}.1.h5", *first),
                ("extract", *images, "-o", f"{name}.2.h5", *second),
                ("fit", f"{name}.f.h5", "-d", "c2ir-z", "-o", f"{name}.d"),
                ("score", f"{name}.id.h5", "-d", artefact, "-o", f"{name}.s.csv"),
                ("score", *images, "-d", "msp", "-o", f"{name}.1.csv", *first),
                ("score", *images, "-d", "msp", "-o", f"{name}.2.csv", *second),
            ):
                result = oodcli(*words)
                assert result.status == 0, result.err
    return made


@pytest.mark.slow
def test_averaged_and_plain_weights_are_not_mixed(averages, tmp_path, monkeypatch):
    monkeypatch.chdir(averages)
    out = ("-o", tmp_path / "x.h5")
    folder = ("-o", tmp_path / "x")
    for one, other, option in (("plain", "ema", ("--ema",)), ("ema", "plain", ())):
        artefact = f"{one}.d/c2ir-z.safetensors"
        for words in (
            ("extract", "both.pt", f"{one}.v.h5", *out, *option),
            ("fit", f"{one}.f.h5", "--calibrate", f"{other}.id.h5", "-d", "knn", *folder),
            ("fit", f"{one}.f.h5", "--ood", f"{other}.id.h5", "-d", "supervised", *folder),
            ("fit", "-d", artefact, "--calibrate", f"{other}.id.h5", *folder),
            ("score", f"{other}.id.h5", "-d", artefact),
            ("score", "both.pt", "id.npz", "-d", artefact, *option),
            ("evaluate", "--id", f"{one}.s.csv", "--ood", f"x={other}.s.csv"),
            ("evaluate", "--layers", f"{one}.id.h5", "--ood", f"x={other}.f.h5", *folder),
        ):
            fails(*words, says=("averaged weights", "plain weights", "--ema"))
        for end, mixed in ((".h5", tmp_path / "x.h5"), (".csv", tmp_path / "x.csv")):
            parts = (f"{one}.1{end}", f"{other}.2{end}")
            fails("merge", *parts, "-o", mixed, says=("--ema", "true", "false"))
    assert list(tmp_path.iterdir()) == []
    for name, end in (("plain", ".h5"), ("ema", ".h5"), ("plain", ".csv"), ("ema", ".csv")):
        merged = tmp_path / f"{name}{end}"
        result = oodcli("merge", f"{name}.1{end}", f"{name}.2{end}", "-o", merged)
        assert result.status == 0, result.err
        found = json.loads(oodcli("inspect", merged, "--json").out)
        assert found["made"]["averaged"] == (name == "ema")


@pytest.mark.parametrize("end", ["v.h5", "f.h5", "id.h5", "d/c2ir-z.safetensors", "s.csv"])
def test_averaged_weights_are_said(averages, end):
    for name in ("plain", "ema"):
        path = averages / f"{name}.{end}"
        found = json.loads(oodcli("inspect", path, "--json").out)
        assert found["made"]["averaged"] == (name == "ema")
        assert ("averaged (--ema)" in oodcli("inspect", path).out) == (name == "ema")


def test_what_does_not_say_which_weights_is_of_plain_ones(averages, tmp_path, monkeypatch):
    monkeypatch.chdir(averages)
    for name in ("plain", "ema"):
        path = Path(shutil.copy(f"{name}.id.h5", tmp_path / f"{name}.h5"))
        with h5py.File(path, "r+") as file:
            del file.attrs["averaged"]
        made = json.loads(Path(f"{name}.s.csv.json").read_text())
        del made["averaged"]
        (tmp_path / f"{name}.csv.json").write_text(json.dumps(made))
        shutil.copy(f"{name}.s.csv", tmp_path / f"{name}.csv")
        found = json.loads(oodcli("inspect", path, "--json").out)
        assert not found["made"]["averaged"]
        fitted = ("fit", path, "--ood", "plain.f.h5", "-d", "energy", "-o", tmp_path / name)
        assert oodcli(*fitted).status == 0
        both = ("--id", tmp_path / f"{name}.csv", "--ood", "x=plain.s.csv", "--resamples", 0)
        if name == "plain":  # the other one has another detector, too
            assert oodcli("evaluate", *both).status == 0


@pytest.mark.parametrize("key", ["state_dict", "state_dict_ema"])
def test_one_set_of_weights_is_the_same_with_and_without_ema(made, tmp_path, key):
    state = torch.load(made / "digits.pt", weights_only=True)
    torch.save({key: state}, tmp_path / "one.pt")
    shutil.copy(made / "digits.toml", tmp_path / "one.toml")
    with chdir(tmp_path):
        for name, option in (("a", ()), ("b", ("--ema",))):
            words = ("extract", "one.pt", made / "id.npz", "-o", f"{name}.h5", *option)
            assert oodcli(*words).status == 0
            assert not json.loads(oodcli("inspect", f"{name}.h5", "--json").out)["made"]["averaged"]
        fitted = oodcli("fit", "a.h5", "--calibrate", "b.h5", "-d", "knn", "-o", "d")
        assert fitted.status == 0, fitted.err
        scored = oodcli("score", "one.pt", made / "id.npz", "-d", "d/knn.safetensors", "--ema")
        assert scored.status == 0, scored.err


def test_averaged_weights_under_a_prefix(made, tmp_path):
    state = torch.load(made / "digits.pt", weights_only=True)
    other = {f"ema_model.{name}": value * 1.01 for name, value in state.items()}
    shutil.copy(made / "digits.toml", tmp_path / "net.toml")
    for saved, expected in ((state | other, True), (other, False)):
        torch.save(saved, tmp_path / "net.pt")
        for option in ((), ("--ema",)):
            out = tmp_path / f"{len(saved)}{len(option)}.h5"
            assert oodcli("extract", tmp_path / "net.pt", made / "id.npz", "-o", out, *option)
            with h5py.File(out) as file:
                assert file.attrs["averaged"] == (expected and bool(option))


def test_resizing_does_not_concern_virtual_images(made, tmp_path):
    for name in ("digits.pt", "digits.toml"):
        shutil.copy(made / name, tmp_path / name)
    with (tmp_path / "digits.toml").open("a") as card:
        card.write("resize = 9\n")
    result = oodcli("extract", tmp_path / "digits.pt", made / "v.h5", "-o", tmp_path / "x.h5")
    assert result.status == 0, result.err


# ---------------------------------------------------------------------------- the same again


@pytest.mark.slow
def test_the_same_commands_make_the_same_bytes(trained, made, tmp_path):
    """Time is in no file; the command line is in all but scores and tables. So the same commands in
    another folder make the same bytes."""
    again = pipeline(trained, tmp_path / "again")
    names = [path.relative_to(again) for path in again.rglob("*") if path.is_file()]
    assert {path.suffix for path in names} >= {".h5", ".safetensors", ".csv", ".json", ".png"}
    for name in names:
        assert (made / name).read_bytes() == (again / name).read_bytes(), name


def test_another_output_changes_the_command_alone(made, tmp_path):
    with chdir(made):
        result = oodcli("extract", "digits.pt", "id.npz", "-o", tmp_path / "other.h5")
    assert result.status == 0, result.err
    with h5py.File(made / "id.h5") as one, h5py.File(tmp_path / "other.h5") as other:
        unlike = {name for name in one.attrs if one.attrs[name] != other.attrs[name]}
        assert unlike == {"command"}
        assert one.attrs.keys() == other.attrs.keys()
        for name in listed_datasets(one):
            assert one[name][()].tobytes() == other[name][()].tobytes() or name in ("path", "error")
            assert dict(one[name].attrs) == dict(other[name].attrs)
