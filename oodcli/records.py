"""The records: what can be recorded of an image. Every other list of records derives from this
table.

A new record is one row here, one field of ``features.Features`` (or of ``Layer`` or ``BatchNorm``)
named after its place, and one line in the ``Recorder``. Nothing heavy is imported, because help and
completion read the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One record.

    place: dataset in a feature cache; ``*`` stands for the name of a layer. cheap: a plain forward
    pass gives it at little cost. lacks: advice for a cache without it, if recording it is not the
    whole answer. cannot: reason why a network cannot give it.
    """

    place: str
    cheap: bool = False
    lacks: str = ""
    cannot: str = ""


_NOT_LINEAR = "a network that does not end in a linear layer has no head, and often no embedding"
_NO_TAPS = "no layers were found in it (choose some with --layers)"
_NO_BATCHNORM = "it has no BatchNorm layer with running statistics"

RECORDS: Mapping[str, Record] = {
    "logits": Record("logits", cheap=True),
    "embedding": Record(
        "embedding",
        cheap=True,
        lacks=_NOT_LINEAR,
        cannot="its last layer is not linear, so there is no embedding",
    ),
    "layers.mean": Record("layers/*/mean", cheap=True, cannot=_NO_TAPS),
    "layers.std": Record("layers/*/std", cheap=True, cannot=_NO_TAPS),
    "layers.gram": Record("layers/*/gram", cannot="no stages were found in it"),
    "layers.peak": Record(
        "layers/*/peak", cheap=True, cannot="none of its layers has several positions"
    ),
    "layers.rank1": Record(
        "layers/*/rank1", cannot="its embedding is not the mean of the last map of its layers"
    ),
    "layers.gradient": Record("layers/*/gradient", cannot=_NO_TAPS),
    "layers.nonzero": Record(
        "layers/*/nonzero",
        cannot="it has no BatchNorm layer, or only activations without a flat part, such as GELU",
    ),
    "layers.sensitivity": Record(
        "layers/*/sensitivity",
        lacks="sensitivities exist only for virtual images: extract a file from invert, made "
        "without --no-sensitivity",
        cannot=_NO_BATCHNORM,
    ),
    "batchnorm.mean": Record("batchnorm/*/mean", cheap=True),
    "batchnorm.var": Record("batchnorm/*/var", cheap=True),
    "odin.logits": Record("odin/logits"),
    "pro.steps": Record("pro/steps"),
    "adascale.u": Record(
        "adascale/u",
        lacks=_NOT_LINEAR,
        cannot="its last layer is not linear, so there is no embedding",
    ),
    "dropout.logits": Record(
        "dropout/logits", cannot="it has no dropout layer (nn.Dropout with p > 0)"
    ),
    "deconf.h": Record(
        "deconf/h",
        cheap=True,
        lacks="only a checkpoint trained with a DeConf head (Generalized ODIN) has it",
        cannot="Generalized ODIN needs a checkpoint trained with a DeConf head",
    ),
    "mos.others": Record(
        "mos/others",
        cheap=True,
        lacks="only a checkpoint trained with groups of classes (MOS) has it",
        cannot="MOS needs a checkpoint trained with groups of classes (--arch …+mos:SIZES)",
    ),
}
"""Records with one row per image: the names of ``extract --record`` and ``Detector.needs``."""

CONSTANTS: Mapping[str, Record] = {
    "head": Record("head", lacks=_NOT_LINEAR, cannot="its last layer is not linear"),
    "logits.level": Record(
        "logits_level",
        lacks="the network returns log-probabilities: return logits instead",
        cannot="it returns log-probabilities, which lack the level of the logits",
    ),
    "multi-label": Record(
        "multi_label",
        lacks="for a network with a sigmoid for each label, extract with --multi-label",
        cannot="it has one label an image; give --multi-label if each label has its own sigmoid",
    ),
    "pooled": Record(
        "pooled",
        lacks="the embedding is not the mean of the last map, or oodcli was older: extract again",
        cannot="its embedding is not the mean of the last map of its layers",
    ),
    "batchnorm.running": Record(
        "batchnorm/*/running_mean",
        lacks="the network has no BatchNorm layer with running statistics",
        cannot=_NO_BATCHNORM,
    ),
    "mirror": Record("mirror", lacks="record the mirror images with: oodcli extract … --mirror"),
    "label": Record("label", lacks="labels come from sub-folders, lists, or an .npz with labels"),
}
"""Other needs of detectors and of ``score --mirror``, which ``--record`` does not name."""

ROW_RECORDS = tuple(RECORDS)
ON_REQUEST = tuple(word for word in RECORDS if word != "layers.sensitivity")
"""Records of ``extract --record``; invert measures the sensitivities."""
CHEAP = frozenset(word for word, record in RECORDS.items() if record.cheap)
KNOWN_RECORDS = frozenset(RECORDS) | (frozenset(CONSTANTS) - {"mirror"})
"""Everything that a detector can need."""

WHOLE = tuple(record.place for record in RECORDS.values() if "*" not in record.place)
"""Places of records of the whole image, as opposed to records of a layer."""


def parts_of(group: str) -> tuple[str, ...]:
    """The records of each layer: last parts of the places ``group/*/…``."""
    return tuple(
        record.place.rpartition("/")[2]
        for record in RECORDS.values()
        if record.place.startswith(f"{group}/*/")
    )


LAYER_PARTS = parts_of("layers")
NORM_PARTS = parts_of("batchnorm")


def field_of(place: str) -> str:
    """The field of Features with the record of this place: ``odin/logits`` → ``odin_logits``."""
    return place.replace("/", "_")


def word_of(name: str) -> str:
    """The record of a dataset: ``layers/layer1.0.bn1/mean`` → ``layers.mean``."""
    first, *rest = name.split("/")
    return ".".join([first, *rest[-1:]])


def lacking(missing: Iterable[str], who: str) -> str:
    """Part of a sentence: the missing records, and how to record them."""
    missing = list(missing)
    known = {**RECORDS, **CONSTANTS}
    told = set(missing) - ({"logits.level"} if "logits" in missing else set())
    hints = dict.fromkeys(known[word].lacks for word in known if word in told and word != "label")
    if (
        set(missing) - set(CONSTANTS) and "layers.sensitivity" not in missing
    ):  # otherwise its own hint is enough
        hints[f"record it with: oodcli extract CHECKPOINT IMAGES --for {who}"] = None
    if "label" in missing:
        hints[CONSTANTS["label"].lacks] = None
    return f"{', '.join(missing)}, which was not recorded ({'; '.join(filter(None, hints))})"


def impossible(words: Iterable[str], *, tapped: bool) -> str:
    """Reasons why a network cannot give some records. tapped: whether it has layers to record."""
    words = list(words)
    known = {**RECORDS, **CONSTANTS}
    reasons = dict.fromkeys(
        _NO_TAPS if word.startswith("layers.") and not tapped else known[word].cannot
        for word in known
        if word in words and not (word == "head" and "embedding" in words)
    )
    return "; ".join(filter(None, reasons))
