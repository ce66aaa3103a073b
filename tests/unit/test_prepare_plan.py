"""Which detectors ``prepare`` chooses, its command lines, and the files that it reads again."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from oodcli import detectors
from oodcli._version import __version__
from oodcli.cli import app
from oodcli.cli.options import ModelOptions
from oodcli.errors import FileError
from oodcli.files.prepared import (
    NAME,
    STEPS,
    DoneStep,
    PreparedFolder,
    folder_beside,
    read_prepared,
    read_steps,
    write_prepared,
    write_steps,
)
from oodcli.images.files import folder
from oodcli.networks.card import Overrides
from oodcli.networks.preprocessing import Preprocessing
from oodcli.stages.model import Checkpoint, Model, Running
from oodcli.stages.prepare import PrepareRequest, _listing, _next, _rate
from oodcli.stages.prepare_plan import (
    REAL_FROM,
    Choice,
    Effort,
    Places,
    Situation,
    choose,
    effort,
    options_of,
    steps_of,
    words_of,
)
from oodcli.stages.prepared import with_prepared

COMMANDS = typer.main.get_command(app).commands
LOGITS = frozenset({"logits", "logits.level", "odin.logits", "batchnorm.mean", "batchnorm.var"})
ALL = LOGITS | {
    *("embedding", "head", "layers.mean", "layers.std", "layers.gradient", "layers.gram"),
    *("layers.peak", "layers.sensitivity", "batchnorm.running"),
}
"""What a residual network gives."""
RESNET = Situation(ALL, batchnorm=True, classes=10)
VIT = Situation(LOGITS | {"embedding", "head", "layers.mean"}, batchnorm=False, classes=10)
"""Without BatchNorm."""
FOLDED = replace(RESNET, available=ALL - {"batchnorm.running"}, batchnorm=False)
"""A residual network whose BatchNorm is folded into its convolutions."""
BARE = replace(RESNET, available=LOGITS | {"batchnorm.running"})
"""Without a linear head."""
LABELS = replace(RESNET, available=ALL | {"multi-label"})
FLAT = replace(RESNET, available=ALL - {"layers.peak"})
"""Without a map of several positions."""
EACH = ("c2ir-z", "knn", "energy", "msp")
MANY = ("ang++", "gen", "energy", "msp")

CHOICES = {
    "nothing": (RESNET, Choice(("c2ir-z", "knn"), "virtual")),
    "accuracy": (
        replace(RESNET, accuracy=0.9),
        Choice(("c2ir-peak", *EACH), "virtual", pool=True),
    ),
    "many classes": (
        replace(RESNET, accuracy=0.9, classes=1000),
        Choice(MANY, pool=True),
    ),
    "many classes, nothing": (replace(RESNET, classes=101), Choice(("1c-sum",), "noise")),
    "many classes, some images": (
        replace(RESNET, rows=10, classes=1000),
        Choice(("1c-sum", *MANY), "noise", images=True),
    ),
    "many classes, accuracy, a handful": (
        replace(RESNET, rows=18, accuracy=0.9, classes=1000),
        Choice(MANY, pool=True, images=True),
    ),
    "many classes, accuracy, images": (
        replace(RESNET, rows=19, accuracy=0.9, classes=1000),
        Choice(("1c-sum", *MANY), "noise", images=True),
    ),
    "many classes, images": (
        replace(RESNET, rows=100, classes=1000),
        Choice(("1c-sum", "c2ir-z", *MANY), "images"),
    ),
    "many classes, enough of each": (
        replace(RESNET, rows=10_000, classes=1000),
        Choice(("1c-sum", "c2ir-z", "knn", *MANY), "images"),
    ),
    "no peaks": (replace(FLAT, accuracy=0.9), Choice(EACH, "virtual", pool=True)),
    "nine images": (replace(RESNET, rows=9), Choice(EACH, "virtual", images=True)),
    "ten images": (
        replace(RESNET, rows=10),
        Choice(("c2ir-peak", *EACH), "virtual", images=True),
    ),
    "images": (replace(RESNET, rows=100), Choice(("c2ir-peak", *EACH), "images")),
    "images, no peaks": (replace(FLAT, rows=100), Choice(EACH, "images")),
    "images of some classes": (
        replace(RESNET, rows=10_000, complete=False),
        Choice(("c2ir-peak", *EACH), "virtual", images=True),
    ),
    "few of each class": (
        replace(RESNET, rows=900, classes=100),
        Choice(("c2ir-peak", *EACH), "virtual", images=True),
    ),
    "both": (
        replace(RESNET, rows=1000, accuracy=0.9),
        Choice(("c2ir-peak", *EACH), "images"),
    ),
    "both, few images": (
        replace(RESNET, rows=99, accuracy=0.9),
        Choice(("c2ir-peak", *EACH), "virtual", pool=True, images=True),
    ),
    "no BatchNorm": (VIT, Choice(("energy",))),
    "folded BatchNorm": (FOLDED, Choice(("peak-energy",))),
    "folded BatchNorm, accuracy": (
        replace(FOLDED, accuracy=0.9),
        Choice(("peak-energy", "energy", "msp"), pool=True),
    ),
    "folded BatchNorm, low accuracy": (
        replace(FOLDED, accuracy=0.6),
        Choice(("energy", "msp"), pool=True),
    ),
    "folded BatchNorm, accuracy, many classes": (
        replace(FOLDED, accuracy=0.6, classes=1000),
        Choice(("gen", "energy", "msp"), pool=True),
    ),
    "folded BatchNorm, low accuracy, images": (
        replace(FOLDED, accuracy=0.6, rows=19),
        Choice(("peak-energy", "energy", "msp"), pool=True, images=True),
    ),
    "folded BatchNorm, ten images": (
        replace(FOLDED, rows=10),
        Choice(("peak-energy", "energy", "msp"), images=True),
    ),
    "no BatchNorm, accuracy": (
        replace(VIT, accuracy=0.9),
        Choice(("energy", "msp"), pool=True),
    ),
    "no BatchNorm, accuracy, ten images": (
        replace(VIT, accuracy=0.9, rows=10),
        Choice(("energy", "msp"), pool=True, images=True),
    ),
    "no BatchNorm, accuracy, images": (
        replace(VIT, accuracy=0.9, rows=100),
        Choice(("energy", "msp"), images=True),
    ),
    "no BatchNorm, ten images": (replace(VIT, rows=10), Choice(("energy", "msp"), images=True)),
    "no BatchNorm, images": (replace(VIT, rows=100), Choice(("energy", "msp"), images=True)),
    "no BatchNorm, few of each class": (
        replace(VIT, rows=200, classes=1000),
        Choice(("energy", "msp"), images=True),
    ),
    "no head": (BARE, Choice(("energy",))),
    "no head, accuracy": (
        replace(BARE, accuracy=0.9, rows=200),
        Choice(("energy", "msp"), pool=True, images=True),
    ),
    "several labels": (LABELS, Choice(("joint-energy",))),
    "several labels, accuracy": (replace(LABELS, accuracy=0.9), Choice(("joint-energy",))),
    "several labels, images": (
        replace(LABELS, rows=200),
        Choice(("joint-energy",), images=True),
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_strongest_detectors_that_are_possible(name):
    given, expected = CHOICES[name]
    found = choose(given)
    assert found == expected
    assert all(map(given.allows, found.names))
    assert found.calibrated == bool(given.rows or found.pool)


def test_a_default_that_is_standardised_on_noise():
    """Where nothing can be inverted, but the statistics are there."""
    given = replace(RESNET, available=ALL - {"layers.mean"})
    assert choose(given) == Choice(("1c-sum",), "noise")


CKPT = Checkpoint(Path("ckpt.pt"))
USUAL = Effort()


def planned(choice: Choice, model: Model, virtual: Effort = USUAL):
    places = Places(model, Path("f"), "photos/")
    return {step.name: step for step in steps_of(choice, places, virtual, 0.9)}


def test_the_commands_are_those_of_the_guide():
    choice = Choice(("c2ir-peak", "energy"), "virtual", pool=True, images=True)
    steps = planned(choice, Model(CKPT, Running(seed=7)), Effort(mirror=False, steps=9))
    assert [" ".join(step.words) for step in steps.values()] == [
        "invert ckpt.pt --per-class 50 --no-sensitivity --steps 9 --no-mirror "
        "-o f/virtual.h5 --seed 7",
        "extract ckpt.pt f/virtual.h5 --for c2ir-peak,energy -o f/virtual.features.h5 --seed 7",
        "invert ckpt.pt --per-class 50 --no-sensitivity --steps 9 --no-mirror "
        "-o f/pool.h5 --seed 8",
        "extract ckpt.pt f/pool.h5 --for c2ir-peak,energy --match-accuracy 0.9 "
        "-o f/pool.features.h5 --seed 7",
        "extract ckpt.pt noise:uniform?n=2000&seed=0 --for c2ir-peak "
        "-o f/noise.features.h5 --seed 7",
        "extract ckpt.pt photos/ --for c2ir-peak,energy -o f/images.features.h5 --seed 7",
        "fit f/virtual.features.h5 -d c2ir-peak -d energy --noise f/noise.features.h5 "
        "--calibrate f/pool.features.h5 --calibrate f/images.features.h5 -o f",
    ]
    for step in steps.values():
        assert set(step.inputs) <= set(list(steps)[: list(steps).index(step.name)])


def test_many_classes_have_a_few_images_in_all():
    choice = Choice(("ang++", "gen"), pool=True)
    steps = planned(choice, Model(CKPT), effort(1000, (224, 224)))
    assert [" ".join(step.words) for step in steps.values()] == [
        "invert ckpt.pt --total 300 --objective short --no-sensitivity --no-compile "
        "-o f/pool.h5 --seed 1",
        "extract ckpt.pt f/pool.h5 --for ang++,gen --match-accuracy 0.9 -o f/pool.features.h5",
        "fit -d ang++ -d gen --calibrate f/pool.features.h5 -o f",
    ]
    for name, *words in (step.words for step in steps.values()):
        COMMANDS[name].make_context(name, list(words))


@pytest.mark.parametrize("classes", [10, 1000])
def test_without_batchnorm_virtual_images_have_their_objective(classes):
    choice = Choice(("energy",), pool=True)
    steps = planned(choice, Model(CKPT), effort(classes, (224, 224), batchnorm=False))
    words = " ".join(steps["pool"].words)
    assert "--objective patches --no-sensitivity" in words
    assert (
        "--total 300 --objective patches --no-sensitivity --no-compile --steps 60" in words
    ) == (classes == 1000)
    assert effort(classes, (224, 224), steps=9, batchnorm=False).steps == 9


@pytest.mark.parametrize(
    ("classes", "side", "per_class", "expected"),
    [
        (10, 224, None, Effort()),
        (100, 32, None, Effort(steps=24)),
        (101, 224, None, Effort(total=300, objective="short")),
        (1000, 448, None, Effort(total=75, objective="short")),
        (200, 64, None, Effort(total=3675, objective="short")),
        (101, 16, None, Effort(total=5050, objective="short")),
        (1000, 224, 1, Effort(1)),
    ],
)
def test_the_number_of_virtual_images(classes, side, per_class, expected):
    assert effort(classes, (side, side), per_class) == expected


@pytest.mark.parametrize(("accuracy", "expected"), [(0.9, 24), (0.97, 24), (0.98, None)])
def test_a_sure_network_gets_all_steps(accuracy, expected):
    """A pool starts from images that it is surer of."""
    assert effort(10, (32, 32), accuracy=accuracy).steps == expected
    assert effort(10, (32, 32), steps=7, accuracy=accuracy).steps == 7


@pytest.mark.parametrize(
    ("choice", "names", "fit"),
    [
        (
            Choice(("knn",), "images"),
            ["images.features", "fit"],
            "fit f/images.features.h5 -d knn -o f",
        ),
        (
            Choice(("energy",), images=True),
            ["images.features", "fit"],
            "fit -d energy --calibrate f/images.features.h5 -o f",
        ),
        (
            Choice(("1c-sum",), "noise"),
            ["noise.features", "fit"],
            "fit f/noise.features.h5 -d 1c-sum -o f",
        ),
        (Choice(("energy",)), [], ""),
    ],
)
def test_other_plans(choice, names, fit):
    steps = planned(choice, Model(CKPT))
    assert list(steps) == names
    assert not fit or " ".join(steps["fit"].words) == fit


MODELS = {
    "plain": Checkpoint(Path("c.pt")),
    "all": Checkpoint(
        Path("a b.pt"),
        Overrides(
            arch="resnet20-cifar",
            num_classes=3,
            input_size=(8, 16),
            mean=(0.1, 1 / 3, 0.0),
            std=(0.25, 1e-3, 2.0),
            resize=(9, 17),
            interpolation="bicubic",
            crop="center",
            exif="keep",
            image_range=(-1000.0, 400.5),
            class_names=("a", "b c", "d'e"),
            layers=r"layer[23]{1}$",
            card=Path("x y.toml"),
            state_key="ema.state",
            multi_label=True,
        ),
        prefer_ema=True,
        trust_pickle=True,
    ),
    "one number": Checkpoint(Path("c.pt"), Overrides(resize=256)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("running", [Running(), Running("cpu", 7, "bfloat16", 3)])
def test_options_are_read_back_as_they_were(name, running):
    options = options_of(Model(MODELS[name], running))
    parsed = COMMANDS["invert"].make_context("invert", [str(MODELS[name].path), *options]).params
    model = ModelOptions(**{each.name: parsed[each.name] for each in fields(ModelOptions)})
    assert model.checkpoint(parsed["checkpoint"]) == MODELS[name]
    assert Running(**model.running()) == running


def test_class_names_of_a_file_are_given_as_that_file(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("tench, Tinca tinca\ngoldfish\n")
    checkpoint = ModelOptions(class_names=str(file)).checkpoint(Path("c.pt"))
    assert checkpoint.overrides.class_names == ("tench, Tinca tinca", "goldfish")
    assert options_of(Model(checkpoint)) == ("--class-names", str(file))


def test_the_words_of_a_request_are_accepted_by_its_command():
    choice = Choice(("c2ir-peak", "energy"), "virtual", pool=True, images=True)
    for step in planned(choice, Model(MODELS["all"], Running(seed=4))).values():
        name, *words = words_of(step.request)
        COMMANDS[name].make_context(name, words)


def test_the_next_command_asks_for_what_the_calibration_allows():
    rates = [_rate(1 / (rows + 1)) for rows in (1, 4, 9, 18, 19, 500)]
    assert rates == [0.5, 0.2, 0.1, 0.1, 0.05, 0.05]
    assert _rate(None) is None
    request = PrepareRequest(Model(Checkpoint(Path("x/a b.pt"), Overrides(mean=(0.5,)))))
    assert _next(request, 0.05) == (
        "oodcli score 'x/a b.pt' IMAGES --fpr 0.05 -o scores.csv --mean 0.5"
    )
    elsewhere = replace(request, output=Path("there"))
    assert _next(elsewhere, None).startswith("oodcli score 'x/a b.pt' IMAGES -d there -o scores")


@pytest.mark.parametrize(
    ("checkpoint", "folder"),
    [("ckpt.pt", "ckpt.pt.oodcli"), ("a/b.c/", "a/b.c.oodcli"), ("../x.th", "../x.th.oodcli")],
)
def test_the_folder_is_beside_the_checkpoint(checkpoint, folder):
    assert folder_beside(Path(checkpoint)) == Path(folder)


def test_the_folder_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_beside(Path(".")) == tmp_path.with_name(f"{tmp_path.name}.oodcli")


def test_a_replaced_image_is_noticed_by_its_size(tmp_path):
    """Not by its folder or its time, which copies on another host do not share."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(b"12")
    before = _listing(folder(images, ()))
    (images / "a.png").write_bytes(b"123")
    assert _listing(folder(images, ())) != before
    (images / "a.png").write_bytes(b"21")
    os.utime(images / "a.png", (0, 0))
    assert _listing(folder(images.rename(tmp_path / "moved"), ())) == before


