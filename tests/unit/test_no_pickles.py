"""No source of oodcli writes a pickle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import oodcli

MESSAGES = "images/decoding.py"
"""To processes that decode images: no files."""


WRITERS = {
    *(f"{module}.{name}" for module in ("pickle", "dill") for name in ("dump", "dumps", "Pickler")),
    *("torch.save", "torch.jit.save", "torch.export.save", "np.save", "numpy.save", "marshal.dump"),
}


MODULES = {"dill", "cloudpickle", "joblib", "shelve", "marshal", "_pickle", "copyreg"}


def sources() -> Iterator[tuple[str, ast.AST]]:
    root = Path(oodcli.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path.relative_to(root).as_posix(), node


def test_no_source_writes_a_pickle():
    found = set()
    for name, node in sources():
        match node:
            case ast.Attribute() if ast.unparse(node) in WRITERS:
                found.add((name, ast.unparse(node)))
            case ast.Import(names=names):
                found |= {(name, each.name) for each in names if each.name in MODULES}
            case ast.ImportFrom(module=str(module)) if module in {*MODULES, "pickle"}:
                found.add((name, module))
            case ast.keyword(arg="allow_pickle"):
                assert ast.unparse(node.value) == "False", name
    # Between processes of a job, never into a file.
    processes = {(MESSAGES, "pickle.dump"), ("stages/ray.py", "pickle.dumps")}
    counting = {("networks/devices.py", "joblib")}  # the processors
    assert found == processes | counting
