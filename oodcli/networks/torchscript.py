"""Programs saved by ``torch.jit.save``, made to look like ordinary networks.

TorchScript is code: its operations can write files, methods run while ``torch.jit.load`` reads a
file, and a crafted or damaged file can crash the process. PyTorch's security policy
(https://github.com/pytorch/pytorch/blob/main/SECURITY.md) asks to treat a TorchScript file from
others as code. So ``torch.jit`` does not read the file unless it is trusted. Instead, the tensors
are unpickled without any class, and the code, which is written in Python's syntax, is parsed, never
run: each call of a tensor operation becomes a layer or a call of torch. Branches that depend on the
image, and loops, cannot be listed like this. Nothing limits the time or the memory that the
operations use.
"""

from __future__ import annotations

import ast
import io
import math
import operator
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from oodcli.errors import CheckpointError, first_line
from oodcli.networks.layers import Flat, batch_norm, convolution, linear

TRUST = "give --trust-pickle if you trust its author"
FORBIDDEN = re.compile(r"file|save|load|print|warn|append", re.IGNORECASE)
"""In the names of operations that do more than compute."""
LONGEST = 100_000
"""Expressions in a program."""

FLAT = (
    "TorchScript: a list of operations without modules, so layers have other names, and "
    "activations or convolutions take the place of blocks"
)


class Scripted(nn.Module):
    """A program that torch.jit runs as it is; only what it returns can be seen."""

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


class UnlistedError(Exception):
    """Names what a program has that no list of operations can have."""


def load_torchscript(path: Path, *, trust: bool = False) -> tuple[nn.Module, str]:
    """The network in a TorchScript archive, and a note on what the file does not tell.

    Raises CheckpointError when the file is damaged, was traced in training mode, or has more than
    a list of tensor operations (and is not trusted).
    """
    try:
        return _Program(path).network(), FLAT
    except UnlistedError as error:
        if not trust:
            raise CheckpointError(
                f"{path} is TorchScript with {error}, which oodcli does not run: save "
                f"torch.jit.trace(model.eval(), image) or the state dict, or {TRUST}"
            ) from error
        reason = str(error)
    except CheckpointError:
        raise
    except Exception as error:  # zip, pickle, syntax and graph errors of every kind
        raise CheckpointError(
            f"{path} is not a TorchScript archive that oodcli can read ({first_line(error)[:160]}):"
            " save it again with torch.jit.save"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated; its files are not
            program: Any = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except Exception as error:  # a damaged archive can raise almost anything
        raise CheckpointError(
            f"{path} cannot be loaded by torch.jit ({first_line(error)[:160]}): save it again"
        ) from error
    return Scripted(program.eval().float()), (
        f"TorchScript: torch.jit runs this program as it is ({reason}), so only its logits are "
        "used: detectors that need the embedding or layers are left out"
    )


# --- the tensors ------------------------------------------------------------------------------


class _Object:
    """An object of the program: its class's name, and its attributes."""

    kind = ""
    path = ""

    def __init__(self, *_: Any) -> None:  # a named tuple has arguments
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise UnlistedError(f"a __setstate__ method of {self.kind}, as quantised programs have")
        self.state = state


class _Weight(NamedTuple):
    """A tensor of the file and its name, ``layer1.0.conv1.weight``."""

    tensor: Tensor
    name: str


class _Unpickler(pickle._Unpickler):  # in Python, so that no index in the file takes memory
    """Reads tensors, numbers, texts and ``_Object``s; nothing else."""

    def __init__(self, content: bytes, storages: dict[str, bytes]) -> None:
        super().__init__(io.BytesIO(content))
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole.startswith("__torch__.torch.classes"):
            raise UnlistedError(f"a C++ object ({whole.removeprefix('__torch__.')})")
        if module.startswith("__torch__"):
            return type("_Object", (_Object,), {"kind": whole})
        if whole == "torch._utils._rebuild_tensor_v2":
            return _strided
        if whole == "collections.OrderedDict":
            return OrderedDict
        if module == "torch" and name in torch.storage._dtype_to_storage_type_map().values():
            return name
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        if whole == "torch.jit._pickle.restore_type_tag":
            return _untagged
        raise UnlistedError(f"a pickled {whole}")

    def persistent_load(self, saved: Any) -> Tensor:
        _, kind, key, _, _ = saved
        dtype = torch.storage._storage_type_to_dtype_map()[kind]
        content = bytearray(self.storages[key])
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def _untagged(value: Any, kind: Any) -> Any:
    """A list or a dictionary, without the name of its type in TorchScript."""
    return value


def _strided(flat: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """Raises RuntimeError beyond the bytes of the file."""
    if min((offset, *size, *stride), default=0) < 0 or len(size) != len(stride):
        raise ValueError("a tensor of negative size")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= len(flat):
        raise ValueError("a tensor lacks bytes")
    found = torch.as_strided(flat, size, stride, offset).clone()
    return found.float() if found.is_floating_point() else found


# --- the code ---------------------------------------------------------------------------------

CONSTANT: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "add")},
    **{name: getattr(operator, name) for name in ("sub", "mul", "floordiv", "neg")},
    "__is__": operator.is_,
    "__isnot__": operator.is_not,
    "__not__": operator.not_,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__getitem__": operator.getitem,
    "len": len,
    "bool": bool,
    "int": int,
    "float": float,
}
"""What the code may do with numbers, texts and lists of them before any image is there."""


