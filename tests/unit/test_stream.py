"""``score --stream``: scores that borrow from similar images of the job."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from commands import fails, oodcli
from scipy.stats import norm

from oodcli.detectors.msp import MSP
from oodcli.features import Features, Layer, Rows
from oodcli.files.scores import ScoreBlock
from oodcli.metrics import auroc
from oodcli.stages import stream
from oodcli.stages.chosen import Chosen
from oodcli.stages.score import Scoring
from oodcli.stages.stream import borrowed, mutual_neighbours, sketch, smoothed


def block(sketches, scores, first=0):
    count = len(scores)
    paths = [f"image {row}.png" for row in range(first, first + count)]
    none = [""] * count
    return ScoreBlock(
        paths, none, none, none, np.zeros(count), {"energy": scores}, sketches.astype(np.float32)
    )


def smooth(sketches, scores, size=64):
    """The column, of blocks of some size."""
    cut = range(0, len(scores), size)
    blocks = [block(sketches[row : row + size], scores[row : row + size], row) for row in cut]
    found = smoothed(blocks, ["energy"])
    assert all(each.sketches is None for each in found)
    return np.concatenate([each.scores["energy[stream]"] for each in found])


def with_a_cluster(count=600, planted=60, shift=1.0):
    """ID images of ten kinds, and OOD images of one more, whose scores are but little higher.
    Returns sketches, scores and which are OOD."""
    random = np.random.default_rng(0)
    kinds = random.standard_normal((11, stream.WIDTH)) * 3
    kind = np.concatenate([random.integers(0, 10, count - planted), np.full(planted, 10)])
    sketches = kinds[kind] + random.standard_normal((count, stream.WIDTH))
    scores = random.standard_normal(count) + shift * (kind == 10)
    return sketches, scores, kind == 10


def test_borrowing_by_hand():
    scores = np.array([1.0, 5.0, 2.0, 4.0])
    index = np.array([[1, 2], [0, 3], [0, 3], [1, 2]])
    mutual = np.array([[True, False], [False, False], [True, True], [False, True]])
    z = norm.ppf([1 / 8, 7 / 8, 3 / 8, 5 / 8])
    first = norm.cdf((6 * z[0] + z[1]) / 7)  # between the ranks of 1 and 2
    third = norm.cdf(z[2] + ((z[3] - z[2]) - (z[2] - z[0]) / 2) / 8)  # between those of 2 and 4
    fourth = norm.cdf(z[3] - (z[3] - z[2]) / 2 / 7)  # between those of 2 and 4
    expected = [
        1 + (first - 1 / 8) / (1 / 4),
        5,
        2 + (third - 3 / 8) / (1 / 4) * 2,
        2 + (fourth - 3 / 8) / (1 / 4) * 2,
    ]
    assert borrowed(scores, index, mutual) == pytest.approx(expected)


def test_infinite_scores_stay_and_raise_their_neighbours():
    scores = np.array([0.0, 1.0, math.inf, 2.0])
    index = np.array([[1], [2], [1], [0]])
    mutual = np.array([[False], [True], [True], [False]])
    found = borrowed(scores, index, mutual)
    assert found[2] == math.inf
    assert 1 < found[1] < 2
    assert found[[0, 3]] == pytest.approx([0, 2])
    nothing = np.full(4, math.inf)
    assert borrowed(nothing, index, mutual).tolist() == nothing.tolist()


def test_mutual_neighbours_are_those_of_a_full_matrix():
    points = np.random.default_rng(1).standard_normal((80, 5)).astype(np.float32)
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1)[:, :10]
    index, mutual = mutual_neighbours(points, np.arange(80))
    assert np.array_equal(index, nearest)
    expected = [[row in nearest[other] for other in nearest[row]] for row in range(80)]
    assert np.array_equal(mutual, expected)
    assert 0 < mutual.mean() < 1


def test_neighbours_are_searched_in_a_sample_only(monkeypatch):
    points = np.random.default_rng(1).standard_normal((90, 5)).astype(np.float32)
    sample = np.arange(0, 90, 3)
    distance = np.linalg.norm(points[:, None] - points[None, sample], axis=2)
    distance[sample, np.arange(30)] = np.inf
    expected = sample[np.argsort(distance, axis=1)[:, :10]]
    monkeypatch.setattr(stream, "_BLOCK", 7)
    index, mutual = mutual_neighbours(points, sample)
    assert np.array_equal(index, expected)
    reach = np.sort(distance[sample], axis=1)[:, 9]
    near = np.take_along_axis(distance, np.argsort(distance, axis=1)[:, :10], 1)
    assert np.array_equal(mutual, near <= reach[np.searchsorted(sample, index)])


def test_a_large_stream_is_compared_with_a_sample_by_path(monkeypatch):
    """Memory grows with the images times 10, not with their square."""
    monkeypatch.setattr(stream, "SAMPLE", 300)
    sketches, scores, ood = with_a_cluster()
    sizes = []
    search = stream.mutual_neighbours

    def watched(points, sample):
        sizes.append((len(points), len(sample)))
        return search(points, sample)

    monkeypatch.setattr(stream, "mutual_neighbours", watched)
    found = smooth(sketches, scores)
    assert sizes == [(600, 300)]
    assert auroc(found[~ood], found[ood]) > auroc(scores[~ood], scores[ood]) + 0.05


@pytest.mark.parametrize("limit", [20_000, 300])
def test_the_order_and_the_blocks_do_not_matter(monkeypatch, limit):
    monkeypatch.setattr(stream, "SAMPLE", limit)
    sketches, scores, _ = with_a_cluster()
    expected = smooth(sketches, scores)
    order = np.random.default_rng(2).permutation(600)
    whole = block(sketches[order], scores[order])
    whole.paths[:] = [f"image {row}.png" for row in order]
    (found,) = smoothed([whole], ["energy"])
    np.testing.assert_allclose(found.scores["energy[stream]"], expected[order], atol=1e-6)
    assert not np.allclose(expected, scores)


@pytest.mark.parametrize("planted", [12, 60, 300])
def test_a_cluster_is_found_better(planted):
    sketches, scores, ood = with_a_cluster(planted=planted)
    found = smooth(sketches, scores)
    assert auroc(found[~ood], found[ood]) > auroc(scores[~ood], scores[ood]) + 0.05


def test_isolated_images_lose_little():
    """OOD images that are like no other image, and like no ID image."""
    sketches, scores, ood = with_a_cluster(planted=12, shift=3)
    sketches[ood] = np.random.default_rng(3).standard_normal((12, stream.WIDTH)) * 4
    found = smooth(sketches, scores)
    assert auroc(found[~ood], found[ood]) > auroc(scores[~ood], scores[ood]) - 0.01


def test_scores_without_any_ood_image_stay_in_their_order():
    sketches, scores, _ = with_a_cluster(planted=0)
    found = smooth(sketches, scores)
    assert np.corrcoef(found, scores)[0, 1] > 0.85
    assert scores.min() <= found.min()
    assert found.max() <= scores.max()


def test_a_sketch_does_not_depend_on_the_scale_or_the_order_of_layers():
    random = torch.Generator().manual_seed(0)
    means = {name: torch.rand(6, width, generator=random) for name, width in (("a", 3), ("b", 5))}
    means["a"][5] = math.inf  # of a network that overflowed

    def made(names, scale=1.0):
        layers = {name: Layer("other", mean=means[name] * scale) for name in names}
        return sketch(Features(6, layers=layers))

    found = made("ab")
    assert found.shape == (6, stream.WIDTH)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, made("ba"))
    np.testing.assert_allclose(found, made("ab", scale=7.0), rtol=1e-5, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_what_has_learnt_from_ood_images_is_marked_in_both_columns():
    chosen = [Chosen(MSP(), saw="real OOD images")]
    scoring = Scoring.of(chosen, ["a", "b"], {}, stream=True)
    assert scoring.columns == ("msp", "msp.saw", "msp[stream]", "msp[stream].saw")
    features = Features(2, logits=torch.eye(2), layers={"a": Layer("other", mean=torch.rand(2, 3))})
    rows = Rows(["1.png", "2.png"], torch.tensor([-1, -1]), [None, None], features)
    found = scoring(rows, chosen)
    for name in ("msp.saw", "msp[stream].saw"):
        assert found.scores[name] == ["real OOD images"] * 2


def test_a_stream_of_the_command_line(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    score = ("score", trained / "digits.pt", trained / "test.npz", "-d", "energy", "-d", "msp")
    plain = oodcli(*score).out.splitlines()
    result = oodcli(*score, "--stream", "-o", "s.csv")
    assert result.status == 0, result.err
    found = (tmp_path / "s.csv").read_text("utf-8").splitlines()
    names = found[0].split(",")
    assert names[4:] == ["energy", "energy[stream]", "msp", "msp[stream]", "error"]
    for one, both in zip(plain[1:], found[1:], strict=True):
        cells = both.split(",")
        assert [*cells[:5], cells[6], cells[8]] == one.split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in found[1:]]
    columns = [[float(row[name]) for row in rows] for name in ("energy", "energy[stream]")]
    assert 0.8 < np.corrcoef(*columns)[0, 1] < 0.9999
    assert oodcli("extract", *score[1:3], "-o", "c.h5").status == 0
    again = oodcli("score", "c.h5", *score[3:], "--stream", "--contamination", "0.1")
    assert again.status == 0, again.err
    judged = again.out.splitlines()
    names = judged[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in judged[1:]]
    flagged = [
        sum(int(row[f"{name}.ood"]) for row in rows) for name in ("energy", "energy[stream]")
    ]
    assert flagged == [60, 60]  # of 597
    np.testing.assert_allclose(
        [float(row["energy[stream]"]) for row in rows], columns[1], rtol=1e-4, atol=1e-4
    )


def test_only_streams_of_one_job_are_compared(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    score = ("score", trained / "digits.pt")
    more = ("-d", "energy", "--stream", "-o")
    for images, name in ((trained / "test.npz", "id.csv"), ("noise:blob?n=100", "blobs.csv")):
        assert oodcli(*score, images, *more, name).status == 0
    two = ("evaluate", "--id", "id.csv", "--ood", "blobs=blobs.csv", "--resamples=0")
    sentence = (
        "id.csv and blobs.csv are of different jobs, but energy[stream] compares within one job "
        "only: score ID and OOD images in one job and split its file, or compare the plain scores "
        "(-d energy)"
    )
    fails(sentence, *two)
    fails(sentence, *two, "-d", "energy[stream]")
    assert oodcli(*two, "-d", "energy").status == 0

    lines = (tmp_path / "id.csv").read_text("utf-8").splitlines(keepends=True)
    for name, part in (("a.csv", lines[1:300]), ("b.csv", lines[300:])):
        (tmp_path / name).write_text("".join([lines[0], *part]), "utf-8")
    one = ("evaluate", "--id", "a.csv", "--ood", "b=b.csv", "--resamples=0", "--json")
    assert oodcli(*one).status == 0  # nothing is known of either
    for name in ("a.csv", "b.csv"):
        shutil.copy("id.csv.json", f"{name}.json")
    result = oodcli(*one)
    assert result.status == 0, result.err
    assert "energy[stream]" in result.out


def test_a_stream_resumes(trained, tmp_path, monkeypatch):
    from oodcli.jobs.kept import Kept

    words = ("score", trained / "digits.pt", trained / "test.npz", "-d", "energy", "--stream")
    words += ("--batch-size", 128)
    assert oodcli(*words, "-o", tmp_path / "whole.csv").status == 0
    write = Kept.write

    def once(self, number, batch):
        write(self, number, batch)
        if len(self.numbers) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "write", once)
        assert oodcli(*words, "-o", tmp_path / "parts.csv").status == 130
    result = oodcli(*words, "-o", tmp_path / "parts.csv")
    assert "resuming: 256 images" in result.err
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_what_is_no_whole_stream_is_refused(trained, small, tmp_path):
    out = tmp_path / "s.csv"
    score = ("score", trained / "digits.pt", trained / "test.npz", "-d", "energy", "--stream")
    fails("--shard 1/2: --stream compares", *score, "--shard", "1/2", "-o", out, leaves=tmp_path)
    fails("--engine ray: --stream compares", *score, "--engine", "ray", "-o", out, leaves=tmp_path)
    few = ("score", small / "net.pt", "noise:uniform?n=99", "-d", "energy", "--stream", "-o", out)
    fails("expected at least 100, but got 99", *few, leaves=tmp_path)
    cache = tmp_path / "c.h5"
    extract = ("extract", small / "net.pt", "noise:uniform?n=120", "--record", "logits")
    assert oodcli(*extract, "-o", cache).status == 0
    fails("compares images by layers.mean", "score", cache, "-d", "energy", "--stream", "-o", out)
