"""``oodcli prepare``, and ``score`` with what it made."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import fails, oodcli

from oodcli import api
from oodcli.files.atomic import claimed
from oodcli.files.prepared import read_prepared
from oodcli.inversion.objective import OBJECTIVES
from oodcli.jobs.kept import Kept
from oodcli.jobs.torchrun import Team

ACCURACY = ("--accuracy", 0.7, "--per-class", 4, "--no-mirror")
FILES = {
    *("virtual.h5", "virtual.png", "virtual.features.h5", "pool.h5", "pool.png"),
    *("pool.features.h5", "noise.features.h5", "prepared.json"),
    *(f"{name}.safetensors" for name in ("c2ir-peak", "c2ir-z", "knn", "energy", "msp")),
}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Inversion in fewer steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OBJECTIVES, "kl", replace(OBJECTIVES["kl"], steps=20))
        yield


@pytest.fixture(scope="module")
def ready(trained, tmp_path_factory) -> Path:
    """A folder with a checkpoint, prepared with its accuracy, and images."""
    folder = tmp_path_factory.mktemp("ready")
    for name in ("digits.pt", "digits.toml"):
        shutil.copy(trained / name, folder / name)
    with np.load(trained / "test.npz") as file:
        found = {"images": file["images"][:120], "labels": file["labels"][:120]}
        np.savez(folder / "id.npz", **found, classes=file["classes"])
        np.savez(folder / "ten.npz", images=found["images"][:10])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = oodcli("prepare", "digits.pt", *ACCURACY)
    assert result.status == 0, result.err
    (folder / "said").write_text(result.err)
    return folder


@pytest.fixture
def desk(ready, tmp_path, monkeypatch) -> Path:
    """A copy of it as working directory."""
    folder = shutil.copytree(ready, tmp_path / "desk")
    monkeypatch.chdir(folder)
    return folder


def columns(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file))


def made(text: str) -> list[str]:
    """The outputs of the steps that ran."""
    found = re.findall(r"^wrote (.*) in [\d.]+ \w+$", text, re.M)
    return [name.partition(".safetensors")[0].split(", ")[0] for name in found]


def test_it_makes_everything_and_says_what_to_type_next(ready):
    folder = ready / "digits.pt.oodcli"
    assert set(os.listdir(folder)) == FILES
    said = (ready / "said").read_text().splitlines()
    commands = [shlex.split(line[2:]) for line in said if line.startswith("$ ")]
    names = [words[1] for words in commands]
    assert names == ["invert", "extract", "invert", "extract", "extract", "fit", "score"]
    assert len(made("\n".join(said))) == 6
    assert "rest on virtual images alone" in said[0]
    assert said[-3].startswith("digits.pt.oodcli is prepared: score uses c2ir-peak (calibrated on")
    assert said[-1] == "$ oodcli score digits.pt IMAGES --fpr 0.05 -o scores.csv"
    prepared = read_prepared(folder)
    assert prepared.default == "c2ir-peak"
    assert prepared.command == shlex.join(map(str, ["oodcli", "prepare", "digits.pt", *ACCURACY]))
    steps = [" ".join(words) for words in commands[:-1]]
    assert [step.command.replace("'", "") for step in prepared.steps] == steps
    assert all(step.seconds > 0 for step in prepared.steps)


def test_inspect_describes_the_folder(desk):
    told = oodcli("inspect", "digits.pt.oodcli")
    assert told.status == 0, told.err
    facts = dict(line.split(None, 1) for line in told.out.splitlines() if line[0] != " ")
    assert facts["type"] == "a folder of prepare, for score"
    assert facts["steps"].startswith("virtual, virtual.features, ")
    stored = json.loads(Path("digits.pt.oodcli/prepared.json").read_text("utf-8"))
    found = json.loads(oodcli("inspect", "digits.pt.oodcli", "--json").out)
    assert found["kind"] == "prepared"
    assert found["detector"] == facts["detector"] == stored["default"]
    assert [step["key"] for step in found["steps"]] == [step["key"] for step in stored["steps"]]
    assert found["made"]["checkpoint_sha256"] == stored["checkpoint_sha256"]
    assert found["made"]["oodcli_version"] == stored["oodcli_version"]
    assert facts["versions"] == f"oodcli {stored['oodcli_version']}"
    told = oodcli("inspect", "--verify", "digits.pt.oodcli")
    assert (told.status, told.out) == (1, "")
    assert "has no checksums" in told.err

    Path("digits.pt.oodcli/prepared.json").rename("digits.pt.oodcli/steps.json")
    told = oodcli("inspect", "digits.pt.oodcli").out
    assert "run the same prepare command again" in told


def test_the_second_time_it_does_nothing(desk):
    folder = desk / "digits.pt.oodcli"
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    result = oodcli("prepare", "digits.pt", *ACCURACY)
    assert result.status == 0
    assert result.err.count("is there already") == 6
    assert made(result.err) == []
    assert result.err.splitlines()[-1].startswith("$ oodcli score")
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert after == before


def test_moved_and_from_another_place_it_is_the_same(desk, monkeypatch):
    shutil.move(desk / "digits.pt.oodcli", desk / "elsewhere")
    monkeypatch.chdir(desk.parent)
    result = oodcli("prepare", "desk/digits.pt", *ACCURACY, "-o", "desk/elsewhere")
    assert result.err.count("is there already") == 6
    assert "IMAGES -d desk/elsewhere --fpr" in result.err


def test_the_summary_as_json(desk):
    result = oodcli("prepare", "digits.pt", *ACCURACY, "--json", "--quiet")
    assert (result.status, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["detector"] == "c2ir-peak"
    assert found["files"]["knn"] == "digits.pt.oodcli/knn.safetensors"
    assert len(found["steps"]) == 6
    assert all(step["done"] for step in found["steps"])
    assert found["calibrated_on"] == "virtual, matched to accuracy 0.7, no real data"
    assert found["seconds"] == 0
    assert not found["planned"]


@pytest.mark.slow
def test_a_step_whose_settings_change_is_made_again_with_what_depends_on_it(desk):
    again = oodcli("prepare", "digits.pt", "--accuracy", 0.6, *ACCURACY[2:])
    assert made(again.err) == ["pool.features.h5", "c2ir-peak"]
    assert "matched to accuracy 0.6" in again.err
    assert set(os.listdir(desk / "digits.pt.oodcli")) == FILES
    again = oodcli("prepare", "digits.pt", "--accuracy", 0.6, *ACCURACY[2:], "--seed", 1)
    assert len(made(again.err)) == 6
    assert oodcli("prepare", "digits.pt", *ACCURACY, "--device", "cpu", "--seed", 1).status == 0
    assert made(oodcli("prepare", "digits.pt", *ACCURACY, "--seed", 1).err) == []


def test_what_is_missing_is_made_again(desk):
    folder = desk / "digits.pt.oodcli"
    (folder / "msp.safetensors").unlink()
    (folder / "noise.features.h5").write_bytes(b"short")
    result = oodcli("prepare", "digits.pt", *ACCURACY)
    assert made(result.err) == ["noise.features.h5", "c2ir-peak"]
    assert set(os.listdir(folder)) == FILES


@pytest.mark.slow
def test_detectors_that_are_prepared_no_more_are_gone(desk):
    result = oodcli("prepare", "digits.pt", *ACCURACY[2:])
    assert result.status == 0
    assert made(result.err) == ["virtual.features.h5", "c2ir-z"]
    assert "no calibration, so no verdicts: thresholds on raw virtual images" in result.err
    assert result.err.splitlines()[-1] == "$ oodcli score digits.pt IMAGES -o scores.csv"
    left = {path.name for path in (desk / "digits.pt.oodcli").glob("*.safetensors")}
    assert left == {"c2ir-z.safetensors", "knn.safetensors"}
    fails("c2ir-z has no calibration", "score", "digits.pt", "id.npz", "--fpr", 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("images", ["id.npz", "ten.npz"])
def test_it_takes_real_images(desk, images):
    result = oodcli("prepare", "digits.pt", *ACCURACY[2:], "--images", images, "-o", "real")
    assert result.status == 0, result.err
    few = images == "ten.npz"
    assert ("real/virtual.h5" in result.err) == few
    assert read_prepared(Path("real")).default == "c2ir-peak"
    assert f"c2ir-peak (calibrated on {10 if few else 24} real images" in result.err
    assert ("no p-value is below 0.091: --fpr 0.05 needs 19" in result.err) == few
    assert ("accuracy 9" in result.err) != few
    assert f"-d real --fpr {0.1 if few else 0.05} -o" in result.err.splitlines()[-1]
    scored = oodcli("score", "digits.pt", images, "-d", "real", "-d", "all", "--fpr", 0.1)
    assert scored.status == 0
    assert {f"{name}.ood" for name in ("c2ir-peak", "c2ir-z", "knn", "energy", "msp")} < set(
        scored.out.splitlines()[0].split(",")
    )


def test_enough_real_images_need_no_accuracy(desk):
    result = oodcli("prepare", "digits.pt", *ACCURACY, "--images", "id.npz", "--dry-run")
    assert "--accuracy is not used: the 120 real images are enough to fit" in result.err
    assert "invert" not in result.out


@pytest.mark.slow
def test_other_images_are_noticed(desk):
    words = ("prepare", "digits.pt", "--images", "id.npz", "-o", "real")
    assert made(oodcli(*words).err) == ["noise.features.h5", "images.features.h5", "c2ir-peak"]
    assert made(oodcli(*words).err) == []
    with np.load("id.npz") as file:
        np.savez("id.npz", images=file["images"][:110], labels=file["labels"][:110])
    assert made(oodcli(*words).err) == ["images.features.h5", "c2ir-peak"]


@pytest.mark.slow
def test_unreadable_images_are_counted(desk):
    from PIL import Image

    Path("photos").mkdir()
    with np.load("id.npz") as file:
        for number, image in enumerate(file["images"]):
            Image.fromarray(image[..., 0]).save(f"photos/{number:03}.png")
    Path("photos/bad.png").write_bytes(b"no image")
    for _ in range(2):  # also when they are there already
        result = oodcli("prepare", "digits.pt", "--images", "photos", "-o", "real")
        assert result.status == 3, result.err
        assert "1 real images could not be read" in result.err


@pytest.mark.slow
def test_a_network_without_batchnorm(desk):
    Path("nets.py").write_text(
        "import torch\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(1, 32, 3), torch.nn.ReLU(),\n"
        "        torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(128, 10))\n"
    )
    import torch

    namespace: dict[str, object] = {}
    exec(Path("nets.py").read_text(), namespace)
    torch.save(namespace["net"]().state_dict(), "plain.pt")
    options = ("--arch", "nets.py:net", "--input-size", 8, "--mean", 0.3, "--std", 0.3)
    words = ("prepare", "plain.pt", *options)
    result = oodcli(*words)
    assert result.status == 0, result.err
    assert os.listdir("plain.pt.oodcli") == ["prepared.json"]
    assert "energy ranks images, but gives no verdicts; --accuracy, or --images" in result.err
    assert "score uses energy (no calibration, so no verdicts)" in result.err
    following = shlex.split(result.err.splitlines()[-1][2:].replace("IMAGES", "id.npz"))[1:]
    scored = oodcli(*following)
    assert scored.status == 0, scored.err
    assert "no -d: using energy, as plain.pt.oodcli is prepared" in scored.err
    result = oodcli(*words, "--accuracy", 0.3, "--per-class", 10)
    assert result.status == 0, result.err
    assert "oodcli invert plain.pt --per-class 10 --objective patches" in result.err
    assert "score uses energy (calibrated on virtual, matched to accuracy 0.3" in result.err
    made = {"prepared.json", "pool.h5", "pool.png", "pool.features.h5"}
    assert {*os.listdir("plain.pt.oodcli")} == made | {"energy.safetensors", "msp.safetensors"}
    following = shlex.split(result.err.splitlines()[-1][2:].replace("IMAGES", "id.npz"))[1:]
    assert "--fpr" in following
    scored = oodcli(*following, "--force")
    assert scored.status == 0, scored.err
    for images, default in (("ten.npz", "energy"), ("id.npz", "energy")):
        result = oodcli(*words, "--images", images)
        assert result.status == 0, result.err
        assert f"score uses {default} (calibrated on" in result.err
        following = shlex.split(result.err.splitlines()[-1][2:].replace("IMAGES", "id.npz"))[1:]
        assert oodcli(*following, "--force").status == 0
        assert f"{default}.ood" in columns(Path("scores.csv"))


# ------------------------------------------------------------------------------------- dry runs


def test_a_dry_run_prints_commands_and_makes_nothing(desk):
    shutil.rmtree("digits.pt.oodcli")
    before = set(os.listdir())
    result = oodcli("prepare", "digits.pt", *ACCURACY, "--dry-run")
    assert result.status == 0, result.err
    *steps, total = result.out.splitlines()
    assert [line.split()[1] for line in steps] == [
        *("invert", "extract", "invert", "extract", "extract", "fit"),
    ]
    assert all(re.search(r"  # about \d+ s$", line) for line in steps)
    assert re.fullmatch(r"# c2ir-peak; in all about \d+ s", total)
    found = json.loads(oodcli("prepare", "digits.pt", *ACCURACY, "--dry-run", "--json").out)
    assert found["planned"]
    assert [step["command"] for step in found["steps"]] == [
        line.partition("  # ")[0] for line in steps
    ]
    assert found["seconds"] > 0
    images = oodcli("prepare", "digits.pt", "--images", "id.npz", "--dry-run")
    assert [line.split()[1] for line in images.out.splitlines()[:-1]] == [
        "extract",
        "extract",
        "fit",
    ]
    few = ("prepare", "digits.pt", "--images", "ten.npz", "--dry-run", "--json")
    assert "--fpr 0.1 " in json.loads(oodcli(*few).out)["next"]
    assert set(os.listdir()) == before


def test_a_dry_run_under_torchrun_estimates_what_is_shared(desk, monkeypatch):
    monkeypatch.setattr("oodcli.stages.prepare.part_of", lambda *_: (None, Team(0, 4, None)))
    monkeypatch.setattr("oodcli.stages.prepare.Clock.seconds", lambda *_: 8.0)
    planned = api.plan_preparation("digits.pt", accuracy=0.97, force=True)
    times = {step.command.split()[1]: step.seconds for step in planned.steps}
    assert times == {"invert": 2.0, "extract": 2.0, "fit": 8.0}


def test_a_dry_run_knows_what_is_there(desk):
    result = oodcli("prepare", "digits.pt", "--accuracy", 0.6, *ACCURACY[2:], "--dry-run")
    assert result.out.count("# there already") == 4
    forced = oodcli("prepare", "digits.pt", *ACCURACY, "--dry-run", "--force")
    assert "there already" not in forced.out


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("--accuracy 91.7: expected a share between 0 and 1, such as 0.917", ["--accuracy", 91.7]),
        ("--accuracy 0: expected", ["--accuracy", 0]),
        ("the list is read more than once", ["--images", "-"]),
        ("holds virtual images: give real ones", ["--images", "digits.pt.oodcli/virtual.h5"]),
        ("nowhere does not exist", ["--images", "nowhere"]),
        ("--per-class 1: the spread within a class needs two virtual images", ["--per-class", 1]),
        ("id.npz cannot be made: ", ["-o", "id.npz"]),
        ("name another folder with -o DIR", ["-o", "id.npz/x"]),
    ],
)
def test_what_makes_no_sense_is_a_sentence(sentence, words, desk):
    fails(sentence, "prepare", "digits.pt", *words, leaves=desk)


def test_a_place_that_cannot_be_written_names_the_option(desk, monkeypatch):
    shutil.rmtree("digits.pt.oodcli")
    Path("digits.pt.oodcli").write_text("a file of that name")
    fails("name another folder with -o DIR", "prepare", "digits.pt", *ACCURACY, leaves=desk)


@pytest.mark.slow
def test_files_of_someone_else_are_not_overwritten(desk):
    Path("mine").mkdir()
    Path("mine/virtual.h5").write_text("mine")
    words = ("prepare", "digits.pt", *ACCURACY, "-o", "mine")
    fails("mine/virtual.h5 exists, but prepare has not made it", *words)
    assert os.listdir("mine") == ["virtual.h5"]
    assert oodcli(*words, "--force").status == 0
    assert set(os.listdir("mine")) == FILES


@pytest.mark.slow
def test_a_damaged_folder_is_made_again_with_force(desk):
    Path("digits.pt.oodcli/prepared.json").write_text("{}")
    words = ("prepare", "digits.pt", "--images", "id.npz")
    fails("prepared.json is damaged: run 'oodcli prepare' again with --force", *words)
    fails("prepared.json is damaged", "score", "digits.pt", "id.npz")
    assert oodcli(*words, "--force").status == 0
    assert oodcli("score", "digits.pt", "id.npz").status == 0


def test_two_at_once(desk):
    with claimed(Path("digits.pt.oodcli/.lock"), Path("x")):
        fails("digits.pt.oodcli is being written by another", "prepare", "digits.pt", *ACCURACY)


# ---------------------------------------------------------------------------------------- score


def test_score_uses_what_is_prepared(desk):
    result = oodcli("score", "digits.pt", "id.npz", "--fpr", 0.05, "-o", "s.csv")
    assert result.status == 0, result.err
    artefact = "digits.pt.oodcli/c2ir-peak.safetensors"
    assert f"note: no -d: using {artefact}, as digits.pt.oodcli is prepared" in result.err
    ends = ("", ".p", ".ood", ".basis")
    assert columns(Path("s.csv"))[4:8] == [f"c2ir-peak{end}" for end in ends]
    assert oodcli("score", "digits.pt", "id.npz", "-d", artefact, "--fpr", 0.05).out == (
        Path("s.csv").read_text()
    )


def test_a_name_stands_for_what_is_prepared(desk):
    words = ("score", "digits.pt", "id.npz", "--fpr", 0.05)
    result = oodcli(*words, "-d", "energy", "-d", "knn", "-d", "odin")
    assert result.status == 0, result.err
    assert "note: energy, knn: as prepared in digits.pt.oodcli\n" in result.err
    assert "no verdicts of odin: without a calibration for --fpr" in result.err
    found = result.out.splitlines()[0].split(",")
    assert {"energy.ood", "knn.ood", "odin"} < set(found)
    assert "odin.ood" not in found
    fails("energy has no calibration for --fpr", *words, "-d", "energy", "-p", "energy.T=2")


def test_all_includes_what_is_prepared(desk):
    result = oodcli("score", "digits.pt", "ten.npz", "-d", "all")
    found = result.out.splitlines()[0].split(",")
    assert {"c2ir-peak", "c2ir-z", "knn", "energy", "mls"} < set(found)
    other = oodcli(
        *("score", "digits.pt", "ten.npz", "-d", "all", "-d", "knn", "-p", "energy.T=2"),
        *("-d", "digits.pt.oodcli/c2ir-z.safetensors"),
    )
    assert other.status == 0, other.err
    assert other.out.splitlines()[0].split(",") == found


def test_a_folder_elsewhere(desk):
    shutil.move("digits.pt.oodcli", "there")
    assert "using 1c-sum" in oodcli("score", "digits.pt", "ten.npz").err
    result = oodcli("score", "digits.pt", "ten.npz", "-d", "there/", "-d", "energy", "--fpr", 0.1)
    assert result.status == 0, result.err
    assert {"c2ir-peak.ood", "energy.ood"} < set(result.out.splitlines()[0].split(","))
    cached = oodcli("score", "there/virtual.features.h5", "-d", "there", "--fpr", 0.1)
    assert cached.status == 0, cached.err
    Path("empty").mkdir()
    sentence = "empty is not a prepared folder: run 'oodcli prepare' to make or finish one"
    fails(sentence, "score", "digits.pt", "ten.npz", "-d", "empty")


@pytest.mark.slow
def test_another_network_is_an_error_but_for_detectors_that_are_named(desk):
    import torch

    state = torch.load("digits.pt", weights_only=True)
    state["linear.bias"] += 1
    torch.save(state, "digits.pt")
    sentence = "digits.pt.oodcli was prepared for the checkpoint "
    score = ("score", "digits.pt", "ten.npz")
    fails(sentence, *score)
    fails("run 'oodcli prepare' again, or choose detectors with -d", *score)
    for word in ("energy", "all"):
        named = oodcli(*score, "-d", word)
        assert named.status == 0, named.err
        assert f"not used: {sentence}" in named.err
    fails(sentence, *score, "-d", "digits.pt.oodcli")
    fails("knn must be fitted first", *score, "-d", "knn")
    result = oodcli("prepare", "digits.pt", *ACCURACY)
    assert len(made(result.err)) == 6
    assert oodcli(*score).status == 0


@pytest.mark.slow
def test_another_preprocessing_is_an_error(desk):
    score = ("score", "digits.pt", "ten.npz", "--mean", 0.2)
    fails("was prepared for images with mean (0.3,), but here with mean (0.2,)", *score)
    assert len(made(oodcli("prepare", "digits.pt", *ACCURACY, "--mean", 0.2).err)) == 6
    assert oodcli(*score).status == 0


def test_an_unfinished_folder_is_not_used(desk):
    Path("digits.pt.oodcli/prepared.json").unlink()
    result = oodcli("score", "digits.pt", "ten.npz")
    assert result.status == 0
    assert "not used: digits.pt.oodcli is unfinished: 'oodcli prepare' resumes it" in result.err
    assert "using 1c-sum" in result.err


def test_its_contact_sheet_is_no_image_to_score(desk):
    Path("photos").mkdir()
    shutil.copytree("digits.pt.oodcli", "photos/x.pt.oodcli")
    shutil.copy("photos/x.pt.oodcli/virtual.png", "photos/a.png")
    result = oodcli("score", "digits.pt", "photos", "-d", "energy")
    assert [line.split(",")[0] for line in result.out.splitlines()[1:]] == ["photos/a.png"]


# -------------------------------------------------------------------------------- interruptions


def test_ctrl_c_between_steps(desk, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    words = ("prepare", "digits.pt", *ACCURACY)
    for name in ("noise.features.h5", "energy.safetensors"):
        Path("digits.pt.oodcli", name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("oodcli.stages.prepare.fit", interrupted)
        stopped = oodcli(*words)
    assert stopped.status == 130
    assert made(stopped.err) == ["noise.features.h5"]
    assert "digits.pt.oodcli is unfinished" in oodcli("score", "digits.pt", "ten.npz").err
    again = oodcli(*words)
    assert again.status == 0, again.err
    assert made(again.err) == ["c2ir-peak"]
    assert set(os.listdir("digits.pt.oodcli")) == FILES


def test_ctrl_c_within_a_step(desk, monkeypatch):
    write, stored = Kept.write, []

    def stopping(self: Kept, number: tuple[int, ...], batch: object) -> None:
        write(self, number, batch)
        stored.append(number)
        if len(stored) == 3:
            raise KeyboardInterrupt

    words = ("prepare", "digits.pt", "--images", "id.npz", "-o", "real", "--batch-size", 8)
    with monkeypatch.context() as patch:
        patch.setattr(Kept, "write", stopping)
        stopped = oodcli(*words)
    assert stopped.status == 130
    assert "24 images saved in real/noise.features.h5.partial" in stopped.err
    assert sorted(os.listdir("real")) == ["noise.features.h5.partial", "steps.json"]
    fails("was started with --batch-size 8, but now it is 128", *words[:-2])
    again = oodcli(*words)
    assert again.status == 0, again.err
    assert "resuming: 24 images saved" in again.err


def test_what_is_used_stays_until_its_successor_is_fitted(desk, monkeypatch):
    """The old artefacts are used as long as only caches are made anew."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("oodcli.stages.prepare.extract", interrupted)
    stopped = oodcli("prepare", "digits.pt", "--accuracy", 0.6, *ACCURACY[2:])
    assert stopped.status == 130
    assert "using digits.pt.oodcli/c2ir-peak" in oodcli("score", "digits.pt", "ten.npz").err
