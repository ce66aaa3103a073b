"""The site of docs/, as docs/hooks.py completes it: every page is there, and loads nothing from
elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("latex2mathml")

from docs import hooks
from oodcli import detectors
from oodcli.cli import app
from oodcli.cli.detectors import as_given
from oodcli.detectors import facts
from oodcli.detectors.hyperparameters import hyperparameters

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [command.callback.__module__.rpartition(".")[2] for command in app.registered_commands]

every_detector = pytest.mark.parametrize("name", detectors.names())


def build(root: Path, target: Path) -> None:
    """A strict build of the site, with the package that lies beside its docs/. Raises
    AssertionError when it fails. With --quiet, --strict would see no warning."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(target)]
    settings = {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=root, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(ROOT, folder)
    return folder


class Loaded(HTMLParser):
    """Addresses that a page loads without being asked: not those of its links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("canonical", "next", "prev"):
            return
        names = ("href",) if tag == "link" else ("src", "srcset", "data", "poster")
        self.found += [value for name in names if (value := values.get(name))]


def plain(text: str) -> str:
    """The words of a piece of HTML, with single spaces."""
    return " ".join(unescape(re.sub(r"<[^>]+>", "", text)).split())


@every_detector
def test_a_detector_has_a_page_with_its_facts(site, name):
    page = (site / "detectors" / name / "index.html").read_text(encoding="utf-8")
    text = plain(page)
    kind = detectors.get(name)
    assert kind.source in text
    assert facts.explanation(kind).replace("``", "") in text
    for word in facts.records(kind):
        assert f"<code>{word}</code>" in page
    for key, setting in hyperparameters(kind).items():
        row = rf"<code>{re.escape(name)}\.{key}</code></td>.*?</tr>"
        rows = re.findall(row, page, re.S)  # a record may have the name of a setting
        found = [each for each in rows if setting.meaning in plain(each)]
        assert found, key
        assert f"<td>{as_given(setting.default)}</td>" in found[0]
    formula = page.partition('id="formula"')[2].partition("<h2")[0]
    assert formula.count("<math ") >= len(facts.equations(kind)) > 0


@every_detector
def test_a_detector_is_in_the_index_and_in_the_navigation(site, name):
    page = (site / "detectors" / "index.html").read_text(encoding="utf-8")
    links = [unquote(each) for each in re.findall(r'href="([^"]+)"', page)]
    assert links.count(f"{name}/") >= 2


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_a_page_with_its_options(site, name):
    from typer.main import get_command

    page = (site / "commands" / name / "index.html").read_text(encoding="utf-8")
    codes = " ".join(map(plain, re.findall(r"<td><code>(.*?)</code></td>", page)))
    command = get_command(app).commands[name]
    for parameter in command.params:
        for option in parameter.opts if parameter.param_type_name == "option" else ():
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", codes), option
        help_ = getattr(parameter, "help", None)
        assert help_ is None or plain(help_.replace("<", "&lt;")) in plain(page)


def test_no_page_loads_anything_from_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(detectors.names()) + len(COMMANDS)
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert loaded.found
        elsewhere = [each for each in loaded.found if re.match(r"(?:\w+:)?//", each)]
        assert not elsewhere, page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_a_script_from_elsewhere_is_noticed():
    loaded = Loaded()
    loaded.feed('<script src="https://cdn.example.org/mathjax.js"></script><a href="//x.org">x</a>')
    assert loaded.found == ["https://cdn.example.org/mathjax.js"]


def test_math_is_mathml_without_a_script(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "arithmatex" not in text, page
        assert "mathjax" not in text.lower(), page
        for formula in re.findall(r"<math .*?</math>", text, re.S):
            assert "\\" not in formula, (page, formula)  # LaTeX that was not understood


def test_every_marker_of_a_page_is_replaced(site):
    for page in site.rglob("*.html"):
        left = re.search(r"<!-- (?:detector|figure|index|measured|option)s?\b", page.read_text())
        assert left is None, (page, left)


def test_measured_figures_are_on_the_page():
    row = hooks.FIGURES["networks"]["ResNet-20"]["auroc and tnr95"]["vim[real]"]
    text = "\n".join(hooks.figures("vim"))
    for first, second in row.values():
        assert f"{first:.1f}\u00a0/\u00a0{second:.1f}" in text
    pairs = [pair for name, pair in row.items() if name != "noise"]
    assert len(pairs) == 5
    assert f"{sum(first for first, _ in pairs) / 5:.1f}\u00a0/\u00a0" in text


def test_a_detector_without_figures_is_not_measured():
    assert "\n".join(hooks.figures("mos")) == "`mos`: not measured.\n"
    row = next(line for line in hooks.index() if line.startswith("| [`mos`](mos.md) |"))
    assert row.count("not measured") == 2


def test_a_superseded_detector_links_to_the_better_one():
    line = "| Superseded by | [`c2ir-peak`](c2ir-peak.md) |"
    assert list(hooks.detector("duo")).count(line) == 1
    assert not any("Superseded" in each for each in hooks.detector("c2ir-peak"))
    (row,) = (each for each in hooks.index() if each.startswith("| [`duo`](duo.md) |"))
    assert "; superseded by c2ir-peak |" in row


def test_the_losses_are_differences_to_real_rows(monkeypatch):
    def network(real: float, virtual: float, matched: float) -> dict[str, object]:
        values = {"knn[real]": real, "knn[virtual]": virtual, "knn[matched]": matched, "msp": 1.0}
        rows = {way: {"a": [value, 10.0], "noise": [0, 0]} for way, value in values.items()}
        rows |= {f"vim[{way}]": {"a": [50.0, 9.0]} for way in ("real", "virtual")}
        return {"auroc and tnr95": rows}

    networks = {"one": network(90.0, 80.0, 85.0), "two": network(80.0, 78.0, 83.0)}
    monkeypatch.setattr(hooks, "FIGURES", {"networks": networks})
    _, _, vim, knn = hooks.losses()
    assert vim.startswith("| [`vim`](vim.md) | 50.0\u00a0/\u00a09.0 |")
    assert vim.endswith("| +0.0 | not measured |  |")
    pairs = [f"{area}\u00a0/\u00a010.0" for area in ("85.0", "79.0", "84.0")]
    assert (
        knn == f"| [`knn`](knn.md) | {pairs[0]} | {pairs[1]} | \u22126.0 | {pairs[2]} | \u22121.0 |"
    )


def test_figures_measured_later_are_dated(monkeypatch):
    later = {
        "detectors": ["knn", "vim"],
        "date": "2030-01-01",
        "machine": "a machine",
        "versions": {"oodcli": "9.0"},
    }
    monkeypatch.setattr(hooks, "FIGURES", hooks.FIGURES | {"later": [later]})
    lines = list(hooks.measured())
    assert hooks.FIGURES["date"] in lines[0]
    assert "`knn`, `vim`: on 2030-01-01 on a machine, oodcli 9.0." in lines


NEW = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.features import Features, recorded


@dataclass(frozen=True)
class Gen(Detector):
    """Generalised entropy, Σ p^γ (1 − p)^γ."""

    name = "gen-trial"
    source = "Liu et al. 2023"
    about = "generalised entropy"
    formula = r"s = \\sum_c p_c^\\gamma (1 - p_c)^\\gamma"
    needs = frozenset({"logits"})

    gamma: Annotated[float, "exponent, above 0"] = 0.1

    def _score(self, test: Features) -> Tensor:
        p = recorded(test.logits).double().softmax(1)
        return (p * (1 - p)).pow(self.gamma).sum(1)
'''


def test_a_new_detector_needs_no_change_in_docs(tmp_path):
    """Its file and its line in the registry give it a page, and rows in index and navigation."""
    for name in ("docs", "oodcli"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "oodcli" / "detectors" / "gen_trial.py").write_text(NEW, encoding="utf-8")
    registry = tmp_path / "oodcli" / "detectors" / "__init__.py"
    text = registry.read_text(encoding="utf-8")
    registry.write_text(text.replace('    "trio"', '    "gen-trial": "Gen",\n    "trio"'), "utf-8")
    build(tmp_path, tmp_path / "site")
    page = (tmp_path / "site" / "detectors" / "gen-trial" / "index.html").read_text("utf-8")
    assert "Generalised entropy" in page
    assert "<code>gen-trial.gamma</code>" in page
    assert "exponent, above 0" in page
    assert "not measured" in page
    assert "<math " in page
    index = (tmp_path / "site" / "detectors" / "index.html").read_text("utf-8")
    assert index.count('href="gen-trial/"') >= 2
    with (tmp_path / "docs" / "detectors" / "vim.md").open("a") as file:
        file.write("[broken](nowhere.md)\n")
    with pytest.raises(AssertionError, match=r"nowhere\.md"):
        build(tmp_path, tmp_path / "site")
