"""Quality of virtual images, measured with the network itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from oodcli.features import INPUT, recorded
from oodcli.float64 import in_float64
from oodcli.inversion.objective import gaussian_kl
from oodcli.networks.classifier import Classifier
from oodcli.recording.recorder import Recorder

Sums = Mapping[str, NDArray[np.float64]]
"""What a report is made of, and files that are parts of one keep: ``counts`` (3,), which are the
images, their cross entropy, and how many are taken for their class; and for each BatchNorm layer
``moments/<name>`` (2, C), sums of first and second moments, and ``memory/<name>`` (2, C)."""


class Quality:
    """Cross entropy, agreement with the target class, and the gap to each BatchNorm layer: the KL
    divergence from the moments of all images together to the layer's memory, mean over channels,
    in nats. Judged in float32 on the images as they are stored."""

    def __init__(self, classifier: Classifier) -> None:
        self._record = Recorder(
            classifier, frozenset({"logits", "batchnorm.mean", "batchnorm.var"})
        )
        self._counts = torch.zeros(3, dtype=torch.float64)
        self._moments: dict[str, Tensor] = {}
        self._memory: dict[str, Tensor] = {}

    def add(self, images: Tensor, labels: Tensor) -> None:
        """images: (N, C, H, W) float16, normalised; labels: (N,)."""
        seen = self._record(images.float())
        logits = recorded(seen.logits)
        target = labels.to(logits.device)
        entropy = float(F.cross_entropy(logits, target, reduction="sum"))
        agreed = int((logits.argmax(1) == target).sum())
        self._counts += torch.tensor([len(images), entropy, agreed], dtype=torch.float64)
        for name, norm in seen.batchnorm.items():
            if name == INPUT:
                continue
            center, var = in_float64(recorded(norm.mean)), in_float64(recorded(norm.var))
            shrink = (norm.spatial_size - 1) / norm.spatial_size
            second = var * shrink + center.square()
            found = torch.stack([center.sum(0), second.sum(0)])
            self._moments[name] = self._moments.get(name, torch.zeros_like(found)) + found
            variance = in_float64(norm.running_var) + norm.eps
            self._memory[name] = torch.stack([in_float64(norm.running_mean), variance])

    def sums(self) -> Sums:
        """Those of all images so far."""
        named = {"counts": self._counts}
        named |= {f"moments/{name}": sums for name, sums in self._moments.items()}
        named |= {f"memory/{name}": memory for name, memory in self._memory.items()}
        return {name: tensor.cpu().numpy() for name, tensor in named.items()}


def report(parts: Sequence[Sums]) -> dict[str, Any]:
    """cross_entropy (mean, nats), agreement (share), batchnorm_gap (layer → mean KL), of the images
    of all parts together; with 9 digits, so that it does not depend on how many parts there are.
    Raises KeyError or ValueError when the parts do not go together."""
    total, entropy, agreed = np.sum([part["counts"] for part in parts], axis=0).tolist()
    count = max(total, 1)
    gaps = {}
    for where, memory in parts[0].items():
        kind, _, name = where.partition("/")
        if kind != "memory":
            continue
        sums = np.sum([part[f"moments/{name}"] for part in parts], axis=0)
        mean, second = torch.from_numpy(sums / count)
        var = (second - mean.square()).clamp(min=0)
        eps = torch.finfo(torch.float32).tiny
        mean0, var0 = torch.from_numpy(memory)
        gaps[name] = _rounded(float(gaussian_kl(mean, var + eps, mean0, var0).mean()))
    return {
        "cross_entropy": _rounded(entropy / count),
        "agreement": _rounded(agreed / count),
        "batchnorm_gap": gaps,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")
