"""docs/pixels.md: what it claims of torchvision, timm and transformers is measured here."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from networks import randomised
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import models, transforms

from oodcli import api
from oodcli.errors import CheckpointError
from oodcli.images.decoding import decode_rows
from oodcli.images.pixels import load_file
from oodcli.images.reading import assembled
from oodcli.networks import architectures
from oodcli.networks.card import Overrides
from oodcli.networks.inputs import preprocessing_of
from oodcli.networks.load import load_classifier
from oodcli.networks.makers import TimmMaker
from oodcli.networks.preprocessing import Preprocessing

PAGE = (Path(__file__).parents[2] / "docs" / "pixels.md").read_text("utf-8")
HALF = (0.5, 0.5, 0.5)
NOTHING = Overrides()
SIZES = [(500, 375), (375, 500), (900, 301), (64, 64), (333, 1000)]


def table(first: str) -> dict[str, dict[str, str]]:
    """The page's table whose first column is called so: row → column → cell."""
    lines = iter(PAGE.splitlines())
    head = next(line for line in lines if line.startswith(f"| {first} |"))
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    next(lines)
    found = {}
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found[cells[0]] = dict(zip(columns, cells, strict=True))
    return found


def photograph(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A JPEG of random colours: smooth, with sharp pixels in it. size: width, height."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize(size, Image.Resampling.BICUBIC))
    pixels[random.random(pixels.shape[:2]) < 0.05] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return Image.open(stream).convert("RGB")


def ours(image: Image.Image | Path, preprocessing: Preprocessing) -> Tensor:
    """The network's input, (C, H, W)."""
    load = (lambda: image) if isinstance(image, Image.Image) else (lambda: load_file(image))
    rows = decode_rows(torch.zeros(1, dtype=torch.int64), [load], preprocessing)
    assert rows.errors == [None]
    return assembled([""], [rows], preprocessing).images[0]


# --- what is read ---------------------------------------------------------------------------


def deep(kind: type, full: float) -> Image.Image:
    levels = np.asarray(photograph((40, 30)).convert("L")).astype(np.float64)
    return Image.fromarray((levels / 255 * full).astype(kind))


def stored(name: str, folder: Path) -> Path:
    """A file of the kind that a row of the page names."""
    image = photograph((40, 30))
    random = np.random.default_rng(1)
    alpha = Image.fromarray(random.integers(0, 256, (30, 40), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "RGB": (image, "jpg", {}),
        "L": (image.convert("L"), "jpg", {}),
        "P": (image.quantize(64), "png", {}),
        "P, transparent": (image.quantize(64), "png", {"transparency": 3}),
        "1": (image.convert("1"), "png", {}),
        "RGBA": (Image.merge("RGBA", (*image.split(), alpha)), "png", {}),
        "LA": (Image.merge("LA", (image.convert("L"), alpha)), "png", {}),
        "CMYK": (image.convert("CMYK"), "jpg", {}),
        "I;16": (deep(np.uint16, 65535), "png", {}),
        "I": (deep(np.int32, 65535), "tif", {}),
        "F": (deep(np.float32, 1), "tif", {}),
        "RGB, turned by EXIF": (image, "jpg", {"exif": exif}),
    }
    picture, suffix, options = made[name]
    path = folder / f"x.{suffix}"
    picture.save(path, **options)
    with Image.open(path) as again:
        assert again.mode == name.partition(",")[0]
    return path


def converted(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def loaded_by_transformers(path: Path) -> Image.Image:
    pytest.importorskip("transformers")
    from transformers.image_utils import load_image

    return load_image(str(path))


READERS = {"torchvision, timm": converted, "transformers": loaded_by_transformers}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("column", READERS)
@pytest.mark.parametrize("name", table("stored as"))
def test_what_is_read(name: str, column: str, tmp_path: Path) -> None:
    cell = table("stored as")[name][column]
    path = stored(name, tmp_path)
    theirs = transforms.ToTensor()(READERS[column](path))
    exif = "keep" if "`--exif keep`" in cell else "turn"
    plain = Preprocessing(tuple(theirs.shape[1:]), (0.0,) * 3, (1.0,) * 3, exif=exif)
    assert torch.equal(ours(path, plain), theirs) == cell.startswith("equal")
    if column == "torchvision, timm":
        default = torchvision.datasets.folder.default_loader(str(path))
        assert torch.equal(transforms.ToTensor()(default), theirs)
    if not cell.startswith("equal"):  # what is said of it is so
        values = np.asarray(Image.open(path)).astype(np.float64)
        clipped = np.clip(values, 0, 255) if "clips" in cell else np.floor(values)
        assert np.array_equal(np.array(READERS[column](path))[..., 0], clipped)
        full = 1 if name == "F" else 65535
        expected = np.rint(values / full * 255) / 255
        np.testing.assert_allclose(ours(path, plain)[0], expected, atol=1e-6)


def test_a_tiff_is_turned_by_pillow(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photograph((40, 30))
    image.save(tmp_path / "x.tif", exif=exif)
    for how in ("keep", "turn"):
        plain = Preprocessing((40, 30), (0.0,) * 3, (1.0,) * 3, exif=how)
        turned = transforms.ToTensor()(image.transpose(Image.Transpose.ROTATE_270))
        assert torch.equal(ours(tmp_path / "x.tif", plain), turned)


# --- how it is resized ----------------------------------------------------------------------

RESIZES = {"straight": None, "shorter side, crop": 256, "both sides, crop": (256, 256)}


def by_torchvision(resize: Any, kind: str) -> Callable[[Image.Image], Tensor]:
    mode = transforms.InterpolationMode(kind)
    size = (224, 224) if resize is None else resize
    steps = [transforms.Resize(size, mode), transforms.CenterCrop(224)]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(HALF, HALF)])


def by_timm(resize: Any, kind: str) -> Callable[[Image.Image], Tensor]:
    timm = pytest.importorskip("timm")
    return timm.data.create_transform(
        (3, 224, 224),
        is_training=False,
        interpolation=kind,
        mean=HALF,
        std=HALF,
        crop_pct=1.0 if resize is None else 0.875,
        crop_mode="center" if resize == 256 else "squash",
    )


def by_transformers(suffix: str) -> Callable[[Any, str], Callable[[Image.Image], Tensor]]:
    def made(resize: Any, kind: str) -> Callable[[Image.Image], Tensor]:
        transformers = pytest.importorskip("transformers")
        common = {"resample": {"bilinear": 2, "bicubic": 3}[kind]}
        common |= {"image_mean": HALF, "image_std": HALF}
        vit = getattr(transformers, f"ViTImageProcessor{suffix}", transformers.ViTImageProcessor)
        if resize is None:
            processor = vit(size={"height": 224, "width": 224}, **common)
        elif resize == 256:
            convnext = getattr(transformers, f"ConvNextImageProcessor{suffix}")
            processor = convnext(size={"shortest_edge": 224}, crop_pct=0.875, **common)
        else:
            crop = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
            processor = vit(size={"height": 256, "width": 256}, **crop, **common)
        return lambda image: torch.as_tensor(
            processor(image, return_tensors="pt")["pixel_values"][0]
        )

    return made


LIBRARIES = {
    "torchvision": by_torchvision,
    "timm": by_timm,
    "transformers, Pil": by_transformers("Pil"),
    "transformers, default": by_transformers(""),
}


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", table("resize"))
def test_how_it_is_resized(name: str, library: str, kind: str) -> None:
    cell = table("resize")[name][library]
    theirs = LIBRARIES[library](RESIZES[name], kind)
    preprocessing = Preprocessing((224, 224), HALF, HALF, RESIZES[name], kind)
    differences = []
    for seed, size in enumerate(SIZES):
        image = photograph(size, seed)
        expected, found = theirs(image), ours(image, preprocessing)
        assert expected.shape == found.shape
        differences.append(float((expected - found).abs().max()) / 2 * 255)  # grey levels
    if cell == "equal":
        assert max(differences) < 1e-4
    else:
        most = re.fullmatch(r"within (\d+) grey levels; bicubic (\d+)", cell)
        assert most, cell
        assert 0.5 < max(differences) < int(most[2 if kind == "bicubic" else 1]) + 1e-3


def test_where_transformers_crops_one_pixel_beside() -> None:
    theirs = LIBRARIES["transformers, Pil"](256, "bicubic")
    preprocessing = Preprocessing((224, 224), HALF, HALF, 256, "bicubic")
    seen = set()
    for height in range(373, 389):
        image = photograph((500, height))
        margin = int(256 * 500 / height) - 224
        same = torch.allclose(theirs(image), ours(image, preprocessing), atol=1e-5)
        assert same == (margin % 4 != 3), (height, margin)
        seen.add(margin % 4)
    assert seen == {0, 1, 2, 3}


# --- whole libraries ------------------------------------------------------------------------


@pytest.mark.slow
def test_all_pretrained_configurations_of_timm() -> None:
    """Each different one on pictures of several sizes; the page has a count of timm 1.0.31."""
    timm = pytest.importorskip("timm")
    maker = TimmMaker("timm:x")
    groups = defaultdict(list)
    for name in timm.list_pretrained():
        config = timm.models.get_pretrained_cfg(name).to_dict()
        groups[str(sorted(timm.data.resolve_data_config(pretrained_cfg=config).items()))].append(
            (name, config)
        )
    images = [photograph(size) for size in (*SIZES, (640, 640))]
    classifiers = 0
    for found in groups.values():
        name, config = found[0]
        data = timm.data.resolve_data_config(pretrained_cfg=config)
        network = SimpleNamespace(pretrained_cfg=config)
        if data["crop_mode"] == "border":
            with pytest.raises(CheckpointError, match="border"):
                preprocessing_of(Overrides(), {}, maker.inputs(network))
            assert not any(config["num_classes"] for _, config in found), name
            continue
        preprocessing, _ = preprocessing_of(Overrides(), {}, maker.inputs(network))
        theirs = timm.data.create_transform(**data, is_training=False)
        for image in images:
            assert torch.equal(theirs(image), ours(image, preprocessing)), (name, image.size)
        classifiers += sum(config["num_classes"] > 0 for _, config in found)
    if timm.__version__ == "1.0.31":
        counts = [int(n.replace(",", "")) for n in re.findall(r"\b1,\d{3}\b", PAGE)]
        assert counts == [classifiers]


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "efficientnet_b3", "swin_t", "inception_v3"]
)
def test_the_presets_of_torchvisions_weights(name: str) -> None:
    network = architectures.skeleton(f"torchvision:{name}", 1000)
    inputs = architectures.inputs(f"torchvision:{name}", network)
    preprocessing, _ = preprocessing_of(Overrides(), {}, inputs)
    theirs = models.get_model_weights(name).DEFAULT.transforms()
    for seed, size in enumerate(SIZES):
        image = photograph(size, seed)
        assert torch.equal(theirs(image), ours(image, preprocessing)), size


