"""Every package that oodcli imports is declared, and its own modules import in one direction."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import oodcli

PACKAGE = Path(oodcli.__file__).parent
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}
"""Module → what it is installed as, where the names differ."""
OPTIONAL = {
    "fsspec": "ray",
    "onnx": "onnx",
    "pillow_heif": "heic",
    "pyarrow": "parquet",
    "ray": "ray",
    "timm": "timm",
    "transformers": "hf",
    "huggingface_hub": "hf",
}
"""Module → the extra that installs it. All others come with oodcli."""
TESTED = ("parquet", "heic", "onnx", "ray", "timm", "test")
"""Extras whose packages the tests use."""


def imported(source: str) -> Iterator[str]:
    """Top-level names of the modules of others, wherever in the code they are imported. What only
    a type checker reads is left out."""
    tree = ast.parse(source)
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            block.body = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "oodcli":
                yield top


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", line)[0] for line in requirements}


def test_every_import_is_declared() -> None:
    project_file = PACKAGE.parent / "pyproject.toml"
    if not project_file.is_file():
        pytest.skip("not in the repository")
    project = tomllib.loads(project_file.read_text("utf-8"))["project"]
    declared = names_of(project["dependencies"])
    extras = {name: names_of(lines) for name, lines in project["optional-dependencies"].items()}
    found = {name for path in PACKAGE.rglob("*.py") for name in imported(path.read_text("utf-8"))}
    for name in found - OPTIONAL.keys():
        assert DISTRIBUTIONS.get(name, name) in declared, f"{name} is imported but not declared"
    for name, extra in OPTIONAL.items():
        assert name.replace("_", "-") in extras[extra], f"{name} is not in the extra {extra}"
    imported_as = {DISTRIBUTIONS.get(name, name) for name in found}
    assert declared <= imported_as, "declared, but imported nowhere"


def test_every_requirement_has_one_lower_bound() -> None:
    """``.ci/oldest`` installs exactly that version."""
    project_file = PACKAGE.parent / "pyproject.toml"
    if not project_file.is_file():
        pytest.skip("not in the repository")
    project = tomllib.loads(project_file.read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in TESTED for line in extras[name])]
    bounds: dict[str, set[str]] = {}
    for line in lines:
        assert re.fullmatch(r"[\w-]+(\[[\w,]+\])?>=[\d.]+", line), line
        name, _, version = line.partition(">=")
        bounds.setdefault(name, set()).add(version)
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


def test_imports_are_found_in_functions() -> None:
    source = "import os, h5py.h5p\nfrom . import a\ndef f():\n    from scipy.stats import norm\n"
    source += "if TYPE_CHECKING:\n    import pandas\n"
    assert list(imported(source)) == ["h5py", "scipy"]


def dependencies(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module → the others of the same package that it imports: at its top, in functions, and for a
    type checker. ``from a import b`` is the module a.b where there is one. Registries that name
    their modules in strings are not seen, nor is the package that Python imports before a module
    in it."""
    found: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, name
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {each if each in sources else str(node.module) for each in inner}
        found[name] &= sources.keys()
    return found


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules of which each imports the one before it, or empty."""
    try:
        TopologicalSorter(dependencies(sources)).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other() -> None:
    modules = {
        path.relative_to(PACKAGE.parent).with_suffix(""): path for path in PACKAGE.rglob("*.py")
    }
    sources = {
        ".".join(name.parts).removesuffix(".__init__"): path.read_text("utf-8")
        for name, path in modules.items()
    }
    assert len(sources) == len(modules) > 250
    assert circle(sources) == []


@pytest.mark.parametrize(
    "back",
    [
        "import p.a",
        "def f():\n    from p.a import x",
        "if TYPE_CHECKING:\n    from p.a import x",
        "class C:\n    def m(self):\n        from p import a",
    ],
)
def test_a_circle_is_found(back: str) -> None:
    sources = {"p": "", "p.a": "from p import b", "p.b": "from p import c", "p.c": ""}
    assert circle(sources) == []
    assert set(circle(sources | {"p.c": back})) == {"p.a", "p.b", "p.c"}
