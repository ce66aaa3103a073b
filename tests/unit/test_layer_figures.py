"""The papers' figures from feature caches: the numbers that are drawn, the files, and refusals."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from commands import oodcli
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

from oodcli import detectors
from oodcli.detectors.c2ir import C2IR
from oodcli.detectors.one_class_sum import SUMMED
from oodcli.features import BatchNorm
from oodcli.files import cache as cache_file
from oodcli.files.artefact import read_artefact
from oodcli.files.cache import open_cache
from oodcli.metrics import MEAN, auroc
from oodcli.report import layers
from oodcli.report.ablation import STATISTICS, WEIGHTS, ablate, ablation_figure
from oodcli.report.evaluation import ID
from oodcli.report.indicators import QUANTILES, indicator_boxes, indicators_figure
from oodcli.report.layer_figures import (
    FIGURES,
    SUFFIXES,
    layers_figure,
    map_figure,
    transitions_figure,
)
from oodcli.report.layers import BATCHNORM, VIRTUAL, LayerInputs, Map

ALWAYS = [name + end for name in ("indicators", "layers", "map") for end in (".png", ".svg")]


@pytest.fixture(scope="module")
def folder(fitted, tmp_path_factory) -> Path:
    """id.h5, of images and labels; far.h5 and near.h5 of noise; v.h5, v.features.h5; lsgm fitted
    on the images."""
    made = tmp_path_factory.mktemp("layers")
    network = fitted / "digits.pt"
    with np.load(fitted / "test.npz") as found:
        arrays = {name: found[name] for name in found.files}
    arrays["images"], arrays["labels"] = arrays["images"][:150], arrays["labels"][:150].copy()
    arrays["labels"][5] = -1  # unknown
    np.savez(made / "some.npz", **arrays)
    steps = (
        ("extract", network, made / "some.npz", "-o", made / "id.h5"),
        ("extract", network, "noise:blob?n=40", "-o", made / "far.h5"),
        ("extract", network, "noise:uniform?n=30", "-o", made / "near.h5"),
        ("extract", network, "noise:blob?n=9", "--record", "logits", "-o", made / "logits.h5"),
        (
            *("extract", network, fitted / "v.h5", "--record", "logits,layers.mean"),
            *("-o", made / "v.plain.h5"),
        ),
        ("extract", network, fitted / "v.h5", "--record", "logits", "-o", made / "v.logits.h5"),
        (
            *("fit", made / "id.h5", "-d", "lsgm", "-d", "mds", "-p", "lsgm.components=3"),
            *("-p", "lsgm.mixture=em", "-p", "lsgm.pca=4", "-o", made),
        ),
    )
    for words in steps:
        result = oodcli(*words)
        assert result.status == 0, result.err
    for name in ("v.h5", "v.features.h5"):
        os.link(fitted / name, made / name)
    with h5py.File(made / "far.h5", "r+") as file:  # of other classes, so they do not count
        file["label"][:] = np.arange(40) % 10
    other = made / "other.h5"
    other.write_bytes((made / "far.h5").read_bytes())
    with h5py.File(other, "r+") as file:
        file.attrs["checkpoint_sha256"] = "f" * 64
    return made


@pytest.fixture
def inputs(folder):
    with ExitStack() as stack:

        def opened(name: str):
            return stack.enter_context(open_cache(folder / name))

        yield LayerInputs(
            opened("id.h5"),
            {"far": opened("far.h5"), "near": opened("near.h5")},
            opened("v.features.h5"),
            folder / "v.h5",
            read_artefact(folder / "lsgm.safetensors"),
        )


FILES = {ID: "id.h5", "far": "far.h5", "near": "near.h5", VIRTUAL: "v.features.h5"}


def words(folder: Path, *more: object) -> tuple[object, ...]:
    sets = ("--ood", f"far={folder / 'far.h5'}", "--ood", f"near={folder / 'near.h5'}")
    return ("evaluate", "--layers", folder / "id.h5", *sets, *more)


def everything(folder: Path) -> tuple[object, ...]:
    artefact = ("-d", folder / "lsgm.safetensors")
    return ("--virtual", folder / "v.features.h5", "--images", folder / "v.h5", *artefact)


# ---------------------------------------------------------------------------- numbers


blocks_of_rows = pytest.mark.parametrize("rows", [pytest.param(7, marks=pytest.mark.slow), 8192])


def of_class(file: h5py.File, row: int, labelled: bool) -> int:
    label = int(file["label"][row])
    return label if labelled and label >= 0 else int(np.argmax(file["logits"][row]))


def naive(folder: Path, layer: str) -> tuple[dict[str, float], dict[str, float]]:
    """Both distances of one layer, row by row in float64."""
    means, rows = {}, {}
    for name, path in FILES.items():
        with h5py.File(folder / path) as file:
            values = file[f"batchnorm/{layer}/mean"][()].astype(np.float64)
            running = file[f"batchnorm/{layer}/running_mean"][()].astype(np.float64)
            variance = file[f"batchnorm/{layer}/running_var"][()].astype(np.float64)
            sigma = np.sqrt(variance + float(file[f"batchnorm/{layer}/eps"][()]))
            labelled = name in (ID, VIRTUAL)
            classes = np.array([of_class(file, row, labelled) for row in range(len(values))])
        means[name] = {k: values[classes == k].mean(0) for k in set(classes.tolist())}
        rows[name] = {k: int((classes == k).sum()) for k in means[name]}
        means[name]["all"] = values.mean(0)
    far = {name: float(np.mean(abs(means[name]["all"] - running) / sigma)) for name in FILES}
    near = {}
    for name in (BATCHNORM, "far", "near", VIRTUAL):
        total = weight = 0.0
        for k, count in rows[ID if name == BATCHNORM else name].items():
            if k in rows[ID]:
                mean = running if name == BATCHNORM else means[name][k]
                total += count * np.mean(abs(mean - means[ID][k]) / sigma)
                weight += count
        near[name] = total / weight
    return far, near


@blocks_of_rows
def test_the_curves_are_those_of_a_naive_computation(folder, inputs, monkeypatch, rows):
    monkeypatch.setattr(cache_file, "BLOCK_ROWS", rows)
    curves = layers.layer_curves(inputs)
    names = list(curves.from_batchnorm[ID])
    with h5py.File(folder / "id.h5") as file:
        assert set(names) == set(file["batchnorm"]) - {"input"}
        assert names == sorted(names, key=lambda name: file[f"batchnorm/{name}"].attrs["order"])
    figure = layers_figure(curves)
    for index, name in enumerate(names):
        far, near = naive(folder, name)
        for panel, expected, found in zip(
            figure.axes, (far, near), (curves.from_batchnorm, curves.from_id_class), strict=False
        ):
            assert list(found) == list(expected)
            for line, (each, value) in zip(panel.lines, expected.items(), strict=False):
                assert found[each][name] == pytest.approx(value, rel=1e-10)
                assert line.get_ydata()[index] == found[each][name]


def norm(mean: list[float], var: list[float]) -> BatchNorm:
    width = len(mean)
    return BatchNorm(
        *(torch.tensor(mean), torch.tensor(var), torch.ones(width), torch.zeros(width)), 0.0, 1
    )


def test_distances_by_hand():
    two = norm([0.0, 1.0], [4.0, 1.0])
    assert layers.deviation(torch.tensor([2.0, 1.0]).double(), two) == 0.5
    theirs = torch.tensor([[2.0, 0.0], [0.0, 4.0], [9.0, 9.0]]).double()
    ours = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]).double()
    rows, of_rows = torch.tensor([3, 1, 5]), torch.tensor([1, 2, 0])
    # 0.5 from class 0, which has three rows, and 2 from class 1; class 2 is in one set only
    found = layers.class_deviation(theirs, rows, ours, of_rows, two)
    assert found == pytest.approx((3 * 0.5 + 1 * 2) / 4)
    none = layers.class_deviation(theirs, rows, ours, torch.zeros(3, dtype=torch.int64), two)
    assert np.isnan(none)


@pytest.mark.parametrize("most", [20, 2000])
def test_the_map_is_made_of_principal_components(folder, inputs, monkeypatch, most):
    monkeypatch.setattr(layers, "SHOWN", most)
    monkeypatch.setattr(cache_file, "BLOCK_ROWS", 7)
    found = layers.feature_map(inputs, "pca", 0)
    parts = []
    for path in FILES.values():
        with h5py.File(folder / path) as file:
            rows = file["embedding"][()].astype(np.float64)
        count = min(most, len(rows))
        parts.append(rows[[round(k * (len(rows) - 1) / (count - 1)) for k in range(count)]])
    whole = np.concatenate(parts)
    centred = whole - whole.mean(0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    points = np.concatenate(list(found.points.values()))
    assert [len(each) for each in found.points.values()] == [len(each) for each in parts]
    for column in (0, 1):
        expected = centred @ axes[column]
        sign = np.sign(expected @ points[:, column])
        np.testing.assert_allclose(points[:, column], sign * expected, atol=1e-8)
    assert found.share == pytest.approx((values[:2] ** 2).sum() / (values**2).sum())
    drawn = map_figure(found, [str(k) for k in range(10)]).axes[0].lines
    for line, each in zip(drawn, found.points.values(), strict=True):
        np.testing.assert_array_equal(np.column_stack(line.get_data()), each)


def test_class_names_stand_amid_their_rows():
    points = {ID: np.array([[0.0, 0], [2, 2], [9, 9]]), "far": np.array([[5.0, 5]])}
    figure = map_figure(Map(points, np.array([1, 1, 0]), "tsne", None), ["a", "_$b"])
    texts = {each.get_text(): each.get_position() for each in figure.axes[0].texts}
    assert texts == {"a": (9, 9), r" _\$b": (1, 1)}


def test_transitions_are_shares_of_rows(folder, inputs, monkeypatch):
    monkeypatch.setattr(cache_file, "BLOCK_ROWS", 7)
    detector = inputs.lsgm.detector
    found = layers.transitions(inputs, detector)
    assert list(found) == list(FILES)
    before, after = detector.layer_names[:2]
    for name, path in FILES.items():
        counted = np.zeros_like(found[name][after])
        with h5py.File(folder / path) as file:
            count = len(file["path"])
            for row in range(count):
                here, there = (
                    detector.mixtures[layer].assigned(
                        torch.from_numpy(file[f"layers/{layer}/mean"][row : row + 1]).double()
                    )
                    for layer in (before, after)
                )
                counted[here, there] += 1
        np.testing.assert_allclose(found[name][after], counted / count)
    figure = transitions_figure(found, detector.layer_names)
    drawn = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(drawn, 100 * found[ID][after])


def test_the_fewest_paths_of_half_of_the_rows():
    assert layers.paths_of_half(np.array([[0.25, 0.25], [0.25, 0.25]])) == 2
    assert layers.paths_of_half(np.array([[0.1, 0.2], [0.3, 0.4]])) == 2
    assert layers.paths_of_half(np.array([[0.0, 1.0]])) == 1


def test_images_beside_each_other_are_of_one_class(folder, inputs):
    paths = layers.image_paths(inputs)
    assert list(paths) == list(range(10))
    with h5py.File(folder / "id.h5") as ids, h5py.File(folder / "v.h5") as virtual:
        for label, (real, made) in paths.items():
            mine = [row for row, each in enumerate(ids["label"]) if each == label][:5]
            assert real == [f"{folder / 'some.npz'}[{row}]" for row in mine]
            theirs = [row for row, each in enumerate(virtual["label"]) if each == label][:5]
            assert made == [f"{folder / 'v.h5'}[{row}]" for row in theirs]


def by_hand(file: h5py.File, name: str) -> np.ndarray:
    """An indicator of all rows, in float64."""
    if name == "msp":
        logits = file["logits"][()].astype(np.float64)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return 1 - odds.max(1) / odds.sum(1)
    if name == "norm":
        return -np.sqrt((file["embedding"][()].astype(np.float64) ** 2).sum(1))
    assert name == "dms"
    channels = []
    for norm in file["batchnorm"].values():
        mean, running, variance = (
            norm[part][()].astype(np.float64) for part in ("mean", "running_mean", "running_var")
        )
        channels.append((mean - running) ** 2 / (variance + float(norm["eps"][()])))
    return np.concatenate(channels, 1).mean(1)


def quantile(scores: np.ndarray, share: float) -> float:
    """Between the two rows beside it, linearly."""
    ordered = sorted(scores.tolist())
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@blocks_of_rows
@pytest.mark.slow
def test_boxes_are_quantiles_of_the_indicators(folder, inputs, monkeypatch, rows):
    monkeypatch.setattr(cache_file, "BLOCK_ROWS", rows)
    boxes, notes = indicator_boxes(inputs)
    assert notes == []
    assert tuple(boxes) == SUMMED
    figure = indicators_figure(boxes)
    for panel, (name, box) in zip(figure.axes, boxes.items(), strict=False):
        assert panel.get_title() == name
        assert list(box) == list(FILES)
        bars = [bar for bar in panel.patches if bar.get_height() < 1]  # the band is as high as all
        for k, (set_, path) in enumerate(FILES.items()):
            if name in ("msp", "norm", "dms"):
                with h5py.File(folder / path) as file:
                    scores = by_hand(file, name)
            else:
                kind = detectors.get(name)
                with open_cache(folder / path) as cache:
                    scores = np.concatenate([kind().score(b) for b in cache.rows(kind.needs)])
            expected = [quantile(scores, share) for share in QUANTILES]
            assert list(box[set_]) == [str(share) for share in QUANTILES]
            assert list(box[set_].values()) == pytest.approx(expected, rel=1e-6, abs=1e-9)
            assert bars[k].get_y() == pytest.approx(k - 0.3)
            assert bars[k].get_x() == box[set_]["0.25"]
            assert bars[k].get_x() + bars[k].get_width() == pytest.approx(box[set_]["0.75"])
        assert len(bars) == len(FILES)
    # the first panel, first set: both whiskers, their ends, and the median
    low, first, middle, third, high = boxes[SUMMED[0]][ID].values()
    whiskers, ends, median = (lines.get_segments() for lines in figure.axes[0].collections[:3])
    assert [line[:, 0].tolist() for line in whiskers] == [[low, first], [third, high]]
    assert [line[0, 0] for line in ends] == [low, high]
    assert [line[0, 0] for line in median] == [middle]


def test_only_means_of_squares_that_are_far_apart_have_a_logarithmic_axis():
    def box(low: float, high: float) -> dict[str, float]:
        return dict(zip(map(str, QUANTILES), np.linspace(low, high, 5).tolist(), strict=True))

    far = {ID: box(0.1, 0.2), "far": box(3, 5)}
    figure = indicators_figure({"msp": far, "dms": far, "dss": {ID: box(0, 0.1), "far": box(3, 5)}})
    assert [panel.get_xscale() for panel in figure.axes] == ["linear", "log", "linear"]
    for panel, least in zip(figure.axes, (0.1, 0.1, 0), strict=True):
        low, high = panel.get_xlim()
        assert low < least < 5 < high
    figure = indicators_figure({"dss-ext": {ID: box(0.5, 0.9), "far": box(1, 1)}})
    assert figure.axes[0].get_xlim()[1] > 1


def softmax(numbers: np.ndarray) -> np.ndarray:
    powers = np.exp(numbers - numbers.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def naive_c2ir(folder: Path, path: str, weights: str, statistics: str) -> np.ndarray:
    """Σ_l α_l |Σ_k β_k A_k − centre| of each row of a cache, in float64."""
    with h5py.File(folder / "v.features.h5") as file:
        norms = {
            name: one for name, one in file["layers"].items() if one.attrs["kind"] == "batchnorm"
        }
        names = sorted(norms, key=lambda name: norms[name].attrs["order"])
        labels = file["label"][()]

        def of_classes(rows: np.ndarray) -> np.ndarray:
            return np.stack([rows[labels == k].astype(np.float64).mean(0) for k in range(10)])

        beta, delta, centre = {}, [], {}
        for name in names:
            mean = of_classes(norms[name]["mean"][()])
            if statistics == "batchnorm":
                mean = file[f"batchnorm/{name}/bias"][()].astype(np.float64)[None]
            gradient = of_classes(norms[name]["gradient"][()])
            beta[name] = softmax(gradient if weights == "mgi" else 0 * gradient)
            delta.append((beta[name] * of_classes(norms[name]["sensitivity"][()])).sum(1))
            centre[name] = (beta[name] * mean).sum(1)
    alpha = softmax(np.stack(delta, 1))
    if weights == "uniform":
        alpha = np.full_like(alpha, 1 / len(names))
    elif weights == "penultimate":
        alpha = np.eye(len(names))[-1:].repeat(10, 0)
    with h5py.File(folder / path) as file:
        classes = file["logits"][()].argmax(1)
        total = np.zeros(len(classes))
        for k, name in enumerate(names):
            mean = (file[f"layers/{name}/mean"][()] * beta[name][classes]).sum(1)
            total += alpha[classes, k] * abs(mean - centre[name][classes])
    return total


@blocks_of_rows
def test_the_ablation_is_that_of_a_naive_computation(folder, inputs, monkeypatch, rows):
    monkeypatch.setattr(cache_file, "BLOCK_ROWS", rows)
    found, notes = ablate(inputs, 0)
    assert notes == []
    assert tuple(found) == STATISTICS
    for statistics, by_weights in found.items():
        assert tuple(by_weights) == WEIGHTS
        for weights, areas in by_weights.items():
            assert list(areas) == ["far", "near", MEAN]
            assert areas[MEAN] == pytest.approx((areas["far"] + areas["near"]) / 2)
            if weights == "random":
                continue
            ours = naive_c2ir(folder, "id.h5", weights, statistics)
            for name in ("far", "near"):
                theirs = naive_c2ir(folder, FILES[name], weights, statistics)
                area = np.mean(theirs[:, None] > ours) + np.mean(theirs[:, None] == ours) / 2
                assert areas[name] == pytest.approx(area, abs=1e-6), (statistics, weights)


def test_random_weights_are_those_of_the_seed(inputs):
    found = {seed: ablate(inputs, seed)[0] for seed in (0, 1)}
    for seed, by_statistics in found.items():
        for statistics, by_weights in by_statistics.items():
            detector = C2IR.fit(
                inputs.virtual.rows(C2IR.fit_needs(weights="random")),
                weights="random",
                statistics=statistics,
                seed=seed,
            )
            ours, theirs = (
                np.concatenate([detector.score(block) for block in cache.rows(C2IR.needs)])
                for cache in (inputs.id, inputs.ood["near"])
            )
            assert by_weights["random"]["near"] == auroc(ours, theirs)
    assert found[0]["virtual"]["random"] != found[1]["virtual"]["random"]
    assert found[0]["virtual"]["mgi"] == found[1]["virtual"]["mgi"]


@pytest.mark.parametrize("sets", [["one"], ["one", "two"]])
def test_bars_of_the_ablation_end_at_the_mean(sets):
    def areas(mean: float) -> dict[str, float]:
        return {name: mean + 0.1 * (k % 2) for k, name in enumerate(sets)} | {MEAN: mean}

    found = {"virtual": {"mgi": areas(0.875), "random": areas(0.25)}}
    found["batchnorm"] = {"mgi": areas(0.5), "random": areas(0.75)}
    figure = ablation_figure(found)
    panel = figure.axes[0]
    assert [bar.get_y() for bar in panel.patches] == [50] * 4
    assert [bar.get_height() for bar in panel.patches] == [37.5, -25, 0, 25]
    assert [text.get_text() for text in panel.get_xticklabels()] == ["mgi", "random"]
    minor = [text.get_text() for text in panel.get_xticklabels(minor=True)]
    assert sorted(minor) == ["25.0", "50.0", "75.0", "87.5"]
    heights = [line.get_ydata()[0] for line in panel.lines if line.get_marker() != "None"]
    marked = [100 * areas(mean)[name] for mean in (0.875, 0.25, 0.5, 0.75) for name in sets]
    assert heights == (marked if len(sets) > 1 else [])


# ---------------------------------------------------------------------------- files


@pytest.mark.slow
def test_all_figures_appear_and_are_the_same_again(folder, tmp_path):
    for name in ("one", "two"):
        result = oodcli(*words(folder, *everything(folder), "-o", tmp_path / name, "--json"))
        assert result.status == 0, result.err
    files = sorted(os.listdir(tmp_path / "one"))
    assert files == sorted(name + suffix for name in FIGURES for suffix in (".png", ".svg"))
    for name in files:
        one, two = ((tmp_path / each / name).read_bytes() for each in ("one", "two"))
        assert one == two, name
        assert one.startswith(b"\x89PNG" if name.endswith(".png") else b"<?xml")
    summary = json.loads(result.out)
    assert sorted(Path(each).name for each in summary["files"]) == files
    assert summary["notes"] == []
    assert list(summary["distance_from_batchnorm"]) == list(FILES)
    assert summary["distance_from_batchnorm"][ID]["bn1"] > 0
    assert tuple(summary["indicators"]) == SUMMED
    assert summary["indicators"]["msp"][VIRTUAL]["0.5"] < summary["indicators"]["msp"]["far"]["0.5"]
    assert list(summary["ablation"]) == ["virtual", "batchnorm"]
    assert list(summary["ablation"]["batchnorm"]["penultimate"]) == ["far", "near", "mean"]


@pytest.mark.slow
def test_what_is_not_asked_for_is_not_drawn(folder, tmp_path):
    result = oodcli(*words(folder, "-o", tmp_path))
    assert (result.status, result.out) == (0, ""), result.err
    assert sorted(os.listdir(tmp_path)) == ALWAYS
    before = {name: (tmp_path / name).read_bytes() for name in ALWAYS}
    result = oodcli(*words(folder, "-o", tmp_path))
    assert result.status == 1
    assert "layers.png exists: choose another -o, or overwrite it with --force" in result.err
    assert {name: (tmp_path / name).read_bytes() for name in ALWAYS} == before
    (tmp_path / "transitions.png").write_text("of a run before")
    (tmp_path / "roc.png").write_text("of a report")
    assert oodcli(*words(folder, "-o", tmp_path, "--force")).status == 0
    assert sorted(os.listdir(tmp_path)) == sorted([*ALWAYS, "roc.png"])


@pytest.mark.slow
def test_tsne_is_another_map_and_the_same_again(folder, tmp_path):
    for name, threads in (("one", 1), ("two", 3)):
        with threadpool_limits(threads):
            result = oodcli(*words(folder, "--map", "tsne", "-o", tmp_path / name))
        assert result.status == 0, result.err
    one, two = ((tmp_path / name / "map.svg").read_bytes() for name in ("one", "two"))
    assert one == two
    assert b"t-SNE" in one
    assert b"principal" not in one


@pytest.mark.slow
def test_what_a_cache_lacks_is_a_note(folder, tmp_path):
    only = ("evaluate", "--layers", folder / "id.h5", "--ood", f"a={folder / 'logits.h5'}")
    result = oodcli(*only, "--images", folder / "v.h5", "-o", tmp_path / "a")
    assert result.status == 0, result.err
    assert "note: no figure 'layers': " in result.err
    assert "logits.h5 has no batchnorm.mean" in result.err
    assert "extract CHECKPOINT IMAGES --for dms" in result.err
    assert "logits.h5 has no embedding" in result.err
    assert "extract CHECKPOINT IMAGES --for knn" in result.err
    assert "no BatchNorm layer" not in result.err
    assert (
        "note: figure 'indicators' without norm, norm+, act, act+, proj, ang, ang++, " in result.err
    )
    assert "extract CHECKPOINT IMAGES --for 1c-sum" in result.err
    drawn = [name + suffix for name in ("impressions", "indicators") for suffix in SUFFIXES]
    assert sorted(os.listdir(tmp_path / "a")) == drawn
    text = (tmp_path / "a" / "indicators.svg").read_text(encoding="utf-8")
    assert ">entropy</text>" in text
    assert ">norm</text>" not in text
    result = oodcli(*only, "--virtual", folder / "v.features.h5", "-o", tmp_path / "b", "--json")
    assert result.status == 0, result.err
    summary = json.loads(result.out)
    assert list(summary["indicators"]) == ["t1000", "msp", "entropy"]
    assert summary["ablation"] is None
    assert summary["notes"] == [line[6:] for line in result.err.splitlines()[:4]]
    assert "note: no figure 'ablation': " in result.err
    assert "logits.h5 has no layers.mean" in result.err
    assert "extract CHECKPOINT IMAGES --for c2ir" in result.err


def test_a_figure_takes_some_record(folder, tmp_path):
    bare = tmp_path / "bare.h5"
    bare.write_bytes((folder / "logits.h5").read_bytes())
    with h5py.File(bare, "r+") as file:
        del file["logits"]
    result = oodcli("evaluate", "--layers", bare, "--ood", f"a={bare}", "-o", tmp_path / "new")
    assert result.status == 1
    assert "no figure can be drawn" in result.err
    assert "no figure 'indicators': " in result.err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_without_gradients_the_ablation_has_no_mgi(folder, tmp_path):
    command = words(folder, "--virtual", folder / "v.plain.h5", "-o", tmp_path / "a", "--json")
    result = oodcli(*command)
    assert result.status == 0, result.err
    assert "note: figure 'ablation' without mgi: " in result.err
    assert "v.plain.h5 has no layers.gradient" in result.err
    assert "oodcli extract CHECKPOINT VIRTUAL.h5 --for c2ir" in result.err
    assert list(json.loads(result.out)["ablation"]["virtual"]) == list(WEIGHTS[1:])
    text = (tmp_path / "a" / "ablation.svg").read_text(encoding="utf-8")
    assert ">uniform</text>" in text
    assert ">mgi</text>" not in text
    result = oodcli(*words(folder, "--virtual", folder / "v.logits.h5", "-o", tmp_path / "b"))
    assert result.status == 0, result.err
    assert "v.logits.h5 has no layers.mean" in result.err
    assert not (tmp_path / "b" / "ablation.png").exists()


def test_figures_that_are_not_asked_for_now_are_refused_too(folder, tmp_path):
    for name in ("ablation.svg", "indicators.png"):
        (tmp_path / name).write_text("of a run before")
        result = oodcli(*words(folder, "-o", tmp_path))
        assert result.status == 1
        assert f"{name} exists: choose another -o, or overwrite it with --force" in result.err
        assert os.listdir(tmp_path) == [name]
        (tmp_path / name).unlink()


@pytest.mark.slow
def test_a_layer_that_is_gone_is_a_note(folder, tmp_path):
    broken = tmp_path / "broken.h5"
    broken.write_bytes((folder / "far.h5").read_bytes())
    with h5py.File(broken, "r+") as file:
        del file["layers/bn1"]
    more = ("--ood", f"broken={broken}", "--virtual", folder / "v.features.h5")
    result = oodcli(*words(folder, *more, "-o", tmp_path / "new"))
    assert result.status == 0, result.err
    assert "note: no figure 'ablation': " in result.err
    assert "bn1" in result.err
    assert not (tmp_path / "new" / "ablation.png").exists()


@pytest.mark.slow
def test_real_images_that_are_gone_are_left_out(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("oodcli.report.thumbnails._container", lambda path: None)
        result = oodcli(*words(folder, *everything(folder), "-o", tmp_path / "none"))
        assert result.status == 1
        assert "no virtual image of these classes can be opened" in result.err
        assert not (tmp_path / "none").exists()
    moved = folder / "some.npz"
    moved.rename(folder / "moved.npz")
    try:
        result = oodcli(*words(folder, *everything(folder), "-o", tmp_path / "v"))
    finally:
        (folder / "moved.npz").rename(moved)
    assert result.status == 0, result.err
    assert "note: impressions without real images: " in result.err
    text = (tmp_path / "v" / "impressions.svg").read_text(encoding="utf-8")
    assert "virtual images" in text
    assert "real images" not in text


def whole(figure: Figure) -> None:
    """Nothing lies beyond the page, and no panel on another."""
    figure.canvas.draw()
    drawn = figure.get_tightbbox()  # inches
    assert min(drawn.x0, drawn.y0) >= 0
    assert drawn.x1 <= figure.get_figwidth()
    assert drawn.y1 <= figure.get_figheight()
    panels = [axes.get_tightbbox() for axes in figure.axes]
    for k, one in enumerate(panels):
        assert not any(one.overlaps(other) for other in panels[k + 1 :])


@pytest.mark.parametrize("count", [1, 200])
@pytest.mark.slow
def test_nothing_is_cut_off(count):
    long = "a-very-long-name-of-an-ood-set-$x^$"
    names = {f"stage{k}.block.{k}.of_a_deep_network.bn": 0.1 * k for k in range(count)}
    whole(layers_figure(layers.Curves({ID: names, long: names}, {BATCHNORM: names, long: names})))
    points = {ID: np.eye(2), long: np.eye(2), VIRTUAL: np.eye(2)}
    whole(map_figure(Map(points, np.array([0, 1]), "pca", 0.5), [long, "b"]))
    sets = [ID, long, VIRTUAL][: 1 + count]
    shares = np.full((50, 50), 1 / 2500)
    whole(transitions_figure({name: {"b": shares} for name in sets}, ["a", "b"]))
    many = [f"{k}-{long}" for k in range(min(count, 8))]
    box = {str(share): 1e-3 + share * (k + 1) for k, share in enumerate(QUANTILES)}
    whole(indicators_figure({name: dict.fromkeys([ID, *many, VIRTUAL], box) for name in SUMMED}))
    whole(indicators_figure({name: dict.fromkeys([ID, *many], box) for name in SUMMED[:3]}))
    areas = {**dict.fromkeys(many, 0.01), MEAN: 1.0}
    whole(ablation_figure({each: dict.fromkeys(WEIGHTS, areas) for each in STATISTICS}))


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("sentence", "options"),
    [
        ("give a folder for them with -o DIR", ()),
        ("--id cannot be used with --layers", ("--id", "id.csv", "-o", "new")),
        ("--min-auroc cannot be used with --layers", ("--min-auroc", "0.9", "-o", "new")),
        ("--map spiral: expected pca or tsne", ("--map", "spiral", "-o", "new")),
        ("none.h5 does not exist", ("--virtual", "none.h5", "-o", "new")),
        ("far.h5 holds features of real images", ("--virtual", "far.h5", "-o", "new")),
        ("has format 'oodcli-features'", ("--images", "far.h5", "-o", "new")),
        ("is of mds, but only lsgm has transitions", ("-d", "mds.safetensors", "-o", "new")),
        ("msp does not exist", ("-d", "msp", "-o", "new")),
        ("give -d once", ("-d", "lsgm.safetensors", "-d", "lsgm.safetensors", "-o", "new")),
        ("--ood ID: the figures use this name", ("--ood", "ID=far.h5", "-o", "new")),
        ("--ood mean: the figures use this name", ("--ood", "mean=far.h5", "-o", "new")),
        ("given twice", ("--ood", "far=far.h5", "-o", "new")),
        ("some.npz is a file, expected a folder", ("-o", "some.npz")),
    ],
)
def test_faults_are_one_sentence(folder, monkeypatch, sentence, options):
    monkeypatch.chdir(folder)
    before = sorted(os.listdir())
    result = oodcli(*words(Path(), *options))
    assert (result.status, result.out) == (1, "")
    assert sentence in result.err
    assert len(result.err.splitlines()) == 1
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("option", ["--virtual", "--images", "--map"])
def test_scores_take_no_option_of_the_layers(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = oodcli("evaluate", "--id", "a.csv", "--ood", "b=b.csv", option, "pca")
    assert result.status == 1
    assert f"{option} cannot be used with --id" in result.err
    result = oodcli("evaluate", "--ood", "b=b.csv")
    assert result.status == 2
    assert "give scores with --id, or feature caches with --layers" in result.err


def test_caches_of_other_checkpoints_are_refused(folder, tmp_path):
    def fails(*more: object) -> str:
        result = oodcli(*words(folder, *more, "-o", tmp_path / "new"))
        assert result.status == 1
        assert not (tmp_path / "new").exists()
        [line] = result.err.splitlines()
        return line

    line = fails("--ood", f"other={folder / 'other.h5'}")
    assert f"{folder / 'other.h5'} was extracted with the checkpoint ffffffffffff…" in line
    assert f"but {folder / 'id.h5'} with" in line
    for name, option in (("v.features.h5", "--virtual"), ("v.h5", "--images")):
        changed = tmp_path / name
        changed.write_bytes((folder / name).read_bytes())
        with h5py.File(changed, "r+") as file:
            file.attrs["checkpoint_sha256"] = "f" * 64
        assert f"{changed} was " in fails(option, changed)
        with h5py.File(changed, "r+") as file, h5py.File(folder / name) as good:
            file.attrs["checkpoint_sha256"] = good.attrs["checkpoint_sha256"]
            made = json.loads(file.attrs["preprocessing"])
            made["mean"] = [0.25 for _ in made["mean"]]
            file.attrs["preprocessing"] = json.dumps(made)
        assert "use the same options or model card" in fails(option, changed)


def test_rows_that_are_not_finite_do_not_count(folder, tmp_path):
    broken = tmp_path / "broken.h5"
    broken.write_bytes((folder / "far.h5").read_bytes())
    with h5py.File(broken, "r+") as file:
        file["embedding"][3] = np.inf
        file["logits"][4] = np.nan
    with open_cache(folder / "id.h5") as ours, open_cache(broken) as theirs:
        inputs = LayerInputs(ours, {"far": theirs})
        assert len(layers.feature_map(inputs, "pca", 0).points["far"]) == 38
        assert int(layers.class_means(theirs, labelled=False).rows.sum()) == 39
        boxes, _ = indicator_boxes(inputs)
        with h5py.File(folder / "far.h5") as file:
            kept = np.delete(by_hand(file, "msp"), [3, 4])
        assert boxes["msp"]["far"]["0.95"] == pytest.approx(quantile(kept, 0.95))
    with h5py.File(broken, "r+") as file:
        file["logits"][:] = np.nan
    result = oodcli(*words(folder, "--ood", f"broken={broken}", "-o", tmp_path / "new"))
    assert result.status == 1
    assert "broken.h5 has no row with finite numbers" in result.err