# ------------------------------------------------------------------------------------ the files


def folder_of(place: Path) -> PreparedFolder:
    step = DoneStep("fit", "oodcli fit", {"x.h5": 3}, "0a", 1.5, {"not_fitted": {}})
    preprocessing = Preprocessing((8, 8), (0.5,), (0.5,))
    files = {"knn": "knn.safetensors", "msp": None}
    return PreparedFolder(place, "knn", files, "ab", False, preprocessing, 0.9, [step], "oodcli")


def test_a_finished_folder_is_read_as_it_was_written(tmp_path):
    assert read_prepared(tmp_path) is None
    assert read_steps(tmp_path) is None
    found = folder_of(tmp_path)
    write_steps(tmp_path, {})
    assert read_steps(tmp_path) == {}
    assert read_prepared(tmp_path) is None
    (tmp_path / STEPS).unlink()
    write_prepared(found)
    assert read_prepared(tmp_path) == found
    assert read_steps(tmp_path) == {"fit": found.steps[0]}
    assert (found.word("knn"), found.word("msp")) == (str(tmp_path / "knn.safetensors"), "msp")


def test_a_step_counts_as_long_as_its_outputs_are_whole(tmp_path):
    [step] = folder_of(tmp_path).steps
    assert not step.is_in(tmp_path)
    (tmp_path / "x.h5").write_bytes(b"123")
    assert step.is_in(tmp_path)
    (tmp_path / "x.h5").write_bytes(b"1234")
    assert not step.is_in(tmp_path)