def test_timm_at_another_size_and_what_cannot_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")

    def prepared(said: Overrides = NOTHING, **config: Any) -> Preprocessing:
        plain = {"input_size": (3, 224, 224), "mean": HALF, "std": HALF, "crop_pct": 0.9}
        plain |= {"interpolation": "bicubic", "crop_mode": "center"}
        inputs = TimmMaker("timm:x").inputs(SimpleNamespace(pretrained_cfg={**plain, **config}))
        return preprocessing_of(said, {}, inputs)[0]

    for mode, sides in (("center", (160, 384)), ("squash", (160, 384))):
        for side in sides:
            found = prepared(Overrides(input_size=(side, side)), crop_mode=mode)
            theirs = timm.data.create_transform(
                (3, side, side),
                interpolation="bicubic",
                mean=HALF,
                std=HALF,
                crop_pct=0.9,
                crop_mode=mode,
            )
            image = photograph((500, 375))
            assert torch.equal(theirs(image), ours(image, found)), (mode, side)
    wide = {"input_size": (3, 96, 160)}
    squashed = prepared(crop_mode="squash", **wide)
    assert squashed.resize == (106, 177)
    theirs = timm.data.create_transform(
        (3, 96, 160), interpolation="bicubic", mean=HALF, std=HALF, crop_pct=0.9, crop_mode="squash"
    )
    assert torch.equal(theirs(image), ours(image, squashed))
    for config, words, way in (
        ({"crop_mode": "border"}, "whole images with a border", Overrides(crop="squash")),
        ({"crop_mode": "border"}, "whole images with a border", Overrides(resize=256)),
        (wide, "until they cover 96x160", Overrides(crop="squash")),
        (wide, "until they cover 96x160", Overrides(resize=180)),
        ({"interpolation": "random"}, "'random'", Overrides(interpolation="bilinear")),
    ):
        with pytest.raises(CheckpointError, match=words):
            prepared(**config)
        prepared(way, **config)
    for kind in ("box", "hamming", "lanczos", "nearest"):
        assert prepared(interpolation=kind).interpolation == kind
    assert prepared(Overrides(crop="center"), crop_mode="squash").resize == 248
    assert prepared(Overrides(crop="squash")).resize == (248, 248)
    assert prepared(crop_mode="squash", crop_pct=1.0).resize is None


