"""A checkpoint file → its contents. None of its code runs unless the user trusts it."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oodcli.errors import CheckpointError, first_sentence
from oodcli.files.foreign import foreign
from oodcli.networks.inert import load_inert
from oodcli.networks.state_dict import AVERAGED, PLAIN, untrusted

SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt", ".safetensors", ".pt2", ".onnx")

UNPACKED = 20, 1 << 28
"""Factor and bytes from which an archive is a decompression bomb; torch.save does not compress."""


def check_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the checkpoint file in it")
    try:
        with open(path, "rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if empty:
        raise CheckpointError(f"{path} is empty: copy the checkpoint again")
    if what := foreign(path):
        raise CheckpointError(f"{path} is {what}")


def zip_members(path: Path) -> dict[str, int]:
    """Names in a zip archive, which torch's files are, and their unpacked bytes; empty for any
    other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename: info.file_size for info in archive.infolist()}
    except Exception:  # damaged archives raise almost anything, and torch is asked next
        return {}


def check_unpacked(path: Path, members: Mapping[str, int]) -> None:
    """Raises CheckpointError for a decompression bomb."""
    times, least = UNPACKED
    unpacked = sum(members.values())
    if unpacked > least and unpacked > times * path.stat().st_size:
        raise CheckpointError(
            f"{path} would unpack to {unpacked} bytes, more than {times} times its size (a "
            "decompression bomb?): save it again with torch.save, which does not compress"
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({first_sentence(error)}): copy it again"
        ) from error


def read_torch(path: Path, trust_pickle: bool) -> Any:
    try:
        if trust_pickle:
            return torch.load(path, map_location="cpu", weights_only=False)
        return load_inert(path)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        text = str(error)
        refused = re.search(r"GLOBAL ([\w.]+)|(?:unrecognized function|but got) ([^\n]+)", text)
        if isinstance(error, pickle.UnpicklingError) and not trust_pickle and refused:
            name = "network" if "persistent_load" in text else refused[1] or refused[2]
            raise untrusted(path, name) from error
        if trust_pickle and isinstance(error, ImportError | AttributeError):
            raise CheckpointError(
                f"{path} cannot be unpickled without the code that made it "
                f"({first_sentence(error)}): run oodcli where that code can be imported "
                "(PYTHONPATH), or save the state dict"
            ) from error
        no_pickle = isinstance(error, pickle.UnpicklingError | KeyError)  # an unknown opcode
        reason = "no pickle" if no_pickle else first_sentence(error)
        raise CheckpointError(
            f"{path} is not a checkpoint that torch can read, or it is damaged "
            f"({reason}): oodcli reads {' '.join(SUFFIXES)}"
        ) from error


def find_module(content: Any) -> nn.Module | None:
    """A pickled network: the content itself, or the entry where a training script stores it."""
    if not isinstance(content, Mapping | nn.Module) and hasattr(content, "model"):
        content = content.model  # of a fastai Learner
    if isinstance(content, Mapping):
        content = next(
            (content[k] for k in (*PLAIN, *AVERAGED) if isinstance(content.get(k), nn.Module)),
            None,
        )
    if not isinstance(content, nn.Module):
        return None
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(content, wrappers):
        content = content.module
    network: nn.Module = content.float()
    return network
