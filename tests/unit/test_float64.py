"""On a device without float64: a pretended one that raises where something asks it for that."""

from __future__ import annotations

from contextlib import nullcontext

import networks
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from oodcli import float64
from oodcli.detectors.gram import gram_sums
from oodcli.detectors.rankfeat import rank_one
from oodcli.features import Features, Layer
from oodcli.float64 import has_float64, in_float64
from oodcli.inversion.mgi import Sensitivity
from oodcli.inversion.quality import Quality
from oodcli.recording.recorder import Recorder, recordable
from oodcli.recording.reduced import spatial_moments

THERE = torch.device("meta")


class There(torch.Tensor):
    """A tensor that says that it is on that device, and holds its numbers on the processor."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=THERE
        )

    def __init__(self, held):
        if held.dtype == torch.float64:
            raise TypeError("the device has no float64")
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        found = function(*tree_map(held, args), **tree_map(held, kwargs))
        stays = wanted is None or torch.device(wanted).type == THERE.type
        return tree_map(there, found) if stays else found


@pytest.fixture(autouse=True)
def without_float64(monkeypatch):
    monkeypatch.setattr(float64, "WITHOUT", (THERE.type,))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def held(value):
    return value.held if isinstance(value, There) else value


def there(value):
    return There(value) if isinstance(value, torch.Tensor) else value


class Moves(TorchFunctionMode):
    """Makes tensors of that device, which this build of torch may lack."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.new_tensor and isinstance(args[0], There):
            return There(args[0].held.new_tensor(*args[1:], **kwargs))
        given = [*tree_leaves(args[1:]), *kwargs.values()]
        target = next((each for each in given if isinstance(each, torch.device)), None)
        if function is torch.Tensor.to and target is None:
            like = next((each for each in given if isinstance(each, There)), None)
            target = None if like is None else like.device
        if target != THERE or isinstance(args[0], There):
            return function(*args, **kwargs)
        if function is torch.Tensor.to:
            return There(args[0].detach())
        return There(function(*args, **{**kwargs, "device": torch.device("cpu")}))


def test_the_device_refuses_float64():
    with Moves():
        x = torch.ones(2).to(THERE)
        assert x.device == THERE
        with pytest.raises(TypeError, match="has no float64"):
            x.double()
        assert in_float64(x).device.type == "cpu"
        assert in_float64(x).tolist() == [1, 1]
    assert not has_float64(THERE)
    assert has_float64(torch.device("cuda"))


def test_all_records_and_the_quality_of_virtual_images():
    what = recordable(networks.classifier(networks.Residual()))
    found = []
    for device in (torch.device("cpu"), THERE):
        with Moves():
            classifier = networks.classifier(networks.Residual().to(device))
            rows = Recorder(classifier, what)(networks.images(4)).to(torch.device("cpu")).rows()
            quality = Quality(classifier)
            quality.add(networks.images(4).half(), torch.arange(4) % 3)
            sums = {name: torch.from_numpy(each) for name, each in quality.sums().items()}
        found.append(rows | sums)
    assert {"pro/steps", "adascale/u", "odin/logits", "counts"} <= found[0].keys()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: torch.cat(spatial_moments(x)),
        lambda x: torch.cat(spatial_moments(x.movedim(1, -1), -1)),
        gram_sums,
        rank_one,
        lambda x: rank_one(torch.cat([x, -x], 2)),  # two equal singular values
    ],
)
def test_moments_of_a_map(compute):
    x = networks.images(4)
    with Moves():
        found = compute(x.to(THERE))
    assert found.device == THERE
    torch.testing.assert_close(found.cpu(), compute(x))


def test_sensitivities_of_an_inversion():
    def averages(device):
        sums = Sensitivity((torch.arange(4) % 3).to(device))
        for seed in range(3):
            logits, gradient = networks.normal(4, 3, seed=seed), networks.normal(4, 5, seed=seed)
            layer = Layer("stage", gradient=gradient.to(device))
            sums.add(Features(4, logits=logits.to(device), layers={"x": layer}))
        return sums.average()["x"]

    with Moves():
        found = averages(THERE)
    torch.testing.assert_close(found, averages(torch.device("cpu")))
