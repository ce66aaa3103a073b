"""MkDocs hooks: make the facts of detectors and of commands from the code when the site is built.

In a page, a line of its own stands for

    <!-- detector NAME -->        formula, source, what must be recorded, settings and defaults
    <!-- figures NAME NAME … -->  the measured figures of these detectors
    <!-- index -->                a table of all detectors with their mean figures
    <!-- losses -->               what fitted detectors lose with virtual images
    <!-- measured -->             when and with what the figures were measured
    <!-- options NAME -->         usage, arguments and options of a command

A detector or a command without a page in docs/ gets one of these blocks alone. The navigation lists
all of them. Formulas become MathML, which browsers show without a script or a font.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from oodcli import detectors
from oodcli.cli import EXAMPLES, app
from oodcli.cli.detectors import as_given
from oodcli.detectors import facts

DOCS = Path(__file__).parent
GROUP: Any = typer.main.get_command(app)
COMMANDS: Mapping[str, Any] = GROUP.commands
FIGURES: Mapping[str, Any] = json.loads((DOCS / "detectors/figures.json").read_text("utf-8"))
Row = Mapping[str, Sequence[float]]
"""Set → AUROC and TNR95 in percent."""

NOISE = "noise"
"""A set that is in no mean."""

MATCHED = "matched"
WAYS = {
    "": "",
    "[virtual]": "virtual",
    "[matched]": MATCHED,
    "[real]": "real",
    "[ood]": "OOD",
}
"""What a row of figures.json was fitted on, by the end of its name."""

NOT_MEASURED = "not measured"
MARKER = re.compile(r"^<!-- (detector|figures|index|losses|measured|options)((?: \S+)*) -->$", re.M)
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


# --- events of MkDocs -------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills the sections Commands and Detectors of the navigation."""
    for item in config.nav or []:
        if "Commands" in item:
            item["Commands"] = [{name: f"commands/{name}.md"} for name in COMMANDS]
        if "Detectors" in item:
            item["Detectors"] = ["detectors/index.md", *_groups()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each detector and each command that has none."""
    pages = {f"detectors/{name}.md": detector_page(name) for name in detectors.names()}
    pages |= {f"commands/{name}.md": command_page(name) for name in COMMANDS}
    for path, content in pages.items():
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the markers of a page."""
    return expanded(markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas that arithmatex has found, as MathML."""
    return MATH.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    block = match[1] == "div"
    made = convert(html.unescape(match[2]), display="block" if block else "inline")
    return f'<div class="formula">{made}</div>' if block else made


# --- pages ------------------------------------------------------------------------------------


def expanded(markdown: str) -> str:
    """The text of a page with its markers replaced. Raises DetectorError or KeyError for a
    detector or a command that there is not."""
    return MARKER.sub(lambda match: "\n".join(BLOCKS[match[1]](*match[2].split())), markdown)


def detector_page(name: str) -> str:
    """The page of a detector that has none in docs/."""
    parts = [
        f"# {name}: {_plain(detectors.get(name).about)}",
        f"<!-- detector {name} -->",
        f"## Measured\n\n<!-- figures {name} -->",
        f"## Example\n\n```sh\n{example(name)}```",
    ]
    family = family_page(name)
    if family is not None:
        link = f"[{title(family)}]({family.name})"
        parts.insert(3, f"When it works and fails, with the figures of its relatives: {link}.")
    return "\n\n".join(parts) + "\n"


def command_page(name: str) -> str:
    """The page of a command that has none in docs/."""
    parts = [
        f"# oodcli {name}",
        _plain(COMMANDS[name].help),
        f"## Examples\n\n```sh\n{EXAMPLES[name]}```",
        f"<!-- options {name} -->",
    ]
    return "\n\n".join(parts) + "\n"


def example(name: str) -> str:
    """Commands that fit a detector, where it is to be fitted, and score with it."""
    kind = detectors.get(name)
    if not kind.fitted:
        return f"oodcli score ckpt.pt photos/ -d {name} -o photos.csv\n"
    images = "v.h5" if kind.needs_pool or facts.fitted_on(kind) == "virtual images" else "real/"
    more = " --ood ood.features.h5" if kind.needs_ood else ""
    if kind.needs_pool:
        more = " --noise noise.features.h5 --calibrate pool.features.h5"
    return (
        f"oodcli extract ckpt.pt {images} --for {name} -o {name}.features.h5\n"
        f"oodcli fit     {name}.features.h5 -d {name}{more} -o detectors\n"
        f"oodcli score   ckpt.pt photos/ -d detectors/{name}.safetensors -o photos.csv\n"
    )


def title(page: Path) -> str:
    """The first heading of a file."""
    return page.read_text("utf-8").partition("\n")[0].removeprefix("# ")


def family_page(name: str) -> Path | None:
    """Another page on which the figures of a detector stand among those of its relatives."""
    for page in sorted(DOCS.glob("detectors/*.md")):
        shown = [match[2].split() for match in MARKER.finditer(page.read_text("utf-8"))]
        if page.stem != name and any(name in names for names in shown):
            return page
    return None


def _groups() -> Iterator[dict[str, list[dict[str, str]]]]:
    """Sections of the navigation: detectors by whether they are fitted, then pages of families."""
    for label, fitted in (("Need no fitting", False), ("Are fitted first", True)):
        names = [name for name in detectors.names() if detectors.get(name).fitted == fitted]
        yield {label: [{name: f"detectors/{name}.md"} for name in names]}
    known = {"index", *detectors.names()}
    others = [page for page in sorted(DOCS.glob("detectors/*.md")) if page.stem not in known]
    yield {"Families": [{title(page): f"detectors/{page.name}"} for page in others]}


# --- blocks -----------------------------------------------------------------------------------


def detector(name: str) -> Iterator[str]:
    """Source, records, formula and settings of a detector."""
    kind = detectors.get(name)
    needs = ", ".join(f"`{word}`" for word in facts.records(kind))
    rows = [["Source", _plain(kind.source)], ["Fitted on", facts.fitted_on(kind)]]
    if kind.superseded_by:
        rows.append(["Superseded by", _linked(kind.superseded_by, "")])
    rows.append(["[Must be recorded](index.md#what-must-be-recorded)", needs])
    yield from table(["", name], rows)
    yield "\n## Formula\n"
    for equation in facts.equations(kind):
        yield f"$$\n{equation}\n$$\n"
    code = facts.explanation(kind).split("``")
    yield "".join(f"`{part}`" if i % 2 else _escaped(part) for i, part in enumerate(code))
    yield "\n[Signs](index.md#words-and-signs) used on all pages.\n"
    settings = facts.settings(kind)
    if settings:
        yield "## Settings\n"
        yield from table(
            ["`-p`", "type", "default", "meaning"],
            (
                [
                    f"`{name}.{key}`",
                    each["type"],
                    as_given(each["default"]),
                    _plain(each["meaning"]),
                ]
                for key, each in settings.items()
            ),
        )


def figures(*names: str) -> Iterator[str]:
    """AUROC and TNR95 of detectors on each set, a row for each network and way of fitting."""
    known = [name for name in names if rows_of(name)]
    if known:
        sets = list(rows_of(known[0])[0][2])
        rows = [
            [
                _linked(name, way),
                network.replace("-", "\u2011"),
                *(pair(row.get(set_)) for set_ in sets),
                pair(mean(row)),
            ]
            for name in known
            for network, way, row in rows_of(name)
        ]
        yield "AUROC / TNR95 in percent; [how we measured](index.md#how-we-measured).\n"
        yield from table(["", "network", *sets, "mean without noise"], rows)
        yield ""
    missing = [f"`{name}`" for name in names if name not in known]
    if missing:
        yield f"{', '.join(missing)}: {NOT_MEASURED}.\n"


def index() -> Iterator[str]:
    """A table of all detectors."""
    networks = list(FIGURES["networks"])
    rows = []
    for name in detectors.names():
        kind = detectors.get(name)
        cells = dict.fromkeys(networks, "")
        for network, way, row in rows_of(name):
            if way == MATCHED:
                continue
            cells[network] += f"{'; ' * bool(cells[network])}{way} {pair(mean(row))}"
        means = [cell.strip() or NOT_MEASURED for cell in cells.values()]
        needs = " ".join(facts.records(kind))
        about = _plain(facts.summary(kind))
        rows.append([f"[`{name}`]({name}.md)", about, *means, facts.fitted_on(kind), needs])
    yield from table(["name", "what it is", *networks, "fitted on", "must be recorded"], rows)


def losses() -> Iterator[str]:
    """A table of the detectors that can be fitted on real and on virtual images, those that lose
    least first: the mean over the networks and sets."""
    found = []
    for name in detectors.names():
        ways: dict[str, list[tuple[float, float]]] = {}
        for _, way, row in rows_of(name):
            ways.setdefault(way, []).append(mean(row))
        if {"real", "virtual"} <= ways.keys():
            means = {
                way: [sum(part) / len(rows) for part in zip(*rows, strict=True)]
                for way, rows in ways.items()
            }
            found.append((name, means))
    found.sort(key=lambda each: each[1]["real"][0] - each[1]["virtual"][0])
    count = FIGURES.get("images", {}).get("cifar10-train-10k")
    real = f"{count:,} real images" if count else "real"
    rows = []
    for name, means in found:
        lost = [pair(means.get("real"))]
        for way in ("virtual", MATCHED):
            there = means.get(way)
            differs = "" if there is None else f"{there[0] - means['real'][0]:+.1f}"
            lost += [pair(there) or NOT_MEASURED, differs.replace("-", "\u2212")]
        rows.append([f"[`{name}`]({name}.md)", *lost])
    yield from table(["name", real, "virtual", "AUROC", "virtual, matched accuracy", "AUROC"], rows)


def measured() -> Iterator[str]:
    """When and with what the figures were measured."""
    versions = ", ".join(f"{name} {number}" for name, number in FIGURES["versions"].items())
    accuracies = " and ".join(
        f"{each['accuracy']:.1f} % ({network}, `{each['checkpoint']}`)"
        for network, each in FIGURES["networks"].items()
    )
    yield f"Measured on {FIGURES['date']} on {FIGURES['machine']}: {versions}."
    yield f"The networks classify {accuracies} of the in-distribution images correctly."
    for each in FIGURES.get("later", []):
        names = ", ".join(f"`{name}`" for name in each["detectors"])
        release = each["versions"]["oodcli"]
        yield f"{names}: on {each['date']} on {each['machine']}, oodcli {release}."
    yield "\n[figures.json](figures.json) has every figure and every command.\n"


def options(name: str) -> Iterator[str]:
    """Usage, arguments and options of a command, in the sections of its help."""
    command = COMMANDS[name]
    parent = GROUP.make_context("oodcli", [name], resilient_parsing=True)
    context = command.make_context(name, [], parent=parent, resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"## Usage\n\n```text\noodcli {name} {usage}\n```\n"
    sections: dict[str, list[list[str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            is_argument = parameter.param_type_name == "argument"
            usual = "Arguments" if is_argument else "Options"
            section = getattr(parameter, "rich_help_panel", None) or usual
            words = re.sub(r" <([^>]+)>", "" if is_argument else _upper, record[0])
            sections.setdefault(section, []).append([f"`{words}`", _plain(record[1])])
    for section, rows in sections.items():
        yield f"## {section}\n"
        yield from table(["argument" if section == "Arguments" else "option", "meaning"], rows)
        yield ""


BLOCKS: Mapping[str, Callable[..., Iterable[str]]] = {
    "detector": detector,
    "figures": figures,
    "index": index,
    "losses": losses,
    "measured": measured,
    "options": options,
}


# --- tables and figures -----------------------------------------------------------------------


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for cells in (heads, ["---"] * len(heads), *rows):
        yield f"| {' | '.join(cells)} |"


def _upper(kind: re.Match[str]) -> str:
    return f" {kind[1].split()[0].upper()}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    return re.sub(r"([*_`\\\[\]|$])", r"\\\1", html.escape(text, quote=False))


def _linked(name: str, way: str) -> str:
    return f"[`{name}`]({name}.md)" + (f", {way}" if way else "")


def rows_of(name: str) -> list[tuple[str, str, Row]]:
    """Network, what a detector was fitted on, and its figures by set."""
    return [
        (network, way, each["auroc and tnr95"][f"{name}{end}"])
        for network, each in FIGURES["networks"].items()
        for end, way in WAYS.items()
        if f"{name}{end}" in each["auroc and tnr95"]
    ]


def mean(row: Row) -> tuple[float, float]:
    """Over the sets without the noise."""
    pairs = [values for name, values in row.items() if name != NOISE]
    first, second = (sum(each[i] for each in pairs) / len(pairs) for i in (0, 1))
    return first, second


def pair(values: Sequence[float] | None) -> str:
    """With spaces that do not break."""
    return "" if values is None else f"{values[0]:.1f}\u00a0/\u00a0{values[1]:.1f}"
