"""Every stage from Python: the files of its command, a progress callback, silence, and errors."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import io
import json
import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import oodcli as run

import oodcli
from oodcli import api
from oodcli.cli import app


@dataclass(frozen=True)
class Stage:
    """words: a command. call: the same from Python, with further arguments. files: that both
    write. wrong: a call that cannot succeed, and a word of why."""

    words: str
    call: Callable[..., Any]
    files: tuple[str, ...]
    wrong: Callable[..., Any]
    why: str


STAGES = {
    "prepare": Stage(
        "prepare digits.pt --images test.npz -o x",
        lambda **more: oodcli.prepare("digits.pt", Path("x"), images="test.npz", **more),
        ("x/images.features.h5", "x/c2ir-z.safetensors", "x/knn.safetensors"),
        lambda **more: oodcli.prepare("digits.pt", "y", accuracy=91.7, **more),
        "accuracy 91.7",
    ),
    "invert": Stage(
        "invert digits.pt --per-class 2 --steps 3 --classes 0,3-4 --no-mirror -o x.h5",
        lambda **more: oodcli.invert(
            *("digits.pt", "x.h5"), per_class=2, steps=3, classes=[0, 3, 4], mirror=False, **more
        ),
        ("x.h5", "x.png"),
        lambda **more: oodcli.invert("none.pt", "y.h5", **more),
        "none.pt",
    ),
    "extract": Stage(
        "extract digits.pt test.npz --for knn,odin -p odin.epsilon=0.002 --mirror -o x.h5",
        lambda **more: oodcli.extract(
            *("digits.pt", Path("test.npz"), Path("x.h5")),
            for_detectors=["knn", "odin"],
            parameters={"odin": {"epsilon": 0.002}},
            mirror=True,
            **more,
        ),
        ("x.h5",),
        lambda **more: oodcli.extract("digits.pt", "none", "y.h5", **more),
        "none does not exist",
    ),
    "fit": Stage(
        "fit real.h5 -d knn -d energy -p knn.k=7 --calibrate real.h5 -o x",
        lambda **more: oodcli.fit(
            *("real.h5", ["knn", "energy"], "x"),
            parameters={"knn": {"k": 7}},
            calibrate=["real.h5"],
            **more,
        ),
        ("x/knn.safetensors", "x/energy.safetensors"),
        lambda **more: oodcli.fit("real.h5", ["c2ir"], "y", **more),
        "c2ir",
    ),
    "score": Stage(
        "score digits.pt test.npz -d c2ir-z.safetensors -d energy --threshold energy=-5.25 "
        "--explain --batch-size 50 -o x.csv",
        lambda **more: oodcli.score(
            *("digits.pt", "test.npz", "x.csv", [Path("c2ir-z.safetensors"), "energy"]),
            threshold={"energy": -5.25},
            explain=True,
            batch_size=50,
            **more,
        ),
        ("x.csv", "x.csv.json"),
        lambda **more: oodcli.score("digits.pt", "test.npz", "y.csv", ["knn"], **more),
        "knn must be fitted first",
    ),
    "evaluate": Stage(
        "evaluate --id id.csv --ood far=far.csv -d energy --resamples 3 -o x",
        lambda **more: oodcli.evaluate(
            *("id.csv", {"far": "far.csv"}), detectors=["energy"], resamples=3, output="x", **more
        ),
        ("x/metrics.csv", "x/metrics.json", "x/metrics.tex", "x/report.html"),
        lambda **more: oodcli.evaluate("id.csv", {"mean": "far.csv"}, **more),
        "mean",
    ),
    "show": Stage(
        "show id.csv -d msp -o x.html",
        lambda **more: oodcli.show("id.csv", Path("x.html"), detectors=["msp"], **more),
        ("x.html",),
        lambda **more: oodcli.show("id.csv", "y.html", "none", **more),
        "none does not exist",
    ),
    "merge": Stage(
        "merge part-2.csv part-1.csv -o x.csv",
        lambda **more: oodcli.merge(["part-2.csv", Path("part-1.csv")], "x.csv", **more),
        ("x.csv", "x.csv.json"),
        lambda **more: oodcli.merge(["part-1.csv"], "y.csv", **more),
        "2 is missing",
    ),
}


class StoppedError(Exception):
    """By the program that watches."""


@pytest.fixture(scope="module")
def desk(fitted, tmp_path_factory) -> Path:
    """What the stages read."""
    folder = tmp_path_factory.mktemp("api")
    for source in ("digits.pt", "digits.toml", "fitted/c2ir-z.safetensors"):
        (folder / Path(source).name).write_bytes((fitted / source).read_bytes())
    with np.load(fitted / "test.npz") as file:
        few = {name: file[name][:120] for name in ("images", "labels")}
        np.savez(folder / "test.npz", **few, classes=file["classes"])
    energy = "-d energy --threshold energy=-5 -o"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            "extract digits.pt test.npz -o real.h5",
            "score digits.pt test.npz -d energy -d msp -o id.csv",
            "score digits.pt noise:uniform?n=40 -d energy -d msp -o far.csv",
            f"score digits.pt test.npz --shard 1/2 --batch-size 40 {energy} part-1.csv",
            f"score digits.pt test.npz --shard 2/2 --batch-size 40 {energy} part-2.csv",
        ):
            result = run(*shlex.split(words))
            assert result.status == 0, result.err
    return folder


@pytest.fixture
def folder(desk, monkeypatch) -> Path:
    """The desk as working directory, without what a test has left, and no handler of the logger."""
    log = logging.getLogger("oodcli")
    handlers, level = list(log.handlers), log.level
    before = set(desk.rglob("*"))
    monkeypatch.chdir(desk)
    log.handlers[:] = []
    log.setLevel(logging.NOTSET)
    yield desk
    log.handlers[:] = handlers
    log.setLevel(level)
    for path in sorted(set(desk.rglob("*")) - before, reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def taken(folder: Path, files: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of files, which are removed."""
    found = {}
    for name in files:
        path = folder / name
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.relative_to(folder).parts[0].partition(".")[0] == "x":
            path.rmdir() if path.is_dir() else path.unlink()
    return found


