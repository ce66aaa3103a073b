"""A detector of the user's own: FILE.py:CLASS on the command line, a class in Python."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass

import networks
import pytest
import torch
from commands import oodcli

from oodcli import Detector, Features, detectors, load_detector
from oodcli.detectors import serial
from oodcli.errors import DetectorError, FileError
from oodcli.files import artefact
from oodcli.files.artefact import read_artefact

HEAD = """\
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from oodcli import Detector, Features
"""

MARGIN = f"""{HEAD}
@dataclass(frozen=True)
class Margin(Detector):
    name = "margin"
    needs = frozenset({{"logits"}})

    power: float = 1.0

    def _score(self, test: Features) -> Tensor:
        first, second = test.logits.topk(2, dim=1).values.unbind(1)
        return -(first - second) ** self.power
"""

CENTRE = f"""{HEAD}
@dataclass(frozen=True)
class Centre(Detector):
    name = "centre"
    needs = frozenset({{"embedding"}})
    fitted = True

    mean: Tensor
    times: float
    parts: Mapping[str, Tensor]

    @classmethod
    def fit(cls, train, *, times: float = 1.0):
        blocks = [train] if isinstance(train, Features) else train
        rows = torch.cat([block.embedding for block in blocks]).double()
        return cls(rows.mean(0), times, {{"sd": rows.std(0) + 1}})

    def _score(self, test: Features) -> Tensor:
        apart = (test.embedding - self.mean) / self.parts["sd"]
        return self.times * apart.norm(dim=1)
