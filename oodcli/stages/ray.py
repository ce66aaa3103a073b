"""Scores over a Ray cluster: images are read and decoded by its processors, the network runs on its
GPUs (or processors), and what they make comes back here, in any order, and is stored.

Ray Data moves, throttles and repeats the work; a piece that was lost with a host is made again
elsewhere, and what comes twice counts once.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch

from oodcli.errors import ImagesError, OodcliError, first_line
from oodcli.files.hub import card_path, companions, shipped_as
from oodcli.images import ImageSource, open_images
from oodcli.images.decoding import decode_rows
from oodcli.images.labels import unknown
from oodcli.images.pieces import Piece, chunks, labels_of
from oodcli.images.pixels import limit_pixels, most_pixels
from oodcli.images.reading import assembled, note_dim
from oodcli.images.source import Rows as Decoded
from oodcli.jobs.kept import Block, Stored
from oodcli.networks.card import Overrides
from oodcli.networks.classifier import Classifier
from oodcli.networks.load import load_classifier
from oodcli.networks.preprocessing import Preprocessing
from oodcli.recording.recorder import Recorder
from oodcli.stages.chosen import Chosen, layers_read, made_with, needs, placed
from oodcli.stages.record import Progress, Work, recorded_batch
from oodcli.stages.score import Scoring, stored_scores

PATIENCE = 30.0
"""Seconds that a lost or interrupted cluster is waited for at the end."""

PLACE = "place"
"""In the words of a batch: the piece, the number in it, and whether that is its last."""

DIM = "dim"
"""In the words of a batch: of images that are nearly black, as in ``Rows``."""


@dataclass(frozen=True)
class Network:
    """A classifier that can be loaded on another host: the files that it is made of, by name.
    overrides: whose card and code, if any, are among the files."""

    checkpoint: str
    files: Mapping[str, bytes]
    overrides: Overrides
    prefer_ema: bool
    trust_pickle: bool

    @classmethod
    def of(
        cls, path: Path, overrides: Overrides, *, prefer_ema: bool, trust_pickle: bool
    ) -> Network:
        """Raises OodcliError when a file cannot be read."""
        code, colon, factory = (overrides.arch or "").partition(".py:")
        card = overrides.card or card_path(path)
        paths = companions(path)
        if card.is_file():
            paths["card.toml"] = card
            overrides = replace(overrides, card=Path("card.toml"))
        if colon:
            paths["code.py"] = Path(f"{code}.py")
            overrides = replace(overrides, arch=f"code.py:{factory}")
        try:
            files = {name: each.read_bytes() for name, each in paths.items()}
        except OSError as error:
            raise OodcliError(f"{path} cannot be read: {error.strerror or error}") from error
        return cls(shipped_as(path), files, overrides, prefer_ema, trust_pickle)

    def load(self, device: str) -> Classifier:
        """The same network here."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file, data in self.files.items():
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_bytes(data)
            here = self.overrides
            if here.card is not None:
                here = replace(here, card=folder / here.card)
            if here.arch is not None and here.arch.startswith("code.py:"):
                here = replace(here, arch=f"{folder}/{here.arch}")
            return load_classifier(
                folder / self.checkpoint,
                here,
                device=device,
                prefer_ema=self.prefer_ema,
                trust_pickle=self.trust_pickle,
            )


@dataclass(frozen=True)
class Reading:
    """What decoding takes. images: as the user named them, in ``folder``. reading: number of that
    of the labels; None where they are unknown. table: classes of names, where only the cluster
    reads the images. most_pixels: of one image."""

    images: str
    folder: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    batch_size: int
    reading: int | None = 0
    table: Mapping[str, int] = field(default_factory=dict)
    most_pixels: int | None = field(default_factory=most_pixels)


@dataclass(frozen=True)
class Job:
    """What every host must know. mirror, precision: of recording. scoring: recorded rows → scores
    of the chosen detectors."""

    network: Network
    reading: Reading
    precision: str
    mirror: bool
    chosen: Sequence[Chosen]
    scoring: Scoring


