"""Sums over all rows, and without some of them."""

from __future__ import annotations

import pytest
import torch

from oodcli import detectors
from oodcli.detectors import sums, vim
from oodcli.detectors.sums import Whole, Without, add_square, moments, whole_square
from oodcli.features import Features, Layer, LinearHead

NEEDS = frozenset({"embedding"})


def block(count=90, width=7, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(count, width, generator=generator) + torch.arange(count)[:, None] % classes
    weight = torch.randn(classes, width, generator=generator)
    head = LinearHead(weight, torch.arange(classes) / 10)
    return Features(
        count=count,
        label=torch.arange(count) % classes,
        logits=u @ weight.T + head.bias,
        embedding=u,
        layers={"a": Layer("stage", mean=u[:, :4]), "b": Layer("stage", mean=u[:, 3:])},
        head=head,
    )


def held_out(rows):
    """All rows, and all but every fifth, in blocks."""
    held = torch.arange(len(rows)) % 5 == 0
    kept = rows.select(~held)
    whole = Whole([rows.select(slice(0, 41)), rows.select(slice(41, None))])
    parts = [kept.select(slice(0, 20)), kept.select(slice(20, None))]
    return whole, Without(whole, parts, [rows.select(held)])


@pytest.mark.parametrize("width", [3, 4, 10, 13])
def test_the_square_in_tiles(width, monkeypatch):
    monkeypatch.setattr(sums, "TILE", 4)
    rows = torch.randn(20, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    square = torch.zeros(width, width, dtype=torch.float64)
    for part in rows.split(7):
        add_square(square, part)
    torch.testing.assert_close(whole_square(square), rows.T @ rows, rtol=1e-13, atol=1e-13)


SUMMED = ("mds", "mds++", "rmds", "rmds++", "gmm", "mds-sum", "residual", "vim", "neco", "cop")


@pytest.mark.parametrize("name", [*SUMMED, "corp", "pnml", "knn"])
def test_without_rows_the_fit_is_that_of_the_others(name):
    """knn sums nothing."""
    rows, kind = block(), detectors.get(name)
    whole, without = held_out(rows)
    given = {"dim": 3} if name in ("residual", "vim") else {}
    kind.fit(whole, **given)
    found = kind.fit(without, **given).score(rows)
    expected = kind.fit(list(without.kept), **given).score(rows)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_kept_rows_are_not_read_again():
    whole, without = held_out(block())
    all_ = moments(whole, NEEDS, "x", lambda each: each.embedding.double())
    unread = Without(whole, None, without.held)
    found = moments(unread, NEEDS, "x", lambda each: each.embedding.double())
    assert (all_["count"], found["count"]) == (90, 72)
    # Sums of another name are not known.
    other = moments(without, NEEDS, "y", lambda each: 2 * each.embedding.double())
    torch.testing.assert_close(other["square"], 4 * found["square"])


def test_held_out_rows_that_are_not_finite():
    rows = block()
    rows.embedding[::5] = torch.nan
    whole, without = held_out(rows)
    all_, found = (
        moments(each, NEEDS, "x", lambda each: each.embedding.double()) for each in (whole, without)
    )
    assert found["count"] == 72
    assert torch.equal(all_["square"], found["square"])


@pytest.mark.parametrize("off", [0.3, 1e-5])
def test_alpha_of_wide_embeddings_has_six_digits(off, monkeypatch):
    """With a residual that float32 resolves, and one that it does not."""
    rows = block(count=200, width=24)
    rows.embedding[:, 12:] *= off
    monkeypatch.setattr(vim, "TILE", 100)
    exact = vim.ViM.fit(rows, dim=12)
    monkeypatch.setattr(vim, "TILE", 16)
    single = vim.ViM.fit([rows.select(slice(0, 150)), rows.select(slice(150, None))], dim=12)
    torch.testing.assert_close(single.alpha, exact.alpha, rtol=1e-6, atol=0)
