"""Networks that return something else than logits, or change what they are given."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from dataclasses import make_dataclass, replace

import networks
import pytest
import torch
from networks import PREPROCESSING
from torch import Tensor, nn

from oodcli import detectors
from oodcli.errors import CheckpointError, DetectorError
from oodcli.inversion.objective import OBJECTIVES
from oodcli.inversion.step import Step
from oodcli.networks.assemble import assemble
from oodcli.recording.recorder import Recorder, recordable
from oodcli.records import CHEAP

CLASSES = 3


class Net(networks.Residual):
    """Its forward pass ends as ``ends`` says: (features, logits) → what is returned."""

    def __init__(self, ends, width=6):
        super().__init__(CLASSES, width)
        self.ends = ends

    def forward(self, x):
        x = self.layer1(torch.relu(self.bn1(self.conv1(x))))
        features = self.layer2(self.down(x)).mean((2, 3))
        return self.ends(features, self.fc(features))


class Functional(Net):
    """Its last layer is no module, so nothing but what is returned can be read."""

    def forward(self, x):
        x = self.layer1(torch.relu(self.bn1(self.conv1(x))))
        features = self.layer2(self.down(x)).mean((2, 3))
        return self.ends(features, nn.functional.linear(features, self.fc.weight, self.fc.bias))


PLAIN = networks.classifier(Net(lambda _, z: z))
Output = make_dataclass("Output", ["features", "scores"])
Named = namedtuple("Named", ["features", "scores"])

READ = {
    "softmax": lambda _, z: z.softmax(1),
    "log_softmax": lambda _, z: z.log_softmax(1),
    "sigmoid": lambda _, z: z.sigmoid(),
    "features first": lambda f, z: (f, z),
    "logits first": lambda f, z: (z, f),
    "a list": lambda f, z: [f, z],
    "a dictionary": lambda f, z: {"features": f, "output": z},
    "a dictionary with logits": lambda f, z: OrderedDict(features=f, logits=z),
    "a data class": lambda f, z: Output(f, z),
    "a named tuple": lambda f, z: Named(f, z),
    "features after another layer": lambda f, z: (torch.tanh(f), z),
    "probabilities and logits": lambda _, z: (z.softmax(1), z),
    "logits and probabilities": lambda _, z: (z, z.softmax(1)),
    "logits and log-probabilities": lambda _, z: {"p": z.log_softmax(1), "z": z},
    "probabilities alone of several": lambda f, z: (f, z.softmax(1)),
    "a softmax in place": lambda _, z: z.sub_(z.logsumexp(1, keepdim=True)).exp_(),
    "a map beside": lambda f, z: (f[..., None, None], z),
}


class Frozen(Net):
    """Features from a linear layer, computed without a graph."""

    def __init__(self):
        super().__init__(None)
        self.neck = nn.Linear(6, 5)
        self.fc = nn.Linear(5, CLASSES)

    def forward(self, x):
        with torch.no_grad():
            x = self.layer1(torch.relu(self.bn1(self.conv1(x))))
            features = self.neck(self.layer2(self.down(x)).mean((2, 3)))
        return features, self.fc(features)


def test_features_of_frozen_layers_are_no_logits():
    found = networks.classifier(Frozen())
    assert (found.num_classes, found.head_name) == (CLASSES, "fc")


def test_a_softmax_over_the_batch_is_refused():
    with pytest.raises(CheckpointError, match="a softmax over the images of a batch"):
        networks.classifier(Net(lambda _, z: z.softmax(0)))


def test_layers_that_normalise_by_the_batch_are_reported():
    network = Net(lambda _, z: z)
    network.bn1 = nn.BatchNorm2d(6, track_running_stats=False)
    [note] = networks.classifier(network).assumptions
    assert note.startswith("BatchNorm layer bn1 has no running statistics")
    assert "--batch-size 1" in note


MODULES = {
    "softmax": nn.Softmax(dim=1),
    "log_softmax": nn.LogSoftmax(dim=1),
    "sigmoid": nn.Sigmoid(),
    "nothing": nn.Identity(),
}


@pytest.mark.parametrize("last", MODULES)
@pytest.mark.parametrize("head", ["linear", "convolution"])
def test_activations_that_are_modules(last, head):
    ends = {
        "linear": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)],
        "convolution": [nn.Conv2d(4, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    }
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *ends[head], MODULES[last])
    before = networks.settled(network)[:-1](networks.images(4))
    found = networks.assemble(network, arch="small", preprocessing=networks.PREPROCESSING)
    assert found.head is not None
    torch.testing.assert_close(
        Recorder(found, frozenset({"logits"}))(networks.images(4)).logits, before
    )


@pytest.mark.parametrize("how", READ)
def test_the_logits_are_read(how):
    """Those of the same network that returns its logits, in every record and in inversion."""
    found = networks.classifier(Net(READ[how]))
    x = networks.images(4)
    what = (CHEAP | {"layers.gradient", "odin.logits"}) & recordable(PLAIN)
    assert what <= recordable(found)
    expected, seen = Recorder(PLAIN, what)(x), Recorder(found, what)(x)
    assert seen.rows().keys() == expected.rows().keys()
    for name, rows in seen.rows().items():
        torch.testing.assert_close(rows, expected.rows()[name], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.head.weight, PLAIN.head.weight)
    assert found.num_classes == CLASSES
    assert found.logits_level
    assert found.assumptions or how in ("logits first", "a dictionary with logits", "a map beside")
    labels = torch.tensor([0, 1, 2, 0])
    gradients = [
        Step(each, OBJECTIVES["kl"], "float32").gradient(y := x.clone().requires_grad_(), y, labels)
        for each in (PLAIN, found)
    ]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-3)


def test_a_network_that_returns_logits_is_left_alone():
    assert PLAIN.assumptions == ()
    assert not PLAIN.network._forward_hooks
    assert not PLAIN.network._forward_pre_hooks


def test_log_probabilities_are_logits_up_to_a_constant():
    found = networks.classifier(Functional(READ["log_softmax"]))
    assert not found.logits_level
    assert "energy, mls, peak-energy" in found.assumptions[0]
    seen = Recorder(found, frozenset({"logits"}))(networks.images(4))
    expected = Recorder(PLAIN, frozenset({"logits"}))(networks.images(4))
    torch.testing.assert_close(seen.logits, expected.logits.log_softmax(1))
    msp = detectors.get("msp")()
    torch.testing.assert_close(msp.score(seen), msp.score(expected))
    for name in ("energy", "mls", "peak-energy"):
        assert not detectors.get(name).needs <= recordable(found)
    with pytest.raises(DetectorError, match="return logits instead"):
        detectors.get("energy")().score(seen)
    with pytest.raises(DetectorError, match="log-probabilities"):
        Recorder(found, detectors.get("energy").needs)


@pytest.mark.parametrize(
    ("how", "words"), [("softmax", "probabilities"), ("sigmoid", "sigmoid outputs")]
)
def test_probabilities_without_readable_logits_are_refused(how, words):
    with pytest.raises(
        CheckpointError, match=f"returns {words}, and its logits cannot be recovered"
    ):
        networks.classifier(Functional(READ[how]))


@pytest.mark.parametrize(
    "ends",
    [
        lambda _, z: (z.argmax(1), z.softmax(1).amax(1)),
        lambda f, z: {"map": f[..., None, None]},
        lambda _, z: [[z]],
    ],
)
def test_outputs_without_logits_are_refused(ends):
    with pytest.raises(CheckpointError, match="where logits of shape"):
        networks.classifier(Net(ends))


def test_integers_are_refused():
    with pytest.raises(CheckpointError, match="return the logits, not classes"):
        networks.classifier(Net(lambda _, z: (z > 0).long()))


class TwoHeads(Net):
    """Logits and a projection, as contrastive training has them."""

    def __init__(self):
        super().__init__(None)
        self.projection = nn.Linear(6, 4)

    def forward(self, x):
        x = self.layer1(torch.relu(self.bn1(self.conv1(x))))
        features = self.layer2(self.down(x)).mean((2, 3))
        return self.projection(features), self.fc(features)


def test_of_two_heads_the_number_of_classes_decides():
    with pytest.raises(CheckpointError, match=r"0 1x4 and 1 1x3 could each be its logits"):
        networks.classifier(TwoHeads())
    for told in ({"num_classes": 3}, {"class_names": ["a", "b", "c"]}):
        found = networks.classifier(TwoHeads(), **told)
        assert found.head_name == "fc"
        assert found.num_classes == 3


def test_small_outputs_of_a_linear_layer_are_no_probabilities():
    """Logits may lie in [0, 1], and may sum to 1, on every image."""
    network = Net(lambda _, z: z)
    network = networks.settled(network)
    nn.init.zeros_(network.fc.weight)
    network.fc.bias = nn.Parameter(torch.tensor([0.2, 0.3, 0.5]))
    found = networks.assemble(network, arch="constant", preprocessing=networks.PREPROCESSING)
    assert found.assumptions == ()
    assert found.head is not None


def test_outputs_in_0_1_that_no_sigmoid_made_are_logits():
    """As of a classifier by cosines; the user is told."""
    found = networks.classifier(Functional(lambda _, z: z.clamp(0, 1)))
    assert "between 0 and 1" in found.assumptions[0]


@pytest.mark.parametrize("width", [2, 1000])
def test_nearly_uniform_probabilities_are_read_from_the_right_layer(width):
    """Before training all classes have almost the same probability, whatever the layer."""

    class Untrained(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.fc = nn.Linear(192, width), nn.Linear(width, width)

        def forward(self, x):
            return self.fc(self.first(x.flatten(1))).softmax(1)

    torch.manual_seed(0)
    network = Untrained()
    nn.init.normal_(network.fc.weight, std=1e-2 / width**0.5)
    nn.init.normal_(network.first.weight, std=1e-2)
    found = networks.assemble(network, arch="new", preprocessing=networks.PREPROCESSING)
    assert found.head_name == "fc"


class Cosine(nn.Linear):
    def forward(self, x):
        normal = nn.functional.normalize
        return 10 * nn.functional.linear(normal(x), normal(self.weight))


def test_a_linear_layer_that_does_more_is_no_linear_head():
    network = Net(lambda _, z: z)
    network.fc = Cosine(6, CLASSES)
    found = networks.classifier(network)
    assert found.head is None
    scaled = networks.classifier(Net(lambda _, z: z.mul_(0.5)))
    assert scaled.head is None


class Changing(Net):
    """Changes its input in place, and its features after the head."""

    def __init__(self, hidden):
        super().__init__(None)
        self.hidden = hidden

    def forward(self, x):
        (x.data if self.hidden else x).sub_(0.1)
        x = self.layer1(torch.relu(self.bn1(self.conv1(x))))
        features = self.layer2(self.down(x)).mean((2, 3))
        logits = self.fc(features)
        features.zero_()
        return logits


class Unchanging(Net):
    def forward(self, x):
        return super().forward(x - 0.1)


@pytest.mark.parametrize("hidden", [False, True], ids=["counted", "by .data"])
def test_what_a_network_changes_in_place_is_recorded_as_it_was(hidden):
    expected = networks.assemble(
        networks.settled(Unchanging(lambda _, z: z)),
        arch="unchanging",
        preprocessing=networks.PREPROCESSING,
    )
    changing = Changing(hidden)
    changing.load_state_dict(expected.network.state_dict())
    found = networks.assemble(changing, arch="changing", preprocessing=networks.PREPROCESSING)
    what = (CHEAP | {"layers.gradient", "odin.logits", "mirror"}) & (recordable(found) | {"mirror"})
    x = networks.images(4)
    given = x.clone()
    plain, seen = Recorder(expected, what)(x), Recorder(found, what)(given)
    assert torch.equal(x, given)
    assert seen.rows().keys() == plain.rows().keys()
    for name, rows in seen.rows().items():
        torch.testing.assert_close(rows, plain.rows()[name], atol=1e-5, rtol=1e-4, msg=name)
    labels = torch.tensor([0, 1, 2, 0])
    steps = [
        Step(each, OBJECTIVES["kl"], "float32").gradient(y := x.clone().requires_grad_(), y, labels)
        for each in (expected, found)
    ]
    torch.testing.assert_close(*steps, atol=1e-6, rtol=1e-3)


ON_LOGITS = [
    name
    for name in detectors.names()
    if "logits" in (needs := detectors.get(name).needs) and "head" not in needs
]
"""Where the head is known, so are the logits."""


@pytest.mark.parametrize("name", ON_LOGITS)
def test_detectors_that_need_the_level_of_logits_say_so(name, fitted_for_level):
    """A constant in each row of the logits changes no score of the others."""
    kind = detectors.get(name)
    detector, rows = fitted_for_level(kind)
    shift = torch.linspace(-5, 5, len(rows))[:, None]

    def shifted(key, value):
        return value + shift if key in ("logits", "odin/logits") else value

    moved = rows.map_rows(shifted, len(rows))
    same = torch.allclose(detector.score(rows), detector.score(moved), rtol=1e-4, atol=1e-5)
    assert same == ("logits.level" not in kind.needs)


@pytest.fixture(scope="module")
def fitted_for_level():
    """A detector, fitted where it must be, and rows to score."""
    x = networks.images(60)
    labels = torch.arange(60) % CLASSES
    what = recordable(PLAIN) - {"layers.sensitivity", "logits.level", "head", "batchnorm.running"}
    rows = replace(Recorder(PLAIN, what)(x, labels), multi_label=True)

    def fit(kind):
        if not kind.fitted:
            return kind(), rows
        given = {"weights": "uniform"} if kind.name == "c2ir" else {}
        return kind.fit([rows], **given), rows

    return fit


class Averaged(nn.Module):
    """Averages two linear heads on different features, as networks distilled from a teacher do."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.one = nn.Linear(4, 3, bias=bias)
        self.other = nn.Linear(2, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images).flatten(1)
        return (self.one(features[:, :4]) + self.other(features[:, 4:])) / 2


