"""The gradient of a step, by a copy of the network whose BatchNorm layers pull to their memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad
from torch.nn.modules.batchnorm import _BatchNorm

from oodcli.classifier import Classifier, as_logits
from oodcli.features import Features, Layer
from oodcli.inversion.objective import Moments, Objective, batchnorm_distance, image_loss
from oodcli.recording import batchnorm_constants


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
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale, a, b = (column.view(shape).to(given.dtype) for column in columns)
        return torch.addcmul(torch.addcmul(a, given, scale), x, b), None, None, None, None


class Recalling(nn.Module):
    """A BatchNorm layer in evaluation mode. On the way back it adds the gradient of ``strength`` ×
    the distance between the moments of its input and what it remembers: with g_μ and g_v the
    derivatives by mean and variance, (g_μ + 2 g_v (x − μ))/n, n the batch times the positions.

    probes: (N, C, 1, …), added to the output of one call each; their gradients are the sums over
    positions of the output's. With them nothing is pulled.
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
        self.probes: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        norm = (self.running_mean, self.running_var, self.weight, self.bias)
        if self.probes:
            probe = self.probes[self.calls]
            self.calls += 1
            y = F.batch_norm(x, *norm, False, 0.0, self.eps)
            return y + probe.view(*probe.shape, *[1] * (x.ndim - 2)).to(y.dtype)
        mean, var = batch_moments(x.detach())
        by_mean, by_var = grad(self._pull, (0, 1))(mean, var)
        count = x.numel() // x.shape[1]
        a, b = (by_mean - 2 * by_var * mean) / count, 2 * by_var / count
        pulled: Tensor = _Pulled.apply(x, norm, self.eps, a, b)
        return pulled

    def _pull(self, mean: Tensor, var: Tensor) -> Tensor:
        memory = (self.running_mean, self.running_var)
        distance = batchnorm_distance((mean, var), memory, self.distance, self.eps)
        return self.strength * distance


class Step:
    """Gradients of an objective by images, with frozen weights. path: ``eager`` or ``compiled``."""

    def __init__(self, classifier: Classifier, objective: Objective, precision: str) -> None:
        self.classifier = classifier
        self.objective = objective
        self._autocast = partial(
            torch.autocast,
            classifier.device.type,
            dtype=torch.bfloat16,
            enabled=precision == "bfloat16",
        )
        self.path = "eager"
        self._taps = [tap for tap in classifier.taps if tap.name in classifier.batchnorms]
        self._network = copy.deepcopy(classifier.network).requires_grad_(False)
        self._recalling = {}
        for name in dict.fromkeys(tap.module for tap in self._taps):
            norm = self._network.get_submodule(name)
            assert isinstance(norm, _BatchNorm)
            self._recalling[name] = Recalling(norm, objective)
            parent, _, attribute = name.rpartition(".")
            setattr(self._network.get_submodule(parent), attribute, self._recalling[name])
        self._forward: Callable[[Tensor], Any] = self._network

    def compiled(self, backend: str = "inductor") -> Step:
        """The same step with its forward pass compiled, which happens when it is first made, and
        again for batches of another size. That raises whatever the compiler does."""
        faster = copy.copy(self)
        faster.path = "compiled"
        faster._forward = torch.compile(self._network, dynamic=False, backend=backend)
        return faster

    def gradient(self, images: Tensor, view: Tensor, labels: Tensor) -> Tensor:
        """(N, C, H, W) of the objective by images. view: what the network sees of them, such as
        their mirror images; labels: (N,)."""
        seen = view.detach().requires_grad_()  # the compiler wants a leaf
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
                logits = as_logits(self._network(images)).float()
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
