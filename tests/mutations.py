"""Valid files made broken or hostile at random; the same for the same random numbers."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

HUGE = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**64 - 1)
"""What lengths are overwritten with."""

WORDS = (
    *("nan", "-inf", "1e999", "-1", "0", "9" * 5000, "1" + "0" * 12, "0x" + "f" * 20, "true"),
    *("null", "{}", "[]", "[" * 3000, "{" * 3000, '"', "'", ",", ";", "\n", "\r", "\0", "\x1b[2J"),
    *("\ufeff", "\\ud800", "=cmd()", "../../x", "/etc/passwd", "x" * 200_000, "=", ".", "\u2028"),
)
"""What stands in for words of a text."""

TEXT = (".toml", ".csv", ".jsonl", ".txt")
ZIPS = (".pt", ".pt2", ".npz", ".zip")


def mutated(content: bytes, name: str, random: Random) -> bytes:
    """The content of a file of that name with one to three things changed."""
    changes: list[Callable[[bytes, Random], bytes]] = [damaged]
    if name.endswith(TEXT):
        changes += [reworded] * 4
    elif name.endswith(ZIPS):
        changes += [rezipped] * 3
    elif name.endswith(".h5"):
        changes += [rewritten] * 3
    elif name.endswith(".safetensors"):
        changes += [reheaded] * 3
    elif name.endswith(".onnx"):
        changes += [regraphed] * 9
    for _ in range(random.choice((1, 1, 2, 3))):
        changed = random.choice(changes)(content, random)
        content = changed or content  # nothing is changed in what is too damaged for it
    return content


def damaged(content: bytes, random: Random) -> bytes:
    """Bytes changed, whatever they mean; more often near the ends, where headers are."""
    size = len(content)
    if not size:
        return content
    near = min(size, 400)
    where = random.choice(
        (random.randrange(size), random.randrange(near), size - 1 - random.randrange(near))
    )
    length = random.choice((1, 2, 4, 8, 64, size // 4 + 1))
    before, part, after = (
        content[:where],
        content[where : where + length],
        content[where + length :],
    )
    kind = random.choice(("cut", "flip", "flip", "zeros", "ones", "gone", "twice", "move", "huge"))
    if kind == "cut":
        return before
    if kind == "flip":
        flipped = bytearray(content)
        for _ in range(random.choice((1, 1, 2, 8, 32))):
            place = random.choice((where, random.randrange(size)))
            flipped[place] ^= 1 << random.randrange(8)
        return bytes(flipped)
    if kind == "huge":
        width = random.choice((2, 4, 8))
        number = random.choice(HUGE) % (1 << (8 * width))
        return (
            before
            + number.to_bytes(width, random.choice(("little", "big")))
            + content[where + width :]
        )
    if kind == "move":
        rest = before + after
        to = random.randrange(len(rest) + 1)
        return rest[:to] + part + rest[to:]
    return {
        "zeros": before + bytes(len(part)) + after,
        "ones": before + b"\xff" * len(part) + after,
        "gone": before + after,
        "twice": before + part + part + after,
    }[kind]


def reworded(content: bytes, random: Random) -> bytes:
    """A text with a word, a line or a character changed."""
    text = content.decode("utf-8", "replace")
    if not text:
        return content
    where = random.randrange(len(text))
    end = where + random.choice((0, 1, 2, 5))
    lines = text.split("\n")
    line = random.randrange(len(lines))
    kind = random.choice(("word", "word", "word", "without", "twice", "encoding"))
    if kind == "word":
        text = text[:where] + random.choice(WORDS) + text[end:]
    elif kind == "without":
        text = "\n".join(lines[:line] + lines[line + 1 :])
    elif kind == "twice":
        text = "\n".join(lines[: line + 1] + lines[line:])
    else:
        return text.encode(random.choice(("utf-16", "utf-8-sig")), "replace")
    return text.encode("utf-8", "replace")


def rezipped(content: bytes, random: Random) -> bytes:
    """An archive with one member changed, renamed or left out, and right checksums."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
    except Exception:  # damaged already
        return content
    if not members:
        return content
    which = random.randrange(len(members))
    name, member = members[which]
    kind = random.choice(("damaged", "damaged", "damaged", "name", "without", "twice"))
    if kind == "damaged":
        change = reworded if name.endswith((".json", ".py", "byteorder", "version")) else damaged
        members[which] = (name, change(member, random))
    elif kind == "name":
        hostile = ("../../out.png", "/tmp/out.png", "a\nb,c.png", "", "x" * 5000, "=cmd().png")
        members[which] = (random.choice(hostile), member)
    elif kind == "without":
        del members[which]
    else:
        members.append((name, damaged(member, random)))
    packed = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(packed, "w") as archive:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, member in members:
            info = zipfile.ZipInfo("x")  # of 1980, for the same bytes at any time
            info.filename = name
            archive.writestr(info, member)
    return packed.getvalue()


def reheaded(content: bytes, random: Random) -> bytes:
    """A safetensors file with its header changed as text or by its values, and its length right."""
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    try:
        fields = json.loads(header)
        entry = fields[random.choice(list(fields))]
        key = random.choice(list(entry))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return content
    if random.random() < 0.5:
        inner = str(entry[key]).encode()
        hostile: Any = random.choice(
            (None, "", "x", -1, 2**40, [], {}, [2**40, 2**40], [0, 2**60], [1], "[1]", '{"a": 1}')
        )
        entry[key] = random.choice((hostile, reworded(inner, random).decode("utf-8", "replace")))
        header = json.dumps(fields).encode()
    else:
        header = reworded(header, random)
    return len(header).to_bytes(8, "little") + header + rest


