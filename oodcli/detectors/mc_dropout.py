"""Monte Carlo dropout (Gal & Ghahramani 2016): what thinned networks say on average, and how much
they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.hyperparameters import require_positive
from oodcli.errors import DetectorError
from oodcli.features import DropoutPasses, Features, recorded

Measure = Literal["entropy", "variance", "information"]


def disagreement(logits: Tensor, measure: Measure) -> Tensor:
    """Of the softmaxes p_i of n networks: the entropy H(p̄) of their mean; the sum over the classes
    of their variances (divisor n); or H(p̄) − mean H(p_i), the mutual information of the class and
    the network (Houlsby et al. 2011), all at least 0. logits: (N, n, K). Returns (N,) float64."""
    log_p = torch.log_softmax(logits.double(), 2)
    p = log_p.exp()
    mean = p.mean(1)
    if measure == "variance":
        return p.var(1, correction=0).sum(1)
    entropy = -torch.xlogy(mean, mean).sum(1)
    if measure == "entropy":
        return entropy
    within: Tensor = (p * log_p).sum(2).mean(1)
    return (entropy + within).clamp_min(0)


@dataclass(frozen=True)
class MCDropout(Detector):
    """Entropy of the mean softmax of n passes with dropout. ``measure=variance``: the sum over the
    classes of the softmaxes' variances; ``information``: that entropy minus their mean entropy. The
    network must have dropout layers with p > 0, as VGG, SqueezeNet and EfficientNet have;
    stochastic depth, and dropout inside functions, stay off. All images share the masks of a pass:
    n thinned networks, so that no score depends on the batch. Each pass takes the time of a forward
    pass, unless the only dropout layer stands before a linear head.

    The layers are ``nn.Dropout`` and its forms for channels; all others stay in evaluation mode.
    ``F.dropout`` inside a network's own code follows that mode, and so drops nothing. Masks are
    drawn from the seed.
    """

    name = "mc-dropout"
    source = "Gal & Ghahramani, ICML 2016"
    about = "entropy of the mean softmax of several passes with dropout"
    formula = r"""
        s = -\sum_c \bar p_c \log \bar p_c, \qquad \bar p = \frac{1}{n} \sum_{i=1}^{n} p^{(i)}
    """
    needs = frozenset({"dropout.logits"})

    passes: Annotated[int, "n, above 0; OpenOOD's default, which was not tuned"] = 5
    seed: Annotated[int, "of the masks"] = 0
    measure: Annotated[
        Measure, "what is taken of the passes: entropy (the most common), variance or information"
    ] = "entropy"

    def __post_init__(self) -> None:
        require_positive(self.name, passes=self.passes)
        if self.measure != "entropy" and self.passes < 2:
            raise DetectorError(
                f"{self.name}.measure={self.measure} compares passes: give {self.name}.passes=2 or "
                "more"
            )

    @property
    def made_with(self) -> DropoutPasses:
        return DropoutPasses(self.passes, self.seed)

    def _score(self, test: Features) -> Tensor:
        made = test.made_with[DropoutPasses.group]
        assert isinstance(made, DropoutPasses)  # as was required before
        logits = recorded(test.dropout_logits)
        logits = logits.view(len(logits), made.passes, -1)[:, : self.passes]
        return disagreement(logits, self.measure)
