"""C2IR's deviations, the peaks of the last map and the free energy, in logarithms on a common
scale: the strongest here that needs no data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.blocks import Blocks, finite_rows
from oodcli.detectors.c2ir_z import C2IRZ
from oodcli.detectors.common_scale import Summed, median_and_spread, on_common_scale
from oodcli.detectors.hyperparameters import require_between
from oodcli.detectors.layer_choice import last_map
from oodcli.detectors.nci import ALPHA, NCI
from oodcli.detectors.one_class_sum import OneClassSum
from oodcli.detectors.peak import Peak
from oodcli.detectors.peak_energy import positive_energy
from oodcli.errors import DetectorError
from oodcli.features import Features, recorded

log = logging.getLogger(__name__)

FLOOR = 1e-3
"""Of a layer's mean squared deviation, in variances: no image is nearer to its class, but a layer
that is dead."""

FEW = 4
"""Positions of a last map whose peaks say little that its means do not."""


@dataclass(frozen=True)
class LogEnergy(Detector):
    """−log log(1 + Σ exp(z_k))."""

    name = "energy"
    needs = frozenset({"logits"})
    explains = True

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        """One term, the score itself: (N, 1)."""
        return ["little evidence for any class"], self._score(test)[:, None]

    def _score(self, test: Features) -> Tensor:
        return -positive_energy(recorded(test.logits)).log()


@dataclass(frozen=True)
class LogPeak(Detector):
    """−log‖p‖."""

    name = "peak"
    needs = Peak.needs
    explains = True

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        """One term, the score itself: (N, 1)."""
        return Peak().contributions(test)[0], self._score(test)[:, None]

    def _score(self, test: Features) -> Tensor:
        return -(-Peak().score(test)).log()


@dataclass(frozen=True)
class LogDeviation(Detector):
    """Mean over layers of log d_l, d_l the standardised deviation of c2ir-z from the class's
    virtual images: no layer outweighs the others, however far it is."""

    name = "c2ir-z"
    needs = C2IRZ.needs
    fitted = True
    explains = True

    of: C2IRZ

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        """A term for each layer: (N, L)."""
        (_, *words), terms = self.of.contributions(test)
        layers = len(words)
        deviation = terms[:, 1:] * layers  # the weights are uniform
        return words, deviation.clamp_min(FLOOR).log() / layers

    def _score(self, test: Features) -> Tensor:
        return self.contributions(test)[1].sum(1)


@dataclass(frozen=True)
class Nearness(Detector):
    """nci, as one term."""

    name = "nci"
    needs = NCI.needs
    fitted = True
    explains = True

    of: NCI

    def contributions(self, test: Features) -> tuple[Sequence[str], Tensor]:
        """One term, the score itself: (N, 1)."""
        words = ["the embedding is unlike the weights of the predicted class"]
        return words, self._score(test)[:, None]

    def _score(self, test: Features) -> Tensor:
        return self.of.score(test)


@dataclass(frozen=True)
class C2IRPeak(Summed):
    """r(r(−log E) + r(mean_l log d_l)) + r(−log‖p‖) + ν r(nci): free energy and deviations from the
    class's virtual images layer by layer, which go as one; the highest positions, which means over
    positions hide; the angle between the embedding and the predicted class's weights. r: by median
    and quartiles on accuracy-matched virtual images. Real images may take the place of both.

    median, spread: of the first two so that their sum has the median 0 and the interquartile
    range 1. with_peak: whether the peaks count. They do not where uniform noise has higher
    peaks than the pool, as in small networks on plain images: there, strange images are those with
    the high peaks. Nor do they where the last map has at most four positions, as in a VGG.

    nci: ν, units of r(nci) that are added. mean: (D,), of nci; empty where nci is 0.
    """

    name = "c2ir-peak"
    source = "this project, on C2IR and Liu et al. 2020"
    about = "logarithms of energy, c2ir-z's deviations and peak, and nci, scaled on a matched pool"
    formula = r"""
        s = r\Bigl(r(-\log E) + r\bigl(\operatorname{mean}_l \log d_l\bigr)\Bigr)
        + r(-\log \lVert p \rVert) + \nu\, r(s_\text{nci})

        E = \log\Bigl(1 + \sum_c e^{z_c}\Bigr),
        \qquad d_l = \operatorname{mean}_k \frac{(m_{l,k} - \mu^c_{l,k})^2}{\sigma_{l,k}^2},
        \qquad r(s) = \frac{s - \operatorname{median}}{q_{75} - q_{25}}
    """
    needs = C2IRZ.needs | Peak.needs
    noise_images = OneClassSum.reference_images
    later: ClassVar[Mapping[str, Any]] = {"mean": torch.zeros(0), "nci": 0.0}

    with_peak: bool
    mean: Tensor
    nci: float

    @classmethod
    def fit(
        cls,
        train: Blocks,
        *,
        noise: Blocks,
        pool: Blocks,
        nci: Annotated[float, "units of nci that are added, 0 to 10"] = 0.5,
    ) -> Self:
        """One pass over train, for c2ir-z, and one for nci; one over noise, for its median of peak;
        three over the pool, for that median, the positions of the last map and the terms of each
        row. Raises DetectorError when
        a record is missing or one of the three has no row, when a score does not vary over the
        pool, and for an nci that is not in 0 … 10."""
        require_between(cls.name, 0, 10, nci=nci)
        deviation = C2IRZ.fit(train)
        mean = NCI.fit(train).mean if nci else torch.zeros(0)
        of_noise, of_pool = (_usual_peak(rows, cls.name) for rows in (noise, pool))
        lower, few = of_noise < of_pool, _few_positions(pool, cls.name)
        with_peak = lower and not few
        if not lower:
            log.info(
                f"{cls.name}: peak is left out: noise has higher peaks ({of_noise:.3g}, "
                f"the pool {of_pool:.3g})"
            )
        elif few:
            log.info(f"{cls.name}: peak is left out: the last map has at most {FEW} positions")
        rows, scale = cls._on_pool(_parts(deviation, with_peak, mean), pool)
        median, spread = scale["median"], scale["spread"]
        both = on_common_scale(rows, median, spread)[:, :2].sum(1, keepdim=True)
        (of_both,), (unit,) = (each.tolist() for each in median_and_spread(both))
        if not unit > 0:
            raise DetectorError(
                f"{cls.name}: energy and c2ir-z contradict each other on the {len(rows)} rows of "
                "the pool, so their sum has no scale: calibrate on more and different images"
            )
        median[0] += of_both * spread[0]
        spread[:2] *= unit
        if nci:
            spread[-1] /= nci
        return cls(deviation, with_peak=with_peak, mean=mean, nci=nci, **scale)

    @property
    def parts(self) -> tuple[Detector, ...]:
        return _parts(self.deviation, self.with_peak, self.mean)

    @property
    def score_needs(self) -> frozenset[str]:
        return self.needs if self.with_peak else C2IRZ.needs


def _parts(deviation: C2IRZ, with_peak: bool, mean: Tensor) -> tuple[Detector, ...]:
    peak = (LogPeak(),) if with_peak else ()
    near = (Nearness(NCI(mean, ALPHA)),) if len(mean) else ()
    return LogEnergy(), LogDeviation(deviation), *peak, *near


def _usual_peak(rows: Blocks, who: str) -> float:
    """Median of ‖p‖. Raises DetectorError where there is no row."""
    found = [-Peak().score(block) for block in finite_rows(rows, Peak.needs, who)]
    return median_and_spread(torch.cat(found)[:, None])[0].item()


def _few_positions(rows: Blocks, who: str) -> bool:
    """Whether the last map, none of whose values is negative then, has at most FEW positions: a
    peak is at most so many times its mean, and reaches that where one position alone is active."""
    for block in finite_rows(rows, C2IRPeak.needs, who):
        layer = last_map(block, who)
        peak, mean = recorded(layer.peak), recorded(layer.mean)
        if ((peak > 0) & (peak > (FEW + 0.5) * mean)).any():
            return False
    return True
