"""What is recorded is what the network computed."""

from __future__ import annotations

import gc
import weakref

import networks
import pytest
import torch
import torch.nn.functional as F
from commands import oodcli
from torch import nn

from oodcli import detectors
from oodcli.detectors.one_class_sum import OneClassSum
from oodcli.errors import CheckpointError, DetectorError, OodcliError
from oodcli.features import INPUT, LAST_MAP, OdinStep, concatenate
from oodcli.networks.architectures import cifar_resnet
from oodcli.networks.assemble import _channel_dim, assemble
from oodcli.recording import gradients
from oodcli.recording.recorder import Recorder, recordable
from oodcli.recording.reduced import nonzero_shares, spatial_moments
from oodcli.records import CHEAP, ROW_RECORDS
from oodcli.stages.chosen import fit_on_noise

EVERYTHING = frozenset(ROW_RECORDS) - {"deconf.h", "mos.others", "dropout.logits"}
"""Of a network without dropout, whose head was not trained to tell what is out of distribution."""


@pytest.fixture(params=[False, True], ids=["relu", "inplace-relu"])
def residual(request):
    return networks.classifier(networks.Residual(inplace=request.param))


def naive(classifier, images):
    """Inputs and outputs of every module by name, cloned at once."""
    found = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, out, name=name: found.update({name: (args[0].clone(), out.clone())})
        )
        for name, module in classifier.network.named_modules()
        if name
    ]
    with torch.no_grad():
        logits = classifier.network(images)
    for handle in handles:
        handle.remove()
    return logits, found


