"""README and docs/: every command runs and prints what the page shows; files.md lists all that
files hold.

A fenced block ``sh`` is run line by line in a folder of its page, as a shell would; ``text`` after
it is what it prints, with other numbers; ``python`` is run as well, or written to the file that its
first line names (``# FILE.py``). README begins in an empty folder and is run as it is printed; a
page of docs/ begins with what docs/index.md's commands leave, and its jobs are made smaller.

In the pages stands ``<!-- not run: REASON -->`` before a block that is not run, ``<!-- needs:
MODULE -->`` before one that is run where that can be imported, and ``# exit status N`` behind a
command.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from commands import oodcli
from safetensors import safe_open
from safetensors.torch import save_file

from oodcli import detectors
from oodcli.files.scores import DERIVED
from oodcli.stages.demo import photograph_crops

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
GUIDE = [page for page in sorted(DOCS.rglob("*.md")) if DOCS / "detectors" not in page.parents]
"""The pages of docs/detectors/ have tests of their own."""

README = ROOT / "README.md"
START = DOCS / "index.md"

SMALLER = (
    (r"--per-class \d+", "--per-class 4"),
    (r"(n=)\d{3,}", r"\g<1>40"),
    (r"--steps \d{2,}", "--steps 8"),
    (r"--resamples \d+", "--resamples 20"),
    (r"^(oodcli evaluate (?!.*--resamples).*)$", r"\1 --resamples 20"),
)
"""What is made smaller in the commands of docs/, so that they take less time."""

SHELL = ("cat", "cp", "cut", "find", "grep", "head", "ls", "mkdir", "sort", "tail")
"""Programs besides oodcli that a block may run."""

UNLIKE = (
    (r"\b(?:bfloat16|float32) on \w+(?::\d+)?", "PRECISION on DEVICE"),
    (r"\beager|compiled\b", "PATH"),
    (r"(?<![.\w])(?=\d*[a-f])[0-9a-f]{12,}…?", "HASH"),
    (r"about [\d.]+ (?:s|min|h)\b", "about TIME"),
    (r"-?\d+(?:,\d{3}\b)*(?:\.\d+)?(?:e[-+]?\d+)?", "0"),
    (r"[─\s]+", " "),
)
"""What may differ between a page and a run: numbers, and what depends on the machine."""


# --- pages ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """line: of the page, where it begins. mark: the comment right before it."""

    line: int
    kind: str
    text: str
    mark: str = ""


FENCE = re.compile(
    r"(?:^[ ]*<!--[ ](?P<mark>[^\n]*?)[ ]-->\n\s*?)?"
    r"^(?P<indent>[ ]*)```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.M | re.S,
)


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            text.count("\n", 0, found.start("kind")) + 1,
            found["kind"],
            re.sub(f"^{found['indent']}", "", found["text"], flags=re.M),
            found["mark"] or "",
        )
        for found in FENCE.finditer(text)
    ]


def lines_of(text: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip()]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


PAGES = [
    page
    for page in (README, *GUIDE)
    if any(block.kind in ("sh", "python") for block in blocks(page))
]


# --- running ----------------------------------------------------------------------------------


def statuses(line: str) -> set[int]:
    found = re.search(r"#.*\bexit status (\d)(.*)$", line)
    if found is None:
        return {0}
    return {int(found[1]), *([0] if found[2].strip() else [])}


def shell(words: list[str], folder: Path, stdin: str) -> str:
    assert words[0] in SHELL, f"{words[0]}: mark the block <!-- not run: why --> or add it to SHELL"
    done = subprocess.run(
        ["sh", "-c", shlex.join(words)], cwd=folder, input=stdin, text=True, capture_output=True
    )
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def run(line: str, folder: Path) -> str:
    """Everything that a line prints. Raises AssertionError when its status is not the page's."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|>")
    lexer.wordchars += ":?=&%,+@[]{}"
    lexer.whitespace_split = True
    words, target = list(lexer), None
    if ">" in words:
        words, target = words[: words.index(">")], words[words.index(">") + 1]
    stages: list[list[str]] = [[]]
    for word in words:
        if word == "|":
            stages.append([])
        else:
            stages[-1].append(word)
    stdout, told = "", ""
    for stage in stages:
        if stage[0] == "oodcli":
            result = oodcli(*stage[1:], stdin=stdout)
            assert result.status in statuses(line), (line, result.status, result.err)
            assert "Traceback" not in result.err
            stdout, told = result.out, told + result.err
        else:
            stdout = shell(stage, folder, stdout)
    if target is not None:
        (folder / target).write_text(stdout, encoding="utf-8")
        stdout = ""
    return told + stdout


