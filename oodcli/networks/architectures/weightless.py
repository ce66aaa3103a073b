"""Networks without memory for their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FILLING = frozenset(
    (
        *("normal_", "uniform_", "trunc_normal_", "zero_", "fill_", "mul_", "add_", "clamp_"),
        *("erfinv_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"),
    )
)
"""What initialises weights, in ``torch.nn.init`` and as methods of tensors."""


class Weightless(TorchFunctionMode):
    """Within it, layers are made on the meta device: shapes without memory, in milliseconds.

    Narrower than ``torch.device("meta")``: models that compute their widths with tensors
    (RegNet), and small tables such as ``arange``, stay real.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in _FILLING and _is_meta(args, kwargs):
            return args[0] if args else (kwargs or {})["tensor"]  # nothing to fill
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _is_meta(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    tensor = args[0] if args else (kwargs or {}).get("tensor")
    return isinstance(tensor, torch.Tensor) and tensor.is_meta
