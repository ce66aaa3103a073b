"""How good virtual images are, by the network's own account."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oodcli.classifier import Classifier
from oodcli.features import INPUT, recorded
from oodcli.inversion.objective import gaussian_kl
from oodcli.recording import Recorder


class Quality:
    """Cross entropy, agreement with the target class, and the gap to each BatchNorm layer: the KL
    divergence from the moments of all images together to the layer's memory, mean over channels,
    in nats. Judged in float32 on the images as they are stored."""

    def __init__(self, classifier: Classifier) -> None:
        self._record = Recorder(
            classifier, frozenset({"logits", "batchnorm.mean", "batchnorm.var"})
        )
        self._device = classifier.device
        self._count = 0
        self._cross_entropy = 0.0
        self._agreed = 0
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}
        self._memory: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, images: Tensor, labels: Tensor) -> None:
        """images: (N, C, H, W) float16, normalised; labels: (N,)."""
        seen = self._record(images.float())
        logits = recorded(seen.logits)
        target = labels.to(logits.device)
        self._count += len(images)
        self._cross_entropy += float(F.cross_entropy(logits, target, reduction="sum"))
        self._agreed += int((logits.argmax(1) == target).sum())
        for name, norm in seen.batchnorm.items():
            if name == INPUT:
                continue
            center, var = recorded(norm.mean).double(), recorded(norm.var).double()
            shrink = (norm.spatial_size - 1) / norm.spatial_size
            second = var * shrink + center.square()
            zero = torch.zeros((), dtype=torch.float64, device=second.device)
            self._first[name] = self._first.get(name, zero) + center.sum(0)
            self._second[name] = self._second.get(name, zero) + second.sum(0)
            self._memory[name] = (
                norm.running_mean.double(),
                norm.running_var.double() + norm.eps,
            )

    def report(self) -> dict[str, Any]:
        """cross_entropy (mean, nats), agreement (share), batchnorm_gap (layer → mean KL)."""
        count = max(self._count, 1)
        gaps = {}
        for name, (mean0, var0) in self._memory.items():
            mean = self._first[name] / count
            var = (self._second[name] / count - mean.square()).clamp(min=0)
            eps = torch.finfo(torch.float32).tiny
            gaps[name] = float(gaussian_kl(mean, var + eps, mean0, var0).mean())
        return {
            "cross_entropy": self._cross_entropy / count,
            "agreement": self._agreed / count,
            "batchnorm_gap": gaps,
        }
