"""The cache, virtual images and artefacts: there and back, and damaged."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import networks
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from oodcli import detectors
from oodcli.detectors import serial
from oodcli.detectors.energy import Energy
from oodcli.errors import DetectorError, FileError
from oodcli.features import DropoutPasses, Rows, concatenate
from oodcli.files.artefact import Artefact, read_artefact, write_artefact
from oodcli.files.atomic import atomic, make_folder, refuse_existing
from oodcli.files.cache import CacheWriter, open_cache
from oodcli.files.hdf5 import CHUNK_BYTES, Provenance, format_of, writing
from oodcli.files.virtual import VirtualWriter, read_provenance, read_sensitivity
from oodcli.recording.recorder import Recorder, recordable
from oodcli.stages.record import provenance

LABELS = torch.tensor([0, 1, -1, 2, 0])


@pytest.fixture(scope="module")
def network():
    return networks.classifier(networks.Residual(), class_names=["ä", "b,c", "d\ne"])


@pytest.fixture(scope="module")
def features(network):
    recorder = Recorder(network, recordable(network))
    seen = recorder(networks.images(5), LABELS)
    trained = {"deconf_h": seen.logits / 2, "mos_others": -seen.logits[:, :2].exp()}
    dropout = {"dropout_logits": seen.logits.repeat(1, DropoutPasses().passes)}
    made_with = {**seen.made_with, "dropout": DropoutPasses()}
    return replace(seen, multi_label=True, made_with=made_with, **trained, **dropout)


@pytest.fixture(scope="module")
def made(network):
    return provenance(
        network, source="x", command="oodcli", seed=3, precision="float32", virtual=True
    )


@pytest.fixture
def cache(tmp_path, features, made):
    """Seven rows, two of them unreadable."""
    path = tmp_path / "c.h5"
    with writing(path) as new:
        writer = CacheWriter(new.file, made, 7)
        first = features.select(slice(0, 3))
        writer.append(
            Rows(
                ("a", "ü", "bad", "c"), torch.tensor([0, 1, 2, -1]), (None, None, "no", None), first
            )
        )
        writer.append(Rows(("worse",), torch.tensor([-1]), ("never",), None))
        writer.append(
            Rows(("d", "e"), torch.tensor([2, 0]), (None, None), features.select(slice(3, 5)))
        )
    return path


def test_a_cache_gives_back_what_was_recorded(cache, features, made):
    with open_cache(cache) as opened:
        assert opened.provenance == made
        assert opened.count == 7
        assert opened.recorded == features.recorded
        (rows,) = opened.blocks()
        assert rows.paths == ("a", "ü", "bad", "c", "worse", "d", "e")
        assert rows.errors == (None, None, "no", None, "never", None, None)
        assert rows.labels.tolist() == [0, 1, 2, -1, -1, 2, 0]
        again = rows.features
        assert list(again.layers) == list(features.layers)
        assert list(again.batchnorm) == list(features.batchnorm)
        for name, tensor in features.rows().items():
            assert torch.equal(again.rows()[name], tensor), name
        for name, norm in features.batchnorm.items():
            for part in ("running_mean", "running_var", "weight", "bias"):
                assert torch.equal(getattr(again.batchnorm[name], part), getattr(norm, part))
            assert again.batchnorm[name].eps == norm.eps
            assert again.batchnorm[name].spatial_size == norm.spatial_size
        assert {name: layer.kind for name, layer in again.layers.items()} == {
            name: layer.kind for name, layer in features.layers.items()
        }
        assert torch.equal(again.head.weight, features.head.weight)
        assert again.made_with == features.made_with


def test_the_contract_of_the_cache(cache, features):
    """Names and types of the datasets, which other programs read."""
    with h5py.File(cache) as file:
        assert file.attrs["format"] == "oodcli-features"
        assert file.attrs["version"] == 1
        for name in (
            "checkpoint_sha256",
            "arch",
            "preprocessing",
            "source",
            "command",
            "oodcli_version",
            "torch_version",
            "seed",
            "class_names",
        ):
            assert name in file.attrs
        assert json.loads(file.attrs["preprocessing"])["input_size"] == [8, 8]
        assert file["logits"].shape == (7, 3)
        assert file["logits"].dtype == "float32"
        assert file["label"].dtype == "int64"
        assert file["path"].asstr()[1] == "ü"
        assert file["layers/layer1.0.bn1/mean"].shape == (7, 6)
        assert file["batchnorm/input/var"].shape == (7, 3)
        assert file["batchnorm/bn1/spatial_size"][()] == 64
        assert file["head/weight"].shape == (3, 6)
        assert file["odin/logits"].shape == (7, 3)


def test_chunk_caches_are_small(cache, tmp_path):
    """A ResNet-50 has 250 datasets; HDF5 2.0 would take 8 MiB for each."""
    with open_cache(cache) as found, writing(tmp_path / "new.h5") as new:
        made = new.file.create_dataset("rows", (8, 2), "float32", chunks=(4, 2))
        for rows in (found._file["logits"], made):
            assert rows.id.get_access_plist().get_chunk_cache()[1] <= 2 * CHUNK_BYTES


def test_only_what_is_needed_is_read(cache):
    with open_cache(cache) as opened:
        (rows,) = opened.blocks({"logits", "layers.mean"})
        assert set(rows.features.rows()) - {"label", "logits"} == {
            f"layers/{name}/mean" for name in rows.features.layers
        }
        twice = [len(list(opened.rows({"logits"}))) for _ in range(2)]
        assert twice == [1, 1]


def test_some_rows_of_several_blocks_are_put_together(cache, features, monkeypatch):
    monkeypatch.setattr("oodcli.files.cache.BLOCK_ROWS", 2)
    with open_cache(cache) as opened:
        wanted = opened.rows({"logits"}, lambda row: row % 2 == 0)
        # Of readable rows: 0 and 1; 2; none; 3 and 4, in blocks of two paths.
        assert [len(block) for block in wanted] == [2, 1]
        assert torch.equal(concatenate(list(wanted)).logits, features.logits[::2])
        assert [len(block) for block in opened.rows({"logits"}, lambda row: row < 0)] == [0]


def test_reading_in_small_blocks(cache, monkeypatch):
    monkeypatch.setattr("oodcli.files.cache.BLOCK_ROWS", 2)
    with open_cache(cache) as opened:
        blocks = list(opened.blocks({"logits"}))
        assert [len(rows.paths) for rows in blocks] == [2, 2, 2, 1]
        parts = [rows.features for rows in blocks if len(rows.features)]
        with h5py.File(cache) as file:
            whole = torch.from_numpy(file["logits"][()])
        assert torch.equal(concatenate(parts).logits, whole[[0, 1, 3, 5, 6]])


def test_blocks_must_record_the_same(tmp_path, features, made):
    with (
        pytest.raises(ValueError, match="something else"),
        writing(tmp_path / "c.h5") as new,
    ):
        writer = CacheWriter(new.file, made, 2)
        one = features.select(slice(0, 1))
        writer.append(Rows(("a",), LABELS[:1], (None,), one))
        writer.append(Rows(("b",), LABELS[:1], (None,), replace(one, logits=None)))


def test_what_is_lacking_is_named(cache):
    with open_cache(cache) as opened:
        opened.require({"logits"}, "energy")
        with pytest.raises(
            DetectorError, match=r"needs layers\.sensitivity.*only for virtual images"
        ):
            opened.require({"layers.sensitivity"}, "c2ir")


@pytest.mark.parametrize("kept", [0, 10, 600, 5000])
def test_truncated_files(cache, kept):
    cache.write_bytes(cache.read_bytes()[:kept])
    assert format_of(cache) is None
    with (
        pytest.raises(FileError, match=r"c\.h5 is truncated, damaged or not an HDF5 file"),
        open_cache(cache),
    ):
        pass


def test_other_files_are_refused(tmp_path, cache):
    with (
        pytest.raises(FileError, match="does not exist: 'oodcli extract'"),
        open_cache(tmp_path / "none.h5"),
    ):
        pass
    with pytest.raises(FileError, match="has format 'oodcli-features', expected 'oodcli-virtual'"):
        read_provenance(cache)
    with h5py.File(cache, "a") as file:
        file.attrs["version"] = 99
    with pytest.raises(FileError, match="version 99, this oodcli reads 1"), open_cache(cache):
        pass


@pytest.mark.parametrize("name", ["label", "head/bias", "batchnorm/bn1/eps", "error"])
def test_a_missing_dataset_is_one_sentence(cache, name):
    with h5py.File(cache, "a") as file:
        del file[name]
    with pytest.raises(FileError, match="create it again"), open_cache(cache) as opened:
        list(opened.blocks())


def test_a_dataset_of_another_length_is_refused(cache):
    with h5py.File(cache, "a") as file:
        del file["logits"]
        file["logits"] = torch.zeros(3, 3).numpy()
    with pytest.raises(FileError, match="/logits has 3 rows, but /path has 7"), open_cache(cache):
        pass


def test_many_class_names(tmp_path, made):
    many = replace(made, class_names=tuple(f"class number {index:06d}" for index in range(5000)))
    with writing(tmp_path / "v.h5") as new:
        VirtualWriter(new.file, many, 1, {})
    assert read_provenance(tmp_path / "v.h5") == many


def test_virtual_images(tmp_path, made):
    path = tmp_path / "v.h5"
    images = torch.randn(5, 3, 8, 8).half()
    sensitivity = {"z": torch.randn(5, 4), "a": torch.randn(5, 2)}
    with writing(path) as new:
        writer = VirtualWriter(new.file, made, 5, {"steps": 50})
        for part in (slice(0, 3), slice(3, 5)):
            parts = {name: rows[part] for name, rows in sensitivity.items()}
            writer.append(images[part], LABELS[part], parts)
        writer.finish({"agreement": 1.0})
    assert format_of(path) == "oodcli-virtual"
    assert read_provenance(path) == made
    found = read_sensitivity(path, 1, 4)
    assert torch.equal(found["z"], sensitivity["z"][1:4])
    with h5py.File(path) as file:
        assert file["images"].dtype == "float16"
        assert torch.equal(torch.from_numpy(file["images"][()]), images)
        assert json.loads(file.attrs["quality"]) == {"agreement": 1.0}


READ = """
import sys
from pathlib import Path
from oodcli.files.virtual import read_provenance
try:
    read_provenance(Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("size", [0, 2**64 - 16, 5000])
def test_hdf5_comes_to_the_end_of_a_damaged_heap(tmp_path, made, size):
    """By free space of no bytes, and by texts that go back or beyond the end, HDF5 itself would
    loop."""
    path = tmp_path / "v.h5"
    with writing(path) as new:
        VirtualWriter(new.file, made, 1, {})
    content = bytearray(path.read_bytes())
    second = content.index(b"GCOL") + 16 + 16 + 16  # after "oodcli-virtual"
    content[second : second + 2] = struct.pack("<H", 2 if size else 0)
    content[second + 8 : second + 16] = struct.pack("<Q", size)
    path.write_bytes(content)
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, timeout=120)
    assert done.stdout.startswith(b"FileError"), done
    assert b"is truncated, damaged or not an HDF5 file" in done.stdout


