"""C2IR standardised: what the same virtual images say when no channel can cancel another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, in_blocks
from oodcli.detectors.c2ir import batchnorm_layers
from oodcli.detectors.class_statistics import class_moments, class_of, predicted_among
from oodcli.detectors.layer_choice import layer_mean
from oodcli.features import Features, LinearHead, recorded

RIDGE = 1e-3
"""Added to each channel's variance, as a share of its layer's mean variance: a dead channel that
wakes up counts for much, but not for everything."""

MANY_CLASSES = 100
"""Number of classes above which they share their statistics, where there are few rows."""

FEW_ROWS = 10
"""Rows a class, on average, below which they do: the mean of one or two rows is no centre."""


def standardised_deviation(mean: Tensor, centre: Tensor, variance: Tensor) -> Tensor:
    """Mean over channels of ((m − μ^c)/sd)². mean, centre: (N, C); variance: (C,). Returns (N,)."""
    return ((mean - centre).square() / variance).mean(1)


def head_evidence(embedding: Tensor, head: LinearHead, predicted: Tensor) -> Tensor:
    """−w_c·u, without the bias. embedding: (N, D), predicted: (N,). Returns (N,) float64."""
    return -(embedding.double() * head.weight[predicted].double()).sum(1)


@dataclass(frozen=True)
class C2IRZ(Detector):
    """Mean over layers of the standardised deviation, plus the z-score of −w_c·(u − μ^c_u). m:
    means
    over positions at the BatchNorm outputs; μ^c: their mean over the rows x̂ of the predicted class
    c; σ: their standard deviation within classes; λ = 1/L.

    With over 100 classes and fewer than ten rows a class on average, all classes share the mean and
    the spread of all rows.

    layers: L names. layer_weights: (G, L), rows sum to 1; G = K, or 1 where statistics are shared.
    centre: name → (G, C). variance: name → (C,), within classes, with a ridge. evidence: (G,),
    means of −w_c·u; evidence_sd: (). present: (K,) bool. weights: ``uniform``, or ``mgi``:
    ‖w^c_l ⊙ sd_l‖^½.
    """

    name = "c2ir-z"
    source = "this project, on the statistics of C2IR"
    about = "standardised deviation from the class's virtual images, all BatchNorm layers and head"
    formula = r"""
        s = \sum_l \lambda^c_l \operatorname{mean}_k
        \frac{(m_{l,k} - \mu^c_{l,k})^2}{\sigma_{l,k}^2}
        + \frac{-w_c^\top u - \operatorname{mean}_{\hat x}(-w_c^\top \hat u)}{\sigma_e}
    """
    needs = frozenset({"logits", "embedding", "head", "layers.mean", "batchnorm.running"})
    fitted = True
    explains = True

    layers: tuple[str, ...]
    layer_weights: Tensor
    centre: Mapping[str, Tensor]
    variance: Mapping[str, Tensor]
    evidence: Tensor
    evidence_sd: Tensor
    present: Tensor
    weights: str

    @classmethod
    def fit_needs(cls, **hyperparameters: Any) -> frozenset[str]:
        gradient = {"layers.gradient"} if hyperparameters.get("weights") == "mgi" else set()
        return cls.needs | {"label"} | gradient

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        weights: Annotated[
            Literal["uniform", "mgi"], "weights of the layers; mgi: by the length of gradient × sd"
        ] = "uniform",
    ) -> Self:
        """One pass over the rows. Raises DetectorError when a record is missing, or when no class
        has two rows where classes share no statistics."""
        needs = cls.fit_needs(weights=weights)
        first: list[Features] = []

        def rows(block: Features) -> dict[str, Tensor]:
            block.require(needs, cls.name)
            if not first:
                first.append(block.select(slice(0, 0)))
            label = class_of(block)
            evidence = head_evidence(recorded(block.embedding), recorded(block.head), label)
            found = {"evidence": evidence[:, None]}
            for name in batchnorm_layers(block):
                found[f"{name}/mean"] = recorded(block.layers[name].mean)
                if weights == "mgi":
                    found[f"{name}/gradient"] = recorded(block.layers[name].gradient)
            return found

        moments = class_moments(in_blocks(train), rows)
        present = moments.present
        few = float(moments.count.sum()) < FEW_ROWS * len(present)
        if few and len(present) > MANY_CLASSES:
            moments, present = moments.of_all, torch.ones_like(present)
        layers = batchnorm_layers(first[0])
        variance = {name: _ridged(moments.within_variance(f"{name}/mean")) for name in layers}
        importance = torch.ones(len(moments.count), len(layers), dtype=torch.float64)
        if weights == "mgi":
            norms = [
                (moments.mean(f"{name}/gradient") * variance[name].sqrt()).norm(dim=1)
                for name in layers
            ]
            importance = torch.stack(norms, 1).sqrt()  # (K, L)
        total = importance.sum(1, keepdim=True)
        return cls(
            layers=layers,
            layer_weights=torch.where(total > 0, importance / total, 1 / len(layers)),
            centre={name: moments.mean(f"{name}/mean") for name in layers},
            variance=variance,
            evidence=moments.mean("evidence")[:, 0],
            evidence_sd=_ridged(moments.within_variance("evidence")).sqrt()[0],
            present=present,
            weights=weights,
        )

    @property
    def layers_read(self) -> frozenset[str] | None:
        return frozenset(self.layers)

    @property
    def every_class(self) -> bool:
        """Whether no class needs rows of its own."""
        return len(self.evidence) < len(self.present)

    @property
    def strict_on_virtual(self) -> bool:
        """Where all images share one mean, which BatchNorm's memory fixes: virtual images, made to
        match it, are nearer to it than real ones."""
        return self.every_class

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        """The z-score at the head, then each layer's weighted deviation."""
        predicted = predicted_among(recorded(test.logits), self.present)
        evidence = head_evidence(recorded(test.embedding), recorded(test.head), predicted)
        group = torch.zeros_like(predicted) if self.every_class else predicted
        weights = self.layer_weights[group]  # (N, L)
        parts = [(evidence - self.evidence[group]) / self.evidence_sd]
        for index, name in enumerate(self.layers):
            mean = layer_mean(test, name, self.name, len(self.variance[name]))
            centre = self.centre[name][group]
            deviation = standardised_deviation(mean, centre, self.variance[name])
            parts.append(weights[:, index] * deviation)
        words = [f"activations of {name} are unlike the class's" for name in self.layers]
        return ["little evidence for the predicted class", *words], torch.stack(parts, 1)

    def _score(self, test: Features) -> Tensor:
        return self.contributions(test)[1].sum(1)


def _ridged(variance: Tensor) -> Tensor:
    """(C,) variances that are never zero."""
    return variance + RIDGE * variance.mean() + torch.finfo(torch.float32).tiny