def test_moments_of_every_layer(residual):
    images = networks.images(5)
    logits, modules = naive(residual, images)
    seen = Recorder(residual, CHEAP & EVERYTHING)(images)
    torch.testing.assert_close(seen.logits, logits)
    torch.testing.assert_close(seen.embedding, modules["fc"][0])
    assert [name for name, layer in seen.layers.items() if layer.kind == "stage"] == [
        "layer1",
        "layer2",
    ]
    assert sum(layer.kind == "block" for layer in seen.layers.values()) == 4
    assert sum(layer.kind == "batchnorm" for layer in seen.layers.values()) == 9
    for name, layer in seen.layers.items():
        output = modules[name][1].double().flatten(2)
        torch.testing.assert_close(layer.mean.double(), output.mean(2), atol=1e-5, rtol=1e-5)
        expected = output.std(2, correction=0)
        torch.testing.assert_close(layer.std.double(), expected, atol=1e-5, rtol=1e-4)
    for name, norm in seen.batchnorm.items():
        given = (images if name == INPUT else modules[name][0]).double().flatten(2)
        torch.testing.assert_close(norm.mean.double(), given.mean(2), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(norm.var.double(), given.var(2), atol=1e-5, rtol=1e-4)
        assert norm.spatial_size == given.shape[2]
    first = residual.network.bn1
    assert torch.equal(seen.batchnorm["bn1"].running_mean, first.running_mean)
    assert seen.batchnorm["bn1"].eps == first.eps


def test_gradients_are_those_of_a_bump(residual):
    """Adding ε to one channel of a layer's output changes y_c by ε·HW·(mean gradient)."""
    images = networks.images(2)
    labels = torch.tensor([1, -1])
    seen = Recorder(residual, EVERYTHING)(images, labels)
    target = torch.where(labels >= 0, labels, seen.logits.argmax(1))
    epsilon = 1e-3
    for name, layer in seen.layers.items():
        module = residual.network.get_submodule(name)
        positions = next(tap.spatial_size for tap in residual.taps if tap.name == name)
        for channel in (0, 3):
            scores = []
            for sign in (1, -1):

                def bump(_, args, out, sign=sign, channel=channel):
                    out = out.clone()
                    out[:, channel] += sign * epsilon
                    return out

                handle = module.register_forward_hook(bump)
                with torch.no_grad():
                    scores.append(residual.network.double()(images.double()))
                residual.network.float()
                handle.remove()
            slope = (scores[0] - scores[1])[torch.arange(2), target] / (2 * epsilon) / positions
            # A kink of a ReLU within ±ε moves the slope a little.
            torch.testing.assert_close(
                layer.gradient[:, channel].double(), slope, atol=2e-3, rtol=2e-2
            )


class Part(nn.Module):
    def forward(self, x):
        return x[:, :4]


class Passing(nn.Module):
    """Layers that return their input, a view, which is changed in place where asked, and what
    nothing depends on."""

    def __init__(self, inplace=False):
        super().__init__()
        self.same, self.conv, self.part = nn.Identity(), nn.Conv2d(3, 6, 3), Part()
        self.fc, self.inplace = nn.Linear(4, 3), inplace
        self.aside = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        self.aside(x)
        x = F.relu(self.part(self.conv(self.same(x))), inplace=self.inplace)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_by_an_image_and_by_a_view(inplace):
    classifier = networks.classifier(Passing(inplace), layers="same|part|aside")
    network, images = classifier.network, networks.images(4).requires_grad_()
    layers = Recorder(classifier, frozenset({"layers.gradient"}))(images).layers
    part = network.conv(images)[:, :4]
    score = network.fc(part.relu().mean((2, 3))).amax(1).sum()
    for name, gradient in zip(
        ("same", "part"), torch.autograd.grad(score, (images, part)), strict=True
    ):
        assert gradient.any()
        torch.testing.assert_close(layers[name].gradient, gradient.mean((2, 3)))
    assert not layers["aside"].gradient.any()


def test_logits_that_depend_on_no_layer():
    classifier = networks.classifier(Passing(), layers="aside")
    seen = Recorder(classifier, frozenset({"layers.gradient"}))(networks.images(4))
    assert torch.equal(seen.layers["aside"].gradient, torch.zeros(4, 2))


class WithoutGradients(Passing):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


def test_a_network_that_switches_gradients_off():
    classifier = networks.classifier(WithoutGradients(), layers="part")
    recorder = Recorder(classifier, frozenset({"layers.gradient"}))
    with pytest.raises(DetectorError, match=r"^part has no gradient: .* with --layers$"):
        recorder(networks.images(4))


@pytest.mark.parametrize("network", [networks.Residual, networks.Shared])
def test_gradients_with_and_without_that_by_the_image(network):
    classifier = networks.classifier(network())
    plain = Recorder(classifier, frozenset({"layers.gradient"}))(networks.images(4))
    both = Recorder(classifier, frozenset({"layers.gradient", "odin.logits"}))(networks.images(4))
    for name, layer in plain.layers.items():
        assert torch.equal(layer.gradient, both.layers[name].gradient), name


def test_each_gradient_is_free_before_the_next(monkeypatch):
    classifier = networks.classifier(networks.Shared())
    computed = []

    def shares(gradient, channel_dim):
        assert all(each() is None for each in computed)
        computed.append(weakref.ref(gradient))
        return nonzero_shares(gradient, channel_dim)

    monkeypatch.setattr(gradients, "nonzero_shares", shares)
    Recorder(classifier, frozenset({"layers.nonzero"}))(networks.images(4))
    assert len(computed) == 3


def test_rows_of_noise_are_free_before_the_next(residual):
    alive = []

    class Kind(OneClassSum):
        reference_images = "noise:uniform?n=6"

        @classmethod
        def fit(cls, train):
            seen = []
            for block in train:
                seen.append(weakref.ref(block))
                gc.collect()
                alive.append(sum(each() is not None for each in seen))

    fit_on_noise(residual, Kind, {}, 2)
    assert alive == [1, 1, 1]


def test_odin_is_a_step_against_the_loss(residual):
    images = networks.images(4)
    step = OdinStep(epsilon=0.02, temperature=10.0)
    seen = Recorder(residual, EVERYTHING, made_with={"odin": step})(images)
    given = images.clone().requires_grad_()
    logits = residual.network(given)
    losses = F.cross_entropy(logits / 10.0, logits.argmax(1), reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), given)
    std = torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1)
    moved = images - 0.02 / std * gradient.sign()
    with torch.no_grad():
        torch.testing.assert_close(seen.odin_logits, residual.network(moved))
    assert seen.made_with["odin"] == step


def test_moving_as_odin_does_lowers_the_loss(residual):
    images = networks.images(16)
    step = {"odin": OdinStep(0.001, 1000.0)}
    seen = Recorder(residual, EVERYTHING, made_with=step)(images)
    label = seen.logits.argmax(1)
    before = F.cross_entropy(seen.logits, label)
    assert F.cross_entropy(seen.odin_logits, label) < before


