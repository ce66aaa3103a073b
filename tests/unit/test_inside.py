"""What is found inside networks: heads that are convolutions, frozen BatchNorm, stages."""

from __future__ import annotations

import pytest
import torch
import torchvision
from networks import randomised
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from oodcli.networks.assemble import assemble
from oodcli.networks.classifier import Classifier
from oodcli.networks.preprocessing import Preprocessing
from oodcli.recording.recorder import Recorder, recordable

IMAGES = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(3))


def classifier(network: nn.Module) -> Classifier:
    return assembled(randomised(network))


def assembled(network: nn.Module) -> Classifier:
    prep = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return assemble(network, arch="mine", preprocessing=prep)


def conv_head(*after: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 300, 1), *after, nn.Flatten()
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("pooled_first", [False, True])
def test_a_convolution_is_the_head(pooled_first: bool, precision: str) -> None:
    """Network in Network averages after the 1x1 convolution, timm's BiT before it."""
    network = conv_head(nn.AdaptiveAvgPool2d(1))
    if pooled_first:
        network = nn.Sequential(*network[:2], network[3], network[2], network[4])
    found = classifier(network)
    assert found.head is not None
    features = Recorder(found, frozenset({"logits", "embedding"}), precision=precision)(IMAGES)
    assert features.embedding is not None
    assert features.logits is not None
    logits = features.embedding @ found.head.weight.T + found.head.bias
    exact = precision == "float32" or pooled_first
    torch.testing.assert_close(logits, features.logits, atol=1e-5 if exact else 0.02, rtol=1e-5)
    with torch.no_grad():
        expected = network[:2](IMAGES).mean((2, 3))
    close = 1e-5 if precision == "float32" else 0.02
    torch.testing.assert_close(features.embedding, expected, atol=close, rtol=close)


def test_squeezenet_has_an_embedding_and_no_linear_head() -> None:
    """A ReLU is between its convolution and the average."""
    found = classifier(torchvision.models.squeezenet1_1(num_classes=5))
    assert (found.head_name, found.head) == ("classifier.1", None)
    assert "embedding" in recordable(found)
    assert "head" not in recordable(found)
    seen = Recorder(found, frozenset({"embedding"}))(IMAGES).embedding
    assert seen is not None
    with torch.no_grad():
        torch.testing.assert_close(seen, found.network.features(IMAGES).mean((2, 3)))


def test_a_maximum_after_a_convolution_is_no_head() -> None:
    assert classifier(conv_head(nn.AdaptiveMaxPool2d(1))).head_name is None


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.SyncBatchNorm])
def test_frozen_and_synchronised_batchnorm(norm: type[nn.Module]) -> None:
    network = torchvision.models.resnet18(num_classes=5, norm_layer=norm)
    state = randomised(torchvision.models.resnet18(num_classes=5)).state_dict()
    kept = {key: value for key, value in state.items() if key in network.state_dict()}
    plain = torchvision.models.resnet18(num_classes=5)
    plain.load_state_dict(state)
    network.load_state_dict(kept)
    what = frozenset({"logits", "layers.mean", "layers.gradient", "batchnorm.var"})
    found, expected = assembled(network), assembled(plain)
    assert len(found.batchnorms) == 20
    ours, theirs = (Recorder(each, what)(IMAGES).rows() for each in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, rows in ours.items():
        torch.testing.assert_close(rows, theirs[name], atol=1e-4, rtol=1e-4)


def test_the_activation_of_a_frozen_layer_of_timm() -> None:
    timm = pytest.importorskip("timm")
    from timm.utils.model import freeze_batch_norm_2d

    network = randomised(timm.create_model("test_efficientnet", num_classes=5))
    with torch.no_grad():
        expected = network(IMAGES)
    found = assembled(freeze_batch_norm_2d(network))
    torch.testing.assert_close(found.network(IMAGES), expected, atol=1e-5, rtol=1e-5)
    assert len(found.batchnorms) > 5


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def two(width: int) -> Wrapped:
    return Wrapped(nn.Sequential(nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)))


class Block(nn.Module):
    """Its output is wider than those of the layers in it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.Sequential(two(width), two(width))
        self.last = nn.Conv2d(width, 3 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.parts(x))


class Headed(nn.Module):
    """A head of two layers in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(18, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.first(x).relu())


def test_stages_are_the_output_of_what_is_around_them_and_heads_are_none() -> None:
    """As in HGNet and InceptionNeXt of timm."""
    network = nn.Sequential(
        nn.Conv2d(3, 2, 1), Block(2), nn.AvgPool2d(2), Block(6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), Headed(),
    )  # fmt: skip
    stages = [(tap.name, tap.channels) for tap in classifier(network).taps if tap.kind == "stage"]
    assert stages == [("1", 6), ("3", 18)]


def test_layers_before_a_wide_head_are_found() -> None:
    """timm's VGG has two convolutions on 1x1 before its head, which are not all it has."""
    wide = nn.Sequential(nn.Conv2d(4, 9, 1), nn.Conv2d(9, 9, 1))
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), Wrapped(wide), nn.Flatten(), nn.Linear(9, 5)),
    )
    found = classifier(network)
    assert [tap.name for tap in found.taps if tap.kind == "stage"] == ["1", "4"]
    assert found.last_map is not None
    assert found.last_map.name == "4"
