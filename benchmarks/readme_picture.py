"""README's picture: six free photographs of scikit-image, each with what the network calls it, its
score and the verdict on it.

    pip install scikit-image
    python -m benchmarks.readme_picture resnet20-12fca82f.th detectors/c2ir-peak.safetensors

The checkpoint is akamaster's ResNet-20 for CIFAR-10, with a model card beside it. The artefact is
what the commands of docs/choosing.md write ("The checkpoint and its accuracy"), with 50 virtual
images a class and the published accuracy of 0.917. Any checkpoint and any calibrated artefact will
do.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from PIL import Image

import oodcli

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "assets" / "verdicts.png"
FPR = 0.05
PHOTOGRAPHS = {
    "chelsea": "CC0, Stéfan van der Walt",
    "coffee": "CC0, Rachel Michetti",
    "rocket": "public domain, SpaceX",
    "retina": "CC0, Mikael Häggström",
    "gravel": "CC0, CC0Textures",
    "hubble_deep_field": "public domain, NASA and ESA",
}
"""Functions of skimage.data whose images are in its wheel, and their licences."""

IN, OUT = "#1a7f37", "#cf222e"


def main(checkpoint: str, artefact: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        squares = [write_square(photograph, folder) for photograph in PHOTOGRAPHS]
        (folder / "list.txt").write_text("\n".join(map(str, squares)), encoding="utf-8")
        scores = folder / "scores.csv"
        oodcli.score(checkpoint, folder / "list.txt", scores, [artefact], fpr=FPR)
        with scores.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        draw(squares, rows, Path(artefact).stem)


def write_square(photograph: str, folder: Path) -> Path:
    """The middle of the photograph, cut to the largest square."""
    read = getattr(import_module("skimage.data"), photograph)
    image = Image.fromarray(read()).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    path = folder / f"{photograph}.png"
    image.crop((left, top, left + side, top + side)).resize((192, 192)).save(path)
    return path


def draw(squares: list[Path], rows: list[dict[str, str]], detector: str) -> None:
    figure, axes = plt.subplots(1, len(squares), figsize=(9.6, 2.36), facecolor="white")
    for axis, square, row in zip(axes, squares, rows, strict=True):
        flagged = row[f"{detector}.ood"] == "1"
        colour = OUT if flagged else IN
        axis.imshow(Image.open(square))
        axis.set(xticks=(), yticks=())
        for side in axis.spines.values():
            side.set(color=colour, linewidth=4)
        lines = (
            (f"“{row['predicted']}”, {float(row['confidence']):.0%} sure", "black", 9.5, "normal"),
            (f"score {float(row[detector]):.1f}".replace("-", "−"), "black", 9.5, "normal"),
            ("OOD" if flagged else "in distribution", colour, 11, "bold"),
        )
        for place, (text, ink, size, weight) in enumerate(lines):
            axis.text(
                0.5,
                -0.07 - 0.15 * place,
                text,
                transform=axis.transAxes,
                ha="center",
                va="top",
                color=ink,
                fontsize=size,
                fontweight=weight,
            )
    figure.subplots_adjust(left=0.01, right=0.99, top=0.96, bottom=0.32, wspace=0.06)
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, dpi=130, metadata={"Software": None})
    Image.open(OUTPUT).convert("RGB").quantize(256).save(OUTPUT, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
