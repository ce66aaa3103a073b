"""A sheet of virtual images: one row a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

COLUMNS = 10
ROWS = 20
TILE = 64
GAP = 4
MARGIN = 120


def contact_sheet(pixels: Tensor, labels: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Writes a PNG with at most 10 images of each of the first 20 classes. pixels: (N, C, H, W) in
    [0, 1]; labels: (N,)."""
    classes = sorted(set(labels.tolist()))
    shown = classes[:ROWS]
    height, width = pixels.shape[2:]
    scale = max(1, round(TILE / max(height, width)))
    tile_h, tile_w = (height * scale, width * scale) if height <= TILE else (height, width)
    if max(tile_h, tile_w) > 2 * TILE:
        shrink = 2 * TILE / max(tile_h, tile_w)
        tile_h, tile_w = round(tile_h * shrink), round(tile_w * shrink)
    columns = min(COLUMNS, max(int((labels == index).sum()) for index in shown))
    sheet = Image.new(
        "RGB",
        (MARGIN + columns * (tile_w + GAP) + GAP, len(shown) * (tile_h + GAP) + GAP),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for row, index in enumerate(shown):
        top = GAP + row * (tile_h + GAP)
        name = (
            class_names[index] if len(class_names[index]) <= 16 else class_names[index][:15] + "…"
        )
        draw.text((GAP, top + tile_h // 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(pixels[labels == index][:columns]):
            array = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            picture = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
            smooth = tile_h < height
            sheet.paste(
                picture.convert("RGB").resize(
                    (tile_w, tile_h),
                    Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST,
                ),
                (MARGIN + column * (tile_w + GAP), top),
            )
    sheet.save(path)
