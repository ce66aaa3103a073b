"""What every detector must do, whatever it computes."""

from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError, replace
from functools import cache
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from naive import NAIVE, Fit

from oodcli import detectors
from oodcli.detectors import facts, serial
from oodcli.detectors.bank import Bank
from oodcli.detectors.hyperparameters import hyperparameters, parse
from oodcli.errors import DetectorError
from oodcli.features import LAST_MAP, Features
from oodcli.recording.recorder import MOMENTS
from oodcli.records import KNOWN_RECORDS


@cache
def rows_of(classes):
    """Rows to fit on, and rows to score."""
    train = networks.recorded(24, classes=classes)
    return train, networks.recorded(9, seed=2, classes=classes, labelled=False)


@cache
def fitted_once(name, classes=3):
    return fitted(name, rows_of(classes)[0])


def given(name, train):
    """What ``fit`` takes besides: the same rows some way off, and with lower peaks."""
    kind = detectors.get(name)
    blocks = [train] if isinstance(train, Features) else train
    more = {}
    if kind.uses_ood:
        more["ood"] = [block.map_rows(far_off, len(block)) for block in blocks]
    if kind.noise_images is not None:
        more["noise"] = [block.map_rows(low_peaks, len(block)) for block in blocks]
    if kind.needs_pool:
        more["pool"] = train
    return more


def far_off(name, rows):
    return rows if name == "label" else rows * 1.5


def low_peaks(name, rows):
    return rows / 2 if name.endswith("/peak") else rows


def fitted(name, train, **hyperparameters):
    return detectors.get(name).fit(train, **given(name, train), **hyperparameters)


@pytest.fixture
def train():
    return rows_of(3)[0]


@pytest.fixture
def test():
    """Without what other tests have computed of it."""
    return replace(rows_of(3)[1])


@pytest.fixture
def detector(name):
    return fitted_once(name)


every = pytest.mark.parametrize("name", detectors.names())


@every
def test_listing(name):
    kind = detectors.get(name)
    assert kind.name == name
    assert kind.source
    assert kind.about
    assert kind.needs | kind.fit_needs() <= KNOWN_RECORDS
    assert kind.__doc__
    assert facts.explanation(kind), "the first paragraph of its docstring explains the formula"
    assert facts.equations(kind), 'its formula stands on its page: formula = r"s = …"'
    for key, setting in hyperparameters(kind).items():
        assert setting.meaning, f'say what {key} is: {key}: Annotated[TYPE, "meaning"] = DEFAULT'
    assert serial.fault_of_fields(kind) is None
    if kind.superseded_by is not None:
        better = detectors.get(kind.superseded_by)
        assert better.superseded_by is None
        assert facts.group(better) == facts.group(kind), "it must need no other images"


ELSEWHERE = {
    "1c-sum": "one_class_sum",
    "1d": "one_dimensional",
    **dict.fromkeys(("scale", "lts", "ash-p", "ash-b", "ash-s"), "shaping"),
    **dict.fromkeys(("adascale-a", "adascale-l"), "adascale"),
}


@every
def test_its_file_bears_its_name(name):
    """Or that of the detector that it varies."""
    kind = detectors.get(name)
    file = kind.__module__.rpartition(".")[2]
    if file != ELSEWHERE.get(name, name.replace("-", "_")):
        varied = detectors.get(file.replace("_", "-"))
        assert issubclass(kind, varied)
        assert varied.name in name