def test_a_batchnorm_that_is_called_twice_has_two_records():
    classifier = networks.classifier(networks.Shared())
    images = networks.images(3)
    recorder = Recorder(classifier, EVERYTHING & recordable(classifier))
    for _ in range(2):  # the second pass starts counting anew
        seen = recorder(images)
        assert list(seen.batchnorm) == [INPUT, "bn", "bn@2", "flat"]
    network = classifier.network
    with torch.no_grad():
        first = network.conv(images)
        second = network.conv(torch.relu(network.bn(first)))
    torch.testing.assert_close(seen.batchnorm["bn"].mean, first.mean((2, 3)))
    torch.testing.assert_close(seen.batchnorm["bn@2"].mean, second.mean((2, 3)))


def test_one_position_has_no_variance():
    classifier = networks.classifier(networks.Shared())
    seen = Recorder(classifier, CHEAP & EVERYTHING)(networks.images(3))
    assert seen.batchnorm["flat"].spatial_size == 1
    assert not seen.batchnorm["flat"].var.any()
    assert not seen.layers["flat"].std.any()


def test_recording_leaves_nothing_behind(residual):
    images = networks.images(2)
    before = residual.network(images)
    recorder = Recorder(residual, EVERYTHING)
    recorder(images)
    for network in (residual.network, recorder.classifier.network):
        assert not any(module._forward_hooks for module in network.modules())
        assert not any(module._forward_pre_hooks for module in network.modules())
    assert torch.equal(residual.network(images), before)
    assert not images.requires_grad


def test_rows_do_not_depend_on_their_batch(residual):
    images = networks.images(6)
    recorder = Recorder(residual, EVERYTHING)
    whole = recorder(images).rows()
    single = recorder(images[4:5]).rows()
    for name, rows in whole.items():
        torch.testing.assert_close(rows[4:5], single[name], atol=1e-5, rtol=1e-5)


def test_batches_share_a_head_in_float64(residual):
    recorder = Recorder(residual, frozenset({"logits"}))
    first, second = (recorder(networks.images(2)).head.double for _ in range(2))
    assert first is second
    assert torch.equal(first.weight, residual.head.weight.double())


def test_only_what_was_asked_for(residual):
    seen = Recorder(residual, frozenset({"logits"}))(networks.images(2))
    assert set(seen.rows()) == {"label", "logits"}
    seen = Recorder(residual, frozenset({"layers.mean"}))(networks.images(2))
    assert seen.recorded == {"label", "head", "layers.mean", "batchnorm.running"}


def test_moments_of_only_some_layers(residual):
    words = frozenset({"layers.mean", "layers.std", "layers.peak", "batchnorm.mean"})

    def recorded(layers):
        return Recorder(residual, words, layers=layers)(networks.images(2)).rows()

    whole = recorded(None)
    norm = next(tap.name for tap in residual.taps if tap.kind == "batchnorm")
    last = residual.last_map.name
    for layers, names in [
        (frozenset({LAST_MAP}), {last}),
        (frozenset({norm}), {norm}),
        (frozenset({norm, LAST_MAP}), {norm, last}),
        (frozenset(), set()),
    ]:
        some = recorded(layers)
        left_out = {
            f"layers/{tap.name}/{part}"
            for tap in residual.taps
            for part in ("mean", "std")
            if tap.name not in names
        }
        assert some.keys() == whole.keys() - left_out
        assert all(torch.equal(rows, whole[name]) for name, rows in some.items())
    # Then the detector says what it lacks.
    assert recorded(frozenset({norm, "not a layer"})).keys() == whole.keys()


def test_moments_of_tokens():
    tokens = torch.randn(2, 5, 4)
    mean, variance = spatial_moments(tokens, -1)
    torch.testing.assert_close(mean, tokens.mean(1))
    torch.testing.assert_close(variance, tokens.var(1, correction=0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "size", "dim"),
    [
        ((1, 64, 64, 32), (128, 64), 1),  # as many channels as rows
        ((1, 32, 32, 64), (64, 128), 1),
        ((1, 96, 8, 8), (32, 32), 1),
        ((1, 8, 8, 96), (32, 32), -1),
        ((1, 48, 32, 96), (192, 128), -1),  # Swin's order of dimensions
        ((1, 512, 1, 1), (128, 64), 1),
        ((1, 1, 1, 512), (128, 64), -1),
        ((1, 5, 5, 5), (32, 32), 1),
        ((1, 50, 768), (224, 224), -1),
        ((1, 10), (32, 32), 1),
    ],
)
def test_which_dimension_holds_the_channels(shape, size, dim):
    assert _channel_dim(shape, size[0] / size[1]) == dim


