"""A network laid out for speed is the same network."""

from __future__ import annotations

import networks
import pytest
import torch
from networks import classifier, images
from torch import Tensor, nn

from oodcli.recording import reduced
from oodcli.recording.channels_last import in_channels_last
from oodcli.recording.recorder import Recorder, recordable
from oodcli.recording.reduced import spatial_moments

PRECISIONS = ("float32", "bfloat16")


class Viewed(networks.Plain):
    """Flattens a feature map by a view, which only the usual layout allows."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.head(x.view(len(x), -1))

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * 8 * 8, 5)


@pytest.fixture
def residual():
    return classifier(networks.Residual())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_network_sees_channels_last_and_says_the_same(residual, precision, monkeypatch):
    seen = []
    forward = networks.Residual.forward

    def watched(self, x):
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return forward(self, x)

    given = images(5)
    expected = residual.network(given)
    monkeypatch.setattr(networks.Residual, "forward", watched)
    found = Recorder(residual, frozenset({"logits"}), precision=precision)(given).logits
    assert all(seen)
    tolerance = 1e-5 if precision == "float32" else 0.03
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert not torch.equal(found, expected) or precision == "float32"


def test_the_original_stays_as_it_was(residual):
    before = {
        name: (each.dtype, each.stride()) for name, each in residual.network.named_parameters()
    }
    in_channels_last(residual, "bfloat16")
    after = {
        name: (each.dtype, each.stride()) for name, each in residual.network.named_parameters()
    }
    assert after == before


def test_only_the_weights_of_convolutions_are_copied(residual):
    plain = dict(residual.network.named_parameters())
    faster = dict(in_channels_last(residual, "bfloat16").network.named_parameters())
    assert faster.keys() == plain.keys()
    for name, weight in faster.items():
        module = residual.network.get_submodule(name.rpartition(".")[0])
        convolution = isinstance(module, nn.Conv2d) and name.endswith("weight")
        assert weight.dtype == (torch.bfloat16 if convolution else torch.float32)
        assert (weight.data_ptr() == plain[name].data_ptr()) != convolution


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_that_are_computed(precision):
    network = networks.Residual()
    torch.nn.utils.parametrizations.weight_norm(network.conv1)
    normed = classifier(network)
    found = Recorder(normed, frozenset({"logits"}), precision=precision)(images(3)).logits
    torch.testing.assert_close(found, normed.network(images(3)), rtol=0.03, atol=0.03)


def test_logits_keep_more_digits_than_bfloat16(residual):
    found = Recorder(residual, frozenset({"logits", "embedding"}), precision="bfloat16")(images(5))
    assert (found.logits != found.logits.bfloat16().float()).any()
    head = residual.head
    torch.testing.assert_close(found.logits, found.embedding @ head.weight.T + head.bias)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_network_that_does_not_take_it_is_left_alone(precision):
    viewed = classifier(Viewed())
    assert in_channels_last(viewed, precision) is viewed
    given = images(4)
    last = given.contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view size"):
        viewed.network(last)
    found = Recorder(viewed, frozenset({"logits"}), precision=precision)(last).logits
    torch.testing.assert_close(found, viewed.network(given), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_everything_is_recorded_as_before(residual, precision, monkeypatch):
    what = recordable(residual) - {"layers.sensitivity"}
    given = images(6)
    faster = Recorder(residual, what, precision=precision)(given)
    monkeypatch.setattr(
        "oodcli.recording.recorder.in_channels_last", lambda classifier, precision: classifier
    )
    plain = Recorder(residual, what, precision=precision)(given)
    assert faster.rows().keys() == plain.rows().keys()
    for name, rows in plain.rows().items():
        if precision == "float32":
            torch.testing.assert_close(faster.rows()[name], rows, rtol=1e-4, atol=1e-5)
        elif name != "odin/logits":  # the sign of a small gradient
            torch.testing.assert_close(faster.rows()[name], rows, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_moments_do_not_depend_on_the_layout(kind):
    x = (torch.randn(3, 5, 6, 7) * 2 + 4).to(kind)
    expected = torch.var_mean(x.double(), (2, 3), correction=0)
    untouched = x.clone()
    layouts = {
        "usual": spatial_moments(x),
        "channels last": spatial_moments(x.contiguous(memory_format=torch.channels_last)),
        "tokens": spatial_moments(x.flatten(2).transpose(1, 2).contiguous(), -1),
        "a slice": spatial_moments(torch.cat([x, x], 3)[..., 7:]),
    }
    for name, (mean, var) in layouts.items():
        torch.testing.assert_close(mean.double(), expected[1], rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(var.double(), expected[0], rtol=1e-4, atol=1e-4, msg=name)
    assert torch.equal(x, untouched)


@pytest.mark.parametrize("most", [1, 500])
def test_moments_do_not_depend_on_how_many_images_go_together(most, monkeypatch):
    x = torch.randn(5, 5, 6, 7).contiguous(memory_format=torch.channels_last)
    together = spatial_moments(x)
    monkeypatch.setattr(reduced, "SQUARES_IN_CACHE", most)
    for one, other in zip(spatial_moments(x), together, strict=True):
        assert torch.equal(one, other)
