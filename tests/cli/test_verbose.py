"""What ``--verbose`` adds, and to which stream."""

from __future__ import annotations

import re

import pytest
import torch
import typer
from commands import oodcli

from oodcli.cli import app, console

COMMANDS = typer.main.get_command(app).commands


def details(err):
    return [line for line in err.splitlines() if line.startswith("detail: ")]


def says(err, *patterns):
    """Each pattern is found in a line of its own, in this order."""
    lines = iter(details(err))
    for pattern in patterns:
        assert any(re.search(pattern, line) for line in lines), (pattern, err)


def test_every_command_that_can_be_quiet_can_be_verbose():
    for name, command in COMMANDS.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert ("--quiet" in options) == ("--verbose" in options), name
        assert ("-q" in options) == ("-v" in options), name


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "detectors"])
def test_nothing_and_everything_is_wrong_usage(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    needed = {
        "inspect": ["x.pt"],
        "prepare": ["x.pt"],
        "invert": ["x.pt"],
        "extract": ["x.pt", "y"],
        "score": ["x.pt"],
        "show": ["x.csv"],
        "merge": ["x.h5", "-o", "y.h5"],
        "evaluate": ["--ood", "far=x.csv"],
    }
    for pair in ("-qv", "-vq"):
        result = oodcli(command, *needed.get(command, []), pair)
        assert (result.status, result.out) == (2, "")
        sentence = "--quiet and --verbose contradict each other: give one"
        assert result.err.splitlines()[-1] == f"Error: Invalid value: {sentence}"
    assert list(tmp_path.iterdir()) == []


def test_version_is_another_option():
    assert oodcli("-v").status == 2
    assert oodcli("--version").status == 0


def test_where_each_value_comes_from(fitted, tmp_path):
    checkpoint = fitted / "digits.pt"
    plain = oodcli("inspect", checkpoint)
    told = oodcli("inspect", checkpoint, "-v", "--std", "0.4", "--device", "cpu", "--seed", 3)
    assert details(plain.err) == []
    assert "detail" not in told.out
    assert len(told.out.splitlines()) == len(plain.out.splitlines())
    says(
        told.err,
        r"oodcli [\d.]+, Python 3[\d.]+, torch \d.* in /",
        r"model card: .*digits\.toml$",
        r"architecture resnet8-cifar\+grey, by digits\.toml$",
        r"10 classes, by recognition$",
        r"input size 8x8, by digits\.toml$",
        r"mean 0\.3, by digits\.toml$",
        r"std 0\.4, by --std$",
        r"resized straight to it, by default$",
        r"bilinear interpolation, by default$",
        r"EXIF orientation: turn, by default$",
        r"images of more than 8 bits scaled from their type's range, by default$",
        r"13 layers tapped \(7 batchnorm: bn1 .*; 3 block: .*; 3 stage: layer1 .*\), by default$",
        r"device cpu, by --device cpu; threads of torch: \d+; seed 3$",
        r"took [\d.]+ s: checkpoint [\d.]+ s, the rest [\d.]+ s$",
    )
    (tmp_path / "other.pt").write_bytes(checkpoint.read_bytes())
    recognised = oodcli("inspect", tmp_path / "other.pt", "-v", "--layers", r"layer\d$")
    assert "assumed: input size" in recognised.err  # which is said without -v, too
    says(
        recognised.err,
        r"no model card: .*other\.toml is missing$",
        r"architecture .*, by recognition$",
        r"class names 0, 1, .*, by default$",
        r"input size .*, by recognition$",
        r"; 3 other: layer1 layer2 layer3\), by --layers$",
    )


def test_the_number_of_threads(fitted):
    before = torch.get_num_threads()
    try:
        told = oodcli("inspect", fitted / "digits.pt", "-v", "--threads", before + 2)
    finally:
        torch.set_num_threads(before)
    says(told.err, rf"threads of torch: {before + 2};")
    assert oodcli("inspect", fitted / "digits.pt", "--threads", 0).status == 2


def test_what_a_pipeline_decides(fitted, tmp_path):
    checkpoint = fitted / "digits.pt"
    small = ("--per-class", 2, "--steps", 3, "--no-mirror")
    told = oodcli("invert", checkpoint, *small, "-o", tmp_path / "v.h5", "-v", "--json")
    assert told.status == 0, told.err
    assert "detail" not in told.out
    says(
        told.err,
        r"precision (float32|bfloat16, which this device multiplies in hardware), by default$",
        r"objective name=kl, .*mirror=False",
        r"20 images of 10 classes, in batches of at most 100, 3 steps each$",
        r"stored in .*v\.h5\.partial; there now: 0$",
        r"took .*: checkpoint .* s, a trial step .* s, inversion .* s, the rest",
    )
    cache = tmp_path / "v.features.h5"
    made = ("extract", checkpoint, tmp_path / "v.h5", "--for", "c2ir,knn,odin", "-o", cache)
    told = oodcli(*made, "--batch-size", 7, "--precision", "float32", "-v", "--mirror")
    assert told.status == 0, told.err
    says(
        told.err,
        r"20 images of .*v\.h5, with labels; decoding threads: \d+$",
        r"precision float32, by --precision$",
        r"batches of 7, by --batch-size$",
        r"records .*layers\.gradient.*; passes of a batch: 2 forward, 2 backward, and again of",
        r"stored in .*v\.features\.h5\.partial; there now: 0$",
        r"took .*: checkpoint .* s, the list of images .* s, recording .* s, the rest",
    )
    fit = ("fit", cache, "-d", "c2ir", "-d", "knn", "-p", "knn.k=3", "-o", tmp_path / "fitted")
    told = oodcli(*fit, "-v")
    assert told.status == 0, told.err
    says(
        told.err,
        r"fit on: .*v\.features\.h5, 20 virtual images of .*v\.h5, with .*logits",
        r"c2ir: fitting needs .*layers\.sensitivity.*; default parameters$",
        r"knn: fitting needs .*embedding.*; k=3$",
        r"calibration: none: without --calibrate it needs real rows$",
        r"took .*: caches .* s, fitting .* s, the rest",
    )
    chosen = ("-d", tmp_path / "fitted" / "knn.safetensors", "-d", "energy")
    told = oodcli("score", cache, *chosen, "--threshold", "energy=0", "-v")
    assert told.status == 0, told.err
    assert "detail" not in told.out
    says(
        told.err,
        r"score: .*v\.features\.h5, 20 virtual images of .*v\.h5, with ",
        r"knn: .*knn\.safetensors, fitted on virtual rows; k=3, mean=False; needs embedding; no",
        r"energy: needs no fitting; T=1\.0; needs logits, logits\.level; verdicts by score above 0",
        r"took .*: detectors .* s, scoring .* s, the rest",
    )
    images = ("score", checkpoint, "noise:blob?n=5", "-d", "odin", "--threshold", "split")
    told = oodcli(*images, "--timeout-per-image", 30, "-v")
    says(
        told.err,
        r"5 images of noise:blob\?n=5, without labels; decoding processes: \d+, 30 s an image$",
        r"odin: needs no fitting; epsilon=.*; verdicts by a threshold from the stream$",
        r"records logits, odin\.logits; passes of a batch: 2 forward, 1 backward$",
    )


def test_what_a_calibration_rests_on(fitted, tmp_path):
    cache = tmp_path / "real.h5"
    oodcli("extract", fitted / "digits.pt", fitted / "test.npz", "-o", cache)
    told = oodcli("fit", cache, "-d", "energy", "-o", tmp_path / "fifth", "-v")
    says(told.err, r"calibration: on held-out rows of the cache$")
    again = ("fit", "-d", tmp_path / "fifth" / "energy.safetensors", "--calibrate", cache)
    told = oodcli(*again, "-o", tmp_path / "again", "-v")
    says(
        told.err,
        r"calibrate on: .*real\.h5, 597 images of .*test\.npz, with ",
        r"energy: already fitted, .*fifth/energy\.safetensors$",
        r"calibration: on the rows of .*real\.h5$",
    )


def test_a_command_that_fails_says_how_far_it_got(fitted, tmp_path):
    told = oodcli("score", fitted / "digits.pt", tmp_path / "none", "-v")
    assert told.status == 1
    *_, took, error = told.err.splitlines()
    assert re.fullmatch(r"detail: took [\d.]+ s: checkpoint [\d.]+ s, the rest [\d.]+ s", took)
    assert error.startswith("oodcli: ")


def test_the_next_command_is_not_verbose(fitted):
    assert details(oodcli("inspect", fitted / "digits.pt", "-v").err)
    assert oodcli("inspect", fitted / "digits.pt").err == ""
    assert oodcli("detectors").err == ""
    oodcli("inspect", fitted / "digits.pt", "-q")
    assert not console.quiet


def test_times_of_the_steps_of_a_command(monkeypatch, capsys):
    clock = iter([0, 1, 110])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.command(quietly=False, in_detail=True):
        console.lap("training")
    assert capsys.readouterr().err.splitlines() == [
        "detail: took 2 min: training 1.00 s, the rest 2 min",
    ]
