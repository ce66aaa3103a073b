"""CONTRIBUTING.md: each recipe works as it is printed, and its tests fail where it is wrong."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = ("A detector", "A family of architectures", "A kind of images")


def blocks(title: str) -> list[tuple[str, str]]:
    """Kind and text of what is fenced below a heading."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert section is not None
    return re.findall(r"^```(\w+)\n(.*?)^```$", section[1], re.M | re.S)


def write(text: str, folder: Path) -> None:
    """A file, whose name is in its first line."""
    first, _, rest = text.partition("\n")
    path = folder / first.removeprefix("# ")
    assert not path.exists(), path
    path.write_text(rest, encoding="utf-8")


def patch(text: str, folder: Path) -> None:
    """Changes of a file. What is there already must stand in it exactly once."""
    header, *hunks = re.split(r"^@@\n", text, flags=re.M)
    path = folder / re.search(r"^\+\+\+ (\S+)$", header, re.M)[1]
    whole = path.read_text(encoding="utf-8")
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] or "\n" for line in lines if not line.startswith("+"))
        after = "".join(line[1:] or "\n" for line in lines if not line.startswith("-"))
        assert whole.count(before) == 1, (path, before)
        whole = whole.replace(before, after)
    path.write_text(whole, encoding="utf-8")


def carry_out(title: str, folder: Path, wrong: tuple[str, str] | None = None) -> list[str]:
    """Writes and changes the files of a recipe; returns its commands. wrong: what of the recipe is
    replaced, and by what."""
    commands: list[str] = []
    found = blocks(title)
    if wrong is not None:
        assert sum(text.count(wrong[0]) for _, text in found) == 1, wrong
        found = [(kind, text.replace(*wrong)) for kind, text in found]
    for kind, text in found:
        if kind == "sh":
            commands += text.splitlines()
        else:
            {"python": write, "diff": patch}[kind](text, folder)
    return commands


def run(command: str, folder: Path) -> tuple[int, str]:
    words = [sys.executable, *shlex.split(command)[1:], "-n", "0", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """A copy of what the recipes change and run."""
    for name in ("oodcli", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_its_links_lead_somewhere():
    for file, _, anchor in re.findall(r"\]\(([^)#]+)(#([\w-]+))?\)", PAGE):
        text = (ROOT / file).read_text(encoding="utf-8")
        titles = [title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)]
        assert not anchor or anchor in titles, (file, anchor)


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_works_as_it_is_printed(title, tree):
    (command,) = carry_out(title, tree)
    status, printed = run(command, tree)
    assert status == 0, printed
    assert re.search(r"^\d+ passed", printed, re.M), printed


WRONG = {
    "the sign is flipped": (
        "A detector",
        ("largest[:, 1] - largest[:, 0]", "largest[:, 0] - largest[:, 1]"),
        "test_its_score_is_the_naive_one",
    ),
    "there is no naive formula": (
        "A detector",
        ('+    "margin": margin,\n', ""),
        "test_every_detector_has_a_naive_formula",
    ),
    "a member of the family is missing": (
        "A family of architectures",
        ("def rename(", "def renamed("),
        "test_every_family_keeps_to_the_contract",
    ),
    "rows are in the wrong order": (
        "A kind of images",
        ("in images[start:stop]]", "in images[start:stop][::-1]]"),
        "test_rows_are_in_the_order_of_their_paths",
    ),
    "the kind is not tested": (
        "A kind of images",
        ('+    "npy": Kind(in_an_array, labelled=False),\n', ""),
        "test_every_kind_is_tested",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_recipe_fails(what, tree):
    title, wrong, test = WRONG[what]
    (command,) = carry_out(title, tree, wrong)
    status, printed = run(command, tree)
    assert status == 1, printed
    assert re.search(rf"^FAILED .*::{test}\b", printed, re.M), printed
