"""The table that ``oodcli inspect`` prints about a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

WHAT = {
    "virtual": "virtual images",
    "features": "a feature cache",
    "detector": "a fitted or calibrated detector",
    "scores": "scores",
    "metrics": "metrics",
    "partial": "finished batches of an interrupted job",
    "prepared": "a folder of prepare, for score",
}


def of_file(found: dict[str, Any]) -> dict[str, Any]:
    """The rows of the table, from the description of ``describe_file``."""
    about = {
        "detector": _detector,
        "scores": _scores,
        "metrics": _metrics,
        "partial": _partial,
        "prepared": _prepared,
    }
    kind = found["kind"].partition(".")[0]
    facts = {"file": found["file"], "type": WHAT[kind], **about.get(kind, _rows)(found)}
    return {name: value for name, value in facts.items() if value not in (None, "")}


def facts_table(facts: Mapping[str, Any]) -> Table:
    """A table of two columns, with a line for each fact."""
    from rich.table import Table
    from rich.text import Text

    from oodcli.cli.console import harmless

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(harmless(str(value))))  # no markup: [3] in a path is not a style
    return table


def _rows(found: dict[str, Any]) -> dict[str, Any]:
    """Facts about virtual images and feature caches."""
    made, quality = found["made"], found.get("quality")
    facts = {"rows": f"{found['rows']}, {found['unreadable']} unreadable"}
    facts["rows"] += f", {found['labelled']} labelled"
    if quality:
        facts["quality"] = (
            f"target class predicted on {quality['agreement']:.1%}, cross entropy "
            f"{quality['cross_entropy']:.3g} nats"
        )
    if found.get("settings"):
        facts["settings"] = _pairs(found["settings"])
    matched = made["matched_accuracy"]
    return {
        **facts,
        "records": ", ".join(f"{name} {width}" for name, width in _grouped(found["records"])),
        "images from": made["source"],
        "virtual": "no" if not made["virtual"] else "yes",
        "matched to": None if matched is None else f"an accuracy of {matched:.4g}",
        "shard": _shard(made),
        **_how(made, made),
        "rows_sha256": made["rows_sha256"],
    }


def _grouped(records: dict[str, int]) -> list[tuple[str, str]]:
    """Datasets grouped by kind: ``layers/*/mean`` in 9 layers, widths from 16 to 64."""
    groups: dict[str, list[int]] = {}
    for name, width in records.items():
        match name.removeprefix("mirror/").split("/"):
            case [group, layer, _]:
                key = name.replace(f"{group}/{layer}/", f"{group}/*/", 1)
            case _:
                key = name
        groups.setdefault(key, []).append(width)
    return [
        (key, str(widths[0]) if "*" not in key else _widths(widths))
        for key, widths in groups.items()
    ]


def _widths(widths: list[int]) -> str:
    low, high = min(widths), max(widths)
    return f"{len(widths)}×" + (f"{low}" if low == high else f"{low}…{high}")


def _detector(found: dict[str, Any]) -> dict[str, Any]:
    fitted_on, made = found["fitted_on"], found["made"]
    on = None
    if "rows" in fitted_on:
        on = f"{fitted_on['rows']} {fitted_on['kind']} images: {fitted_on['file']}"
        on += f", from {fitted_on['source']}" if "source" in fitted_on else ""
    return {
        "detector": found["detector"],
        "settings": _pairs(found["hyperparameters"]),
        "fitted on": on or "nothing: it needs no fitting",
        "rows_sha256": fitted_on.get("rows_sha256"),
        "OOD data": fitted_on.get("ood"),
        "noise": fitted_on.get("noise"),
        "pool": fitted_on.get("pool"),
        "calibrated on": "; ".join(
            f"{about['words']}" + ("" if view == "plain" else f" ({view})")
            for view, about in found["calibration"].items()
        )
        or "nothing",
        "no verdict on": ", ".join(found["recorded"].get("no_verdict_on", ())),
        "threshold": found["threshold"],
        "tensors": ", ".join(
            f"{name} {'×'.join(map(str, shape)) or 1}" for name, shape in found["tensors"].items()
        )
        or "none",
        **_how(made, found["recorded"]),
        "extracted by": found["recorded"].get("command"),
        "tensors_sha256": made["tensors_sha256"],
    }


