"""The gradient of a step, by a copy of the network whose BatchNorm layers pull to their memory, and
whose blocks pull the similarities of patches apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad
from torch.nn.modules.batchnorm import _BatchNorm

from oodcli.errors import CheckpointError
from oodcli.features import Features, Layer
from oodcli.float64 import in_float64
from oodcli.inversion.objective import (
    Moments,
    Objective,
    batchnorm_distance,
    image_loss,
    patch_entropy,
)
from oodcli.networks.classifier import Classifier, Tap
from oodcli.networks.outputs import as_logits, first_tensor, with_first
from oodcli.recording.channels_last import in_channels_last
from oodcli.recording.recorder import batchnorm_constants, only_normalises

SAME = 1e-3
"""How far logits of the copy may be from the network's, in units of the largest."""


def batch_moments(activation: Tensor) -> Moments:
    """Mean and population variance over the batch and its positions of (N, C, …): (C,) each,
    float32. By sums, as spatial_moments, without a float32 copy."""
    dims = [0, *range(2, activation.ndim)]
    count = activation.numel() // activation.shape[1]
    mean = activation.sum(dims, dtype=torch.float32) / count
    length = torch.linalg.vector_norm(activation, dim=dims, dtype=torch.float32)
    return mean, (length.square() / count - mean.square()).clamp(min=0)


