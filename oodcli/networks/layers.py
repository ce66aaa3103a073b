"""Layers made from tensors, and networks whose layers are listed one after another."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Flat:
    """A network under construction, from a file that lists operations without the modules around
    them: layers of ``torch.nn``, and functions between them.

    Names reach the source code that ``torch.fx`` generates, so nothing but letters, digits and
    underscores is kept of what a file calls its layers.
    """

    def __init__(self) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self._taken: dict[str, int] = {}

    def add(self, name: str, layer: nn.Module, value: fx.Node) -> fx.Node:
        """Append a layer; the node of its output."""
        free = base = re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("_") or "layer"
        while hasattr(self.root, free):
            self._taken[base] = self._taken.get(base, 0) + 1
            free = f"{base}_{self._taken[base]}"
        self.root.add_module(free, layer.eval())
        return self.graph.call_module(free, (value,))

    def constant(self, tensor: Tensor) -> fx.Node:
        name = f"constant_{len(self.root._buffers)}"
        self.root.register_buffer(name, tensor)
        return self.graph.get_attr(name)

    def network(self, output: Any) -> fx.GraphModule:
        self.graph.output(output)
        return _Listed(self.root, self.graph).eval().float()


class _Listed(fx.GraphModule):
    """A network that raises its errors without printing a traceback, as torch.fx does."""

    def recompile(self) -> Any:
        code = super().recompile()
        # Each network has a class of its own.
        type(self).__call__ = nn.Module.__call__  # type: ignore[method-assign]
        return code


class AnyBatchNorm(_BatchNorm):
    """BatchNorm of (N, C) and (N, C, …) alike."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _with(layer, weight=weight, bias=bias)


def convolution(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> nn.Module:
    def pair(number: Any) -> tuple[int, int]:
        numbers = [number] if isinstance(number, int) else list(number)
        return (numbers[0], numbers[-1])

    layer = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        pair(stride),
        pair(padding),
        pair(dilation),
        groups,
        bias is not None,
        device="meta",
    )
    return _with(layer, weight=weight, bias=bias)


def batch_norm(
    ndim: int | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> nn.Module:
    """ndim: of the input; None where that is not known."""
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    kind = AnyBatchNorm if ndim is None else kinds[ndim]
    layer = kind(len(mean), eps, momentum, affine=weight is not None, device="meta")
    count = torch.tensor(0)
    tensors = {"running_mean": mean, "running_var": var, "num_batches_tracked": count}
    return _with(layer, weight=weight, bias=bias, **tensors)


def _with(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    state = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    layer.load_state_dict(state, assign=True)
    return layer
