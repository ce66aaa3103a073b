"""Which of the tapped layers a detector works on, and what was recorded of them."""

from __future__ import annotations

import re

from torch import Tensor

from oodcli.errors import DetectorError
from oodcli.features import Features, Layer, recorded

EMBEDDING = "embedding"

LAYER = "embedding, or the name of a recorded layer, whose means are used"
LAYERS = "stages, blocks, or a regular expression for whole names of layers"
"""Meanings of detectors' settings."""


def chosen_layers(block: Features, which: str, who: str) -> list[str]:
    """Names of the layers with spatial means, in the network's order: its ``stages``, its
    ``blocks``, or those whose whole name matches a regular expression. Raises DetectorError when
    there is none, or the expression is faulty."""
    means = [name for name, layer in block.layers.items() if layer.mean is not None]
    if which in ("stages", "blocks"):
        found = [name for name in means if f"{block.layers[name].kind}s" == which]
    else:
        try:
            found = [name for name in means if re.fullmatch(which, name)]
        except re.error as error:
            raise DetectorError(
                f"{who}: '{which}' is not a regular expression ({error})"
            ) from error
    if not found:
        raise DetectorError(
            f"{who}: no layer for '{which}' (expected stages, blocks or a regular expression); "
            f"recorded are {', '.join(means)}"
        )
    return found


def last_map(test: Features, who: str) -> Layer:
    """The last layer with several positions, the one that has peaks. Raises DetectorError where
    not one layer alone has them."""
    found = [layer for layer in test.layers.values() if layer.peak is not None]
    if len(found) != 1:
        raise DetectorError(
            f"{who}: {len(found)} layers have peaks, expected the last one alone: extract again"
        )
    return found[0]


def layer_rows(block: Features, name: str) -> Tensor:
    """(N, C) float64: the embedding, or the spatial means of a layer. Raises DetectorError for a
    layer that was not recorded."""
    if name == EMBEDDING:
        return recorded(block.embedding).double()
    layer = block.layers.get(name)
    if layer is None or layer.mean is None:
        known = [EMBEDDING, *(n for n, other in block.layers.items() if other.mean is not None)]
        raise DetectorError(f"no layer '{name}' was recorded: there are {', '.join(known)}")
    return layer.mean.double()


def layer_mean(test: Features, name: str, detector: str, width: int) -> Tensor:
    """(N, C) float64 spatial means of one layer. Raises DetectorError when that layer was not
    recorded, or has another width than the detector was fitted with."""
    layer = test.layers.get(name)
    if layer is None or layer.mean is None:
        raise DetectorError(
            f"{detector} was fitted on layer '{name}', which was not recorded: extract with the "
            "same checkpoint and the same --layers"
        )
    if layer.mean.shape[1] != width:
        raise DetectorError(
            f"/layers/{name}/mean has {layer.mean.shape[1]} channels, but {detector} was fitted on "
            f"{width}: extract with the same checkpoint"
        )
    return layer.mean.double()
