"""ONNX files: the same logits and embedding as the network has, and one sentence for the others."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from commands import oodcli
from networks import Standardised, randomised
from torch import Tensor, nn

from oodcli.errors import CheckpointError
from oodcli.files.describe import kind_of
from oodcli.files.hub import companions
from oodcli.networks import onnx_graph
from oodcli.networks.card import Overrides
from oodcli.networks.load import load_classifier

onnx = pytest.importorskip("onnx")

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter that needs no onnxscript is old


def tiny() -> nn.Module:
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    )


def transformer() -> nn.Module:
    return randomised(torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=5))


def standardised() -> nn.Module:
    return randomised(Standardised())


def export(
    network: nn.Module, path: Path, side: int = 32, batch: int = 2, free: bool = True, **kwargs: Any
) -> None:
    axes = {"x": {0: "batch"}} if free else None
    torch.onnx.export(
        network,
        (torch.randn(batch, 3, side, side),),
        path,
        dynamo=False,
        input_names=["x"],
        dynamic_axes=axes,
        opset_version=17,
        **kwargs,
    )


def graph(path: Path, *nodes: Any, shape: list[Any], **tensors: Any) -> None:
    """A file with this graph, from x to y."""
    make = onnx.helper
    whole = make.make_graph(
        nodes,
        "graph",
        [make.make_tensor_value_info("x", 1, shape)],
        [make.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    opset = [make.make_opsetid("", 17)]
    path.write_bytes(make.make_model(whole, opset_imports=opset).SerializeToString())


def head(**more: Any) -> dict[str, Any]:
    """Weights of a last layer of four classes."""
    return {"w": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32), **more}


def node(kind: str, *inputs: str, to: str = "y", **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, list(inputs), [to], **attributes)


def fails(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_classifier(path, Overrides(input_size=(32, 32)))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "free", "batch"),
    [
        ("tiny", True, 2),
        ("tiny", False, 1),
        ("mobilenet_v2", True, 2),
        ("mobilenet_v2", False, 1),
        ("transformer", True, 2),
        ("standardised", True, 2),
    ],
)
def test_logits_and_embedding(name: str, free: bool, batch: int, tmp_path: Path) -> None:
    side = 64 if name == "mobilenet_v2" else 32
    network = (
        randomised(torchvision.models.mobilenet_v2(num_classes=5))
        if name == "mobilenet_v2"
        else {"tiny": tiny, "transformer": transformer, "standardised": standardised}[name]()
    )
    export(network, tmp_path / "net.onnx", side, batch, free)
    found = load_classifier(tmp_path / "net.onnx")
    assert found.preprocessing.input_size == (side, side)
    seen: list[Tensor] = []
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    for layer in (last, found.network.get_submodule(found.head_name or "")):
        layer.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = network(images), found.network(images)
    assert expected.std() > 1e-2
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    notes = " ".join(found.assumptions)
    assert "without modules" in notes
    assert "no BatchNorm is left" in notes


def test_batch_norm_that_was_not_folded(tmp_path: Path) -> None:
    network = tiny()
    export(
        network,
        tmp_path / "net.onnx",
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
    )
    found = load_classifier(tmp_path / "net.onnx")
    (norm,) = found.batchnorms.values()
    torch.testing.assert_close(norm.running_var, network[1].running_var)
    assert "no BatchNorm is left" not in " ".join(found.assumptions)


def test_commands_read_it(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export(tiny(), path)
    assert kind_of(path) == "checkpoint"
    result = oodcli("inspect", path, "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["arch"] == "ONNX"
    words = [word for name in ("energy", "msp", "odin", "norm") for word in ("-d", name)]
    result = oodcli("score", path, "noise:uniform?n=3", *words)
    assert result.status == 0, result.err
    result = oodcli("score", path, "noise:uniform?n=3", "-d", "1c-sum")
    assert result.status == 1
    assert "no BatchNorm layer" in result.err


def test_a_batch_size_that_is_part_of_the_graph(tmp_path: Path) -> None:
    export(transformer(), tmp_path / "net.onnx", free=False)
    fails(tmp_path / "net.onnx", "batches of 2 only", "dynamic_axes")
    sizes = np.array([1, -1], np.int64)
    graph(
        tmp_path / "one.onnx",
        node("GlobalAveragePool", "x", to="p"),
        node("Reshape", "p", "sizes", to="f"),
        node("MatMul", "f", "w", to="m"),
        node("Add", "m", "b"),
        shape=[1, 3, 32, 32],
        **head(sizes=sizes, b=np.arange(4, dtype=np.float32)),
    )
    found = load_classifier(tmp_path / "one.onnx")
    images = torch.randn(2, 3, 32, 32)
    expected = images.mean((2, 3)) @ torch.from_numpy(head()["w"]) + torch.arange(4)
    torch.testing.assert_close(found.network(images), expected)
    assert found.head is not None
    torch.testing.assert_close(found.head.bias, torch.arange(4).float())


def test_channels_last_as_tensorflow_has_them(tmp_path: Path) -> None:
    graph(
        tmp_path / "net.onnx",
        node("ReduceMean", "x", axes=[1, 2], keepdims=0, to="p"),
        node("MatMul", "p", "w"),
        shape=["n", 24, 32, 3],
        **head(),
    )
    found = load_classifier(tmp_path / "net.onnx")
    assert found.preprocessing.input_size == (24, 32)
    images = torch.randn(2, 3, 24, 32)
    expected = images.mean((2, 3)) @ torch.from_numpy(head()["w"])
    torch.testing.assert_close(found.network(images), expected)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    flat = node("GlobalMaxPool", "x", to="p"), node("Flatten", "p", to="f")
    graph(path, node("Bernoulli", "x"), shape=["n", 3, 32, 32])
    fails(path, "operation Bernoulli", "torch.export.save")
    graph(path, onnx.helper.make_node("Nms", ["x"], ["y"], domain="mine"), shape=["n", 3, 32, 32])
    fails(path, "operation mine.Nms")
    graph(path, *flat, node("MatMul", "f", "w"), shape=["n", 3], **head())
    fails(path, "(N, C, H, W)")
    graph(path, *flat, node("MatMul", "f", "missing"), shape=["n", 3, 32, 32])
    fails(path, "net.onnx", "missing")
    export(tiny(), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-9], b"nothing", b"\x08\x07"):
        path.write_bytes(content)
        fails(path, "net.onnx", "export it again")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tiny(), tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    fails(tmp_path / "net.onnx", "pip install 'oodcli[onnx]'")


def test_a_crafted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names do not become code, sizes in the file do not become memory, and no other file is
    read."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.onnx"
    attack = "a\")); __import__('pathlib').Path('ran').touch(); ((\""
    graph(
        path,
        onnx.helper.make_node("GlobalMaxPool", ["x"], [attack], name=attack),
        onnx.helper.make_node("Flatten", [attack], ["f"], name=attack, **{attack: attack}),
        onnx.helper.make_node("Relu", ["f"], ["r"], name=attack),
        onnx.helper.make_node("MatMul", ["r", "w"], ["y"], name=attack),
        shape=["n", 3, 32, 32],
        **head(),
    )
    found = load_classifier(path)
    found.network(torch.randn(1, 3, 32, 32))
    assert not Path("ran").exists()
    for kind, sizes in (("Expand", [1 << 20] * 4), ("ConstantOfShape", [1 << 40])):
        inputs = ("x", "sizes") if kind == "Expand" else ("sizes",)
        graph(path, node(kind, *inputs), shape=["n", 3, 32, 32], sizes=np.array(sizes))
        fails(path, "numbers")
    graph(path, node("Pad", "x", "pads"), shape=["n", 3, 32, 32], pads=np.full(8, 1 << 30))
    fails(path, "padding")
    export(tiny(), path)
    for location in ("../secret", "/etc/passwd", "net.onnx.data"):
        model = onnx.load(path)
        tensor = model.graph.initializer[0]
        onnx.external_data_helper.set_external_data(tensor, location)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        (tmp_path / "out.onnx").write_bytes(model.SerializeToString())
        fails(tmp_path / "out.onnx", "another file", location, "onnx.save")
    model = onnx.load(path)
    model.graph.initializer[0].dims[0] = 1 << 40
    path.write_bytes(model.SerializeToString())
    fails(path, "net.onnx")


GROWING = {
    "doubled": [("Concat", ["x", "x"], {"axis": 2})]
    + [("Concat", [f"t{n}", f"t{n}"], {"axis": 2}) for n in range(40)],
    "squared": [("Reshape", ["x", "row"], {}), ("Reshape", ["x", "column"], {})]
    + [(kind, ["t1", "t0"], {}) for kind in ("MatMul", "Add")],
}


@pytest.mark.parametrize("how", GROWING)
def test_small_graphs_that_fill_the_memory(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operation makes more of what the last one made."""
    monkeypatch.setattr(onnx_graph, "LARGEST", 1 << 20)
    nodes = [
        onnx.helper.make_node(kind, inputs, [f"t{place}"], **attributes)
        for place, (kind, inputs, attributes) in enumerate(GROWING[how])
    ]
    last = f"t{len(nodes) - 1}"
    nodes += [node("ReduceMean", last, to="m"), node("Reshape", "m", "one")]
    one = {"one": np.array([1, 1]), "row": np.array([1, -1]), "column": np.array([-1, 1])}
    path = tmp_path / "net.onnx"
    graph(path, *nodes, shape=["n", 3, 32, 32], **one)
    fails(path, "a tensor of", "numbers")