def test_every_file_is_a_detectors_or_is_shared():
    folder = Path(detectors.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    own = {detectors.get(name).__module__.rpartition(".")[2] for name in detectors.names()}
    shared = {"base", "bank", "blocks", "calibration", "facts", "hyperparameters", "own", "serial"}
    formulas = {"batchnorm_indicators", "class_statistics", "common_scale", "last_layer_gradients"}
    formulas |= {"head_geometry", "latent_space", "layer_choice", "percentiles", "principal"}
    formulas |= {"mixture_fit", "sums", "tied_gaussians", "widened"}
    assert files - own == shared | formulas


# ---------------------------------------------------------------------------- the formula


def test_every_detector_has_a_naive_formula():
    assert set(NAIVE) == set(detectors.names())


@cache
def naive_score(name):
    train, test = rows_of(3)
    rows = {key: each if key == "pool" else each[0] for key, each in given(name, train).items()}
    return NAIVE[name](test, Fit(train, **rows))


def same_as_naive(name, test):
    found = fitted_once(name).score(test).numpy()
    np.testing.assert_allclose(found, naive_score(name), rtol=1e-6, atol=1e-9)


@every
def test_its_score_is_the_naive_one(name, test):
    same_as_naive(name, test)


@every
def test_a_flipped_sign_is_seen(name, test, monkeypatch):
    kind = detectors.get(name)
    score = kind._score
    monkeypatch.setattr(kind, "_score", lambda self, rows: -score(self, rows))
    with pytest.raises(AssertionError):
        same_as_naive(name, test)


SURE = ("msp", "entropy", "t1000", "mls", "energy", "gradnorm", "igoe", "thinkback", "expgrad")


@pytest.mark.parametrize(
    "name",
    [*SURE, "gen", "doctor", "lts", "rg", "energy-norm", "peak-energy", "godin", "joint-energy"],
)
def test_an_undecided_row_scores_higher_than_a_sure_one(name, test):
    spread = torch.tensor([[9.0, 0, 0]]) * torch.linspace(1, 0, 9)[:, None]
    same = test.map_rows(lambda _, rows: rows[:1].expand(rows.shape), 9)
    rows = replace(same, logits=spread, deconf_h=spread)
    scores = detectors.get(name)().score(rows)
    assert (scores.diff() > 0).all()


FAR = ("mds", "mds-sum", "knn", "vim", "gram", "1d", "lsgm", "c2ir-z", "c2ir-peak", "duo", "trio")
BATCHNORM = ("1c-sum", "supervised", "dms", "dms-aos", "dss", "dss-ext")


@pytest.mark.parametrize("name", [*FAR, *BATCHNORM, "thinkback-norm"])
def test_rows_with_their_channels_in_another_order_score_higher(name, detector, train):
    turned = train.map_rows(
        lambda record, rows: rows if rows.ndim < 2 or record == "logits" else rows.flip(1), 24
    )
    assert detector.score(turned).median() > detector.score(train).median()


# ---------------------------------------------------------------------------- rows in and out


@every
def test_one_score_a_row(name):
    for classes in (2, 3):
        scores = fitted_once(name, classes).score(rows_of(classes)[1])
        assert scores.shape == (9,)
        assert scores.dtype == torch.float64
        assert torch.isfinite(scores).all()
        assert len(set(scores.tolist())) > 1


@every
def test_neither_batches_nor_order_matter(name, detector, train, test):
    whole = detector.score(test)
    parts = [detector.score(test.select(slice(start, start + 2))) for start in range(0, 9, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=0)
    order = torch.tensor([3, 1, 8, 0, 2, 7, 5, 6, 4])
    torch.testing.assert_close(detector.score(test.select(order)), whole[order], rtol=1e-9, atol=0)


@every
def test_fitting_does_not_depend_on_blocks_or_order(name, detector, train, test):
    whole = detector.score(test)
    blocks = [train.select(slice(start, start + 7)) for start in range(0, 24, 7)]
    torch.testing.assert_close(fitted(name, blocks).score(test), whole, rtol=1e-8, atol=1e-10)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled = fitted(name, train.select(order)).score(test)
    torch.testing.assert_close(shuffled, whole, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in detectors.names() if detectors.get(n).heavy])
def test_rows_are_halved_where_the_memory_is_short(name, detector, train, test, monkeypatch):
    """Those that are scored on a GPU."""
    whole = detector.score(test)
    score, most = type(detector)._score, 2
    sizes = []

    def limited(self, block):
        sizes.append(len(block))
        if len(block) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return score(self, block)

    monkeypatch.setattr(type(detector), "_score", limited)
    torch.testing.assert_close(detector.score(test), whole, rtol=1e-9, atol=0)
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    most = 0
    with pytest.raises(
        DetectorError, match=f"out of memory with a single image scored by {re.escape(name)} .*CUDA"
    ):
        detector.score(test)


@every
def test_one_row_and_none(name, detector, train, test):
    assert detector.score(test.select(slice(0, 1))).shape == (1,)
    assert detector.score(test.select(slice(0, 0))).shape == (0,)


@every
def test_a_row_that_is_not_finite_is_out_of_distribution(name, detector, train, test):
    spoilt = test.map_rows(lambda _, rows: rows.clone(), len(test))
    bad = {2: math.nan, 4: math.inf, 7: -math.inf}
    for rows in spoilt.rows().values():
        if rows.ndim == 2:
            rows[list(bad), 0] = torch.tensor(list(bad.values()), dtype=rows.dtype)
    scores = detector.score(spoilt)
    assert (scores[list(bad)] == math.inf).all()
    good = [row for row in range(9) if row not in bad]
    torch.testing.assert_close(scores[good], detector.score(test)[good], rtol=1e-12, atol=0)


@every
def test_rows_that_are_not_finite_do_not_spoil_a_fit(name, detector, train, test):
    bad = train.select(slice(0, 1)).map_rows(lambda _, r: r * math.nan if r.ndim > 1 else r, 1)
    with_bad = fitted(name, [train, bad]).score(test)
    torch.testing.assert_close(with_bad, detector.score(test))


@every
def test_huge_logits(name):
    for classes in (2, 3):
        test = rows_of(classes)[1]
        large = replace(test, logits=test.logits * 1e4, odin_logits=test.odin_logits * 1e4)
        assert not torch.isnan(fitted_once(name, classes).score(large)).any()


@every
def test_zero_features(name, detector, train, test):
    nothing = test.map_rows(lambda _, rows: torch.zeros_like(rows), len(test))
    scores = detector.score(nothing)
    # Where no position of the last map is active, the logarithm of its peaks has no limit.
    assert torch.isfinite(scores).all() or (name == "c2ir-peak" and (scores == math.inf).all())


@every
def test_a_class_without_rows(name, detector, train, test):
    some = fitted(name, train.select(train.label > 0))
    assert torch.isfinite(some.score(test)).all()


@every
def test_nothing_to_fit_on(name):
    if detectors.get(name).fitted:
        with pytest.raises(DetectorError, match="no rows to fit on"):
            fitted(name, [])


@every
def test_on_a_device(name, detector, train, test):
    moved = detector.to(torch.device("meta"))
    for tensor in serial.state(moved).values():
        parts = tensor.blocks() if isinstance(tensor, Bank) else [tensor]
        assert all(part.is_meta for part in parts)
    if detector.heavy:  # no number of it is read, and nothing of another device gets in
        assert moved.score(test.to(torch.device("meta"))).is_meta
    assert serial.settings(moved) == serial.settings(detector)


@every
def test_what_was_not_recorded_is_named(name, detector, train, test):
    empty = Features(count=9, label=test.label)
    with pytest.raises(DetectorError, match=rf"{re.escape(name)} needs .*not recorded"):
        detector.score(empty)


@every
def test_it_reads_only_the_layers_that_it_names(name, detector, test):
    if not detector.score_needs & MOMENTS:
        return
    (last,) = (name for name, layer in test.layers.items() if layer.peak is not None)
    read = {last if name == LAST_MAP else name for name in detector.layers_read}
    assert read < test.layers.keys()
    layers = {
        name: layer if name in read else replace(layer, mean=None, std=None)
        for name, layer in test.layers.items()
    }
    assert torch.equal(detector.score(replace(test, layers=layers)), detector.score(test))


@every
def test_state_is_the_whole_detector(name, detector, train, test):
    again = serial.restore(type(detector), serial.state(detector), serial.settings(detector))
    assert torch.equal(again.score(test), detector.score(test))
    with pytest.raises(DetectorError, match="unknown 'more'"):
        serial.restore(
            type(detector), serial.state(detector), {**serial.settings(detector), "more": 1}
        )
    for field in (*serial.state(detector), *serial.settings(detector)):
        if "/" not in field and field not in detector.later:
            tensors = {key: value for key, value in serial.state(detector).items() if key != field}
            settings = {
                key: value for key, value in serial.settings(detector).items() if key != field
            }
            with pytest.raises(DetectorError, match="missing"):
                serial.restore(type(detector), tensors, settings)


@every
def test_frozen_and_argument_untouched(name, detector, train, test):
    before = {key: rows.clone() for key, rows in test.rows().items()}
    detector.score(test)
    assert all(torch.equal(rows, before[key]) for key, rows in test.rows().items())
    with pytest.raises(FrozenInstanceError):
        detector.anything = 1


def test_hyperparameters_from_strings():
    kind = detectors.get("c2ir")
    assert parse(kind, {"weights": "uniform", "seed": "3"}) == {"weights": "uniform", "seed": 3}
    with pytest.raises(DetectorError, match="expected one of mgi, uniform, random, penultimate"):
        parse(kind, {"weights": "best"})
    with pytest.raises(DetectorError, match="no hyper-parameter 'colour': known are weights"):
        parse(kind, {"colour": "red"})
    with pytest.raises(DetectorError, match="T=warm: expected float"):
        parse(detectors.get("energy"), {"T": "warm"})
    with pytest.raises(DetectorError, match="must be positive"):
        detectors.get("energy")(T=0.0)
    with pytest.raises(DetectorError, match="no detector is called 'magic': known are msp"):
        detectors.get("magic")
