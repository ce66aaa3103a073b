"""Folders of model hubs: the network, its classes and its inputs come from the configuration."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import oodcli as oodcli_command
from hub_folders import (
    LABELS,
    PICTURES,
    alike,
    timm_folder,
    timm_logits,
    transformers_folder,
    transformers_logits,
)
from torch import Tensor

import oodcli
from oodcli.errors import CheckpointError
from oodcli.files.hashes import file_sha256
from oodcli.files.hub import card_path, checkpoint_sha256, companions, shipped_as, weights_of
from oodcli.images.pixels import Target, fit
from oodcli.networks.card import read_card, write_card
from oodcli.networks.classifier import Classifier


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


needs_timm = pytest.mark.skipif(not _has("timm"), reason="no timm")
needs_transformers = pytest.mark.skipif(not _has("transformers"), reason="no transformers")


def logits_of(classifier: Classifier, tmp_path: Path) -> Tensor:
    images = tmp_path / "pictures.txt"
    images.write_text("\n".join(map(str, PICTURES)), encoding="utf-8")
    found = oodcli.record(classifier, images, {"logits", "embedding"})
    assert found.logits is not None
    assert found.embedding is not None
    return found.logits


@needs_transformers
@pytest.mark.parametrize("family", ["ResNet", "ViT", "MobileViT"])
def test_a_folder_of_transformers_gives_its_own_logits(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "network"
    network = transformers_folder(family, folder)
    for path in (folder, folder / "model.safetensors"):
        classifier = oodcli.load_classifier(path)
        assert classifier.arch == f"transformers:{family}ForImageClassification"
        assert classifier.class_names == tuple(LABELS.values())
        assert alike(logits_of(classifier, tmp_path), transformers_logits(folder, network))
        assert any("from config.json" in each for each in classifier.assumptions)
        assert any("from preprocessor_config.json" in each for each in classifier.assumptions)


@needs_timm
@pytest.mark.parametrize(
    ("name", "safe", "arguments"),
    [
        ("test_resnet", True, {"num_classes": 5}),
        ("test_vit2", False, {"num_classes": 3, "img_size": 96, "global_pool": "avg"}),
        ("test_efficientnet", True, {"num_classes": 4, "in_chans": 3}),
    ],
)
def test_a_folder_of_timm_gives_its_own_logits(
    name: str, safe: bool, arguments: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "network"
    network = timm_folder(name, folder, safe=safe, **arguments)
    classifier = oodcli.load_classifier(folder)
    assert alike(logits_of(classifier, tmp_path), timm_logits(network))
    assert classifier.num_classes == arguments["num_classes"]
    assert any("from config.json" in each for each in classifier.assumptions)


@needs_timm
def test_names_of_timm_come_from_the_configuration(tmp_path: Path) -> None:
    timm_folder("test_resnet", tmp_path, num_classes=3)
    names = ["n02123045", "n02086240", "n02085620"]
    about = {"n02123045": "tabby, tabby cat", "n02086240": "Shih-Tzu", "n02085620": "Chihuahua"}
    change(tmp_path / "config.json", label_names=names, label_descriptions=about)
    assert oodcli.load_classifier(tmp_path).class_names == tuple(about[name] for name in names)
    change(tmp_path / "config.json", label_names=["cat", "dog"], label_descriptions=None)
    classifier = oodcli.load_classifier(tmp_path)
    assert classifier.class_names == ("0", "1", "2")
    assert "2 class names from config.json ignored" in " ".join(classifier.assumptions)


def change(path: Path, **values: Any) -> None:
    """Sets keys of a JSON file; those that are None are removed."""
    found = json.loads(path.read_text("utf-8")) | values
    kept = {key: value for key, value in found.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


@needs_transformers
def test_parts_of_weights_are_put_together(tmp_path: Path) -> None:
    network = transformers_folder("ViT", tmp_path, max_shard_size="30KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 1
    assert weights_of(tmp_path) == tuple(parts)
    classifier = oodcli.load_classifier(tmp_path)
    assert alike(logits_of(classifier, tmp_path), transformers_logits(tmp_path, network))
    assert classifier.sha256 == file_sha256(*parts) == checkpoint_sha256(tmp_path)
    with pytest.raises(CheckpointError, match="one part of several: give the folder"):
        oodcli.load_classifier(parts[0])
    assert set(companions(tmp_path)) >= {
        f"{tmp_path.name}/{each.name}" for each in (*parts, tmp_path / "config.json")
    }
    assert shipped_as(tmp_path) == tmp_path.name
    parts[-1].unlink()
    with pytest.raises(CheckpointError, match="is missing: copy the folder again"):
        oodcli.load_classifier(tmp_path)


@needs_timm
def test_the_card_of_a_folder_is_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "net.a1_in1k"
    timm_folder("test_resnet", folder, num_classes=3, stem_width=16)
    first = oodcli.load_classifier(folder, input_size=(64, 64), class_names=("a", "b", "c"))
    assert card_path(folder) == folder / "oodcli.toml"
    write_card(first, card_path(folder))
    arch = read_card(folder / "oodcli.toml")["arch"]
    assert arch.startswith("timm:test_resnet?")
    assert "stem_width=16" in arch
    for path in (folder, folder / "model.safetensors"):
        again = oodcli.load_classifier(path)
        assert again.class_names == ("a", "b", "c")
        assert again.preprocessing == first.preprocessing
        assert again.arch == first.arch
    (folder / "oodcli.toml").rename(tmp_path / "net.a1_in1k.toml")
    assert card_path(folder) == tmp_path.resolve() / "net.a1_in1k.toml"
    assert oodcli.load_classifier(folder).class_names == ("a", "b", "c")


@needs_timm
def test_another_arch_wins_over_the_configuration(tmp_path: Path) -> None:
    timm_folder("test_resnet", tmp_path, num_classes=3)
    change(tmp_path / "config.json", architecture="no_such_network")
    with pytest.raises(CheckpointError, match="no_such_network"):
        oodcli.load_classifier(tmp_path)
    assert oodcli.load_classifier(tmp_path, arch="timm:test_resnet").num_classes == 3


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"without model.safetensors .*\(nothing\)"):
        oodcli.load_classifier(tmp_path)
    (tmp_path / "tf_model.h5").touch()
    with pytest.raises(CheckpointError, match=r"only tf_model.h5"):
        oodcli.load_classifier(tmp_path)


VIT = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "image_size": 32,
    "patch_size": 16,
}
HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("does not run", {"auto_map": {"AutoModel": "evil.Net"}}),
    ("quantised", {"quantization_config": {"load_in_4bit": True}}),
    ("no classifier of images", {"architectures": ["ViTModel"]}),
    ("no classifier of images", {"architectures": ["os.system"]}),
    ("no classifier of images", {"architectures": [["a"]]}),
    (
        "patches of pictures in their own shape",
        {"architectures": ["Siglip2ForImageClassification"]},
    ),
    ("one of a few colours", {"architectures": ["ImageGPTForImageClassification"]}),
    ("make no ViTForImageClassification", {"model_type": "no-such-type"}),
    ("make no ViTForImageClassification", {"model_type": ["vit"]}),
    ("make no ViTForImageClassification", {"hidden_size": "eight"}),
    ("make no ViTForImageClassification", {"hidden_size": -4}),
    ("larger than 1048576", {"hidden_size": 10**12}),
    ("far larger than the weights", {"num_hidden_layers": 100_000}),
    ("far larger than the weights", {"hidden_size": 100_000, "intermediate_size": 100_000}),
    ("lacks weights", {"num_hidden_layers": 2}),
]


@needs_transformers
@pytest.mark.parametrize(("sentence", "values"), HOSTILE)
def test_hostile_configurations_get_one_sentence(
    sentence: str, values: dict[str, Any], vit: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(vit, tmp_path / "network"))
    change(folder / "config.json", **values)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        oodcli.load_classifier(folder)
    assert "\n" not in caught.value.text


@needs_transformers
def test_a_processor_that_cannot_be_followed_needs_a_resize(vit: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(vit, tmp_path / "network"))
    size = {"shortest_edge": 48, "longest_edge": 50}
    crop = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    change(folder / "preprocessor_config.json", size=size, **crop)
    with pytest.raises(CheckpointError, match="in a way that oodcli cannot: say how"):
        oodcli.load_classifier(folder)
    assert oodcli.load_classifier(folder, resize=48).preprocessing.input_size == (32, 32)


@needs_transformers
def test_the_nearest_resize_is_proposed(vit: Path, tmp_path: Path) -> None:
    """Of Perceiver's processor, which crops before it resizes."""
    folder = Path(shutil.copytree(vit, tmp_path / "network"))
    said = {"image_processor_type": "PerceiverImageProcessor", "resample": 3}
    sizes = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 40, "width": 40}}
    (folder / "preprocessor_config.json").write_text(json.dumps(said | sizes), encoding="utf-8")
    with pytest.raises(CheckpointError, match="; --resize 40 --interpolation bicubic is nearest"):
        oodcli.load_classifier(folder)