def alike(text: str) -> set[str]:
    """The lines of what is printed, without what may differ."""
    found = set()
    for line in text.splitlines():
        for pattern, other in UNLIKE:
            line = re.sub(pattern, other, line)
        found.add(line.strip(" |"))
    return found - {"", "…"}


def smaller(line: str) -> str:
    for pattern, other in SMALLER:
        line = re.sub(pattern, other, line)
    return line


def missing(mark: str) -> str:
    """The module that a block needs and that is not there."""
    module = mark.removeprefix("needs: ") if mark.startswith("needs: ") else ""
    return module if module and importlib.util.find_spec(module) is None else ""


def skipped(block: Block) -> bool:
    return block.mark.startswith("not run:") or bool(missing(block.mark))


def run_page(page: Path, folder: Path) -> None:
    printed: str | None = None
    for block in blocks(page):
        if block.kind == "text":
            if printed is not None:
                unseen = alike(block.text) - alike(printed)
                assert not unseen, (name_of(page), block.line, unseen, printed)
            continue
        printed = None
        if skipped(block):
            continue
        if block.kind == "sh":
            printed = ""
            for line in lines_of(block.text):
                if line.startswith("#"):
                    continue
                if line.startswith("cd "):
                    folder = folder / line.removeprefix("cd ")
                    os.chdir(folder)
                    continue
                uncommented = re.sub(r"\s+# (?!.*exit status).*$", "", line)
                code, comment = re.fullmatch(r"(.*?)(\s+#.*)?", uncommented).groups()
                try:
                    printed += run(
                        (code if page == README else smaller(code)) + (comment or ""), folder
                    )
                except AssertionError as error:
                    raise AssertionError(f"{name_of(page)}, line {block.line}: {error}") from error
        elif block.kind == "python":
            file = re.match(r"# (\S+\.py)\n", block.text)
            if file is not None:
                (folder / file[1]).write_text(block.text, encoding="utf-8")
            else:
                execute(compile(block.text, f"{name_of(page)}:{block.line}", "exec"), folder)


def execute(code: types.CodeType, folder: Path) -> None:
    """As a script that lies in the folder."""
    known = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(folder), *sys.path])
        for file in folder.glob("*.py"):  # another test may have imported its own of that name
            patch.delitem(sys.modules, file.stem, raising=False)
        exec(code, {})
    for name in sys.modules.keys() - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


def link(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name, symlinks=True)
        else:
            shutil.copy(path, folder / path.name)


