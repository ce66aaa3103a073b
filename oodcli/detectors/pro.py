"""PRO (Chen et al. 2025): the lowest confidence on the way of a few steps against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from oodcli.detectors.base import Detector
from oodcli.detectors.hyperparameters import require_positive
from oodcli.features import Confidence, Features, ProSteps, recorded


def uncertainty(logits: Tensor, how: ProSteps) -> Tensor:
    """The confidence of PRO with a minus sign: 1 − max p for ``msp``, −Σ p log p for ``entropy``,
    Σ (p(1 − p))^γ over the M largest p for ``gen``, p = softmax(z/temperature).

    By logarithms, so that neither the value nor its gradient is lost where a row is sure. logits:
    (N, K). Returns (N,) float64, higher = more OOD.
    """
    log_p = torch.log_softmax(logits.double() / how.temperature, 1)
    first = log_p.argmax(1, keepdim=True)
    log_rest = log_p.scatter(1, first, -torch.inf).logsumexp(1, keepdim=True)  # of 1 − max p
    if how.confidence == "msp":
        return log_rest.exp()[:, 0]
    p = log_p.exp()
    if how.confidence == "entropy":
        log_p = log_p.scatter(1, first, torch.log1p(-log_rest.exp()))
        return -(p * log_p).sum(1)
    log_others = torch.log1p(-p.scatter(1, first, 0)).scatter(1, first, log_rest)  # log(1 − p)
    terms = (how.gamma * (log_p + log_others)).exp()
    if terms.shape[1] > how.M:
        terms = terms.topk(how.M, dim=1).values  # in the order of p
    return terms.sum(1)


def ascent(logits: Tensor, how: ProSteps) -> Tensor:
    """The gradient of the uncertainty by the logits, (N, K) float64, each row divided by its
    largest absolute value: the signs of the gradient by the image do not depend on that, but
    those of a sure row would be lost in float32."""
    z = logits.detach().double().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(uncertainty(z, how).sum(), z)
    largest = gradient.abs().amax(1, keepdim=True)
    return torch.where(largest > 0, gradient / largest, gradient)


@dataclass(frozen=True)
class PRO(Detector):
    """The highest uncertainty U of the image and of T changed ones, each a step of length ε from
    the one before that raises U. ε is in units of the normalised image. U is the generalised
    entropy of ``gen``, as here, or 1 − max p, or the entropy of p.

    U of each step is recorded: a cache serves any smaller number of steps.
    """

    name = "pro"
    source = "Chen et al., CVPR 2025, algorithm 1"
    about = "least confidence over a few small steps on the image that lower it"
    formula = r"""
        s = \max_{0 \le t \le T} U(x_t), \qquad
        x_{t+1} = x_t + \varepsilon \operatorname{sign}\bigl(\nabla_x U(x_t)\bigr)

        U = \sum_{i=1}^{M} p_{(i)}^\gamma \bigl(1 - p_{(i)}\bigr)^\gamma
    """
    needs = frozenset({"pro.steps"})

    confidence: Annotated[
        Confidence, "what the steps lower; with gen the paper has its best AUROC on CIFAR"
    ] = "gen"
    epsilon: Annotated[
        float, "length of a step, above 0; of the authors' code, before it is tuned on OOD images"
    ] = 0.0001
    steps: Annotated[int, "how many, at least 1; chosen as epsilon"] = 3
    temperature: Annotated[
        float, "of the softmax, above 0; with msp and one fitted to labels it is PRO-MSP-T"
    ] = 1.0
    gamma: Annotated[float, "exponent of gen, above 0; default of its paper"] = 0.1
    M: Annotated[int, "how many of the largest p gen takes; as in its paper"] = 100

    def __post_init__(self) -> None:
        values = {"epsilon": self.epsilon, "steps": self.steps, "temperature": self.temperature}
        require_positive(self.name, **values, gamma=self.gamma, M=self.M)

    @property
    def made_with(self) -> ProSteps:
        return ProSteps(
            self.confidence, self.epsilon, self.steps, self.temperature, self.gamma, self.M
        )

    def _score(self, test: Features) -> Tensor:
        return recorded(test.pro_steps)[:, : self.steps + 1].double().amax(1)