# --- logits ---------------------------------------------------------------------------------


def scored(path: Path, folder: Path, **given: Any) -> tuple[Tensor, torch.nn.Module]:
    classifier = load_classifier(path, Overrides(**given))
    return api.record(classifier, folder, ["logits"]).logits, classifier.network


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for seed, size in enumerate(SIZES):
        photograph(size, seed).save(tmp_path / "pictures" / f"{seed}.jpg", quality=95)
    return tmp_path / "pictures"


def theirs_of(pictures: Path, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    return torch.stack([transform(converted(path)) for path in sorted(pictures.iterdir())])


def test_logits_of_torchvision(tmp_path: Path, pictures: Path) -> None:
    torch.manual_seed(0)
    network = randomised(models.shufflenet_v2_x0_5(num_classes=5)).eval()
    torch.save(network.state_dict(), tmp_path / "net.pt")
    transform = models.ShuffleNet_V2_X0_5_Weights.DEFAULT.transforms()
    with torch.no_grad():
        expected = network(theirs_of(pictures, transform))
    for given in ({}, {"input_size": (224, 224)}):
        found, _ = scored(tmp_path / "net.pt", pictures, **given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    other, _ = scored(tmp_path / "net.pt", pictures, crop="squash")
    assert not torch.allclose(other, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_logits_of_timm(mode: str, tmp_path: Path, pictures: Path, monkeypatch: Any) -> None:
    timm = pytest.importorskip("timm")
    name = "test_convnext.r160_in1k"
    create = timm.create_model

    def created(*args: Any, **settings: Any) -> Any:
        return create(*args, **settings, pretrained_cfg_overlay={"crop_mode": mode})

    monkeypatch.setattr(timm, "create_model", created)
    torch.manual_seed(0)
    network = randomised(created(name, num_classes=5)).eval()
    torch.save(network.state_dict(), tmp_path / "net.pt")
    data = timm.data.resolve_model_data_config(network)
    assert data["crop_mode"] == mode
    with torch.no_grad():
        expected = network(theirs_of(pictures, timm.data.create_transform(**data)))
    found, _ = scored(tmp_path / "net.pt", pictures, arch=f"timm:{name}")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    other, _ = scored(
        tmp_path / "net.pt",
        pictures,
        arch=f"timm:{name}",
        crop={"center": "squash", "squash": "center"}[mode],
    )
    assert not torch.allclose(other, expected, rtol=1e-3, atol=1e-4)


def test_an_upright_photograph_for_transformers(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    image = photograph((40, 30))
    image.save(tmp_path / "x.jpg", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "x.jpg"))
    plain = Preprocessing((40, 30), (0.0,) * 3, (1.0,) * 3)
    assert torch.equal(ours(tmp_path / "x.jpg", plain), transforms.ToTensor()(upright))
