"""Networks in ONNX files (https://onnx.ai/onnx/operators), as torch modules.

The package ``onnx`` parses the file; each operation becomes a layer of ``torch.nn`` or a call of
torch. No code in the file is run: a graph with any other operation is refused. Tensors that are
made from sizes in the file have a limit.
"""

from __future__ import annotations

import math
import operator
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from oodcli.errors import CheckpointError, first_line
from oodcli.files.hub import ONNX_DATA
from oodcli.networks.layers import Flat, batch_norm, convolution, linear

LARGEST = 1 << 28
"""Numbers in a tensor that a graph makes of one image, or from sizes, and in a batch of images."""

WIDEST = 1 << 9
"""Pixels of padding, and size of a kernel."""

REEXPORT = (
    "export it again with torch.onnx.export(model.eval(), image, path, dynamo=False, "
    "input_names=['x'], dynamic_axes={'x': {0: 'batch'}})"
)


def load_onnx(path: Path) -> tuple[nn.Module, tuple[int, int] | None, str]:
    """The network in an ONNX file, the height and width that it takes, where the file fixes them,
    and a note on what the file does not tell.

    Raises CheckpointError when the package onnx is missing, when the file is damaged, keeps its
    weights in a file of another name, is no classifier of one batch of images, has an operation
    that is not known here, or works on a batch of its own size only.
    """
    model = _read(path)
    name, shape = _image(model, path)
    channels_last = shape[1] not in (1, 3) and shape[3] in (1, 3)
    batch, size = shape[0], (shape[1:3] if channels_last else shape[2:])

    def converted(freed: int | None) -> nn.Module:
        try:
            return _Graph(model, name, channels_last, freed).network()
        except _UnknownError as error:
            raise CheckpointError(
                f"{path} has the operation {error}, which oodcli cannot read from ONNX: save the "
                "network from torch, as a state dict or with torch.export.save"
            ) from error
        except Exception as error:  # a damaged graph can raise almost anything
            raise _damaged(path, error) from error

    network = converted(batch)
    fixed = None if None in size else (int(size[0] or 0), int(size[1] or 0))
    if fixed is not None:
        channels = int((shape[3] if channels_last else shape[1]) or 3)
        exported = network if batch is None else converted(None)
        _check_batches(network, exported, batch, (channels, *fixed), path)
    note = (
        "ONNX: a list of operations without modules, so layers have other names, and activations "
        "or convolutions take the place of blocks"
    )
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        note += "; no BatchNorm is left, as exporters fold it into convolutions"
    return network, fixed, note


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is not an ONNX file that oodcli can read ({first_line(error)[:160]}): export it "
        "again"
    )


