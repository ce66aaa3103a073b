"""Programs saved by ``torch.export`` (``.pt2``), made to look like ordinary networks.

An exported program is a graph of ATen calls that remembers which module each came from.
Unflattened, it has the modules' names again; here the convolutions, linear layers, BatchNorms and
sequences become ``torch.nn`` modules again, so that heads, blocks and BatchNorms are found as
anywhere else, and the batch size that the example had is taken out of the graph.

A program is code. ``torch.export.load`` would unpickle objects, load compiled libraries, evaluate
expressions and call any function under ``torch`` that the archive names, so all of these are
refused unless the file is trusted. A program computes what it was exported to compute: nothing
limits its time or its memory.
"""

from __future__ import annotations

import ast
import json
import logging
import math
import operator
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from oodcli.errors import CheckpointError, first_line

aten = torch.ops.aten
REEXPORT = (
    "export it again with torch.export.export(model.eval(), (image,), "
    "dynamic_shapes=({0: torch.export.Dim('batch')},))"
)
LARGEST_EXAMPLE = 1 << 28
"""Numbers in a batch of images."""

ARITHMETIC = frozenset(
    getattr(operator, name)
    for name in (
        *("add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "le", "lt", "mod", "mul"),
        *("ne", "neg", "not_", "or_", "pow", "sub", "truediv"),
    )
)
"""Python operators that a program may apply to sizes."""
NAMESPACES = frozenset({"aten", "prims", "prim", "torchvision", "quantized_decomposed"})
"""Operator libraries that a program may call."""
WRAPPERS = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})
"""What a program may call that calls a part of it: once, so that none goes round for ever."""
SYMPY = frozenset(
    (
        *("Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Mod", "Max", "Min"),
        *("Abs", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Equality"),
        *("Unequality", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan"),
        *("FloorDiv", "CeilDiv", "CleanDiv", "PythonMod", "ModularIndexing", "IntTrueDiv"),
        *("FloatTrueDiv", "FloorToInt", "CeilToInt", "TruncToInt", "ToFloat", "Where"),
    )
)
"""What the serialised size expressions of a program are made of."""


def load_program(path: Path, *, trust: bool = False) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network in a .pt2 file, and channels, height and width of its example image.

    Raises CheckpointError when the file is no exported classifier of float32 images, was exported
    in training mode, does more than compute with tensors (and is not trusted), or cannot be made to
    work on other batch sizes than its example's.
    """
    if not trust:
        _check_archive(path)
    program = _load(path, trust)
    image = _image(program, path)
    shape = image.meta["val"].shape
    _check_evaluation(program, path)
    batch = shape[0] if isinstance(shape[0], int) else None
    if math.prod(shape[1:]) * (batch or 1) > LARGEST_EXAMPLE:
        raise CheckpointError(
            f"{path} takes images of {tuple(shape)}, too large to try: {REEXPORT}"
        )
    images = torch.randn((3, *shape[1:]), generator=torch.Generator().manual_seed(0))
    try:
        expected = _run_rows(program.module(), images, batch)
    except Exception as error:  # a graph that was edited or damaged can raise almost anything
        reason = first_line(error)[:160]
        raise CheckpointError(
            f"{path} does not run ({reason}): export it again with torch.export.save"
        ) from error
    try:
        with _quiet():
            _free_batch(program, image)
        network = torch.export.unflatten(program)
        network.check_input_constraints = False
        _restore_layers(network)
        with torch.no_grad():
            found = _first(network(images))
        same = found.shape == expected.shape and torch.allclose(found, expected, 1e-3, 1e-4)
    except (
        Exception
    ) as error:  # what a graph of constants does with another batch is anyone's guess
        raise CheckpointError(
            f"{path} works on batches of {batch or 'its own size'} only: {REEXPORT}"
        ) from error
    if not same:
        raise CheckpointError(f"{path} mixes the images of a batch of {batch}: {REEXPORT}")
    _forget_examples(network)
    return network, (int(shape[1]), int(shape[2]), int(shape[3]))


def _forget_examples(network: nn.Module) -> None:
    """Without the values that each step had in the example: these have sizes and no memory, and
    cannot be copied, as the network will be."""
    for module in network.modules():
        graph = getattr(module, "graph", None)
        for node in graph.nodes if isinstance(graph, torch.fx.Graph) else ():
            for name in ("val", "tensor_meta", "example_value"):
                node.meta.pop(name, None)


def _load(path: Path, trust: bool) -> torch.export.ExportedProgram:
    try:
        with _quiet(), _unpickling_tensors_only(trust):
            program = torch.export.load(path)
    except Exception as error:  # JSON, zip, pickle and graph errors of every kind
        reason = first_line(error)[:160]
        raise CheckpointError(
            f"{path} is not a program that this torch ({torch.__version__}) can load ({reason}): "
            "export it again with torch.export.save"
        ) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if not trust and not _computes(node):
                raise CheckpointError(
                    f"{path} calls {node.target}, which is not a tensor operation: give "
                    "--trust-pickle if you trust its author"
                )
    return program


def _computes(node: torch.fx.Node) -> bool:
    """Whether a node of a program can do no more than compute."""
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in NAMESPACES and "file" not in str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):  # no_grad or autocast within forward
        given = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
        known = not any(callable(leaf) and not isinstance(leaf, torch.fx.Node) for leaf in given)
        return known and str(target) in WRAPPERS
    return target in ARITHMETIC


def _check_archive(path: Path) -> None:
    """Raises CheckpointError when loading the archive would run code that is in it."""
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        names = reader.get_all_records()
        models = [name for name in names if name.startswith("models/") and name.endswith(".json")]
        texts = [reader.get_record(name).decode() for name in models]
        graphs = [json.loads(text) for text in texts]
    except (RuntimeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a complete .pt2 archive: export it again") from error
    if not models:
        raise CheckpointError(
            f"{path} holds no program of torch.export (or one of torch 2.7 or older): export it "
            "again with torch.export.save"
        )
    compiled = [n for n in names if "aotinductor" in n or n.endswith((".so", ".o", ".cubin"))]
    objects = [name for name in names if re.search(r"(custom|opaque)_obj", name)]
    odd = [text for graph in graphs for text in _expressions(graph) if not _plain(text)]
    for found, what in ((compiled, "a compiled library"), (objects, "a pickled object")):
        if found:
            raise CheckpointError(
                f"{path} holds {what} ({found[0]}), which can run any code: export the plain "
                "network, or give --trust-pickle if you trust its author"
            )
    if odd:
        raise CheckpointError(
            f"{path} holds the expression '{odd[0][:60]}', which could run any code: give "
            "--trust-pickle if you trust its author"
        )


def _expressions(graph: Any) -> Iterator[str]:
    """Every string that torch would hand to sympy, which evaluates it."""
    pending = [graph]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from (v for k, v in item.items() if "expr" in k and isinstance(v, str))
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _plain(expression: str) -> bool:
    """Whether this is arithmetic with symbols: no attribute, no call but sympy's classes, and no
    text but a symbol's name."""
    try:
        nodes = list(ast.walk(ast.parse(expression.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    arithmetic = (
        *(ast.Expression, ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop),
        *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.keyword),
    )
    for node in nodes:
        if isinstance(node, ast.Call):
            known = isinstance(node.func, ast.Name) and node.func.id in SYMPY
        elif isinstance(node, ast.Constant):
            known = not isinstance(node.value, str) or node.value.isidentifier()
        elif isinstance(node, ast.Name):
            known = "__" not in node.id
        else:
            known = isinstance(node, arithmetic)
        if not known:
            return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs a traceback before it raises an error that is caught here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _unpickling_tensors_only(trust: bool) -> Iterator[None]:
    """Within it ``torch.load`` reads nothing but tensors, whatever ``torch.export`` asks it for."""
    load, loads = torch.load, pickle.loads

    def refuse(*_: Any, **__: Any) -> Any:
        raise pickle.UnpicklingError("it holds pickled objects")

    def careful(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "weights_only": True})

    if not trust:
        torch.load, pickle.loads = careful, refuse
    try:
        yield
    finally:
        torch.load, pickle.loads = load, loads


def _image(program: torch.export.ExportedProgram, path: Path) -> torch.fx.Node:
    """The placeholder of the one input, a batch of float32 images."""
    inputs = program.graph_signature.user_inputs
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in inputs]
    value = nodes[0].meta.get("val") if len(nodes) == 1 else None
    if not isinstance(value, Tensor) or value.ndim != 4 or value.dtype != torch.float32:
        raise CheckpointError(
            f"{path} takes {len(inputs)} inputs, the first not a float32 batch of images (N, C, H, "
            "W), or more than one: export the classifier with one image batch as its example"
        )
    if not all(isinstance(length, int) for length in value.shape[1:]):
        raise CheckpointError(
            f"{path} leaves the number of channels or the image size open: export it with a fixed "
            "height and width"
        )
    image: torch.fx.Node = nodes[0]
    return image


def _check_evaluation(program: torch.export.ExportedProgram, path: Path) -> None:
    """Raises CheckpointError when BatchNorm or dropout would do what they do in training."""
    for node in program.graph.nodes:
        name = str(node.target)
        training = (
            ("batch_norm" in name and len(node.args) > 5 and node.args[5] is True)
            or ("dropout" in name and len(node.args) > 2 and node.args[2] is True)
            or "_batch_norm_legit.no_stats" in name
        )
        if training:
            raise CheckpointError(
                f"{path} was exported in training mode ({name}): call model.eval() before "
                "torch.export.export"
            )


def _run_rows(reference: nn.Module, images: Tensor, batch: int | None) -> Tensor:
    """Outputs for the images, in batches of the size that the program was exported for."""
    size = batch or len(images)
    rows = []
    with torch.no_grad():
        for start in range(0, len(images), size):
            part = images[start : start + size]
            filled = torch.cat([part, part[:1].expand(size - len(part), *part.shape[1:])])
            rows.append(_first(reference(filled))[: len(part)])
    return torch.cat(rows)


def _first(output: Any) -> Tensor:
    tensor: Tensor = torch.utils._pytree.tree_leaves(output)[0]
    return tensor


class _FreeBatch(torch.fx.Interpreter):
    """Runs a program on fake images, twice as many as its example had, and takes the example's
    batch size out of every list of sizes that it comes to."""

    VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
    FILLS = (
        *(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format),
        *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
    )

    def __init__(self, program: torch.export.ExportedProgram, image: torch.fx.Node) -> None:
        super().__init__(program.graph_module, garbage_collect_values=False)
        self.image = image
        self.batch = int(image.meta["val"].shape[0])
        self.length: torch.fx.Node | None = None

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.target in self.VIEWS:
            self._free_view(n)
        elif n.target in self.FILLS:
            place = 0 if isinstance(n.args[0], list | tuple) else 1
            self._free_sizes(n, place)
        elif n.target in (aten.expand.default, aten.repeat.default) and not self._moved(n.args[0]):
            self._free_sizes(n, 1)
        return super().run_node(n)

    def _moved(self, node: Any) -> list[int]:
        """Dimensions in which a tensor is longer than with the example's batch size."""
        pairs = zip(node.meta["val"].shape, self.env[node].shape, strict=True)
        return [dim for dim, (before, now) in enumerate(pairs) if before != now]

    def _free_view(self, node: torch.fx.Node) -> None:
        """-1 for the dimension of a view that holds the batch: the one that begins where the batch
        began, counted in elements of the dimensions before."""
        source = node.args[0]
        assert isinstance(source, torch.fx.Node)
        moved = self._moved(source)
        if not moved:
            return
        begin = math.prod(source.meta["val"].shape[: moved[0]])
        sizes = [int(size) for size in node.meta["val"].shape]
        starts = [math.prod(sizes[:dim]) for dim in range(len(sizes))]
        same = [d for d, size in enumerate(sizes) if size == self.batch]
        exact = [d for d in same if starts[d] == begin] or (same if len(same) == 1 else [])
        # A batch of one, between two dimensions, has no length to tell to which of them it goes:
        # with the one before where dimensions are merged, after where they are split.
        merged = len(sizes) < len(source.meta["val"].shape)
        after = [d for d, size in enumerate(sizes) if starts[d] * size + merged > begin]
        sizes[(exact or after or [0])[0]] = -1
        node.update_arg(1, sizes)

    def _free_sizes(self, node: torch.fx.Node, place: int) -> None:
        """The batch's own length for a first size equal to the example's; where that was no batch
        size, the tensor is broadcast over the batch all the same."""
        sizes = node.args[place]
        if not isinstance(sizes, list | tuple) or not sizes or sizes[0] != self.batch:
            return
        if self.length is None:
            graph = self.image.graph
            with graph.inserting_after(self.image):
                self.length = graph.call_function(aten.sym_size.int, (self.image, 0))
            self.length.meta["val"] = self.batch
            # unflatten places a node by the module it came from: here the outermost
            stacks = (n.meta.get("nn_module_stack") for n in graph.nodes)
            stack = next(stack for stack in stacks if stack)
            self.length.meta["nn_module_stack"] = dict(list(stack.items())[:1])
            self.env[self.length] = self.env[self.image].shape[0]
        node.update_arg(place, [self.length, *sizes[1:]])


def _free_batch(program: torch.export.ExportedProgram, image: torch.fx.Node) -> None:
    """Make a program that was exported with a fixed batch size work with any; where the size is
    open already, let views infer it, so that modules need not be handed it."""
    graph = program.graph_module.graph
    if not isinstance(image.meta["val"].shape[0], int):
        for node in graph.nodes:
            sizes = list(node.args[1]) if node.target in _FreeBatch.VIEWS else []
            open_sizes = [i for i, size in enumerate(sizes) if isinstance(size, torch.fx.Node)]
            if len(open_sizes) == 1 and -1 not in sizes:
                sizes[open_sizes[0]] = -1
                node.update_arg(1, sizes)
        graph.eliminate_dead_code()
        return
    shape = [int(length) for length in image.meta["val"].shape]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        inputs: list[Any] = []
        for spec in program.graph_signature.input_specs:
            known = program.state_dict.get(spec.target or "")
            known = program.constants.get(spec.target or "") if known is None else known
            if known is None:
                inputs.append(torch.empty([2 * shape[0], *shape[1:]]))
            else:
                inputs.append(mode.from_tensor(known) if isinstance(known, Tensor) else known)
        _FreeBatch(program, image).run(*inputs, enable_io_processing=False)


def _restore_layers(network: nn.Module) -> None:
    """Put ``torch.nn`` modules in the place of those that stand for one, innermost first."""
    for name, module in reversed(list(network.named_modules())):
        graph = getattr(module, "graph", None)
        if not name or not isinstance(graph, torch.fx.Graph):
            continue
        layer = _layer(module, graph)
        if layer is not None:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.eval())


def _layer(module: nn.Module, graph: torch.fx.Graph) -> nn.Module | None:
    """The ordinary module that does what a graph of one input does; None where none does."""
    nodes = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    calls = [node for node in nodes if node.op in ("call_function", "call_module", "call_method")]
    if len(inputs) != 1 or not calls or nodes[-1].op != "output" or not nodes[-1].args:
        return None
    if nodes[-1].args[0] is not calls[-1]:
        return None
    if all(node.op == "call_module" for node in calls):
        # A block that does nothing but call its one sequence stays a block.
        if len(calls) == 1 and not str(getattr(module, "_ty", "")).endswith("Sequential"):
            return None
        return _sequence(module, inputs[0], calls)
    if len(calls) != 1 or calls[0].args[:1] != (inputs[0],) or calls[0].kwargs:
        return None

    def value(node: Any) -> Any:
        if not isinstance(node, torch.fx.Node):
            return node
        return operator.attrgetter(str(node.target))(module)

    example = calls[0].meta.get("val")
    arguments = [value(node) for node in calls[0].args[1:]]
    target = calls[0].target
    if target is aten.linear.default:
        return _linear(*arguments)
    if target is aten.conv2d.default:
        return _convolution(*arguments)
    if target is aten.batch_norm.default and arguments[2] is not None:
        return _batch_norm(4 if example is None else example.ndim, *arguments)
    return None


def _sequence(
    module: nn.Module, value: torch.fx.Node, calls: list[torch.fx.Node]
) -> nn.Sequential | None:
    children: OrderedDict[str, nn.Module] = OrderedDict()
    for node in calls:
        name = str(node.target)
        if node.args != (value,) or node.kwargs or "." in name or name in children:
            return None
        children[name] = module.get_submodule(name)
        value = node
    return nn.Sequential(children)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _with(layer, weight=weight, bias=bias)


def _convolution(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> nn.Module:
    def pair(number: Any) -> tuple[int, int]:
        numbers = [number] if isinstance(number, int) else list(number)
        return (numbers[0], numbers[-1])

    layer = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        pair(stride),
        pair(padding),
        pair(dilation),
        groups,
        bias is not None,
        device="meta",
    )
    return _with(layer, weight=weight, bias=bias)


def _batch_norm(
    ndim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> nn.Module:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[ndim]
    layer = kind(len(mean), eps, momentum, affine=weight is not None, device="meta")
    count = torch.tensor(0)
    tensors = {"running_mean": mean, "running_var": var, "num_batches_tracked": count}
    return _with(layer, weight=weight, bias=bias, **tensors)


def _with(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    state = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    layer.load_state_dict(state, assign=True)
    return layer
