"""Objectives of inversion: pure functions, and the settings of the recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Moments = tuple[Tensor, Tensor]
"""Mean and variance over a batch and its positions, (C,) each."""


@dataclass(frozen=True)
class Objective:
    """One recipe. temperature: τ of τ·CE(z/τ). distance: between the batch's BatchNorm input and
    the layer's memory. smoothness: of neighbouring pixels. roll: largest random shift in pixels of
    a 32-pixel image, in proportion for others. learning_rate, betas: Adam's; cosine: to 0.
    half_share: of the steps, the first ones, that are made at half the side of large images.
    spread_weight: of the entropy of patch similarities, the mean over blocks and images."""

    name: str
    steps: int
    learning_rate: float
    betas: tuple[float, float]
    cosine: bool
    temperature: float
    distance: Literal["kl", "squared", "norm"]
    distance_weight: float
    smoothness: Literal["none", "squared", "norm"]
    smoothness_weight: float
    roll: int
    mirror: bool
    start: Literal["multiscale", "normal"]
    half_share: float
    spread_weight: float = 0.0

    def in_steps(self, steps: int | None) -> Objective:
        """The recipe in another number of steps, None: in its own. Where the learning rate falls to
        0, fewer steps are longer, at most twice as long: 24 instead of 50 then detect about as
        well (docs/research/cost.md)."""
        if steps is None:
            return self
        rate = self.learning_rate
        if self.cosine:
            rate *= min(2.0, max(1.0, self.steps / steps) ** LONGER)
        return replace(self, steps=steps, learning_rate=rate)


PATCHES = 32
"""Patches of an image whose similarities are compared: the memory grows with its square."""

WIDTH = 0.1
"""Standard deviation of the kernels of cosine similarities, which are in [−1, 1]."""

LONGER = 0.7
"""Power of the number of steps by which they are longer where they are fewer."""

TINY = 1e-12
"""Added to a density: the derivative of f log f is infinite at 0."""

_KL = Objective(
    name="kl",
    steps=50,
    learning_rate=0.15,
    betas=(0.5, 0.9),
    cosine=True,
    temperature=3.0,
    distance="kl",
    distance_weight=10.0,
    smoothness="squared",
    smoothness_weight=0.01,
    roll=2,
    mirror=True,
    start="multiscale",
    # On EfficientNet-Lite0, 224 pixels, the BatchNorm gap ends where 50 whole steps end and
    # lower than after the 31 of the same cost, the cross entropy near that of the 31. With
    # three quarters both are higher than with a half.
    half_share=0.5,
)

OBJECTIVES = {
    objective.name: objective
    for objective in (
        _KL,
        # For many classes. On EfficientNet-Lite0, 24 steps reached the wanted class for 44 % of 16
        # images with the weight 10, for 81 % with 2, and with twice the learning rate for 94 %.
        replace(_KL, name="short", steps=24, learning_rate=0.25, distance_weight=2.0),
        # For networks without BatchNorm, after PSAQ-ViT.
        replace(_KL, name="patches", steps=30, distance_weight=0.0, spread_weight=1.0),
        # C2IR eq. 5 as printed; the optimiser, which it leaves open, is that of its reference 8,
        # DeepInversion.
        Objective(
            name="paper",
            steps=2000,
            learning_rate=0.05,
            betas=(0.9, 0.999),
            cosine=False,
            temperature=1.0,
            distance="squared",
            distance_weight=1.0,
            smoothness="none",
            smoothness_weight=0.0,
            roll=0,
            mirror=False,
            start="normal",
            half_share=0.0,
        ),
        # Yin et al. 2020, the published CIFAR-10 settings.
        Objective(
            name="deepinversion",
            steps=2000,
            learning_rate=0.05,
            betas=(0.9, 0.999),
            cosine=False,
            temperature=1.0,
            distance="norm",
            distance_weight=10.0,
            smoothness="norm",
            smoothness_weight=2.5e-5,
            roll=2,
            mirror=False,
            start="normal",
            half_share=0.0,
        ),
    )
}


def gaussian_kl(mean: Tensor, var: Tensor, mean0: Tensor, var0: Tensor) -> Tensor:
    """KL(N(μ, v) ‖ N(μ₀, v₀)) = ½(log v₀/v + (v + (μ − μ₀)²)/v₀ − 1), element by element."""
    return 0.5 * (torch.log(var0 / var) + (var + (mean - mean0).square()) / var0 - 1)


def batchnorm_distance(
    found: Moments, remembered: Moments, distance: str, eps: float = 0.0
) -> Tensor:
    """How far a batch is from what one BatchNorm layer remembers; a scalar.

    ``kl``: mean over channels of the Gaussian KL (eps on both variances, as the layer adds it).
    ``squared``: ‖μ − μ₀‖² + ‖v − v₀‖² (C2IR eq. 5). ``norm``: ‖μ − μ₀‖ + ‖v − v₀‖ (DeepInversion
    eq. 4).
    """
    (mean, var), (mean0, var0) = found, remembered
    if distance == "kl":
        return gaussian_kl(mean, var + eps, mean0, var0 + eps).mean()
    if distance == "squared":
        return (mean - mean0).square().sum() + (var - var0).square().sum()
    norms = [torch.linalg.vector_norm(mean - mean0), torch.linalg.vector_norm(var - var0)]
    return torch.stack(norms).sum()


def neighbour_difference(images: Tensor) -> Tensor:
    """Mean squared difference of horizontal and vertical neighbours; a scalar. (N, C, H, W)."""
    across = (images[..., :, 1:] - images[..., :, :-1]).square()
    down = (images[..., 1:, :] - images[..., :-1, :]).square()
    return (across.sum() + down.sum()) / max(across.numel() + down.numel(), 1)


def total_variation(images: Tensor) -> Tensor:
    """Sum of the Euclidean norms of the differences to the right, lower, lower right and lower
    left neighbours, over the whole batch (DeepInversion's ℓ2 total variation); a scalar."""
    pairs = (
        (images[..., :, 1:], images[..., :, :-1]),
        (images[..., 1:, :], images[..., :-1, :]),
        (images[..., 1:, 1:], images[..., :-1, :-1]),
        (images[..., 1:, :-1], images[..., :-1, 1:]),
    )
    norms = [torch.linalg.vector_norm(one - other) for one, other in pairs]
    return torch.stack(norms).sum()


def special_tokens(tokens: Tensor) -> int:
    """How many of (N, T, C) come before the patches, such as class tokens: what T is more than a
    square, because patches of a square image are one."""
    return tokens.shape[1] - math.isqrt(tokens.shape[1]) ** 2


def spread_order(count: int) -> Tensor:
    """A permutation of 0 … count − 1, (count,) int64, in which every stretch is spread evenly: the
    ranks of the multiples of the golden ratio, modulo 1."""
    multiples = torch.arange(count, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2)
    return multiples.frac().argsort().argsort()


def patch_entropy(activation: Tensor, channel_dim: int = 1) -> Tensor:
    """How varied the cosine similarities of an image's patches are: the differential entropy
    −∫ f log f of their density f (PSAQ-ViT, Li et al. 2022, arXiv 2203.02250, eq. 6 to 8), in nats.

    f is a kernel density with Gaussian kernels of the width WIDTH; the integral is a sum over a
    grid of the same width. Of more than PATCHES patches, evenly spread ones are compared, each pair
    once. activation: (N, C, …), or with channel_dim −1 (N, …, C). Returns (N,) float32; zeros where
    there are fewer than two patches.
    """
    tokens = activation.movedim(channel_dim, -1)
    special = special_tokens(tokens) if tokens.ndim == 3 else 0
    tokens = tokens.flatten(1, -2)[:, special:].float()  # (N, T, C)
    order = spread_order(tokens.shape[1])[:PATCHES].to(tokens.device)
    patches = F.normalize(tokens[:, order], dim=-1)
    one, other = torch.triu_indices(len(order), len(order), 1, device=tokens.device)
    if not len(one):
        return tokens.new_zeros(len(tokens))
    similarities = (patches @ patches.mT)[:, one, other]  # (N, pairs)
    grid = torch.arange(-1 - 3 * WIDTH, 1 + 3.5 * WIDTH, WIDTH, device=tokens.device)
    exponents = (similarities[:, None] - grid[:, None]).square() / (-2 * WIDTH**2)
    density = exponents.exp().mean(2) / (WIDTH * math.sqrt(2 * math.pi)) + TINY  # (N, grid)
    return -(density * density.log()).sum(1) * WIDTH


def image_loss(objective: Objective, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """What is to be minimised besides the distances of the BatchNorm layers: τ·CE(z/τ) and the
    smoothness; a scalar. images: (N, C, H, W); logits: (N, K); labels: (N,)."""
    tau = objective.temperature
    total = tau * F.cross_entropy(logits / tau, labels)
    if objective.smoothness == "squared":
        total = total + objective.smoothness_weight * neighbour_difference(images)
    elif objective.smoothness == "norm":
        total = total + objective.smoothness_weight * total_variation(images)
    return total


def multiscale_start(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Noise with structure at every scale, in normalised space, unclipped: (N, C, H, W) float32.

    0.15 of white noise, plus ½ of the bilinear upsampling of randn(s, s) for every power of two
    2 ≤ s ≤ half the shorter side (the weights are such that their squares sum to 1 whatever the
    number of scales, as they do for the four scales of 32 pixels), plus ½ of a constant colour.
    """
    count, channels, height, width = shape
    images = 0.15 * torch.randn(shape, generator=generator)
    images += 0.5 * torch.randn((count, channels, 1, 1), generator=generator)
    scales = []
    scale = 2
    while scale <= min(height, width) // 2:
        scales.append(scale)
        scale *= 2
    for scale in scales:
        coarse = torch.randn((count, channels, scale, scale), generator=generator)
        images += len(scales) ** -0.5 * F.interpolate(
            coarse, size=(height, width), mode="bilinear", align_corners=False
        )
    return images