def test_keys_of_later_versions_are_ignored_with_a_note(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "ckpt.pt.oodcli"
    folder.mkdir()
    write_prepared(folder_of(folder))
    found = read_prepared(folder)
    assert (found.oodcli_version, found.ignored) == (__version__, [])
    opened = SimpleNamespace(made=SimpleNamespace(origin=found.origin))
    uses = [str(folder / "knn.safetensors")]
    assert with_prepared([], (), opened, tmp_path / "ckpt.pt") == uses
    assert "ignores" not in caplog.text

    about = json.loads((folder / NAME).read_text())
    about["oodcli_version"] = "9.1"
    about["later"] = about["steps"][0]["later"] = about["preprocessing"]["flip"] = [1]
    (folder / NAME).write_text(json.dumps(about))
    found = read_prepared(folder)
    assert found == folder_of(folder)  # so prepare does not write it again
    assert found.oodcli_version == "9.1"
    sentence = (
        f"{folder} was prepared by oodcli 9.1; this is {__version__}, which ignores the keys "
        "later, preprocessing.flip"
    )
    for wanted in ([], [str(folder)]):
        caplog.clear()
        assert with_prepared(wanted, (), opened, tmp_path / "ckpt.pt") == uses
        assert [each for each in caplog.messages if "ignores" in each] == [sentence]


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"default": "energy"},
        {"detectors": {"knn": "../knn.safetensors"}},
        {"detectors": []},
        {"preprocessing": {"input_size": [8]}},
        {"preprocessing": {"input_size": [0, 0], "mean": [0.5], "std": [0.5]}},
        {"steps": None},
        {"accuracy": "high"},
    ],
)
def test_a_damaged_one_is_a_sentence(tmp_path, change):
    write_prepared(folder_of(tmp_path))
    about = {**json.loads((tmp_path / NAME).read_text()), **change}
    (tmp_path / NAME).write_text(json.dumps(about))
    with pytest.raises(FileError, match=r"prepared.json is damaged: run 'oodcli prepare' again"):
        read_prepared(tmp_path)


def test_a_newer_one_is_a_sentence(tmp_path):
    write_prepared(folder_of(tmp_path))
    about = {**json.loads((tmp_path / NAME).read_text()), "version": 2}
    (tmp_path / NAME).write_text(json.dumps(about))
    with pytest.raises(FileError, match="version 2, this oodcli reads 1: use a newer"):
        read_prepared(tmp_path)
    (tmp_path / NAME).write_text("{")
    with pytest.raises(FileError, match="is damaged"):
        read_prepared(tmp_path)


def test_all_of_it_is_about_detectors_that_exist():
    names = {name for _, choice in CHOICES.values() for name in choice.names}
    assert names <= set(detectors.names())
    assert REAL_FROM / 5 >= 19  # held-out rows that --fpr 0.05 needs
