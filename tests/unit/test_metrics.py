"""Metrics: hand-computed cases, a naive definition of each, scikit-learn, and their properties."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oodcli import metrics
from oodcli.metrics import CONVENTIONS, MEAN, Estimate, evaluate, evaluate_sets

FUNCTIONS: dict[str, Callable[..., float]] = {
    "auroc": metrics.auroc,
    "fpr95": metrics.fpr95,
    "tnr95": metrics.tnr95,
    "fpr95-ood": metrics.fpr95_ood,
    "aupr-in": metrics.aupr_in,
    "aupr-out": metrics.aupr_out,
    "detection-accuracy": metrics.detection_accuracy,
    "tpr10": metrics.tpr10,
}

# Few distinct values, so that ties are the rule; infinity among them.
tied = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0, math.inf]), min_size=1, max_size=40)
spread = st.lists(st.floats(-1e6, 1e6) | st.just(math.inf), min_size=1, max_size=40)
scores = tied | spread


def naive(id_scores: list[float], ood_scores: list[float]) -> dict[str, Fraction]:
    """The definitions, threshold by threshold, in exact arithmetic."""
    n, m = len(id_scores), len(ood_scores)
    thresholds = sorted({*id_scores, *ood_scores})

    def share(hits: Iterable[bool]) -> Fraction:
        held = list(hits)
        return Fraction(sum(held), len(held))

    id_accepted = {t: share(s <= t for s in id_scores) for t in thresholds}
    ood_accepted = {t: share(s <= t for s in ood_scores) for t in thresholds}
    wins = sum(
        Fraction(1) if o > i else Fraction(1, 2) if o == i else Fraction(0)
        for o in ood_scores
        for i in id_scores
    )
    t95 = min(t for t in thresholds if id_accepted[t] >= Fraction(95, 100))
    t95_ood = max(t for t in thresholds if share(s >= t for s in ood_scores) >= Fraction(95, 100))

    aupr_in = aupr_out = Fraction(0)
    for t in thresholds:
        id_below = sum(s <= t for s in id_scores)
        ood_below = sum(s <= t for s in ood_scores)
        gained = Fraction(sum(s == t for s in id_scores), n)
        aupr_in += gained * Fraction(id_below, id_below + ood_below)
        id_above = sum(s >= t for s in id_scores)
        ood_above = sum(s >= t for s in ood_scores)
        gained = Fraction(sum(s == t for s in ood_scores), m)
        aupr_out += gained * Fraction(ood_above, id_above + ood_above)

    halves = [(id_accepted[t] + 1 - ood_accepted[t]) / 2 for t in thresholds]
    nothing_accepted = Fraction(1, 2)
    return {
        "auroc": wins / (n * m),
        "fpr95": ood_accepted[t95],
        "tnr95": 1 - ood_accepted[t95],
        "fpr95-ood": share(s >= t95_ood for s in id_scores),
        "aupr-in": aupr_in,
        "aupr-out": aupr_out,
        "detection-accuracy": max([nothing_accepted, *halves]),
        "tpr10": max(
            1 - ood_accepted[t] for t in thresholds if 1 - id_accepted[t] <= Fraction(10, 100)
        ),
    }


def test_the_names_are_those_of_the_files() -> None:
    assert list(CONVENTIONS) == list(FUNCTIONS)
    assert list(evaluate([0.0], [1.0], resamples=2)) == list(FUNCTIONS)


@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "expected"),
    [
        pytest.param(
            [1.0, 3.0],
            [2.0, 4.0],
            {
                "auroc": 3 / 4,  # 2>1, 4>1, 4>3; not 2>3
                "tnr95": 1 / 2,  # both ID rows needed: t = 3, only 4 is above
                "fpr95": 1 / 2,
                "fpr95-ood": 1 / 2,  # both OOD rows needed: t = 2, and 3 is above it
                "aupr-in": 1 / 2 * 1 + 1 / 2 * 2 / 3,
                "aupr-out": 1 / 2 * 1 + 1 / 2 * 2 / 3,
                "detection-accuracy": 3 / 4,
                "tpr10": 1 / 2,
            },
            id="interleaved",
        ),
        pytest.param(
            [1.0],
            [1.0],
            {
                "auroc": 1 / 2,
                "tnr95": 0.0,  # OOD tied with the threshold is accepted
                "fpr95": 1.0,
                "fpr95-ood": 1.0,
                "aupr-in": 1 / 2,
                "aupr-out": 1 / 2,
                "detection-accuracy": 1 / 2,
                "tpr10": 0.0,
            },
            id="one tie",
        ),
        pytest.param(
            [0.0, 1.0],
            [math.inf, 1.0, 2.0],
            {
                "auroc": (3 + 2 + 1 / 2) / 6,
                "tnr95": 2 / 3,
                "fpr95": 1 / 3,
                "fpr95-ood": 1 / 2,
                "aupr-in": 1 / 2 * 1 + 1 / 2 * 2 / 3,
                "aupr-out": 1 / 3 + 1 / 3 + 1 / 3 * 3 / 4,
                "detection-accuracy": (1 + 2 / 3) / 2,
                "tpr10": 2 / 3,
            },
            id="a tie and an infinity",
        ),
        pytest.param(
            [0.0, math.inf],
            [math.inf, math.inf],
            {
                "auroc": 3 / 4,
                "tnr95": 0.0,
                "fpr95": 1.0,
                "fpr95-ood": 1 / 2,
                "aupr-in": 1 / 2 * 1 + 1 / 2 * 2 / 4,
                "aupr-out": 2 / 3,
                "detection-accuracy": 3 / 4,
                "tpr10": 0.0,
            },
            id="infinite on both sides",
        ),
        pytest.param(
            [3.0, 4.0],
            [1.0, 2.0],
            {
                "auroc": 0.0,
                "tnr95": 0.0,
                "fpr95": 1.0,
                "fpr95-ood": 1.0,
                "aupr-in": 1 / 2 * 1 / 3 + 1 / 2 * 2 / 4,
                "aupr-out": 1 / 2 * 1 / 3 + 1 / 2 * 2 / 4,
                "detection-accuracy": 1 / 2,
                "tpr10": 0.0,
            },
            id="the wrong way round",
        ),
    ],
)
def test_by_hand(
    id_scores: list[float], ood_scores: list[float], expected: dict[str, float]
) -> None:
    for name, value in expected.items():
        assert FUNCTIONS[name](id_scores, ood_scores) == pytest.approx(value, abs=1e-15), name


def test_the_threshold_is_the_95th_of_100_id_scores() -> None:
    id_scores = np.arange(1.0, 101.0)
    # 0.95 * 100 is 95 exactly, and nothing is interpolated between 95 and 96.
    assert metrics.tnr95(id_scores, [95.0]) == 0.0
    assert metrics.tnr95(id_scores, [95.001]) == 1.0
    assert metrics.tpr10(id_scores, [90.0, 90.5]) == 0.5
    # 19 of 20 are 95 %, in spite of 0.95 * 20 > 19 in some roundings; of 21, 20 are needed.
    assert metrics.tnr95(np.arange(1.0, 21.0), [19.5]) == 1.0
    assert metrics.tnr95(np.arange(1.0, 22.0), [19.5, 20.5]) == 0.5


def test_the_two_fpr95_are_different_numbers() -> None:
    id_scores = np.r_[np.zeros(90), np.full(10, 5.0)]
    ood_scores = np.r_[np.full(90, 3.0), np.full(10, -1.0)]
    assert metrics.fpr95(id_scores, ood_scores) == 1.0
    assert metrics.fpr95_ood(id_scores, ood_scores) == 1.0
    assert metrics.fpr95_ood(id_scores, np.full(10, 3.0)) == pytest.approx(0.1)
    assert metrics.fpr95(id_scores, np.full(10, 3.0)) == 1.0


@settings(deadline=None)
@given(scores, scores)
def test_against_the_definitions(id_scores: list[float], ood_scores: list[float]) -> None:
    for name, value in naive(id_scores, ood_scores).items():
        got = FUNCTIONS[name](id_scores, ood_scores)
        assert got == pytest.approx(float(value), abs=1e-12), name


@pytest.mark.parametrize("decimals", [12, 1, 0])
def test_against_scikit_learn(decimals: int) -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    rng = np.random.default_rng(decimals)
    id_scores = rng.normal(size=3000).round(decimals)
    ood_scores = rng.normal(0.8, 1.5, size=700).round(decimals)
    both = np.r_[id_scores, ood_scores]
    is_ood = np.r_[np.zeros(3000), np.ones(700)]
    got = evaluate(id_scores, ood_scores, resamples=0)
    assert got["auroc"].value == pytest.approx(roc_auc_score(is_ood, both), abs=1e-12)
    assert got["aupr-out"].value == pytest.approx(average_precision_score(is_ood, both), abs=1e-12)
    assert got["aupr-in"].value == pytest.approx(
        average_precision_score(1 - is_ood, -both), abs=1e-12
    )
    fpr, tpr, _ = roc_curve(is_ood, both, drop_intermediate=False)
    assert got["fpr95-ood"].value == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-12)
    assert got["tpr10"].value == pytest.approx(tpr[fpr <= 0.1].max(), abs=1e-12)
    assert got["detection-accuracy"].value == pytest.approx(((tpr + 1 - fpr) / 2).max(), abs=1e-12)
    fpr, tpr, _ = roc_curve(1 - is_ood, -both, drop_intermediate=False)
    assert got["fpr95"].value == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-12)


@settings(deadline=None)
@given(tied, tied)
def test_only_the_order_of_the_scores_matters(
    id_scores: list[float], ood_scores: list[float]
) -> None:
    def stretched(rows: list[float]) -> list[float]:
        return [s if s == math.inf else math.exp(s) * 1e-3 - 7.0 for s in rows]

    for name, metric in FUNCTIONS.items():
        assert metric(id_scores, ood_scores) == metric(
            stretched(id_scores)[::-1], stretched(ood_scores)[::-1]
        ), name


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1), st.lists(st.integers(-3, 3), min_size=1))
def test_swapping_the_classes_and_the_sign(id_rows: list[int], ood_rows: list[int]) -> None:
    id_scores, ood_scores = np.array(id_rows, float), np.array(ood_rows, float)
    swapped = (-ood_scores, -id_scores)
    pairs = {"auroc": "auroc", "aupr-in": "aupr-out", "fpr95": "fpr95-ood"}
    pairs["detection-accuracy"] = "detection-accuracy"
    for name, other in pairs.items():
        assert FUNCTIONS[name](id_scores, ood_scores) == pytest.approx(
            FUNCTIONS[other](*swapped), abs=1e-12
        ), name
    assert metrics.auroc(id_scores, ood_scores) == pytest.approx(
        1 - metrics.auroc(ood_scores, id_scores), abs=1e-12
    )


def test_separated_scores_are_perfect_however_large() -> None:
    id_scores, ood_scores = [-1e300, -800.0, -799.0], [1e300, math.inf]
    for name, metric in FUNCTIONS.items():
        expected = 0.0 if name in metrics.LOWER_IS_BETTER else 1.0
        assert metric(id_scores, ood_scores) == expected, name


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "at least one score"),
        ([0.0, math.nan], "row 1 is nan"),
        ([-math.inf, 0.0], "row 0 is -inf"),
        ([[0.0]], r"shape \(1, 1\)"),
    ],
)
def test_refused(name: str, bad: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=f"id_scores: .*{message}"):
        FUNCTIONS[name](bad, [1.0])
    with pytest.raises(ValueError, match=f"ood_scores: .*{message}"):
        FUNCTIONS[name]([1.0], bad)


def test_refused_sets() -> None:
    with pytest.raises(ValueError, match="at least one OOD set"):
        evaluate_sets([1.0], {})
    with pytest.raises(ValueError, match="cannot be called 'mean'"):
        evaluate_sets([1.0], {MEAN: [1.0]})
    with pytest.raises(ValueError, match="ood_scores far: row 0 is nan"):
        evaluate_sets([1.0], {"far": [math.nan]})
    with pytest.raises(ValueError, match="resamples must be 0 or more"):
        evaluate([1.0], [1.0], resamples=-1)


def test_nothing_is_changed() -> None:
    id_scores, ood_scores = np.array([3.0, 1.0]), np.array([2.0, 0.0])
    id_scores.flags.writeable = ood_scores.flags.writeable = False
    evaluate(id_scores, ood_scores, resamples=5)


def test_the_values_of_evaluate_are_the_metrics() -> None:
    rng = np.random.default_rng(0)
    id_scores, ood_scores = rng.normal(size=300).round(1), rng.normal(1, size=50).round(1)
    for name, estimate in evaluate(id_scores, ood_scores, resamples=3).items():
        assert estimate.value == FUNCTIONS[name](id_scores, ood_scores)


def test_no_resamples_no_interval() -> None:
    estimate = evaluate([0.0, 1.0], [1.0, 2.0], resamples=0)["auroc"]
    assert estimate.value == 7 / 8
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_interval_against_a_naive_bootstrap(name: str) -> None:
    """The weights must do what drawing rows does, to the last row: the same draws, one by one."""
    rng = np.random.default_rng(1)
    id_scores = np.r_[rng.normal(size=57).round(1), np.inf]
    ood_scores = np.r_[rng.normal(0.7, size=23).round(1), np.inf, np.inf]
    id_seed, ood_seed = np.random.SeedSequence(5).spawn(2)
    id_draws = np.random.default_rng(id_seed).integers(58, size=(40, 58))
    ood_draws = np.random.default_rng(ood_seed).integers(25, size=(40, 25))
    naively = [
        FUNCTIONS[name](id_scores[i], ood_scores[o])
        for i, o in zip(id_draws, ood_draws, strict=True)
    ]
    got = evaluate(id_scores, ood_scores, resamples=40, seed=5)[name]
    assert got.low == pytest.approx(np.quantile(naively, 0.025), abs=1e-12)
    assert got.high == pytest.approx(np.quantile(naively, 0.975), abs=1e-12)


def test_the_interval_against_delong() -> None:
    """AUROC's interval has the width of DeLong's standard error."""
    rng = np.random.default_rng(2)
    id_scores, ood_scores = rng.normal(size=1000), rng.normal(1, size=300)
    wins = ood_scores[:, None] > id_scores  # (300, 1000)
    error = math.sqrt(
        wins.mean(axis=1).var(ddof=1) / len(ood_scores)
        + wins.mean(axis=0).var(ddof=1) / len(id_scores)
    )
    got = evaluate(id_scores, ood_scores, resamples=2000)["auroc"]
    assert (got.high - got.low) / (2 * 1.96) == pytest.approx(error, rel=0.08)
    assert got.low < got.value < got.high


def test_the_mean_is_the_macro_average_with_id_drawn_once() -> None:
    rng = np.random.default_rng(3)
    id_scores = rng.normal(size=400)
    ood = {"a": rng.normal(1, size=50), "b": rng.normal(2, size=500)}
    got = evaluate_sets(id_scores, ood, resamples=200)
    assert list(got) == ["a", "b", MEAN]
    for name in FUNCTIONS:
        assert got[MEAN][name].value == pytest.approx((got["a"][name][0] + got["b"][name][0]) / 2)
    # Twice the same set: drawn apart, so the mean is less uncertain than either.
    twice = evaluate_sets(id_scores[:50], {"a": ood["b"], "b": ood["b"]}, resamples=400)
    widths = {name: twice[name]["auroc"].high - twice[name]["auroc"].low for name in twice}
    assert widths[MEAN] < max(widths["a"], widths["b"])
    # But 50 ID rows are the greater part of it, and those are drawn together.
    assert widths[MEAN] > 0.9 * min(widths["a"], widths["b"])


@settings(max_examples=20, deadline=None)
@given(block=st.integers(1, 3000))
def test_the_interval_does_not_depend_on_the_blocks(block: int) -> None:
    rng = np.random.default_rng(4)
    id_scores, ood_scores = rng.normal(size=31), rng.normal(size=17)
    expected = evaluate(id_scores, ood_scores, resamples=50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK", block)
        assert evaluate(id_scores, ood_scores, resamples=50) == expected


def test_detectors_are_resampled_alike() -> None:
    """Two detectors that order the rows alike have the same intervals, whatever their ties."""
    rng = np.random.default_rng(5)
    id_scores, ood_scores = rng.normal(size=100), rng.normal(size=40)
    assert evaluate(id_scores, ood_scores, resamples=30) == evaluate(
        id_scores**3, ood_scores**3, resamples=30
    )
    assert evaluate(id_scores, ood_scores, resamples=30) != evaluate(
        id_scores, ood_scores, resamples=30, seed=1
    )


def test_estimate_is_a_triple() -> None:
    assert evaluate([0.0], [1.0], resamples=4)["auroc"] == Estimate(1.0, 1.0, 1.0)
