"""Checkpoint files of every kind, the model card, and what is refused."""

from __future__ import annotations

import json
import struct
import sys
import tomllib
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from networks import randomised, rekeyed
from optional import one_in
from safetensors.torch import save_file
from torch import Tensor, nn

from oodcli.errors import CheckpointError
from oodcli.files.hashes import file_sha256
from oodcli.networks.architectures import CIFAR_MEAN, CIFAR_STD, PROBED, build
from oodcli.networks.card import Overrides, read_card, write_card
from oodcli.networks.load import load_classifier
from oodcli.networks.preprocessing import Preprocessing, Resize

NAME = "resnet8-cifar-w8"


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return randomised(build(NAME, 10))


@pytest.fixture(scope="module")
def state(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.state_dict())


def same(path: Path, network: nn.Module, **settings: Any) -> Any:
    """The classifier in a file, whose network does what the given one does."""
    found = load_classifier(path, **settings)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(found.network(images), network(images), rtol=1e-4, atol=1e-5)
    return found


def fails(path: Path, *words: str, overrides: Overrides | None = None, **settings: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load_classifier(path, overrides or Overrides(), **settings)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


# --- containers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin", ".ckpt", ".odd"])
def test_suffixes(
    suffix: str, tmp_path: Path, state: dict[str, Tensor], network: nn.Module
) -> None:
    path = tmp_path / f"net{suffix}"
    torch.save(state, path)
    found = same(path, network)
    assert (found.arch, found.num_classes, found.head_name) == (NAME, 10, "linear")
    assert found.sha256 == file_sha256(path)
    assert len(found.sha256) == 64


def test_legacy_format_and_safetensors(
    tmp_path: Path, state: dict[str, Tensor], network: nn.Module
) -> None:
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    same(tmp_path / "old.pt", network)
    save_file(state, tmp_path / "net.safetensors")
    same(tmp_path / "net.safetensors", network)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3, "best": torch.tensor(0.5), "args": Namespace(lr=1)},
        lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}},
        lambda s: {"model_state_dict": s, "mean": torch.zeros(3)},
        lambda s: {"net": s, "acc": 93.1},
        lambda s: {"ema": s},
        lambda s: {"model": {"state_dict": s}, "epoch": 1},
        lambda s: {"model": "resnet", "state_dict": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module.model._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {"state_dict": {f"net.backbone.{k}": v for k, v in s.items()}},
        lambda s: {f"anything.{k}": v for k, v in s.items()},
        lambda s: {"n_averaged": torch.tensor(5)} | {f"module.{k}": v for k, v in s.items()},
        lambda s: {"criterion.weight": torch.ones(10)} | {f"model.{k}": v for k, v in s.items()},
        lambda s: {"metric.total": torch.ones(3)} | {f"model.{k}": v for k, v in s.items()},
        lambda s: {(k if k.startswith("linear") else f"backbone.{k}"): v for k, v in s.items()},
        lambda s: rekeyed(s),
        lambda s: {k: v.half() for k, v in s.items()},
    ],
)
def test_wrappers_and_prefixes(
    wrap: Any, tmp_path: Path, state: dict[str, Tensor], network: nn.Module
) -> None:
    path = tmp_path / "net.pt"
    content = wrap(state)
    torch.save(content, path)
    found = load_classifier(path)
    assert found.arch == NAME
    half = isinstance(content, Mapping) and content.get("conv1.weight", torch.zeros(1)).dtype
    for key, tensor in found.network.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert tensor.dtype == torch.float32
            close = {"rtol": 1e-2, "atol": 1e-2} if half == torch.float16 else {}
            torch.testing.assert_close(tensor, state[key], **close)


def test_keys_that_are_left_out_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"criterion.weight": torch.ones(10), **state}, tmp_path / "net.pt")
    assert any(
        "criterion.weight" in note for note in load_classifier(tmp_path / "net.pt").assumptions
    )


