"""Files that are given in a checkpoint's place, told by their first bytes and the names in them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

KERAS = (
    "a Keras model, which oodcli reads as ONNX: save it from Keras with "
    "model.export('net.onnx', format='onnx')"
)
TENSORFLOW = (
    "a %s of TensorFlow, which oodcli reads as ONNX: convert it with python -m tf2onnx.convert "
    "%s %s --output net.onnx"
)
BY_SUFFIX = {
    ".pb": ("graph", "--graphdef"),
    ".tflite": ("TFLite model", "--tflite"),
    ".meta": ("checkpoint", "--checkpoint"),
}
"""What a file of TensorFlow is, and the option of tf2onnx for it."""

DISTCP = ".distcp"
DISTRIBUTED = (
    "a checkpoint in parts of torch.distributed: put them together with python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER net.pt"
)

SAVED_MODEL = "saved_model.pb"


def foreign(path: Path) -> str | None:
    """What a file or folder is, if no checkpoint, and the next step; None where nothing is known of
    it."""
    folder = path.parent if path.name == SAVED_MODEL else path
    if (folder / SAVED_MODEL).is_file():
        return TENSORFLOW % ("SavedModel", "--saved-model", folder)
    distributed = path.parent if path.suffix == DISTCP or path.name == ".metadata" else path
    if (distributed / ".metadata").is_file() and any(distributed.glob(f"*{DISTCP}")):
        return DISTRIBUTED.replace("FOLDER", str(distributed))
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        return None
    text = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, so the download failed: open its address in a browser, or sign in"
    if head.startswith(b"GGUF"):
        return "a GGUF file of llama.cpp, which holds no image classifier"
    if path.suffix in BY_SUFFIX:
        return TENSORFLOW % (*BY_SUFFIX[path.suffix], path)
    if path.suffix == ".keras":
        return KERAS
    if head.startswith(b"\x89HDF"):
        return _hdf5(path)
    if head.startswith(b"PK"):
        return _archive(path)
    if path.name.endswith(".index.json"):
        return _index(path)
    return None


def _hdf5(path: Path) -> str | None:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return KERAS if _KERAS_NAMES & (file.attrs.keys() | file.keys()) else None
    except Exception:  # on damaged files h5py raises almost anything
        return None


_KERAS_NAMES = {"keras_version", "layer_names", "model_config", "model_weights"}
"""Of attributes and groups, in a whole model or in weights alone."""


def _archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return (
            f"NumPy arrays ({', '.join(names[:3])}), not a checkpoint of PyTorch: convert them to "
            "a state dict"
        )
    return KERAS if "model.weights.h5" in names else None


def _index(path: Path) -> str | None:
    try:
        shards = set(json.loads(path.read_bytes())["weight_map"].values())
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return None
    listed = ", ".join(sorted(map(str, shards))[:3])
    return f"an index of shards ({listed}), not weights: give the folder that they are in"


def is_onnx(path: Path) -> bool:
    """By the suffix, or the version and producer that a file begins with."""
    with open(path, "rb") as file:
        head = file.read(3)
    return path.suffix == ".onnx" or (head[:1] == b"\x08" and head[2:] == b"\x12")


def is_safetensors(path: Path) -> bool:
    """By the length of the header and its first character, whatever the suffix."""
    with open(path, "rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return head[8:] == b"{" and length + 8 <= path.stat().st_size
