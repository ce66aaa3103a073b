"""Every detector, by name; nothing is imported before it is asked for.

A detector is in the file that bears its name, with ``_`` for ``-``: ``rg-add`` is in rg_add.py. A
variant of a few lines is in the file of the detector that it varies (``norm+`` in norm.py,
``in-dms`` in dms.py), close relatives are in one of another name (``scale`` and ``ash-b`` in
shaping.py), and as no module begins with a digit, ``1d`` is in one_dimensional.py and
``1c-sum`` in one_class_sum.py. What several share is in a file that is named for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from oodcli.errors import DetectorError

if TYPE_CHECKING:
    from oodcli.detectors.base import Detector

_CLASSES = {
    "msp": "MSP",
    "entropy": "Entropy",
    "t1000": "T1000",
    "temp-scaling": "TemperatureScaling",
    "gen": "GEN",
    "doctor": "Doctor",
    "mls": "MLS",
    "energy": "Energy",
    "joint-energy": "JointEnergy",
    "odin": "ODIN",
    "pro": "PRO",
    "gaia-z": "GaiaZ",
    "mc-dropout": "MCDropout",
    "godin": "GeneralizedODIN",
    "mos": "MOS",
    "norm": "Norm",
    "norm+": "norm:NormPlus",
    "ang": "Ang",
    "ang++": "ang:AngPlusPlus",
    "proj": "Proj",
    "act": "Act",
    "act+": "act:ActPlus",
    "dms": "DMS",
    "dms-aos": "DMSAOS",
    "dss": "DSS",
    "dss-ext": "DSSExt",
    "in-dms": "dms:InDMS",
    "in-dms-aos": "dms_aos:InDMSAOS",
    "in-dss": "dss:InDSS",
    "in-dss-ext": "dss_ext:InDSSExt",
    "1c-sum": "one_class_sum:OneClassSum",
    "supervised": "Supervised",
    "thinkback": "Thinkback",
    "thinkback-norm": "ThinkbackNorm",
    "gradnorm": "GradNorm",
    "igoe": "Igoe",
    "expgrad": "ExpGrad",
    "rg": "RG",
    "rg-add": "RGAdd",
    "energy-norm": "EnergyNorm",
    "react": "ReAct",
    "scale": "shaping:Scale",
    "lts": "shaping:LTS",
    "ash-p": "shaping:ASHP",
    "ash-b": "shaping:ASHB",
    "ash-s": "shaping:ASHS",
    "dice": "DICE",
    "vra": "VRA",
    "adascale-a": "adascale:AdaScaleA",
    "adascale-l": "adascale:AdaScaleL",
    "ras": "RAS",
    "optfs": "OptFS",
    "fdbd-norm": "FDBDNorm",
    "fdbd": "FDBD",
    "ora": "ORA",
    "nci": "NCI",
    "caref": "CARef",
    "cadref": "CADRef",
    "nac": "NAC",
    "klm": "KLMatching",
    "openmax": "OpenMax",
    "mds": "MDS",
    "mds++": "mds:MDSPlusPlus",
    "gmm": "GMM",
    "rmds": "RMDS",
    "rmds++": "rmds:RMDSPlusPlus",
    "mds-sum": "MDSSum",
    "she": "SHE",
    "ctm": "CTM",
    "proto-fusion": "ProtoFusion",
    "knn": "KNN",
    "nnguide": "NNGuide",
    "relation": "Relation",
    "residual": "Residual",
    "vim": "ViM",
    "pnml": "PNML",
    "actsub": "ActSub",
    "weiper": "WeiPer",
    "neco": "NECO",
    "cop": "CoP",
    "corp": "CoRP",
    "pca-fused": "PCAFused",
    "gram": "Gram",
    "1d": "one_dimensional:OneDimensional",
    "lsgm": "LSGM",
    "c2ir": "C2IR",
    "c2ir-z": "C2IRZ",
    "peak": "Peak",
    "peak-energy": "PeakEnergy",
    "davis": "Davis",
    "rankfeat": "RankFeat",
    "catalyst": "Catalyst",
    "feature-norm": "FeatureNorm",
    "c2ir-peak": "C2IRPeak",
    "duo": "Duo",
    "trio": "Trio",
}
"""Name → class, in the order of the listings; ``module:class`` where the module has another name
than the detector. A new detector is one line here and one file."""


@dataclass(frozen=True)
class Own:
    """A class of the user's. origin: ``FILE.py:CLASS``, or ``MODULE:CLASS`` of a class that was
    passed to ``own.register``, which has no sha256 of a file."""

    kind: type[Detector]
    origin: str
    sha256: str = ""


loaded: dict[str, Own] = {}
"""By name, the user's detectors that this process has loaded."""


def names() -> tuple[str, ...]:
    """Every built-in detector's name, in the order of the listings. Imports nothing."""
    return tuple(_CLASSES)


def is_known(name: str) -> bool:
    """Whether ``get`` has a class of this name."""
    return name in _CLASSES or name in loaded


def get(name: str) -> type[Detector]:
    """The class of a detector: a built-in one, or one of the user's own that ``own.find`` or
    ``own.register`` was given before. Raises DetectorError for an unknown name."""
    if name in _CLASSES:
        module, _, attribute = _CLASSES[name].rpartition(":")
        place = import_module(f"oodcli.detectors.{module or name.replace('-', '_')}")
        found: type[Detector] = getattr(place, attribute)
        return found
    if name in loaded:
        return loaded[name].kind
    raise DetectorError(
        f"no detector is called '{name}': known are {', '.join(_CLASSES)} "
        "(give a fitted one by the path of its .safetensors file, your own by FILE.py:CLASS)"
    )


def is_code(word: str) -> bool:
    """Whether a word names code, as ``FILE.py:CLASS``."""
    return word.endswith(".py") or ".py:" in word


def code_sha256(name: str) -> str:
    """SHA-256 of the file that a detector of the user's own is in; empty for a built-in one."""
    return loaded[name].sha256 if name in loaded else ""


def word_for(name: str) -> str:
    """What to write where the command line takes a detector of this name: the name, or
    ``FILE.py:CLASS`` for one of the user's own."""
    return loaded[name].origin if name in loaded else name