def test_weights_beside_the_file(tmp_path: Path) -> None:
    """As torch stores them, in NAME.onnx.data, and Hugging Face, in NAME.onnx_data."""
    images = torch.randn(2, 3, 32, 32)
    whole, path = tmp_path / "whole.onnx", tmp_path / "net.onnx"
    export(tiny(), whole)
    expected = load_classifier(whole)
    hashes = set()
    for name in ("net.onnx.data", "net.onnx_data"):
        onnx.save(
            *(onnx.load(whole), path),
            save_as_external_data=True,
            location=name,
            size_threshold=0,
        )
        found = load_classifier(path)
        torch.testing.assert_close(found.network(images), expected.network(images))
        assert set(companions(path)) == {"net.onnx", name}
        hashes.add(found.sha256)
        content = bytearray((tmp_path / name).read_bytes())
        content[8] ^= 1
        (tmp_path / name).write_bytes(content)
        hashes.add(load_classifier(path).sha256)
        (tmp_path / name).write_bytes(content[:50])
        fails(path, "not within")
        (tmp_path / name).unlink()
        fails(path, "which is missing")
    assert len(hashes) == 4


@pytest.mark.parametrize("said", [{"offset": -1}, {"length": 1 << 50}, {"length": "x"}])
def test_weights_beside_the_file_that_cannot_be(said: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export(tiny(), path)
    (tmp_path / "net.onnx.data").write_bytes(bytes(1 << 16))
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, "net.onnx.data")
    for key, value in said.items():
        tensor.external_data.add(key=key, value=str(value))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    path.write_bytes(model.SerializeToString())
    fails(path, "net.onnx is not an ONNX file that oodcli can read")