@needs_transformers
def test_a_processor_that_leaves_sizes_open_needs_a_crop(vit: Path, tmp_path: Path) -> None:
    """As TextNet's, which resizes the shorter side and crops nothing."""
    folder = Path(shutil.copytree(vit, tmp_path / "network"))
    said = {"image_processor_type": "TextNetImageProcessor", "size": {"shortest_edge": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"other shapes other sizes.*images of 32x32"):
        oodcli.load_classifier(folder)
    assert oodcli.load_classifier(folder, crop="center").preprocessing.resize == 32


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("vit")
    network = ViTForImageClassification(ViTConfig(**VIT))
    network.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("impossible size", {"size": {"height": 10**6, "width": 10**6}}),
    ("impossible size", {"size": 0}),
    ("impossible size", {"crop_pct": 1e-9}),
    ("impossible size", {"size": {"height": 10**12, "width": 4}}),
    ("cannot be used by transformers", {"image_mean": "grey"}),
    ("cannot be used by transformers", {"image_processor_type": "os.system"}),
    ("cannot be used by transformers", {"rescale_factor": "a"}),
    ("does not run", {"auto_map": {"AutoImageProcessor": "evil.Images"}}),
    (
        "in a way that oodcli cannot, or pads",
        {"do_pad": True, "pad_size": {"height": 64, "width": 64}},
    ),
]


