"""Networks whose logits are the mean of two linear heads, as those distilled from a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.features import LinearHead
from oodcli.networks.outputs import Call, matches_weights

NAME = "joint_head"


class JointHead(nn.Module):
    """Both heads as one linear layer, whose input is that of the first and that of the second side
    by side. (N, D₁ + D₂) → (N, K)."""

    def __init__(self, heads: tuple[nn.Linear, nn.Linear]) -> None:
        super().__init__()
        self._heads = heads  # a tuple: their weights stay those of the network alone
        self._inputs: dict[int, Tensor] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = self._heads
        one, other = torch.split(inputs, [first.in_features, second.in_features], 1)
        with torch.autocast(inputs.device.type, enabled=False):  # float32, as a single head is
            logits = F.linear(one.float(), first.weight, first.bias)
            return (logits + F.linear(other.float(), second.weight, second.bias)) / 2

    def linear(self) -> LinearHead:
        weights = torch.cat([head.weight.detach().float() for head in self._heads], 1) / 2
        biases = [head.bias for head in self._heads if head.bias is not None]
        bias = sum((bias.detach().float() for bias in biases), weights.new_zeros(len(weights)))
        return LinearHead(weights.cpu(), (bias / 2).cpu())

    def join(self, network: nn.Module) -> None:
        """From now on the network's logits are this layer's output."""
        network.add_module(NAME, self)
        for head in self._heads:
            head.register_forward_pre_hook(self._remember)
        network.register_forward_hook(self._give)

    def _remember(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inputs[self._heads.index(module)] = args[0]

    def _give(self, module: nn.Module, args: tuple[Any, ...], returned: Any) -> Tensor:
        inputs = torch.cat([self._inputs.pop(0), self._inputs.pop(1)], 1)
        return self(inputs)  # type: ignore[no-any-return]


def find_joint_head(calls: Sequence[Call], logits: Tensor) -> JointHead | None:
    """The two heads whose mean gave these logits, (1, K); None where there are none."""
    heads = [
        call
        for call in calls
        if isinstance(call.module, nn.Linear)
        and call.output is not None
        and call.output.shape == logits.shape
        and matches_weights(call)
    ]
    for one, other in combinations(heads, 2):
        first, second = one.module, other.module
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        assert one.output is not None
        assert other.output is not None
        mean = (one.output + other.output).float() / 2
        if first is not second and torch.allclose(mean, logits, rtol=1e-5, atol=1e-6):
            return JointHead((first, second))
    return None
