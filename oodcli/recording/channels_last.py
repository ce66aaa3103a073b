"""The same network, laid out in memory for speed."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from oodcli.networks.classifier import Classifier

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Float32(nn.Module):
    """A head that autocast leaves alone: bfloat16 has eight bits, so that many images would share
    a logit, and their scores would tie."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())  # type: ignore[no-any-return]


class _Float32Linear(_Float32, nn.Linear):
    pass


class _Float32Conv(_Float32, nn.Conv2d):
    pass


_IN_FLOAT32: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Float32Linear,
    nn.Conv2d: _Float32Conv,
}


def in_channels_last(classifier: Classifier, precision: str) -> Classifier:
    """A classifier that gives the same, faster: channels last (with float32 on a CPU alone: a GPU
    gains nothing by it), and with ``bfloat16``, for use under autocast, the convolutions' weights
    of that type and the head of float32. All other weights are shared. The classifier itself, where
    its network does not take that layout, as with ``x.view(len(x), -1)`` of a feature map."""
    half = precision == "bfloat16"
    device = classifier.device
    if not half and device.type != "cpu":
        return classifier
    kept = {
        id(each): each for each in (*classifier.network.parameters(), *classifier.network.buffers())
    }
    network = copy.deepcopy(classifier.network, kept)
    head = None
    if half and classifier.head_name is not None:
        head = network.get_submodule(classifier.head_name)
        head.__class__ = _IN_FLOAT32.get(type(head), type(head))
    for module in network.modules():
        # A weight that is computed, as by weight normalisation, is no parameter.
        if isinstance(module, CONVOLUTIONS) and "weight" in module._parameters:
            weight = module.weight.detach()
            weight = weight.to(torch.bfloat16) if half and module is not head else weight
            if weight.ndim == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            module.weight = nn.Parameter(weight, requires_grad=False)
    found = replace(classifier, network=network)
    height, width = classifier.preprocessing.input_size
    trial = torch.zeros(2, classifier.preprocessing.channels, height, width, device=device)
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            network(trial.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return classifier
    return found
