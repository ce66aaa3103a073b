"""Every detector, by name; nothing is imported before it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from oodcli.errors import DetectorError

if TYPE_CHECKING:
    from oodcli.detectors.base import Detector

_WHERE = {
    "msp": "msp:MSP",
    "entropy": "output_space:Entropy",
    "t1000": "output_space:T1000",
    "mls": "output_space:MLS",
    "energy": "energy:Energy",
    "odin": "odin:ODIN",
    "godin": "retrained:GeneralizedODIN",
    "mos": "retrained:MOS",
    "norm": "latent_space:Norm",
    "norm+": "latent_space:NormPlus",
    "ang": "latent_space:Ang",
    "ang++": "latent_space:AngPlusPlus",
    "proj": "latent_space:Proj",
    "act": "latent_space:Act",
    "act+": "latent_space:ActPlus",
    "dms": "batchnorm:DMS",
    "dms-aos": "batchnorm:DMSAOS",
    "dss": "batchnorm:DSS",
    "dss-ext": "batchnorm:DSSExt",
    "in-dms": "batchnorm:InDMS",
    "in-dms-aos": "batchnorm:InDMSAOS",
    "in-dss": "batchnorm:InDSS",
    "in-dss-ext": "batchnorm:InDSSExt",
    "1c-sum": "one_class_sum:OneClassSum",
    "supervised": "supervised:Supervised",
    "thinkback": "thinkback:Thinkback",
    "thinkback-norm": "thinkback:ThinkbackNorm",
    "gradnorm": "last_layer_gradient:GradNorm",
    "igoe": "last_layer_gradient:Igoe",
    "expgrad": "last_layer_gradient:ExpGrad",
    "rg": "rg:RG",
    "rg-add": "rg:RGAdd",
    "energy-norm": "last_layer_gradient:EnergyNorm",
    "react": "react:ReAct",
    "klm": "klm:KLMatching",
    "mds": "mds:MDS",
    "mds-sum": "mds:MDSSum",
    "knn": "knn:KNN",
    "vim": "vim:ViM",
    "gram": "gram:Gram",
    "1d": "one_dimensional:OneDimensional",
    "lsgm": "lsgm:LSGM",
    "c2ir": "c2ir:C2IR",
    "c2ir-z": "c2ir_z:C2IRZ",
    "peak": "peak:Peak",
    "peak-energy": "peak:PeakEnergy",
    "c2ir-peak": "c2ir_peak:C2IRPeak",
    "duo": "common_scale:Duo",
    "trio": "common_scale:Trio",
}
"""Name → module and class, in the order of the listings. A new detector is one line here and one
class; small ones of the same paper share a file."""


def names() -> tuple[str, ...]:
    """Every detector's name, in the order of the listings. Imports nothing."""
    return tuple(_WHERE)


def get(name: str) -> type[Detector]:
    """The class of a detector. Raises DetectorError for an unknown name."""
    if name not in _WHERE:
        raise DetectorError(
            f"no detector is called '{name}': known are {', '.join(_WHERE)} "
            "(a fitted one is given by the path of its .safetensors file)"
        )
    module, attribute = _WHERE[name].split(":")
    found: type[Detector] = getattr(import_module(f"oodcli.detectors.{module}"), attribute)
    return found