@pytest.mark.parametrize("prefixed", [False, True])
def test_averaged_weights(prefixed: bool, tmp_path: Path, state: dict[str, Tensor]) -> None:
    averaged = {
        key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in state.items()
    }
    content: dict[str, Any] = {"model": state, "model_ema": averaged}
    if prefixed:
        content = {f"model.{k}": v for k, v in state.items()}
        content |= {f"ema_model.module.{k}": v for k, v in averaged.items()}
    torch.save(content, tmp_path / "net.pt")
    plain = load_classifier(tmp_path / "net.pt")
    ema = load_classifier(tmp_path / "net.pt", prefer_ema=True)
    torch.testing.assert_close(plain.network.state_dict()["linear.bias"], state["linear.bias"])
    torch.testing.assert_close(ema.network.state_dict()["linear.bias"], averaged["linear.bias"])
    assert any("--ema" in note for note in plain.assumptions)
    torch.save(state, tmp_path / "net.pt")
    absent = load_classifier(tmp_path / "net.pt", prefer_ema=True)
    assert any("no averaged" in note for note in absent.assumptions)


# --- what is refused ----------------------------------------------------------------------------


class Net(nn.Sequential):
    """A module of this file, to be pickled."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 30 * 30, 4))


class Settings:
    """Hyper-parameters as an object."""


def test_a_pickled_module_needs_trust(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    module = Net()
    torch.save({"model": module, "epoch": 2}, path)
    fails(path, "pickled", "run", "--trust-pickle", "state_dict()")
    found = same(path, module, trust_pickle=True)
    assert (found.arch, found.num_classes, found.head_name) == ("Net", 4, "3")
    assert found.preprocessing.input_size == (32, 32)
    torch.save(nn.DataParallel(module), path)
    assert same(path, module, trust_pickle=True).arch == "Net"
    write_card(found, tmp_path / "net.toml")
    assert "arch" not in read_card(tmp_path / "net.toml")  # --arch would not take it


def test_pickled_hyperparameters_are_not_unpickled(
    tmp_path: Path, state: dict[str, Tensor], network: nn.Module
) -> None:
    path = tmp_path / "last.ckpt"  # as Lightning writes it
    content = {
        "state_dict": {f"net.{k}": v for k, v in state.items()},
        "hyper_parameters": Settings(),
    }
    torch.save(content, path)
    same(path, network)
    same(path, network, trust_pickle=True)


def test_trusted_pickle_without_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pt"
    module = type(sys)("gone_away")
    module.Settings = type("Settings", (), {"__module__": "gone_away"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gone_away", module)
    torch.save({"state_dict": module.Settings()}, path)
    monkeypatch.delitem(sys.modules, "gone_away")
    fails(path, "gone_away", "PYTHONPATH", trust_pickle=True)


def test_a_hostile_pickle_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").touch, ())

    for legacy in (False, True):
        torch.save(
            {"state_dict": Hostile()},
            tmp_path / "net.pt",
            _use_new_zipfile_serialization=not legacy,
        )
        fails(tmp_path / "net.pt", "--trust-pickle")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoint(tmp_path: Path, state: dict[str, Tensor]) -> None:
    fails(tmp_path, "is a folder")
    fails(tmp_path / "none.pt", "does not exist")
    path = tmp_path / "net.pt"
    path.touch()
    fails(path, "is empty")
    for text in ("not a checkpoint", "hello"):  # the second is an opcode of no pickle
        path.write_text(text)
        fails(path, "net.pt", "damaged (no pickle)")
    np.savez(tmp_path / "data.npz", images=np.zeros(3))
    fails(tmp_path / "data.npz", "data.npz")
    torch.save(state, path)
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 30, 100):
        path.write_bytes(whole[:length])
        fails(path, "net.pt", "damaged")
    torch.save(torch.zeros(3), path)
    fails(path, "Tensor", "state_dict()")
    torch.save({"optimizer": {"state": {}, "param_groups": []}, "epoch": 1}, path)
    fails(path, "optimizer", "state_dict()")
    torch.save({"epoch": 1, "loss": torch.tensor(1.0)}, path)
    fails(path, "epoch, loss")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 90_000_000) + b"{}",
        b"\x00" * 8,
        struct.pack("<Q", 3) + b"{}",
        (lambda header: struct.pack("<Q", len(header)) + header)(
            json.dumps(
                {"a": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}
            ).encode()
        ),
    ],
)
def test_hostile_safetensors_headers(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_bytes(content)
    fails(tmp_path / "net.safetensors", "safetensors")


def test_values_that_no_trained_network_has(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "net.pt"
    torch.save({**state, "layer1.0.conv1.weight": state["layer1.0.conv1.weight"] * np.nan}, path)
    fails(path, "layer1.0.conv1.weight is not finite")
    torch.save({**state, "bn1.running_var": -state["bn1.running_var"]}, path)
    fails(path, "bn1.running_var is negative")
    torch.save({**state, "conv1.weight": state["conv1.weight"].to(torch.int8)}, path)
    fails(path, "conv1.weight is of type int8", "quantised")


@pytest.mark.slow
def test_what_does_not_fit(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "net.pt"
    torch.save(state, path)
    fails(path, "10 classes", "7 were given", overrides=Overrides(num_classes=7))
    fails(path, "10 classes", "7 were given", overrides=Overrides(arch=NAME, num_classes=7))
    fails(
        path,
        "resnet20-cifar",
        "conv1.weight is 8x3x3x3, expected 16x3x3x3",
        overrides=Overrides(arch="resnet20-cifar"),
    )
    fails(path, "did you mean", overrides=Overrides(arch="resnet20-cifer"))
    fails(path, "3 class names", overrides=Overrides(class_names=("a", "b", "c")))
    fails(path, "--device", overrides=Overrides(), device="nonsense")
    torch.save({**state, "layer1.0.conv1.weight": torch.zeros(8, 8, 5, 5)}, path)
    fails(path, "not recognised", "nearest", "FILE.py:FACTORY", "--arch")
    torch.save({"a.weight": torch.zeros(3, 3)}, path)
    fails(path, "a.weight", "FILE.py:FACTORY")


# --- --arch and assumptions ---------------------------------------------------------------------


def test_what_was_assumed_is_said_and_what_was_given_is_not(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    path = tmp_path / "net.pt"
    torch.save(state, path)
    notes = " ".join(load_classifier(path).assumptions)
    for option in ("--arch", "--mean --std", "--input-size"):
        assert f"(override: {option})" in notes
    assert "0.4914 0.4822 0.4465" in notes
    given = Overrides(
        arch=NAME, input_size=(40, 36), mean=(0.1, 0.2, 0.3), std=(0.1, 0.2, 1.0), num_classes=10
    )
    found = load_classifier(path, given)
    assert found.assumptions == ()
    assert found.preprocessing.input_size == (40, 36)
    assert (found.preprocessing.mean, found.preprocessing.std) == (given.mean, given.std)


def test_torchvision_weights_bring_their_own_preprocessing_and_names(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(randomised(build("torchvision:shufflenet_v2_x0_5", 1000)).state_dict(), path)
    found = load_classifier(path)
    assert found.arch == "torchvision:shufflenet_v2_x0_5"
    assert (found.preprocessing.input_size, found.preprocessing.resize) == ((224, 224), 256)
    assert found.class_names[:2] == ("tench", "goldfish")
    assert any("--class-names" in note for note in found.assumptions)
    # the same size keeps the weights' resize, another one scales it
    weights = "of torchvision's weights IMAGENET1K_V1"
    for side, resize, words in ((224, 256, ""), (64, 73, "as 256 for an input of 224x224, ")):
        other = load_classifier(path, Overrides(input_size=(side, side)))
        assert other.preprocessing == replace(
            found.preprocessing, input_size=(side, side), resize=resize
        )
        assert (
            f"shorter side to {resize}, centre crop, bilinear, {words}{weights} "
            "(override: --resize --interpolation)"
        ) in other.assumptions
    wide = load_classifier(path, Overrides(input_size=(112, 448))).preprocessing
    assert wide.resize == 512


def prepared(path: Path, **given: Any) -> Preprocessing:
    """The preprocessing of a checkpoint, of what was given and of its card."""
    return load_classifier(path, Overrides(**given)).preprocessing


@pytest.fixture(scope="module")
def shufflenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose weights resize the shorter side to 256 and crop 224x224."""
    path = tmp_path_factory.mktemp("shufflenet") / "net.pt"
    torch.save(torchvision.models.shufflenet_v2_x0_5(num_classes=4).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("card", "given", "size", "resize"),
    one_in(
        3,
        [
            ("", {}, (224, 224), 256),
            ("", {"resize": 300}, (224, 224), 300),
            ("", {"resize": (256, 256)}, (224, 224), (256, 256)),
            ("", {"resize": (256, 256), "crop": "center"}, (224, 224), (256, 256)),
            ("", {"resize": (224, 224)}, (224, 224), None),
            ("", {"crop": "squash"}, (224, 224), (256, 256)),
            ("", {"crop": "center"}, (224, 224), 256),
            ("", {"crop": "squash", "resize": 224}, (224, 224), None),
            ("", {"crop": "squash", "input_size": (64, 128)}, (64, 128), (146, 292)),
            ("", {"crop": "squash", "input_size": (64, 128), "resize": 70}, (64, 128), (70, 140)),
            ("", {"input_size": (288, 288)}, (288, 288), 329),
            ("", {"input_size": (288, 288), "resize": 288}, (288, 288), 288),
            # a card without a resize means: straight to its input size
            ("input_size = [96, 96]", {}, (96, 96), None),
            ("input_size = [96, 96]", {"input_size": (128, 128)}, (128, 128), None),
            ("input_size = [96, 96]", {"crop": "squash"}, (96, 96), None),
            ("input_size = [96, 96]", {"crop": "center"}, (96, 96), 96),
            ("input_size = [96, 64]\ncrop = 'center'", {}, (96, 64), 96),
            ("resize = [256, 256]", {}, (224, 224), (256, 256)),
            ("resize = [256, 256]\ncrop = 'center'", {}, (224, 224), (256, 256)),
            ("resize = [256, 256]", {"crop": "center"}, (224, 224), 256),
            ("resize = [256, 128]", {"input_size": (448, 112)}, (448, 112), (512, 64)),
            ("resize = 240\ncrop = 'squash'", {}, (224, 224), (240, 240)),
            ("resize = 240\ninput_size = [224, 224]", {"input_size": (112, 112)}, (112, 112), 120),
        ],
    ),
)
def test_resize_and_crop(
    card: str,
    given: Mapping[str, Any],
    size: tuple[int, int],
    resize: Resize,
    shufflenet: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "card.toml").write_text(card)
    found = prepared(shufflenet, card=tmp_path / "card.toml", **given)
    assert (found.input_size, found.resize) == (size, resize)
    written = tmp_path / "written.toml"
    all_given = Overrides(card=tmp_path / "card.toml", **given)
    write_card(load_classifier(shufflenet, all_given), written)
    assert prepared(shufflenet, card=written) == found


