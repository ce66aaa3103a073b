"""Class-Conditional Impressions Reappearing (paper "C2IR"): deviations from virtual images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, in_blocks
from oodcli.detectors.class_statistics import class_moments, class_of, predicted_among
from oodcli.detectors.layer_choice import layer_mean
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded

Weights = Literal["mgi", "uniform", "random", "penultimate"]
Statistics = Literal["virtual", "batchnorm"]


def channel_importance(gradient: Tensor) -> Tensor:
    """β^c_{l,k} = softmax over channels of w^c_{l,k} (C2IR eq. 7 and 10). gradient: (K, C), class
    means of ∂y_c/∂A averaged over positions. Returns (K, C), rows sum to 1."""
    return torch.softmax(gradient, 1)


def layer_importance(sensitivity: Tensor) -> Tensor:
    """α^c_l = softmax over layers of δ^c_l (C2IR eq. 10). sensitivity: (K, L). Returns (K, L)."""
    return torch.softmax(sensitivity, 1)


def deviation(mean: Tensor, beta: Tensor, centre: Tensor) -> Tensor:
    """Δ_l(x) = |C-Avg(A_l(x)) − C-Avg of the class's virtual images| (C2IR eq. 6).

    mean: (N, C), spatial means; beta: (N, C) and centre: (N,) of each row's class. Returns (N,).
    """
    return ((mean * beta).sum(1) - centre).abs()


@dataclass(frozen=True)
class C2IR(Detector):
    """Σ_l α^c_l Δ_l(x), c the predicted class, over the outputs A of all BatchNorm layers. A bar:
    mean over positions; x̂: the class's virtual images; y_c: its logit; Δy_c: its change in step t
    of the inversion.

    layers: L names. alpha: (K, L). beta: name → (K, C). centre: name → (K,), the C-Avg of the
    class's virtual images. present: (K,) bool, classes that had virtual images; the predicted
    class is sought among them.

    weights: ``mgi`` as printed; ``uniform`` 1/L and 1/C; ``random`` softmax of standard normal
    numbers; ``penultimate`` the last BatchNorm output alone, channels uniform (fig. 2d).
    statistics: ``virtual`` images, or ``batchnorm``: the layer's own running average, whose output
    is the layer's bias, the same for all classes.
    """

    name = "c2ir"
    source = "C2IR, eq. 3-10"
    about = "layer-wise deviation from the class's virtual images, weighted by gradients"
    formula = r"""
        s = \sum_l \alpha^c_l \, \Bigl| \sum_k \beta^c_{l,k} \, \bar A_{l,k}(x) -
        \operatorname{mean}_{\hat x} \sum_k \beta^c_{l,k} \, \bar A_{l,k}(\hat x) \Bigr|

        \beta^c_l = \operatorname{softmax}_k \Bigl(\operatorname{mean}_{\hat x, h, w}
        \frac{\partial y_c}{\partial A_{l,k}}\Bigr)

        \alpha^c = \operatorname{softmax}_l \Bigl(\operatorname{mean}_{\hat x, t}
        \frac{1}{\Delta y_c} \sum_k \beta^c_{l,k}
        \operatorname{mean}_{h,w} \frac{\partial y_c}{\partial A_{l,k}}\Bigr)
    """
    superseded_by = "c2ir-z"
    needs = frozenset({"logits", "layers.mean", "batchnorm.running"})
    fitted = True

    layers: tuple[str, ...]
    alpha: Tensor
    beta: Mapping[str, Tensor]
    centre: Mapping[str, Tensor]
    present: Tensor
    weights: str
    statistics: str

    @classmethod
    def fit_needs(cls, **hyperparameters: Any) -> frozenset[str]:
        mgi = hyperparameters.get("weights", "mgi") == "mgi"
        more = {"layers.gradient", "layers.sensitivity"} if mgi else set()
        return cls.needs | {"label"} | more

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        weights: Annotated[
            Weights, "mgi as in the paper; uniform, random or penultimate: its ablation, fig. 2d"
        ] = "mgi",
        statistics: Annotated[
            Statistics, "means of virtual images, or batchnorm: the layers' running means"
        ] = "virtual",
        seed: Annotated[int, "seed of the random weights"] = 0,
    ) -> Self:
        """Two passes over the rows: class means of activations and gradients, then those of the
        sensitivities Σ_k β_k s_k (eq. 8-9). Raises DetectorError when a record is missing."""
        needs = cls.fit_needs(weights=weights, statistics=statistics)
        first: list[Features] = []

        def rows(block: Features) -> dict[str, Tensor]:
            block.require(needs, cls.name)
            if not first:
                first.append(block.select(slice(0, 0)))
            wanted = {name: layer for name, layer in block.layers.items() if _used(layer.kind)}
            found = {f"{name}/mean": recorded(layer.mean) for name, layer in wanted.items()}
            if weights == "mgi":
                for name, layer in wanted.items():
                    found[f"{name}/gradient"] = recorded(layer.gradient)
            return found

        moments = class_moments(in_blocks(train), rows)
        layers = batchnorm_layers(first[0])
        means = {name: moments.mean(f"{name}/mean") for name in layers}
        generator = torch.Generator().manual_seed(seed)
        beta = {}
        for name in layers:
            importance = torch.zeros_like(means[name])
            if weights == "mgi":
                importance = moments.mean(f"{name}/gradient")
            elif weights == "random":
                importance = torch.randn(importance.shape, generator=generator).double()
            beta[name] = channel_importance(importance)
        sensitivity = torch.zeros(len(moments.count), len(layers), dtype=torch.float64)
        if weights == "random":
            sensitivity = torch.randn(sensitivity.shape, generator=generator).double()
        elif weights == "penultimate":
            sensitivity[:, :-1] = -torch.inf
        elif weights == "mgi":
            sensitivity = _class_sensitivity(train, layers, beta)
        if statistics == "batchnorm":
            means = {
                name: first[0].batchnorm[name].bias.double().expand_as(means[name])
                for name in layers
            }
        return cls(
            layers=layers,
            alpha=layer_importance(sensitivity),
            beta=beta,
            centre={name: (beta[name] * means[name]).sum(1) for name in layers},
            present=moments.present,
            weights=weights,
            statistics=statistics,
        )

    @property
    def layers_read(self) -> frozenset[str] | None:
        return frozenset(self.layers)

    def _score(self, test: Features) -> Tensor:
        predicted = predicted_among(recorded(test.logits), self.present)
        alpha = self.alpha[predicted]  # (N, L)
        total = torch.zeros(len(test), dtype=torch.float64, device=alpha.device)
        for index, name in enumerate(self.layers):
            mean = layer_mean(test, name, self.name, self.beta[name].shape[1])
            beta, centre = self.beta[name][predicted], self.centre[name][predicted]
            total += alpha[:, index] * deviation(mean, beta, centre)
        return total


def batchnorm_layers(block: Features) -> tuple[str, ...]:
    """Names of the recorded BatchNorm outputs, in the order of the forward pass. Raises
    DetectorError when there is none."""
    layers = tuple(name for name, layer in block.layers.items() if _used(layer.kind))
    if not layers:
        raise DetectorError("no output of a BatchNorm layer was recorded: the network has none")
    return layers


def _used(kind: str) -> bool:
    return kind == "batchnorm"


def _class_sensitivity(
    train: Blocks, layers: tuple[str, ...], beta: Mapping[str, Tensor]
) -> Tensor:
    """(K, L) δ^c_l: class means of Σ_k β^c_{l,k} s_{l,k} (eq. 8-9)."""

    def rows(block: Features) -> dict[str, Tensor]:
        label = class_of(block)
        columns = [
            (recorded(block.layers[name].sensitivity).double() * beta[name][label]).sum(1)
            for name in layers
        ]
        return {"delta": torch.stack(columns, 1)}

    return class_moments(in_blocks(train), rows).mean("delta")
