"""Folders of model hubs, which the frameworks themselves save: tiny, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import sklearn.datasets
import torch
from PIL import Image
from torch import Tensor, nn

PICTURES = [
    Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")
]
"""Two photographs, 640 pixels wide and 427 high."""

LABELS = {0: "cat", 1: "dog", 2: "owl", 3: "fox", 4: "elk"}

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]}
SWIN = {
    "image_size": 64,
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
PYRAMID = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 2],
}
SQUARE = {"height": 64, "width": 64}

TRANSFORMERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "ResNet": ("ResNetConfig", STAGES, "ConvNextImageProcessor", {"size": {"shortest_edge": 56}}),
    "RegNet": (
        "RegNetConfig",
        {**STAGES, "groups_width": 8},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 64}, "crop_pct": 0.9},
    ),
    "ConvNext": (
        "ConvNextConfig",
        CONVNEXT,
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 384}},
    ),
    "ConvNextV2": (
        "ConvNextV2Config",
        CONVNEXT,
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 96}},
    ),
    "ViT": ("ViTConfig", VISION, "ViTImageProcessor", {"size": SQUARE}),
    "DeiT": (
        "DeiTConfig",
        VISION,
        "DeiTImageProcessor",
        {"size": {"height": 73, "width": 73}, "crop_size": SQUARE},
    ),
    "Beit": ("BeitConfig", VISION, "BeitImageProcessor", {"size": SQUARE, "crop_size": SQUARE}),
    "Swin": ("SwinConfig", SWIN, "ViTImageProcessor", {"size": SQUARE, "resample": 3}),
    "Swinv2": ("Swinv2Config", SWIN, "ViTImageProcessor", {"size": SQUARE, "resample": 3}),
    "Dinov2": (
        "Dinov2Config",
        {**VISION, "mlp_ratio": 2},
        "BitImageProcessor",
        {"size": {"shortest_edge": 73}, "crop_size": SQUARE, "image_mean": [0.485, 0.456, 0.406]},
    ),
    "MobileNetV1": (
        "MobileNetV1Config",
        {"depth_multiplier": 0.25},
        "MobileNetV1ImageProcessor",
        {"size": {"shortest_edge": 73}, "crop_size": SQUARE},
    ),
    "MobileNetV2": (
        "MobileNetV2Config",
        {"depth_multiplier": 0.25},
        "MobileNetV2ImageProcessor",
        {"size": {"shortest_edge": 73}, "crop_size": SQUARE},
    ),
    "EfficientNet": (
        "EfficientNetConfig",
        {
            "width_coefficient": 0.25,
            "depth_coefficient": 0.3,
            "hidden_dim": 320,
            "image_size": 64,
        },
        "EfficientNetImageProcessor",
        {"size": SQUARE, "resample": 0, "image_std": [0.478, 0.473, 0.474]},
    ),
    "MobileViT": (
        "MobileViTConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64],
            "num_attention_heads": 2,
        },
        "MobileViTImageProcessor",
        {"size": {"shortest_edge": 73}, "crop_size": SQUARE},
    ),
    "Cvt": (
        "CvtConfig",
        {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 64}},
    ),
    "Pvt": (
        "PvtConfig",
        {**PYRAMID, "image_size": 64, "mlp_ratios": [2, 2, 2, 2], "num_labels": 5},
        "PvtImageProcessor",
        {"size": SQUARE},
    ),
    "Levit": (
        "LevitConfig",
        {
            "image_size": 224,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        "LevitImageProcessor",
        {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
    ),
    "Hiera": (
        "HieraConfig",
        {
            "image_size": [64, 64],
            "embed_dim": 16,
            "depths": [1, 1, 2, 1],
            "num_heads": [1, 2, 2, 2],
        },
        "BitImageProcessor",
        {"size": {"shortest_edge": 73}, "crop_size": SQUARE},
    ),
    "Siglip": (
        "SiglipConfig",
        {"vision_config": VISION, "text_config": {**VISION, "vocab_size": 64}},
        "SiglipImageProcessor",
        {"size": SQUARE},
    ),
    "Bit": (
        "BitConfig",
        {**CONVNEXT, "embedding_size": 16, "num_groups": 4},
        "BitImageProcessor",
        {"size": {"shortest_edge": 73}, "crop_size": SQUARE},
    ),
    "FocalNet": (
        "FocalNetConfig",
        {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1]},
        "BitImageProcessor",
        {"size": {"shortest_edge": 73}, "crop_size": SQUARE},
    ),
    "HGNetV2": (
        "HGNetV2Config",
        {
            "stem_channels": [3, 8, 16],
            "stage_in_channels": [16, 32, 32, 32],
            "stage_mid_channels": [8, 8, 8, 8],
            "stage_out_channels": [32, 32, 32, 64],
            "stage_num_blocks": [1, 1, 1, 1],
            "hidden_sizes": [32, 32, 32, 64],
        },
        "BitImageProcessor",
        {"size": {"shortest_edge": 73}, "crop_size": SQUARE},
    ),
    "MobileViTV2": (
        "MobileViTV2Config",
        {"image_size": 64, "width_multiplier": 0.25},
        "MobileViTImageProcessor",
        {"size": {"shortest_edge": 73}, "crop_size": SQUARE},
    ),
    "PoolFormer": (
        "PoolFormerConfig",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        "PoolFormerImageProcessor",
        {"size": {"shortest_edge": 64}, "crop_size": SQUARE, "crop_pct": 0.9},
    ),
    "PvtV2": ("PvtV2Config", {**PYRAMID, "image_size": 64}, "PvtImageProcessor", {"size": SQUARE}),
    "Segformer": ("SegformerConfig", PYRAMID, "SegformerImageProcessor", {"size": SQUARE}),
    "SwiftFormer": (
        "SwiftFormerConfig",
        {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        "ViTImageProcessor",
        {"size": {"height": 224, "width": 224}},
    ),
    "Data2VecVision": (
        "Data2VecVisionConfig",
        VISION,
        "BeitImageProcessor",
        {"size": SQUARE, "crop_size": SQUARE},
    ),
    "Dinov2WithRegisters": (
        "Dinov2WithRegistersConfig",
        {**VISION, "mlp_ratio": 2},
        "BitImageProcessor",
        {"size": {"shortest_edge": 73}, "crop_size": SQUARE},
    ),
    "IJepa": ("IJepaConfig", VISION, "ViTImageProcessor", {"size": SQUARE}),
    "ViTMSN": ("ViTMSNConfig", VISION, "ViTImageProcessor", {"size": SQUARE}),
    "CLIP": (
        "CLIPConfig",
        {"vision_config": VISION, "text_config": {**VISION, "vocab_size": 64}},
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 64}, "crop_size": SQUARE},
    ),
}
"""Family → configuration and its arguments, image processor and its arguments."""

TIMM = (
    *("test_coatnet", "test_convnext2", "test_efficientnet", "test_maxvit"),
    *("test_nfnet", "test_resnet", "test_vit3"),
    *("swin_tiny_patch4_window7_224", "mobilenetv3_small_050"),
    *("deit_tiny_distilled_patch16_224", "repvgg_a0", "densenet121"),
    *("resnetv2_50x1_bit", "dla46_c", "hgnetv2_b0", "inception_next_atto", "repvit_m0_9"),
)
"""Small networks of timm."""


def randomise(network: nn.Module) -> nn.Module:
    """Weights and statistics that leave no layer without effect: many initialisations are 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.3 * noise.abs())
            elif tensor.ndim <= 1:
                tensor.add_(0.1 * noise)
            else:
                tensor.copy_(noise / max(1, tensor[0].numel()) ** 0.5)
    return network.eval()