def _how(made: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """How a file was created. recorded: how its rows were recorded."""
    versions = (
        f"{name} {made[key]}"
        for name, key in (("oodcli", "oodcli_version"), ("torch", "torch_version"))
        if made[key]
    )
    preprocessing = made["preprocessing"]
    return {
        "made by": made["command"],
        "versions": ", ".join(versions),
        "recorded": f"seed {recorded['seed']}, {recorded['precision']} on {recorded['device']}"
        if "seed" in recorded
        else None,
        "architecture": made["arch"],
        "input": input_of(preprocessing) if preprocessing else None,
        "mean, std": mean_std(preprocessing) if preprocessing else None,
        "checkpoint": made["checkpoint_sha256"],
        "weights": "averaged (--ema)" if made.get("averaged") else None,
    }


def _shard(made: dict[str, Any]) -> str | None:
    """The shard that the rows belong to."""
    shard = made.get("shard")
    if shard is None:
        return None
    rows = f"rows {shard['start']} to {shard['stop']} of {shard['rows']}"
    return f"{shard['number']} of {shard['of']}, {rows}"


def _scores(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "rows": f"{found['rows']}, {found['unreadable']} unreadable, {found['labelled']} labelled",
        "columns": ", ".join(found["columns"]),
        "detectors": ", ".join(found["detectors"]),
        "verdicts": "; ".join(
            f"{name}: {each['ood']} OOD"
            + (f", {found['unjudged'][name]} without one" if name in found["unjudged"] else "")
            + (f", {each['basis']}" if each["basis"] else "")
            for name, each in found["verdicts"].items()
        ),
        "OOD data": "; ".join(f"{name}: {words}" for name, words in found["saw_ood"].items()),
        **_scored(found["made"]),
    }


def _scored(made: dict[str, Any] | None) -> dict[str, Any]:
    """Facts from the metadata file beside the scores."""
    if made is None:
        return {"made by": "unknown: its metadata file is missing"}
    return {
        "images from": made["source"],
        "shard": _shard(made),
        **_how(made, made),
        "extracted by": made["extracted_by"],
        "settings": _pairs(made["detectors"]),
        "paths_sha256": made["paths_sha256"],
    }


def _metrics(found: dict[str, Any]) -> dict[str, Any]:
    made = found.get("made", {})
    return {
        "rows": found["rows"],
        **{f"{key}s": ", ".join(found[f"{key}s"]) for key in ("detector", "set", "metric")},
        "scores": "; ".join(
            f"{each['set']}: {each['source']}, {each['rows']} rows, {each['unreadable']} unreadable"
            for each in found.get("counts", ())
        ),
        "made by": made.get("command") or "not stored in this file: inspect metrics.json",
        "versions": f"oodcli {made['oodcli_version']}" if made.get("oodcli_version") else None,
        "bootstrap": f"{found['resamples']} resamples, seed {made['seed']}" if made else None,
    }


def _partial(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "rows": found["rows"],
        "started by": found["command"],
        "to resume": "re-run that command; --restart discards what is stored",
        **found["job"],
        "decided": _pairs(found["decided"]),
    }


def _prepared(found: dict[str, Any]) -> dict[str, Any]:
    steps = ", ".join(step["name"] for step in found["steps"]) or "none"
    if not found["finished"]:
        return {"steps done": steps, "to resume": "run the same prepare command again"}
    made = {"torch_version": None, "arch": None, **found["made"]}
    return {
        "detector": found["detector"],
        "detectors": ", ".join(found["detectors"]),
        "accuracy": found["accuracy"],
        "steps": steps,
        **_how(made, {}),
    }


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "none"


def input_of(preprocessing: dict[str, Any]) -> str:
    from oodcli.networks.architectures import resizing

    height, width = preprocessing["input_size"]
    channels = len(preprocessing["mean"])
    how = f"{resizing(preprocessing['resize'])} ({preprocessing['interpolation']})"
    return ", ".join((f"{channels}×{height}×{width}", how, *decoded(preprocessing)))


def decoded(preprocessing: dict[str, Any]) -> list[str]:
    """Settings for decoding pixels that differ from the default; older files lack them."""
    found = []
    if preprocessing.get("exif", "turn") == "keep":
        found.append("EXIF orientation ignored")
    if preprocessing.get("image_range"):
        low, high = preprocessing["image_range"]
        found.append(f"range above 8 bits {low:g}…{high:g}")
    if preprocessing.get("decode", "full") == "fast":
        found.append("fast JPEG decoding")
    return found


def mean_std(preprocessing: dict[str, Any]) -> str:
    return f"{_list(preprocessing['mean'])}; {_list(preprocessing['std'])}"


def _list(numbers: list[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