@pytest.fixture(scope="session")
def desk(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``oodcli demo`` leaves and the quick start needs, and the same under other names."""
    folder = tmp_path_factory.mktemp("desk")
    state = torch.load(trained / "digits.pt", weights_only=True)
    card = (trained / "digits.toml").read_text(encoding="utf-8")
    save_file(state, folder / "digits.safetensors")
    (folder / "digits.toml").write_text(card, encoding="utf-8")
    torch.save(state, folder / "ckpt.pt")
    (folder / "ckpt.toml").write_text(card, encoding="utf-8")
    shutil.copy(trained / "test.npz", folder / "digits-test.npz")
    photograph_crops(folder / "photographs")
    for path in sorted(folder.glob("photographs/*/*.png"))[12:]:
        path.unlink()
    for name in ("photos", "incoming"):
        shutil.copytree(folder / "photographs", folder / name)
    return folder


@pytest.fixture(scope="session")
def started(desk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands of docs/index.md leave."""
    folder = tmp_path_factory.mktemp("started")
    link(desk, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_page(START, folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in (README, START)], ids=lambda page: name_of(page)
)
def test_commands_run_and_print_what_the_page_says(page, started, folder, monkeypatch):
    link(started, folder)
    if page.name == "checkpoints.md":
        write_checkpoints(folder)
        if importlib.util.find_spec("transformers") is not None:
            write_hugging_face(folder / "hf_resnet")
    run_page(page, folder)


def test_readme_runs_as_it_is_printed(folder):
    run_page(README, folder)
    assert (folder / "oodcli-demo" / "gate.csv").is_file()


def test_the_quick_start_runs(started):
    assert (started / "photos.csv").is_file()


@pytest.mark.parametrize(
    ("text", "noticed"),
    [
        ("```sh\noodcli inspect missing.pt\n```\n", "page.md, line 1: .*missing.pt does not exist"),
        ("```sh\noodcli inspect digits.toml  # exit status 4\n```\n", "page.md, line 1"),
        ("```sh\noodcli detectors\n```\n\n```text\nmsp nothing at all\n```\n", "nothing at all"),
        ("```sh\ncurl example.org\n```\n", "not run: why"),
        ("<!-- not run -->\n\n```sh\noodcli inspect missing.pt\n```\n", "missing.pt"),
    ],
)
def test_a_wrong_page_is_noticed(text, noticed, desk, folder):
    link(desk, folder)
    (folder / "page.md").write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=noticed):
        run_page(folder / "page.md", folder)


def test_the_figures_of_readme_are_the_measured_ones():
    """benchmarks/papers/results.json has them: mean AUROC and TNR95 over the same five sets."""
    results = json.loads((ROOT / "benchmarks" / "papers" / "results.json").read_text("utf-8"))
    networks = results["tables"]["data-free"]
    table = README.read_text(encoding="utf-8").partition("## How good is it")[2]
    _, *names = re.search(r"^\| detector \|(.*) \|$", table, re.M)[1].split(" | ")
    rows = re.findall(r"^\| `([\w-]+)`[^|]*\|[^|]*\| ([\d. /*|]+) \|$", table, re.M)
    assert [name for name, _ in rows] == ["msp", "energy", "odin", "knn", "c2ir-peak"]
    for detector, cells in rows:
        for name, cell in zip(names, cells.replace("*", "").split(" | "), strict=True):
            mean = networks[name]["rows"]["knn, real" if detector == "knn" else detector]["mean"]
            auroc, tnr95 = (float(each) for each in cell.split(" / "))
            assert auroc == pytest.approx(mean["auroc"][0], abs=0.0501), (detector, name)
            assert tnr95 == pytest.approx(mean["tnr95"][0], abs=0.0501), (detector, name)


def test_the_picture_of_readme_shows_verdicts(started, folder, monkeypatch):
    """With other photographs: scikit-image is not needed for this."""
    from PIL import Image

    from benchmarks import readme_picture

    link(started, folder)
    run("oodcli extract digits.safetensors digits-test.npz -o real.h5", folder)
    run("oodcli fit -d energy --calibrate real.h5 -o calibrated", folder)
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    with np.load("digits-test.npz") as file:
        digit = file["images"][0, :, :, 0]
    data = types.ModuleType("skimage.data")
    for name in readme_picture.PHOTOGRAPHS:
        setattr(data, name, lambda shown=digit if name == "chelsea" else noise: shown)
    monkeypatch.setitem(sys.modules, "skimage", types.ModuleType("skimage"))
    monkeypatch.setitem(sys.modules, "skimage.data", data)
    monkeypatch.setattr(readme_picture, "OUTPUT", folder / "assets" / "verdicts.png")
    drawn = []
    draw = readme_picture.draw
    monkeypatch.setattr(readme_picture, "draw", lambda *given: drawn.append(given) or draw(*given))
    readme_picture.main("digits.safetensors", "calibrated/energy.safetensors")
    with Image.open(folder / "assets" / "verdicts.png") as picture:
        colours = {tuple(each) for each in np.array(picture.convert("RGB")).reshape(-1, 3).tolist()}
    verdicts = [row["energy.ood"] for row in drawn[0][1]]
    assert len(verdicts) == 6
    for verdict, colour in (("0", readme_picture.IN), ("1", readme_picture.OUT)):
        shown = tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))
        assert (shown in colours) == (verdict in verdicts)


