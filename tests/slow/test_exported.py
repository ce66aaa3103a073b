"""Programs of torch.export: the same outputs, head, BatchNorms and blocks as the network has."""

from __future__ import annotations

import json
import operator
import zipfile
from pathlib import Path

import pytest
import torch
from commands import oodcli
from networks import randomised
from torch import Tensor, nn
from torch._higher_order_ops import while_loop

from oodcli.errors import CheckpointError
from oodcli.networks.architectures import build
from oodcli.networks.assemble import assemble
from oodcli.networks.card import read_card, write_card
from oodcli.networks.load import load_classifier
from oodcli.networks.preprocessing import Preprocessing
from oodcli.networks.program import _computes, _plain

PREPROCESSING = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3)


class Attention(nn.Module):
    """Tokens, a class token and attention: batch sizes inside lists of sizes everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.layers = nn.Sequential(layer, nn.LayerNorm(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).reshape(x.shape[0], 8, 4).permute(0, 2, 1)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.layers(x)[:, 0])


def save(network: nn.Module, path: Path, batch: int, dynamic: bool = False, side: int = 32) -> None:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    image = torch.randn(batch, 3, side, side)
    torch.export.save(torch.export.export(network, (image,), dynamic_shapes=shapes), path)


@pytest.mark.parametrize(("batch", "dynamic"), [(1, False), (2, False), (3, False), (2, True)])
@pytest.mark.parametrize("name", ["resnet8-cifar-w8", "densenet-bc-10-4", "attention"])
def test_a_program_is_an_ordinary_network(
    name: str, batch: int, dynamic: bool, tmp_path: Path
) -> None:
    network = randomised(Attention() if name == "attention" else build(name, 4))
    save(network, tmp_path / "net.pt2", batch, dynamic)
    found = load_classifier(tmp_path / "net.pt2")
    plain = assemble(network, arch="plain", preprocessing=PREPROCESSING)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=generator).requires_grad_()
    logits = found.network(images)
    torch.testing.assert_close(logits, network(images), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), images)  # ODIN and MGI need one
    assert gradient.abs().sum() > 0
    assert found.preprocessing.input_size == (32, 32)
    assert any("--input-size" in note for note in found.assumptions)
    assert (found.head_name, found.num_classes) == (plain.head_name, 4)
    assert found.head is not None
    assert plain.head is not None
    torch.testing.assert_close(found.head.weight, plain.head.weight)
    assert found.batchnorms.keys() == plain.batchnorms.keys()
    for key, norm in plain.batchnorms.items():
        assert norm.running_var is not None
        torch.testing.assert_close(found.batchnorms[key].running_var, norm.running_var)
        assert found.batchnorms[key].eps == norm.eps
    if name != "attention":  # whose layer is one module, fused by torch outside an export
        assert found.taps == plain.taps


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_program_is_recorded_and_inverted(dynamic: bool, tmp_path: Path) -> None:
    """Both copy it."""
    network = randomised(build("resnet8-cifar-w8", 4))
    save(network, tmp_path / "net.pt2", 2, dynamic=dynamic)
    for words in (
        ("score", "noise:uniform?n=3", "-d", "all", "--explain"),
        ("score", "noise:uniform?n=3", "-d", "energy", "--precision", "bfloat16"),
        ("invert", "--per-class", 1, "--steps", 1, "-o", tmp_path / "v.h5"),
    ):
        result = oodcli(words[0], tmp_path / "net.pt2", *words[1:])
        assert result.status == 0, result.err
        assert "Warning" not in result.err


def test_a_card_beside_a_program(tmp_path: Path) -> None:
    save(randomised(build("resnet8-cifar-w8", 4)), tmp_path / "net.pt2", 2)
    (tmp_path / "net.toml").write_text("mean = [0, 0, 0]\nclass_names = ['a', 'b', 'c', 'd']\n")
    found = load_classifier(tmp_path / "net.pt2")
    assert found.class_names == ("a", "b", "c", "d")
    write_card(found, tmp_path / "full.toml")
    assert read_card(tmp_path / "full.toml")["mean"] == (0.0, 0.0, 0.0)
    assert "arch" not in read_card(tmp_path / "full.toml")


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_classifier(path)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_training_mode_is_refused(tmp_path: Path) -> None:
    save(build("resnet8-cifar-w8", 4).train(), tmp_path / "net.pt2", 2)
    refused(tmp_path / "net.pt2", "training mode", "model.eval()")
    dropout = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3072, 4)).train()
    save(dropout, tmp_path / "net.pt2", 2)
    refused(tmp_path / "net.pt2", "training mode", "model.eval()")


class Mixing(nn.Module):
    """What one image gives depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3072, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) - self.fc(x.flatten(1)).mean(0)


