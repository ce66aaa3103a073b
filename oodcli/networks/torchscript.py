"""Programs saved by ``torch.jit.save``, made to look like ordinary networks.

``torch.jit.load`` unpickles in C++ and compiles TorchScript, not Python, so no Python code in the
file is run. TorchScript is code nevertheless: its operations can write files (``torch.save``), and
``__setstate__`` methods run while the file is loaded. PyTorch's security policy
(https://github.com/pytorch/pytorch/blob/main/SECURITY.md) asks to treat a TorchScript file from
others as code. Here the operations are checked before any of them runs, and files with
``__setstate__`` methods or C++ objects are not loaded, unless the file is trusted. Nothing limits
the time or the memory that a program uses.
"""

from __future__ import annotations

import ast
import operator
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from oodcli.errors import CheckpointError, first_line
from oodcli.networks.layers import Flat, batch_norm, convolution, linear
from oodcli.networks.program import NAMESPACES

TRUST = "give --trust-pickle if you trust its author"
RESAVE = "save it again with torch.jit.save"
FORBIDDEN = re.compile(r"file|save|load|rpc|fork|python|call", re.IGNORECASE)
"""In the names of operations that do more than compute."""
PYTHON: dict[str, Callable[..., Any]] = {
    "aten::__getitem__": operator.getitem,
    "aten::len": len,
    "aten::Int": int,
    "aten::ScalarImplicit": int,
    "prim::NumToTensor": torch.as_tensor,
    "prim::dtype": operator.attrgetter("dtype"),
    "prim::device": operator.attrgetter("device"),
}
"""What stands for operations that exist in the interpreter of TorchScript alone."""


class Scripted(nn.Module):
    """A program whose graph has branches or loops that depend on the image; only what it returns
    can be seen."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, images: Tensor) -> Any:
        return self.program(images)

    def named_modules(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Module]]:
        """Itself alone: the program's own modules take no hooks."""
        yield "", self

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.program.named_parameters()


def load_torchscript(path: Path, *, trust: bool = False) -> tuple[nn.Module, str]:
    """The network in a TorchScript archive, and a note on what the file does not tell.

    Raises CheckpointError when the file is damaged, was traced in training mode, takes anything but
    one batch of images, or does more than compute with tensors (and is not trusted).
    """
    if not trust:
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated; its files are not
            program: Any = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
            graph = program.inlined_graph
    except Exception as error:  # a damaged archive can raise almost anything
        raise CheckpointError(
            f"{path} is not a TorchScript program that this torch ({torch.__version__}) can load "
            f"({first_line(error)[:160]}): {RESAVE}"
        ) from error
    if not trust:
        _check_operations(graph, path)
    _check_tensors(program, graph, path)
    if len(list(graph.inputs())) != 2:
        raise CheckpointError(
            f"{path} takes {len(list(graph.inputs())) - 1} inputs: trace the classifier with one "
            "batch of images"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if hasattr(program, "training"):  # a file that was frozen has lost it
                graph = torch.jit.freeze(program, optimize_numerics=False).graph
        _check_evaluation(graph, path)
        network = _flat(graph)
    except (_NotFlatError, RuntimeError) as error:
        return Scripted(program.float()), (
            f"TorchScript: this program is run as it is ({first_line(error)[:120]}), so only its "
            "logits are used: detectors that need the embedding or layers are left out"
        )
    return network, (
        "TorchScript: a list of operations without modules, so layers have other names, and "
        "activations or convolutions take the place of blocks"
    )


def _check_archive(path: Path) -> None:
    """Raises CheckpointError where loading the archive would run a part of it."""
    objects: list[str] = []
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".py"):
                    for node in ast.walk(ast.parse(archive.read(name))):
                        if isinstance(node, ast.FunctionDef) and node.name == "__setstate__":
                            objects.append(node.name)
                elif name.endswith(".pkl"):
                    for opcode, argument, _ in pickletools.genops(archive.read(name)):
                        words = str(argument).replace(" ", ".")
                        if opcode.name == "GLOBAL" and "torch.classes" in words:
                            objects.append(words.removeprefix("__torch__."))
    except Exception as error:  # zip, pickle and syntax errors of every kind
        raise CheckpointError(
            f"{path} is not a complete TorchScript archive ({first_line(error)[:160]}): {RESAVE}"
        ) from error
    if objects:
        raise CheckpointError(
            f"{path} runs {objects[0]} while it is loaded, as quantised programs do: save the "
            f"float network, or {TRUST}"
        )


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _check_operations(graph: Any, path: Path) -> None:
    for node in _nodes(graph):
        namespace, _, name = node.kind().partition("::")
        if namespace not in NAMESPACES or FORBIDDEN.search(name):
            raise CheckpointError(
                f"{path} calls {node.kind()}, which is not a tensor operation of torch: {TRUST}"
            )


def _check_tensors(program: nn.Module, graph: Any, path: Path) -> None:
    """Raises CheckpointError where a tensor would reach beyond its bytes in the file, which the
    loader does not check."""
    constants = (n.output().toIValue() for n in _nodes(graph) if n.kind() == "prim::Constant")
    tensors = [*program.parameters(), *program.buffers(), *constants]
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.numel():
            continue
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        last = tensor.storage_offset() + sum((size - 1) * step for size, step in pairs)
        if (last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path} is damaged (a tensor lacks bytes): {RESAVE}")


