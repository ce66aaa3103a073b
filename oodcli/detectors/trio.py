"""duo and peak: c2ir-z, 1c-sum and peak on a common scale, added."""

from __future__ import annotations

from dataclasses import dataclass

from oodcli.detectors.duo import Duo
from oodcli.detectors.peak import Peak


@dataclass(frozen=True)
class Trio(Duo):
    """r(c2ir-z) + r(1c-sum) + r(peak), r by median and quartiles on accuracy-matched virtual
    images: ``duo`` and ``peak``."""

    name = "trio"
    about = "c2ir-z + 1c-sum + peak, each scaled by its quartiles on the accuracy-matched pool"
    formula = r"""
        s = r(s_\text{c2ir-z}) + r(s_\text{1c-sum}) + r(s_\text{peak}),
        \qquad r(s) = \frac{s - \operatorname{median}}{q_{75} - q_{25}}
    """
    needs = Duo.needs | Peak.needs
    further = (Peak(),)