class Unrolled(nn.Module):
    """One head an image: nothing can make this work on another batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3072, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.flatten(1).unbind(0)
        return torch.stack([self.fc(first), self.fc(second)])


@pytest.mark.parametrize("network", [Mixing(), Unrolled()])
def test_what_works_on_its_own_batch_size_only(network: nn.Module, tmp_path: Path) -> None:
    save(network.eval(), tmp_path / "net.pt2", 2)
    refused(tmp_path / "net.pt2", "batch", "dynamic_shapes")


def test_what_is_no_image_classifier(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    program = torch.export.export(nn.Linear(3, 2).eval(), (torch.randn(2, 3),))
    torch.export.save(program, path)
    refused(path, "(N, C, H, W)")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"nothing", whole[:50]):
        path.write_bytes(content)
        refused(path, "export it again")


# --- a program is code --------------------------------------------------------------------------


def rewritten(path: Path, change: dict[str, bytes]) -> None:
    """The archive with some members replaced or added, by the end of their name."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(members)).split("/")[0]
    members |= {f"{root}/{name}": content for name, content in change.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def model(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        return archive.read(name).decode()


def test_a_program_that_does_more_than_compute_is_refused(tmp_path: Path) -> None:
    path, ran = tmp_path / "net.pt2", tmp_path / "ran"
    network = randomised(build("resnet8-cifar-w8", 4))

    save(network, path, 2, dynamic=True)
    text = model(path)
    assert "Symbol('" in text  # the expression that torch has sympy evaluate
    graph = json.loads(text)
    attack = f"__import__('pathlib').Path({str(ran)!r}).touch()"

    def poison(item: object) -> None:
        if isinstance(item, dict):
            for key, value in item.items():
                if key == "expr_str":
                    item[key] = attack
                else:
                    poison(value)
        elif isinstance(item, list):
            for value in item:
                poison(value)

    poison(graph)
    rewritten(path, {"models/model.json": json.dumps(graph).encode()})
    refused(path, "expression", "--trust-pickle")

    save(network, path, 2)
    rewritten(
        path,
        {
            "models/model.json": model(path)
            .replace("torch.ops.aten.relu.default", "torch.os.system")
            .encode()
        },
    )
    refused(path, "net.pt2")

    save(network, path, 2)
    rewritten(path, {"data/aotinductor/model/net.so": b"\x7fELF"})
    refused(path, "compiled library")

    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return (ran.touch, ())

    save(network, path, 2)
    torch.save(Hostile(), tmp_path / "inputs.pt")
    rewritten(path, {"data/sample_inputs/model.pt": (tmp_path / "inputs.pt").read_bytes()})
    refused(path, "net.pt2")
    assert not ran.exists()


class Endless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        (x,) = while_loop(lambda x: x.sum() < torch.inf, lambda x: (x.sin(),), (x,))
        return x.flatten(1)[:, :4]


def test_a_program_with_a_loop_is_refused(tmp_path: Path) -> None:
    save(Endless(), tmp_path / "net.pt2", 3)
    refused(tmp_path / "net.pt2", "while_loop", "--trust-pickle")


def test_expressions_of_sizes_are_told_from_code() -> None:
    for text in ("s77", "2*s0 + 1", "Mul(Integer(4), Symbol('s77', positive=True, integer=True))"):
        assert _plain(text)
    for text in (
        "__import__('os')",
        "().__class__",
        "Symbol('a b')",
        "eval('s0')",
        "S('s0')",
        "[x for x in s0]",
        "lambda: 0",
        "Symbol('s').name",
        "",
    ):
        assert not _plain(text)


def test_operations_are_told_from_other_functions() -> None:
    graph = torch.fx.Graph()
    for target in (torch.ops.aten.relu.default, operator.mul, operator.getitem):
        assert _computes(graph.call_function(target))
    for target in (torch.ops.aten.from_file.default, torch.load, operator.methodcaller, print):
        assert not _computes(graph.call_function(target))
    assert not _computes(graph.call_method("numpy"))
