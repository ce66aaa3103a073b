"""The shards of a job to the file that the job would have made in one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from oodcli.errors import FileError, ImagesError
from oodcli.files.atomic import atomic, refuse_existing, refuse_suffix
from oodcli.files.cache import CacheWriter, open_cache
from oodcli.files.describe import kind_of
from oodcli.files.hdf5 import Provenance, writing
from oodcli.files.made import made_path, read_made, write_made
from oodcli.files.scores import Format, format_of, join_scores
from oodcli.files.verify import verify
from oodcli.files.virtual import VirtualWriter, open_virtual
from oodcli.inversion.quality import report
from oodcli.jobs.shards import Shard
from oodcli.report.contact_sheet import contact_sheet
from oodcli.stages.invert import SHOWN
from oodcli.stages.record import Progress, job_of, no_progress

HOW = "'oodcli invert', 'extract' and 'score' make shards with --shard N/OF"


@dataclass(frozen=True)
class Part:
    """A file that is a shard. command: that made it. job: what must be the same in all. flags:
    whether its scores have verdicts."""

    path: Path
    shard: Shard
    command: str
    job: Mapping[str, Any]
    flags: bool = False


def parts_of(paths: Sequence[Path]) -> list[Part]:
    """The shards in these files, in order. Raises FileError when a file is no shard or is damaged,
    when two are not of the same job, when one is there twice or missing."""
    kinds = {path: kind_of(path) for path in paths}
    first = kinds[paths[0]]
    for path, kind in kinds.items():
        if kind not in _PARTS:
            raise FileError(f"{path} is no shard, but {kind.partition('.')[0]}: {HOW}")
        if kind != first:
            raise FileError(
                f"{paths[0]} is {first}, but {path} is {kind}: merge one kind at a time"
            )
    return complete([_PARTS[kind](path) for path, kind in kinds.items()])


def merge_to_file(
    parts: Sequence[Part],
    output: Path,
    command: str,
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Merges what ``parts_of`` gave, once the checksums hold. progress is told how many rows are
    merged. Raises FileError when a shard is damaged, ImagesError when not one image of all could be
    read."""
    kind = kind_of(parts[0].path)
    suffixes = (".h5", ".hdf5") if kind in _HDF5 else (f".{kind.removeprefix('scores.')}",)
    refuse_suffix(output, *suffixes)
    refuse_existing(output, force=force)
    for part in parts:
        for _ in verify(part.path, kind):
            pass
    merge = _HDF5.get(kind, _merge_scores)
    command = f"{parts[0].command}; {command}"
    rows = parts[0].shard.rows
    found = merge([part.path for part in parts], output, command, rows, force, progress)
    return {"file": str(output), "shards": len(parts), "rows": rows, **found}


def complete(parts: Sequence[Part]) -> list[Part]:
    """The parts in order. Raises FileError when they are not all shards of one job."""
    known: dict[str, tuple[Path, Any]] = {}
    for part in parts:
        for name, value in part.job.items():
            path, before = known.setdefault(name, (part.path, value))
            if value != before:
                raise FileError(
                    f"{path} was made with {name} {_shown(before)}, but {part.path} with "
                    f"{_shown(value)}: they are not shards of one job"
                )
    first = parts[0]
    of, rows = first.shard.of, first.shard.rows
    found: dict[int, Part] = {}
    for part in parts:
        if part.shard.number in found:
            raise FileError(
                f"{found[part.shard.number].path} and {part.path} are both shard {part.shard}: "
                "give each once"
            )
        found[part.shard.number] = part
    missing = [str(number) for number in range(1, of + 1) if number not in found]
    if missing:
        named = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if missing[10:] else "")
        raise FileError(f"of {of} shards, {named} is missing: give all of them")
    ordered = [found[number] for number in range(1, of + 1)]
    ends = [0, *(part.shard.stop for part in ordered)]
    for part, end in zip(ordered, ends, strict=False):
        if part.shard.start != end:
            raise FileError(
                f"{part.path} begins with row {part.shard.start}, but the shard before it ends "
                f"with row {end}: they were made with different batch sizes"
            )
    if ends[-1] != rows:
        raise FileError(f"the shards end with row {ends[-1]} of {rows}: they are not of one job")
    return ordered


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _part(path: Path, made: Provenance, rows: int, **more: Any) -> Part:
    if made.shard is None:
        raise FileError(f"{path} is no shard, but a whole: {HOW}")
    if rows != made.shard.stop - made.shard.start:
        raise FileError(f"{path} has {rows} rows, which is not what it says: make it again")
    shard = made.shard
    job = job_of(made)
    # Paths of the same files may differ between hosts, and devices may be numbered.
    for name in ("the images", "--device", "--shard"):
        job.pop(name, None)
    job |= {
        "--shard …/": shard.of,
        "rows in all": shard.rows,
        "the list of images": shard.listing,
        "virtual images": made.virtual,
        "--match-accuracy": made.matched_accuracy,
        **more,
    }
    return Part(path, shard, made.command, job)


def _features(path: Path) -> Part:
    with open_cache(path) as cache:
        recorded: dict[str, Any] = {"--record": sorted(cache.recorded)}
        recorded |= {f"/{group}": asdict(making) for group, making in cache.made_with.items()}
        return _part(path, cache.provenance, cache.count, **recorded)


