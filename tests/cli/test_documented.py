"""README and docs/: every option is listed, every link leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import oodcli

from oodcli import detectors
from oodcli.cli import app

ROOT = Path(__file__).resolve().parents[2]


DOCS = ROOT / "docs"


ALL = sorted(DOCS.rglob("*.md"))


GUIDE = [page for page in ALL if DOCS / "detectors" not in page.parents]
"""The pages of docs/detectors/ have tests of their own."""


COMMANDS = [command.callback.__module__.rpartition(".")[2] for command in app.registered_commands]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in titles)
    return {re.sub(r"[\s]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", [ROOT / "README.md", *ALL], ids=lambda page: name_of(page))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), target
        if page in GUIDE and file:
            assert DOCS in found.parents, f"{target} leaves docs/, which MkDocs does not build"
        if anchor:
            assert anchor in anchors(found), target


def test_every_page_is_in_the_navigation():
    yaml = pytest.importorskip("yaml", exc_type=ImportError)
    found = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = set(leaves(found["nav"]))
    folders = {name.rpartition("/")[0] for name in named if name.endswith("/index.md")}
    for page in GUIDE:
        assert page.relative_to(DOCS).as_posix() in named, page
    for name in named:
        assert (DOCS / name).is_file() or name.rpartition("/")[0] in folders, name


def leaves(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        yield from (leaf for each in nav.values() for leaf in leaves(each))
    elif isinstance(nav, list):
        yield from (leaf for each in nav for leaf in leaves(each))


OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")


def help_sections(command: str) -> dict[str, dict[str, str]]:
    """Title of a section → names of an option, joined → what stands there."""
    text = oodcli(command, "--help").out
    sections: dict[str, dict[str, str]] = {}
    title = name = ""
    for line in text.splitlines():
        if re.match(r"\S.*:$", line):
            title, name = line[:-1], ""
        elif re.match(r" {2}-", line):
            name = " ".join(OPTION.findall(re.split(r" {2,}", line.strip())[0]))
            sections.setdefault(title, {})[name] = line
        elif re.match(r" {3,}\S", line) and name:
            sections[title][name] += " " + line.strip()
    return sections


def page_sections(command: str) -> dict[str, dict[str, str]]:
    text = (DOCS / "commands" / f"{command}.md").read_text(encoding="utf-8")
    sections: dict[str, dict[str, str]] = {}
    title, listing = "", False
    for line in text.splitlines():
        if line.startswith("#"):
            title = line.lstrip("#").strip()
        elif not line.startswith("|"):
            listing = False
        elif line.startswith("| option |"):
            listing = True
        elif listing and line.startswith("| `-"):
            first = re.split(r"(?<!\\)\|", line)[1]
            sections.setdefault(title, {})[" ".join(OPTION.findall(first))] = line
    return sections


def table_row(name: str, text: str) -> str:
    """The row of a page for an option, made of its help."""
    _, _, meaning = re.sub(r" {2,}", "\t", text.strip(), count=1).partition("\t")
    names = ", ".join(f"`{each}`" for each in name.split())
    return f"| {names} | {re.sub(r' {2,}', ' ', meaning)} |"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_a_command_lists_its_options(command):
    expected, found = help_sections(command), page_sections(command)
    rows = [
        f"{title}: {table_row(name, text)}"
        for title, texts in expected.items()
        for name, text in texts.items()
        if name not in found.get(title, {})
    ]
    assert not rows, f"docs/commands/{command}.md lacks these rows:\n" + "\n".join(rows)
    assert {title: set(rows) for title, rows in found.items()} == {
        title: set(rows) for title, rows in expected.items()
    }
    for title, rows in expected.items():
        for name, row in rows.items():
            default = re.search(r"\[default: ([^\]();]+?)(?:;.*)?\]", " ".join(row.split()))
            if default:
                assert default[1] in found[title][name].replace("`", ""), (name, default[1])


def test_every_command_has_a_page():
    assert {page.stem for page in (DOCS / "commands").glob("*.md")} == set(COMMANDS)


def test_every_detector_of_the_guide_exists():
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`([a-z0-9][a-z0-9+-]+)`", tables)) - set(COMMANDS)
    assert named <= set(detectors.names())