def test_padding_and_pooling_as_the_specification_says(tmp_path: Path) -> None:
    """auto_pad, padding on one side, and averages without it."""
    for pool, attributes in (
        ("MaxPool", {"auto_pad": "SAME_UPPER"}),
        ("AveragePool", {"pads": [0, 0, 1, 1]}),
        ("AveragePool", {"pads": [0, 0, 1, 1], "count_include_pad": 1}),
        ("AveragePool", {"pads": [1, 1, 1, 1]}),
        ("AveragePool", {"auto_pad": "SAME_LOWER"}),
    ):
        nodes = (
            node(pool, "x", kernel_shape=[2, 2], strides=[2, 2], to="p", **attributes),
            node("GlobalMaxPool", "p", to="g"),
            node("Flatten", "g", to="f"),
            node("MatMul", "f", "w"),
        )
        graph(tmp_path / "net.onnx", *nodes, shape=["n", 3, 7, 9], **head())
        images = np.random.default_rng(1).normal(size=(2, 3, 7, 9)).astype(np.float32)
        model = onnx.load(tmp_path / "net.onnx")
        from onnx.reference import ReferenceEvaluator

        (expected,) = ReferenceEvaluator(model).run(None, {"x": images})
        found = load_classifier(tmp_path / "net.onnx").network(torch.from_numpy(images))
        torch.testing.assert_close(found, torch.from_numpy(expected), msg=f"{pool} {attributes}")
        assert math.isfinite(float(found.sum()))


def ints(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


OPERATIONS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "Slice": ([node("Slice", "x", "a", "b", "c", "d", to="o")],
              {"a": ints(1, -1), "b": ints(-2, -100), "c": ints(2, 3), "d": ints(1, -2)}),
    "Max": ([node("Max", "x", "a", "b", to="o")],
            {"a": np.float32(-0.2), "b": np.full((1, 3, 1, 1), 0.3, np.float32)}),
    "Where": ([node("Less", "x", "a", to="l"), node("Where", "l", "a", "x", to="o")],
              {"a": np.float32(0.1)}),
    "Softmax": ([node("LogSoftmax", "x", to="l", axis=2), node("Softmax", "l", to="o")], {}),
    "Split": ([onnx.helper.make_node("Split", ["x"], ["l", "r"], axis=2),
               node("Split", "r", "a", to="o", axis=3)], {"a": ints(9)}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_as_the_specification_says(name: str, tmp_path: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    nodes, constants = OPERATIONS[name]
    path = tmp_path / "net.onnx"
    last = (node("GlobalAveragePool", "o", to="g"), node("Flatten", "g", to="f"))
    linear = node("MatMul", "f", "w")
    graph(path, *nodes, *last, linear, shape=["n", 3, 7, 9], **head(**constants))
    images = np.random.default_rng(1).normal(size=(2, 3, 7, 9)).astype(np.float32)
    (expected,) = ReferenceEvaluator(onnx.load(path)).run(None, {"x": images})
    found = load_classifier(path).network(torch.from_numpy(images))
    torch.testing.assert_close(found, torch.from_numpy(expected))


@pytest.mark.parametrize("name", ["net.keras", "net.h5", "folder", "net.pb", "net.tflite"])
def test_keras_and_tensorflow(name: str, tmp_path: Path) -> None:
    import h5py

    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "saved_model.pb").write_bytes(b"\x08\x01")
    elif name == "net.h5":
        with h5py.File(path, "w") as file:
            file.create_group("model_weights")
    else:
        path.write_bytes(b"PK\x03\x04")
    fails(path, "ONNX", "net.onnx")
    result = oodcli("inspect", path)
    assert (result.status, result.out) == (1, "")
    assert "reads as ONNX" in result.err