"""


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    """As in a process that has just started."""
    monkeypatch.setattr(detectors, "loaded", {})


@pytest.fixture
def folder(fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, target in (("digits.pt", "ckpt.pt"), ("digits.toml", "ckpt.toml")):
        (tmp_path / target).write_bytes((fitted / name).read_bytes())
    (tmp_path / "v.features.h5").write_bytes((fitted / "v.features.h5").read_bytes())
    (tmp_path / "margin.py").write_text(MARGIN)
    (tmp_path / "centre.py").write_text(CENTRE)
    return tmp_path


NOISE = "noise:uniform?n=6"


def column(result, name):
    assert result.status == 0, result.err
    return [float(row[name]) for row in csv.DictReader(io.StringIO(result.out))]


def complaint(*words):
    result = oodcli(*words)
    assert result.status == 1, result.err
    assert result.out == ""  # not even the header of the CSV
    (found,) = [line for line in result.err.splitlines() if line.startswith("oodcli: ")]
    return found


# ---------------------------------------------------------------------------- the command line


def test_one_that_needs_no_fitting_is_scored(folder):
    own_ = oodcli("score", "ckpt.pt", NOISE, "-d", "margin.py:Margin", "-d", "energy")
    found = column(own_, "margin")
    assert len(set(found)) == 6
    assert max(found) < 0
    squared = ("-p", "margin.power=2")
    twice = column(oodcli("score", "ckpt.pt", NOISE, "-d", "margin.py:Margin", *squared), "margin")
    assert twice == pytest.approx([-(x**2) for x in found])
    everything = oodcli("score", "ckpt.pt", NOISE, "-d", "all", "-d", "margin.py:Margin")
    assert column(everything, "margin") == pytest.approx(found)
    names = list(csv.DictReader(io.StringIO(everything.out)).fieldnames)
    assert names[-2:] == ["margin", "error"]
    assert "msp" in names


def test_it_is_described(folder):
    """Also without a docstring, a source and meanings."""
    shown = " ".join(oodcli("detectors", "margin.py:Margin").out.split())
    assert (
        shown
        == "name margin needs logits fitted on nothing setting default meaning margin.power 1.0"
    )


def test_all_is_without_them(folder):
    oodcli("score", "ckpt.pt", NOISE, "-d", "margin.py:Margin")
    assert detectors.loaded
    assert "margin" not in oodcli("score", "ckpt.pt", NOISE, "-d", "all").out.splitlines()[0]
    assert "margin" not in oodcli("detectors", "--json").out


def test_one_that_is_fitted_is_saved_and_loaded(folder, monkeypatch):
    made = oodcli("fit", "v.features.h5", "-d", "centre.py:Centre", "-p", "centre.times=2")
    assert made.status == 0, made.err
    file = folder / "detectors" / "centre.safetensors"
    monkeypatch.setattr(detectors, "loaded", {})
    code, state = ("-d", "centre.py:Centre"), ("-d", "detectors/centre.safetensors")
    found = column(oodcli("score", "ckpt.pt", NOISE, *code, *state), "centre")
    assert column(oodcli("score", "ckpt.pt", NOISE, *state, *code), "centre") == found
    loaded = load_detector(file, code="centre.py:Centre")
    assert loaded.times == 2.0
    assert serial.state(loaded).keys() == {"mean", "parts/sd"}
    assert (
        oodcli("extract", "ckpt.pt", NOISE, "--for", "centre.py:Centre", "-o", "n.h5").status == 0
    )
    assert column(oodcli("score", "n.h5", *code, *state), "centre") == pytest.approx(found)
    again = ("fit", *code, *state, "--calibrate", "n.h5", "-o", "calibrated")
    assert oodcli(*again).status == 0
    calibrated = ("-d", "calibrated/centre.safetensors")
    verdicts = oodcli("score", "n.h5", *code, *calibrated, "--fpr", "0.5")
    assert sum(column(verdicts, "centre.ood")) in (2, 3)


def test_an_artefact_alone_runs_no_code(folder, monkeypatch):
    assert oodcli("fit", "v.features.h5", "-d", "centre.py:Centre").status == 0
    monkeypatch.setattr(detectors, "loaded", {})
    (folder / "centre.py").write_text("raise SystemExit('it was run')")
    state = "detectors/centre.safetensors"
    expected = (
        "oodcli: detectors/centre.safetensors holds a 'centre', which this oodcli does not have: "
        "if it is your own detector, give its code in the same command with -d FILE.py:CLASS"
    )
    assert complaint("score", "ckpt.pt", NOISE, "-d", state) == expected
    with pytest.raises(FileError, match="give its code in the same command"):
        read_artefact(folder / state)
    shown = json.loads(oodcli("inspect", state, "--json").out)
    assert shown["detector"] == "centre"
    checked = oodcli("inspect", "--verify", state)
    assert checked.status == 0
    assert "not checked: the code of 'centre' is not part of oodcli" in checked.out


def test_a_name_in_an_artefact_is_never_a_file(folder):
    assert oodcli("fit", "v.features.h5", "-d", "centre.py:Centre").status == 0
    path = folder / "detectors" / "centre.safetensors"
    made = read_artefact(path)
    (folder / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    object.__setattr__(made.detector, "name", "evil.py:Evil")
    artefact.write_artefact(made, path)
    assert "holds a 'evil.py:Evil', which this oodcli does not" in complaint(
        "score", "ckpt.pt", NOISE, "-d", path
    )
    assert not (folder / "ran").exists()


def test_one_that_must_be_fitted_says_how(folder):
    said = complaint("score", "ckpt.pt", NOISE, "-d", "centre.py:Centre")
    assert "'oodcli fit CACHE.h5 -d centre.py:Centre' writes centre.safetensors" in said
    assert said.endswith("give its path to -d with -d centre.py:Centre")


def test_what_was_not_recorded_is_said_with_the_file(folder):
    assert oodcli("extract", "ckpt.pt", NOISE, "--record", "logits", "-o", "z.h5").status == 0
    said = complaint("fit", "z.h5", "-d", "centre.py:Centre")
    assert said.startswith("oodcli: centre.py:Centre needs embedding")
    assert "--for centre.py:Centre" in said


def test_other_code_is_another_job(folder):
    """A job that was interrupted does not go on with code that has changed."""
    from oodcli.stages.chosen import choose_detectors, fingerprint

    def words():
        (chosen,) = choose_detectors(["margin.py:Margin"], {}, frozenset(), "")
        return fingerprint(chosen)

    first = words()
    assert first == words()
    (folder / "margin.py").write_text(MARGIN.replace("-(first", "-2 * (first"))
    assert words() != first
    assert words().startswith("power=1.0, code ")


def test_a_cluster_does_not_have_the_code(folder):
    said = complaint(
        *("score", "ckpt.pt", NOISE, "-d", "margin.py:Margin", "--engine", "ray", "-o", "s.csv")
    )
    assert said == (
        "oodcli: --engine ray: the cluster's hosts do not have the code of margin.py:Margin: leave "
        "out --engine or this detector"
    )


# ---------------------------------------------------------------------------- what is refused

BODY = """
@dataclass(frozen=True)
class Mine(Detector):
    name = "mine"
    needs = frozenset({"logits"})

    def _score(self, test: Features) -> Tensor:
        return -test.logits.amax(1)
