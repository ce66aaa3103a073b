"""Networks whose logits are the average of a 1x1 convolution over its positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oodcli.features import LinearHead
from oodcli.networks.outputs import Call


def find_conv_head(
    network: nn.Module, image: Tensor, calls: Sequence[Call], logits: Tensor
) -> tuple[str | None, LinearHead | None]:
    """The name of the convolution that gave these logits, (1, K), and the same as a linear layer on
    the average of its input over the positions. With a ReLU before the average, as in SqueezeNet,
    the logits are not linear in it: then there is no linear layer. None where no convolution did.
    """
    last = next((call for call in reversed(calls) if _fits(call, logits)), None)
    if last is None:
        return None, None
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append(output.detach().clone())  # a ReLU in place would change it

    handle = last.module.register_forward_hook(keep)
    try:
        network(image)
    finally:
        handle.remove()
    scores = seen[-1].float().flatten(2)  # (1, K, H·W)
    if _same(scores.mean(2), logits):
        return last.name, _linear(last.module)
    return (last.name, None) if _same(scores.relu().mean(2), logits) else (None, None)


def _fits(call: Call, logits: Tensor) -> bool:
    module = call.module
    if type(module) is not nn.Conv2d or len(call.shape) != 4:
        return False
    plain = (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1)
    return plain and module.padding in (0, (0, 0)) and module.out_channels == logits.shape[1]


def _same(scores: Tensor, logits: Tensor) -> bool:
    close = 1e-5 * float(logits.abs().max())
    return bool((scores - logits.float()).abs().max() <= close)


def _linear(module: nn.Module) -> LinearHead:
    assert isinstance(module, nn.Conv2d)
    weight = module.weight.detach().float().flatten(1)
    bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach().float()
    return LinearHead(weight.cpu(), bias.cpu())
