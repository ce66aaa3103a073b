"""benchmarks.peers: what it compares, with a stand-in for the other library."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from benchmarks import peers
from benchmarks.peers import INSIDE, PEERS, Peer, compare, table
from oodcli import detectors
from oodcli.features import Features, LinearHead

pytestmark = pytest.mark.slow


def rows(seed: int, shift: float = 0.0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(300, 64, generator=generator).relu() + shift
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(7))
    head = LinearHead(weight, torch.full((5,), 30.0))  # energies are positive, as of a network
    return Features(300, logits=embedding @ weight.T + 30, embedding=embedding, head=head)


def compared(names: list[str], libraries: list[str]) -> list[peers.Compared]:
    train = rows(0)
    labels = train.logits.argmax(1)
    train = replace(train, label=labels)
    sets = {INSIDE: rows(1), "shifted": rows(2, 0.2), "far": rows(3, 1.0)}
    return list(compare("net", train, labels, sets, names, libraries))


def test_ours_is_compared_with_every_peer_on_the_same_rows(monkeypatch):
    same = Peer("same", lambda fit: lambda embedding, logits: -torch.logsumexp(logits, 1))
    turned = Peer("turned", lambda fit: lambda embedding, logits: torch.logsumexp(logits, 1))
    monkeypatch.setitem(PEERS, "energy", [same, turned, Peer("absent", None)])
    first, second = compared(["energy"], ["same", "turned"])
    assert first.mean == first.largest == 0
    assert second.auroc == first.auroc
    assert second.theirs == pytest.approx(1 - first.auroc)
    assert second.mean == pytest.approx(100 * (2 * first.auroc - 1))
    assert table([first, second]).count("\n") == 3


def test_they_are_our_detectors_and_their_settings_are_known():
    assert set(PEERS) <= set(detectors.names())
    for name, each in PEERS.items():
        for peer in each:
            if not detectors.get(name).fitted:
                detectors.get(name).fit([], **peer.ours)


@pytest.mark.parametrize("name", PEERS)
def test_pytorch_ood_agrees_where_it_is(name):
    if importlib.util.find_spec("pytorch_ood") is None:
        pytest.skip("pytorch-ood is not installed")
    for one in compared([name], ["pytorch-ood"]):
        assert one.because or abs(one.largest) < 0.1, one
