"""README and docs/: every link leads somewhere, every detector that is named exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from oodcli import detectors
from oodcli.cli import app

ROOT = Path(__file__).resolve().parents[2]


DOCS = ROOT / "docs"


ALL = sorted(DOCS.rglob("*.md"))


COMMANDS = [command.callback.__module__.rpartition(".")[2] for command in app.registered_commands]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in titles)
    return {re.sub(r"[\s]+", "-", title) for title in plain}


MADE = {DOCS / "detectors" / f"{name}.md" for name in detectors.names()} | {
    DOCS / "commands" / f"{name}.md" for name in COMMANDS
}
"""Pages that docs/hooks.py makes where there is no file."""


@pytest.mark.parametrize("page", [ROOT / "README.md", *ALL], ids=lambda page: name_of(page))
def test_links_lead_somewhere(page):
    """README's with their anchors; those of docs/ are checked where the site is built."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        if page in ALL:
            assert found.exists() or found in MADE, target
            assert DOCS in found.parents, f"{target} leaves docs/, which MkDocs does not build"
        else:
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target


def test_every_detector_of_the_guide_exists():
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`([a-z0-9][a-z0-9+-]+)`", tables)) - set(COMMANDS)
    assert named <= set(detectors.names())