# ------------------------------------------------------------------- what runs on the other hosts


@cache
def _source(
    images: str,
    preprocessing: Preprocessing,
    class_names: tuple[str, ...],
    reading: int | None,
) -> ImageSource:
    """Listed once in a process, and its labels read as the user's process has settled."""
    source = open_images(images, preprocessing, class_names)
    if source.known is not None and reading is None:
        source.read_as(unknown(len(source.known.values)))
    elif source.known is not None and reading:
        source.read_as(source.known.readings[reading])
    return source


class Decoder:
    """Pieces → decoded chunks; one that fails gives a fault instead, for the user to read."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        torch.set_num_threads(1)
        limit_pixels(self._reading.most_pixels)
        if os.path.isdir(self._reading.folder):  # else nothing that is relative to it is here
            os.chdir(self._reading.folder)
        for data in batch["piece"]:
            piece = cast(Piece, pickle.loads(data))
            number = 0
            try:
                waiting: tuple[list[str], Decoded] | None = None
                for found in self._decoded(piece):
                    if waiting is not None:
                        yield _payload(piece, number, False, *waiting)
                        number += 1
                    waiting = found
                paths, rows = waiting or ([], self._nothing())
                yield _payload(piece, number, True, paths, rows)
            except OodcliError as fault:
                yield {"data": [pickle.dumps(fault.text)], "fault": [True]}

    def _decoded(self, piece: Piece) -> Iterator[tuple[list[str], Decoded]]:
        job = self._reading
        if piece.kind != "rows":
            for chunk in chunks(piece, job.batch_size):
                labels = labels_of(chunk.labels, job.class_names, job.table)
                yield chunk.paths, decode_rows(labels, chunk.loads, job.preprocessing)
            return
        source = _source(job.images, job.preprocessing, job.class_names, job.reading)
        paths = source.paths(piece.start, piece.stop)
        if tuple(paths[:1] + paths[-1:]) != piece.names:
            raise ImagesError(
                f"{job.images} is not the same on all hosts: row {piece.start} is "
                f"{(paths or ['missing'])[0]} on one and {piece.names[0]} where the job began"
            )
        with source.reading() as fetch:
            for start in range(piece.start, piece.stop, job.batch_size):
                stop = min(start + job.batch_size, piece.stop)
                bounds = [*range(start, stop, source.grain), stop]
                parts = [fetch(*ends)(job.preprocessing) for ends in pairwise(bounds)]
                labels = torch.cat([part.labels for part in parts])
                errors = [error for part in parts for error in part.errors]
                pixels = torch.cat([part.pixels for part in parts])
                dim = tuple(value for part in parts for value in part.dim)
                yield source.paths(start, stop), Decoded(labels, errors, pixels, dim)

    def _nothing(self) -> Decoded:
        return decode_rows(torch.zeros(0, dtype=torch.int64), [], self._reading.preprocessing)


def _payload(
    piece: Piece, chunk: int, last: bool, paths: list[str], rows: Decoded
) -> dict[str, Any]:
    place = (piece.number, chunk, last)
    data = (place, paths, rows.labels.numpy(), rows.errors, rows.pixels.numpy(), rows.dim)
    return {"data": [pickle.dumps(data, pickle.HIGHEST_PROTOCOL)], "fault": [False]}


class Scorer:
    """Decoded chunks → batches of scores, with the network on this host's device."""

    def __init__(self, job: Job) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._job = job
        self._classifier = job.network.load(device)
        self._chosen = placed(job.chosen, device)
        self._recorder = Recorder(
            self._classifier,
            needs(job.chosen, mirror=job.mirror),
            made_with=made_with(each.detector for each in job.chosen),
            precision=job.precision,
            layers=layers_read(job.chosen),
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = [
            data if fault else self._scored(data)
            for data, fault in zip(batch["data"], batch["fault"], strict=True)
        ]
        return {"data": found, "fault": batch["fault"]}

    def _scored(self, data: bytes) -> bytes:
        place, paths, labels, errors, pixels, dim = pickle.loads(data)
        rows = Decoded(torch.from_numpy(labels), errors, torch.from_numpy(pixels))
        batch = assembled(paths, [rows], self._job.reading.preprocessing)
        block = self._job.scoring(recorded_batch(self._recorder, batch), self._chosen)
        stored = stored_scores(block)
        words = {**stored.words, PLACE: place, DIM: list(dim)}
        return pickle.dumps(stored._replace(words=words), pickle.HIGHEST_PROTOCOL)


BATCHES = 8
"""Of images that are listed already, in a piece."""


def pieces_of(source: ImageSource, batch_size: int) -> list[Piece]:
    """The rows of a source that every host can open."""
    size = BATCHES * batch_size
    found = []
    for number, start in enumerate(range(0, len(source), size)):
        stop = min(start + size, len(source))
        paths = source.paths(start, stop)
        found.append(Piece(number, "rows", source.name, start, stop, (paths[0], paths[-1])))
    return found


# ---------------------------------------------------------------------------- what runs at the user


@dataclass(frozen=True)
class ClusterWork(Work):
    """A job whose blocks a cluster makes. pieces: all of it. address: of the cluster; None for the
    one that RAY_ADDRESS names, or a new one of this host alone."""

    job: Job | None = None
    pieces: Sequence[Piece] = field(default_factory=tuple)
    address: str | None = None

    def rows(self, count: int, unit: int = 1) -> int:
        """How many rows are stored from before."""
        return 0 if self.kept is None else sum(map(self.kept.rows, self.kept.numbers))

    def blocks(
        self,
        count: int,
        unit: int,
        restore: Callable[[Stored], Block],
        store: Callable[[Block], Stored],
        make: Callable[[int, int], Iterable[Block]],
        progress: Progress,
    ) -> Iterator[Block] | None:
        """All blocks in order, once every piece is here. The pieces say what there is to make."""
        kept = self.kept
        assert kept is not None
        assert self.job is not None
        seen: dict[int, dict[int, bool]] = {}
        dim: list[float] = []

        def note(batch: Stored) -> tuple[int, int]:
            piece, number, last = batch.words[PLACE]
            seen.setdefault(piece, {})[number] = last
            dim.extend(batch.words.get(DIM, ()))
            return piece, number

        for number in kept.numbers:
            kept.read(number, note)
        left = [piece for piece in self.pieces if not _is_whole(seen.get(piece.number, {}))]
        if left:
            # What Ray still does for an interrupted job must end before the connection does.
            with _connected(self.address), closing(_made(self.job, left)) as made:
                for batch in made:
                    piece, number, _ = batch.words[PLACE]
                    if (piece, number) not in kept.numbers:  # else it came twice
                        kept.write(note(batch), batch)
                    progress(batch.rows)
        note_dim(dim)
        missing = [each.number for each in self.pieces if not _is_whole(seen.get(each.number, {}))]
        if missing:
            raise OodcliError(
                f"the cluster has lost {len(missing)} of {len(self.pieces)} pieces: re-run the "
                "same command, which resumes with those"
            )
        return (kept.read(number, restore) for number in sorted(kept.numbers))


def _is_whole(found: Mapping[int, bool]) -> bool:
    """found: chunk → whether it is the last of its piece."""
    last = next((number for number, is_last in found.items() if is_last), None)
    return last is not None and found.keys() >= set(range(last + 1))


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Raises OodcliError when there is no Ray, or no cluster."""
    try:
        import ray
    except ImportError:
        raise OodcliError("--engine ray needs Ray: pip install 'oodcli[ray]'") from None
    if ray.is_initialized():
        yield
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what becomes our error below
            ray.init(
                # Ray would also look for the last cluster of this host, dead or alive.
                address=address or os.environ.get("RAY_ADDRESS") or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={
                    "env_vars": {
                        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
                    }
                },
            )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = first_line(error)
        raise OodcliError(
            f"the Ray cluster is out of reach: {reason} (where it asks for a token, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)"
        ) from error
    try:
        with redirect_stdout(sys.stderr):  # where Ray tells of what was lost
            yield
    finally:
        _let_end(PATIENCE)
        ray.shutdown()


def _let_end(seconds: float) -> None:
    """Waits for threads of Ray Data that were told to end, for which it waits two seconds alone:
    one that asks Ray for something after its end takes the whole process along."""
    until = time.monotonic() + seconds
    for thread in threading.enumerate():
        if type(thread).__name__ == "StreamingExecutor" or thread.name == "iter_threaded":
            thread.join(max(0.0, until - time.monotonic()))


def _made(job: Job, pieces: Sequence[Piece]) -> Generator[Stored, None, None]:
    """Batches of pieces, as they come. Raises ImagesError for a piece that cannot be read at all,
    OodcliError when the cluster gives up."""
    import ray
    from ray.exceptions import RayError

    rows = _relayed(job, pieces) if ray.util.client.ray.is_connected() else _rows(job, pieces)
    try:
        with closing(rows):
            for row in rows:
                found = pickle.loads(row["data"])
                if row["fault"]:
                    raise ImagesError(found)
                yield found
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        lines = str(cause).strip().splitlines() or [type(error).__name__]
        raise OodcliError(
            f"the cluster has given up: {lines[-1]}; re-run the same command to resume"
        ) from error


def _rows(job: Job, pieces: Sequence[Piece]) -> Generator[dict[str, Any], None, None]:
    """What the pipeline makes of pieces: ``data``, a pickled record, or words of a ``fault``."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, from_items

    context = DataContext.get_current()
    context.enable_progress_bars = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    resources = ray.cluster_resources()
    gpus, processors = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    # Where there is no GPU, a network takes a small share of a processor in Ray's books: were it a
    # whole one, those that are left when a host is lost could all be taken by networks, which
    # would then wait for ever for images that nobody decodes.
    each = {"num_gpus": 1} if gpus else {"num_cpus": 0.1}
    most = gpus or max(1, processors // 2)
    reading, shared = ray.put(job.reading), ray.put(job)
    items = [{"piece": pickle.dumps(piece)} for piece in pieces]
    dataset = (
        from_items(items, override_num_blocks=len(items))
        .map_batches(_decode, fn_args=(reading,), batch_size=1, num_cpus=1)
        .map_batches(
            _RemoteScorer,
            fn_constructor_args=(shared,),
            batch_size=1,
            compute=ActorPoolStrategy(min_size=1, max_size=most),
            **each,
        )
    )
    yield from dataset.iter_rows()


def _relayed(job: Job, pieces: Sequence[Piece]) -> Generator[dict[str, Any], None, None]:
    """The same over a ray:// address, through which Ray Data cannot be driven: it is driven by an
    actor in the cluster, which is asked for one row after the other, and for the next one while
    the last is worked on."""
    import ray

    relay = ray.remote(_Relay).options(num_cpus=0).remote(job, pieces)
    coming = relay.next.remote()
    while (row := ray.get(coming)) is not None:
        coming = relay.next.remote()
        yield row


class _Relay:
    def __init__(self, job: Job, pieces: Sequence[Piece]) -> None:
        self._rows = _rows(job, pieces)

    def next(self) -> dict[str, Any] | None:
        return next(self._rows, None)


@cache
def _decoder(reference: Any) -> Decoder:
    """One in a process."""
    import ray

    return Decoder(ray.get(reference))


def _decode(batch: dict[str, Any], reference: Any) -> Iterator[dict[str, Any]]:
    return _decoder(reference)(batch)


class _RemoteScorer(Scorer):
    def __init__(self, reference: Any) -> None:
        import ray

        super().__init__(ray.get(reference))