def _check_evaluation(graph: Any, path: Path) -> None:
    """Raises CheckpointError when BatchNorm or dropout would do what they do in training."""
    places = {"aten::batch_norm": 5, "aten::dropout": 2, "aten::dropout_": 2}
    for node in _nodes(graph):
        place = places.get(node.kind())
        if place is not None and list(node.inputs())[place].toIValue() is True:
            raise CheckpointError(
                f"{path} was traced in training mode ({node.kind()}): call model.eval() before "
                "torch.jit.trace"
            )


class _NotFlatError(Exception):
    """Says what a program has that no list of operations can have."""


def _flat(graph: Any) -> nn.Module:
    """The network that computes a frozen graph. Raises _NotFlatError."""
    flat = Flat()
    program, images = graph.inputs()
    values: dict[str, Any] = {
        program.debugName(): None,
        images.debugName(): flat.graph.placeholder("images"),
    }
    _append(flat, graph, values)
    outputs = [values[output.debugName()] for output in graph.outputs()]
    return flat.network(outputs[0] if len(outputs) == 1 else tuple(outputs))


def _append(flat: Flat, block: Any, values: dict[str, Any]) -> None:
    for node in block.nodes():
        kind = node.kind()
        given = [values[each.debugName()] for each in node.inputs()]
        names = [each.debugName() for each in node.outputs()]
        if kind == "prim::If":
            _append_branch(flat, node, names, values)
        elif kind in ("prim::ListUnpack", "prim::TupleUnpack"):
            for index, name in enumerate(names):
                values[name] = flat.graph.call_function(operator.getitem, (given[0], index))
        elif len(names) == 1:
            values[names[0]] = _value(flat, node, given, values)
        elif kind != "prim::RaiseException":
            raise _NotFlatError(f"it has {kind}")


def _append_branch(flat: Flat, node: Any, names: list[str], values: dict[str, Any]) -> None:
    """The branch of an ``if`` that raises no error, where the other one does."""
    branches = [
        block
        for block in node.blocks()
        if not any(inner.kind() == "prim::RaiseException" for inner in block.nodes())
    ]
    if len(branches) != 1:
        raise _NotFlatError("it has prim::If")
    _append(flat, branches[0], values)
    for name, output in zip(names, branches[0].outputs(), strict=True):
        values[name] = values[output.debugName()]


def _value(flat: Flat, node: Any, given: list[Any], values: dict[str, Any]) -> Any:
    """The node or constant that a TorchScript node's one output becomes."""
    kind = node.kind()
    if kind == "prim::Constant":
        constant = node.output().toIValue()
        if isinstance(constant, Tensor):
            return _Weight(constant.detach(), node.output().debugName())
        if not isinstance(constant, int | float | str | list | tuple | None | torch.device):
            raise _NotFlatError(f"it has a constant {type(constant).__name__}")
        return constant
    if kind == "prim::ListConstruct":
        return [_node(flat, each) for each in given]
    if kind == "prim::TupleConstruct":
        return tuple(_node(flat, each) for each in given)
    if kind == "aten::format":  # the text of an error that is not raised
        return ""
    if kind in ("prim::unchecked_cast", "prim::Uninitialized"):
        return given[0] if given else None
    layer = _layer(kind, given)
    if layer is not None:
        weights = [each for each in given if isinstance(each, _Weight)]
        name = weights[0].layer if weights else kind.removeprefix("aten::")
        return flat.add(name, layer, given[0])
    given = [_node(flat, each) for each in given]
    if kind in PYTHON:
        return flat.graph.call_function(PYTHON[kind], tuple(given[:2]))
    if not kind.startswith("aten::"):
        raise _NotFlatError(f"it has {kind}")
    schema = torch._C.parse_schema(node.schema())
    packet = getattr(torch.ops.aten, kind.removeprefix("aten::"))
    named = [argument.name for argument in schema.arguments]
    keywords = {
        argument.name: value
        for argument, value in zip(schema.arguments, given, strict=True)
        if argument.kwarg_only
    }
    positional = tuple(v for n, v in zip(named, given, strict=True) if n not in keywords)
    overload = getattr(packet, schema.overload_name or "default")
    return flat.graph.call_function(overload, positional, keywords)


class _Weight:
    """A tensor of the file and its name, ``self.layer1.0.conv1.weight``."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.tensor = tensor
        self.layer = name.removeprefix("self.").rpartition(".")[0]


def _node(flat: Flat, value: Any) -> Any:
    return flat.constant(value.tensor) if isinstance(value, _Weight) else value


def _layer(kind: str, given: list[Any]) -> nn.Module | None:
    """The module of ``torch.nn`` for an operation whose weights are constants; None for others."""
    tensors: list[Any] = [each.tensor if isinstance(each, _Weight) else each for each in given]
    if not given or not isinstance(given[0], fx.Node):
        return None
    if kind in ("aten::relu", "aten::relu_"):
        return nn.ReLU(inplace=kind.endswith("_"))
    if any(isinstance(each, fx.Node) for each in tensors[1:]):
        return None
    if kind == "aten::linear":
        return linear(*tensors[1:])
    if kind == "aten::conv2d" and not isinstance(tensors[4], str):
        return convolution(*tensors[1:])
    if kind == "aten::_convolution" and tensors[1].ndim == 4 and not tensors[6]:
        _, weight, bias, stride, padding, dilation, _, _, groups = tensors[:9]
        return convolution(weight, bias, stride, padding, dilation, groups)
    if kind == "aten::batch_norm" and isinstance(tensors[3], Tensor):
        return batch_norm(None, *tensors[1:])
    return None
