"""Networks of Keras and TensorFlow, which oodcli reads after a conversion to ONNX."""

from __future__ import annotations

from pathlib import Path

from oodcli.errors import CheckpointError
from oodcli.files.describe import HDF5, SAVED_MODEL
from oodcli.files.hdf5 import format_of

BY_SUFFIX = {
    ".pb": ("TensorFlow graph", "--graphdef"),
    ".tflite": ("TensorFlow Lite model", "--tflite"),
    ".meta": ("TensorFlow checkpoint", "--checkpoint"),
    ".index": ("TensorFlow checkpoint", "--checkpoint"),
}
"""What a file is, and the option of tf2onnx for it."""


def check_foreign(path: Path) -> None:
    """Raises CheckpointError, with the way to ONNX, for a file or folder of Keras or TensorFlow."""
    folder = path.parent if path.name == SAVED_MODEL else path
    if (folder / SAVED_MODEL).is_file():
        what, option = "TensorFlow SavedModel", "--saved-model"
    elif _is_keras(path):
        raise CheckpointError(
            f"{path} is a Keras model, which oodcli reads as ONNX: save it from Keras with "
            "model.export('net.onnx', format='onnx')"
        )
    elif path.suffix in BY_SUFFIX and path.is_file():
        what, option = BY_SUFFIX[path.suffix]
    else:
        return
    raise CheckpointError(
        f"{path} is a {what}, which oodcli reads as ONNX: convert it with python -m "
        f"tf2onnx.convert {option} {folder} --output net.onnx"
    )


def _is_keras(path: Path) -> bool:
    if path.suffix == ".keras" or not path.is_file():
        return path.suffix == ".keras" and path.is_file()
    with path.open("rb") as file:
        hdf5 = file.read(len(HDF5)) == HDF5
    return hdf5 and format_of(path) == ""  # oodcli's own files have one
