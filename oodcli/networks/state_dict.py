"""What is in a checkpoint → its state dict, and the layouts in which its names may be written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodcli.errors import CheckpointError

PLAIN = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "teacher",
    "student",
    "generator_state_dict",
)

AVERAGED = (
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema",
    "ema_model",
    "model_ema_state_dict",
    "ema_model_state_dict",
    "params_ema",
)
"""Where a training script keeps the weights, and their exponential moving average (EMA)."""

PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.", "backbone.", "online_model.")

AVERAGED_PREFIXES = ("ema_model.", "model_ema.", "ema.", "averaged_model.")

NOT_WEIGHTS = re.compile(r"n_averaged$|(criterion|loss|loss_fn|loss_function)\.")


def _is_state(content: Any) -> bool:
    """Whether this is a state dict: strings to tensors, but for a few counters."""
    if not isinstance(content, Mapping) or not content:
        return False
    tensors = sum(isinstance(value, Tensor) and value.ndim > 0 for value in content.values())
    return tensors > 0 and all(
        isinstance(key, str) and (isinstance(value, Tensor | int | float) or key == "_metadata")
        for key, value in content.items()
    )


def find_state(
    content: Any, path: Path, prefer_ema: bool
) -> tuple[dict[str, Tensor], list[str], bool]:
    """The state dict in what a training script saved, sentences about the choice, and whether it is
    the averaged one of two."""
    notes: list[str] = []
    averaged = both = False
    for _ in range(4):  # wrapped in a wrapper, as frameworks do
        if _is_state(content):
            break
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{path} holds a {type(content).__name__} where a state dict was expected: save "
                "model.state_dict()"
            )
        usable = [k for k in (*PLAIN, *AVERAGED) if isinstance(content.get(k), Mapping)]
        usable = [key for key in usable if content[key]]
        ema = [key for key in usable if key in AVERAGED]
        plain = [key for key in usable if key in PLAIN]
        if not usable:
            # Only strings: a tuple of a hostile pickle can be endless when printed.
            names = [key for key in content if isinstance(key, str)]
            keys = ", ".join(names[:6]) or "nothing"
            only = {"optimizer", "param_groups", "optimizer_state_dict", "state"} & set(names)
            raise CheckpointError(
                f"{path} holds {'the state of an optimizer' if only else 'no weights'} (its keys: "
                f"{keys}), not a network's state dict: save model.state_dict()"
            )
        chosen = (ema or plain)[0] if prefer_ema else (plain or ema)[0]
        averaged = averaged or chosen in AVERAGED
        if ema and plain:
            both = True
            other = "override: leave out --ema" if prefer_ema else "override: --ema"
            notes.append(f"using the weights in '{chosen}'; the file also has others ({other})")
        content = content[chosen]
    if not _is_state(content):
        raise CheckpointError(f"{path} holds no state dict where one was expected")
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    ema_prefix = next((p for p in AVERAGED_PREFIXES if any(k.startswith(p) for k in state)), None)
    if ema_prefix is not None:
        rest = {k: v for k, v in state.items() if not k.startswith(ema_prefix)}
        if prefer_ema or not rest:
            state = {
                k.removeprefix(ema_prefix): v for k, v in state.items() if k.startswith(ema_prefix)
            }
            averaged, both = True, both or bool(rest)
        else:
            state = rest
            notes.append(f"averaged weights '{ema_prefix}*' are ignored (override: --ema)")
    if prefer_ema and not averaged:
        notes.append("no averaged (EMA) weights in the file: using the plain ones")
    return state, notes, averaged and both


def check_values(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError naming tensors that no trained network has."""
    odd = [key for key, value in state.items() if _is_odd(value)]
    if odd:
        raise CheckpointError(
            f"{path}: {some_of(odd)} no plain tensor of numbers with all its elements in the file "
            "(sparse, quantised, complex, on the meta device, or damaged): save the "
            "floating-point state dict of the whole network"
        )
    check_finite(state, path)
    whole = [
        key
        for key, value in state.items()
        if key.endswith(("weight", "bias")) and not value.is_floating_point()
    ]
    if whole:
        raise CheckpointError(
            f"{path}: {some_of(whole)} of type "
            f"{str(state[whole[0]].dtype).removeprefix('torch.')}, as in a quantised network: use "
            "the floating-point checkpoint"
        )
    negative = [
        key
        for key, value in state.items()
        if key.endswith("running_var") and bool((value < 0).any())
    ]
    if negative:
        raise CheckpointError(
            f"{path}: {some_of(negative)} negative, which a variance cannot be: the file is damaged"
        )


def check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    broken = [
        key
        for key, value in state.items()
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all())
    ]
    if broken:
        raise CheckpointError(
            f"{path}: {some_of(broken)} not finite (NaN or infinity): training diverged, or the "
            "file is damaged; use an earlier checkpoint"
        )


def _is_odd(value: Tensor) -> bool:
    """Whether arithmetic with it may fail, or take more memory than the file does: a header can
    claim any shape for elements that are not there."""
    if value.layout is not torch.strided or value.is_nested or value.device.type != "cpu":
        return True
    if value.is_quantized or value.is_complex() or not value.numel():
        return True
    if str(value.dtype).startswith(("torch.bits", "torch.float4")):
        return True
    claimed = value.numel() * value.element_size()
    return claimed > max(value.untyped_storage().nbytes(), 1 << 20)


def some_of(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:3])
    if len(keys) > 3:
        shown += f" and {len(keys) - 3} more"
    return f"{shown} {'is' if len(keys) == 1 else 'are'}"


def layouts_of(state: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], tuple[str, ...]]]:
    """The state dict under the names it may have had before it was wrapped: as it is, then with
    one prefix less each time. With each, the keys that were left out as not the network's."""
    found: list[tuple[dict[str, Tensor], tuple[str, ...]]] = [(state, ())]
    dropped = tuple(key for key in state if NOT_WEIGHTS.match(key))
    state = {key: value for key, value in state.items() if key not in dropped}
    if dropped:
        found.append((state, dropped))
    for _ in range(6):
        heads = {key.partition(".")[0] + "." for key in state}
        if len(heads) == 1 and all("." in key for key in state):
            (prefix,) = heads
        else:
            prefix = next((p for p in PREFIXES if any(k.startswith(p) for k in state)), "")
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        outside = {k: v for k, v in state.items() if not k.startswith(prefix)}
        if not prefix or not inside or inside.keys() & outside.keys():
            break
        if outside:  # either a head beside the backbone, or something else altogether
            found.append((inside, (*dropped, *outside)))
        state = inside | outside
        found.append((state, dropped))
    return found


Layouts = Sequence[tuple[dict[str, Tensor], tuple[str, ...]]]