"""


def changed(*pairs):
    text = BODY
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return HEAD + text


WITHOUT_SCORE = BODY.partition("\n    def")[0] + "\n"
FITTED = '    needs = frozenset({"logits"})', '    needs = frozenset({"logits"})\n    fitted = True'


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (None, r"mine.py:Mine: no file mine.py \(in .*/\)"),
        ("x = 1\n", "mine.py:Mine: mine.py has no class 'Mine'$"),
        (HEAD + "class Other: pass", "mine.py has no class 'Mine': it has Other$"),
        ("class Mine: pass", "mine.py:Mine is not a detector: derive it from oodcli.Detector"),
        (
            "x = 1\nimport nothing_like_it\n",
            "mine.py:Mine fails in line 2 with ModuleNotFoundError",
        ),
        ("x = 1\ndef f(:\n", "mine.py:Mine fails in line 2 with SyntaxError"),
        ("raise SystemExit(3)", "mine.py:Mine fails in line 1 with SystemExit: 3"),
        (HEAD + WITHOUT_SCORE, "mine.py:Mine: write its method _score"),
        (
            changed(("@dataclass(frozen=True)\n", "")),
            "write @dataclass.frozen=True. above class Mi",
        ),
        (changed(("frozen=True", "")), "write @dataclass.frozen=True. above class Mine"),
        (
            changed(("    def", "    k: torch.Tensr = None\n\n    def")),
            "'Tensr', in an annotation of",
        ),
        (changed(('"mine"', '"msp"')), "a built-in detector is called 'msp': choose another name"),
        (changed(('"mine"', '"my.own"')), "its name is 'my.own', expected letters"),
        (changed(('"mine"', '"error"')), "its name is 'error', expected .* none of all, path, lab"),
        (changed(('    name = "mine"\n', "")), "its name is None, expected letters"),
        (changed(('frozenset({"logits"})', '["logits"]')), "it does not declare what it needs"),
        (changed(('"logits"', '"logit"')), "it needs 'logit', which cannot be recorded: expected"),
        (
            changed(("    def", "    k: int\n\n    def")),
            "its field 'k' has no default: give it one",
        ),
        (
            changed(("    def", "    k: dict = None\n\n    def")),
            "its field 'k' cannot be stored: decl",
        ),
        (
            changed(("    def", "    k: Tensr = None\n\n    def")),
            "name 'Tensr' is not defined, in an",
        ),
        (changed(FITTED), "it is fitted, but has no fit"),
        (
            changed(("-test.logits.amax(1)", "test.logits")),
            "_score returned a tensor .6, 10. for 6",
        ),
        (
            changed(("-test.logits.amax(1)", "3.0")),
            "_score returned float for 6 rows, expected a te",
        ),
        (
            changed(("amax(1)", "amx(1)")),
            "mine.py:Mine fails in line 17 with AttributeError: .*amx",
        ),
    ],
)
def test_a_fault_is_one_sentence(folder, code, sentence):
    if code is not None:
        (folder / "mine.py").write_text(code)
    said = complaint("score", "ckpt.pt", NOISE, "-d", "mine.py:Mine")
    assert re.search(sentence, said), said


def test_a_class_must_be_named(folder):
    for word in ("margin.py", "margin.py:"):
        said = complaint("score", "ckpt.pt", NOISE, "-d", word)
        assert said == f"oodcli: {word}: name the class as well, as margin.py:CLASS"
    said = complaint("extract", "ckpt.pt", NOISE, "--for", "nowhere.py:Margin")
    assert "nowhere.py:Margin: no file nowhere.py" in said


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "rows.mean(0), times",
            "rows.mean(0).half(), times",
            "'mean' is of torch.float16, expected",
        ),
        (
            "rows.mean(0), times",
            "rows.mean(0), rows.mean()",
            "'times' is Tensor, declared as float",
        ),
        ("rows.mean(0), times", "3, times", "'mean' is int, declared as Tensor"),
        ('{"sd": rows.std(0) + 1}', '{"sd": 1}', "'parts' is dict, declared as .*Mapping"),
        ("return cls(", "cls(", "fit returned NoneType, expected a Centre"),
        ("torch.cat([", "torch.cat(3, [", "centre.py:Centre fails in line 24 with TypeError"),
    ],
)
def test_a_fault_of_a_fit_is_one_sentence(folder, old, new, sentence):
    assert old in CENTRE
    (folder / "centre.py").write_text(CENTRE.replace(old, new))
    said = complaint("fit", "v.features.h5", "-d", "centre.py:Centre")
    assert re.search(sentence, said), said
    assert not (folder / "detectors" / "centre.safetensors").exists()


def test_a_hyperparameter_has_the_type_of_its_default(folder):
    code = CENTRE.replace("*, times: float = 1.0", "*, times=1.0")
    (folder / "centre.py").write_text(code)
    words = ("fit", "v.features.h5", "-d", "centre.py:Centre", "-p")
    assert oodcli(*words, "centre.times=2").status == 0
    assert read_artefact(folder / "detectors" / "centre.safetensors").detector.times == 2.0
    assert "centre.times=warm: expected float" in complaint(*words, "centre.times=warm", "--force")
    (folder / "centre.py").write_text(CENTRE.replace("times: float = 1.0", "times: Flaot = 1.0"))
    assert "name 'Flaot' is not defined, in an annotation of its hyper" in complaint(
        *words, "a.b=1"
    )


def test_its_own_sentences_and_shortage_of_memory_pass(folder):
    limited = "        if len(test) > 2:\n            raise FAULT\n        return"
    code = "from oodcli import OodcliError\n" + CENTRE.removeprefix(
        "from __future__ import annotations"
    )
    code = code.replace("        apart =", limited.replace("return", "apart ="))
    fit = ("fit", "v.features.h5", "-d", "centre.py:Centre", "-o", "own", "--force")
    score = ("score", "ckpt.pt", NOISE, "-d", "centre.py:Centre", "-d", "own/centre.safetensors")
    assert oodcli(*fit).status == 0
    expected = column(oodcli(*score), "centre")
    (folder / "centre.py").write_text(code.replace("FAULT", "OodcliError('two rows at a time')"))
    assert complaint(*score) == "oodcli: two rows at a time"
    (folder / "centre.py").write_text(code.replace("FAULT", "RuntimeError('CUDA out of memory')"))
    assert column(oodcli(*score), "centre") == pytest.approx(expected)


def test_two_of_one_name_are_refused(folder):
    (folder / "other.py").write_text(MARGIN)
    said = complaint("score", "ckpt.pt", NOISE, "-d", "margin.py:Margin", "-d", "other.py:Margin")
    assert "other.py:Margin: margin.py:Margin is also called 'margin': choose another" in said
    said = complaint("score", "ckpt.pt", NOISE, *["-d", "margin.py:Margin"] * 2)
    assert "margin is given twice" in said


def test_it_may_import_its_neighbours(folder):
    (folder / "place").mkdir()
    (folder / "place" / "neighbour_of_mine.py").write_text("SIGN = -1\n")
    code = "from neighbour_of_mine import SIGN\n" + changed(("-test", "SIGN * test"))
    (folder / "place" / "mine.py").write_text(
        code.replace("from __future__ import annotations", "")
    )
    found = column(oodcli("score", "ckpt.pt", NOISE, "-d", "place/mine.py:Mine"), "mine")
    assert found == column(oodcli("score", "ckpt.pt", NOISE, "-d", "mls"), "mls")
    assert not list(folder.glob("place/__pycache__/mine*"))


# ---------------------------------------------------------------------------- from Python


@dataclass(frozen=True)
class Largest(Detector):
    name = "largest"
    needs = frozenset({"logits"})

    def _score(self, test: Features) -> torch.Tensor:
        return -test.logits.double().amax(1)


def test_a_class_is_a_detector_in_python(folder):
    rows = networks.recorded(5)
    expected = load_detector("mls").score(rows)
    assert torch.equal(load_detector(Largest).score(rows), expected)
    assert isinstance(load_detector("margin.py:Margin", power=2.0), Detector)
    assert load_detector("margin.py:Margin", power=2.0).power == 2.0
    path = folder / "largest.safetensors"
    artefact.write_artefact(artefact.Artefact(Largest(), "abc", {}), path)
    detectors.loaded.clear()
    with pytest.raises(FileError, match="holds a 'largest', which this oodcli does not have"):
        load_detector(path)
    assert isinstance(load_detector(path, code=Largest), Largest)
    with pytest.raises(DetectorError, match="test_own_detector:Wrong is not a detector"):
        load_detector(type("Wrong", (), {"__module__": "test_own_detector"}))
    assert load_detector(detectors.get("msp")) == detectors.get("msp")()


def test_a_file_that_was_edited_is_read_again(folder):
    first = load_detector("margin.py:Margin")
    assert type(load_detector("margin.py:Margin")) is type(first)
    rows = networks.recorded(5)
    (folder / "margin.py").write_text(MARGIN.replace("-(first", "-2 * (first"))
    again = load_detector("margin.py:Margin")
    torch.testing.assert_close(again.score(rows), 2 * first.score(rows))


def test_what_is_stored_is_what_artefacts_hold():
    assert set(serial.DTYPES) == set(artefact._DTYPES)