def test_what_a_network_cannot_give():
    plain = networks.classifier(networks.Plain())
    assert "batchnorm.running" not in recordable(plain)
    with pytest.raises(DetectorError, match="no BatchNorm layer"):
        Recorder(plain, frozenset({"batchnorm.mean", "batchnorm.running"}))
    headless = networks.classifier(networks.Plain(linear=False))
    assert headless.head is None
    with pytest.raises(DetectorError, match="last layer is not linear"):
        Recorder(headless, frozenset({"embedding"}))
    with pytest.raises(DetectorError, match="no layers were found"):
        Recorder(plain, frozenset({"layers.mean"}))


@pytest.mark.parametrize("name", ["in-dms", "in-dms-aos", "in-dss", "in-dss-ext"])
def test_indicators_of_the_image_alone_need_no_batchnorm(name, residual):
    detector = detectors.get(name)()
    x = networks.images(4) * torch.tensor([0.2, 1, 3, 8]).view(-1, 1, 1, 1)
    scores = []
    for each in (residual, networks.classifier(networks.Plain())):
        assert detector.needs <= recordable(each)
        scores.append(detector.score(Recorder(each, detector.needs)(x)))
    assert torch.equal(*scores)
    assert len(scores[0].unique()) > 1


def test_a_batchnorm_that_holds_its_activation_is_recorded_before_it():
    apart, held = networks.Apart(nn.BatchNorm2d), networks.Apart(networks.Activated)
    networks.settled(apart)
    apart.bn.weight.data[2] = 0  # its output depends on no input
    held.load_state_dict(apart.state_dict())
    settings = {"arch": "small", "preprocessing": networks.PREPROCESSING}
    rows = [
        Recorder(each, frozenset({"logits", *EVERYTHING}) & recordable(each))(networks.images(4))
        for each in (assemble(apart, **settings), assemble(held, **settings))
    ]
    expected, seen = (each.rows() for each in rows)
    assert seen.keys() == expected.keys() >= {"layers/bn/gradient"}
    assert expected["layers/bn/gradient"][:, 2].any()
    for part in ("gradient", "nonzero"):
        seen[f"layers/bn/{part}"][:, 2] = expected[f"layers/bn/{part}"][:, 2]
    seen.pop("layers/bn/peak")  # of the map that is pooled
    for name, tensor in seen.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_batchnorm_over_tokens_is_recorded_image_by_image():
    tokens, maps = networks.Tokens(nn.BatchNorm1d), networks.Maps(nn.BatchNorm2d)
    networks.settled(tokens)
    maps.load_state_dict(tokens.state_dict())
    settings = {"arch": "small", "preprocessing": networks.PREPROCESSING}
    found = [assemble(each, **settings) for each in (maps, tokens)]
    assert found[0].taps == found[1].taps
    expected, seen = (
        Recorder(each, EVERYTHING & recordable(each))(networks.images(4)).rows() for each in found
    )
    assert seen.keys() == expected.keys() >= {"layers/bn/gradient", "batchnorm/bn/var"}
    for name, tensor in seen.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4, msg=name)


