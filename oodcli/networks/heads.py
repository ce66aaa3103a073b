"""Heads that were trained to tell what is out of distribution, in place of the last linear layer.

One of them after an architecture's name: ``+deconf-cosine``, ``+deconf-euclid`` or
``+deconf-inner`` for the three forms of Generalized ODIN (Hsu et al. 2020), and ``+mos:4,3,3`` for
the group softmax of MOS (Huang & Li 2021), here with groups of 4, 3 and 3 classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcli.errors import CheckpointError

_FORMS = ("cosine", "euclid", "inner")


class RetrainedHead(nn.Module):
    """word: of ``records.ROW_RECORDS``, what such a head gives beyond the logits. watched: name of
    the submodule whose output ``reading`` makes that of. suffix: of the architecture's name."""

    word: ClassVar[str]
    watched: ClassVar[str]
    suffix: str

    def reading(self, output: Tensor) -> Tensor:
        raise NotImplementedError


def unit(rows: Tensor) -> Tensor:
    """x/(‖x‖ + 10⁻⁴): (N, D) → (N, D). The 10⁻⁴ is not in the paper, but in the implementations
    that checkpoints come from."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / (length + 1e-4)


class Similarity(nn.Module):
    """h of a DeConf head, (N, D) → (N, K): wᵢᵀu + bᵢ (inner), −‖u − wᵢ‖²/D (euclid), or the cosine
    of u and wᵢ. The paper's distance is not divided by D; the implementations' is."""

    def __init__(self, form: str, width: int, num_classes: int) -> None:
        super().__init__()
        self.form = form
        self.h = nn.Linear(width, num_classes, bias=form == "inner")

    def forward(self, u: Tensor) -> Tensor:
        w = self.h.weight
        if self.form == "cosine":
            return F.linear(unit(u), unit(w))
        if self.form == "euclid":
            # Not by products, whose difference loses its digits where u is near w.
            distance = torch.cdist(u, w, compute_mode="donot_use_mm_for_euclid_dist")
            return -distance.square() / u.shape[1]
        return self.h(u)  # type: ignore[no-any-return]


class DeconfHead(RetrainedHead):
    """Decomposed confidence: logits h(u)/g(u), (N, D) → (N, K), with g = σ(BN(wᵀu + b)) (Hsu et al.
    2020). Its keys are those of the widespread implementations."""

    word = "deconf.h"
    watched = "h"

    def __init__(self, form: str, width: int, num_classes: int) -> None:
        super().__init__()
        self.suffix = f"deconf-{form}"
        self.h = Similarity(form, width, num_classes)
        self.g = nn.Sequential(nn.Linear(width, 1), nn.BatchNorm1d(1), nn.Sigmoid())

    def reading(self, output: Tensor) -> Tensor:
        """(N, K) h as it is."""
        return output

    def forward(self, u: Tensor) -> Tensor:
        return self.h(u) / self.g(u)  # type: ignore[no-any-return]


class GroupHead(RetrainedHead):
    """MOS: each group of classes has its own softmax, over "others", which comes first, and its
    classes (Huang & Li 2021). (N, D) → (N, K) log-probabilities of the classes in their groups, so
    that the largest is MOS's prediction. sizes: classes of each group, without others."""

    word = "mos.others"
    watched = "linear"

    def __init__(self, linear: nn.Linear, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.suffix = f"mos:{','.join(map(str, sizes))}"
        self.linear = linear

    def reading(self, output: Tensor) -> Tensor:
        """(N, K + G) → (N, G) log-probability of each group's others; in float64, because it is
        often next to 0 where an image is out of distribution."""
        return torch.cat([group[:, :1] for group in self._groups(output.double())], 1).float()

    def forward(self, u: Tensor) -> Tensor:
        return torch.cat([group[:, 1:] for group in self._groups(self.linear(u).float())], 1)

    def _groups(self, output: Tensor) -> list[Tensor]:
        parts: Sequence[Tensor] = torch.split(output, [size + 1 for size in self.sizes], 1)
        return [part.log_softmax(1) for part in parts]


def split(arch: str | None) -> tuple[str | None, str]:
    """``NAME+mos:4,3,3`` → NAME and ``mos:4,3,3``; an empty head where there is none."""
    match = re.fullmatch(r"(.+)\+((?:deconf|mos)(?:[-:][^+/]*)?)", arch or "")
    return (arch, "") if match is None else (match[1], match[2])


def form_of(head: str) -> str:
    """``deconf-cosine`` → cosine. Raises CheckpointError."""
    form = head.removeprefix("deconf-")
    if form not in _FORMS:
        raise CheckpointError(_unknown(head))
    return form


def sizes_of(head: str) -> tuple[int, ...]:
    """``mos:4,3,3`` → the sizes of the groups. Raises CheckpointError."""
    if not re.fullmatch(r"mos:[1-9]\d*(,[1-9]\d*)*", head, re.ASCII):
        raise CheckpointError(_unknown(head))
    return tuple(int(size) for size in head.removeprefix("mos:").split(","))


def _unknown(head: str) -> str:
    return (
        f"--arch …+{head}: a retrained head is written +deconf-cosine, +deconf-euclid, "
        "+deconf-inner, or +mos: with the number of classes in each group, such as +mos:4,3,3"
    )


def sizes_from(slices: Tensor) -> tuple[int, ...]:
    """The sizes of MOS's groups from where each begins and ends in the head's outputs, others
    first: (G, 2). Raises CheckpointError when groups overlap or leave something out."""
    pairs = slices.ndim == 2 and slices.shape[1] == 2 and bool(torch.isfinite(slices).all())
    rows = slices.tolist() if pairs and len(slices) else [[1]]
    starts, ends = [row[0] for row in rows], [row[-1] for row in rows]
    if starts != [0, *ends[:-1]] or any(b - a < 2 for a, b in rows):
        raise CheckpointError(
            f"group_slices {slices.tolist()} does not list MOS's groups one after the other: give "
            "their sizes with --arch NAME+mos:4,3,3"
        )
    return tuple(int(end - start) - 1 for start, end in rows)


def take_deconf(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict's backbone, and the tensors of its DeConf head by their keys in ``DeconfHead``;
    none where it has no such head."""
    mark = "h.h.weight"
    prefixes = [key.removesuffix(mark) for key in state if re.search(r"(^|\.)h\.h\.weight$", key)]
    for prefix in prefixes:
        if f"{prefix}g.0.weight" in state and state[prefix + mark].ndim == 2:
            own = tuple(f"{prefix}{part}." for part in ("h", "g"))
            head = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(own)}
            return {key: v for key, v in state.items() if not key.startswith(own)}, head
    return dict(state), {}


def last_linear(network: nn.Module, arch: str) -> str:
    """The name of the layer that a retrained head takes the place of. Raises CheckpointError."""
    name = ""
    for each, module in network.named_modules():
        name = each if isinstance(module, nn.Linear) else name
    if not name:
        raise CheckpointError(
            f"{arch} has no linear layer for a retrained head to replace: leave the head out of "
            "--arch"
        )
    return name
