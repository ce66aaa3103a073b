"""The command line stays thin: options → one call of oodcli.api → print."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import oodcli
from oodcli.cli import app

CLI = Path(oodcli.__file__).parent / "cli"
FILES = {path.name: path for path in sorted(CLI.glob("*.py"))}

FREE = ("oodcli.api", "oodcli.cli", "oodcli.errors", "oodcli.notes", "oodcli._version")
NAMES = ("oodcli.detectors", "oodcli.networks.architectures", "oodcli.records")
"""Registries whose names appear in help and completion."""

EXCEPTIONS = {
    "detectors.py": {"oodcli.detectors.base"},  # a type
    "evaluate.py": {"oodcli.report.tables", "oodcli.stages.evaluate"},  # to do without torch
    "inspect.py": {  # to do without torch
        *("oodcli.files.describe", "oodcli.files.hub", "oodcli.files.verify"),
    },
    "tables.py": {"oodcli.report.tables"},
    "versions.py": {"oodcli.networks.devices", "torch"},  # what --version reports
}
LONGEST = 60
"""Lines of the body of a command."""

OTHERS = sys.stdlib_module_names | {"__future__", "rich", "shellingham", "typer"}


def imported(path: Path) -> set[str]:
    """Modules; ``from oodcli import notes`` is oodcli.notes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            package = node.module in ("oodcli", "oodcli.networks")
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if package
                else {node.module}
            )
    return found


def unexpected(modules: set[str]) -> set[str]:
    """Those that need a reason."""
    return {
        name
        for name in modules
        if name not in NAMES and not name.startswith(FREE) and name.split(".")[0] not in OTHERS
    }


@pytest.mark.parametrize("name", FILES)
def test_the_command_line_knows_the_api_alone(name):
    assert unexpected(imported(FILES[name])) == EXCEPTIONS.get(name, set())


def test_no_exception_is_left_over():
    assert EXCEPTIONS.keys() <= FILES.keys()


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda each: each.name)
def test_the_body_of_a_command_is_short(command):
    path = FILES[f"{command.name}.py"]
    [body] = [
        node.body
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "command"
    ]
    assert body[-1].end_lineno - body[0].lineno < LONGEST


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from oodcli.stages.score import Scoring", {"oodcli.stages.score"}),
        ("def f():\n    from oodcli import stages", {"oodcli.stages"}),
        ("import numpy as np\nimport sys", {"numpy"}),
        ("from oodcli import api, detectors\nimport oodcli.cli.console", set()),
    ],
)
def test_an_import_is_noticed(code, found, tmp_path):
    path = tmp_path / "score.py"
    path.write_text(code, encoding="utf-8")
    assert unexpected(imported(path)) == found


def test_evaluate_does_not_import_torch(tmp_path):
    code = (
        "import sys\n"
        "from oodcli.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    rows = "".join(f"{k}.png,,a,0.5,{k},\n" for k in range(30))
    text = f"path,label,predicted,confidence,energy,error\n{rows}"
    for name in ("id.csv", "far.csv"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    words = ["evaluate", "--id", "id.csv", "--ood", "far=far.csv", "--resamples", "2"]
    subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, check=True)