def _read(path: Path) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise CheckpointError(
            f"{path} is ONNX, which needs the package onnx: pip install 'oodcli[onnx]'"
        ) from error
    try:
        model = onnx.load(str(path), load_external_data=False)
        opsets = {each.domain: each.version for each in model.opset_import}
        if not model.graph.node or not opsets.keys() & {"", "ai.onnx"}:
            raise ValueError("no graph")
    except Exception as error:  # protobuf's errors of every kind
        raise _damaged(path, error) from error
    tensors = [*model.graph.initializer]
    tensors += [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    outside = [t for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL]
    _read_outside(outside, path)
    return model


def _read_outside(tensors: Sequence[Any], path: Path) -> None:
    """Reads tensors from the file beside the ONNX file. No other file is opened: a graph could name
    any. Raises CheckpointError."""
    usual = [path.name + ending for ending in ONNX_DATA]
    read = 0
    for tensor in tensors:
        said = {entry.key: entry.value for entry in tensor.external_data}
        name = said.get("location", "")
        if name not in usual or not path.with_name(name).is_file():
            what = "is missing" if name in usual else f"is not {' or '.join(usual)}"
            raise CheckpointError(
                f"{path} keeps its weights in another file ({name[:80]!r}), which {what}: store "
                "them in one, as in onnx.save(onnx.load('net.onnx'), 'whole.onnx')"
            )
        try:
            with open(path.with_name(name), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                offset = int(said.get("offset", 0))
                length = int(said.get("length", size - offset))
                read += length
                # Two tensors may be one; a thousand would only fill the memory.
                if min(offset, length) < 0 or offset + length > size or read > 2 * size:
                    raise ValueError(f"{tensor.name[:80]} is not within {name}")
                file.seek(offset)
                tensor.raw_data = file.read(length)
        except (ValueError, OSError) as error:
            raise _damaged(path, error) from error
        tensor.data_location = 0
        del tensor.external_data[:]


def _image(model: Any, path: Path) -> tuple[str, tuple[int | None, ...]]:
    """The name and shape of the one input, None for lengths that are open."""
    known = {tensor.name for tensor in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in known]
    kind: Any = inputs[0].type.tensor_type if inputs else None
    lengths = [
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None
        for d in (kind.shape.dim if kind is not None else ())
    ]
    if len(inputs) != 1 or len(lengths) != 4 or kind.elem_type not in (1, 10):
        raise CheckpointError(
            f"{path} takes {len(inputs)} inputs, the first not a float batch of images (N, C, H, "
            "W), or more than one: export the classifier with one batch of images"
        )
    if math.prod(length or 1 for length in lengths) > LARGEST:
        raise CheckpointError(f"{path} takes images of {lengths}, too large to try: {REEXPORT}")
    return inputs[0].name, tuple(lengths)


def _check_batches(
    network: nn.Module, exported: nn.Module, batch: int | None, shape: Sequence[int], path: Path
) -> None:
    """Raises CheckpointError where three images together give other outputs than each does in a
    batch of the size that the graph was exported for. shape: of an image."""
    images = torch.randn((3, *shape), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            each = [_first(exported(i.expand(batch or 1, -1, -1, -1)))[:1] for i in images]
        expected = torch.cat(each)
    except Exception as error:
        raise _damaged(path, error) from error
    failure: Exception | None = None
    try:
        with torch.no_grad():
            found = _first(network(images))
        same = found.shape == expected.shape and torch.allclose(found, expected, 1e-3, 1e-4)
    except Exception as error:  # as many kinds as there are operations
        same, failure = False, error
    if not same:
        size = "its own size" if batch is None else batch
        raise CheckpointError(f"{path} works on batches of {size} only: {REEXPORT}") from failure


def _first(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


class _UnknownError(Exception):
    """Names an operation."""


class _Graph:
    """A graph on its way to torch. batch: the size that the graph was exported for, to be taken
    out of it; None leaves it as it is."""

    def __init__(self, model: Any, image: str, channels_last: bool, batch: int | None) -> None:
        self.flat = Flat()
        self.batch = batch
        opsets = {each.domain: each.version for each in model.opset_import}
        self.opset = opsets.get("", opsets.get("ai.onnx", 0))
        self.proto = model.graph
        self.constants = {t.name: self._tensor(t) for t in model.graph.initializer}
        self.added: dict[str, str] = {}
        """Sums that a layer has computed, by their names: the name of its output."""
        self.uses = Counter(name for node in model.graph.node for name in node.input)
        images = self.flat.graph.placeholder("images")
        if channels_last:
            images = self.flat.graph.call_function(torch.permute, (images, (0, 2, 3, 1)))
        self.values: dict[str, fx.Node] = {image: images}

    def _tensor(self, proto: Any) -> Tensor:
        import onnx

        tensor = torch.from_numpy(onnx.numpy_helper.to_array(proto).copy())
        return tensor.float() if tensor.is_floating_point() else tensor

    def network(self) -> nn.Module:
        for node in self.proto.node:
            if node.domain not in ("", "ai.onnx"):
                raise _UnknownError(f"{node.domain}.{node.op_type}")
            self._append(node)
        outputs = [self.values[each.name] for each in self.proto.output]
        network = self.flat.network(outputs[0] if len(outputs) == 1 else tuple(outputs))
        network.register_forward_pre_hook(_allow)
        return network

    def _append(self, node: Any) -> None:
        given = {each.name: self._attribute(node, each) for each in node.attribute}
        inputs = list(node.input)
        constant = {
            name: self.constants[name] for name in inputs if name and name in self.constants
        }
        if node.output[0] in self.added:
            self.values[node.output[0]] = self.values[self.added[node.output[0]]]
        elif node.op_type in ("Identity", "Dropout"):
            self._skip(node, constant)
        elif node.op_type == "Constant":
            self.constants[node.output[0]] = torch.as_tensor(next(iter(given.values())))
        elif (layer := self._layer(node, given, constant)) is not None:
            self._store(node, self.flat.add(node.name or node.op_type, layer, self.node(inputs[0])))
        # BatchNorm is a layer, or of a weight by its own statistics.
        elif node.op_type in FUNCTIONS and (
            node.op_type != "BatchNormalization" or inputs[0] in constant
        ):
            function = FUNCTIONS[node.op_type]
            given |= {"opset": self.opset, "outputs": len(node.output)}
            if isinstance(given.get("value"), Tensor):
                given["value"] = given["value"].item()
            if node.op_type == "Reshape" and inputs[1] in constant:
                arguments: list[Any] = [self.node(inputs[0]), self._freed(constant[inputs[1]])]
            else:
                arguments = [self.node(name) if name else None for name in inputs]
            self._store(node, self.flat.graph.call_function(function, (given, *arguments)))
        else:
            raise _UnknownError(node.op_type)

    def _attribute(self, node: Any, attribute: Any) -> Any:
        import onnx

        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            return self._tensor(value)
        if isinstance(value, bytes):
            return value.decode()
        numbers = list(value) if hasattr(value, "__len__") else [value]
        if all(isinstance(each, int | float) for each in numbers):
            return numbers if hasattr(value, "__len__") else value
        raise _UnknownError(node.op_type)  # a loop or a branch: its attribute is a graph

    def node(self, name: str) -> Any:
        """The node of a value. Integers, which are sizes and indices, stay on the host."""
        if name in self.values:
            return self.values[name]
        tensor = self.constants[name]
        if tensor.is_floating_point() or tensor.numel() > 64:
            self.values[name] = self.flat.constant(tensor)
            return self.values[name]
        return self.flat.graph.call_function(
            torch.tensor, (tensor.tolist(),), {"dtype": tensor.dtype}
        )

    def _store(self, node: Any, value: fx.Node) -> None:
        if node.op_type != "Split":  # only the first output of others is read
            self.values[node.output[0]] = value
            return
        for index, name in enumerate(node.output):
            self.values[name] = self.flat.graph.call_function(operator.getitem, (value, index))

    def _skip(self, node: Any, constant: Mapping[str, Tensor]) -> None:
        mode = constant.get(node.input[2]) if len(node.input) > 2 else None
        if mode is not None and bool(mode):
            raise ValueError("Dropout in training mode: call model.eval() before the export")
        if node.input[0] in constant:
            self.constants[node.output[0]] = constant[node.input[0]]
        else:
            self.values[node.output[0]] = self.values[node.input[0]]

    def _freed(self, shape: Tensor) -> list[int]:
        """The shape of a Reshape, without the batch size that the graph was exported for."""
        sizes: list[int] = shape.tolist()
        if self.batch is not None and sizes and sizes[0] == self.batch:
            sizes[0] = 0 if -1 in sizes else -1
        return sizes

    def _layer(
        self, node: Any, given: Mapping[str, Any], constant: Mapping[str, Tensor]
    ) -> nn.Module | None:
        """The module of ``torch.nn`` for an operation whose weights are constants."""
        kind = node.op_type
        if kind in MODULES:
            return MODULES[kind](given)
        weights = [constant[name] for name in node.input[1:] if name in constant]
        if not weights or len(weights) + 1 < len(node.input) or node.input[0] in constant:
            return None
        if kind == "Conv" and weights[0].ndim == 4 and _symmetric(given):
            return convolution(
                weights[0],
                weights[1] if len(weights) > 1 else None,
                given.get("strides", 1),
                given.get("pads", [0, 0])[:2],
                given.get("dilations", 1),
                given.get("group", 1),
            )
        if kind == "BatchNormalization" and len(weights) == 4:
            if given.get("training_mode"):
                raise ValueError("BatchNorm in training mode: call model.eval() before the export")
            scale, bias, mean, var = weights
            return batch_norm(None, scale, bias, mean, var, False, 0.1, given.get("epsilon", 1e-5))
        if kind == "Gemm" and not given.get("transA") and weights[0].ndim == 2:
            weight = weights[0] if given.get("transB") else weights[0].T
            added = None
            if len(weights) > 1:
                added = weights[1].reshape(-1).expand(len(weight)) * given.get("beta", 1.0)
            return linear((weight * given.get("alpha", 1.0)).contiguous(), added)
        if kind == "MatMul" and weights[0].ndim == 2:
            return linear(weights[0].T.contiguous(), self._bias_after(node, weights[0].shape[1]))
        return None

    def _bias_after(self, node: Any, width: int) -> Tensor | None:
        """The constant that the one operation after a MatMul adds, which is then done."""
        output = node.output[0]
        if self.uses[output] != 1 or any(each.name == output for each in self.proto.output):
            return None
        after = next(each for each in self.proto.node if output in each.input)
        others = [name for name in after.input if name != output]
        bias = self.constants.get(others[0]) if others else None
        if after.op_type != "Add" or bias is None or bias.shape != (width,):
            return None
        self.added[after.output[0]] = output
        return bias


def _symmetric(given: Mapping[str, Any]) -> bool:
    pads = given.get("pads", [0, 0, 0, 0])
    if max(map(abs, pads)) > WIDEST:
        raise ValueError(f"padding by {max(pads)} pixels")
    return given.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and pads[:2] == pads[2:]


MODULES: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "Relu": lambda _: nn.ReLU(),
    "LeakyRelu": lambda given: nn.LeakyReLU(given.get("alpha", 0.01)),
    "Elu": lambda given: nn.ELU(given.get("alpha", 1.0)),
    "Sigmoid": lambda _: nn.Sigmoid(),
    "Tanh": lambda _: nn.Tanh(),
    "HardSwish": lambda _: nn.Hardswish(),
    "Mish": lambda _: nn.Mish(),
    "Softplus": lambda _: nn.Softplus(),
    "Gelu": lambda given: nn.GELU(given.get("approximate", "none")),
}

# Functions take the node's attributes, with "opset" and the number of "outputs", then its inputs.


def _ints(value: Any) -> list[int]:
    found = value.tolist() if isinstance(value, Tensor) else value
    return [int(each) for each in (found if isinstance(found, list) else [found])]


class _Most:
    """The limit of the pass that is running."""

    numbers = LARGEST


def _allow(network: nn.Module, args: tuple[Any, ...]) -> None:
    """A pre-hook: a batch of images may have as many numbers as each of them alone."""
    _Most.numbers = LARGEST * max(1, len(args[0]))


def _limited(sizes: Sequence[int]) -> list[int]:
    """Raises ValueError for a tensor that is too large; a small graph could square its sizes."""
    if math.prod(max(size, 1) for size in sizes) > _Most.numbers:
        raise ValueError(f"a tensor of {'x'.join(map(str, sizes))} numbers")
    return list(sizes)


def _broadcast(*tensors: Tensor) -> Sequence[int]:
    """The shape of what an operation makes of tensors, element by element."""
    shapes = (tensor.shape for tensor in tensors)
    return torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call,no-any-return]


def _together(*tensors: Any) -> list[Any]:
    """Tensors on one device: sizes are computed on the host."""
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    return [t if device is None else t.to(device) for t in tensors]


def _pointwise(function: Any, *, folded: bool = False) -> Callable[..., Any]:
    """folded: whether it takes any number of inputs, by a function of two."""

    def call(given: Mapping[str, Any], *tensors: Tensor) -> Any:
        _limited(_broadcast(*tensors))
        parts = _together(*tensors)
        return reduce(function, parts) if folded else function(*parts)

    call.__name__ = f"pointwise_{function.__name__}"
    return call


def _matmul(given: Mapping[str, Any], a: Tensor, b: Tensor) -> Tensor:
    batch = _broadcast(a[..., :1, :1], b[..., :1, :1]) if min(a.ndim, b.ndim) > 1 else ()
    _limited([*batch[:-2], *a.shape[-2:-1], *(b.shape[-1:] if b.ndim > 1 else ())])
    first, second = _together(a, b)
    return torch.matmul(first, second)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    whole = not a.is_floating_point() and not b.is_floating_point()
    return torch.div(a, b, rounding_mode="trunc" if whole else None)


def _modulo(given: Mapping[str, Any], a: Tensor, b: Tensor) -> Any:
    return (torch.fmod if given.get("fmod") else torch.remainder)(*_together(a, b))


def _reshape(given: Mapping[str, Any], x: Tensor, shape: Any) -> Tensor:
    sizes = _ints(shape)
    if not given.get("allowzero"):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return torch.reshape(x, sizes)


def _flatten(given: Mapping[str, Any], x: Tensor) -> Tensor:
    axis = given.get("axis", 1) % max(x.ndim, 1)
    return (
        x.reshape(math.prod(x.shape[:axis]), -1) if axis == 0 else x.flatten(0, axis - 1).flatten(1)
    )


def _transpose(given: Mapping[str, Any], x: Tensor) -> Tensor:
    return x.permute(given.get("perm") or list(range(x.ndim))[::-1])


def _squeeze(given: Mapping[str, Any], x: Tensor, axes: Any = None) -> Tensor:
    found = given.get("axes") if axes is None else _ints(axes)
    return x.squeeze() if found is None else x.squeeze(tuple(found))


def _unsqueeze(given: Mapping[str, Any], x: Tensor, axes: Any = None) -> Tensor:
    found = given["axes"] if axes is None else _ints(axes)
    for axis in sorted(a % (x.ndim + len(found)) for a in found):
        x = x.unsqueeze(axis)
    return x


def _concat(given: Mapping[str, Any], *tensors: Tensor) -> Tensor:
    """Also where one was made for a batch of one image, as a class token is."""
    axis, parts = given["axis"], _together(*tensors)
    if axis % parts[0].ndim != 0:
        count = max(len(part) for part in parts)
        parts = [p.expand(count, *p.shape[1:]) if len(p) == 1 else p for p in parts]
    _limited([sum(part.numel() for part in parts)])
    return torch.cat(parts, axis)


def _split(given: Mapping[str, Any], x: Tensor, sizes: Any = None) -> Any:
    axis = given.get("axis", 0)
    found = given.get("split") if sizes is None else _ints(sizes)
    length = math.ceil(x.shape[axis] / given["outputs"])
    return torch.split(x, length if found is None else found, axis)


def _slice(
    given: Mapping[str, Any],
    x: Tensor,
    starts: Any = None,
    ends: Any = None,
    axes: Any = None,
    steps: Any = None,
) -> Tensor:
    first = _ints(given["starts"] if starts is None else starts)
    last = _ints(given["ends"] if ends is None else ends)
    which = given.get("axes") if axes is None else _ints(axes)
    by = [1] * len(first) if steps is None else _ints(steps)
    for axis, begin, end, step in zip(which or range(len(first)), first, last, by, strict=True):
        places = range(x.shape[axis])[begin:end:step]
        if step == 1:
            x = x.narrow(axis, places.start, len(places))
        else:
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64, device=x.device))
    return x


