"""Programs of torch.jit: the same logits and embedding as the network has, without torch.jit."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from commands import oodcli
from networks import Standardised, randomised
from torch import Tensor, nn

from oodcli.errors import CheckpointError
from oodcli.networks.card import Overrides
from oodcli.networks.load import load_classifier

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated; its files are not


class Tiny(nn.Module):
    def __init__(self, pooled: bool = True) -> None:
        super().__init__()
        self.pooled = pooled
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.avg_pool2d(x, x.shape[-1]) if self.pooled else x.amax((2, 3))
        return self.fc(self.drop(x.view(x.size(0), -1)))


class Appending(Tiny):
    """Lists of tensors, a dictionary, numbers that decide, and an input that may be left out, as
    timm's networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.made = {"from": "nothing"}
        self.rate = 0.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        maps = [self.conv(x)]
        maps.append(F.relu(self.bn(maps[0])))
        maps = maps + [maps[0].sigmoid()]  # noqa: RUF005  TorchScript has no star
        if self.rate:
            maps = maps[:1]
        if mask is not None:
            maps.append(mask)
        return self.fc(torch.cat(maps, 1).view(x.size(0), 3, 8, -1).amax((1, 3)))


class Two(Tiny):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x + y)).amax((2, 3)))


class Branching(Tiny):
    """Loops as often as the image says."""

    def forward(self, x: Tensor) -> Tensor:
        while bool(x.mean() > 1):
            x = x / 2
        return self.fc(self.bn(self.conv(x)).amax((2, 3)))


class Writing(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "written")
        return self.fc(self.bn(self.conv(x)).amax((2, 3)))


def save(network: nn.Module, path: Path, how: str = "script", side: int = 32) -> None:
    image = torch.randn(1, 3, side, side)
    torch.jit.save(
        torch.jit.script(network) if how == "script" else torch.jit.trace(network, image), path
    )


