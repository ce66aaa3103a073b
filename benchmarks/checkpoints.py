"""Networks that transformers, timm and torchvision make, loaded by oodcli: how far its logits are
from those of the library's own pipeline on two photographs.

    python -m benchmarks.checkpoints [write]

``write`` puts the table into docs/checkpoints.md. The networks are small, with random weights; the
slow tests compare the same ones. Takes some minutes.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from PIL import Image
from torch import Tensor

import oodcli

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from hub_folders import (  # noqa: E402
    PICTURES,
    TIMM,
    TRANSFORMERS,
    randomise,
    timm_folder,
    timm_logits,
    transformers_folder,
    transformers_logits,
)

PAGE = ROOT / "docs" / "checkpoints.md"
START, END = "<!-- logits -->\n", "<!-- end of logits -->\n"
TORCHVISION = (
    *("resnet18", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "swin_t"),
    "squeezenet1_1",
)


class Compared(NamedTuple):
    """difference: the largest of the logits, in parts of their spread. same: whether the classes
    with the highest logits are the same. embedding: whether oodcli records one."""

    library: str
    name: str
    difference: float
    same: bool
    embedding: bool
    batchnorm: bool


def compare(library: str, name: str, path: Path, theirs: Tensor, folder: Path) -> Compared:
    """path: of the checkpoint. theirs: logits of the library's pipeline on the PICTURES."""
    classifier = oodcli.load_classifier(path)
    listed = folder / "pictures.txt"
    listed.write_text("\n".join(map(str, PICTURES)), encoding="utf-8")
    ours = oodcli.record(classifier, listed, {"logits"}).logits
    assert ours is not None
    difference = (ours - theirs).abs().max() / (theirs.max() - theirs.min())
    same = bool((ours.argmax(1) == theirs.argmax(1)).all())
    batchnorm = any(tap.kind == "batchnorm" for tap in classifier.taps)
    return Compared(
        library, name, float(difference), same, classifier.head_name is not None, batchnorm
    )


def compared() -> Iterator[Compared]:
    for family in TRANSFORMERS:
        with tempfile.TemporaryDirectory() as place:
            network = transformers_folder(family, Path(place) / "network")
            theirs = transformers_logits(Path(place) / "network", network)
            yield compare("transformers", family, Path(place) / "network", theirs, Path(place))
    for name in TIMM:
        with tempfile.TemporaryDirectory() as place:
            network = timm_folder(name, Path(place) / "network", num_classes=5)
            theirs = timm_logits(network)
            yield compare("timm", name, Path(place) / "network", theirs, Path(place))
    for name in TORCHVISION:
        with tempfile.TemporaryDirectory() as place:
            network = randomise(torchvision.models.get_model(name, num_classes=1000))
            torch.save(network.state_dict(), Path(place) / f"{name}.pth")
            transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
            images = [transform(Image.open(path).convert("RGB")) for path in PICTURES]
            with torch.no_grad():
                theirs = network(torch.stack(images))
            yield compare("torchvision", name, Path(place) / f"{name}.pth", theirs, Path(place))


def _shown(each: Compared) -> str:
    parts = (
        f"{each.name} {each.difference:.0e}" if each.difference else f"{each.name} 0",
        "" if each.same else " (another class)",
        "" if each.embedding else " (no embedding)",
    )
    return "".join(parts)


def table(found: list[Compared]) -> str:
    lines = ["| library | with BatchNorm | without |", "| --- | --- | --- |"]
    for library in dict.fromkeys(each.library for each in found):
        cells = (
            ", ".join(
                _shown(each)
                for each in found
                if each.library == library and each.batchnorm == batchnorm
            )
            for batchnorm in (True, False)
        )
        lines.append(f"| {library} | {' | '.join(cells)} |")
    import timm
    import transformers

    versions = (
        f"torch {torch.__version__.partition('+')[0]}, torchvision "
        f"{torchvision.__version__.partition('+')[0]}, timm {timm.__version__}, transformers "
        f"{transformers.__version__}, {platform.machine()}"
    )
    return "\n".join([*lines, "", f"`python -m benchmarks.checkpoints` with {versions}.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", nargs="?", choices=["write"])
    options = parser.parse_args()
    found = list(compared())
    text = table(found)
    print(text)
    if options.action == "write":
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(START)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")
    return int(not all(each.same and each.difference < 1e-3 for each in found))


if __name__ == "__main__":
    sys.exit(main())
