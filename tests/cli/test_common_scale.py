"""c2ir-peak, duo and trio: their formula, what they are fitted on, and when score takes them by
itself."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import networks
import numpy as np
import pytest
import torch
from commands import fails, oodcli
from naive import NAIVE, Fit, c2ir_peak, standardised_deviations
from safetensors.torch import load_file, save_file

from oodcli import detectors
from oodcli.detectors import serial
from oodcli.detectors.c2ir_peak import FLOOR, C2IRPeak, LogDeviation, LogEnergy
from oodcli.detectors.c2ir_z import C2IRZ
from oodcli.detectors.common_scale import median_and_spread, on_common_scale
from oodcli.detectors.duo import Duo
from oodcli.detectors.nci import NCI
from oodcli.detectors.one_class_sum import OneClassSum
from oodcli.detectors.peak import Peak
from oodcli.detectors.peak_energy import PeakEnergy
from oodcli.detectors.trio import Trio
from oodcli.errors import DetectorError, FileError
from oodcli.features import Features, Layer
from oodcli.files.artefact import Artefact, read_artefact, write_artefact
from oodcli.files.cache import open_cache
from oodcli.recording.recorder import Recorder, recordable
from oodcli.recording.reduced import peaks
from oodcli.stages.default_detector import default_detector

# ---------------------------------------------------------------------------- the formula


@pytest.fixture(scope="module")
def rows():
    """A function from a count and a seed to what was recorded of as many images, with peaks as of a
    last map of many positions."""
    network = networks.classifier(networks.Residual(classes=3))
    recorder = Recorder(network, recordable(network))

    def recorded(count, seed):
        return with_peaks(recorder(networks.images(count, seed), torch.arange(count) % 3), 10)

    return recorded


@pytest.fixture(scope="module")
def three(rows):
    """Rows to fit on, of noise and of the pool."""
    return {"train": rows(24, 1), "noise": with_peaks(rows(30, 2), 0.5), "pool": rows(41, 3)}


def with_peaks(rows, times):
    """The same rows with peaks so many times as high."""
    return rows.map_rows(
        lambda name, tensor: times * tensor if name.endswith("/peak") else tensor, len(rows)
    )


@pytest.fixture(scope="module")
def test(rows):
    return rows(9, 4)


KINDS = (C2IRPeak, Duo, Trio)


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_against_a_naive_one(three, test, kind):
    expected = torch.from_numpy(NAIVE[kind.name](test, Fit(**three)))
    torch.testing.assert_close(kind.fit(**three).score(test), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("times", [0.5, 2])
def test_units_of_nci_against_the_naive_formula(three, test, times):
    """With peaks of the noise below and above those of the pool."""
    given = {**three, "noise": with_peaks(three["noise"], times * 2)}
    without, two = (C2IRPeak.fit(**given, nci=units).score(test) for units in (0, 2))
    for units, found in ((0, without), (2, two)):
        expected = torch.from_numpy(c2ir_peak(test, Fit(**given), units))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    near = NCI.fit(three["train"])
    assert torch.equal((two - without).argsort(), near.score(test).argsort())


def test_units_of_nci_out_of_range_are_refused(three):
    with pytest.raises(DetectorError, match="nci=-1 must be"):
        C2IRPeak.fit(**three, nci=-1)


def test_the_floor_is_in_the_unit_of_the_deviations(three, test):
    """In the sum of c2ir-peak a factor would cancel."""
    found = LogDeviation(C2IRZ.fit(three["train"])).score(test)
    expected = np.log(standardised_deviations(test, three["train"])).mean(1)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_a_dead_layer_changes_nothing(three, test):
    """Nothing of it deviates, so its logarithm has a floor."""
    deviation = C2IRZ.fit(three["train"])
    name = deviation.layers[1]
    dead = replace(test.layers[name], mean=torch.zeros_like(test.layers[name].mean))
    centre = {**deviation.centre, name: torch.zeros_like(deviation.centre[name])}
    rows = replace(test, layers={**test.layers, name: dead})
    _, terms = LogDeviation(replace(deviation, centre=centre)).contributions(rows)
    _, usual = LogDeviation(deviation).contributions(test)
    assert torch.equal(terms[:, [0, 2]], usual[:, [0, 2]])
    assert terms[:, 1].tolist() == [np.log(FLOOR) / len(deviation.layers)] * 9


@pytest.mark.parametrize(("times", "counts"), [(0.9, True), (1.0, False), (1.1, False)])
def test_peak_counts_where_noise_has_the_lower_peaks(three, test, caplog, times, counts):
    caplog.set_level("INFO")
    made = C2IRPeak.fit(**{**three, "noise": with_peaks(three["pool"], times)})
    assert made.with_peak is counts
    assert ("peak is left out: noise has higher peaks" in caplog.text) is not counts
    peak = ["peak"] if counts else []
    assert [part.name for part in made.parts] == ["energy", "c2ir-z", *peak, "nci"]
    layers = {name: replace(layer, peak=None) for name, layer in test.layers.items()}
    without = replace(test, layers=layers)
    if counts:
        with pytest.raises(DetectorError, match=r"c2ir-peak needs layers\.peak"):
            made.score(without)
    else:
        rows = torch.stack([part.score(without) for part in made.parts], 1)
        expected = ((rows - made.median) / made.spread).sum(1)
        torch.testing.assert_close(made.score(without), expected, rtol=1e-12, atol=1e-12)
        assert len(made.contributions(without)[0]) == len(made.deviation.layers) + 2


@pytest.mark.parametrize(("positions", "counts"), [(4, False), (6, True)])
def test_peak_counts_where_the_last_map_has_many_positions(three, test, caplog, positions, counts):
    """A last map with one active position, seen as its mean and its peak."""
    caplog.set_level("INFO")

    def of_map(rows):
        name, layer = next((n, each) for n, each in rows.layers.items() if each.peak is not None)
        layer = replace(layer, mean=layer.peak / positions)
        return replace(rows, layers={**rows.layers, name: layer})

    given = {name: of_map(rows) for name, rows in three.items()}
    made = C2IRPeak.fit(**given)
    assert made.with_peak is counts
    said = "c2ir-peak: peak is left out: the last map has at most 4 positions" in caplog.text
    assert said is not counts
    expected = torch.from_numpy(c2ir_peak(of_map(test), Fit(**given)))
    torch.testing.assert_close(made.score(of_map(test)), expected, rtol=1e-8, atol=1e-8)


def test_two_that_contradict_each_other_are_refused(three, monkeypatch):
    monkeypatch.setattr(LogDeviation, "_score", lambda self, block: -LogEnergy()._score(block))
    with pytest.raises(DetectorError, match="contradict each other on the 41 rows of the pool"):
        C2IRPeak.fit(**three)


def test_noise_without_a_row_is_refused(three):
    with pytest.raises(DetectorError, match="c2ir-peak: no rows to fit on"):
        C2IRPeak.fit(**{**three, "noise": []})


def test_pieces_by_hand():
    scores = torch.tensor([[4.0, 0.0], [1.0, 30.0], [3.0, 10.0], [2.0, 20.0]]).double()
    median, spread = median_and_spread(scores)
    assert median.tolist() == [2.5, 15.0]
    assert spread.tolist() == [1.5, 15.0]  # 3.25 − 1.75, 22.5 − 7.5
    assert on_common_scale(scores, median, spread)[0].tolist() == [1.0, -1.0]
    assert [each.tolist() for each in median_and_spread(scores[:1])] == [[4.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_quantiles_are_those_of_numpy(count):
    scores = torch.randn(count, 3, generator=torch.Generator().manual_seed(count)).double()
    median, spread = median_and_spread(scores)
    low, middle, high = np.percentile(scores.numpy(), [25, 50, 75], axis=0)
    np.testing.assert_allclose(median, middle, rtol=1e-12)
    np.testing.assert_allclose(spread, high - low, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("part", [C2IRZ, OneClassSum])
def test_the_scale_of_a_part_does_not_matter(three, test, part, monkeypatch):
    before = Duo.fit(**three).score(test)
    score = part._score
    monkeypatch.setattr(part, "_score", lambda self, block: 1000 * score(self, block) - 77)
    torch.testing.assert_close(Duo.fit(**three).score(test), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_whole(three, test, kind):
    """Of each of the three, cut in its own way."""
    blocks = {
        name: [rows.select(slice(start, start + size)) for start in range(0, len(rows), size)]
        for size, (name, rows) in zip((5, 7, 11), three.items(), strict=True)
    }
    whole = kind.fit(**three).score(test)
    torch.testing.assert_close(kind.fit(**blocks).score(test), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "more"), [(C2IRPeak, 2), (Duo, 14), (Trio, 15)])
def test_a_score_is_its_contributions_and_a_constant(three, test, kind, more):
    duo = kind.fit(**three)
    names, terms = duo.contributions(test)
    assert len(names) == terms.shape[1] == len(duo.deviation.layers) + 1 + more
    rest = duo.score(test) - terms.sum(1)
    torch.testing.assert_close(rest, rest[:1].expand(9), rtol=1e-9, atol=1e-9)
    # Each is counted from what is usual on the pool.
    usual = duo.contributions(three["pool"])[1].quantile(0.5, 0)
    torch.testing.assert_close(usual, torch.zeros_like(usual), rtol=0, atol=1e-9)


def test_a_pool_without_spread_is_refused(three):
    pool = three["pool"]
    sentence = "duo: c2ir-z gives half of the {} rows of the pool or more the same score, so"
    with pytest.raises(DetectorError, match=sentence.format(1)):
        Duo.fit(**{**three, "pool": pool.select(slice(0, 1))})
    same = pool.select(torch.tensor([5] * 30 + list(range(4))))
    with pytest.raises(DetectorError, match=sentence.format(34)):
        Duo.fit(**{**three, "pool": same})
    # A few that are alike leave a scale.
    Duo.fit(**{**three, "pool": pool.select(torch.tensor([5] * 10 + list(range(41))))})
    with pytest.raises(DetectorError, match="duo: no rows to fit on"):
        Duo.fit(**{**three, "pool": []})


def test_rows_of_the_pool_that_are_not_finite_do_not_count(three, test, monkeypatch):
    pool = three["pool"]
    spoilt = pool.map_rows(lambda name, rows: rows.clone(), len(pool))
    spoilt.logits[3:5] = torch.nan
    kept = torch.tensor([row for row in range(41) if row not in (3, 4)])
    found = Duo.fit(**{**three, "pool": spoilt}).score(test)
    expected = Duo.fit(**{**three, "pool": pool.select(kept)}).score(test)
    assert torch.equal(found, expected)
    monkeypatch.setattr(C2IRZ, "_score", lambda self, block: torch.full((len(block),), torch.inf))
    with pytest.raises(DetectorError, match="no row of the pool has finite scores"):
        Duo.fit(**three)


def test_peaks_by_hand():
    activation = torch.tensor([[[[1.0, 3.0], [-2.0, 0.5]], [[-1.0, -3.0], [-2.0, -4.0]]]])
    assert peaks(activation).tolist() == [[3.0, 0.0]]
    assert torch.equal(peaks(activation.movedim(1, -1), -1), peaks(activation))
    layers = {
        "a": Layer("block", mean=torch.zeros(1, 3)),
        "b": Layer("stage", peak=torch.tensor([[3.0, 4.0]])),
    }
    assert Peak().score(Features(1, layers=layers)).tolist() == [-5.0]
    layers["b"] = Layer("stage", peak=torch.tensor([[3.0, torch.nan]]))
    assert Peak().score(Features(1, layers=layers)).tolist() == [torch.inf]
    layers["a"] = layers["b"]
    with pytest.raises(DetectorError, match="2 layers have peaks"):
        Peak().score(Features(1, layers=layers))


def test_peak_times_energy_by_hand():
    logits = torch.tensor([[1.0, -2.0, 0.5], [-30.0, -30.0, -31.0], [900.0, 1.0, 1.0]])
    layers = {"b": Layer("stage", peak=torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 2.0]]))}
    found = PeakEnergy().score(Features(3, logits=logits, layers=layers))
    softplus = [np.log(1 + np.exp(row).sum()) for row in logits[:2].double().numpy()]
    expected = [-25 * softplus[0], -25 * softplus[1], -4 * 900.0]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert found[1] < 0  # small as the logits are, it says who has the higher peaks
    with pytest.raises(DetectorError, match="peak-energy: 0 layers have peaks"):
        PeakEnergy()._score(Features(3, logits=logits))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_peaks_are_those_of_the_map_that_is_pooled(precision):
    network = networks.classifier(networks.Residual())
    images = networks.images(4)
    kept = {}
    last = network.network.get_submodule("layer2")
    last.register_forward_hook(lambda _, __, out: kept.update(map=out))
    seen = Recorder(network, frozenset({"layers.peak"}), precision=precision)(images)
    assert [name for name, layer in seen.layers.items() if layer.peak is not None] == ["layer2"]
    found = seen.layers["layer2"].peak
    assert found.dtype == torch.float32
    assert torch.equal(found, kept["map"].flatten(2).amax(2).clamp_min(0).float())


def test_a_network_without_a_map_has_no_peaks():
    network = networks.classifier(networks.Residual())
    assert "layers.peak" in recordable(network)
    flat = replace(network, taps=tuple(replace(tap, spatial_size=1) for tap in network.taps))
    with pytest.raises(DetectorError, match="none of its layers has several positions"):
        Recorder(flat, frozenset({"layers.peak"}))


# ---------------------------------------------------------------------------- the artefact


@pytest.mark.parametrize("kind", KINDS)
def test_an_artefact_holds_both_parts(three, test, tmp_path, kind):
    duo = kind.fit(**three)
    path = tmp_path / f"{kind.name}.safetensors"
    write_artefact(Artefact(duo, "abc", {"rows": 24, "kind": "virtual"}), path)
    again = read_artefact(path).detector
    assert type(again) is kind
    assert torch.equal(again.score(test), duo.score(test))
    parts = ("deviation",) if kind is C2IRPeak else ("deviation", "indicators")
    for part in parts:
        mine, its = getattr(duo, part), getattr(again, part)
        assert type(mine) is type(its)
        assert torch.equal(mine.score(test), its.score(test))
    assert json.loads(metadata(path)["hyperparameters"]) == {
        "deviation": {"layers": list(duo.deviation.layers), "weights": "uniform"},
        **(
            {"with_peak": True, "nci": 0.5}
            if kind is C2IRPeak
            else {"indicators": {"reference": "uniform"}}
        ),
    }


def test_an_artefact_with_nci(three, test, tmp_path):
    made = C2IRPeak.fit(**three)
    path = tmp_path / "c2ir-peak.safetensors"
    write_artefact(Artefact(made, "abc", {"rows": 24, "kind": "virtual"}), path)
    again = read_artefact(path).detector
    assert torch.equal(again.score(test), made.score(test))
    names, terms = again.contributions(test)
    assert names[-1] == "the embedding is unlike the weights of the predicted class"
    rest = made.score(test) - terms.sum(1)
    torch.testing.assert_close(rest, rest[:1].expand(9), rtol=1e-9, atol=1e-9)


def test_an_artefact_of_before_has_no_nci(three, test, tmp_path):
    made = C2IRPeak.fit(**three, nci=0)
    path = tmp_path / "c2ir-peak.safetensors"
    write_artefact(Artefact(made, "abc", {"rows": 24, "kind": "virtual"}), path)
    words = metadata(path)
    settings = json.loads(words["hyperparameters"])
    assert settings.pop("nci") == 0
    words["hyperparameters"] = json.dumps(settings)
    tensors = {name: value for name, value in load_file(path).items() if name != "mean"}
    save_file(tensors, path, words)
    assert torch.equal(read_artefact(path).detector.score(test), made.score(test))


def metadata(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    ("tensor", "settings", "reason"),
    [
        ("indicators/mean", None, "1c-sum: 'mean' is missing from the artefact"),
        (None, {"deviation": {}, "indicators": {}}, "c2ir-z: 'layers' is missing"),
        (None, {"deviation": 3, "indicators": {}}, "c2ir-z: 'layers' is missing"),
        (None, {"deviation": {}}, "c2ir-z: 'layers' is missing"),
    ],
)
def test_a_damaged_part_is_named(three, tmp_path, tensor, settings, reason):
    path = tmp_path / "duo.safetensors"
    write_artefact(Artefact(Duo.fit(**three), "abc", {}), path)
    words = metadata(path)
    if settings is not None:
        words["hyperparameters"] = json.dumps(settings)
    tensors = {name: value for name, value in load_file(path).items() if name != tensor}
    save_file(tensors, path, words)
    with pytest.raises(FileError, match=f"is damaged .*{reason}"):
        read_artefact(path)


def test_a_part_has_nothing_superfluous(three):
    duo = Duo.fit(**three)
    more = {**serial.state(duo), "indicators/more": torch.zeros(1)}
    with pytest.raises(DetectorError, match="1c-sum: the artefact has an unknown 'more'"):
        serial.restore(Duo, more, serial.settings(duo))


def test_both_parts_move(three):
    moved = Duo.fit(**three).to(torch.device("meta"))
    assert all(tensor.is_meta for tensor in serial.state(moved).values())
    assert isinstance(moved.deviation, C2IRZ)


# ---------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def place(fitted, tmp_path_factory):
    """A folder with a copy of the checkpoint, virtual rows, noise, a pool and a fitted duo."""
    folder = tmp_path_factory.mktemp("duo")
    for name in ("digits.pt", "digits.toml", "v.features.h5", "test.npz"):
        shutil.copy(fitted / name, folder)
    checkpoint, other = folder / "digits.pt", folder / "w.h5"
    for words in (
        ("invert", checkpoint, "--per-class", 6, "--no-mirror", "--seed", 7, "-o", other),
        ("extract", checkpoint, other, "--match-accuracy", 0.9, "--mirror", *output(folder, "p")),
        ("extract", checkpoint, "noise:uniform?n=300", *output(folder, "n")),
        ("extract", checkpoint, folder / "test.npz", "--mirror", *output(folder, "id")),
        fit(folder, "-d", "duo", "-d", "1c-sum", "-d", "c2ir-z", "-o", folder / "detectors"),
        fit(folder, "-d", "trio", "-d", "c2ir-peak", "-o", folder / "more"),
    ):
        result = oodcli(*words)
        assert result.status == 0, result.err
    return folder


def output(folder, name):
    return "-o", folder / f"{name}.h5"


def fit(folder, *words):
    three = (folder / "v.features.h5", "--noise", folder / "n.h5", "--calibrate", folder / "p.h5")
    return "fit", *three, *words


def scores(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_it_is_fitted_on_three_caches(place):
    made = {
        name: read_artefact(place / "detectors" / f"{name}.safetensors")
        for name in ("duo", "1c-sum", "c2ir-z")
    }
    duo = made["duo"]
    with open_cache(place / "id.h5") as cache:
        block = next(iter(cache.rows(Duo.needs)))
    for name, part in (("c2ir-z", duo.detector.deviation), ("1c-sum", duo.detector.indicators)):
        assert torch.equal(part.score(block), made[name].detector.score(block))
    assert set(duo.calibrations) == {"plain", "mirror"}
    assert duo.fitted_on["kind"] == "virtual"
    assert duo.fitted_on["file"] == "v.features.h5"
    assert duo.fitted_on["noise"] == "n.h5"
    assert duo.fitted_on["pool"] == ["p.h5"]
    with open_cache(place / "p.h5") as pool, open_cache(place / "n.h5") as noise:
        assert duo.fitted_on["pool_rows_sha256"] == [pool.rows_sha256]
        assert duo.fitted_on["noise_rows_sha256"] == noise.rows_sha256
        plain = torch.cat([duo.detector.score(block) for block in pool.rows(Duo.needs)])
    assert torch.equal(duo.calibrations["plain"].scores, plain.sort().values)


def test_noise_beside_other_rows_is_noise_alone(place, tmp_path):
    """1c-sum of one command for all is that of a command of its own."""
    alone = oodcli("fit", place / "n.h5", "-d", "1c-sum", "-o", tmp_path)
    assert alone.status == 0, alone.err
    one = read_artefact(tmp_path / "1c-sum.safetensors")
    other = read_artefact(place / "detectors" / "1c-sum.safetensors")
    assert one.fitted_on == other.fitted_on
    assert one.recorded == other.recorded
    assert serial.state(one.detector).keys() == serial.state(other.detector).keys()
    for name, tensor in serial.state(one.detector).items():
        assert torch.equal(tensor, serial.state(other.detector)[name])
    # Without a cache of other rows, too; and virtual images where they are asked for.
    without = ("fit", "-d", "1c-sum", "--noise", place / "n.h5", "-o", tmp_path, "--force")
    assert oodcli(*without).status == 0
    assert read_artefact(tmp_path / "1c-sum.safetensors").fitted_on == one.fitted_on
    virtual = fit(place, "-d", "1c-sum", "-d", "duo", "-p", "1c-sum.reference=virtual")
    assert oodcli(*virtual, "-o", tmp_path, "--force").status == 0
    assert read_artefact(tmp_path / "1c-sum.safetensors").fitted_on["kind"] == "virtual"


def test_real_rows_are_their_own_pool(place, tmp_path):
    """Every fifth real row is held out: it scales the parts and calibrates the verdicts."""
    words = ("fit", place / "id.h5", "-d", "c2ir-peak", "--noise", place / "n.h5", "-o", tmp_path)
    result = oodcli(*words)
    assert result.status == 0, result.err
    made = read_artefact(tmp_path / "c2ir-peak.safetensors")
    assert made.fitted_on["kind"] == "real"
    assert made.fitted_on["pool"] == ["id.h5"]
    needs = C2IRPeak.needs | {"label"}
    with open_cache(place / "id.h5") as cache, open_cache(place / "n.h5") as noise:
        rest = cache.rows(needs, lambda row: row % 5 != 0)
        held_out = list(cache.rows(needs, lambda row: row % 5 == 0))
        expected = C2IRPeak.fit(rest, noise=noise.rows(needs), pool=held_out)
    found = made.detector
    assert isinstance(found, C2IRPeak)
    assert torch.equal(found.median, expected.median)
    assert torch.equal(found.deviation.evidence, expected.deviation.evidence)
    scores = torch.cat([expected.score(block) for block in held_out])
    calibration = made.calibrations["plain"]
    assert torch.equal(calibration.scores, scores.sort().values)
    assert (calibration.real, calibration.virtual) == (len(scores), 0)


@pytest.mark.slow
def test_all_that_can_be_fitted(place, tmp_path):
    names = "1c-sum", "c2ir-peak", "duo", "trio"
    for more, expected in (
        (("--noise", place / "n.h5", "--calibrate", place / "p.h5"), names),
        (("--noise", place / "n.h5"), names[:1]),
        ((), ()),
    ):
        words = ("fit", place / "v.features.h5", "-d", "all", "-o", tmp_path, "--json", "--force")
        result = oodcli(*words, *more)
        made = {artefact["detector"] for artefact in json.loads(result.out)}
        assert made & set(names) == set(expected)
        assert " supersedes " not in result.err  # nobody asked for one by name
    assert "1c-sum (--noise; or let score fit it)" in result.err
    assert "duo (--noise)" in result.err


def test_fit_names_what_supersedes_a_detector(place, tmp_path):
    note = "note: c2ir-peak supersedes duo: fit c2ir-peak where the network allows it"
    once = oodcli(*fit(place, "-d", "duo", "-d", "c2ir-peak", "-d", "knn", "-o", tmp_path / "1"))
    assert once.err.count(" supersedes ") == once.err.count(note) == 1
    made = tmp_path / "1" / "duo.safetensors"
    again = oodcli("fit", "-d", made, "--calibrate", place / "id.h5", "-o", tmp_path / "2")
    assert again.status == 0
    assert " supersedes " not in again.err  # it is fitted already


def test_what_is_missing_is_said(place, tmp_path):
    into = ("-o", tmp_path / "x")
    noise, pool = ("--noise", place / "n.h5"), ("--calibrate", place / "p.h5")
    start = ("fit", place / "v.features.h5", "-d", "duo")
    for given in ((), noise, pool):
        sentence = (
            "duo is fitted on more than one cache: add --noise NOISE.h5 and --calibrate POOL.h5 "
            "(NOISE.h5: extract 'noise:uniform?n=2000&seed=0'; POOL.h5: extract other virtual "
            "images with --match-accuracy and the published accuracy)"
        )
        fails(sentence, *start, *given, *into, leaves=tmp_path)
    fails("duo must be fitted on a cache: ", "fit", "-d", "duo", *noise, *pool, *into)
    fails(
        f"duo needs noise images, but {place / 'id.h5'} holds",
        *(*start, *pool, "--noise", place / "id.h5", *into),
    )
    fails(
        f"1c-sum is standardised on noise:uniform, but {place / 'id.h5'} holds",
        *("fit", "-d", "1c-sum", "--noise", place / "id.h5", *into),
    )
    raw = (*noise, "--calibrate", place / "v.features.h5")
    fails("holds raw virtual images", *start, *raw, *into)
    fails(
        f"--noise {place / 'n.h5'}: none of c2ir-z is fitted on noise",
        *("fit", place / "v.features.h5", "-d", "c2ir-z", *noise, *into),
    )
    fails(
        "duo must be fitted first: 'oodcli fit CACHE.h5 -d duo --noise NOISE.h5 --calibrate "
        "POOL.h5' writes duo.safetensors; give its path to -d (NOISE.h5: extract 'noise:uniform",
        *("score", place / "digits.pt", "noise:blob?n=2", "-d", "duo"),
    )
    short = ("extract", place / "digits.pt", "noise:uniform?n=9", "--record", "logits")
    assert oodcli(*short, *output(tmp_path, "short")).status == 0
    fails("duo", *start, *pool, "--noise", tmp_path / "short.h5", *into)


def test_a_pool_of_another_checkpoint_is_refused(place, tmp_path):
    state = torch.load(place / "digits.pt", weights_only=True)
    changed = {name: value * 1.5 if value.ndim == 4 else value for name, value in state.items()}
    torch.save(changed, tmp_path / "other.pt")
    shutil.copy(place / "digits.toml", tmp_path / "other.toml")
    made = oodcli("extract", tmp_path / "other.pt", "noise:uniform?n=9", *output(tmp_path, "n"))
    assert made.status == 0, made.err
    words = ("--calibrate", place / "p.h5", "--noise", tmp_path / "n.h5", "-o", tmp_path / "x")
    fails("use one checkpoint", "fit", place / "v.features.h5", "-d", "duo", *words)


def test_real_rows_beside_the_pool_count_too(place, tmp_path):
    words = fit(place, "--calibrate", place / "id.h5", "-d", "duo", "-o", tmp_path)
    assert oodcli(*words).status == 0
    both = read_artefact(tmp_path / "duo.safetensors")
    assert both.fitted_on["pool"] == ["p.h5", "id.h5"]
    assert both.calibrations["plain"].real > 0
    with open_cache(place / "p.h5") as pool, open_cache(place / "id.h5") as real:
        rows = [
            both.detector.indicators.score(block)
            for cache in (pool, real)
            for block in cache.rows(Duo.needs)
        ]
    assert both.detector.median[1] == pytest.approx(float(np.median(torch.cat(rows))), rel=1e-12)


def test_scores_and_their_mirror(place):
    artefact = ("-d", place / "detectors" / "duo.safetensors")
    plain = scores(oodcli("score", place / "id.h5", *artefact).out)
    mirrored = oodcli("score", place / "id.h5", *artefact, "--mirror", "--fpr", "0.1", "--explain")
    assert mirrored.status == 0, mirrored.err
    found = scores(mirrored.out)
    duo = read_artefact(artefact[1]).detector
    with open_cache(place / "id.h5") as cache:
        block = next(iter(cache.rows(Duo.needs | {"mirror"})))
    first = duo.score(block)
    both = first + duo.score(block.mirror)
    for row, (one, two) in enumerate(zip(first.tolist(), both.tolist(), strict=True)):
        assert float(plain[row]["duo"]) == pytest.approx(one, rel=1e-8)
        assert float(found[row]["duo"]) == pytest.approx(two, rel=1e-8)
    assert {row["duo.ood"] for row in found} <= {"0", "1"}
    assert all(len(row["duo.why"].split("; ")) == 3 for row in found)


def test_it_is_the_default_where_it_is_at_hand(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "net" / "digits.pt"
    checkpoint.parent.mkdir()
    shutil.copy(place / "digits.pt", checkpoint)
    shutil.copy(place / "digits.toml", checkpoint.parent)
    artefact = place / "detectors" / "duo.safetensors"
    score = ("score", checkpoint, "noise:blob?n=3")
    assert "no -d: using 1c-sum, which needs only the checkpoint" in oodcli(*score).err
    expected = oodcli(*score, "-d", artefact).out
    here = Path("detectors") / "duo.safetensors"
    beside = checkpoint.parent / "digits.duo.safetensors"
    among = checkpoint.parent / "detectors" / "duo.safetensors"
    for path in (beside, among, here):  # each goes before those that are there already
        path.parent.mkdir(exist_ok=True)
        shutil.copy(artefact, path)
        result = oodcli(*score)
        assert result.status == 0, result.err
        assert (
            f"note: no -d: using {path}, the strongest detector without real images" in result.err
        )
        assert "scored by duo (virtual)\n" in result.err
        assert result.out == expected
    assert list(scores(oodcli(*score, "-d", "msp").out)[0])[4:] == ["msp", "error"]
    cached = oodcli("score", place / "id.h5")
    assert f"note: no -d: using {here}, the strongest" in cached.err
    assert "duo" in scores(cached.out)[0]


def test_the_strongest_goes_first(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "detectors", "detectors")
    for name, kind in (("trio", Trio), ("c2ir-peak", C2IRPeak)):
        file = Path("detectors") / f"{name}.safetensors"
        shutil.copy(place / "more" / file.name, file)
        result = oodcli("score", place / "id.h5", "--explain")
        assert f"note: no -d: using {file}, the strongest" in result.err
        found = scores(result.out)
        made = read_artefact(file).detector
        with open_cache(place / "id.h5") as cache:
            block = next(iter(cache.rows(kind.needs)))
        expected = made.score(block).tolist()
        assert [float(row[name]) for row in found] == pytest.approx(expected, rel=1e-8)
        assert [row[f"{name}.why"] for row in found] == made.explain(block)
    # A cache of before has no peaks. On digits noise has the higher ones, so they are not missed.
    assert not read_artefact(file).detector.with_peak
    words = ("extract", place / "digits.pt", place / "test.npz", "--for", "duo")
    assert oodcli(*words, "-o", "old.h5").status == 0
    assert "no -d: using detectors/c2ir-peak.safetensors" in oodcli("score", "old.h5").err
    file.unlink()
    result = oodcli("score", "old.h5")
    assert "not used: detectors/trio.safetensors needs layers.peak, which is missing" in result.err
    assert "no -d: using detectors/duo.safetensors" in result.err


@pytest.mark.parametrize(
    ("lacking", "of_cache", "name"),
    [
        ((), False, "1c-sum"),
        ((), True, "energy"),
        (("batchnorm.running",), False, "peak-energy"),
        (("batchnorm.running",), True, "peak-energy"),
        (("batchnorm.running", "layers.peak"), False, "energy"),
        (("batchnorm.running", "logits.level"), False, "msp"),
    ],
)
def test_the_default_without_an_artefact(place, tmp_path, monkeypatch, lacking, of_cache, name):
    monkeypatch.chdir(tmp_path)
    with open_cache(place / "id.h5") as cache:
        available = cache.recorded - set(lacking)
    reference = None if of_cache else 1
    opened = SimpleNamespace(available=available, fit_reference=reference)
    assert default_detector(opened, None) == name


def test_a_cache_takes_it_from_the_working_directory_alone(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = oodcli("score", place / "id.h5")  # beside which there is detectors/duo.safetensors
    assert "no -d: using energy" in result.err


def test_what_does_not_belong_is_left_aside(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = Path("detectors") / "duo.safetensors"
    here.parent.mkdir()
    score = ("score", place / "id.h5")
    good = read_artefact(place / "detectors" / "duo.safetensors")
    for artefact, reason in (
        (replace(good, checkpoint_sha256="f" * 64), f"{here} was fitted for the checkpoint fff"),
        (Artefact(detectors.get("energy")(), good.checkpoint_sha256, {}), "an artefact of energy"),
    ):
        write_artefact(artefact, here)
        result = oodcli(*score)
        assert result.status == 0, result.err
        assert "note: not used: " in result.err
        assert reason in result.err
        assert "no -d: using energy" in result.err
        here.unlink()
    here.write_bytes(b"no artefact")
    assert f"note: not used: {here} is damaged" in oodcli(*score).err
    write_artefact(good, here)
    short = ("extract", place / "digits.pt", "noise:blob?n=3", "--record", "logits")
    assert oodcli(*short, "-o", "short.h5").status == 0
    result = oodcli("score", "short.h5")
    assert f"not used: {here} needs batchnorm.mean, " in result.err
    assert result.status == 0
    # Beside the checkpoint there is one that fits.
    write_artefact(replace(good, checkpoint_sha256="f" * 64), here)
    result = oodcli("score", place / "digits.pt", "noise:blob?n=3")
    assert f"not used: {here}" in result.err
    assert f"no -d: using {place / 'detectors' / 'duo.safetensors'}," in result.err
