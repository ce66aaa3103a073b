"""Images that are changed along a gradient: the losses, and the changes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oodcli.detectors.pro import ascent
from oodcli.features import AdaScaleStep, OdinStep, ProSteps
from oodcli.float64 import in_float64


def sum_of_logits(logits: Tensor, classes: Tensor) -> Tensor:
    """Of one logit a row: the gradients are those of each row's. logits: (N, K), classes: (N,)."""
    return logits.gather(1, classes[:, None]).sum()


def odin_loss(logits: Tensor, step: OdinStep) -> Tensor:
    """Cross entropy of softmax(z/T) and the predicted class, summed over the rows."""
    classes = logits.detach().argmax(1)
    return F.cross_entropy(logits / step.temperature, classes, reduction="sum")


def pro_loss(logits: Tensor, how: ProSteps) -> Tensor:
    """Its gradient by the image has the signs of that of the uncertainty, row for row."""
    return (logits * ascent(in_float64(logits.detach()), how).float().to(logits.device)).sum()


def moved_by_odin(images: Tensor, gradient: Tensor, std: Tensor, step: OdinStep) -> Tensor:
    """x' = x − ε sign(∇ₓ CE(z/T, argmax z)) (Liang et al. 2018, eq. 2), ε in pixels, so divided by
    the preprocessing's std (C, 1, 1); or only the value of largest gradient, i-ODIN. images,
    gradient: (N, C, H, W)."""
    change = step.epsilon / std * gradient.sign()
    if step.where == "largest":
        change = change * chosen(gradient, gradient.flatten(1).abs().argmax(1, keepdim=True))
    return images - change


def moved_by_pro(images: Tensor, gradient: Tensor, how: ProSteps) -> Tensor:
    """A step that raises the uncertainty (Chen et al. 2025, eq. 5). images, gradient:
    (N, C, H, W)."""
    return images + how.epsilon * gradient.sign()


def moved_by_adascale(images: Tensor, gradient: Tensor, step: AdaScaleStep) -> Tensor:
    """x' = x + ε sign(∇ₓ z_k) for the fraction of the values with the smallest gradients, at least
    one; the others stay (Regmi 2025). images, gradient: (N, C, H, W)."""
    sizes = gradient.flatten(1).abs()
    count = max(1, int(sizes.shape[1] * step.fraction))
    smallest = sizes.topk(count, dim=1, largest=False, sorted=False).indices
    return images + step.epsilon * gradient.sign() * chosen(gradient, smallest)


def chosen(images: Tensor, places: Tensor) -> Tensor:
    """1 at some places of each image, else 0, of the same shape. places: (N, n) indices into the
    values of an image, in the order of its dimensions."""
    flat = torch.zeros(len(images), images[0].numel(), device=images.device, dtype=images.dtype)
    return flat.scatter_(1, places, 1).view(images.shape)
