"""duo and peak: c2ir-z, 1c-sum and peak on a common scale, added."""

from __future__ import annotations

from dataclasses import dataclass

from oodcli.detectors.duo import Duo
from oodcli.detectors.peak import Peak


@dataclass(frozen=True)
class Trio(Duo):
    """r(c2ir-z) + r(1c-sum) + r(peak): ``duo`` and ``peak``. ``c2ir-peak`` is better without the
    second."""

    name = "trio"
    about = "c2ir-z + 1c-sum + peak, each scaled by its quartiles on the accuracy-matched pool"
    needs = Duo.needs | Peak.needs
    further = (Peak(),)