# ---------------------------------------------------------------------------- artefacts


@pytest.mark.parametrize("name", detectors.names())
def test_an_artefact_is_the_detector(tmp_path, features, name):
    train = features.select(LABELS >= 0)
    settings = {"weights": "uniform"} if name in ("c2ir", "c2ir-z") else {}
    if detectors.get(name).uses_ood:
        settings["ood"] = features.select(LABELS < 0)
    if detectors.get(name).needs_pool:
        settings |= {"noise": train, "pool": features}
    detector = detectors.get(name).fit(train, **settings)
    artefact = Artefact(detector, "abc", {"file": "c.h5", "rows": 4, "kind": "virtual"})
    path = tmp_path / f"{name}.safetensors"
    write_artefact(artefact, path)
    again = read_artefact(path)
    assert again.checkpoint_sha256 == "abc"
    assert again.fitted_on == artefact.fitted_on
    assert torch.equal(again.detector.score(features), detector.score(features))
    assert serial.settings(again.detector) == serial.settings(detector)


def test_damaged_artefacts(tmp_path):
    path = tmp_path / "energy.safetensors"
    write_artefact(Artefact(Energy(), "abc", {}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    with pytest.raises(FileError, match="damaged or not a safetensors file"):
        read_artefact(path)
    with pytest.raises(FileError, match="does not exist: 'oodcli fit'"):
        read_artefact(tmp_path / "none.safetensors")
    save_file({}, path, {"format": "other"})
    with pytest.raises(FileError, match="is not a detector of oodcli"):
        read_artefact(path)
    good = {
        "format": "oodcli-detector",
        "version": "1",
        "detector": "energy",
        "hyperparameters": '{"T": 2.0}',
        "checkpoint_sha256": "abc",
        "fitted_on": "{}",
    }
    save_file({}, path, good)
    assert read_artefact(path).detector == Energy(T=2.0)
    for change in (
        {"version": "2"},
        {"detector": "magic"},
        {"hyperparameters": "{}"},
        {"hyperparameters": "{"},
        {"hyperparameters": '{"T": 1, "U": 2}'},
        {"hyperparameters": '{"T": "hot"}'},
        {"fitted_on": ""},
    ):
        save_file({}, path, {**good, **change})
        with pytest.raises(
            FileError, match=r"energy\.safetensors (is damaged|has format version|holds a 'magic')"
        ):
            read_artefact(path)


# ---------------------------------------------------------------------------- atomic writes


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.csv"
    with atomic(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    with pytest.raises(FileError, match=r"x\.csv exists: .*--force"), atomic(path):
        pass
    with pytest.raises(KeyboardInterrupt), atomic(path, force=True) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "whole"
    assert os.listdir(tmp_path) == ["x.csv"]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd here")
def test_a_name_of_standard_output_is_not_replaced(tmp_path):
    with (
        (tmp_path / "redirected.csv").open("w+") as redirected,
        pytest.raises(FileError, match="not a regular file"),
        atomic(Path(f"/dev/fd/{redirected.fileno()}"), force=True),
    ):
        pass


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    with (
        pytest.raises(FileError, match="not a regular file"),
        atomic(tmp_path / "pipe.csv", force=True),
    ):
        pass
    (tmp_path / "far").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "far" / "x.csv")
    for text in ("first", "second"):
        with atomic(tmp_path / "link.csv", force=True) as partial:
            partial.write_text(text)
        assert (tmp_path / "link.csv").is_symlink()
        assert (tmp_path / "far" / "x.csv").read_text() == text


def test_long_names(tmp_path):
    path = tmp_path / ("ä" * 120 + ".csv")
    with atomic(path) as partial:
        partial.write_text("whole")
    assert path.read_text() == "whole"
    with pytest.raises(FileError, match="name too long"):
        refuse_existing(tmp_path / ("x" * 300))


def test_impossible_outputs(tmp_path):
    with pytest.raises(FileError, match="is no folder"):
        refuse_existing(tmp_path / "none" / "x")
    with pytest.raises(FileError, match="is a folder, expected a file"):
        refuse_existing(tmp_path, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot be made"), make_folder(tmp_path / "file" / "d"):
        pass


def test_a_folder_that_stays_empty_is_taken_away(tmp_path):
    with pytest.raises(RuntimeError), make_folder(tmp_path / "a" / "b"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with make_folder(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a" / "b").is_dir()


def test_a_full_disk_is_one_sentence():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    from pathlib import Path

    from oodcli.files.scores import ScoreBlock, ScoresWriter

    with (
        pytest.raises(OSError, match="No space left"),
        ScoresWriter(Path("/dev/full"), ["msp"], "csv") as writer,
    ):
        n = 1000
        paths, blank = ["x" * 100] * n, [""] * n
        ones = np.ones(n)
        writer.write(ScoreBlock(paths, blank, blank, blank, ones, {"msp": ones}))


@pytest.mark.parametrize("allowed", [*range(0, 3000, 100), 8000, 20_000, 60_000])
def test_a_full_disk_does_not_crash_hdf5(tmp_path, features, made, allowed):
    """Files may grow to so many bytes and no more: nothing is left, and the process lives."""
    path = tmp_path / "c.h5"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, before[1]))
    try:
        with (
            pytest.raises(FileError, match=r"c\.h5 could not be written: File too large"),
            atomic(path) as partial,
            writing(partial) as new,
        ):
            writer = CacheWriter(new.file, made, 5)
            writer.append(Rows(tuple("abcde"), LABELS, (None,) * 5, features))
            new.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_provenance_needs_everything(tmp_path):
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file.attrs["format"], file.attrs["version"] = "oodcli-virtual", 1
    with pytest.raises(FileError, match="create it again"):
        read_provenance(tmp_path / "v.h5")
    assert {"virtual", "seed"} <= set(Provenance.__dataclass_fields__)