def transformers_folder(family: str, folder: Path, **saving: Any) -> nn.Module:
    """Saves a tiny network of the family with its image processor."""
    import transformers

    config, arguments, processor, settings = TRANSFORMERS[family]
    made = getattr(transformers, config)(**arguments, id2label=LABELS)
    network: Any = getattr(transformers, f"{family}ForImageClassification")(made)
    randomise(network)
    network.save_pretrained(folder, **saving)
    getattr(transformers, processor)(**settings).save_pretrained(folder)
    return cast(nn.Module, network)


def transformers_logits(folder: Path, network: nn.Module, backend: str | None = "pil") -> Tensor:
    """transformers' own pipeline on the PICTURES."""
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend=backend)
    images = [Image.open(path).convert("RGB") for path in PICTURES]
    with torch.no_grad():
        found: Tensor = network(**processor(images, return_tensors="pt")).logits
    return found


def timm_folder(name: str, folder: Path, *, safe: bool = True, **arguments: Any) -> nn.Module:
    """Saves a network of timm as timm does."""
    import timm
    from timm.models._hub import save_for_hf

    network = randomise(timm.create_model(name, **arguments))
    kept = {key: value for key, value in arguments.items() if key != "num_classes"}
    save_for_hf(network, folder, model_args=kept, safe_serialization=safe)
    return network


def timm_logits(network: nn.Module) -> Tensor:
    """timm's own pipeline on the PICTURES."""
    from timm.data import create_transform, resolve_model_data_config

    transform = create_transform(**resolve_model_data_config(network), is_training=False)
    images = [transform(Image.open(path).convert("RGB")) for path in PICTURES]
    with torch.no_grad():
        found: Tensor = network(torch.stack(images))
    return found


def alike(ours: Tensor, theirs: Tensor, within: float = 1e-3) -> bool:
    """Whether logits differ by less than that part of their spread, with the same classes."""
    spread = float(theirs.max() - theirs.min())
    same = bool((ours.argmax(1) == theirs.argmax(1)).all())
    return same and float((ours - theirs).abs().max()) < within * spread