class Windows(nn.Module):
    """Blocks that see quarters of an image as rows of their own, image by image or quarter by
    quarter."""

    def __init__(self, by_image):
        super().__init__()
        self.by_image = by_image
        self.conv = nn.Conv2d(3, 6, 1)
        self.blocks = nn.Sequential(*(networks.Block(6, False) for _ in range(2)))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.conv(x)
        quarters = [x[:, :, i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]
        if self.by_image:
            rows = self.blocks(torch.stack(quarters, 1).flatten(0, 1))
            return self.fc(rows.unflatten(0, (len(x), 4)).mean((1, 3, 4)))
        rows = self.blocks(torch.cat(quarters))
        return self.fc(rows.unflatten(0, (4, len(x))).mean((0, 3, 4)))


def test_windows_are_recorded_image_by_image_or_not_at_all():
    settings = {"arch": "small", "preprocessing": networks.PREPROCESSING}
    plain = networks.settled(Windows(True))
    mixed = Windows(False)
    mixed.load_state_dict(plain.state_dict())
    found = assemble(plain, **settings)
    assert {tap.kind for tap in found.taps} == {"batchnorm", "block", "stage"}
    what = frozenset({"layers.mean", "layers.gradient", "layers.peak", "layers.gram"})
    x = networks.images(4)
    seen = Recorder(found, what)(x)
    for row in range(4):  # as every image alone
        for name, tensor in Recorder(found, what)(x[row : row + 1]).rows().items():
            torch.testing.assert_close(
                tensor[0], seen.rows()[name][row], atol=1e-5, rtol=1e-4, msg=name
            )
    assert assemble(mixed, **settings).taps == ()


class OneImage(Windows):
    """Windows of a network whose author wrote a batch of one into it."""

    def forward(self, x):
        return super().forward(x.reshape(1, 3, 8, 8))


def test_windows_of_a_network_that_takes_one_image_only():
    network = OneImage(True)
    network.load_state_dict(networks.settled(Windows(True)).state_dict())
    with pytest.raises(CheckpointError, match=r"^small runs on one image, but not on a .* two \("):
        assemble(network.eval(), arch="small", preprocessing=networks.PREPROCESSING)


def test_layers_by_regular_expression():
    chosen = networks.classifier(networks.Residual(), layers=r"conv\d$")
    assert {tap.name for tap in chosen.taps if tap.kind == "other"} >= {"conv1", "layer2.1.conv2"}
    assert not any(tap.kind in ("block", "stage") for tap in chosen.taps)
    with pytest.raises(CheckpointError, match="matches no module"):
        networks.classifier(networks.Residual(), layers="nothing")
    with pytest.raises(CheckpointError, match="not a regular expression"):
        networks.classifier(networks.Residual(), layers="(")


def test_wrong_input_size_and_class_names():
    with pytest.raises(CheckpointError, match="3 class names were given but the network has 4"):
        networks.classifier(networks.Residual(classes=4), class_names=["a", "b", "c"])
    assert networks.classifier(networks.Residual(classes=1)).num_classes == 2  # 0 and the logit


def test_a_block_moves_as_a_whole(residual):
    """To a device without data, which is the only other one at hand everywhere."""
    what = EVERYTHING | {"mirror"}
    seen = Recorder(residual, what)(networks.images(3)).to(torch.device("meta"))
    tensors = [*seen.rows().values(), seen.head.weight, seen.head.bias]
    for norm in (*seen.batchnorm.values(), *seen.mirror.batchnorm.values()):
        tensors += [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    assert all(tensor.is_meta for tensor in tensors)


# ---------------------------------------------------------------------------- short of memory


FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
)


@pytest.fixture
def short(monkeypatch):
    """Gives networks of a kind only as much memory as ``most`` images need, and returns the sizes
    of the batches that they are given. The error is raised after half of the work."""

    def limit(kind, most, error=FULL[0]):
        given = []
        forward = kind.forward

        def limited(self, x):
            given.append(len(x))
            found = forward(self, x)
            if len(x) > most:
                raise error
            return found

        monkeypatch.setattr(kind, "forward", limited)
        return given

    return limit


def test_batches_are_halved_until_they_fit(residual, short, caplog):
    what = EVERYTHING | {"mirror"}
    images, labels = networks.images(32), torch.arange(32) % 4 - 1
    recorder = Recorder(residual, what)
    expected = concatenate(
        [recorder(images[at : at + 4], labels[at : at + 4]) for at in range(0, 32, 4)]
    )
    sizes = short(networks.Residual, 5)
    with caplog.at_level("INFO", "oodcli"):
        first = recorder(images[:16], labels[:16])
    assert caplog.messages == [
        "out of memory at batch size 16; retrying with 8",
        "out of memory at batch size 8; retrying with 4",
    ]
    assert max(sizes[2:]) == 4
    # The next batch is not tried whole again.
    sizes.clear()
    caplog.clear()
    second = recorder(images[16:], labels[16:])
    assert set(sizes) == {4}
    assert caplog.messages == []
    seen = concatenate([first, second])
    assert seen.recorded == expected.recorded
    for name, rows in expected.rows().items():
        assert torch.equal(seen.rows()[name], rows), name
    assert torch.equal(seen.head.weight, expected.head.weight)
    assert seen.made_with == expected.made_with


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:40])
def test_every_way_to_say_it(short, error):
    recorder = Recorder(networks.classifier(networks.Residual()), frozenset({"logits"}))
    sizes = short(networks.Residual, 2, error)
    assert len(recorder(networks.images(4))) == 4
    assert sizes == [4, 2, 2]