class _Pulled(torch.autograd.Function):
    """y = BatchNorm(x) in evaluation mode; on the way back a + b·x is added to the gradient of x.
    All but x: (C,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: tuple[Tensor, ...], eps: float, a: Tensor, b: Tensor
    ) -> Tensor:
        mean, var, weight, bias = norm
        ctx.save_for_backward(x, weight / torch.sqrt(var + eps), a, b)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        x, *columns = ctx.saved_tensors
        scale, a, b = _shaped(columns, x, given.dtype)
        return torch.addcmul(a, given, scale).addcmul_(x, b), None, None, None, None


class _PulledInput(torch.autograd.Function):
    """y = x; on the way back a + b·x is added to the gradient of x. a, b: (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        x, *columns = ctx.saved_tensors
        a, b = _shaped(columns, x, given.dtype)
        return torch.addcmul(given + a, x, b), None, None


def _shaped(columns: Sequence[Tensor], x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Numbers of the channels, (C,) each, to go with x, (N, C, …)."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    return [column.view(shape).to(dtype) for column in columns]


class Recalling(nn.Module):
    """A BatchNorm layer's forward pass in evaluation mode. On the way back it adds the gradient
    of ``strength`` × the distance between the moments of its input and what it remembers: with g_μ
    and g_v the derivatives by mean and variance, (g_μ + 2 g_v (x − μ))/n, n the batch times the
    positions.

    whole: the layer's own forward pass, where it does more than normalise; else None.

    probes: (N, C), added to what is normalised in one call each; their gradients are the sums over
    positions of the gradient by it. With them nothing is pulled.
    """

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, norm: _BatchNorm, objective: Objective) -> None:
        super().__init__()
        found = batchnorm_constants(norm, 1)
        self.eps = found.eps
        self.distance, self.strength = objective.distance, objective.distance_weight
        for name in ("running_mean", "running_var", "weight", "bias"):
            self.register_buffer(name, getattr(found, name))
        self.whole: Callable[[Tensor], Tensor] | None = (
            None if only_normalises(norm) else norm.forward
        )
        self.probes: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.probes:
            return self._probed(x)
        mean, var = batch_moments(x.detach())
        by_mean, by_var = grad(self._pull, (0, 1))(mean, var)
        count = x.numel() // x.shape[1]
        a, b = (by_mean - 2 * by_var * mean) / count, 2 * by_var / count
        if self.whole is not None:
            return self.whole(_PulledInput.apply(x, a, b))
        pulled: Tensor = _Pulled.apply(x, self._norm, self.eps, a, b)
        return pulled

    @property
    def _norm(self) -> tuple[Tensor, ...]:
        return self.running_mean, self.running_var, self.weight, self.bias

    def _probed(self, x: Tensor) -> Tensor:
        probe = self.probes[self.calls]
        self.calls += 1
        probe = probe.repeat_interleave(len(x) // len(probe), 0)  # where an image has several rows
        probe = probe.view(*probe.shape, *[1] * (x.ndim - 2)).to(x.dtype)
        if self.whole is None:
            mean, var, weight, bias = self._norm
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps) + probe
        scale = self.weight / torch.sqrt(self.running_var + self.eps)
        # A channel of weight 0 does not depend on its input, so the probe is not felt.
        (scale,) = _shaped([torch.where(scale == 0, torch.inf, scale)], x, x.dtype)
        return self.whole(x + probe / scale)

    def _pull(self, mean: Tensor, var: Tensor) -> Tensor:
        memory = (self.running_mean, self.running_var)
        distance = batchnorm_distance((mean, var), memory, self.distance, self.eps)
        return self.strength * distance


class _Pushed(torch.autograd.Function):
    """y = x; on the way back a gradient is added to that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor) -> Tensor:
        ctx.save_for_backward(added)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        return given + ctx.saved_tensors[0], None


class Spreading:
    """A hook behind a block. On the way back it adds the gradient of −``strength`` × the mean
    entropy of the block's patch similarities."""

    def __init__(self, tap: Tap, strength: float) -> None:
        self.channel_dim, self.strength = tap.channel_dim, strength

    def __call__(self, block: nn.Module, given: Any, output: Any) -> Any:
        found = first_tensor(output)
        if found is None:
            return None
        added = grad(self._pull)(found.detach())
        return with_first(output, _Pushed.apply(found, added))

    def _pull(self, output: Tensor) -> Tensor:
        return -self.strength * patch_entropy(output, self.channel_dim).mean()


def spread_taps(classifier: Classifier) -> list[Tap]:
    """Blocks and stages with several positions; not what only returns another one's output, such as
    a stage its last block's."""
    taps = [tap for tap in classifier.taps if tap.kind in ("block", "stage")]
    taps = [tap for tap in taps if tap.spatial_size > 1 and "@" not in tap.name]
    return [
        tap for tap in taps if not any(other.module.startswith(f"{tap.module}.") for other in taps)
    ]


class Step:
    """Gradients of an objective by images, with frozen weights. path: ``eager`` or ``compiled``.

    Raises CheckpointError when the copy of the network, whose BatchNorm layers pull, is not the
    same network: its images would be those of another one.
    """

    def __init__(self, classifier: Classifier, objective: Objective, precision: str) -> None:
        self.classifier = classifier
        self.objective = objective
        self.precision = precision
        self._autocast = partial(
            torch.autocast,
            classifier.device.type,
            dtype=torch.bfloat16,
            enabled=precision == "bfloat16",
        )
        self.path = "eager"
        self._taps = [tap for tap in classifier.taps if tap.name in classifier.batchnorms]
        laid_out = in_channels_last(classifier, "float32")
        self._format = torch.contiguous_format if laid_out is classifier else torch.channels_last
        self._network = copy.deepcopy(laid_out.network).requires_grad_(False)
        self._recalling = {}
        for name in dict.fromkeys(tap.module for tap in self._taps):
            norm = self._network.get_submodule(name)
            assert isinstance(norm, _BatchNorm)
            self._recalling[name] = Recalling(norm, objective)
            # The layer stays in its place: a network may ask for its kind or its attributes.
            norm.forward = self._recalling[name].__call__  # type: ignore[method-assign]
        self._pulling: dict[str, nn.Module] = dict(self._recalling)
        spread = spread_taps(classifier) if objective.spread_weight else []
        for tap in spread:
            block = self._network.get_submodule(tap.module)
            block.register_forward_hook(Spreading(tap, objective.spread_weight / len(spread)))
            self._pulling[tap.module] = block
        self._forward: Callable[[Tensor], Any] = self._network
        self._require_same_network()

    def _require_same_network(self) -> None:
        """By the logits of one image, and by which layers were called for it."""
        preprocessing, device = self.classifier.preprocessing, self.classifier.device
        shape = (1, preprocessing.channels, *preprocessing.input_size)
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        found, called = [], dict.fromkeys(self._pulling, 0)

        def count(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                called[name] += 1

            return hook

        handles = [
            layer.register_forward_hook(count(name)) for name, layer in self._pulling.items()
        ]
        try:
            for network in (self.classifier.network, self._network):
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    torch.manual_seed(0)  # a network may draw at random
                    found.append(in_float64(as_logits(network(image))))
        finally:
            for handle in handles:
                handle.remove()
        expected, logits = found
        gap = float((logits - expected).abs().max())
        if not gap <= SAME * float(expected.abs().max().clamp_min(1)):
            raise CheckpointError(
                f"{self.classifier.arch} cannot be inverted: the copy of it that would be used "
                f"gives other logits (by up to {gap:.3g}), so its images would not be this "
                "network's; fit on real images instead, and report this architecture"
            )
        for name, times in called.items():
            if times != sum(tap.module == name for tap in self.classifier.taps):
                raise CheckpointError(
                    f"{self.classifier.arch} cannot be inverted: its layer {name} is "
                    "called in a way that the copy for inversion does not reproduce; fit on real "
                    "images instead, and report this architecture"
                )

    def compiled(self, backend: str = "inductor") -> Step:
        """The same step with its forward pass compiled, which happens when it is first made, and
        again for batches of another size. That raises whatever the compiler does."""
        faster = copy.copy(self)
        faster.path = "compiled"
        faster._forward = torch.compile(self._network, dynamic=False, backend=backend)
        return faster

    def twin(self) -> Step:
        """The same step for another thread, with a network of its own, which may keep what it has
        computed. A compiled forward pass is shared: it keeps nothing."""
        other = Step(self.classifier, self.objective, self.precision)
        if self.path == "compiled":
            other.path, other._forward = self.path, self._forward
        return other

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self._format)

    def gradient(self, images: Tensor, view: Tensor, labels: Tensor) -> Tensor:
        """(N, C, H, W) of the objective by images. view: what the network sees of them, such as
        their mirror images; labels: (N,)."""
        seen = self._laid_out(view.detach()).requires_grad_()  # the compiler wants a leaf
        with self._autocast():
            logits = as_logits(self._forward(seen)).float()
        (by_view,) = torch.autograd.grad(image_loss(self.objective, seen, logits, labels), seen)
        (by_images,) = torch.autograd.grad(view, images, by_view)
        return by_images

    def sensitivity(self, images: Tensor, labels: Tensor) -> Features:
        """Logits, and for each BatchNorm call the spatial mean of the gradient of the label's logit
        by its output. images: (N, C, H, W); labels: (N,)."""
        probes = {
            tap.name: torch.zeros(len(images), tap.channels, device=images.device).requires_grad_()
            for tap in self._taps
        }
        try:
            for tap in self._taps:
                self._recalling[tap.module].probes.append(probes[tap.name])
            with self._autocast():
                logits = as_logits(self._network(self._laid_out(images))).float()
            score = logits.gather(1, labels[:, None]).sum()
            sums = torch.autograd.grad(score, list(probes.values()), allow_unused=True)
        finally:
            for each in self._recalling.values():
                each.probes, each.calls = [], 0
        layers = {
            tap.name: Layer(
                tap.kind,
                gradient=torch.zeros_like(probes[tap.name])
                if total is None
                else total / tap.spatial_size,
            )
            for tap, total in zip(self._taps, sums, strict=True)
        }
        return Features(len(images), label=labels, logits=logits.detach(), layers=layers)
