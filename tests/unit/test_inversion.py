"""The objective, piece by piece; the trajectory; the optimisation on a small network."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial, partialmethod

import networks
import pytest
import torch
from optional import one_in
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from oodcli.errors import CheckpointError, OodcliError
from oodcli.features import Features, Layer
from oodcli.inversion import invert as inverting
from oodcli.inversion.invert import Plan, invert, prepare, wanted_classes
from oodcli.inversion.mgi import Sensitivity
from oodcli.inversion.objective import (
    OBJECTIVES,
    batchnorm_distance,
    gaussian_kl,
    image_loss,
    multiscale_start,
    neighbour_difference,
    patch_entropy,
    total_variation,
)
from oodcli.inversion.quality import Quality, report
from oodcli.inversion.step import Step, batch_moments, spread_taps
from oodcli.networks.assemble import assemble
from oodcli.networks.classifier import Classifier
from oodcli.networks.preprocessing import Preprocessing
from oodcli.recording.recorder import Recorder


@pytest.fixture(scope="module")
def network():
    return networks.classifier(networks.Residual(classes=3))


def test_kl_of_gaussians():
    mean, var = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])
    mean0, var0 = torch.tensor([0.0, 1.0]), torch.tensor([1.5, 1.0])
    expected = kl_divergence(Normal(mean, var.sqrt()), Normal(mean0, var0.sqrt()))
    torch.testing.assert_close(gaussian_kl(mean, var, mean0, var0), expected)
    found, memory = (mean, var), (mean0, var0)
    assert batchnorm_distance(found, memory, "kl").item() == pytest.approx(expected.mean().item())
    assert batchnorm_distance(memory, memory, "kl", 1e-5).item() == pytest.approx(0, abs=1e-7)


def test_distances_by_hand():
    found = (torch.tensor([3.0, 0.0]), torch.tensor([1.0, 2.0]))
    memory = (torch.tensor([0.0, 4.0]), torch.tensor([1.0, 1.0]))
    assert batchnorm_distance(found, memory, "squared").item() == 25 + 1
    assert batchnorm_distance(found, memory, "norm").item() == 5 + 1


def test_smoothness_by_hand():
    images = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]])
    # Across: 1, 2; down: 2, 3; diagonals: 4 and 1.
    assert neighbour_difference(images).item() == pytest.approx((1 + 4 + 4 + 9) / 4)
    expected = 5**0.5 + 13**0.5 + 4 + 1
    assert total_variation(images).item() == pytest.approx(expected)


def test_image_loss_is_the_sum_of_its_parts():
    images = torch.tensor([[[[0.0, 1.0]]]])
    logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    cross = 3 * torch.log1p(torch.exp(torch.tensor(-2 / 3))).item()
    total = image_loss(OBJECTIVES["kl"], images, logits, labels).item()
    assert total == pytest.approx(cross + 0.01 * 1.0, rel=1e-5)
    cross = torch.log1p(torch.exp(torch.tensor(-2.0))).item()
    total = image_loss(OBJECTIVES["paper"], images, logits, labels).item()
    assert total == pytest.approx(cross, rel=1e-6)
    total = image_loss(OBJECTIVES["deepinversion"], images, logits, labels).item()
    assert total == pytest.approx(cross + 2.5e-5 * 1.0, rel=1e-6)


def whole_objective(classifier, objective, images, labels):
    """The scalar to minimise, as it is written down: one pass with a hook at each BatchNorm."""
    distances = []

    def before(norm, args):
        dims = [0, *range(2, args[0].ndim)]
        found = args[0].mean(dims), args[0].var(dims, correction=0)
        memory = norm.running_mean, norm.running_var
        distances.append(batchnorm_distance(found, memory, objective.distance, norm.eps))

    norms = {id(norm): norm for norm in classifier.batchnorms.values()}.values()
    hooks = [norm.register_forward_pre_hook(before) for norm in norms]
    spread, taps = [], spread_taps(classifier) if objective.spread_weight else []

    def after(_, __, output):
        spread.append(patch_entropy(output).mean())

    modules = [classifier.network.get_submodule(tap.module) for tap in taps]
    hooks += [module.register_forward_hook(after) for module in modules]
    logits = classifier.network(images)
    for hook in hooks:
        hook.remove()
    total = objective.distance_weight * torch.stack(distances).sum()
    if spread:
        total = total - objective.spread_weight * torch.stack(spread).mean()
    return total + image_loss(objective, images, logits, labels)


KINDS = {
    "residual": networks.Residual,
    "in place": partial(networks.Residual, inplace=True),
    "shared": networks.Shared,
    "with activation": partial(networks.Apart, networks.Activated),
    "tokens": partial(networks.Tokens, nn.BatchNorm1d),
}


class Viewed(networks.Apart):
    """Flattens a feature map by a view, which only the usual layout allows."""

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.fc(x.view(len(x), -1).view(len(x), 5, -1).mean(2))


KINDS["viewed"] = partial(Viewed, nn.BatchNorm2d)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("path", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_the_gradient_of_a_step(objective, kind, path):
    """Against autograd; with a BatchNorm that is called twice, and one at a single position."""
    network = networks.classifier(KINDS[kind]())
    recipe, labels = OBJECTIVES[objective], torch.tensor([0, 1, 2, 1])
    images = networks.images(4).requires_grad_()
    view = torch.roll(images, (1, -1), (2, 3)).flip(3)
    expected = torch.autograd.grad(whole_objective(network, recipe, view, labels), images)[0]
    step = Step(network, recipe, "float32")
    view = torch.roll(images, (1, -1), (2, 3)).flip(3)
    found = step.gradient(images, view, labels)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    if path == "eager":
        return
    # Traced and differentiated as the compiler would, without waiting for it.
    view = torch.roll(images, (1, -1), (2, 3)).flip(3)
    traced = step.compiled("aot_eager")
    assert (step.path, traced.path) == ("eager", "compiled")
    torch.testing.assert_close(traced.gradient(images, view, labels), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["residual", "viewed"])
def test_a_step_runs_channels_last_where_the_network_allows_it(kind, monkeypatch):
    seen, forward = [], nn.Conv2d.forward

    def watched(self, x):
        seen.append((x, self.weight))
        return forward(self, x)

    step = Step(networks.classifier(KINDS[kind]()), OBJECTIVES["kl"], "float32")
    monkeypatch.setattr(nn.Conv2d, "forward", watched)
    x, labels = networks.images(4).requires_grad_(), torch.tensor([0, 1, 2, 1])
    step.gradient(x, x, labels)
    step.sensitivity(x.detach(), labels)
    assert {
        each.is_contiguous(memory_format=torch.channels_last)
        for pair in seen
        for each in pair
        if each.shape[2:] != (1, 1)  # of which both layouts are the same
    } == {kind == "residual"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_sensitivity_of_a_step(kind):
    """Against the recorder, which differentiates by every activation."""
    network = networks.classifier(KINDS[kind]())
    labels, images = torch.tensor([0, 1, 2, 1]), networks.images(4)
    recorder = Recorder(network, frozenset({"logits", "layers.gradient"}))
    expected = recorder(images, labels)
    step = Step(network, OBJECTIVES["kl"], "float32")
    for _ in range(2):  # nothing of the first call is left
        found = step.sensitivity(images, labels)
        torch.testing.assert_close(found.logits, expected.logits)
        assert found.layers.keys() == network.batchnorms.keys()
        for name, layer in found.layers.items():
            torch.testing.assert_close(
                layer.gradient, expected.layers[name].gradient, rtol=1e-4, atol=1e-6
            )
    # The pull is back afterwards.
    images = images.requires_grad_()
    exact = torch.autograd.grad(whole_objective(network, step.objective, images, labels), images)
    torch.testing.assert_close(
        step.gradient(images, images, labels), exact[0], rtol=1e-3, atol=1e-4
    )


def test_the_network_itself_is_left_alone(network):
    before = {name: type(module) for name, module in network.network.named_modules()}
    step = Step(network, OBJECTIVES["kl"], "bfloat16")
    images = networks.images(3).requires_grad_()
    step.gradient(images, images, torch.tensor([0, 1, 2]))
    assert {name: type(module) for name, module in network.network.named_modules()} == before


PLAN = Plan((0, 1, 2), 4, steps=5, batch_size=6)


def test_fewer_steps_are_longer_where_they_end_at_0():
    kl, paper = OBJECTIVES["kl"], OBJECTIVES["paper"]
    assert kl.in_steps(None) == kl.in_steps(50) == kl
    assert kl.in_steps(24).learning_rate == pytest.approx(0.25, abs=0.002)
    assert kl.in_steps(24).steps == 24
    assert kl.in_steps(3).learning_rate == 0.3
    assert kl.in_steps(100) == replace(kl, steps=100)
    assert paper.in_steps(50) == replace(paper, steps=50)


def test_long_jobs_are_compiled_where_that_is_faster(network, monkeypatch, caplog):
    plan, step, seconds = prepare(network, PLAN)
    assert (plan, step.path) == (PLAN, "eager")
    assert seconds > 0
    monkeypatch.setattr(inverting, "COMPILE_FROM", {"cpu": 0.0})
    monkeypatch.setattr(Step, "compiled", partialmethod(Step.compiled, "aot_eager"))
    times = iter((2.0, 1.0, 1.0, 2.0, 1.0, 1.2))
    monkeypatch.setattr(inverting, "_seconds_per_image_step", lambda *_: next(times))
    whole = 12 * (5 + inverting.SENSITIVITY_POINTS + 1)
    _, step, seconds = prepare(network, PLAN)
    assert (step.path, seconds) == ("compiled", whole)
    _, step, seconds = prepare(network, PLAN)
    assert (step.path, seconds) == ("eager", whole)
    # About as fast is fast enough, or chance would decide the last digits of the images.
    _, step, seconds = prepare(network, PLAN)
    assert (step.path, seconds) == ("compiled", pytest.approx(1.2 * whole))
    monkeypatch.setattr(inverting, "_seconds_per_image_step", lambda *_: 1.0)
    assert prepare(network, PLAN, compiled=True)[1].path == "compiled"

    def without(self):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(Step, "compiled", without)
    with caplog.at_level("INFO", "oodcli"):
        _, step, seconds = prepare(network, PLAN)
    assert step.path == "eager"
    assert caplog.messages == ["not compiled: no compiler"]
    with pytest.raises(OodcliError, match=r"cannot be compiled \(no compiler\)"):
        prepare(network, PLAN, compiled=True)
    assert prepare(network, PLAN, compiled=False)[1].path == "eager"


class Keeping(networks.Residual):
    """Keeps what it has computed, as a network does that is to be looked at afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        time.sleep(0.01)  # so that another thread comes between
        return self.kept


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_batches_made_at_once_are_those_made_one_by_one(compiled, monkeypatch):
    monkeypatch.setattr(Step, "compiled", partialmethod(Step.compiled, "aot_eager"))
    network = networks.classifier(networks.Residual(classes=3) if compiled else Keeping(classes=3))
    plan = replace(PLAN, batch_size=3)
    step = Step(network, plan.objective, plan.precision)
    done: list[int] = []
    found = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums do not depend on how they are divided
    try:
        for each in (plan, replace(plan, at_once=3)):
            made = step.compiled() if compiled else step
            found.append(list(invert(network, each, step=made, progress=done.append)))
    finally:
        torch.set_num_threads(before)
    assert sum(done) == 2 * 12 * plan.total_steps
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.label, other.label)
        assert set(one.sensitivity) == set(network.batchnorms)
        for name, rows in one.sensitivity.items():
            assert torch.equal(rows, other.sensitivity[name])