def test_a_black_border_is_said(shufflenet: Path) -> None:
    for resize in (223, (300, 223)):
        notes = load_classifier(shufflenet, Overrides(resize=resize)).assumptions
        assert any("smaller than 224x224 after the resize get a black border" in n for n in notes)
    assert "border" not in " ".join(load_classifier(shufflenet).assumptions)


def test_how_images_are_read_and_resized(shufflenet: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.toml"
    card.write_text("exif = 'keep'\nimage_range = [0, 4095]\ninterpolation = 'box'\n")
    found = prepared(shufflenet, card=card)
    assert (found.exif, found.image_range, found.interpolation) == ("keep", (0.0, 4095.0), "box")
    other = prepared(
        shufflenet, card=card, exif="turn", image_range=(-1.0, 1.0), interpolation="lanczos"
    )
    assert (other.exif, other.image_range, other.interpolation) == ("turn", (-1.0, 1.0), "lanczos")
    for preprocessing in (found, other):
        assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == (
            preprocessing
        )
    plain = prepared(shufflenet)
    assert (plain.exif, plain.image_range) == ("turn", None)
    older = {k: v for k, v in plain.to_dict().items() if k not in ("exif", "image_range")}
    assert plain.unlike(Preprocessing.from_dict(older)) is None
    assert plain.unlike(found) == ("interpolation bilinear", "interpolation box")
    for given, word in (
        ({"crop": "centre"}, "crop 'centre' is not one of center, squash"),
        ({"exif": "drop"}, "exif 'drop' is not one of turn, keep"),
        ({"interpolation": "area"}, "interpolation 'area' is not one of"),
        ({"image_range": (1.0, 1.0)}, "the first below the second"),
        ({"image_range": (0.0, float("nan"))}, "the first below the second"),
        ({"resize": 0}, "positive"),
        ({"resize": (1 << 20, 3)}, "more than"),
    ):
        fails(shufflenet, word, overrides=Overrides(**given))


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        (
            (123.675, 116.28, 103.53),
            (58.395, 57.12, 57.375),
            "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
        ),
        ((104.0, 117.0, 123.0), (1.0, 1.0, 1.0), "--mean 0.407843,0.458824,0.482353 --std 0.00392"),
        ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0), "--mean 0,0,0 --std 1,1,1"),
        ((127.5,), (0.5,), "--mean 0.5 --std 0.5"),
        ((-2.0,), (0.5,), "--mean -0.00784314 --std 0.5"),
    ],
)
def test_statistics_of_pixels_in_0_to_255_are_refused(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    words: str,
    tmp_path: Path,
    state: dict[str, Tensor],
) -> None:
    path = tmp_path / "net.pt"
    torch.save(state, path)
    assert "in 0…255" in fails(path, words, overrides=Overrides(mean=mean, std=std))
    (tmp_path / "net.toml").write_text(f"mean = {list(mean)}\nstd = {list(std)}\n")
    fails(path, words)
    # a file of an earlier run stays readable
    old = {"input_size": [8, 8], "mean": mean, "std": std, "resize": None}
    assert Preprocessing.from_dict(old).mean == mean