def test_every_stage_is_here():
    public = {name for name in oodcli.__all__ if inspect.isfunction(getattr(oodcli, name))}
    others = {"demo", "inspect", "limit_pixels", "load_classifier", "load_detector", "record"}
    assert public - others == STAGES.keys()
    commands = {command.name for command in app.registered_commands}
    assert commands - {"inspect", "detectors", "demo"} == STAGES.keys()


@pytest.mark.parametrize("name", STAGES)
def test_it_writes_what_the_command_writes(name, folder, capfd):
    stage = STAGES[name]
    result = run(*shlex.split(stage.words))
    assert result.status == 0, result.err
    expected = taken(folder, stage.files)
    logging.getLogger("oodcli").handlers[:] = []
    logging.getLogger("oodcli").setLevel(logging.NOTSET)
    capfd.readouterr()
    told: list[tuple[float, int]] = []
    found = stage.call(
        progress=lambda *how_far: told.append(how_far), command=f"oodcli {stage.words}"
    )
    assert taken(folder, stage.files) == expected
    assert tuple(capfd.readouterr()) == ("", "")
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert (done[0], done[-1]) == (0, totals[0])
    assert set(totals) == {totals[0]}
    assert dataclasses.is_dataclass(found)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.command = ""


@pytest.mark.parametrize("name", STAGES)
def test_what_cannot_be_done_is_a_sentence(name, folder, capfd):
    with pytest.raises(oodcli.OodcliError, match=STAGES[name].why) as caught:
        STAGES[name].wrong()
    assert "\n" not in str(caught.value)
    assert tuple(capfd.readouterr()) == ("", "")
    assert not list(folder.glob("y*"))


@pytest.mark.parametrize("name", STAGES)
def test_its_defaults_are_those_of_the_command(name):
    mine = inspect.signature(getattr(oodcli, name)).parameters
    [command] = [each.callback for each in app.registered_commands if each.name == name]
    theirs = inspect.signature(command).parameters
    empty = (None, (), [], inspect.Parameter.empty)
    for key, parameter in mine.items():
        if key in theirs and key not in ("command", "detectors"):
            expected, found = theirs[key].default, parameter.default
            same = expected == found or str(expected) == found
            assert same or (expected in empty and found in empty), (key, expected, found)


