"""Where training scripts put the weights, the head and the names of the classes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import randomised
from safetensors.torch import save_file
from torch import Tensor, nn

from oodcli.errors import CheckpointError
from oodcli.networks.architectures import build
from oodcli.networks.assemble import assemble
from oodcli.networks.card import Overrides
from oodcli.networks.class_names import read_class_names
from oodcli.networks.classifier import Classifier
from oodcli.networks.load import load_classifier
from oodcli.networks.preprocessing import Preprocessing
from oodcli.networks.replaced_heads import fit_head

NAME = "torchvision:shufflenet_v2_x0_5"
SMALL = Overrides(input_size=(32, 32))
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return dict(randomised(build(NAME, 4)).state_dict())


def saved(content: Any, tmp_path: Path, overrides: Overrides = SMALL) -> Classifier:
    torch.save(content, tmp_path / "net.pt")
    return load_classifier(tmp_path / "net.pt", overrides)


def refused(content: Any, tmp_path: Path, *words: str, overrides: Overrides = SMALL) -> None:
    with pytest.raises(CheckpointError) as error:
        saved(content, tmp_path, overrides)
    for word in words:
        assert word in str(error.value), str(error.value)


def noted(found: Classifier, *words: str) -> None:
    for word in words:
        assert word in " ".join(found.assumptions), found.assumptions


# --- the key --------------------------------------------------------------------------------------

ADAM = {"state": {0: {"exp_avg": torch.ones(3, 3)}}, "param_groups": []}

WRAPPED: dict[str, tuple[Callable[[State], Any], str]] = {
    "unknown key": (lambda s: {"net_sd": s, "optimizer": ADAM}, "'net_sd'"),
    "state": (lambda s: {"state": {"state_dict": s}}, "'state'"),
    "list": (lambda s: [s, 3], "'0'"),
    "text beside": (lambda s: {**s, "arch": "net", "extra": None}, "arch, extra"),
    "deepspeed": (lambda s: {"module": s, "dp_world_size": 8, "ds_config": {"a": [1]}}, ""),
    "two levels": (lambda s: {"trainer": {"weights_of_net": s}, "epoch": np.int64(3)}, "'trainer'"),
    "loss": (lambda s: {"net_sd": s, "loss_sd": {"weight": torch.ones(4)}}, "'net_sd'"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_found_where_they_are_the_only_ones(
    kind: str, tmp_path: Path, state: State
) -> None:
    wrap, word = WRAPPED[kind]
    found = saved(wrap(state), tmp_path)
    assert found.arch == NAME
    assert torch.equal(found.network.state_dict()["fc.bias"], state["fc.bias"])
    noted(found, word)


def test_several_state_dicts_need_a_key(tmp_path: Path, state: State) -> None:
    other = {key: value + 1 for key, value in state.items()}
    content = {"g": {"sd": state}, "d.x": other}
    refused(content, tmp_path, "g, d.x", "--state-key")
    for key, expected in (("g", state), ("g.sd", state), ("d.x", other)):
        found = saved(content, tmp_path, Overrides(input_size=(32, 32), state_key=key))
        assert torch.equal(found.network.state_dict()["fc.bias"], expected["fc.bias"])
    wrong = Overrides(input_size=(32, 32), state_key="e")
    refused(content, tmp_path, "'e'", "g, d.x", overrides=wrong)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda k: re.sub(r"^(stage\d)\.", r"\1._orig_mod.", k),
        lambda k: re.sub(r"^(stage\d\.\d)\.", r"\1._checkpoint_wrapped_module.", k),
        lambda k: "_fsdp_wrapped_module." + k.replace("branch2.", "branch2._fsdp_wrapped_module."),
        lambda k: re.sub(r"^(stage\d)\.", r"\1.module.", k),
        lambda k: "module.model._orig_mod." + re.sub(r"^(conv\d)\.", r"\1._orig_mod.", k),
    ],
)
def test_wrappers_inside_names(change: Callable[[str], str], tmp_path: Path, state: State) -> None:
    content = {change(key): value for key, value in state.items()}
    assert saved(content, tmp_path).arch == NAME
    given = Overrides(input_size=(32, 32), arch=NAME)
    assert saved(content, tmp_path, given).num_classes == 4


# --- heads ----------------------------------------------------------------------------------------


def moved(state: State, head: str, body: str = "", **others: Tensor) -> State:
    """The state dict with its head under another name, and other layers."""
    extra = {key.replace("__", "."): value for key, value in others.items()}
    return {
        (f"{head}{key.removeprefix('fc')}" if key.startswith("fc.") else f"{body}{key}"): value
        for key, value in state.items()
    } | extra


REPLACED: dict[str, Callable[[State], State]] = {
    "dropout": lambda s: moved(s, "fc.1"),
    "openmmlab": lambda s: moved(s, "head.fc", "backbone."),
    "classifier": lambda s: moved(s, "classifier", "backbone."),
    "extra": lambda s: moved(s, "fc", rot__weight=torch.ones(4, 1024), rot__bias=torch.ones(4)),
    "extra, moved": lambda s: moved(s, "head.1", "net.", aux__weight=torch.ones(9, 1024)),
}


@pytest.mark.parametrize(
    ("kind", "arch"),
    [
        ("dropout", None),
        *((kind, NAME) for kind in REPLACED),
        *(pytest.param(kind, None, marks=pytest.mark.slow) for kind in [*REPLACED][1:]),
    ],
)
def test_replaced_heads(kind: str, arch: str | None, tmp_path: Path, state: State) -> None:
    content = REPLACED[kind](state)
    found = saved(content, tmp_path, Overrides(input_size=(32, 32), arch=arch))
    assert (found.arch, found.num_classes, found.head_name) == (NAME, 4, "fc")
    for key, value in state.items():
        assert torch.equal(found.network.state_dict()[key], value)
    noted(found, "ignored" if kind.startswith("extra") else "as the head, fc")


UNFIT: dict[str, Callable[[State], State]] = {
    "two layers": lambda s: moved(
        {**s, "fc.weight": torch.ones(64, 1024), "fc.bias": torch.ones(64)},
        "head.0",
        head__2__weight=torch.ones(4, 64),
        head__2__bias=torch.ones(4),
    ),
    "layer after the head": lambda s: moved(s, "fc", more__weight=torch.ones(3, 4)),
    "two heads": lambda s: moved(s, "a", b__weight=torch.ones(4, 1024), b__bias=torch.ones(4)),
    "another body": lambda s: moved(s, "fc.1", extra__weight=torch.ones(4, 4, 3, 3)),
    "deeper body": lambda s: moved(s, "fc.1", stage4__9__weight=torch.ones(4, 4)),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_heads_that_may_be_something_else(kind: str, tmp_path: Path, state: State) -> None:
    content = UNFIT[kind](state)
    assert fit_head(build(NAME, 1000).state_dict(), content) is None
    refused(content, tmp_path, "does not fit", overrides=Overrides(arch=NAME))


# --- one logit ------------------------------------------------------------------------------------


class Binary(nn.Module):
    def __init__(self, last: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 1, bias=last is None)
        self.last = last or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.fc(self.conv(images).mean((2, 3))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("last", [None, nn.Sigmoid()])
def test_one_logit_becomes_two(last: nn.Module | None) -> None:
    network = Binary(last).eval()
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        probability = network(images) if last else network(images).sigmoid()
    found = assemble(network, arch="x", preprocessing=Preprocessing((8, 8), (0,) * 3, (1,) * 3))
    assert (found.num_classes, found.head_name) == (2, "fc")
    assert found.head is not None
    assert found.head.weight.shape == (2, 4)
    with torch.no_grad():
        logits = found.network(images)
    torch.testing.assert_close(logits.softmax(1)[:, 1:], probability)
    assert bool((logits[:, 0] == 0).all())
    noted(found, "one logit")


@pytest.mark.parametrize("logit", [0.0, 1.0])
def test_one_logit_may_look_like_a_softmax(logit: float) -> None:
    network = Binary(nn.Sigmoid()).eval()
    nn.init.zeros_(network.conv.weight)
    nn.init.ones_(network.conv.bias)
    nn.init.constant_(network.fc.weight, logit / 4)
    found = assemble(network, arch="x", preprocessing=Preprocessing((8, 8), (0,) * 3, (1,) * 3))
    assert found.head_name == "fc"
    with torch.no_grad():
        assert found.network(torch.zeros(1, 3, 8, 8)).tolist() == [[0, logit]]


def test_one_output_without_a_linear_head_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 1, 8), nn.Flatten())
    with pytest.raises(CheckpointError, match="zeros_like"):
        assemble(network, arch="x", preprocessing=Preprocessing((8, 8), (0,) * 3, (1,) * 3))


# --- class names ----------------------------------------------------------------------------------

NAMES = ("cat", "dog", "owl", "rat")


@pytest.mark.parametrize(
    "beside",
    [
        {"class_to_idx": {"owl": 2, "cat": 0, "rat": 3, "dog": 1}},
        {"classes": list(NAMES)},
        {"meta": {"CLASSES": NAMES}},
        {"meta": {"dataset_meta": {"classes": NAMES}}},
        {"hyper_parameters": {"class_names": list(NAMES)}},
        {"names": dict(enumerate(NAMES))},
        {"config": {"id2label": {str(index): name for index, name in enumerate(NAMES)}}},
    ],
)
def test_class_names_beside_the_weights(
    beside: dict[str, Any], tmp_path: Path, state: State
) -> None:
    found = saved({"state_dict": state, **beside}, tmp_path)
    assert (found.class_names, found.named) == (NAMES, True)
    noted(found, "class names cat, dog, owl")
    given = Overrides(input_size=(32, 32), class_names=("a", "b", "c", "d"))
    assert saved({"state_dict": state, **beside}, tmp_path, given).class_names == given.class_names


def test_class_names_of_another_network_are_ignored(tmp_path: Path, state: State) -> None:
    found = saved({"state_dict": state, "classes": ["a", "b", "c"]}, tmp_path)
    assert (found.class_names, found.named) == (("0", "1", "2", "3"), False)
    noted(found, "3 class names", "ignored")
    for odd in ({"classes": 4}, {"classes": ["a", 1]}, {"class_to_idx": {"a": 1, "b": 5}}):
        assert not saved({"state_dict": state, **odd}, tmp_path).named


@pytest.mark.parametrize(
    "content",
    [
        b"cat\ndog\nowl\nrat",
        b"cat\r\ndog\r\nowl\r\nrat\r\n\r\n\n",
        "cat\ndog\nowl\nrat\n".encode("utf-8-sig"),
        "cat\r\ndog\r\nowl\r\nrat\r\n".encode("utf-16"),
        json.dumps(NAMES).encode(),
        json.dumps(dict(enumerate(NAMES))).encode(),
        json.dumps({name: index for index, name in enumerate(NAMES)}).encode(),
        json.dumps({index: [f"n{index}", name] for index, name in enumerate(NAMES)}).encode(),
    ],
)
def test_files_of_class_names(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes(content)
    assert read_class_names(tmp_path / "names") == NAMES


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "is empty"),
        (b"cat\n\ndog\n", "line 2 is empty"),
        (b"caf\xe9\n", "UTF-8"),
        (b'{"cat": 1, "dog": 2}', "from 0"),
        (b'["cat", 3]', "JSON"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_files_that_have_no_class_names(content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes(content)
    with pytest.raises(CheckpointError, match=word):
        read_class_names(tmp_path / "names")
    with pytest.raises(CheckpointError, match="No such file"):
        read_class_names(tmp_path / "none")


# --- other files ----------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("net.safetensors", LFS, "git lfs pull"),
        ("net.bin", LFS, "git lfs pull"),
        ("net.pth", b"<!DOCTYPE html><title>Virus scan warning</title>", "a web page"),
        ("net.pt", b"\n<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "a web page"),
        ("net.onnx", b"\x08\x07\x12\x07pytorch", "ONNX"),
        ("net.pt", b"\x08\x07\x12\x07pytorch", "ONNX"),
        ("net.pb", b"\x0a\x07", "tf2onnx"),
        ("net.keras", b"PK\x03\x04", "Keras"),
        ("net.safetensors.index.json", json.dumps(INDEX).encode(), "model-00001-of-00002"),
    ],
)
def test_files_that_are_named_for_what_they_are(
    name: str, content: bytes, word: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=word):
        load_classifier(tmp_path / name)


def test_arrays_of_numpy_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", a=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"NumPy arrays \(a.npy\)"):
        load_classifier(tmp_path / "weights.npz")


def test_the_content_and_not_the_suffix_says_the_format(tmp_path: Path, state: State) -> None:
    save_file(state, tmp_path / "net.bin")
    torch.save(state, tmp_path / "net.safetensors")
    for name in ("net.bin", "net.safetensors"):
        assert load_classifier(tmp_path / name, SMALL).arch == NAME