# --- files ------------------------------------------------------------------------------------


def section(page: str, title: str) -> str:
    text = (DOCS / page).read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def unnamed(words: set[str], title: str) -> set[str]:
    named = set(re.findall(r"`([^`\n]+)`", section("files.md", title)))
    return words - named


def hdf5_words(path: Path) -> tuple[set[str], set[str]]:
    """Names of datasets, with <name> for a layer's, and of attributes."""
    with h5py.File(path) as file:
        names, attributes = set(), set(file.attrs)
        nodes: list[tuple[str, h5py.Group | h5py.Dataset]] = []
        file.visititems(lambda name, node: nodes.append((name, node)))
        for name, node in nodes:
            attributes |= set(node.attrs)
            if isinstance(node, h5py.Dataset):
                names.add("/" + re.sub(r"(layers|batchnorm)/.+(?=/)", r"\1/<name>", name))
        return names, attributes


@pytest.fixture(scope="session")
def richest(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with all that can be in them."""
    folder = tmp_path_factory.mktemp("richest")
    network = started / "digits.safetensors"
    steps = (
        f"invert {network} --per-class 6 -o v.h5",
        f"extract {network} v.h5 --record all --mirror -o v.features.h5",
        f"extract {network} v.h5 --match-accuracy 0.9 --mirror -o pool.h5",
        f"extract {network} noise:blob?n=12 -o ood.h5",
        f"extract {network} {started / 'digits-test.npz'} -o id.h5",
        "fit v.features.h5 -d c2ir-z -d knn --calibrate pool.h5 -o fitted",
        "fit id.h5 -d supervised --ood ood.h5 -o fitted",
        f"score {network} {started / 'photographs'} -d fitted/knn.safetensors --fpr 0.05 "
        "-d fitted/supervised.safetensors -d fitted/c2ir-z.safetensors --explain -o s.csv",
        f"score {network} {started / 'digits-test.npz'} -d fitted/knn.safetensors "
        "--fpr 0.05 -o id.csv",
        "evaluate --id id.csv --ood far=s.csv --resamples 20 -o report",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for step in steps:
            result = oodcli(*step.split())
            assert result.status == 0, (step, result.err)
    return folder


@pytest.mark.parametrize(
    ("title", "file"),
    [("Feature cache", "v.features.h5"), ("Feature cache", "pool.h5"), ("Virtual images", "v.h5")],
)
def test_what_is_in_an_hdf5_file_is_on_the_page(title, file, richest):
    names, attributes = hdf5_words(richest / file)
    assert not unnamed({name.replace("/mirror/", "/") for name in names} | attributes, title)


def test_what_is_in_settings_and_quality_is_on_the_page(richest):
    with h5py.File(richest / "v.h5") as file:
        words = {*json.loads(file.attrs["settings"]), *json.loads(file.attrs["quality"])}
        prep = set(json.loads(file.attrs["preprocessing"]))
    assert not unnamed(words | prep, "Virtual images")


def test_what_is_in_an_artefact_is_on_the_page(richest):
    with safe_open(richest / "fitted" / "knn.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name for name in file.keys() if name.startswith("calibration/")}  # noqa: SIM118
    words = {*metadata, *json.loads(metadata["fitted_on"]), *json.loads(metadata["recorded"])}
    words |= {name.replace("/mirror/", "/plain/") for name in tensors}
    assert not unnamed(words | set(json.loads(metadata["calibration"])["plain"]), "Artefact")


def test_the_columns_of_scores_are_on_the_page(richest):
    with (richest / "s.csv").open(encoding="utf-8", newline="") as stream:
        columns = next(csv.reader(stream))
    names = sorted(detectors.names(), key=len, reverse=True)
    words = set()
    for column in columns:
        name = next((name for name in names if column.startswith(name)), None)
        words.add(column if name is None else f"<detector>{column.removeprefix(name)}")
    assert {f"<detector>{end}" for end in DERIVED} <= words, "the file of this test has not all"
    assert not unnamed(words, "Scores")


def test_what_is_beside_scores_is_on_the_page(richest):
    made = json.loads((richest / "s.csv.json").read_text(encoding="utf-8"))
    assert not unnamed(set(made), "Beside scores")


def test_what_is_in_a_report_is_on_the_page(richest):
    found = json.loads((richest / "report" / "metrics.json").read_text(encoding="utf-8"))
    with (richest / "report" / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        words = set(next(csv.reader(stream)))
    words |= {*found, *found["interval"], *found["counts"][0], *found["metrics"][0]}
    words |= {path.name for path in (richest / "report").iterdir()}
    assert not unnamed(words, "Report")


def test_the_keys_of_a_model_card_are_on_the_page(desk, folder):
    link(desk, folder)
    (folder / "ckpt.toml").write_text("unknown = 1\n", encoding="utf-8")
    refused = oodcli("inspect", "digits.safetensors", "--card", "ckpt.toml")
    keys = re.search(r"use (.*)$", refused.err.strip())
    assert keys is not None
    assert not unnamed(set(keys[1].split(", ")), "Model card")


def test_what_is_in_a_partial_file_is_on_the_page(desk, folder, monkeypatch):
    link(desk, folder)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("oodcli.jobs.kept.Kept.finish", interrupted)
    assert oodcli("extract", "digits.safetensors", "digits-test.npz", "-o", "id.h5").status == 130
    job = json.loads((folder / "id.h5.partial/job.json").read_text(encoding="utf-8"))
    assert not unnamed(set(job), "OUTPUT.partial")


# --- continuous integration -------------------------------------------------------------------


def scripts(configuration: dict) -> list[list[str]]:
    """The shell lines of each job of GitHub or GitLab, or of each hook of pre-commit."""
    if "jobs" in configuration:
        jobs = configuration["jobs"].values()
        return [[step["run"] for step in job["steps"] if "run" in step] for job in jobs]
    if "repos" in configuration:
        hooks = [hook for repo in configuration["repos"] for hook in repo["hooks"]]
        return [[f"{hook['entry']} photographs/*/*.png"] for hook in hooks]
    return [job["script"] for job in configuration.values()]


def workflows() -> list[Block]:
    return [block for block in blocks(DOCS / "ci.md") if block.kind == "yaml"]


def write_digits(folder: Path) -> None:
    """Half of the held-out digits as PNG, instead of photographs."""
    from PIL import Image

    shutil.rmtree(folder / "photographs")
    with np.load(folder / "digits-test.npz") as file:
        images = file["images"][::2, :, :, 0]
    (folder / "photographs" / "digits").mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / "photographs" / "digits" / f"{number:03d}.png")


PREPARE = "oodcli prepare digits.safetensors --accuracy 0.99 --no-mirror"


@pytest.fixture(scope="session")
def prepared(desk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the cache of a runner, with fewer virtual images, and all photographs."""
    folder = tmp_path_factory.mktemp("prepared")
    link(desk, folder)
    shutil.rmtree(folder / "photographs")
    photograph_crops(folder / "photographs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(f"{PREPARE} --per-class 20", folder)
    return folder


@pytest.mark.parametrize("block", workflows(), ids=lambda block: f"line {block.line}")
def test_workflows_fail_on_photographs_and_pass_on_digits(block, prepared, folder):
    """As a runner does it: in a shell that stops at the first line that fails."""
    yaml = pytest.importorskip("yaml", exc_type=ImportError)
    link(prepared, folder)
    (folder / "bin").mkdir()
    for name, does in (("pip", ":"), ("oodcli", f'{shlex.quote(sys.executable)} -m oodcli "$@"')):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
        (folder / "bin" / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    [lines] = scripts(yaml.safe_load(block.text))
    assert PREPARE in lines or "bash -c" in lines[0]  # pre-commit expects it on the computer
    script = "\n".join(["set -eo pipefail", *lines]).replace(PREPARE, f"{PREPARE} --per-class 20")

    def ends() -> int:
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True)
        assert b"Traceback" not in done.stderr
        return done.returncode

    assert ends() == 4
    write_digits(folder)
    for path in folder.glob("scores.*"):
        path.unlink()
    assert ends() == 0


def test_the_commands_of_the_page_on_ci_run(started, folder):
    link(started, folder)
    run_page(DOCS / "ci.md", folder)


# --- checkpoints as other libraries write them --------------------------------------------------


def write_checkpoints(folder: Path) -> None:
    """By hand, in the layouts of torchvision's, timm's and Lightning's training scripts."""
    import argparse

    from torchvision.models import resnet18

    from oodcli.networks.architectures import build

    net = {
        f"module.{key}": value for key, value in build("vgg16-kuangliu", 10).state_dict().items()
    }
    torch.save({"net": net, "acc": 93.1, "epoch": 199}, folder / "vgg16.pth")
    shuffle = build("shufflenetv2_x0_5-chenyaofo", 10).state_dict()
    torch.save(shuffle, folder / "cifar10_shufflenetv2_x0_5-1308b4e9.pt")
    state = resnet18(num_classes=3).state_dict()
    optimizer: dict[str, object] = {"state": {}, "param_groups": []}
    torch.save(state, folder / "resnet18.pth")
    torch.save(
        {
            "model": state,
            "optimizer": optimizer,
            "lr_scheduler": {},
            "epoch": 89,
            "args": argparse.Namespace(model="resnet18"),
            "model_ema": {
                "n_averaged": torch.tensor(7),
                **{f"module.{key}": value for key, value in state.items()},
            },
        },
        folder / "checkpoint.pth",
    )
    torch.save(
        {
            "epoch": 3,
            "global_step": 100,
            "pytorch-lightning_version": "2.6.6",
            "state_dict": {
                **{f"model.{key}": value for key, value in state.items()},
                "criterion.weight": torch.ones(3),
            },
            "loops": {},
            "callbacks": {},
            "optimizer_states": [optimizer],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
            "hyper_parameters": {"lr": 0.1},
        },
        folder / "lightning.ckpt",
    )
    torch.save(
        {
            "epoch": 3,
            "arch": "resnet18",
            "state_dict": state,
            "optimizer": optimizer,
            "version": 2,
            "args": argparse.Namespace(model="resnet18"),
            "state_dict_ema": state,
            "metric": 71.2,
        },
        folder / "model_best.pth.tar",
    )
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(resnet18(num_classes=3), folder / "whole.pt")


def write_hugging_face(folder: Path) -> None:
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    labels = {0: "cat", 1: "dog", 2: "owl"}
    widths = {"depths": [1, 1], "hidden_sizes": [8, 8], "embedding_size": 8}
    config = ResNetConfig(id2label=labels, layer_type="basic", **widths)
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(folder)


def test_shapes_of_the_digits_are_those_of_the_pages(desk):
    with np.load(desk / "digits-test.npz") as file:
        assert file["images"].shape == (597, 8, 8, 1)
