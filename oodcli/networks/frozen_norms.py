"""BatchNorm layers whose weights are buffers, as detectors of objects freeze them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BatchNormAct(nn.BatchNorm2d):
    """BatchNorm with the layers that follow within a frozen layer of timm."""

    def __init__(self, width: int, eps: float, after: nn.Module) -> None:
        super().__init__(width, eps, device="meta")
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(x))  # type: ignore[no-any-return]


NAMES = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
"""Of torchvision, detectron2 and others; of timm."""


def thaw(network: nn.Module) -> None:
    """Put BatchNorm in the place of frozen layers, which torch does not know as such."""
    for name, module in list(network.named_modules()):
        if type(module).__name__ in NAMES and name and "running_var" in module._buffers:
            network.set_submodule(name, _batchnorm(module))


def _batchnorm(frozen: nn.Module) -> nn.BatchNorm2d:
    state = {key: value for key, value in frozen._buffers.items() if value is not None}
    state["num_batches_tracked"] = torch.tensor(0)
    width, eps = len(state["running_var"]), float(getattr(frozen, "eps", 1e-5))
    layer: nn.BatchNorm2d
    if type(frozen).__name__ == "FrozenBatchNormAct2d":
        layer = BatchNormAct(width, eps, nn.Sequential(*frozen.children()))
        layer.after.eval()
    else:
        layer = nn.BatchNorm2d(width, eps, device="meta")
    layer.load_state_dict(state, assign=True, strict=False)
    return layer.eval().requires_grad_(False)
