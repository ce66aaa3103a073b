"""A classifier: a frozen network with its preprocessing and layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from oodcli.features import LinearHead
from oodcli.networks.heads import RetrainedHead
from oodcli.networks.preprocessing import Preprocessing


@dataclass(frozen=True)
class Tap:
    """One call of one module whose output is recorded.

    name: dotted path of the module; ``@2`` is appended for its second call in a forward pass.
    kind: batchnorm, block, stage or other. channels: C. channel_dim: 1, or -1 for tokens.
    spatial_size: number of positions.
    """

    name: str
    module: str
    kind: str
    channels: int
    channel_dim: int
    spatial_size: int


@dataclass(frozen=True)
class Classifier:
    """A network in evaluation mode with frozen weights, and what must be known to use it.

    class_names: one a class, "0", "1", … where nobody said; ``named`` is true where somebody did.
    sha256: of the checkpoint file.
    assumptions: sentences about what was not given. head: None when the last layer is not linear.
    head_name: also that of a retrained head, whose input is the embedding, too.
    taps: in the order of the forward pass. averaged: whether these are the averaged (EMA) weights
    of a checkpoint that has plain ones, too. logits_level: False where the network returns
    log-probabilities, which are logits up to a constant for each image.
    multi_label: whether each label has its own sigmoid, instead of one softmax. pooled: whether the
    embedding is the mean of the last map over its positions. dropouts: names of the dropout layers
    with p > 0 in the forward pass. drops_embedding: whether there is one alone, whose output is the
    input of a linear head.
    """

    network: nn.Module
    arch: str
    num_classes: int
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    sha256: str
    assumptions: tuple[str, ...]
    taps: tuple[Tap, ...]
    head_name: str | None
    head: LinearHead | None
    averaged: bool = False
    logits_level: bool = True
    named: bool = False
    multi_label: bool = False
    pooled: bool = False
    dropouts: tuple[str, ...] = ()
    drops_embedding: bool = False

    @property
    def device(self) -> torch.device:
        parameter = next(self.network.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def batchnorms(self) -> dict[str, _BatchNorm]:
        """The BatchNorm layers that take part in the forward pass, by tap name."""
        modules = dict(self.network.named_modules())
        found = {tap.name: modules[tap.module] for tap in self.taps if tap.kind == "batchnorm"}
        return {name: norm for name, norm in found.items() if isinstance(norm, _BatchNorm)}

    @property
    def last_map(self) -> Tap | None:
        """The last tap with several positions: what a pooling makes the embedding of."""
        return next((tap for tap in reversed(self.taps) if tap.spatial_size > 1), None)

    @property
    def retrained(self) -> RetrainedHead | None:
        """The head, if it was trained to detect OOD inputs."""
        found = None if self.head_name is None else self.network.get_submodule(self.head_name)
        return found if isinstance(found, RetrainedHead) else None

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())