def outputs(path: Path, side: int, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Images, logits and, where there is a head, what goes into it."""
    found = load_classifier(path, Overrides(input_size=(side, side)))
    embedding: list[Tensor] = []
    if found.head_name is not None:
        found.network.get_submodule(found.head_name).register_forward_hook(
            lambda _, args, __: embedding.append(args[0])
        )
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = found.network(images)
    return images, logits, embedding[0] if embedding else torch.empty(0)


def fails(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_classifier(path, Overrides(input_size=(32, 32)))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_weights_that_are_standardised_and_positions_from_sizes(tmp_path: Path) -> None:
    network = randomised(Standardised())
    save(network, tmp_path / "net.pt", "trace")
    images, logits, _ = outputs(tmp_path / "net.pt", 32)
    with torch.no_grad():
        torch.testing.assert_close(logits, network(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("name", ["tiny", "appending", "resnet18"])
def test_logits_and_embedding(name: str, how: str, tmp_path: Path) -> None:
    side = 64 if name == "resnet18" else 32
    made = {"tiny": Tiny, "appending": Appending}.get(name, torchvision.models.resnet18)
    network = randomised(made() if name != "resnet18" else made(num_classes=10))
    embedding: list[Tensor] = []
    save(network, tmp_path / "net.pt", how, side)
    images, logits, found = outputs(tmp_path / "net.pt", side)
    handle = network.fc.register_forward_hook(lambda _, args, __: embedding.append(args[0]))
    with torch.no_grad():
        expected = network(images)
    handle.remove()
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, embedding[0], rtol=1e-4, atol=1e-4)
    classifier = load_classifier(tmp_path / "net.pt", Overrides(input_size=(side, side)))
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(classifier.batchnorms) == len(norms)
    for read, norm in zip(classifier.batchnorms.values(), norms, strict=True):
        torch.testing.assert_close(read.running_var, norm.running_var)
    assert "without modules" in " ".join(classifier.assumptions)
    with warnings.catch_warnings():  # frozen: BatchNorm is folded into the convolutions
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.freeze(torch.jit.script(network)), tmp_path / "frozen.pt")
    _, logits, found = outputs(tmp_path / "frozen.pt", side)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert len(found)


def test_a_tensor_beyond_its_bytes_is_refused(tmp_path: Path) -> None:
    """torch.jit.load would read what lies behind them in memory."""
    path = tmp_path / "net.pt"
    save(randomised(Tiny()), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            storage = "/data/" in name and len(content) > 8
            archive.writestr(name, content[:8] if storage else content)
    fails(path, "lacks bytes")


def test_a_pickled_function_is_not_called(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return (ran.touch, ())

    path = tmp_path / "net.pt"
    save(randomised(Tiny()), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            attack = name.endswith("/data.pkl")
            archive.writestr(name, pickle.dumps(Hostile(), 2) if attack else content)
    fails(path, "a pickled", "--trust-pickle")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("first", "again"),
    [
        ("x = 9", "x = torch.mul(x, x)"),
        ("x = [1, 2]", "x = torch.add(x, x)"),
        ("x = [1]", "x = torch.mul(x, 9000000000)"),
    ],
)
def test_numbers_and_lists_do_not_grow_for_ever(first: str, again: str, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    save(randomised(Tiny()), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if name.endswith(".py"):
                body = "".join(f"\\1{line}" for line in (first, *[again] * 60))
                content = re.sub(r"(?<=-> Tensor:)(\n +)", body + r"\1", content.decode()).encode()
            archive.writestr(name, content)
    fails(path, "too large" if "[1]" not in first else "repeats", "--trust-pickle")


def test_commands_read_it(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    save(randomised(Tiny()), path)
    options = ("noise:uniform?n=3", "--input-size", 32, "-d", "energy", "-d")
    result = oodcli("score", path, *options, "1c-sum")
    assert result.status == 0, result.err
    save(randomised(Branching()), path)
    result = oodcli("inspect", path, "--input-size", 32, "--trust-pickle")
    assert result.status == 0
    assert "a statement while" in result.err
    assert "only its logits" in result.err
    options = ("--trust-pickle", *options)
    assert oodcli("score", path, *options, "msp", "--precision", "bfloat16").status == 0
    result = oodcli("score", path, *options, "1c-sum")
    assert result.status == 1
    assert "no BatchNorm layer" in result.err


def test_a_program_that_cannot_be_listed_is_run_if_trusted(tmp_path: Path) -> None:
    network, path = randomised(Branching()), tmp_path / "net.pt"
    save(network, path)
    fails(path, "a statement while", "torch.jit.trace", "--trust-pickle")
    found = load_classifier(path, Overrides(input_size=(32, 32)), trust_pickle=True)
    images = torch.randn(3, 3, 32, 32) + 2
    torch.testing.assert_close(found.network(images), network(images), rtol=1e-4, atol=1e-4)
    assert found.head_name is None
    assert found.parameter_count == sum(p.numel() for p in network.parameters())


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Two().eval()), tmp_path / "net.pt")
    fails(tmp_path / "net.pt", "2 inputs", "torch.jit.trace")


def test_training_mode_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Tiny(False).train(), torch.randn(2, 3, 32, 32), check_trace=False)
    torch.jit.save(traced, tmp_path / "net.pt")
    fails(tmp_path / "net.pt", "training mode", "model.eval()")


def test_an_operation_that_writes_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(Writing().eval()), tmp_path / "net.pt")
    fails(tmp_path / "net.pt", "torch.save", "--trust-pickle")
    assert not Path("written").exists()
    load_classifier(
        tmp_path / "net.pt", Overrides(input_size=(32, 32)), trust_pickle=True
    )  # the attack works where the file is trusted
    assert Path("written").exists()


def test_methods_that_run_while_loading_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Restoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.mean((2, 3)))

        @torch.jit.export
        def __getstate__(self) -> tuple[Tensor, bool]:
            return self.fc.weight, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[Tensor, bool]) -> None:
            torch.save(state[0], "written")
            self.training = state[1]

    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(Restoring().eval()), tmp_path / "net.pt")
    fails(tmp_path / "net.pt", "__setstate__", "--trust-pickle")
    assert not Path("written").exists()


def test_damaged_programs(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    save(Tiny().eval(), path)
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        fails(path, "net.pt")
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for part, content in (
        ("constants.pkl", b"nothing"),
        ("data.pkl", b"\x80\x02."),
        (".py", b"import os"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            for name, member in members.items():
                archive.writestr(name, content if name.endswith(part) else member)
        assert any(name.endswith(part) for name in members)
        fails(path, "net.pt", "torch.jit")