def test_statistics_of_pixels_in_0_to_1(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "net.pt")
    for mean, std in ((0.0, 1 / 255), (1.0, 1.0), (-1.0, 0.5), (0.0, 1.0)):
        found = prepared(tmp_path / "net.pt", mean=(mean,) * 3, std=(std,) * 3)
        assert (found.mean, found.std) == ((mean,) * 3, (std,) * 3)


CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def test_100_classes_of_a_small_network_are_cifar_100s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(5, num_classes))\n"
    )
    sys.path.insert(0, str(tmp_path))
    import mine

    sys.path.pop(0)
    for classes in (10, 100):
        torch.save(build(NAME, classes).state_dict(), "recognised.pt")
        torch.save(mine.net(classes).state_dict(), "factory.pt")
        torch.save(mine.net(classes), "pickled.pt")
        torch.export.save(
            torch.export.export(mine.net(classes).eval(), (torch.zeros(2, 3, 32, 32),)), "x.pt2"
        )
        grouped = build(NAME, classes + 2)
        slices = torch.tensor([[0, classes // 2 + 1], [classes // 2 + 1, classes + 2]])
        torch.save({**grouped.state_dict(), "group_slices": slices}, "mos.pt")
        for name, given, settings in (
            ("recognised.pt", {}, {}),
            ("recognised.pt", {"arch": NAME}, {}),
            ("factory.pt", {"arch": "mine.py:net"}, {}),
            ("pickled.pt", {}, {"trust_pickle": True}),
            ("x.pt2", {}, {"trust_pickle": True}),
            ("mos.pt", {}, {}),
        ):
            found = load_classifier(Path(name), Overrides(**given), **settings)
            assert found.num_classes == classes, name
            notes = " ".join(found.assumptions)
            prep = found.preprocessing
            if classes == 100:
                assert (prep.mean, prep.std) == CIFAR100, name
                assert "normalisation: CIFAR-100's mean 0.5071 0.4865 0.4409" in notes, name
            else:
                assert (prep.mean, prep.std) == (CIFAR_MEAN, CIFAR_STD), name
                assert "normalisation: CIFAR-10's mean" in notes, name
    torch.save(build(NAME + "+grey", 100).state_dict(), "grey.pt")
    assert prepared(Path("grey.pt")).mean == (0.5,)
    given = load_classifier(Path("recognised.pt"), Overrides(mean=(0.5,) * 3))
    assert (given.preprocessing.mean, given.preprocessing.std) == ((0.5,) * 3, CIFAR100[1])


def test_a_network_that_asks_for_the_version_of_its_layout(tmp_path: Path) -> None:
    network = torchvision.models.mnasnet0_5(num_classes=3)
    torch.save(network.state_dict(), tmp_path / "net.pt")
    found = load_classifier(tmp_path / "net.pt", Overrides(input_size=(32, 32)))
    assert found.arch == "torchvision:mnasnet0_5"
    torch.testing.assert_close(dict(found.network.state_dict()), dict(network.state_dict()))


def test_inception_says_what_it_does_with_its_input(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(randomised(build("torchvision:googlenet", 7)).state_dict(), path)
    found = load_classifier(path, Overrides(input_size=(64, 64)))
    assert not found.network.transform_input
    assert any("+transform-input" in note for note in found.assumptions)
    assert found.class_names == tuple("0123456")
    arch = "torchvision:googlenet+transform-input"
    found = load_classifier(path, Overrides(arch=arch, input_size=(64, 64)))
    assert found.network.transform_input


def test_grey_networks(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(randomised(build("resnet8-cifar+grey", 10)).state_dict(), path)
    found = load_classifier(path)
    assert found.arch == "resnet8-cifar+grey"
    assert (found.preprocessing.mean, found.preprocessing.std) == ((0.5,), (0.5,))
    assert any("0.5" in note and "--mean" in note for note in found.assumptions)


def test_a_factory_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import torch.nn as nn\n"
        "from width import WIDTH\n"
        "def net(num_classes=1000):\n"
        "    print(num_classes)\n"
        "    return nn.Sequential(nn.Conv2d(3, WIDTH, 7, 2), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(WIDTH, num_classes))\n"
        "def fixed(): return net(6)\n"
        "def broken(): return 1 / 0\n"
        "text = 'no function'\n"
    )
    Path("width.py").write_text("WIDTH = 5\n")
    path = Path("net.pt")
    module = nn.Sequential(
        nn.Conv2d(3, 5, 7, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 6)
    )
    torch.save({f"module.{key}": tensor for key, tensor in module.state_dict().items()}, path)
    for factory in ("net", "fixed"):
        found = same(path, module, overrides=Overrides(arch=f"mine.py:{factory}"))
        built = capsys.readouterr().out.split()  # for its shapes, and with the checkpoint's classes
        assert built == [str(PROBED) if factory == "net" else "6", "6"]
        assert (found.num_classes, found.head_name) == (6, "3")
        assert found.preprocessing.input_size == (224, 224)
    fails(path, "6 classes", "7 were", overrides=Overrides(arch="mine.py:net", num_classes=7))
    fails(path, "ZeroDivisionError", overrides=Overrides(arch="mine.py:broken"))
    fails(path, "'other'", overrides=Overrides(arch="mine.py:other"))
    fails(path, "'text'", overrides=Overrides(arch="mine.py:text"))
    fails(path, "no file", overrides=Overrides(arch="yours.py:net"))
    Path("bad.py").write_text("import no_such_module_anywhere\n")
    fails(path, "no_such_module_anywhere", overrides=Overrides(arch="bad.py:net"))


def test_timm_is_optional(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(state, tmp_path / "net.pt")
    monkeypatch.setitem(sys.modules, "timm", None)
    fails(tmp_path / "net.pt", "oodcli[timm]", overrides=Overrides(arch="timm:resnet18"))


def test_timm_where_it_is_installed(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet18", num_classes=5)
    torch.save(network.state_dict(), tmp_path / "net.pt")
    given = Overrides(arch="timm:resnet18", input_size=(64, 64))
    found = load_classifier(tmp_path / "net.pt", given)
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(found.network(image), network.eval()(image))


# --- model card ---------------------------------------------------------------------------------

CARD = """
arch = "resnet8-cifar-w8"
num_classes = 10
class_names = ["é", "b\\"", "c\\\\", "d\\n", "e", "f", "g", "h", "i", "\\u007f"]
input_size = [32, 30]
mean = [0.1, 0, 0.3]
std = [1, 0.25, 0.3]
resize = 40
interpolation = "bicubic"
"""


def test_the_card_wins_over_recognition_and_loses_to_the_command_line(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    path = tmp_path / "net.pt"
    torch.save(state, path)
    (tmp_path / "net.toml").write_text(CARD, "utf-8")
    found = load_classifier(path)
    prep = found.preprocessing
    assert (prep.input_size, prep.resize, prep.interpolation) == ((32, 30), 40, "bicubic")
    assert (prep.mean, prep.std) == ((0.1, 0.0, 0.3), (1.0, 0.25, 0.3))
    assert found.class_names[:4] == ("é", 'b"', "c\\", "d\n")
    assert found.assumptions == ()
    found = load_classifier(path, Overrides(mean=(0.0, 0.0, 0.0), input_size=(32, 32)))
    assert found.preprocessing.mean == (0.0, 0.0, 0.0)
    assert found.preprocessing.resize == 40
    assert found.assumptions == (
        "shorter side to 40, centre crop, as 40 for an input of 32x30, the model card's "
        "(override: --resize)",
    )
    other = tmp_path / "other.toml"
    other.write_text("std = [1, 1, 1]\n")
    assert load_classifier(path, Overrides(card=other)).preprocessing.std == (1.0, 1.0, 1.0)


def test_a_written_card_gives_the_same_classifier(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "net.pt"
    torch.save(state, path)
    (tmp_path / "card.toml").write_text(CARD, "utf-8")
    for overrides in (Overrides(card=tmp_path / "card.toml"), Overrides()):
        found = load_classifier(path, overrides)
        write_card(found, tmp_path / "net.toml")
        assert set(tomllib.loads((tmp_path / "net.toml").read_text("utf-8"))) >= {"arch", "mean"}
        again = load_classifier(path)
        assert again.preprocessing == found.preprocessing
        assert (again.arch, again.class_names) == (found.arch, found.class_names)
        assert again.assumptions == ()
        (tmp_path / "net.toml").unlink()


def test_numbers_that_are_none(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "net.pt")
    inf, nan = float("inf"), float("nan")
    fails(tmp_path / "net.pt", "finite", overrides=Overrides(mean=(nan, 0, 0)))
    fails(tmp_path / "net.pt", "finite", overrides=Overrides(std=(1, inf, 1)))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("colour = 3", "'colour' is not a key"),
        ("mean = 0.5", "mean must be"),
        ("mean = ['a']", "mean must be"),
        ("mean = [nan]", "mean must be"),
        ("input_size = [32]", "input_size must be"),
        ("input_size = [32, 0]", "input_size must be"),
        ("num_classes = true", "num_classes must be"),
        ("num_classes = 2\nclass_names = ['a']", "num_classes = 2"),
        ("arch = resnet", "TOML"),
        ("std = [1, 0, 1]", "positive"),
        ("mean = [1, 2]\nstd = [1, 2]", "mean has 2"),
        ("interpolation = 'cubic'", "'cubic'"),
        ("resize = [8]", "resize must be a positive integer, or [height, width]"),
        ("resize = [8, 0]", "resize must be"),
        ("image_range = [1, 2, 3]", "image_range must be [low, high]"),
        ("image_range = 4095", "image_range must be"),
        ("image_range = [2, 1]", "the first below the second"),
        ("exif = 'none'", "'none' is not one of turn, keep"),
        ("crop = 'border'", "'border' is not one of center, squash"),
        ("num_classes = 3", "10 classes"),
    ],
)
def test_faulty_cards(text: str, word: str, tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "net.pt")
    (tmp_path / "net.toml").write_text(text)
    fails(tmp_path / "net.pt", word)


def test_a_card_that_was_named_must_exist(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "net.pt")
    fails(tmp_path / "net.pt", "cannot be read", overrides=Overrides(card=tmp_path / "no.toml"))


# --- published networks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name"),
    [("resnet20-12fca82f.th", "resnet20-cifar"), ("resnet32-d509ac18.th", "resnet32-cifar")],
)
@pytest.mark.slow
def test_published_networks(file: str, name: str, shared_data: Path) -> None:
    found = load_classifier(shared_data / "checkpoints" / file)
    assert (found.arch, found.num_classes, len(found.batchnorms)) == (
        name,
        10,
        int(name[6:8]) - 1,
    )
    assert found.preprocessing.mean == (0.485, 0.456, 0.406)  # from the card beside it
    assert found.class_names[0] == "airplane"
    with np.load(shared_data / "cifar10-test.npz") as data:
        images, labels = data["images"][:1000], torch.from_numpy(data["labels"][:1000])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        logits = found.network(found.preprocessing.normalise(pixels))
    assert (logits.argmax(1) == labels).float().mean() > 0.89
