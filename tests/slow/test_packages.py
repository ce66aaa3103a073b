"""Contents of the wheel and the sdist that ``python -m build`` creates, and the installed wheel."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from pipeline import ROOT

from oodcli._version import __version__

FOLDERS = ("oodcli", "benchmarks", "completions", "docs", "tests")
FILES = ("mkdocs.yml", "pyproject.toml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md")
BY_HATCHLING = {".gitignore", "PKG-INFO"}


def run(*words: object, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_in(*folders: str) -> set[str]:
    """Paths of the repository's files, without what Python caches beside them."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.is_file() and path.parent.name != "__pycache__"
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with an sdist, and a wheel that was built from it. Nothing is downloaded."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    assert {path.name for path in folder.iterdir()} == {
        f"oodcli-{__version__}.tar.gz",
        f"oodcli-{__version__}-py3-none-any.whl",
    }
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    given = ("--quiet", "--no-index", "--no-deps", "--target", folder, wheel)
    run("-m", "pip", "install", *given, folder=folder)
    return folder


def test_the_wheel_is_the_package_and_nothing_else(wheel) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    about = {name for name in found if name.startswith(f"oodcli-{__version__}.dist-info/")}
    assert found - about == files_in("oodcli")
    assert {name.partition("/")[2] for name in about} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"),
    }
    assert {"oodcli/py.typed", "oodcli/report/page.html.jinja"} <= found


def test_the_sdist_has_the_sources_the_tests_and_the_documentation(built) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {member.name for member in archive.getmembers() if member.isfile()}
    found = {name.removeprefix(f"oodcli-{__version__}/") for name in names}
    there = {name for name in FILES if (ROOT / name).is_file()}
    assert found == files_in(*FOLDERS) | there | BY_HATCHLING


def test_the_metadata_name_licence_versions_and_extras(wheel) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"oodcli-{__version__}.dist-info/METADATA").decode()
    metadata = email.message_from_string(text)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload().startswith("# oodcli\n")
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras == {
        *("parquet", "heic", "ray", "timm", "hf", "onnx"),
        *("test", "lint", "docs", "bench"),
    }
    classifiers = metadata.get_all("Classifier")
    assert not [each for each in classifiers if each.startswith("License ::")]


def test_the_changelog_begins_with_what_is_to_come_and_this_version() -> None:
    headings = re.findall(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", __version__]


def test_the_installed_wheel_runs(installed, tmp_path) -> None:
    for name, scores in (("id", (0.1, 0.2, 0.3)), ("far", (0.7, 0.8, 0.9))):
        rows = "".join(f"{i}.png,,a,0.5,{score},\n" for i, score in enumerate(scores))
        (tmp_path / f"{name}.csv").write_text(f"path,label,predicted,confidence,msp,error\n{rows}")

    def oodcli(*words: str) -> str:
        return run("-m", "oodcli", *words, folder=tmp_path, PYTHONPATH=str(installed))

    assert oodcli("--version").startswith(f"oodcli {__version__}\n")
    where = run(
        "-c", "import oodcli; print(oodcli.__file__)", folder=tmp_path, PYTHONPATH=str(installed)
    )
    assert Path(where.strip()).is_relative_to(installed)
    oodcli("evaluate", "--id", "id.csv", "--ood", "far=far.csv", "-o", "report", "-q")
    assert "<html" in (tmp_path / "report" / "report.html").read_text("utf-8")
    count = "from oodcli.images.labels import wnids; print(len(wnids()))"
    assert run("-c", count, folder=tmp_path, PYTHONPATH=str(installed)) == "1000\n"
