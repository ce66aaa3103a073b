"""From a score to a decision: p-values, thresholds, matched accuracy."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from oodcli.detectors.calibration import (
    calibrate,
    contamination_threshold,
    labelled_threshold,
    split_threshold,
)
from oodcli.detectors.mls import MLS
from oodcli.errors import DetectorError, FileError, OodcliError
from oodcli.features import Features
from oodcli.files.marks import read_marks
from oodcli.images.arrays import VirtualImages
from oodcli.images.source import Rows
from oodcli.inversion.degrade import SEQUENCE, Patched, match_accuracy, patched
from oodcli.stages.chosen import score_views
from oodcli.stages.verdict import Rule


def scores(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_p_values_by_hand():
    real = calibrate([scores(3.0, 1.0), scores(2.0)], [], None)
    # (1 + how many of 1, 2, 3 are at least as high)/4; ties count.
    p = real.p_value(scores(0.0, 1.0, 1.5, 3.0, 3.1, math.inf))
    assert p.tolist() == [1.0, 1.0, 0.75, 0.5, 0.25, 0.25]
    assert real.resolution == 0.25
    assert real.words == "3 real images"


def test_a_pool_beside_real_rows_counts_for_thirty():
    pool = torch.arange(100, dtype=torch.float64)
    mixed = calibrate([scores(200.0, 200.0)], [pool], 0.917)
    assert mixed.mass == pytest.approx(32)
    # Both real rows, and 51 of 101: the upper half of the pool and the image itself.
    assert mixed.p_value(scores(50.0)).item() == pytest.approx((2 + 30 * 51 / 101) / 32)
    assert mixed.words == "virtual, matched to accuracy 0.917, 2 real images"
    alone = calibrate([], [pool], 0.917)
    assert alone.mass == 101
    assert alone.p_value(scores(50.0)).item() == pytest.approx(51 / 101)
    assert alone.words == "virtual, matched to accuracy 0.917, no real data"
    few = calibrate([scores(1.0)], [pool[:10]], 0.9)  # ten images do not count for thirty
    assert few.mass == 12
    with pytest.raises(DetectorError, match="no rows to calibrate on"):
        calibrate([], [], None)


@pytest.mark.parametrize("count", [10, 30, 100, 400])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_false_alarms_are_as_promised(count, rate):
    """Over many draws of calibration and test rows from one law: never more than the rate, and
    no less than the resolution allows."""
    generator = torch.Generator().manual_seed(count)
    alarms = []
    low, high = calibrate([torch.randn(count)], [], None).achieved(rate)
    inside = 0
    for _ in range(400):
        rows = torch.randn(count + 200, generator=generator)
        calibration = calibrate([rows[:count]], [], None)
        alarms.append(float((calibration.p_value(rows[count:]) <= rate).double().mean()))
        # What 200 rows show scatters around what the calibration achieves.
        slack = 2 * math.sqrt(max(high, 0.01) / 200)
        inside += low - slack <= alarms[-1] <= high + slack
    mean = sum(alarms) / len(alarms)
    expected = math.floor(rate * (count + 1) + 1e-9) / (count + 1)
    assert mean == pytest.approx(expected, abs=4 * math.sqrt(rate / count / 400) + 0.002)
    assert inside > 340


def test_split_by_hand():
    assert split_threshold(scores(0, 1, 2, 10, 11, 12)) == 6.0
    assert split_threshold(scores(5, 0, 0, 0, math.inf)) == 2.5
    for nothing in (scores(1, 1, 1), scores(2), scores()):
        with pytest.raises(DetectorError, match="two different scores"):
            split_threshold(nothing)


def test_split_has_the_least_variance_within():
    x = torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    cut = split_threshold(x)

    def within(t):
        groups = [x[x <= t], x[x > t]]
        return sum(float((g - g.mean()).square().sum()) for g in groups if len(g))

    ordered = x.sort().values
    best = min(within(float(t)) for t in (ordered[1:] + ordered[:-1]) / 2)
    assert within(cut) == pytest.approx(best)


@pytest.mark.parametrize(("share", "flagged"), [(0.0, 0), (0.1, 1), (0.3, 3), (0.5, 5), (1.0, 10)])
def test_contamination(share, flagged):
    x = torch.arange(10, dtype=torch.float64)
    assert int((x > contamination_threshold(x, share)).sum()) == flagged


def test_contamination_and_infinite_scores():
    x = scores(1, 2, 3, math.inf)
    assert contamination_threshold(x, 0.25) == 3.0
    assert contamination_threshold(x, 0.5) == 2.5


def test_labelled_threshold():
    x = scores(1, 2, 3, 4, 5)
    assert labelled_threshold(x, torch.tensor([False, False, False, True, True])) == 3.5
    assert labelled_threshold(x, torch.tensor([False, True, False, True, True])) in (1.5, 3.5)
    with pytest.raises(DetectorError, match="both kinds"):
        labelled_threshold(x, torch.zeros(5, dtype=torch.bool))


def test_marks(tmp_path):
    path = tmp_path / "marks.csv"
    path.write_text('path,ood,who\n"a,b.png",1,me\nc.png,0,me\nd.png,,\n')
    assert read_marks(path) == {"a,b.png": True, "c.png": False}
    for text, sentence in (
        ("path,label\na,1\n", "expected the columns path and ood"),
        ("path,ood\na,yes\n", "line 2: ood is 'yes'"),
        ("path,ood\n", "labels no row"),
        ("", "expected the columns"),
    ):
        path.write_text(text)
        with pytest.raises(FileError, match=sentence):
            read_marks(path)
    with pytest.raises(FileError, match="cannot be read"):
        read_marks(tmp_path / "none.csv")


def test_matching_accuracy():
    strength, reached = match_accuracy(lambda s: 1 / (1 + s), 0.8)
    assert strength == pytest.approx(0.25, rel=1e-4)
    assert reached == pytest.approx(0.8, rel=1e-4)
    # Steps: ten images, so 0.85 cannot be had.
    strength, reached = match_accuracy(lambda s: max(0, math.ceil(10 - 3 * s)) / 10, 0.85)
    assert reached in (0.8, 0.9)
    with pytest.raises(OodcliError, match=r"right on 70\.0% .*less than the 90\.0%"):
        match_accuracy(lambda s: 0.7, 0.9)
    with pytest.raises(OodcliError, match="no patches bring the network down"):
        match_accuracy(lambda s: 0.95, 0.9)
    with pytest.raises(OodcliError, match="between 0 and 1"):
        match_accuracy(lambda s: 0.95, 92)


def test_patches_by_hand():
    """Where, how large and what, for one image; the same in any company."""
    images, others = torch.zeros(40, 2, 20, 10), torch.ones(40, 2, 20, 10)
    numbers = torch.arange(40)
    out = patched(images, others, numbers, 0.33)
    for number in (0, 7, 39):
        u, y, x = ((number + 0.5) * each % 1 for each in SEQUENCE)
        height, width = math.floor(6.6 + u), math.floor(3.3 + u)
        top, left = int(y * (20 - height + 1)), int(x * (10 - width + 1))
        expected = torch.zeros(2, 20, 10)
        expected[:, top : top + height, left : left + width] = 1
        assert torch.equal(out[number], expected)
    rows = torch.tensor([31, 4])
    assert torch.equal(patched(images[:2], others[:2], rows, 0.33), out[rows])
    assert torch.equal(patched(images, others, numbers, 0.0), images)
    assert torch.equal(patched(images, others, numbers, 1.0), others)
    # In whole pixels, up or down, and on average as asked, so that any accuracy can be had.
    heights = out[:, 0].amax(2).sum(1)
    assert set(heights.tolist()) == {6.0, 7.0}
    assert heights.mean() == pytest.approx(6.6, abs=0.05)


class Numbered(VirtualImages):
    """Images that hold their own number."""

    def __init__(self, labels):
        self.labels, self.name, self.labelled, self.note = labels, "numbers", True, None

    @contextmanager
    def reading(self):
        def decode(start, stop, preprocessing):
            pixels = torch.arange(start, stop).float()[:, None, None, None].expand(-1, 3, 8, 8)
            return Rows(self.labels[start:stop], [None] * (stop - start), pixels)

        yield lambda start, stop: partial(decode, start, stop)

    def weight(self, start, stop):
        return stop - start

    def paths(self, start, stop):
        return [f"numbers[{row}]" for row in range(start, stop)]


@pytest.mark.parametrize(
    ("labels", "distances"),
    [
        (torch.arange(12) // 4, [6, 6, 7, 8]),  # class after class: half of the way, about
        (torch.arange(12) % 3, [7, 7, 8, 10]),  # 6 and 9 further on is the same class
        (torch.arange(60) % 10, [31, 33, 35, 37]),  # each time other classes
        (torch.zeros(5, dtype=torch.int64), [2, 2, 3, 4]),
        (torch.arange(2), [1, 1, 1, 1]),
        (torch.zeros(1, dtype=torch.int64), [0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("size", [1, 5, 12, 100])
def test_patches_come_from_other_classes(labels, distances, size):
    count = len(labels)
    source = Patched(Numbered(labels), 0.75)
    assert len(source) == 4 * count
    assert source.weight(0, 1) == 5
    assert source.weight(0, 4 * count) == 20 * count
    names = [f"numbers[{number}]" for number in range(count)]
    assert source.paths(0, 4 * count) == 4 * names
    found, seen = [], []
    with source.reading() as fetch:
        for start in range(0, 4 * count, size):
            rows = fetch(start, min(start + size, 4 * count))(None)
            found.append(rows.pixels)
            seen.append(rows.labels)
            assert rows.errors == [None] * len(rows.labels)
    found = torch.cat(found)
    assert torch.equal(torch.cat(seen), labels.repeat(4))
    # An image has each version once; the first rows, by which the size is chosen, have all.
    numbers = torch.arange(4 * count)
    own = numbers % count
    version = (numbers // count + own) % 4
    other = (own + torch.tensor(distances)[version]) % count
    for row, image in enumerate(found):
        assert set(image.unique().tolist()) <= {float(own[row]), float(other[row])}
    # The same in any company, and each has its own patch.
    whole = [each.float()[:, None, None, None].expand_as(found) for each in (own, other)]
    assert torch.equal(found, patched(*whole, numbers, 0.75))
    if count > 1:
        assert (found == whole[1]).any((1, 2, 3)).double().mean() > 0.5
    if len(labels.unique()) > 1:
        assert (labels[other] != labels[own]).all()
    few = Patched(Numbered(labels), 0.75, versions=1)
    assert len(few) == count
    with few.reading() as fetch:
        assert torch.equal(fetch(0, count)(None).pixels, found[:count])


def test_rows_of_one_image_count_as_one_image():
    """They hardly change p, but do not make it surer."""
    rows = torch.rand(400, generator=torch.Generator().manual_seed(0)).double()
    one = calibrate([], [rows], 0.9)
    four = calibrate([], [rows], 0.9, images=100)
    assert four.mass == pytest.approx(100.25)
    assert four.p_value(rows) == pytest.approx(one.p_value(rows))
    (low, high), (lowest, highest) = one.achieved(0.05), four.achieved(0.05)
    assert lowest < low < 0.05 < high < highest
    beside = calibrate([torch.zeros(5).double()], [rows], 0.9, images=100)
    assert float(beside.weights.sum()) == pytest.approx(5 + 30 * 400 / 401)


def test_a_verdict_at_its_very_limit():
    """p ≤ rate is OOD, a score equal to the threshold is not, an infinite one always is."""
    calibration = calibrate([scores(1.0, 2.0, 3.0)], [], None)
    found = Rule(calibration=calibration, rate=0.25).columns("x", scores(3.0, 3.1, math.inf))
    assert found["x.p"].tolist() == [0.5, 0.25, 0.25]
    assert found["x.ood"].tolist() == [0, 1, 1]
    strict = Rule(calibration=calibration, rate=0.1).columns("x", scores(9.0, math.inf))
    assert strict["x.ood"].tolist() == [0, 1]
    limit = Rule(threshold=2.0).columns("x", scores(2.0, 2.1, math.inf))
    assert limit["x.ood"].tolist() == [0, 1, 1]
    assert limit["x.basis"] == ["score above 2"] * 3
    assert Rule().columns("x", scores(9.0, math.inf))["x.ood"].tolist() == [0, 1]


def test_two_views_add_up():
    ahead, turned = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 5.0]])
    seen = Features(count=1, logits=ahead, mirror=Features(count=1, logits=turned))
    assert score_views(MLS(), seen, mirror=False).tolist() == [-2.0]
    assert score_views(MLS(), seen, mirror=True).tolist() == [-7.0]
