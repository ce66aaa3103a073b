"""Gradients by the outputs of layers, reduced to records while a backward pass runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from oodcli.errors import DetectorError
from oodcli.features import BatchNorm, Layer
from oodcli.float64 import in_float64
from oodcli.networks.classifier import Tap
from oodcli.recording.reduced import before_batchnorm, by_image, by_position, nonzero_shares


class LayerGradients:
    """Reduces each gradient in a hook as soon as autograd has computed it, so that it is free
    again: those of all layers would take gigabytes.

    count: images of the batch, N. asked: words of ``records.ROW_RECORDS``. composite: constants by
    tap name of the BatchNorm layers that do more than normalise, whose inputs are watched.
    now: the words that the running backward pass gives. leaves: watched outputs of layers before
    which nothing has a gradient, with which the graph starts.
    """

    def __init__(
        self, count: int, asked: frozenset[str], composite: Mapping[str, BatchNorm]
    ) -> None:
        self.now: frozenset[str] = frozenset()
        self.leaves: list[Tensor] = []
        self._count, self._asked, self._composite = count, asked, composite
        self._sums: dict[str, tuple[Tensor, int]] = {}  # and of how many positions
        self._shares: dict[str, Tensor] = {}

    def asks(self, tap: Tap) -> bool:
        """Whether to watch the output of this tap."""
        shares = "layers.nonzero" in self._asked and tap.kind == "batchnorm"
        return shares or "layers.gradient" in self._asked

    def watch(self, tap: Tap, output: Tensor) -> Tensor:
        """What takes the place of an output (N, C, …) or (N, …, C) that the gradients are by:
        itself, or a copy of it. Raises DetectorError where the network switches gradients off."""
        if not output.requires_grad:
            self.leaves.append(output.requires_grad_())
        # A later change in place would take a view out of the graph, and is refused for a leaf.
        if output.is_leaf or output._is_view():
            output = output.clone()
        node = output.grad_fn
        if node is None:
            raise DetectorError(
                f"{tap.name} has no gradient: the network computes it under torch.no_grad(); "
                "choose other layers with --layers"
            )
        node.register_prehook(partial(self._reduce, tap, output.output_nr))
        zeros = torch.zeros(self._count, tap.channels, device=output.device)
        # The loss may not depend on it.
        self._sums[tap.name], self._shares[tap.name] = (zeros, 1), zeros
        return output

    def _reduce(self, tap: Tap, number: int, gradients: tuple[Tensor | None, ...]) -> None:
        """gradients: by the outputs of the operation that computed this one."""
        gradient = gradients[number]
        if gradient is None:
            return
        gradient = by_image(gradient, self._count, tap.channel_dim)
        if "layers.gradient" in self.now:
            values, dim = by_position(gradient, tap.channel_dim)
            self._sums[tap.name] = values.float().sum(dim), values.shape[dim]
        if "layers.nonzero" in self.now and tap.kind == "batchnorm":
            self._shares[tap.name] = nonzero_shares(gradient, tap.channel_dim)

    def into(self, layers: Mapping[str, Layer], logits: Tensor) -> dict[str, Layer]:
        """The layers with the mean (N, C) of their gradients over the positions, and with the share
        (N, C) of positions where they are not 0, NaN for images whose logits (N, K) are not finite.
        Of the input of a BatchNorm layer this is as of its output, unless its weight is 0."""
        unknown = logits.detach().sum(1, keepdim=True) * 0
        found = dict(layers)
        if "layers.gradient" in self._asked:
            for name, (sums, positions) in self._sums.items():
                mean = (in_float64(sums) / positions).float().to(sums.device)
                norm = self._composite.get(name)
                mean = mean if norm is None else before_batchnorm(norm, mean)
                found[name] = replace(found[name], gradient=mean)
        if "layers.nonzero" in self._asked:
            for name, share in self._shares.items():
                if found[name].kind == "batchnorm":
                    found[name] = replace(found[name], nonzero=share + unknown)
        return found
