"""Pickles of strangers: everything but tensors and plain values is a stub, and no code is run."""

from __future__ import annotations

import builtins
import collections
import datetime
import enum
import functools
import io
import os
import pathlib
import pickle
import subprocess
import sys
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from networks import randomised
from torch import nn

from oodcli.errors import CheckpointError
from oodcli.networks.architectures import build
from oodcli.networks.card import Overrides
from oodcli.networks.class_names import names_in
from oodcli.networks.inert import Stub, is_module, load_inert, state_of
from oodcli.networks.load import load_classifier

RAN: list[str] = []
"""Grows when code of this file is run by unpickling."""


class Settings(dict[str, Any]):
    """A class derived from dict, as many configurations are."""

    def __init__(self, lr: float) -> None:
        super().__init__(lr=lr)
        self.hidden = torch.ones(2)

    class Inner:
        pass


class Trap:
    """Runs code in each of the ways in which unpickling an object of a class can."""

    def __new__(cls, *args: Any) -> Trap:
        RAN.append("new")
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        RAN.append("setstate")

    def __getstate__(self) -> dict[str, int]:
        return {"x": 1}


class Colour(enum.Enum):
    RED = 1


VALUES = {
    "number": np.float64(0.93),
    "array": np.zeros(3),
    "texts": np.array(["a", None], dtype=object),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "datetime": datetime.datetime(2026, 1, 1),
    "path": pathlib.PurePosixPath("a/b"),
    "namespace": types.SimpleNamespace(lr=0.1),
    "version": torch.__version__,
    "shape": torch.Size([1, 2]),
    "device": torch.device("cuda"),
    "dtype": torch.float16,
    "partial": functools.partial(torch.optim.Adam, lr=1e-3),
    "function": torch.nn.functional.relu,
    "deque": collections.deque([1, 2]),
    "dictionary": Settings(0.1),
    "nested": Settings.Inner(),
    "method": Settings(0.1).keys,
    "enum": Colour.RED,
    "generator": np.random.default_rng(0),
    "trap": Trap(),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", VALUES)
def test_what_training_scripts_save_beside_the_weights(
    name: str, legacy: bool, tmp_path: Path
) -> None:
    path = tmp_path / "net.pt"
    weights = torch.arange(3.0)
    content = {"value": VALUES[name], "weights": weights}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    RAN.clear()
    found = load_inert(path)
    assert not RAN
    assert torch.equal(found["weights"], weights)
    if name in ("shape", "device", "dtype"):
        assert found["value"] == VALUES[name]


def test_a_stub_has_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(dict(VALUES), path)
    found = load_inert(path)
    assert found["defaultdict"] == {"a": [1]}
    assert found["deque"] == [1, 2]
    assert found["dictionary"]["lr"] == 0.1
    assert found["namespace"].lr == 0.1
    assert found["trap"].x == 1
    assert type(found["trap"]).name.endswith("test_inert.Trap")
    assert isinstance(found["enum"], Stub)


class Runs:
    """Unpickled as a call of this function with these arguments."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_is_run(legacy: bool, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    touch = f"open({str(canary)!r}, 'w')"
    nested = io.BytesIO()
    torch.save(Runs(os.mkdir, str(canary)), nested)
    calls: list[tuple[Any, ...]] = [
        (os.mkdir, str(canary)),
        (os.system, f"touch {canary}"),
        (os.open, str(canary), os.O_CREAT),
        (builtins.eval, touch),
        (builtins.exec, touch),
        (builtins.open, str(canary), "w"),
        (builtins.__import__, "antigravity"),
        (subprocess.getoutput, f"touch {canary}"),
        (canary.touch,),
        (Runs(canary.touch).__reduce__,),
        (pickle.loads, pickle.dumps(Runs(os.mkdir, str(canary)))),
        (torch.storage._load_from_bytes, nested.getvalue()),
        (torch.load, str(tmp_path / "inner.pt")),
        (functools.partial(os.mkdir, str(canary)),),
        (map, os.mkdir, [str(canary)]),
        (torch.save, torch.ones(1), str(canary)),
        (np.save, str(canary), 1),
        (torch.jit.load, str(tmp_path / "inner.pt")),
    ]
    (tmp_path / "inner.pt").write_bytes(nested.getvalue())
    path = tmp_path / "net.pt"
    read = 0
    for function, *args in calls:
        state = {"conv.weight": torch.ones(2, 3, 3, 3)}
        torch.save(
            {"a": Runs(function, *args), "net": state},
            path,
            _use_new_zipfile_serialization=not legacy,
        )
        with suppress(pickle.UnpicklingError):  # torch blocks names of the module os
            load_inert(path)
            read += 1
        assert [each.name for each in tmp_path.iterdir() if "canary" in each.name] == []
    assert read >= len(calls) - 6


# --- pickled modules ------------------------------------------------------------------------------


def test_weights_of_a_pickled_module(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    network = randomised(torchvision.models.shufflenet_v2_x0_5(num_classes=3))
    network.register_buffer("scratch", torch.ones(1), persistent=False)
    torch.save({"model": None, "ema": nn.DataParallel(network), "epoch": 1}, path)
    found = load_inert(path)["ema"]
    assert is_module(found)
    expected = network.state_dict()
    read = state_of(found)
    assert list(read) == [f"module.{key}" for key in expected]
    assert all(torch.equal(read[f"module.{key}"], value) for key, value in expected.items())
    with pytest.raises(CheckpointError) as error:
        load_classifier(path)
    for word in ("DataParallel", "--arch torchvision:shufflenet_v2_x0_5", "--trust-pickle"):
        assert word in str(error.value)
    given = Overrides(arch="torchvision:shufflenet_v2_x0_5", input_size=(32, 32))
    classifier = load_classifier(path, given)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(classifier.network(images), network.eval()(images))
    assert any("without its code" in note for note in classifier.assumptions)


def test_a_module_in_itself_has_an_end(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    network._modules["again"] = network
    torch.save(network, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="submodules"):
        load_classifier(tmp_path / "net.pt")


def test_a_classifier_of_ultralytics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its trainer saves one: the network as an object, with the names of the classes."""
    for name in ("ultralytics", "ultralytics.nn", "ultralytics.nn.tasks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = type("ClassificationModel", (nn.Module,), {"__module__": "ultralytics.nn.tasks"})
    sys.modules["ultralytics.nn.tasks"].ClassificationModel = kind  # type: ignore[attr-defined]
    network = kind()
    network.model = build("resnet8-cifar-w8", 3)
    network.names = {0: "cat", 1: "dog", 2: "owl"}
    path = tmp_path / "best.pt"
    torch.save(
        {"model": None, "ema": network.half(), "train_args": {"imgsz": 64, "data": "pets"}}, path
    )
    monkeypatch.undo()
    classifier = load_classifier(path, Overrides(arch="resnet8-cifar-w8"))
    assert classifier.class_names == ("cat", "dog", "owl")
    prep = classifier.preprocessing
    assert (prep.input_size, prep.resize) == ((64, 64), 64)  # the shorter side, then a crop
    assert (prep.mean, prep.std) == ((0, 0, 0), (1, 1, 1))


class Learner:
    """As fastai exports one: an object that holds the network."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.path = Path("models")


def test_the_network_of_a_learner(tmp_path: Path) -> None:
    network = randomised(build("resnet8-cifar-w8", 4))
    torch.save(Learner(network), tmp_path / "export.pkl")
    with pytest.raises(CheckpointError, match="--arch resnet8-cifar-w8"):
        load_classifier(tmp_path / "export.pkl")
    images = torch.randn(2, 3, 32, 32)
    for overrides, trust in ((Overrides(arch="resnet8-cifar-w8"), False), (Overrides(), True)):
        found = load_classifier(tmp_path / "export.pkl", overrides, trust_pickle=trust)
        with torch.no_grad():
            torch.testing.assert_close(found.network(images), network.eval()(images))


@pytest.mark.slow
def test_a_file_that_names_very_many_classes(tmp_path: Path) -> None:
    """torch searches the whole list for each object."""
    kinds = [type(f"Kind{number}", (), {"__module__": __name__}) for number in range(400)]
    for kind in kinds:
        setattr(sys.modules[__name__], kind.__name__, kind)
    for legacy in (False, True):
        path = tmp_path / "net.pt"
        torch.save([kind() for kind in kinds], path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError, match="more than 256 classes"):
            load_classifier(path)


@pytest.mark.parametrize(
    "odd", [{"_buffers": 3}, {"_non_persistent_buffers_set": 3}, {"x": {(): 1}}]
)
def test_a_module_of_odd_parts(odd: dict[str, Any], tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    network.__dict__.update(odd)
    torch.save({"a": network, (1, 2): network}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="pickled"):
        load_classifier(tmp_path / "net.pt")


class CategoryMap:
    """As fastai's: the names are in a list of fastai within."""

    def __init__(self, names: list[str]) -> None:
        self.items = Names(names)
        self.o2i = {name: number for number, name in enumerate(names)}


class Names:
    def __init__(self, names: list[str]) -> None:
        self.items = names


class Loaders:
    def __init__(self, vocab: CategoryMap) -> None:
        self.loaders = [{"dataset": Transform(vocab)}]


class Transform:
    def __init__(self, vocab: CategoryMap) -> None:
        self.vocab = vocab


PETS = ["cat", "dog", "köter"]
ENCODED = {
    "unicode": np.array(PETS),
    "big-endian": np.array(PETS).astype(">U5"),
    "objects": np.array(PETS, dtype=object),
    "scalars": list(np.array(PETS)),
    "numbers": {name: np.int64(number) for number, name in enumerate(PETS)},
    "fastai": CategoryMap(PETS),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_class_names_in_arrays_and_objects(kind: str, tmp_path: Path) -> None:
    torch.save({"classes": ENCODED[kind], "n": np.arange(3)}, tmp_path / "x.pt")
    assert names_in(load_inert(tmp_path / "x.pt")) == ("classes", tuple(PETS))
    if kind != "fastai":
        trusted = torch.load(tmp_path / "x.pt", weights_only=False)
        assert names_in(trusted) == ("classes", tuple(PETS))


def test_the_vocabulary_of_a_learner(tmp_path: Path) -> None:
    learner = Learner(nn.Linear(2, 3))
    learner.dls = Loaders(CategoryMap(PETS))  # type: ignore[attr-defined]
    torch.save(learner, tmp_path / "export.pkl")
    assert names_in(load_inert(tmp_path / "export.pkl")) == ("dls.vocab", tuple(PETS))


@pytest.mark.parametrize(
    "value", [np.array([["a"]]), np.array([1.0, 2.0]), np.array("a"), np.array([], dtype="U1")]
)
def test_other_arrays_are_no_class_names(value: Any, tmp_path: Path) -> None:
    torch.save({"classes": value}, tmp_path / "x.pt")
    assert names_in(load_inert(tmp_path / "x.pt")) is None


class DTensor:
    """As FSDP saves a part of a weight."""


def test_weights_that_are_spread_over_processes(tmp_path: Path) -> None:
    torch.save({"model": {"fc.weight": DTensor()}}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="get_model_state_dict"):
        load_classifier(tmp_path / "net.pt")
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / name).write_bytes(b"x")
    for path in (tmp_path, tmp_path / ".metadata", tmp_path / "__0_0.distcp"):
        with pytest.raises(CheckpointError, match="dcp_to_torch"):
            load_classifier(path)