def _dtype(x: Tensor) -> torch.dtype:
    return x.dtype


def _device(x: Tensor) -> torch.device:
    return x.device


def _arange(*given: Any, **named: Any) -> Tensor:
    """With bounds that are tensors, as sizes are in a traced program."""
    bounds = [each.item() if isinstance(each, Tensor) else each for each in given]
    found: Tensor = torch.ops.aten.arange(*bounds, **named)
    return found


PYTHON: dict[str, Callable[..., Any]] = {
    "torch.__getitem__": operator.getitem,
    "torch.len": len,
    "torch.Int": int,
    "torch.ScalarImplicit": int,
    "torch.arange": _arange,
    "int": int,
    "bool": bool,
    "float": float,
    "ops.prim.NumToTensor": torch.as_tensor,
    "ops.prim.dtype": _dtype,
    "ops.prim.device": _device,
}
"""What stands for operations that exist in the interpreter of TorchScript alone."""


class _Program:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.flat = Flat()
        self.steps = 0
        self.files: dict[str, ast.Module] = {}
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            (root,) = (
                n.removesuffix("constants.pkl") for n in names if n.endswith("/constants.pkl")
            )
            for name in names:
                if name.startswith(f"{root}code/") and name.endswith(".py"):
                    module = name.removeprefix(f"{root}code/").removesuffix(".py").replace("/", ".")
                    self.files[module] = ast.parse(archive.read(name))

            def unpickled(kind: str) -> Any:
                folder = f"{root}{kind}/"
                storages = {
                    n.removeprefix(folder): archive.read(n) for n in names if n.startswith(folder)
                }
                return _Unpickler(archive.read(f"{root}{kind}.pkl"), storages).load()

            self.constants = unpickled("constants")
            self.top = unpickled("data")
        if not isinstance(self.top, _Object):
            raise ValueError("no module")

    def network(self) -> nn.Module:
        forward = self._definition(f"{self.top.kind}.forward")
        needed = len(forward.args.args) - 1 - len(forward.args.defaults)
        if needed > 1 or len(forward.args.args) < 2:
            raise UnlistedError(f"{needed} inputs")
        images = self.flat.graph.placeholder("images")
        returned = self._call(forward, [self.top, images], {})
        if isinstance(returned, dict):
            raise UnlistedError("a dictionary of outputs")
        return self.flat.network(returned)

    def _definition(self, name: str) -> ast.FunctionDef:
        """A function, or a method as ``CLASS.METHOD``, by its whole name."""
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            tree: Any = self.files.get(".".join(parts[:cut]))
            for part in parts[cut:] if tree is not None else ():
                kinds = (ast.FunctionDef, ast.ClassDef)
                found = [n for n in tree.body if isinstance(n, kinds) and n.name == part]
                if not found:
                    break
                tree = found[0]
            else:
                if isinstance(tree, ast.FunctionDef):
                    return tree
        raise UnlistedError(f"a call of {name}")

    def _call(self, function: ast.FunctionDef, given: Sequence[Any], named: dict[str, Any]) -> Any:
        names = [argument.arg for argument in function.args.args]
        defaults = function.args.defaults
        local = {n: self._value(d, {}) for n, d in zip(names[::-1], defaults[::-1], strict=False)}
        local |= dict(zip(names, given, strict=False)) | named
        return self._run(function.body, local)[1]

    def _run(self, body: Sequence[ast.stmt], local: dict[str, Any]) -> tuple[bool, Any]:
        """Whether the statements return, and what."""
        for statement in body:
            if isinstance(statement, ast.Return):
                return True, None if statement.value is None else self._value(
                    statement.value, local
                )
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                self._assign(statement.targets[0], self._value(statement.value, local), local)
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                self._assign(statement.target, self._value(statement.value, local), local)
            elif isinstance(statement, ast.Expr):
                self._value(statement.value, local)
            elif isinstance(statement, ast.If):
                done, returned = self._run(self._branch(statement, local), local)
                if done:
                    return True, returned
            elif not isinstance(statement, ast.Pass):
                raise UnlistedError(f"a statement {type(statement).__name__.lower()}")
        return False, None

    def _branch(self, statement: ast.If, local: dict[str, Any]) -> Sequence[ast.stmt]:
        """The branch that is taken: where an image decides, the one that raises no error."""
        condition = self._value(statement.test, local)
        if isinstance(condition, bool):
            return statement.body if condition else statement.orelse
        quiet = [body for body in (statement.body, statement.orelse) if not _raises(body)]
        if len(quiet) != 1:
            raise UnlistedError("a branch that depends on the image")
        return quiet[0]

    def _assign(self, target: ast.expr, value: Any, local: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            local[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            for index, part in enumerate(target.elts):
                item = self._emit(operator.getitem, value, index) if _open(value) else value[index]
                self._assign(part, item, local)
        else:
            raise UnlistedError("an attribute that it sets")

    def _value(self, node: ast.expr, local: dict[str, Any]) -> Any:
        self.steps += 1
        if self.steps > LONGEST:
            raise UnlistedError(f"over {LONGEST} expressions")
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            if node.id in ("inf", "nan"):
                return float(node.id)
            return local[node.id]
        if isinstance(node, ast.List):
            return [self._value(each, local) for each in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(self._value(each, local) for each in node.elts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self._value(node.operand, local)
        if isinstance(node, ast.Subscript):
            return self._apply("torch.__getitem__", [node.value, node.slice], {}, local)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, local)
        if isinstance(node, ast.Call):
            named = {k.arg: self._value(k.value, local) for k in node.keywords if k.arg}
            return self._apply(node.func, node.args, named, local)
        raise UnlistedError(f"an expression {ast.unparse(node)[:40]}")

    def _attribute(self, node: ast.Attribute, local: dict[str, Any]) -> Any:
        whole = ast.unparse(node)
        if whole.startswith("CONSTANTS.c"):
            return _weighed(self.constants[int(whole.removeprefix("CONSTANTS.c"))], "constant.0")
        if whole.startswith("__torch__."):
            return self._definition(whole)
        return self._member(self._value(node.value, local), node.attr)

    def _member(self, value: Any, name: str) -> Any:
        if not isinstance(value, _Object):
            raise UnlistedError(f"an attribute {name} of a tensor")
        if name == "training":
            return False
        found = value.state[name] if name in value.state else self._final(value.kind, name)
        path = f"{value.path}.{name}".lstrip(".")
        if isinstance(found, _Object):
            found.path = path
        return _weighed(found, path)

    def _final(self, kind: str, name: str) -> Any:
        """A constant of a class."""
        module, _, own = kind.rpartition(".")
        for node in self.files[module].body:
            for each in node.body if isinstance(node, ast.ClassDef) and node.name == own else ():
                if not isinstance(each, ast.AnnAssign) or each.value is None:
                    continue
                if getattr(each.target, "id", "") == name:
                    return self._value(each.value, {})
        raise UnlistedError(f"no attribute {name}")

    def _apply(
        self,
        function: ast.expr | str,
        arguments: Sequence[ast.expr],
        named: dict[str, Any],
        local: dict[str, Any],
    ) -> Any:
        name = function if isinstance(function, str) else ast.unparse(function)
        if name in ("annotate", "unchecked_cast"):
            return self._value(arguments[1], local)
        if name in ("uninitialized", "torch.format", "ops.prim.RaiseException"):
            return None  # for errors that are not raised
        if name == "isinstance":  # of a tensor or a list of them
            a_list = isinstance(self._value(arguments[0], local), list)
            return ast.unparse(arguments[1]).startswith("List") == a_list
        given = [self._value(each, local) for each in arguments]
        if name == "getattr":
            return self._member(given[0], given[1])
        if isinstance(function, ast.Name) and isinstance(local.get(name), ast.FunctionDef):
            return self._call(local[name], given, named)
        if isinstance(function, ast.Attribute) and not re.match(r"(torch|ops|__torch__)\.", name):
            value = self._value(function.value, local)
            if not isinstance(value, _Object):
                raise UnlistedError(f"a call of {name[:40]}")
            method = self._definition(f"{value.kind}.{function.attr}")
            return self._call(method, [value, *given], named)
        if name.startswith("__torch__."):
            return self._call(self._definition(name), given, named)
        return self._operation(name, given, named)

    def _operation(self, name: str, given: list[Any], named: dict[str, Any]) -> Any:
        short = name.removeprefix("torch.")
        if short in ("__is__", "__isnot__") and any(each is None for each in given):
            return CONSTANT[short](*given)  # a tensor is not None
        if short in CONSTANT and not _open([given, named]):
            if short == "mul" and any(isinstance(each, str | list | tuple) for each in given):
                raise UnlistedError("a list that it repeats")
            found = CONSTANT[short](*given)
            if (isinstance(found, int) and found.bit_length() > 64) or (
                isinstance(found, str | list | tuple) and len(found) > LONGEST
            ):
                raise UnlistedError("a number or list that is too large")
            return found
        self._check_evaluation(name, given)
        layer = _layer(short, given)
        if layer is not None:
            weights = [each for each in given if isinstance(each, _Weight)]
            label = weights[0].name.rpartition(".")[0] if weights else short
            return self.flat.add(label, layer, given[0])
        if name in PYTHON:
            return self._emit(PYTHON[name], *given, **named)
        if short in ("append", "add") and isinstance(given[0], list):
            if short == "add":
                return given[0] + given[1]
            given[0].append(given[1])
            return given[0]
        allowed = name.startswith("torch.") and "." not in short and not FORBIDDEN.search(short)
        packet = getattr(torch.ops.aten, short, None) if allowed else None
        if packet is None:
            raise UnlistedError(f"a call of {name[:40]}")
        return self._emit(packet, *given, **named)

    def _check_evaluation(self, name: str, given: list[Any]) -> None:
        """Raises CheckpointError when BatchNorm or dropout would do what they do in training."""
        place = {"torch.batch_norm": 5, "torch.dropout": 2, "torch.dropout_": 2}.get(name)
        if place is not None and given[place] is True and _of_image(given[0]):
            raise CheckpointError(
                f"{self.path} was traced in training mode ({name}): call model.eval() before "
                "torch.jit.trace"
            )

    def _emit(self, function: Callable[..., Any], *given: Any, **named: Any) -> fx.Node:
        arguments = tuple(self._node(each) for each in given)
        keywords = {name: self._node(each) for name, each in named.items()}
        return self.flat.graph.call_function(function, arguments, keywords)

    def _node(self, value: Any) -> Any:
        if isinstance(value, _Weight):
            return self.flat.constant(value.tensor)
        if isinstance(value, list | tuple):
            return type(value)(self._node(each) for each in value)
        if not isinstance(value, fx.Node | int | float | str | None):
            raise UnlistedError(f"an argument {type(value).__name__}")
        return value


def _weighed(value: Any, name: str) -> Any:
    return _Weight(value, name) if isinstance(value, Tensor) else value


def _open(value: Any) -> bool:
    """Whether a value depends on the image or on a tensor."""
    if isinstance(value, _Weight):
        return True
    if isinstance(value, dict):
        return any(map(_open, value.values()))
    return isinstance(value, fx.Node) or (
        isinstance(value, list | tuple) and any(map(_open, value))
    )


def _of_image(value: Any) -> bool:
    """Whether a value depends on the image: some networks standardise their weights by BatchNorm in
    training mode."""
    waiting, seen = [value], set[Any]()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        if node.op == "placeholder":
            return True
        seen.add(node)
        waiting += node.all_input_nodes
    return False


def _plain(value: Any) -> bool:
    """Whether a value is a tensor of the file, or numbers and texts."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return isinstance(value, Tensor | int | float | str | None)


def _raises(body: Sequence[ast.stmt]) -> bool:
    return any(
        isinstance(each, ast.Raise)
        or (isinstance(each, ast.Expr) and "prim.RaiseException" in ast.unparse(each))
        for each in body
    )


def _layer(kind: str, given: list[Any]) -> nn.Module | None:
    """The module of ``torch.nn`` for an operation whose weights are constants; None for others."""
    tensors: list[Any] = [each.tensor if isinstance(each, _Weight) else each for each in given]
    if not given or not isinstance(given[0], fx.Node):
        return None
    if kind in ("relu", "relu_"):
        return nn.ReLU(inplace=kind.endswith("_"))
    if not all(map(_plain, tensors[1:])):
        return None
    if kind == "linear":
        return linear(*tensors[1:])
    if kind == "conv2d" and not any(isinstance(each, str) for each in tensors):
        return convolution(*tensors[1:])
    if kind == "_convolution" and tensors[1].ndim == 4 and not tensors[6]:
        _, weight, bias, stride, padding, dilation, _, _, groups = tensors[:9]
        return convolution(weight, bias, stride, padding, dilation, groups)
    if kind == "batch_norm" and isinstance(tensors[3], Tensor):
        return batch_norm(None, *tensors[1:])
    return None
