"""Recognition by keys and shapes, and the forward passes that belong to the key layouts."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from networks import layout, randomised, rekeyed
from torch import Tensor, nn

from oodcli.errors import CheckpointError
from oodcli.networks import architectures
from oodcli.networks.architectures import build, recognise, skeleton


@pytest.mark.parametrize("name", ["resnet20-cifar", "wrn-16-4", "densenet121-kuangliu"])
def test_the_order_of_keys_does_not_matter(name: str) -> None:
    found = recognise(dict(sorted(layout(name).items())))  # as in a safetensors file
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("head", ["fc", "classifier"])
def test_other_names_of_heads_and_shortcuts(head: str) -> None:
    state = layout("resnet20-cifar-b")
    state = rekeyed(state, (r"^linear", head), (r"\.shortcut\.", ".downsample."))
    found = recognise(state)
    assert found is not None
    assert found.name == "resnet20-cifar-b"


def test_densenet_bc_in_the_other_layouts() -> None:
    state = skeleton("densenet-bc-40-12", 10).state_dict()
    dense = rekeyed(
        state,
        (r"^block(\d)", r"dense\1"),
        (r"^(trans\d)\.(bn|conv)\.", r"\1.\g<2>1."),
        (r"^linear", "fc"),
    )
    features = {}
    for key, tensor in state.items():
        if match := re.match(r"block(\d)\.(\d+)\.(bn|conv)([12])\.(.*)", key):
            kind = match[3].replace("bn", "norm")
            layer = f"denseblock{match[1]}.denselayer{int(match[2]) + 1}"
            key = f"features.{layer}.{kind}{match[4]}.{match[5]}"
        key = re.sub(r"^trans(\d)\.bn", r"features.transition\1.norm", key)
        key = re.sub(r"^trans(\d)\.conv", r"features.transition\1.conv", key)
        key = re.sub(r"^bn\.", "features.norm_final.", key)
        key = re.sub(r"^conv1\.", "features.conv0.", key).replace("linear.", "classifier.")
        features[key] = tensor
    for other in (dense, features):
        found = recognise(other)
        assert found is not None
        assert found.name == "densenet-bc-40-12"


def test_old_torchvision_keys_and_auxiliary_heads() -> None:
    state = skeleton("torchvision:densenet121", 5).state_dict()
    old = rekeyed(state, (r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2."))
    assert old.keys() != state.keys()
    assert getattr(recognise(old), "name", None) == "torchvision:densenet121"
    state = skeleton("torchvision:googlenet", 5).state_dict()
    auxiliary = {"aux1.fc2.weight": torch.empty(5, 1024, device="meta")}
    found = recognise(state | auxiliary)
    assert found is not None
    assert found.name == "torchvision:googlenet"
    assert found.state_dict.keys() == state.keys()


@pytest.mark.slow
def test_a_wrong_shape_is_not_recognised() -> None:
    state = layout("resnet20-cifar")
    state["layer2.1.conv2.weight"] = torch.empty(32, 32, 5, 5, device="meta")
    assert recognise(state) is None
    name, differing = architectures.nearest(state)
    assert name == "resnet20-cifar"
    assert differing == ["layer2.1.conv2.weight is 32x32x5x5, expected 32x32x3x3"]


def test_unknown_names_say_what_is_near() -> None:
    with pytest.raises(CheckpointError, match=r"did you mean .*resnet20-cifar"):
        build("resnet20-cifr", 10)
    for name in ("resnet21-cifar", "wrn-28-0", "torchvision:resnet18+384px", "wrn-28-10+px"):
        assert not architectures.known(name)


def test_names_need_neither_torch_nor_torchvision() -> None:
    code = (
        "import sys; from oodcli.networks import architectures as a; n = a.names(); "
        "assert 'torchvision:resnet18' in n and 'wrn-28-10' in n; "
        "assert not {'torch', 'torchvision', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_recognition_is_quick_and_leaves_torchvision_alone_for_cifar_networks() -> None:
    code = (
        "import sys, time; from oodcli.networks import architectures as a; "
        "s = a.skeleton('resnet56-cifar', 10).state_dict(); "
        "assert a.recognise(s).name == 'resnet56-cifar'; assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    state = layout("torchvision:resnet50")
    start = time.process_time()  # not the time of a busy machine
    recognise(state)
    assert time.process_time() - start < 5


# --- forward passes against functional versions written from the key layouts ------------------


def norm(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    names_ = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (state[f"{key}.{n}"].view(-1, 1, 1) for n in names_)
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def convolve(state: dict[str, Tensor], key: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{key}.weight"]
    return F.conv2d(x, weight, state.get(f"{key}.bias"), stride, weight.shape[-1] // 2)


def check(name: str, reference: object, channels: int = 3) -> None:
    network = randomised(build(name, 10))
    x = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(network.state_dict(), x)  # type: ignore[operator]
        found = network(x)
    assert expected.std() > 1e-3  # or the comparison would say nothing
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet14-cifar", "resnet14-cifar-b", "resnet8-cifar-w8+grey"])
def test_cifar_resnet(name: str) -> None:
    def forward(s: dict[str, Tensor], x: Tensor) -> Tensor:
        x = F.relu(norm(s, "bn1", convolve(s, "conv1", x)))
        for stage in (1, 2, 3):
            for block in range(2 if "14" in name else 1):
                p = f"layer{stage}.{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                out = F.relu(norm(s, f"{p}.bn1", convolve(s, f"{p}.conv1", x, stride)))
                out = norm(s, f"{p}.bn2", convolve(s, f"{p}.conv2", out))
                if stride == 2 and "-b" in name:
                    short = F.conv2d(x, s[f"{p}.shortcut.0.weight"], stride=2)
                    x = norm(s, f"{p}.shortcut.1", short)
                elif stride == 2:  # option A: planes // 4 zero channels on either side
                    quarter = out.shape[1] // 4
                    zeros = x.new_zeros(len(x), quarter, *out.shape[2:])
                    x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
                x = F.relu(out + x)
        x = F.avg_pool2d(x, x.shape[-1]).flatten(1)
        return x @ s["linear.weight"].T + s["linear.bias"]

    check(name, forward, 1 if "grey" in name else 3)


@pytest.mark.parametrize("name", ["wrn-16-2", "wrn-16-1", "wrn-10-3"])
def test_wide_resnet(name: str) -> None:
    def forward(s: dict[str, Tensor], x: Tensor) -> Tensor:
        x = convolve(s, "conv1", x)
        for stage in (1, 2, 3):
            for block in range((int(name.split("-")[1]) - 4) // 6):
                p = f"block{stage}.{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                equal = s[f"{p}.conv1.weight"].shape[0] == x.shape[1]
                active = F.relu(norm(s, f"{p}.bn1", x))
                out = F.relu(norm(s, f"{p}.bn2", convolve(s, f"{p}.conv1", active, stride)))
                out = convolve(s, f"{p}.conv2", out)
                x = out + (x if equal else convolve(s, f"{p}.shortcut", active, stride))
        x = F.avg_pool2d(F.relu(norm(s, "bn1", x)), 8).flatten(1)
        return x @ s["linear.weight"].T + s["linear.bias"]

    check(name, forward)


@pytest.mark.parametrize("name", ["wrn-16-2-meliketoy", "wrn-16-1-meliketoy"])
def test_wide_resnet_with_the_stride_in_the_second_convolution(name: str) -> None:
    def forward(s: dict[str, Tensor], x: Tensor) -> Tensor:
        x = convolve(s, "conv1", x)
        for stage in (1, 2, 3):
            for block in (0, 1):
                p = f"block{stage}.{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                out = convolve(s, f"{p}.conv1", F.relu(norm(s, f"{p}.bn1", x)))
                out = convolve(s, f"{p}.conv2", F.relu(norm(s, f"{p}.bn2", out)), stride)
                if stride != 1 or out.shape[1] != x.shape[1]:
                    x = convolve(s, f"{p}.shortcut", x, stride)
                x = x + out
        x = F.avg_pool2d(F.relu(norm(s, "bn1", x)), 8).flatten(1)
        return x @ s["linear.weight"].T + s["linear.bias"]

    check(name, forward)


@pytest.mark.parametrize("name", ["densenet-bc-22-8", "densenet121-kuangliu-k4"])
def test_densenet(name: str) -> None:
    counts = (3, 3, 3) if "bc" in name else (6, 12, 24, 16)

    def forward(s: dict[str, Tensor], x: Tensor) -> Tensor:
        x = convolve(s, "conv1", x)
        for number, count in enumerate(counts, 1):
            for layer in range(count):
                p = f"block{number}.{layer}"
                out = convolve(s, f"{p}.conv1", F.relu(norm(s, f"{p}.bn1", x)))
                out = convolve(s, f"{p}.conv2", F.relu(norm(s, f"{p}.bn2", out)))
                x = torch.cat([x, out] if "bc" in name else [out, x], 1)
            if number < len(counts):
                p = f"trans{number}"
                x = F.avg_pool2d(convolve(s, f"{p}.conv", F.relu(norm(s, f"{p}.bn", x))), 2)
        x = F.relu(norm(s, "bn", x))
        x = F.avg_pool2d(x, x.shape[-1]).flatten(1)
        return x @ s["linear.weight"].T + s["linear.bias"]

    check(name, forward)


@pytest.mark.parametrize(("name", "blocks"), [("resnet18-kuangliu", 2), ("resnet50-kuangliu", 3)])
def test_kuangliu_resnet(name: str, blocks: int) -> None:
    depths = (2, 2, 2, 2) if blocks == 2 else (3, 4, 6, 3)

    def forward(s: dict[str, Tensor], x: Tensor) -> Tensor:
        x = F.relu(norm(s, "bn1", convolve(s, "conv1", x)))
        assert x.shape[-1] == 32  # no stride, no max-pool
        for stage, depth in enumerate(depths, 1):
            for block in range(depth):
                p = f"layer{stage}.{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                out = x
                for part in range(1, blocks + 1):
                    strided = part == (1 if blocks == 2 else 2)
                    out = convolve(s, f"{p}.conv{part}", out, stride if strided else 1)
                    out = norm(s, f"{p}.bn{part}", out)
                    out = F.relu(out) if part < blocks else out
                if f"{p}.downsample.0.weight" in s:
                    x = norm(s, f"{p}.downsample.1", convolve(s, f"{p}.downsample.0", x, stride))
                x = F.relu(out + x)
        x = F.avg_pool2d(x, 4).flatten(1)
        return x @ s["fc.weight"].T + s["fc.bias"]

    check(name, forward)


def test_the_cifar_stem_is_torchvisions_network_behind_another_first_layer() -> None:
    network = build("torchvision:resnet18+cifar-stem", 10)
    assert isinstance(network.maxpool, nn.Identity)
    assert (network.conv1.kernel_size, network.conv1.stride) == ((3, 3), (1, 1))
    dense = build("torchvision:densenet121+cifar-stem+grey", 10).features
    assert isinstance(dense.pool0, nn.Identity)
    assert dense.conv0.weight.shape == (64, 1, 3, 3)


def test_transform_input_follows_the_number_of_classes_unless_named() -> None:
    flags = {
        ("torchvision:googlenet", 1000): True,
        ("torchvision:googlenet", 7): False,
        ("torchvision:googlenet+transform-input", 7): True,
        ("torchvision:googlenet+no-transform-input", 1000): False,
    }
    for (name, classes), flag in flags.items():
        assert skeleton(name, classes).transform_input is flag


def test_inputs_are_those_of_the_weights() -> None:
    def inputs(name: str) -> architectures.Inputs:
        return architectures.inputs(name, skeleton(name, 10))

    assert inputs("torchvision:efficientnet_b3").input_size == (300, 300)
    assert inputs("torchvision:efficientnet_b3").resize == 320
    assert inputs("torchvision:efficientnet_v2_l").mean == (0.5, 0.5, 0.5)
    assert inputs("torchvision:swin_t").interpolation == "bicubic"
    # the default weights are for 518 pixels, but the network is built for 224
    assert inputs("torchvision:vit_h_14").input_size == (224, 224)
    assert inputs("torchvision:vit_h_14+518px").input_size == (518, 518)
    assert inputs("torchvision:vit_b_16+96px").resize == 96
    assert inputs("wrn-28-10").mean == architectures.CIFAR_MEAN
    assert inputs("torchvision:resnet18+cifar-stem").input_size == (32, 32)
    assert inputs("torchvision:resnet18+grey").mean == (0.5,)
