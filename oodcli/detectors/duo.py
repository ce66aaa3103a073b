"""c2ir-z and 1c-sum on a common scale, added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks
from oodcli.detectors.c2ir_z import C2IRZ
from oodcli.detectors.common_scale import Summed
from oodcli.detectors.one_class_sum import OneClassSum


@dataclass(frozen=True)
class Duo(Summed):
    """r(c2ir-z) + r(1c-sum), r by median and quartiles on accuracy-matched virtual images.

    indicators: the second part, fitted on noise.
    """

    name = "duo"
    source = "this project, on C2IR and Begon & Geurts 2021"
    about = "c2ir-z + 1c-sum, each scaled by its quartiles on accuracy-matched virtual images"
    formula = r"""
        s = r(s_\text{c2ir-z}) + r(s_\text{1c-sum}),
        \qquad r(s) = \frac{s - \operatorname{median}}{q_{75} - q_{25}}
    """
    needs = C2IRZ.needs | OneClassSum.needs
    superseded_by = "c2ir-peak"
    noise_images = OneClassSum.reference_images
    further: ClassVar[tuple[Detector, ...]] = ()
    """What is added besides, and needs no fitting."""

    indicators: OneClassSum

    @classmethod
    def fit(cls, train: Blocks, *, noise: Blocks, pool: Blocks) -> Self:
        """One pass over each: c2ir-z on train, 1c-sum on noise, and for each row of the pool the
        terms of both are kept. Raises DetectorError when a record is missing or one of the three
        has no row, and when a score does not vary over the pool."""
        deviation, indicators = C2IRZ.fit(train), OneClassSum.fit(noise)
        _, scale = cls._on_pool((deviation, indicators, *cls.further), pool)
        return cls(deviation, indicators=indicators, **scale)

    @property
    def parts(self) -> tuple[Detector, ...]:
        return self.deviation, self.indicators, *self.further