OPERATIONS = (
    *("Add", "Conv", "Gemm", "MatMul", "Reshape", "Expand", "Tile", "Pad", "Slice", "Gather"),
    *("Concat", "Split", "Range", "ConstantOfShape", "Resize", "Loop", "If", "Cast", "Softmax"),
    *("MaxPool", "AveragePool", "Pow", "Div", "Mod", "Transpose", "Squeeze", "Where", "Einsum"),
)
"""Of ONNX, known and unknown ones."""


def regraphed(content: bytes, random: Random) -> bytes:
    """An ONNX file with other edges, operations, attributes or constants in its graph."""
    import numpy as np
    import onnx

    try:
        model = onnx.load_from_string(content)
        graph = model.graph
        node = random.choice(graph.node)
        constant = random.choice(graph.initializer)
        kind = random.choice(
            ("edge", "edge", "operation", "attribute", "constant", "shape", "gone")
        )
        if kind == "edge":
            names = [name for each in graph.node for name in each.output]
            names += [each.name for each in graph.initializer] + ["", "images", "none"]
            ends = random.choice((node.input, node.input, node.input, node.output))
            ends[random.randrange(len(ends))] = random.choice(names)
        elif kind == "operation":
            node.op_type = random.choice(OPERATIONS)
        elif kind == "attribute":
            values: list[Any] = [random.choice(HUGE[:-1]), -1, float("nan"), float("inf"), "x"]
            values += [[random.choice(HUGE[:-1]) for _ in range(4)], [], [-1, -1], [0, 0, 0, 0]]
            names = [each.name for each in node.attribute]
            names += ["axis", "pads", "strides", "dilations", "group", "axes", "perm", "alpha"]
            added = onnx.helper.make_attribute(random.choice(names), random.choice(values))
            kept = [each for each in node.attribute if each.name != added.name]
            del node.attribute[:]
            node.attribute.extend([*kept, added])
        elif kind == "constant":
            shape = random.choice(((), (1,), (2,), (4,), tuple(constant.dims)))
            numbers = [random.choice((*HUGE[:-1], -1, -5, 2, 3)) for _ in range(4)]
            whole = np.resize(np.array(numbers, dtype=random.choice(("int64", "float32"))), shape)
            constant.CopyFrom(onnx.numpy_helper.from_array(whole, constant.name))
        elif kind == "shape":
            dims = random.choice((constant.dims, graph.input[0].type.tensor_type.shape.dim))
            place = random.randrange(len(dims))
            number = random.choice(HUGE[:-1])
            if dims is constant.dims:
                dims[place] = number
            else:
                dims[place].dim_value = number
        else:
            graph.node.remove(node)
        changed: bytes = model.SerializeToString()
        return changed
    except Exception:  # damaged already, or nothing of that kind is in it
        return content


def rewritten(content: bytes, random: Random) -> bytes:
    """An HDF5 file with a dataset or an attribute of another kind, shape or size."""
    import h5py
    import numpy as np

    stream = io.BytesIO(content)
    try:
        with h5py.File(stream, "r+") as file:
            names: list[str] = []
            file.visit(names.append)
            path = random.choice(names)
            found = file[path]
            if random.random() < 0.4:
                holder = random.choice((file, file, found))
                if len(holder.attrs):
                    _rewrite_attribute(holder, random)
                return _closed(file, stream)
            shape = getattr(found, "shape", None) or (3,)
            kind = getattr(found, "dtype", np.dtype("float32"))
            text = h5py.string_dtype("utf-8")
            other = random.choice(("int64", "float16", "complex64", "S3", ">f4", "u1", text, kind))
            large = random.choice((10**6, 10**9, 10**12, 2**40))
            shapes = (
                *((), (0,), shape[:1], (*shape, 2), (shape[0] + 1, *shape[1:]), shape, shape),
                *((large, *shape[1:]), (*shape[:1], large), (large, large // 1000)),
            )
            new = random.choice(shapes)
            del file[path]
            change = random.choice(("gone", "group", "empty", "link", *["dataset"] * 8))
            if change == "group":
                file.create_group(path)
            elif change == "empty":
                file[path] = h5py.Empty("float32")
            elif change == "link":
                file[path] = random.choice(
                    (h5py.SoftLink("/nowhere"), h5py.ExternalLink("none.h5", "/x"))
                )
            elif change == "dataset":
                big = bool(new) and max(new) >= 10**6
                packed = {"chunks": tuple(min(n, 64) for n in new)} if big else {}
                file.create_dataset(path, new, other, **packed)
            return _closed(file, stream)
    except Exception:  # damaged already, or HDF5 does not take the change
        return content


def _rewrite_attribute(holder: Any, random: Random) -> None:
    import h5py

    name = random.choice(list(holder.attrs))
    value = holder.attrs[name]
    choices: list[Any] = [0, -1, 2, 10**18, 1.5, "", "x", "x" * 30_000, b"\xff", [1.0, 2.0]]
    choices += [["a", "b"], h5py.Empty("f"), "[]", "{}", "null", "[" * 3000, "1e999"]
    if isinstance(value, str):
        choices += [reworded(value.encode(), random).decode("utf-8", "replace")] * 9
    del holder.attrs[name]
    if random.random() < 0.9:
        holder.attrs[name] = random.choice(choices)


def _closed(file: Any, stream: io.BytesIO) -> bytes:
    file.close()
    return stream.getvalue()
