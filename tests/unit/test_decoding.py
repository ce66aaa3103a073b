"""Decoding in processes: the rows of threads, whatever an image does to its decoder."""

import io
import math
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import oodcli
from PIL import Image

from oodcli.errors import ImagesError
from oodcli.images import ImageSource, batches, decoding, open_images
from oodcli.images.decoding import Encoded
from oodcli.images.pixels import Fitted, load_bytes
from oodcli.images.worker import Fault, read_answer, write_answer
from oodcli.networks.preprocessing import Preprocessing

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such processes there")

PLAIN = Preprocessing((8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CROPPED = Preprocessing((8, 6), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), resize=9)
GREY = Preprocessing((8, 8), (0.5,), (0.5,), interpolation="bicubic")
LONG = 300.0
"""Seconds; no test waits for them."""

# In a module of its own, as processes import it: this one imports torch.
LOADS = """
import ctypes, os, signal, sys, time
from pathlib import Path
from oodcli.images.pixels import load_bytes

def pipe(path):
    open(path, "rb")

def lock():
    ctypes.PyDLL(None).sleep(1000)  # unlike CDLL it keeps the interpreter's lock

def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)

def crash():
    os.kill(os.getpid(), signal.SIGSEGV)

def leave():
    os._exit(3)

def note(path):
    Path(path + ".new").write_text(str(os.getpid()))
    os.rename(path + ".new", path)

def once(path, content):
    if not os.path.exists(path):
        note(path)
        time.sleep(1000)
    return load_bytes(content)

def crash_once(path, content):
    if not os.path.exists(path):
        note(path)
        crash()
    return load_bytes(content)

def talk(content):
    print("to", "sys.stdout", flush=True)
    print("to sys.stderr", file=sys.stderr, flush=True)
    os.write(1, b"to stdout")
    os.write(2, b"to stderr")
    return load_bytes(content)

def hang(path):
    note(path)
    lock()

def fault():
    raise AttributeError("a fault in the program")
"""


def png(seed, size=(8, 8)):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def loads(tmp_path, monkeypatch):
    """The module LOADS."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "hostile_loads.py").write_text(LOADS)
    monkeypatch.syspath_prepend(folder)
    yield import_module("hostile_loads")
    del sys.modules["hostile_loads"]


class Given(ImageSource):
    """Loads, one a row."""

    name = "given"

    def __init__(self, loads, grain=1):
        self.loads = loads
        self.grain = grain
        self.fetched = 0

    def __len__(self):
        return len(self.loads)

    def paths(self, start, stop):
        return [str(row) for row in range(start, stop)]

    @contextmanager
    def reading(self):
        def fetch(start, stop):
            self.fetched = stop
            return Encoded(torch.arange(start, stop), self.loads[start:stop])

        yield fetch


def good(seed):
    return partial(load_bytes, png(seed))


def assert_rows(found, seeds, errors):
    """seeds: of the readable rows' images. errors: of all rows."""
    assert [error for batch in found for error in batch.errors] == errors
    assert torch.cat([batch.labels for batch in found]).tolist() == list(range(len(errors)))
    expected = list(batches(Given([good(seed) for seed in seeds]), PLAIN, 100))
    assert torch.equal(torch.cat([batch.images for batch in found]), expected[0].images)


@pytest.fixture
def started(monkeypatch):
    """The processes that were started. All have ended at the end, and so have the threads."""
    found = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            found.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    yield found
    assert [process.returncode for process in found if process.returncode is None] == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("oodcli")]


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(params=["folder", "list", "zip", "tar", "tar.gz"])
def spec(request, tmp_path):
    """Twenty images of several sizes in two classes, some of them unreadable."""
    root = tmp_path / "images"
    for row in range(20):
        path = root / ("cat", "dog")[row // 10] / f"{row:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = png(row, (8 + row, 8 + row % 5))
        path.write_bytes({3: b"", 7: b"no image", 12: content[:-60]}.get(row, content))
    if request.param == "folder":
        return root
    path = tmp_path / f"images.{request.param}"
    files = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*.png"))}
    if request.param == "list":
        path = path.with_suffix(".txt")
        names = [f"images/{name}\t{name[:3]}" for name in [*files, "cat/missing.png"]]
        path.write_text("\n".join(names))
    elif request.param == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, file in files.items():
                archive.write(file, name)
        content = bytearray(path.read_bytes())
        content[content.index(b"cat/05.png") + 60] ^= 255  # its checksum no longer fits
        path.write_bytes(content)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for name, file in files.items():
                archive.add(file, name)
            link = tarfile.TarInfo("dog/99.png")
            link.type, link.linkname = tarfile.SYMTYPE, "nowhere"
            archive.addfile(link)
    return path


@pytest.mark.parametrize(
    ("preprocessing", "batch_size", "workers", "start"),
    [(PLAIN, 3, 2, 0), (CROPPED, 7, 3, 5), (GREY, 100, 1, 0)],
)
def test_rows_are_those_of_threads(spec, started, preprocessing, batch_size, workers, start):
    source = open_images(str(spec), preprocessing, ("cat", "dog"))
    expected = list(batches(source, preprocessing, batch_size, workers, start=start))
    assert not started
    found = list(batches(source, preprocessing, batch_size, workers, start=start, timeout=LONG))
    assert 1 <= len(started) <= workers
    assert [batch.paths for batch in found] == [batch.paths for batch in expected]
    assert [batch.errors for batch in found] == [batch.errors for batch in expected]
    errors = [error for batch in found for error in batch.errors if error]
    assert len(errors) >= (2 if start else 3)
    for batch, threads in zip(found, expected, strict=True):
        assert torch.equal(batch.labels, threads.labels)
        assert torch.equal(batch.images, threads.images)
        assert batch.images.stride() == threads.images.stride()


def test_arrays_stay_in_threads(tmp_path, started):
    np.savez(tmp_path / "x.npz", images=np.zeros((5, 9, 9, 3), np.uint8))
    for name in (str(tmp_path / "x.npz"), "noise:uniform?n=5"):
        found = list(batches(open_images(name, PLAIN, ("a",)), PLAIN, 2, timeout=LONG))
        assert sum(len(batch.images) for batch in found) == 5
    assert not started


def test_limits_of_the_program_hold_in_processes(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(png(1, (8, 8)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    source = open_images(str(tmp_path), PLAIN, ("a",))
    errors = [next(batches(source, PLAIN, 1, timeout=limit)).errors for limit in (None, LONG)]
    assert errors[0] == errors[1]
    assert "bomb" in errors[0][0]


@pytest.mark.slow
def test_images_that_hang(tmp_path, loads, started):
    os.mkfifo(tmp_path / "pipe")
    hanging = [partial(loads.pipe, str(tmp_path / "pipe")), loads.lock, loads.stopped]
    rows = [good(0), hanging[0], good(2), hanging[1], good(4), hanging[2], good(6), good(7)]
    found = list(batches(Given(rows, grain=2), PLAIN, 3, workers=2, timeout=4))
    late = "took longer than 4 s"
    assert_rows(found, (0, 2, 4, 6, 7), [None, late, None, late, None, late, None, None])
    assert len(started) <= 2 + 3  # not tried again


def test_images_that_kill_their_decoder(loads, started):
    rows = [good(0), loads.crash, good(2), loads.leave, good(4), good(5)]
    found = list(batches(Given(rows), PLAIN, 2, workers=2, timeout=LONG))
    died = "its decoder crashed ({})".format
    errors = [None, died("signal 11"), None, died("exit status 3"), None, None]
    assert_rows(found, (0, 2, 4, 5), errors)


def test_an_image_whose_decoder_was_killed_from_outside_is_read(tmp_path, loads, started):
    pid = tmp_path / "pid"

    def kill():
        until(pid.exists)
        os.kill(int(pid.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    rows = [good(0), partial(loads.once, str(pid), png(1)), good(2), good(3)]
    found = list(batches(Given(rows), PLAIN, 2, workers=2, timeout=LONG))
    killer.join()
    assert_rows(found, range(4), [None] * 4)
    assert -signal.SIGKILL in [process.returncode for process in started]


def test_processes_killed_between_two_images_are_replaced(tmp_path, loads, started):
    rows = [good(seed) for seed in range(30)]
    rows[3] = partial(loads.crash_once, str(tmp_path / "pid"), png(3))  # has two tries all the same
    stream = batches(Given(rows), PLAIN, 1, workers=1, timeout=LONG)
    found = [next(stream)]
    time.sleep(0.5)  # read ahead as far as it goes: two batches
    started[0].send_signal(signal.SIGKILL)
    started[0].wait()
    found.extend(stream)
    assert_rows(found, range(30), [None] * 30)
    assert len(started) == 3


def test_processes_ignore_ctrl_c(started):
    rows = [good(seed) for seed in range(60)]
    stream = batches(Given(rows), PLAIN, 5, workers=1, timeout=LONG)
    found = [next(stream)]
    for _ in range(3):
        started[0].send_signal(signal.SIGINT)
        found.append(next(stream))
    found.extend(stream)
    assert_rows(found, range(60), [None] * 60)
    assert len(started) == 1


def test_closing_does_not_wait_for_images(tmp_path, loads, started):
    pid = tmp_path / "pid"
    rows = [good(0), good(1), partial(loads.hang, str(pid)), *map(good, range(50))]
    stream = batches(Given(rows), PLAIN, 1, workers=2, timeout=LONG)
    next(stream)
    until(pid.exists)
    begun = time.monotonic()
    stream.close()
    assert time.monotonic() - begun < LONG / 4
    assert int(pid.read_text()) in [process.pid for process in started]


def test_faults_of_the_consumer_and_of_the_program_end_processes(loads, started):
    stream = batches(Given([good(0), good(1)]), PLAIN, 1, timeout=LONG)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    with pytest.raises(RuntimeError, match="AttributeError: a fault in the program"):
        list(batches(Given([good(0), loads.fault]), PLAIN, 1, timeout=LONG))
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        list(batches(Given([lambda: None]), PLAIN, 1, timeout=LONG))
    assert started


def test_what_the_processes_cannot_import_is_a_fault(loads, monkeypatch):
    path = [folder for folder in sys.path if not folder.endswith("modules")]
    monkeypatch.setattr(sys, "path", path)
    with pytest.raises(RuntimeError, match="No module named 'hostile_loads'"):
        list(batches(Given([loads.crash]), PLAIN, 1, timeout=LONG))


def test_nothing_is_written(loads, capfd):
    found = list(batches(Given([partial(loads.talk, png(0))]), PLAIN, 1, timeout=LONG))
    assert_rows(found, [0], [None])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("command", "seconds", "reason"),
    [
        (("-c", "import no_such_module"), 60, "No module named 'no_such_module'"),
        (("-c", "import os; os._exit(7)"), 60, "exit status 7"),
        (("-c", "import time; time.sleep(1000)"), 1, "it takes longer than 1 s"),
    ],
)
def test_processes_that_do_not_start(monkeypatch, started, capfd, command, seconds, reason):
    monkeypatch.setattr(decoding, "COMMAND", command)
    monkeypatch.setattr(decoding, "SECONDS_TO_START", seconds)
    with pytest.raises(ImagesError, match="cannot be started") as caught:
        list(batches(Given([good(0), good(1)]), PLAIN, 1, workers=1, timeout=LONG))
    assert reason in str(caught.value)
    assert 3 <= len(started) <= 6
    assert capfd.readouterr() == ("", "")


def test_no_interpreter_to_start(tmp_path, monkeypatch, started):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ImagesError, match=r"cannot be started \(No such file or directory\)"):
        list(batches(Given([good(0)]), PLAIN, 1, timeout=LONG))
    assert not started


@pytest.mark.parametrize("timeout", [0, -1, math.inf, math.nan, 1e6])
def test_wrong_timeouts(timeout):
    with pytest.raises(ValueError, match="timeout="):
        list(batches(Given([good(0)]), PLAIN, 1, timeout=timeout))


def test_reading_ahead_is_bounded():
    source = Given([good(seed % 7) for seed in range(500)])
    stream = batches(source, PLAIN, 4, workers=3, timeout=LONG)
    next(stream)
    until(lambda: source.fetched == 12)
    time.sleep(0.5)
    assert source.fetched == 12  # the batch in hand, and two ahead
    stream.close()


def test_processes_do_without_torch(spec):
    """Importing it would take each of them seconds, and hundreds of megabytes."""
    source = open_images(str(spec), PLAIN, ("cat", "dog"))
    with source.reading() as fetch:
        sent = pickle.dumps(list(fetch(0, len(source)).loads))
    code = (
        "import pickle, sys, oodcli.images.worker; pickle.load(sys.stdin.buffer); "
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    modules = done.stdout.decode().split()
    assert "oodcli.images.pixels" in modules
    assert not {"torch", "h5py", "scipy", "typer"} & set(modules)


# A script without `if __name__ == "__main__"`, that imports this module for what it needs.
SCRIPT = """
import sys
from functools import partial

print("once", flush=True)
sys.path[:0] = {folders!r}
import hostile_loads
from oodcli.images import batches, decoding
from test_decoding import PLAIN, Given, good

decoding.GRACE = 5 - 1000  # a process ends five seconds after it was given an image
rows = [good(0), good(1), partial(hostile_loads.hang, {pid!r}), *map(good, range(50))]
for batch in batches(Given(rows), PLAIN, 1, workers=3, timeout=1000):
    pass
"""


def state_and_parent(pid):
    """Of a process; None of one that there is no more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent = stat.rpartition(")")[2].split()[:2]
    return state, int(parent)


def children_of(pid):
    every = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]
    return [child for child in every if (state_and_parent(child) or ("", 0))[1] == pid]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_no_process_outlives_the_program(tmp_path, loads, number):
    pid = tmp_path / "pid"
    script = tmp_path / "script.py"
    here = Path(__file__).parent
    folders = [str(folder) for folder in (*here.parents[:2], here, tmp_path / "modules")]
    script.write_text(SCRIPT.format(pid=str(pid), folders=folders))
    program = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: (pid.exists() and pid.read_text()) or program.poll() is not None)
    decoder = int(pid.read_text())  # on a busy machine another one may follow it
    children = children_of(program.pid)
    os.killpg(program.pid, number)  # as Ctrl-C does
    said, complained = program.communicate(timeout=60)
    assert decoder in children
    assert said == "once\n"
    if number == signal.SIGINT:
        assert complained.count("Traceback") == 1
        assert complained.rstrip().endswith("KeyboardInterrupt")
    else:
        assert complained == ""
    # Of one that nobody waits for, the entry stays.
    until(lambda: all((state_and_parent(child) or "Z")[0] in "ZX" for child in children))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", ""),
        (b"P" + bytes(10), ""),
        (b"T" + bytes([255] * 20), "an answer b'T' of"),
        (struct.pack("<cIIId", b"P", 1 << 20, 1 << 20, 3, 0), "an answer b'P' of"),
        (pickle.dumps([1]) + bytes(20), "an answer"),
    ],
)
def test_nonsense_for_an_answer(answer, words):
    """Of a process that an image has taken over: nothing is run, no memory is taken for it."""
    with pytest.raises(ValueError if words else EOFError, match=words or None):
        read_answer(io.BytesIO(answer), 1 << 20)


def test_answers_arrive_as_they_were_given():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for answer in (
        Fitted(pixels, None),
        Fitted(pixels[:, ::2], 2048.0),
        "it is ä bad image",
        "",
        Fault("a\ntraceback"),
    ):
        stream = io.BytesIO()
        write_answer(stream, answer)
        stream.seek(0)
        found = read_answer(stream, 1000)
        assert type(found) is type(answer)
        if isinstance(answer, Fitted):
            assert np.array_equal(found.pixels, answer.pixels)
            assert found.dim == answer.dim
        else:
            assert found == answer
        assert stream.read() == b""


@pytest.mark.parametrize("dim", [math.inf, math.nan, -1.0, 0.0, 4095.5, 65535.0])
def test_an_answer_that_claims_nonsense_of_its_values(dim):
    answer = struct.pack("<cIIId", b"P", 1, 1, 1, dim) + b"x"
    assert read_answer(io.BytesIO(answer), 1000).dim is None


def test_the_option(trained, tmp_path):
    """Scores are the same with processes and without; seconds that make no sense are refused."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(generator.integers(0, 256, (9, 8)).astype(np.uint8)).save(
            folder / f"{number}.png"
        )
    (folder / "3.png").write_bytes(b"no image")
    command = ("score", trained / "digits.pt", folder, "-d", "msp")
    expected = oodcli(*command)
    assert expected.status == 3
    found = oodcli(*command, "--timeout-per-image", 60)
    assert (found.status, found.out) == (3, expected.out)
    for seconds in ("0", "nan", "1e9", "-1"):
        assert oodcli(*command, "--timeout-per-image", seconds).status == 2