@pytest.mark.parametrize("name", STAGES)
def test_progress_can_end_it_and_the_same_call_goes_on(name, folder):
    stage = STAGES[name]
    stage.call(command="c")
    expected = taken(folder, stage.files)

    def stop(done: float, total: int) -> None:
        if done:
            raise StoppedError("by the program")

    with pytest.raises(StoppedError, match="by the program"):
        stage.call(progress=stop, command="c")
    assert not any((folder / each).exists() for each in stage.files)
    stage.call(command="c")
    assert taken(folder, stage.files) == expected


def test_notes_go_to_the_logger(folder, caplog):
    caplog.set_level(logging.DEBUG, "oodcli")
    oodcli.score("digits.pt", "test.npz", io.StringIO())
    assert "no -d: using 1c-sum" in caplog.text
    assert "class names" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO", "DEBUG"}


def test_a_classifier_is_as_good_as_its_path(folder):
    classifier = oodcli.load_classifier("digits.pt")
    texts = []
    for checkpoint in (classifier, "digits.pt"):
        stream = io.StringIO()
        oodcli.score(checkpoint, "test.npz", stream, ["energy", "1c-sum"])
        texts.append(stream.getvalue())
    assert texts[0] == texts[1]
    with pytest.raises(oodcli.OodcliError, match="give images"):
        oodcli.score(classifier, None, io.StringIO())
    with pytest.raises(oodcli.OodcliError, match="give the output file"):
        oodcli.invert(classifier)


def test_a_hint_is_what_the_command_line_adds(folder):
    with pytest.raises(oodcli.OodcliError) as caught:
        oodcli.score("digits.pt", "test.npz", io.StringIO(), ["energy"], threshold="labelled")
    assert str(caught.value) == "energy has learnt no threshold"
    printed = run(*shlex.split("score digits.pt test.npz -d energy --threshold labelled"))
    assert printed.err.splitlines()[-1] == f"oodcli: {caught.value}: {caught.value.hint}"
    assert "oodcli fit" in caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    [
        {"fpr": 1.5},
        {"contamination": -0.1},
        {"timeout": 0},
        {"batch_size": 0},
        {"precision": "half"},
        {"shard": "3"},
        {"fpr": 0.1, "threshold": "split"},
    ],
)
def test_an_argument_that_makes_no_sense_is_a_sentence(wrong, folder):
    with pytest.raises(oodcli.OodcliError, match=next(iter(wrong))):
        oodcli.score("digits.pt", "test.npz", "y.csv", ["energy"], **wrong)
    assert not list(folder.glob("y*"))


@pytest.mark.parametrize("name", ["digits.pt", "id.csv", "real.h5"])
def test_inspect_returns_what_the_command_prints(name, folder, capfd):
    found = oodcli.inspect(name)
    assert tuple(capfd.readouterr()) == ("", "")
    assert json.loads(run("inspect", name, "--json").out) == json.loads(json.dumps(found))


def test_inspect_takes_a_classifier(folder):
    loaded = oodcli.inspect(oodcli.load_classifier("digits.pt"))
    assert loaded == {**oodcli.inspect("digits.pt"), "checkpoint": None}


def test_inspect_writes_a_model_card(folder):
    oodcli.inspect("digits.pt", card="y.toml")
    written = Path("y.toml").read_text("utf-8")
    assert "num_classes = 10" in written
    with pytest.raises(oodcli.OodcliError, match=r"y\.toml exists"):
        oodcli.inspect("digits.pt", card=Path("y.toml"))
    oodcli.inspect("digits.pt", card=Path("y.toml"), force=True)
    assert Path("y.toml").read_text("utf-8") == written
    Path("y.toml").unlink()
    with pytest.raises(oodcli.OodcliError, match=r"id\.csv is no checkpoint: leave card out"):
        oodcli.inspect("id.csv", card="y.toml")
    assert not Path("y.toml").exists()


def test_the_estimate_writes_nothing(folder):
    found = api.estimate_inversion("digits.pt", per_class=2, steps=2)
    assert found.images == 20
    assert found.seconds > 0
    assert not list(folder.glob("*.virtual.h5"))