def test_a_batch_that_is_no_multiple(residual, short):
    images = networks.images(23)
    recorder = Recorder(residual, EVERYTHING)
    whole = recorder(images).rows()
    short(networks.Residual, 4)
    parts = recorder(images).rows()
    for name, rows in whole.items():
        torch.testing.assert_close(parts[name], rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", [EVERYTHING | {"mirror"}, frozenset({"logits"})])
def test_memory_for_half_of_the_work(residual, monkeypatch, what):
    """It may run out in the backward pass, in the second view or after some parts, too."""
    images = networks.images(8)
    expected = Recorder(residual, what)(images)
    recorder = Recorder(residual, what)
    calls = 0
    softened = networks.Residual.forward

    def third(self, x):
        nonlocal calls
        calls += 1
        if calls == 3 and len(x) > 1:
            raise FULL[0]
        return softened(self, x)

    monkeypatch.setattr(networks.Residual, "forward", third)
    seen = [recorder(part) for part in images.split(2)]
    assert calls > 3
    for name, rows in concatenate(seen).rows().items():
        torch.testing.assert_close(rows, expected.rows()[name], atol=1e-5, rtol=1e-5)


def test_what_a_failed_try_held_is_free_before_the_next(residual, monkeypatch):
    recorder = Recorder(residual, EVERYTHING | {"mirror"})
    forward = networks.Residual.forward
    held = []

    def limited(self, x):
        assert all(each() is None for each in held)
        found = forward(self, x)
        if len(x) > 2:
            held.extend((weakref.ref(x), weakref.ref(found)))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(networks.Residual, "forward", limited)
    gc.disable()
    try:
        recorder(networks.images(16))
    finally:
        gc.enable()
    assert len(held) == 6


def test_too_short_for_one_image(residual, short):
    recorder = Recorder(residual, EVERYTHING)
    short(networks.Residual, 0)
    with pytest.raises(OodcliError, match=r"out of memory on cpu with a single image of 8×8: try "):
        recorder(networks.images(5))


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:40])
def test_too_short_to_try_the_network(short, error):
    network = networks.settled(networks.Residual())
    short(networks.Residual, 0, error)
    with pytest.raises(OodcliError, match=r"out of memory on cpu with a single image of 8×8: try "):
        assemble(network, arch="residual", preprocessing=networks.PREPROCESSING)


def test_other_errors_are_not_taken_for_it(residual, short):
    recorder = Recorder(residual, EVERYTHING)
    sizes = short(networks.Residual, 0, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        recorder(networks.images(5))
    assert sizes == [5]


def test_the_command_line_goes_on_with_smaller_batches(trained, short, tmp_path):
    score = ("score", trained / "digits.pt", "noise:uniform?n=20", "-d", "msp", "-d", "odin")
    extract = ("extract", trained / "digits.pt", "noise:uniform?n=20", "--mirror", "-o")
    expected = oodcli(*score, "--mirror", "--batch-size", 4)
    short(cifar_resnet.CifarResNet, 4)
    result = oodcli(*score, "--mirror", "--batch-size", 16)
    assert (result.status, result.out) == (0, expected.out), result.err
    assert "note: out of memory at batch size 8; retrying with 4" in result.err.splitlines()
    assert result.err.count("out of memory at batch size") == 2
    result = oodcli(*extract, tmp_path / "x.h5")
    assert result.status == 0, result.err
    assert "note: out of memory at batch size 5; retrying with 2" in result.err
    result = oodcli("score", tmp_path / "x.h5", "-d", "msp")
    assert result.status == 0, result.err


def test_the_command_line_says_when_not_one_image_fits(trained, monkeypatch, tmp_path):
    def full(self, images, labels):
        raise FULL[0]

    monkeypatch.setattr(Recorder, "_view", full)
    for words in (("score", "-d", "msp"), ("extract",)):
        given = (words[0], trained / "digits.pt", "noise:uniform?n=20", *words[1:])
        result = oodcli(
            *given, "-o", tmp_path / "x.h5" if words[0] == "extract" else tmp_path / "x.csv"
        )
        assert result.status == 1
        assert "oodcli: out of memory on cpu with a single image of 8×8: try a" in result.err
    assert list(tmp_path.iterdir()) == []