def _virtual(path: Path) -> Part:
    with open_virtual(path) as file:
        settings = {f"the setting {name}": value for name, value in file.settings.items()}
        return _part(path, file.provenance, file.count, **settings)


def _scores(path: Path) -> Part:
    made = read_made(path)
    if made is None or made.get("shard") is None:
        where = "" if made is not None else f", which {made_path(path).name} beside it would say"
        raise FileError(f"{path} is no shard{where}: {HOW}")
    try:
        shard = Shard.from_dict(made["shard"])
    except ValueError as error:
        raise FileError(f"{made_path(path)} is damaged ({error}): score again") from error
    if made["rows"] != shard.stop - shard.start:
        raise FileError(f"{path} has {made['rows']} rows, which is not what it says: score again")
    job = {
        "--shard …/": shard.of,
        "rows in all": shard.rows,
        "the list of images": shard.listing,
        **{words: made.get(name) for name, words in _ALIKE.items()},
    }
    return Part(path, shard, made["command"], job, flags=bool(made.get("flagged")))


_ALIKE = {
    "checkpoint_sha256": "the checkpoint",
    "arch": "--arch",
    "preprocessing": "the preprocessing",
    "class_names": "--class-names",
    "seed": "--seed",
    "precision": "--precision",
    "averaged": "--ema",
    "oodcli_version": "oodcli",
    "torch_version": "torch",
    "detectors": "the detectors",
    "verdicts": "--fpr or --threshold",
    "mirror": "--mirror",
}
"""What scores say of how they were made, by the names that users know."""

_PARTS = {
    "features": _features,
    "virtual": _virtual,
    **{f"scores.{each}": _scores for each in get_args(Format)},
}


def _whole(made: Provenance, command: str) -> Provenance:
    return replace(made, command=command, shard=None)


def _merge_features(
    paths: Sequence[Path], output: Path, command: str, count: int, force: bool, progress: Progress
) -> dict[str, Any]:
    unreadable = 0
    with open_cache(paths[0]) as cache:
        made = _whole(cache.provenance, command)
    with atomic(output, force=force) as unfinished, writing(unfinished) as new:
        writer = CacheWriter(new.file, made, count)
        for path in paths:
            with open_cache(path) as cache:
                for rows in cache.blocks():
                    readable = sum(error is None for error in rows.errors)
                    writer.append(rows if readable else replace(rows, features=None))
                    new.check()
                    unreadable += len(rows.errors) - readable
                    progress(len(rows.errors))
        _require_readable(count, unreadable)
    return {"unreadable": unreadable}


def _require_readable(rows: int, unreadable: int) -> None:
    if rows == unreadable:
        raise ImagesError(f"not one of {rows} images could be read: the shards say why")


def _merge_virtual(
    paths: Sequence[Path], output: Path, command: str, count: int, force: bool, progress: Progress
) -> dict[str, Any]:
    shown: list[tuple[Tensor, Tensor]] = []
    sheet_path = output.with_suffix(".png")
    with ExitStack() as stack:
        files = [stack.enter_context(open_virtual(path)) for path in paths]
        made = files[0].provenance
        unfinished = stack.enter_context(atomic(output, force=force))
        sheet = stack.enter_context(atomic(sheet_path, force=force))
        with writing(unfinished) as new:
            writer = VirtualWriter(new.file, _whole(made, command), count, files[0].settings)
            for file in files:
                for images, label, sensitivity in file.blocks():
                    writer.append(images, label, sensitivity)
                    new.check()
                    if sum(len(labels) for _, labels in shown) < SHOWN:
                        shown.append((images, label))
                    progress(len(label))
            try:
                quality = report([file.sums for file in files])
            except (LookupError, ValueError) as error:
                raise FileError(f"{paths[0]} and the others lack what quality is made of") from (
                    error
                )
            writer.finish(quality)
        images, label = (torch.cat(each)[:SHOWN] for each in zip(*shown, strict=True))
        pixels = made.preprocessing.to_pixels(images.float()).clamp(0, 1)
        contact_sheet(pixels, label, made.class_names, sheet)
    return {"unreadable": 0, "contact_sheet": str(sheet_path), **quality}


def _merge_scores(
    paths: Sequence[Path], output: Path, command: str, count: int, force: bool, progress: Progress
) -> dict[str, Any]:
    made = [read_made(path) or {} for path in paths]
    counts: dict[str, Any] = {
        name: sum(each.get(name, 0) for each in made) for name in ("unreadable", "infinite")
    }
    _require_readable(count, counts["unreadable"])
    for key in ("flagged", "unjudged"):
        counts[key] = {
            name: sum(each.get(key, {}).get(name, 0) for each in made)
            for name in made[0].get(key, {})
        }
    with atomic(output, force=force) as unfinished, ExitStack() as stack:
        paths_sha256 = join_scores(paths, unfinished, format_of(output))
        progress(count)
        beside = stack.enter_context(atomic(made_path(output), force=True))
        about = {
            **made[0],
            **counts,
            "rows": count,
            "command": command,
            "paths_sha256": paths_sha256,
        }
        write_made({**about, "shard": None}, unfinished, beside)
    # Every part lists all of the images, and with them the same files that are none.
    return {**counts, "left_out": made[0].get("left_out", {})}


_HDF5 = {"features": _merge_features, "virtual": _merge_virtual}