def test_small_images_are_made_in_several_batches_at_once(network, monkeypatch):
    """On a processor, a thread for each."""
    for threads, expected in {1: 1, 2: 2, 8: 4}.items():
        monkeypatch.setattr(torch, "get_num_threads", lambda number=threads: number)
        plan = Plan((0, 1, 2), 4, batch_size=2)
        assert inverting._at_once(network, plan) == expected
        assert inverting._at_once(network, replace(plan, batch_size=12)) == 1
        assert inverting._at_once(large((96, 96)), plan) == 1
    plan = replace(PLAN, at_once=4)
    monkeypatch.setattr(inverting, "_seconds_per_image_step", lambda *_: 1.0)
    steps = 5 + inverting.SENSITIVITY_POINTS + 1
    assert inverting._seconds(Step(network, plan.objective, "float32"), plan) == 4 * 6 * steps


def test_batches_are_halved_until_they_fit(network, monkeypatch, caplog):
    largest = 3

    def trial(step, plan):
        if len(plan.batches()[0]) > largest:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …")
        return 1.0

    monkeypatch.setattr(inverting, "_seconds_per_image_step", trial)
    with caplog.at_level("INFO", "oodcli"):
        plan, _, _ = prepare(network, PLAN)
    assert [len(labels) for labels in plan.batches()] == [3] * 4
    assert "out of memory at batch size 6; retrying with 3" in caplog.text
    largest = 0
    with pytest.raises(OodcliError, match="out of memory on cpu with a single image"):
        prepare(network, PLAN)

    def wrong(step, plan):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(inverting, "_seconds_per_image_step", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        prepare(network, PLAN)


class Large(nn.Module):
    """For large images; its logits are linear in the BatchNorm's output. side: the only one that it
    takes, or None."""

    def __init__(self, side: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=8, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * (1 if side is None else (side // 8) ** 2), 3)
        self.fixed = side is not None

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.fc(x.flatten(1) if self.fixed else x.mean((2, 3)))


def large(size: tuple[int, int], side: int | None = None) -> Classifier:
    torch.manual_seed(0)
    preprocessing = replace(networks.PREPROCESSING, input_size=size)
    return assemble(Large(side), arch="Large", preprocessing=preprocessing)


def _held_and_apart(weight):
    """The same network with its activation in the BatchNorm layer, and apart from it. weight: of
    one channel of the layer."""
    apart, held = networks.Apart(nn.BatchNorm2d), networks.Apart(networks.Activated)
    networks.settled(apart)
    apart.bn.weight.data[2] = weight
    held.load_state_dict(apart.state_dict())
    return [
        assemble(each, arch="small", preprocessing=networks.PREPROCESSING) for each in (apart, held)
    ]


@pytest.mark.parametrize("weight", [0.7, 0.0])
def test_a_batchnorm_that_holds_its_activation_is_inverted_with_it(weight):
    x, labels = networks.images(4), torch.tensor([0, 1, 2, 0])
    found = []
    for each in _held_and_apart(weight):
        step = Step(each, OBJECTIVES["kl"], "float32")
        view = x.clone().requires_grad_()
        sensitivity = step.sensitivity(x, labels).rows()
        gradient = step.gradient(view, view, labels)
        found.append({**sensitivity, "gradient": gradient})
    expected, seen = found
    if weight == 0:  # the output depends on no input there
        assert not seen["layers/bn/gradient"][:, 2].any()
        seen["layers/bn/gradient"][:, 2] = expected["layers/bn/gradient"][:, 2]
    for name, tensor in seen.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-3, msg=name)


def test_sensitivities_over_tokens():
    x, labels = networks.images(4), torch.tensor([0, 1, 2, 0])
    maps, tokens = networks.Maps(nn.BatchNorm2d), networks.Tokens(nn.BatchNorm1d)
    networks.settled(maps)
    tokens.load_state_dict(maps.state_dict())
    found = []
    for each in (maps, tokens):
        network = assemble(each, arch="small", preprocessing=networks.PREPROCESSING)
        found.append(Step(network, OBJECTIVES["kl"], "float32").sensitivity(x, labels).rows())
    for name, tensor in found[1].items():
        torch.testing.assert_close(tensor, found[0][name], atol=1e-6, rtol=1e-3, msg=name)


class Captured(networks.Maps):
    """Its forward pass is a function that holds the network: a copy runs the original's layers."""

    def __init__(self):
        super().__init__(nn.BatchNorm2d)
        whole = self
        self.run = lambda x: networks.Maps.forward(whole, x)

    def forward(self, x):
        return self.run(x)


def test_a_network_that_a_copy_does_not_follow_is_not_inverted():
    network = assemble(Captured(), arch="captured", preprocessing=networks.PREPROCESSING)
    with pytest.raises(CheckpointError, match="captured cannot be inverted: its layer bn is"):
        Step(network, OBJECTIVES["kl"], "float32")


def test_another_network_is_not_inverted(monkeypatch):
    """As when what a layer holds beside the normalisation is lost."""
    _, held = _held_and_apart(0.7)
    monkeypatch.setattr("oodcli.inversion.step.only_normalises", lambda norm: True)
    with pytest.raises(CheckpointError, match="gives other logits"):
        list(invert(held, Plan((0,), 2, steps=1)))


class Random(networks.Maps):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


def test_a_network_that_draws_at_random_is_the_same_network():
    network = networks.settled(Random(nn.BatchNorm2d))
    network = assemble(network, arch="random", preprocessing=networks.PREPROCESSING)
    Step(network, OBJECTIVES["kl"], "float32")


def test_large_images_are_halved_at_first():
    """The sizes that the network sees, what is stored, and a batch on its own. An odd side."""
    network, seen = large((97, 120)), []
    plan, step, _ = prepare(network, Plan((0, 1, 2), 4, steps=7, batch_size=6), compiled=False)
    assert plan.half_steps == 3
    network.network.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    half, full = (49, 60), (97, 120)
    # Of seven steps the sensitivity is measured at all but one, and after the last.
    steps = [half] * 3 + [full] * 4
    points = {round(7 * point / inverting.SENSITIVITY_POINTS) for point in range(7)}
    expected = [size for t in range(7) for size in ([full] if t in points else []) + [steps[t]]]
    step = Step(network, plan.objective, plan.precision)
    seen.clear()
    whole = list(invert(network, plan, step=step))
    assert seen == 2 * [*expected, full]
    assert all(batch.images.shape == (6, 3, *full) for batch in whole)
    (rest,) = invert(network, plan, first=1, step=step)
    assert torch.equal(rest.images, whole[1].images)
    assert torch.equal(rest.sensitivity["bn"], whole[1].sensitivity["bn"])
    assert not torch.equal(next(invert(network, replace(plan, seed=1))).images, whole[0].images)
    (before, *_) = invert(network, replace(plan, half_steps=0))
    assert not torch.equal(before.images, whole[0].images)


def test_the_jitter_is_in_proportion_to_the_side(monkeypatch):
    shifts, roll = {49: [], 97: []}, torch.roll

    def spy(images: Tensor, shift: tuple[int, int], dims: tuple[int, int]) -> Tensor:
        shifts[images.shape[2]] += map(abs, shift)
        return roll(images, shift, dims)

    monkeypatch.setattr(torch, "roll", spy)
    plan = Plan((0, 1, 2), 1, steps=60, half_steps=30, batch_size=3)
    list(invert(large((97, 97)), plan))
    assert {side: max(reached) for side, reached in shifts.items()} == {49: 3, 97: 6}


@pytest.mark.parametrize(
    ("size", "objective", "steps", "expected"),
    [
        ((96, 96), "kl", 50, 25),
        ((96, 96), "kl", 1, 0),
        ((95, 200), "kl", 50, 0),
        ((32, 32), "kl", 50, 0),
        ((96, 96), "paper", 50, 0),
        ((96, 96), "deepinversion", 50, 0),
    ],
)
def test_which_jobs_are_halved(size, objective, steps, expected):
    plan = Plan((0, 1, 2), 1, OBJECTIVES[objective], steps=steps, batch_size=3)
    assert prepare(large(size), plan, compiled=False)[0] == replace(plan, half_steps=expected)


def test_a_network_of_one_size_is_never_given_another(caplog):
    network = large((96, 96), side=96)
    plan = Plan((0, 1, 2), 1, steps=4, batch_size=3)
    with caplog.at_level("INFO", "oodcli"):
        found, step, _ = prepare(network, plan, compiled=False)
    assert found == plan
    (note,) = caplog.messages
    assert note.startswith("all steps run at full size: the network does not accept half of it (")
    assert note.endswith("mat1 and mat2 shapes cannot be multiplied (1x144 and 576x3))")
    assert next(invert(network, found, step=step)).images.shape == (3, 3, 96, 96)

    def picky(_, args):
        if args[0].shape[2] != 96:
            raise AssertionError

    network = large((96, 96))
    network.network.register_forward_pre_hook(picky)
    with caplog.at_level("INFO", "oodcli"):
        assert prepare(network, plan, compiled=False)[0] == plan
    assert caplog.messages[1].endswith("half of it (AssertionError)")


def test_a_job_is_as_long_as_its_multiply_adds():
    """Counted by hand: 9·3·6 a position and 36·9 a position of the two convolutions, the head."""
    network = networks.classifier(networks.Residual(classes=3))
    height, width = network.preprocessing.input_size
    convolutions = [m for m in network.network.modules() if isinstance(m, nn.Conv2d)]
    shapes = {}
    hooks = [
        m.register_forward_hook(lambda m, _, out: shapes.update({m: out.shape[2:].numel()}))
        for m in convolutions
    ]
    network.network(torch.zeros(1, 3, height, width))
    for hook in hooks:
        hook.remove()
    each = sum(m.weight.numel() * shapes[m] for m in convolutions) + 6 * 3
    plan = replace(PLAN, steps=10)
    assert inverting._multiply_adds(network, plan) == each * 10 * 12
    assert inverting._multiply_adds(network, replace(plan, half_steps=4)) == each * 7 * 12


@pytest.mark.slow
def test_an_interrupted_job_goes_on_in_the_way_it_began(network, monkeypatch):
    monkeypatch.setattr(Step, "compiled", partialmethod(Step.compiled, "aot_eager"))
    for path in ("eager", "compiled"):
        decided = {"batch_size": 3, "half_steps": 2, "at_once": 2, "path": path}
        plan, step, seconds = prepare(network, PLAN, decided=decided)
        assert plan == replace(PLAN, batch_size=3, half_steps=2, at_once=2)
        assert step.path == path
        assert seconds > 0
        assert inverting.decisions(plan, step) == decided


def test_cheap_steps_are_counted_as_such(monkeypatch):
    trials = []
    monkeypatch.setattr(inverting, "COMPILE_FROM", {"cpu": 0.0})

    def seconds(step, trial):
        trials.append((step.path, trial.steps, trial.half_steps))
        return 1.0 if trial.half_steps else 4.0

    monkeypatch.setattr(inverting, "_seconds_per_image_step", seconds)
    monkeypatch.setattr(Step, "compiled", partialmethod(Step.compiled, "aot_eager"))
    plan = Plan((0, 1, 2), 4, steps=50, batch_size=6)
    full = 4.0 * (inverting.SENSITIVITY_POINTS + 1)
    assert prepare(large((96, 96)), plan)[2] == 12 * (25 * 1.0 + 25 * 4.0 + full)
    # The full size is tried first, for its memory; a compiled step is tried at both, too.
    tried = [(4, 0), (4, 4)]
    assert trials == [(path, *trial) for path in ("eager", "compiled") for trial in tried]
    trials.clear()
    # Nothing is compiled for a size that the job does not use.
    assert prepare(large((32, 32)), plan)[2] == 12 * (50 * 4.0 + full)
    assert trials == [("eager", 4, 0), ("compiled", 4, 0)]


def test_the_sensitivity_of_a_halved_step_is_that_of_the_full_size(monkeypatch):
    """The gradient by the BatchNorm's output, with a mean over 12 x 12 positions, is w/144."""
    points = []

    class Seen(Sensitivity):
        def add(self, point: Features) -> None:
            points.append(point.layers["bn"].gradient)
            super().add(point)

    monkeypatch.setattr(inverting, "Sensitivity", Seen)
    network = large((96, 96))
    list(invert(network, Plan((0, 1, 2), 1, steps=6, half_steps=3, batch_size=3)))
    assert len(points) == inverting.SENSITIVITY_POINTS + 1
    for gradient in points:
        torch.testing.assert_close(gradient, network.network.fc.weight / 144)


def test_published_settings():
    deep = OBJECTIVES["deepinversion"]
    assert (deep.steps, deep.learning_rate, deep.distance_weight) == (2000, 0.05, 10)
    assert (deep.smoothness_weight, deep.roll, deep.mirror) == (2.5e-5, 2, False)
    ours = OBJECTIVES["kl"]
    assert (ours.steps, ours.learning_rate, ours.betas, ours.cosine) == (50, 0.15, (0.5, 0.9), True)


def test_batch_moments():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64).float() * 2 + 1
    mean, var = batch_moments(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(var, x.var((0, 2, 3), correction=0), atol=1e-5, rtol=1e-5)
    mean, var = batch_moments(x[:, :, 0, 0])
    torch.testing.assert_close(var, x[:, :, 0, 0].var(0, correction=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (28, 28), (224, 224), (64, 32)])
def test_the_start_has_the_same_spread_at_every_size(size):
    generator = torch.Generator().manual_seed(0)
    images = multiscale_start((64, 3, *size), generator)
    assert images.shape == (64, 3, *size)
    # 1 (scales, less what interpolation takes) + 0.25 (colour) + 0.02 (white).
    assert 0.55 < images.var().item() < 1.3
    assert images.mean((2, 3)).std().item() > 0.5  # images differ in colour


def test_sensitivity_by_hand():
    """Two images; the second stands still once, and that step is skipped."""
    label = torch.tensor([1, 0])
    measure = Sensitivity(label)
    scores = [(0.0, 5.0), (2.0, 5.001), (6.0, 4.0)]
    gradients = [(9.0, 9.0), (1.0, 7.0), (8.0, 3.0)]
    for (first, second), gradient in zip(scores, gradients, strict=True):
        logits = torch.tensor([[-9.0, first], [second, -9.0]])
        layer = Layer("batchnorm", gradient=torch.tensor(gradient)[:, None])
        measure.add(Features(count=2, label=label, logits=logits, layers={"bn": layer}))
    average = measure.average()["bn"][:, 0].tolist()
    assert average[0] == pytest.approx((1 / 2 + 8 / 4) / 2)
    assert average[1] == pytest.approx(3 / (4.0 - 5.001))


def test_an_image_that_never_moves_has_no_sensitivity():
    measure = Sensitivity(torch.tensor([0]))
    for _ in range(3):
        layer = Layer("batchnorm", gradient=torch.ones(1, 2))
        measure.add(Features(count=1, logits=torch.zeros(1, 2), layers={"bn": layer}))
    assert measure.average()["bn"].tolist() == [[0.0, 0.0]]


def test_batches_mix_the_classes():
    plan = Plan(classes=(0, 1, 2), per_class=7, batch_size=10)
    batches = plan.batches()
    assert [len(labels) for labels in batches] == [7, 7, 7]
    assert torch.bincount(torch.cat(batches)).tolist() == [7, 7, 7]
    assert all(len(labels.unique()) == 3 for labels in batches)


def test_batches_of_many_classes_are_spread_over_all():
    """ImageNet's classes are sorted by kind: 25 in a row would be birds."""
    plan = Plan(classes=tuple(range(1000)), per_class=2, batch_size=25)
    batches = plan.batches()
    assert torch.bincount(torch.cat(batches)).tolist() == [2] * 1000
    for labels in batches:
        assert labels.sort().values.diff().max() < 1000 / 25 * 2
        assert len(labels.unique()) == 25
    few = Plan(tuple(range(1000)), 1, total=30, batch_size=25)
    assert [len(labels) for labels in few.batches()] == [15, 15]
    labels = torch.cat(few.batches())
    assert few.count == few.inverted == len(labels.unique()) == 30
    assert labels.sort().values.diff().max() < 1000 / 30 * 2
    others = torch.cat(replace(few, seed=1).batches())
    assert not set(others.tolist()) & set(labels.tolist())
    most = Plan((4, 7), 1, total=5)
    assert torch.cat(most.batches()).tolist() == [4, 7, 4, 7, 4]
    assert (most.count, most.inverted) == (5, 2)


def test_sensitivities_are_left_out(network):
    plan = Plan((0, 1, 2), 2, steps=5, batch_size=6)
    (whole,), (plain,) = (
        invert(network, replace(plan, sensitivity=wanted)) for wanted in (True, False)
    )
    assert torch.equal(whole.images, plain.images)
    assert whole.sensitivity
    assert not plain.sensitivity


@pytest.mark.parametrize("objective", one_in(3, OBJECTIVES))
def test_inversion_lowers_its_objective(network, objective):
    recipe = OBJECTIVES[objective]
    plan = Plan((0, 1, 2), 8, recipe, steps=60, batch_size=24)
    (batch,) = invert(network, plan)
    start = multiscale_start((24, 3, 8, 8), torch.Generator().manual_seed(5))
    with torch.no_grad():
        before, after = (
            whole_objective(network, recipe, images, batch.label)
            for images in (start, batch.images.float())
        )
    assert after < 0.7 * before
    assert batch.images.dtype == torch.float16
    assert set(batch.sensitivity) == set(network.batchnorms)
    assert batch.sensitivity["bn1"].shape == (24, 6)
    assert batch.sensitivity["bn1"].any()


def test_each_batch_depends_on_its_number_alone(network):
    plan = Plan((0, 1, 2), 6, steps=5, batch_size=6)
    whole = list(invert(network, plan))
    rest = list(invert(network, plan, first=1))
    assert len(whole) == 3
    for one, other in zip(whole[1:], rest, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.sensitivity["bn1"], other.sensitivity["bn1"])
    (other, *_) = invert(network, replace(plan, seed=1))
    assert not torch.equal(other.images, whole[0].images)


def test_progress_counts_image_steps(network):
    steps = []
    plan = Plan((0, 1, 2), 4, steps=5, batch_size=6)
    list(invert(network, plan, progress=steps.append))
    assert sum(steps) == 12 * 5


def test_bfloat16_is_close(network):
    plan = Plan((0, 1, 2), 4, steps=3, batch_size=12)
    (exact,) = invert(network, plan)
    (fast,) = invert(network, replace(plan, precision="bfloat16"))
    assert (exact.images - fast.images).abs().float().mean() < 0.1


def test_a_network_without_batchnorm_is_refused():
    plain = networks.classifier(networks.Plain())
    with pytest.raises(CheckpointError, match=r"no BatchNorm layer.*patches.*msp, energy, gen"):
        next(invert(plain, Plan((0, 1, 2), 2)))


def test_divergence_is_an_error(network):
    wild = replace(OBJECTIVES["kl"], learning_rate=1e9, cosine=False)
    with pytest.raises(OodcliError, match="diverged"):
        list(invert(network, Plan((0, 1, 2), 2, wild, steps=3)))


def test_wanted_classes():
    assert wanted_classes(None, 3) == (0, 1, 2)
    assert wanted_classes("0-2, 5", 6) == (0, 1, 2, 5)
    for text in ("7", "a", "1-", "-1", "", "2-1"):
        with pytest.raises(OodcliError, match="--classes"):
            wanted_classes(text, 6)


def test_quality_of_the_networks_own_statistics(network):
    """A batch whose BatchNorm inputs are exactly as remembered has no gap."""
    images = networks.images(16)
    quality = Quality(network)
    quality.add(images.half(), torch.zeros(16, dtype=torch.int64))
    found = report([quality.sums()])
    with torch.no_grad():
        given = network.network.conv1(images.half().float())
    bn1 = network.network.bn1
    expected = gaussian_kl(
        given.mean((0, 2, 3)),
        given.var((0, 2, 3), correction=0),
        bn1.running_mean,
        bn1.running_var + bn1.eps,
    ).mean()
    assert found["batchnorm_gap"]["bn1"] == pytest.approx(expected.item(), rel=1e-4)
    with torch.no_grad():
        logits = network.network(images.half().float())
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(16, dtype=torch.int64))
    assert found["cross_entropy"] == pytest.approx(expected.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------ timm

FAMILIES = (
    "halonet_h1",
    "test_byobnet",
    "convmixer_768_32",
    "cpubone_nano",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "test_efficientnet",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "fasternet_t0",
    "fastvit_t8",
    "ghostnet_050",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "levit_128s",
    "lowformer_b0",
    "test_coatnet",
    "lcnet_035",
    "mobilevit_xxs",
    "nasnetalarge",
    "nextvit_small",
    "pnasnet5large",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "test_resnet",
    "resnetv2_18",
    "rexnet_100",
    "selecsls42",
    "legacy_seresnet18",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "tiny_vit_5m_224",
    "tresnet_m",
    "vgg11_bn",
    "visformer_tiny",
    "vit_small_resnet50d_s16_224",
    "volo_d1_224",
    "ese_vovnet19b_slim_dw",
    "legacy_xception",
    "xception41p",
    "xcit_nano_12_p8_224",
)
"""One small member of each of timm's families with BatchNorm layers."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_timm_families_are_inverted_as_they_are(name):
    """The gradient of a step against autograd, on weights and statistics that leave no layer out,
    and sensitivities against the recorder."""
    timm = pytest.importorskip("timm")
    if name not in timm.list_models():
        pytest.skip(f"timm {timm.__version__} has no {name}")
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=3)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for tensor, low in (
                *((module.running_mean, -0.2), (module.running_var, 0.8)),
                *((module.weight, 0.8), (module.bias, -0.2)),
            ):
                tensor.data.uniform_(low, low + 0.4, generator=generator)
    config = timm.data.resolve_model_data_config(network)
    found = None
    for size in ((96, 96), config["input_size"][1:]):  # some take their own size alone
        preprocessing = Preprocessing(size, (0.5,) * 3, (0.5,) * 3)
        try:
            found = assemble(network, arch=name, preprocessing=preprocessing)
            break
        except CheckpointError:
            continue
    assert found is not None
    recipe, labels = OBJECTIVES["kl"], torch.tensor([0, 2])
    images = torch.randn(2, 3, *size, generator=generator).requires_grad_()
    expected = torch.autograd.grad(whole_objective(found, recipe, images, labels), images)[0]
    step = Step(found, recipe, "float32")
    seen = step.gradient(images, images, labels)
    assert _apart(seen, expected) < 0.1
    recorded = Recorder(found, frozenset({"logits", "layers.gradient"}), kinds={"batchnorm"})
    plain = recorded(images.detach(), labels)
    sensitivity = step.sensitivity(images.detach(), labels)
    assert _apart(sensitivity.logits, plain.logits) < 0.01
    for layer, values in sensitivity.layers.items():
        assert _apart(values.gradient, plain.layers[layer].gradient) < 0.1


def _apart(seen, expected):
    """How far two tensors are apart, in lengths of the second; rounding that moves an input over
    the kink of a ReLU makes single numbers differ."""
    return float(torch.dist(seen, expected) / expected.norm().clamp_min(1e-6))