@pytest.mark.parametrize("bias", [True, False])
def test_the_mean_of_two_heads_is_one_head(bias: bool) -> None:
    torch.manual_seed(0)
    network = Averaged(bias).eval()
    images = torch.randn(5, 3, 8, 8)
    expected = network(images).detach()
    before = sum(each.numel() for each in network.parameters())
    classifier = assemble(network, arch="two", preprocessing=PREPROCESSING)
    assert classifier.parameter_count == before
    assert classifier.head is not None
    for one in (classifier, replace(classifier, network=copy.deepcopy(classifier.network))):
        found = Recorder(one, frozenset({"logits", "embedding"}))(images)
        assert found.embedding is not None
        assert found.embedding.shape == (5, 6)
        torch.testing.assert_close(found.logits, expected)
        logits = found.embedding @ classifier.head.weight.T + classifier.head.bias
        torch.testing.assert_close(logits, expected)


class Tokens(nn.Module):
    """Blocks that return a tuple, as those of transformers do; the state beside it is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.layers = nn.ModuleList(TupleBlock() for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x.mean(1))


class TupleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.mlp(x), None


def test_blocks_that_return_a_tuple_are_tapped() -> None:
    torch.manual_seed(0)
    network = Tokens().eval()
    classifier = assemble(network, arch="tokens", preprocessing=PREPROCESSING)
    assert [tap.name for tap in classifier.taps] == ["layers.0", "layers.1"]
    assert classifier.last_map is not None
    images = torch.randn(5, 3, 8, 8)
    kept: list[Tensor] = []
    with torch.no_grad():
        handle = network.layers[1].register_forward_hook(lambda _, __, out: kept.append(out[0]))
        network(images)
        handle.remove()
    found = Recorder(classifier, frozenset({"logits", "layers.mean", "layers.gradient"}))(images)
    mean, gradient = found.layers["layers.1"].mean, found.layers["layers.1"].gradient
    torch.testing.assert_close(mean, kept[0].mean(1))
    assert gradient is not None
    assert found.logits is not None
    head = network.head.weight[found.logits.argmax(1)] / 4  # of the mean over four positions
    torch.testing.assert_close(gradient, head)
