"""What is in a checkpoint → its state dict, and the layouts in which its names may be written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodcli.errors import CheckpointError
from oodcli.networks.inert import Stub, is_module, state_of

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

WRAPPERS = re.compile(r"(?:^|(?<=\.))_(?:orig_mod|(?:checkpoint|fsdp)_wrapped_module|fpw_module)\.")
"""What torch.compile, activation checkpointing and FSDP add to names, in the middle as well."""

INNER = re.compile(r"(?:^|(?<=\.))(?:module|model)\.")

NOT_WEIGHTS = re.compile(r"n_averaged$|(criterion|loss|loss_fn|loss_function)\.")


def untrusted(path: Path, name: str, instead: str = "") -> CheckpointError:
    """The error for a pickled object where weights are expected. instead: another next step."""
    return CheckpointError(
        f"{path} holds a pickled {name}, not only tensors, and unpickling can run any code that "
        f"its author put there: {instead}save model.state_dict() alone, or give --trust-pickle if "
        "you trust its author"
    )


def _is_state(content: Any) -> bool:
    """Whether this is a state dict: strings to tensors, and to a few plain values."""
    if not isinstance(content, Mapping):
        return False
    tensors = sum(isinstance(value, Tensor) and value.ndim > 0 for value in content.values())
    return tensors > 0 and all(
        isinstance(key, str)
        and (isinstance(value, Tensor | int | float | str | None) or key == "_metadata")
        for key, value in content.items()
    )


def _parts_of(content: Any) -> Mapping[Any, Any]:
    """What is in a container, by key, index or attribute; empty for anything else."""
    if isinstance(content, Mapping):
        return content
    if isinstance(content, list | tuple):
        return dict(enumerate(content))
    if is_module(content):
        return state_of(content)
    return vars(content) if isinstance(content, Stub) else {}


def _holds_weights(content: Any, seen: set[int], depth: int = 16) -> bool:
    """Whether a network's weights are in it; the state of an optimizer has no matrix ``…weight``.
    seen: ids of what was searched."""
    if id(content) in seen or not depth:
        return False
    seen.add(id(content))
    parts = vars(content) if isinstance(content, Stub) else _parts_of(content)
    if _is_state(parts):
        return any(
            key.endswith("weight") and isinstance(value, Tensor) and value.ndim > 1
            for key, value in parts.items()
        )
    return any(_holds_weights(part, seen, depth - 1) for part in parts.values())


@dataclass(frozen=True)
class Found:
    """A state dict in what a training script saved. notes: sentences about the choice. averaged:
    whether these are the averaged weights of two. pickled: class of the module that they were
    read from without its code; empty where they were saved as a state dict."""

    state: dict[str, Tensor]
    notes: tuple[str, ...]
    averaged: bool = False
    pickled: str = ""


def find_state(content: Any, path: Path, prefer_ema: bool, key: str | None = None) -> Found:
    """The state dict in what a training script saved. key: where it is, with dots between the keys
    of several levels. Raises CheckpointError where there is none, or there are several."""
    notes: list[str] = []
    averaged = both = False
    if key is not None:
        content = _at(content, key, path)
    for _ in range(4):  # wrapped in a wrapper, as frameworks do
        parts = _parts_of(content)
        if is_module(content) or _is_state(parts):
            break
        known = [k for k in (*PLAIN, *AVERAGED) if k in parts and _wraps(parts[k])]
        ema = [k for k in known if k in AVERAGED]
        plain = [k for k in known if k in PLAIN]
        if known:
            chosen: Any = (ema or plain)[0] if prefer_ema else (plain or ema)[0]
        else:
            chosen = _only_weights(content, parts, path)
            notes.append(f"using the weights in '{chosen}', the only ones (override: --state-key)")
        averaged = averaged or chosen in AVERAGED
        if ema and plain:
            both = True
            other = "override: leave out --ema" if prefer_ema else "override: --ema"
            notes.append(f"using the weights in '{chosen}'; the file also has others ({other})")
        content = parts[chosen]
    pickled = type(content).name if is_module(content) else ""
    content = _parts_of(content)
    if not _is_state(content):
        raise CheckpointError(f"{path} holds no state dict where one was expected")
    others = [k for k, v in content.items() if isinstance(v, str | None) and k != "_metadata"]
    if others:
        notes.append(f"{some_of(others)} no tensors and ignored")
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
    return Found(state, tuple(notes), averaged and both, pickled)


def _wraps(content: Any) -> bool:
    """Whether a training script may have put the state dict, or its wrapper, there."""
    return is_module(content) or (isinstance(content, Mapping) and bool(content))


def _at(content: Any, key: str, path: Path) -> Any:
    """What ``--state-key`` names: the keys of several levels with dots between, longest first."""
    parts = {str(k): v for k, v in _parts_of(content).items() if isinstance(k, str | int)}
    if key in parts:
        return parts[key]
    for head in sorted((k for k in parts if key.startswith(f"{k}.")), key=len, reverse=True):
        return _at(parts[head], key.removeprefix(f"{head}."), path)
    raise CheckpointError(f"{path} has no '{key}' for --state-key: {_keys(parts)}")


def _only_weights(content: Any, parts: Mapping[Any, Any], path: Path) -> Any:
    """The key of the only part with weights in it. Raises CheckpointError."""
    seen: set[int] = set()
    named = {key: part for key, part in parts.items() if isinstance(key, str | int)}
    holding = [key for key, part in named.items() if _holds_weights(part, seen)]
    if len(holding) == 1:
        return holding[0]
    if holding:
        raise CheckpointError(
            f"{path} holds several state dicts ({', '.join(map(str, holding[:6]))}): name the "
            "classifier's with --state-key"
        )
    if quantised := [key for key in parts if str(key).endswith("_packed_params")]:
        raise CheckpointError(
            f"{path}: {some_of(quantised)} of a quantised network: use the floating-point "
            "checkpoint"
        )
    pickled = next((x for x in (content, *parts.values()) if isinstance(x, Stub)), None)
    if pickled is not None:
        raise untrusted(path, type(pickled).name)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__} where a state dict was expected: save "
            "model.state_dict()"
        )
    only = {"optimizer", "param_groups", "optimizer_state_dict", "state"} & parts.keys()
    raise CheckpointError(
        f"{path} holds {'the state of an optimizer' if only else 'no weights'} ({_keys(parts)}), "
        "not a network's state dict: save model.state_dict()"
    )


def _keys(parts: Mapping[Any, Any]) -> str:
    # Only strings: a tuple of a hostile pickle can be endless when printed.
    names = [key for key in parts if isinstance(key, str)]
    return f"its keys: {', '.join(names[:6]) or 'nothing'}"


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
    for word in (WRAPPERS, INNER):
        bare = {word.sub("", key): value for key, value in state.items()}
        if bare.keys() != state.keys() and len(bare) == len(state):
            found.append((bare, dropped))
            state = bare if word is WRAPPERS else state
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