@needs_transformers
@pytest.mark.parametrize(("sentence", "values"), PROCESSORS)
def test_hostile_processors_get_one_sentence(
    sentence: str, values: dict[str, Any], vit: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(vit, tmp_path / "network"))
    change(folder / "preprocessor_config.json", **values)
    with pytest.raises(CheckpointError, match=sentence):
        oodcli.load_classifier(folder)


@pytest.mark.parametrize(
    ("sentence", "text"),
    [
        ("not valid JSON", "{"),
        ("not valid JSON", "[" * 100_000),
        ("expected an object", "[1]"),
        ("lists no weights", '{"weight_map": {}}'),
        ("lists no weights", '{"weight_map": 3}'),
        ("is not the name of a part", '{"weight_map": {"a": "../../x.safetensors"}}'),
        ("is not the name of a part", '{"weight_map": {"a": "/etc/passwd"}}'),
        ("is missing", '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
    ],
)
def test_hostile_indices_get_one_sentence(sentence: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=sentence):
        oodcli.load_classifier(tmp_path)


@needs_timm
@pytest.mark.parametrize(
    ("sentence", "values"),
    [
        ("names no network of timm", {"architecture": "hf-hub:timm/resnet18"}),
        ("names no network of timm", {"architecture": "../x"}),
        ("Unknown model", {"architecture": "nothing"}),
        ("is not the name of a model of timm or of an argument", {"model_args": {"pretrained": 1}}),
        ("is not the name", {"model_args": {"checkpoint_path": "x.pt"}}),
        ("far larger than the weights", {"model_args": {"layers": [1, 1, 1, 100_000]}}),
        ("makes no sense", {"pretrained_cfg": {"mean": "abc"}}),
        ("positive", {"pretrained_cfg": {"crop_pct": -1}}),
        ("cannot be made", {"pretrained_cfg": {"input_size": [3]}}),
    ],
)
def test_hostile_configurations_of_timm_get_one_sentence(
    sentence: str, values: dict[str, Any], tmp_path: Path
) -> None:
    timm_folder("test_resnet", tmp_path, num_classes=3)
    change(tmp_path / "config.json", **values)
    with pytest.raises(CheckpointError, match=sentence):
        oodcli.load_classifier(tmp_path)


def test_half_a_pixel_before_the_crop_is_rounded_as_transformers_does() -> None:
    from PIL import Image

    picture = Image.fromarray(torch.arange(11, dtype=torch.uint8).repeat(8, 1).numpy())
    target = Target((8, 8), 1, 8, "nearest", "turn", None)
    assert fit(picture, target)[0, 0, 0] == 2  # 1.5 to even
    assert fit(picture, target._replace(crop_rounding="down"))[0, 0, 0] == 1


@needs_timm
def test_a_folder_goes_to_a_cluster_with_all_its_files(tmp_path: Path) -> None:
    from oodcli.networks.card import NOTHING
    from oodcli.stages.ray import Network

    folder = tmp_path / "net.v1"
    timm_folder("test_resnet", folder, num_classes=3)
    (folder / "oodcli.toml").write_text('class_names = ["a", "b", "c"]\n', encoding="utf-8")
    here = oodcli.load_classifier(folder)
    for path in (folder, folder / "model.safetensors"):
        sent = Network.of(path, NOTHING, prefer_ema=False, trust_pickle=False)
        there = sent.load("cpu")
        assert (there.sha256, there.arch) == (here.sha256, here.arch)
        assert there.preprocessing == here.preprocessing
        assert there.class_names == ("a", "b", "c")


@needs_timm
def test_inspect_and_score_take_a_folder(tmp_path: Path) -> None:
    from commands import oodcli as run

    folder = tmp_path / "net"
    timm_folder("test_resnet", folder, num_classes=3)
    inspected = run("inspect", folder, "--json", "--write-card")
    found = json.loads(inspected.out)
    assert found["checkpoint"] == str(folder)
    assert found["arch"].startswith("timm:test_resnet")
    assert (folder / "oodcli.toml").is_file()
    assert "from config.json" in inspected.err
    done = run("score", folder, "noise:uniform?n=2", "-d", "energy", "-o", tmp_path / "s.csv")
    assert done.status == 0
    verified = run("inspect", "--verify", tmp_path / "s.csv", folder)
    assert found["sha256"][:12] in verified.out


@needs_transformers
def test_a_configuration_of_several_labels_is_recognised(vit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "several"
    shutil.copytree(vit, folder)
    assert not oodcli.load_classifier(folder).multi_label
    change(folder / "config.json", problem_type="multi_label_classification")
    classifier = oodcli.load_classifier(folder)
    assert classifier.multi_label
    assert any("several labels an image" in each for each in classifier.assumptions)


@needs_transformers
def test_details_name_the_files_of_the_folder(vit: Path) -> None:
    details = oodcli_command("inspect", vit, "-v").err.splitlines()
    assert "detail: 2 classes, from config.json" in details
    assert "detail: input size 32x32, from preprocessor_config.json" in details
    given = oodcli_command("inspect", vit, "-v", "--arch", "transformers:ViTForImageClassification")
    assert "by --arch" in given.err
