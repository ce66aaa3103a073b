"""Networks thinned by dropout: all images pass through the same few of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from oodcli.errors import DetectorError
from oodcli.features import DropoutPasses

BY_CHANNEL = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
KINDS = (nn.Dropout, *BY_CHANNEL)
"""Layers that set numbers, or whole channels, to 0 at random while a network is trained."""


def drops(module: nn.Module) -> bool:
    """Whether a module is a dropout layer with p > 0. Stochastic depth (DropPath), dropout that is
    part of a function, and alpha dropout are none."""
    return isinstance(module, KINDS) and module.p > 0


class Thinned:
    """A network with one mask for each of its dropout layers, which all images share: an image has
    the same logits in every batch. A mask depends on the seed, the number of the pass, the name of
    the layer, which of its calls it is, and the layer's p."""

    def __init__(self, network: nn.Module, how: DropoutPasses) -> None:
        self.how = how
        self._layers = {name: each for name, each in network.named_modules() if drops(each)}
        self._drawn: dict[tuple[Any, ...], Tensor] = {}

    @contextmanager
    def passing(self, number: int, count: int) -> Iterator[None]:
        """While open, the network drops what it drops in pass ``number``; the rest of it stays in
        evaluation mode. count: images of a batch. Raises DetectorError where a layer's input does
        not have its images in the first dimension."""
        calls = dict.fromkeys(self._layers, 0)

        def hook(name: str) -> Any:
            def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                calls[name] += 1
                if len(output) % count:
                    raise DetectorError(
                        f"the dropout layer {name} gets {tuple(output.shape)} for {count} images, "
                        "expected the images first: leave out mc-dropout"
                    )
                mask = self.mask(number, name, calls[name], output)
                return (output * mask).to(output.dtype)

            return after

        with ExitStack() as hooks:
            for name, layer in self._layers.items():
                hooks.callback(layer.register_forward_hook(hook(name)).remove)
            yield

    def mask(self, number: int, name: str, call: int, given: Tensor) -> Tensor:
        """What the input of a layer is multiplied by in one pass: 0 with probability p, else
        1/(1 − p). given: (N, …). Returns float32 of the shape of one row, or of one number a
        channel for layers that drop channels."""
        layer = self._layers[name]
        shape = tuple(given.shape[1:])
        if isinstance(layer, BY_CHANNEL):
            shape = (shape[0], *(1 for _ in shape[1:]))
        key = (number, name, call, shape, given.device)
        if key not in self._drawn:
            text = f"{self.how.seed} {number} {name} {call}"
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
            drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
            p = float(layer.p)
            kept = (drawn >= p).float() / (1 - p if p < 1 else 1)
            self._drawn[key] = kept.to(given.device)
        return self._drawn[key]