def _gather(given: Mapping[str, Any], x: Tensor, indices: Tensor) -> Tensor:
    axis = given.get("axis", 0) % x.ndim
    places = torch.where(indices < 0, indices + x.shape[axis], indices).to(x.device)
    _limited([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])
    taken = x.index_select(axis, places.reshape(-1).long())
    return torch.reshape(taken, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _shape(given: Mapping[str, Any], x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[given.get("start", 0) : given.get("end")])


def _expand(given: Mapping[str, Any], x: Tensor, shape: Any) -> Tensor:
    sizes = _ints(shape)
    lengths = [1] * (len(sizes) - x.ndim) + list(x.shape)
    sizes = [1] * (x.ndim - len(sizes)) + sizes
    pairs = zip(lengths, sizes, strict=True)
    return x.expand(_limited([b if a == 1 else a for a, b in pairs]))


def _filled(given: Mapping[str, Any], shape: Any) -> Tensor:
    return torch.full(_limited(_ints(shape)), given.get("value", 0.0))


def _range(given: Mapping[str, Any], start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    _limited([int((limit - start) / delta)])
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _tile(given: Mapping[str, Any], x: Tensor, repeats: Any) -> Tensor:
    times = _ints(repeats)
    _limited([size * count for size, count in zip(x.shape, times, strict=True)])
    return x.repeat(times)


KINDS = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float32,  # all is computed in float32
    11: torch.float32,
    16: torch.float32,
}
"""ONNX's numbers of the types of tensors."""


def _cast(given: Mapping[str, Any], x: Tensor) -> Tensor:
    return x.to(
        x.dtype
        if x.is_floating_point() and KINDS[given["to"]].is_floating_point
        else KINDS[given["to"]]
    )


def _clip(given: Mapping[str, Any], x: Tensor, low: Any = None, high: Any = None) -> Any:
    least = given.get("min") if low is None else low.item()
    most = given.get("max") if high is None else high.item()
    return x.clamp(least, most)


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(given: Mapping[str, Any], x: Tensor, axes: Any = None) -> Tensor:
        found = given.get("axes") if axes is None else _ints(axes)
        if not found:
            if given.get("noop_with_empty_axes"):
                return x
            found = list(range(x.ndim))
        return function(x, dim=tuple(found), keepdim=bool(given.get("keepdims", 1)))

    call.__name__ = f"reduced_{function.__name__}"
    return call


def _normalised(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(given: Mapping[str, Any], x: Tensor) -> Tensor:
        if given["opset"] >= 13:
            return function(x, given.get("axis", -1))
        axis = given.get("axis", 1) % x.ndim  # of all axes from this one on
        return function(x.flatten(axis), axis).reshape(x.shape)

    call.__name__ = f"normalised_{function.__name__}"
    return call


def _padded(given: Mapping[str, Any], x: Tensor, value: float) -> Tensor:
    """With the padding of a convolution or a pooling."""
    kernel = given["kernel_shape"]
    strides, dilations = given.get("strides", [1, 1]), given.get("dilations", [1, 1])
    pads = given.get("pads", [0, 0, 0, 0])
    auto = given.get("auto_pad", "NOTSET")
    if auto.startswith("SAME"):
        begins, ends = [], []
        for size, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0)
            small = total // 2
            begins.append(small if auto == "SAME_UPPER" else total - small)
            ends.append(total - begins[-1])
        pads = begins + ends
    if max(pads, default=0) > WIDEST or max(kernel) > WIDEST:
        raise ValueError(f"padding by {max(pads)} pixels")
    top, left, bottom, right = pads
    _limited([*x.shape[:2], x.shape[2] + top + bottom, x.shape[3] + left + right])
    return F.pad(x, (left, right, top, bottom), value=value) if any(pads) else x


def _conv(given: Mapping[str, Any], x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    x = _padded({**given, "kernel_shape": list(weight.shape[2:])}, x, 0.0)
    strides, dilations = given.get("strides", [1, 1]), given.get("dilations", [1, 1])
    return F.conv2d(x, weight, bias, strides, 0, dilations, given.get("group", 1))


def _max_pool(given: Mapping[str, Any], x: Tensor) -> Tensor:
    kernel, strides = given["kernel_shape"], given.get("strides", [1, 1])
    x = _padded(given, x, -math.inf)
    ceil = bool(given.get("ceil_mode"))
    return F.max_pool2d(x, kernel, strides, 0, given.get("dilations", 1), ceil)


def _average_pool(given: Mapping[str, Any], x: Tensor) -> Tensor:
    kernel, strides = given["kernel_shape"], given.get("strides", [1, 1])
    ceil = bool(given.get("ceil_mode"))
    shares = _padded(given, torch.ones_like(x[:1, :1]), float(given.get("count_include_pad", 0)))
    total = F.avg_pool2d(_padded(given, x, 0.0), kernel, strides, 0, ceil)
    return total / F.avg_pool2d(shares, kernel, strides, 0, ceil)


def _global_average_pool(given: Mapping[str, Any], x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def _global_max_pool(given: Mapping[str, Any], x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


def _pad(
    given: Mapping[str, Any], x: Tensor, pads: Any = None, value: Any = None, axes: Any = None
) -> Tensor:
    found = _ints(given["pads"] if pads is None else pads)
    which = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in _ints(axes)]
    if max(map(abs, found)) > WIDEST:
        raise ValueError(f"padding by {max(found)} pixels")
    flat = [0] * (2 * x.ndim)
    for place, axis in enumerate(which):
        last = 2 * (x.ndim - 1 - axis)
        flat[last : last + 2] = [found[place], found[place + len(which)]]
    ends = zip(x.shape, flat[-2::-2], flat[::-2], strict=True)
    _limited([size + before + after for size, before, after in ends])
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}[
        given.get("mode", "constant")
    ]
    if mode != "constant":
        return F.pad(x, flat[:4], mode)
    filling = given.get("value", 0.0) if value is None else value.item()
    return F.pad(x, flat, value=filling)


def _layer_norm(given: Mapping[str, Any], x: Tensor, scale: Tensor, bias: Any = None) -> Tensor:
    axis = given.get("axis", -1) % x.ndim
    return F.layer_norm(x, x.shape[axis:], scale, bias, given.get("epsilon", 1e-5))


def _instance_norm(given: Mapping[str, Any], x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=given.get("epsilon", 1e-5))


def _batch_norm(
    given: Mapping[str, Any], x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    """Of a weight, by its own statistics, as networks without BatchNorm standardise theirs."""
    own = bool(given.get("training_mode"))
    first, second = (None, None) if own else (mean, var)
    return F.batch_norm(x, first, second, scale, bias, own, 0.0, given.get("epsilon", 1e-5))


def _scatter(given: Mapping[str, Any], x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    if given.get("reduction", "none") != "none":
        raise ValueError("ScatterND with a reduction")
    x, indices, updates = _together(x, indices, updates)
    return x.index_put(tuple(indices.long().unbind(-1)), updates.to(x.dtype))


def _cumulative_sum(given: Mapping[str, Any], x: Tensor, axis: Tensor) -> Tensor:
    if given.get("exclusive") or given.get("reverse"):
        raise ValueError("CumSum from another end")
    return x.cumsum(int(axis))


def _gemm(given: Mapping[str, Any], a: Tensor, b: Tensor, c: Any = None) -> Any:
    a, b = (a.T if given.get("transA") else a), (b.T if given.get("transB") else b)
    _limited([len(a), b.shape[1]])
    product = given.get("alpha", 1.0) * (a @ b)
    return product if c is None else product + given.get("beta", 1.0) * c


def _lrn(given: Mapping[str, Any], x: Tensor) -> Any:
    alpha, beta, k = given.get("alpha", 1e-4), given.get("beta", 0.75), given.get("bias", 1.0)
    return F.local_response_norm(x, given["size"], alpha, beta, k)


def _hard_sigmoid(given: Mapping[str, Any], x: Tensor) -> Any:
    return (given.get("alpha", 0.2) * x + given.get("beta", 0.5)).clamp(0, 1)


def _prelu(given: Mapping[str, Any], x: Tensor, slope: Tensor) -> Any:
    return torch.where(x < 0, slope * x, x)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: _pointwise(function)
        for name, function in {
            "Add": torch.add,
            "Sub": torch.sub,
            "Mul": torch.mul,
            "Div": _divide,
            "Pow": torch.pow,
            "Sqrt": torch.sqrt,
            "Exp": torch.exp,
            "Log": torch.log,
            "Abs": torch.abs,
            "Neg": torch.neg,
            "Erf": torch.erf,
            "Sin": torch.sin,
            "Cos": torch.cos,
            "Floor": torch.floor,
            "Ceil": torch.ceil,
            "Reciprocal": torch.reciprocal,
            "Equal": torch.eq,
            "Less": torch.lt,
            "LessOrEqual": torch.le,
            "Greater": torch.gt,
            "GreaterOrEqual": torch.ge,
            "Not": torch.logical_not,
            "And": torch.logical_and,
            "Or": torch.logical_or,
            "Where": torch.where,
        }.items()
    },
    "Min": _pointwise(torch.minimum, folded=True),
    "Max": _pointwise(torch.maximum, folded=True),
    "Sum": _pointwise(torch.add, folded=True),
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMin": _reduced(torch.amin),
    "ReduceL2": _reduced(torch.linalg.vector_norm),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Conv": _conv,
    "CumSum": _cumulative_sum,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "HardSigmoid": _hard_sigmoid,
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _normalised(torch.log_softmax),
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "PRelu": _prelu,
    "Mod": _modulo,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterND": _scatter,
    "Shape": _shape,
    "Slice": _slice,
    "Softmax": _normalised(torch.softmax),
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
