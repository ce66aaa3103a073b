"""The only place with hooks: a classifier and a batch of images in, Features out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from oodcli.detectors.gram import gram_sums
from oodcli.detectors.pro import uncertainty
from oodcli.detectors.rankfeat import rank_one
from oodcli.errors import DetectorError, OodcliError
from oodcli.features import (
    INPUT,
    LAST_MAP,
    MAKINGS,
    AdaScaleStep,
    BatchNorm,
    DropoutPasses,
    Features,
    Layer,
    Making,
    OdinStep,
    ProSteps,
    concatenate,
)
from oodcli.float64 import in_float64
from oodcli.networks.classifier import Classifier, Tap
from oodcli.networks.outputs import as_logits, copy_input, first_tensor, with_first
from oodcli.networks.thinned import Thinned
from oodcli.out_of_memory import halving, too_short
from oodcli.recording.channels_last import in_channels_last
from oodcli.recording.gradients import LayerGradients
from oodcli.recording.perturbed import (
    moved_by_adascale,
    moved_by_odin,
    moved_by_pro,
    odin_loss,
    pro_loss,
    sum_of_logits,
)
from oodcli.recording.reduced import after_batchnorm, by_image, peaks, spatial_moments
from oodcli.records import CONSTANTS, ROW_RECORDS, impossible

log = logging.getLogger(__name__)

KINDS = frozenset({"batchnorm", "block", "stage", "other"})

BY_LAYER = frozenset({"layers.gradient", "layers.nonzero"})
BY_IMAGE = frozenset({"odin.logits", "pro.steps", "adascale.u"})
BACKWARD = BY_LAYER | BY_IMAGE
"""Records that need a backward pass."""
AGAIN = BACKWARD | {"dropout.logits"}
"""Records that one forward pass does not give."""

MOMENTS = frozenset({"layers.mean", "layers.std"})
NORM_MOMENTS = frozenset({"batchnorm.mean", "batchnorm.var"})

Receive = Callable[[Tap, Tensor, Tensor], Tensor | None]


@contextmanager
def watch(
    classifier: Classifier, receive: Receive, kinds: frozenset[str] = KINDS
) -> Iterator[None]:
    """While open, each forward pass calls ``receive(tap, input, output)`` for every tap of these
    kinds, in order; what it returns, if not None, takes the place of the output. A module that
    is called twice in a pass has two taps."""
    taps = {tap.name: tap for tap in classifier.taps if tap.kind in kinds}
    modules = dict(classifier.network.named_modules())
    calls: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            tap = taps.get(name if calls[name] == 1 else f"{name}@{calls[name]}")
            first = None if tap is None else first_tensor(output)
            if tap is None or first is None:
                return None
            return with_first(output, receive(tap, args[0] if args else first, first))

        return after

    with ExitStack() as hooks:
        reset = classifier.network.register_forward_pre_hook(lambda *_: calls.clear())
        hooks.callback(reset.remove)
        for name in {tap.module: None for tap in taps.values()}:
            hooks.callback(modules[name].register_forward_hook(hook(name)).remove)
        yield


class Recorder:
    """Runs the network once per batch and keeps what was asked for; in smaller batches, from then
    on, where the memory is too short.

    what: words of ``records.ROW_RECORDS`` (plus ``label`` and ``head``, always kept), and
    ``mirror`` for a second pass over the mirror images.
    made_with: group → how to make its records, by default as usual.
    layers: names of the taps whose mean and std are recorded, ``LAST_MAP`` for the last one with
    positions; None for all. Where one is no tap, all are, so that detectors can say what they lack.
    Gradients add a backward pass, records of a changed image another forward pass: ``passes``.
    Raises DetectorError for a word that is unknown, or that this network cannot give.
    """

    def __init__(
        self,
        classifier: Classifier,
        what: frozenset[str],
        *,
        made_with: Mapping[str, Making] | None = None,
        precision: str = "float32",
        kinds: frozenset[str] = KINDS,
        layers: frozenset[str] | None = None,
    ) -> None:
        self.classifier = in_channels_last(classifier, precision)
        faster = self.classifier is not classifier
        self._layout = torch.channels_last if faster else torch.contiguous_format
        self.asked = what
        self.what = (what & frozenset(ROW_RECORDS)) - {"layers.sensitivity"}
        self.made_with = {
            group: (made_with or {}).get(group) or kind()
            for group, kind in MAKINGS.items()
            if any(word.startswith(f"{group}.") for word in self.what)
        }
        self.precision = precision
        self.kinds = kinds
        self._layers = self._with_moments(layers)
        self._most: int | None = None
        self._composite = {
            name for name, norm in classifier.batchnorms.items() if not only_normalises(norm)
        }
        constants = (what & frozenset(CONSTANTS)) - {"label", "mirror"}
        missing = sorted((self.what | constants) - recordable(classifier))
        if missing:
            raise DetectorError(why_not(classifier, missing))

    def _with_moments(self, layers: frozenset[str] | None) -> frozenset[str]:
        names = frozenset(tap.name for tap in self.classifier.taps)
        last = self.classifier.last_map
        if layers is None:
            return names
        if LAST_MAP in layers and last is not None:
            layers = layers - ({LAST_MAP} - names) | {last.name}
        return layers if layers <= names else names

    @property
    def _pro(self) -> ProSteps | None:
        found = self.made_with.get(ProSteps.group)
        return found if isinstance(found, ProSteps) else None

    @property
    def passes(self) -> tuple[int, int]:
        """Forward and backward passes of a batch. Where images are labelled, and the network does
        not agree, gradients of the label and of the prediction take a backward pass each."""
        odin, adascale = "odin.logits" in self.what, "adascale.u" in self.what
        steps = 0 if self._pro is None else self._pro.steps
        dropout = self.made_with.get(DropoutPasses.group)
        again = 0 if self.classifier.drops_embedding else 1
        thinned = again * dropout.passes if isinstance(dropout, DropoutPasses) else 0
        logit = adascale or bool(self.what & BY_LAYER)
        return 1 + odin + adascale + steps + thinned, logit + odin + steps

    @cached_property
    def _constants(self) -> dict[str, BatchNorm]:
        """BatchNorm's own memory by tap name, float32, with the input pseudo-layer first."""
        device = self.classifier.device
        preprocessing = self.classifier.preprocessing
        one = torch.ones(preprocessing.channels, device=device)
        height, width = preprocessing.input_size
        constants = {INPUT: BatchNorm(one * 0, one, one, one * 0, 0.0, height * width)}
        sizes = {tap.name: tap.spatial_size for tap in self.classifier.taps}
        for name, norm in self.classifier.batchnorms.items():
            constants[name] = batchnorm_constants(norm, sizes[name])
        return constants

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Features:
        """images: (N, C, H, W), normalised. labels: (N,) int64, -1 = unknown. Gradients are those
        of the label's logit, of the predicted class's where the label is unknown. Raises
        OodcliError when the memory is too short for a single image."""
        labels = torch.full((len(images),), -1) if labels is None else labels
        device, size = self.classifier.device, self.classifier.preprocessing.input_size
        parts: list[Features] = []
        first = 0
        while first < len(images) or not parts:
            most = min(self._most or len(images), len(images) - first)
            some = partial(self._some, images[first:], labels[first:])
            part, fits = halving(some, most, device, lambda _: OodcliError(too_short(device, size)))
            if fits < most:
                self._most = fits
            parts.append(part)
            first += fits
        return parts[0] if len(parts) == 1 else concatenate(parts)

    def _some(self, images: Tensor, labels: Tensor, count: int) -> Features:
        """Of the first ``count`` images."""
        images, labels = images[:count], labels[:count]
        seen = self._view(images, labels)
        if "mirror" not in self.asked:
            return seen
        return replace(seen, mirror=self._view(images.flip(3), labels))

    def _view(self, images: Tensor, labels: Tensor) -> Features:
        device = self.classifier.device
        images = images.contiguous(memory_format=self._layout)
        images = images.to(device, non_blocking=True)
        labels = labels.to(device)
        with_graph = bool(self.what & BACKWARD)
        layers: dict[str, Layer] = {}
        norms: dict[str, BatchNorm] = {}
        constants = {name: self._constants[name] for name in self._composite}
        gradients = LayerGradients(len(images), self.what, constants)
        embedding: list[Tensor] = []
        readings: dict[str, Tensor] = {}
        retrained = self.classifier.retrained
        last = self.classifier.last_map

        def receive(tap: Tap, given: Tensor, output: Tensor) -> Tensor | None:
            mean = variance = None
            words = self.what if tap.name in self._layers else self.what - MOMENTS
            seen = by_image(output.detach(), len(images), tap.channel_dim)
            if tap.kind == "batchnorm":
                norm = self._constants[tap.name]
                if words & (MOMENTS | NORM_MOMENTS):
                    mean, variance = spatial_moments(by_image(given.detach(), len(images)))
                    norms[tap.name] = self._normed(norm, mean, variance)
                    if words & MOMENTS:
                        mean, variance = after_batchnorm(norm, mean, variance)
            elif words & MOMENTS:
                mean, variance = spatial_moments(seen, tap.channel_dim)
            layers[tap.name] = Layer(
                tap.kind,
                mean if "layers.mean" in words else None,
                variance.sqrt() if variance is not None and "layers.std" in words else None,
                gram=gram_sums(seen.movedim(tap.channel_dim, 1))
                if tap.kind == "stage" and "layers.gram" in self.what
                else None,
                peak=peaks(seen, tap.channel_dim)
                if tap is last and "layers.peak" in self.what
                else None,
                rank1=rank_one(seen) if tap is last and "layers.rank1" in self.what else None,
            )
            if not gradients.asks(tap):
                return None
            if tap.name in self._composite:  # the output is no longer what was normalised
                gradients.watch(tap, given)
                return None
            return gradients.watch(tap, output)

        def keep_reading(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if retrained is not None:  # what follows may change these in place
                readings[retrained.word] = retrained.reading(output.detach().clone()).float()

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad() if with_graph else torch.inference_mode())
            stack.enter_context(self._autocast())
            if any(word.startswith(("layers.", "batchnorm.")) for word in self.what):
                stack.enter_context(watch(self.classifier, receive, self.kinds))
            if self.what & BY_LAYER:
                for name in self._composite:
                    norm = self.classifier.batchnorms[name]
                    stack.callback(norm.register_forward_pre_hook(copy_input).remove)
            if "embedding" in self.what or (
                "dropout.logits" in self.what and self.classifier.drops_embedding
            ):
                embedding = stack.enter_context(self._embeddings(len(images)))
            if retrained is not None and retrained.word in self.what:
                watched = retrained.get_submodule(retrained.watched)
                stack.callback(watched.register_forward_hook(keep_reading).remove)
            given = images
            if with_graph:  # where nothing needs it, the gradient by the image costs up to 40 %
                by_image_too = bool(self.what & BY_IMAGE or self._composite)
                given = images.detach().requires_grad_(by_image_too)
            logits = as_logits(self.classifier.network(given)).float()
        pro, moved = self._pro, dict[str, Tensor]()
        if with_graph:
            with torch.enable_grad():
                moved = self._differentiated(given, logits, labels, gradients)
            layers = gradients.into(layers, logits)
        if not any(word.startswith("layers.") for word in self.what):
            layers = {}
        return Features(
            count=len(images),
            label=labels,
            logits=logits.detach() if "logits" in self.what else None,
            embedding=embedding[0] if "embedding" in self.what else None,
            layers=layers,
            batchnorm=self._input_norm(images) | norms,
            odin_logits=self._logits(moved["odin"]) if "odin" in moved else None,
            pro_steps=None if pro is None else self._uncertainties(logits, moved["pro"], pro),
            adascale_u=self._embedding_of(moved["adascale"]) if "adascale" in moved else None,
            dropout_logits=self._dropout_logits(images, embedding)
            if "dropout.logits" in self.what
            else None,
            made_with=self.made_with,
            logits_level=self.classifier.logits_level,
            multi_label=self.classifier.multi_label,
            pooled=self.classifier.pooled,
            deconf_h=readings.get("deconf.h"),
            mos_others=readings.get("mos.others"),
            head=None if self.classifier.head is None else self.classifier.head.to(device),
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.classifier.device.type,
            dtype=torch.bfloat16,
            enabled=self.precision == "bfloat16",
        )

    def _normed(self, norm: BatchNorm, mean: Tensor, variance: Tensor) -> BatchNorm:
        count = norm.spatial_size
        unbiased = variance * (count / (count - 1)) if count > 1 else variance
        return replace(
            norm,
            mean=mean if "batchnorm.mean" in self.what else None,
            var=unbiased if "batchnorm.var" in self.what else None,
        )

    def _input_norm(self, images: Tensor) -> dict[str, BatchNorm]:
        if not self.what & NORM_MOMENTS:
            return {}
        return {INPUT: self._normed(self._constants[INPUT], *spatial_moments(images))}

    def _differentiated(
        self, given: Tensor, logits: Tensor, labels: Tensor, gradients: LayerGradients
    ) -> dict[str, Tensor]:
        """The changed images by group; the gradients by the layers' outputs are reduced on the way.
        One backward pass serves all records of the same loss."""
        top = logits.detach().argmax(1)
        target = torch.where(labels >= 0, labels, top)
        alike = torch.equal(target, top)
        by_label = frozenset({"layers.gradient"})
        by_top = frozenset({"layers.nonzero", "adascale.u"})
        losses: list[tuple[frozenset[str], Callable[[], Tensor]]] = [
            (by_label | by_top if alike else by_label, partial(sum_of_logits, logits, target)),
            (frozenset() if alike else by_top, partial(sum_of_logits, logits, top)),
        ]
        odin = self.made_with.get("odin")
        if isinstance(odin, OdinStep):
            losses.append((frozenset({"odin.logits"}), partial(odin_loss, logits, odin)))
        if self._pro is not None:
            losses.append((frozenset({"pro.steps"}), partial(pro_loss, logits, self._pro)))
        wanted = [(words & self.what, loss) for words, loss in losses if words & self.what]
        if not given.requires_grad and not logits.requires_grad:
            return {}  # they depend on no watched layer
        sources = [given] if given.requires_grad else gradients.leaves
        moved = {}
        for number, (words, loss) in enumerate(wanted, 1):
            gradients.now = words
            gradient = torch.autograd.grad(
                loss(), sources, retain_graph=number < len(wanted), allow_unused=True
            )[0]
            gradient = torch.zeros_like(given) if gradient is None else gradient
            for group in {word.partition(".")[0] for word in words} & self.made_with.keys():
                moved[group] = self._moved(group, given.detach(), gradient)
        return moved

    def _moved(self, group: str, images: Tensor, gradient: Tensor) -> Tensor:
        """The images changed along a gradient."""
        how = self.made_with[group]
        if isinstance(how, OdinStep):
            std = images.new_tensor(self.classifier.preprocessing.std).view(-1, 1, 1)
            return moved_by_odin(images, gradient, std, how)
        if isinstance(how, AdaScaleStep):
            return moved_by_adascale(images, gradient, how)
        assert isinstance(how, ProSteps)
        return moved_by_pro(images, gradient, how)

    def _logits(self, images: Tensor) -> Tensor:
        """(N, K) of changed images."""
        with torch.inference_mode(), self._autocast():
            return as_logits(self.classifier.network(images)).float()

    def _embedding_of(self, images: Tensor) -> Tensor:
        """(N, D) of changed images."""
        with self._embeddings(len(images)) as found:
            self._logits(images)
        return found[0]

    def _uncertainties(self, logits: Tensor, moved: Tensor, how: ProSteps) -> Tensor:
        """(N, T + 1) float32: PRO's uncertainty of the images and after each step. logits: of the
        images. moved: the images after the first step."""
        found = [uncertainty(in_float64(logits.detach()), how)]
        for _ in range(how.steps - 1):
            given = moved.requires_grad_()
            with torch.enable_grad():
                with self._autocast():
                    z = as_logits(self.classifier.network(given)).float()
                (gradient,) = torch.autograd.grad(pro_loss(z, how), given)
            found.append(uncertainty(in_float64(z.detach()), how))
            moved = moved_by_pro(given.detach(), gradient, how)
        found.append(uncertainty(in_float64(self._logits(moved)), how))
        return torch.stack(found, 1).float().to(logits.device)

    @cached_property
    def _thinned(self) -> Thinned:
        how = self.made_with[DropoutPasses.group]
        assert isinstance(how, DropoutPasses)
        return Thinned(self.classifier.network, how)

    def _dropout_logits(self, images: Tensor, embedding: list[Tensor]) -> Tensor:
        """(N, n·K) of n passes with dropout. The passes need the head alone where there is no
        dropout before its input. embedding: that, (N, D)."""
        thinned, head = self._thinned, self.classifier.head
        found = []
        for number in range(thinned.how.passes):
            if self.classifier.drops_embedding and head is not None:
                mask = thinned.mask(number, self.classifier.dropouts[0], 1, embedding[0])
                weight, bias = (each.to(mask.device) for each in (head.weight, head.bias))
                found.append((embedding[0] * mask.flatten()) @ weight.T + bias)
                continue
            with thinned.passing(number, len(images)):
                found.append(self._logits(images))
        return torch.cat(found, 1)

    @contextmanager
    def _embeddings(self, count: int) -> Iterator[list[Tensor]]:
        """While open, each forward pass appends the input of the head, (N, D). count: N."""
        found: list[Tensor] = []

        # What follows may change it in place: a copy is as small as the logits.
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = args[0].detach()
            given = given.float().mean((2, 3)) if isinstance(module, nn.Conv2d) else given.clone()
            found.append(given.reshape(count, -1).float())

        head = self.classifier.network.get_submodule(self.classifier.head_name or "")
        handle = head.register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()


def only_normalises(norm: _BatchNorm) -> bool:
    """Whether a BatchNorm layer does no more than that, unlike timm's ``BatchNormAct2d``, which
    holds the activation that follows."""
    own = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    hooked = norm._forward_hooks or norm._forward_pre_hooks
    return type(norm).forward in own and "forward" not in vars(norm) and not hooked


def batchnorm_constants(norm: _BatchNorm, spatial_size: int) -> BatchNorm:
    """What a BatchNorm layer remembers, float32; weight 1 and bias 0 where it has none."""
    if norm.running_mean is None or norm.running_var is None:
        raise DetectorError("a BatchNorm layer keeps no running statistics")
    mean = norm.running_mean.float()
    return BatchNorm(
        running_mean=mean,
        running_var=norm.running_var.float(),
        weight=torch.ones_like(mean) if norm.weight is None else norm.weight.float(),
        bias=torch.zeros_like(mean) if norm.bias is None else norm.bias.float(),
        eps=norm.eps,
        spatial_size=spatial_size,
    )


def recordable(classifier: Classifier) -> frozenset[str]:
    """Which words of ``ROW_RECORDS`` this network can give."""
    words = {"logits", "odin.logits", "pro.steps"}
    words |= {"batchnorm.mean", "batchnorm.var"}  # of the image itself
    if classifier.logits_level:
        words |= {"logits.level"}
    if classifier.multi_label:
        words |= {"multi-label"}
    if classifier.head_name is not None:
        words |= {"embedding", "adascale.u"}
    if classifier.head is not None:
        words |= {"head"}
    if classifier.retrained is not None:
        words |= {classifier.retrained.word}
    if classifier.taps:
        words |= {"layers.mean", "layers.std", "layers.gradient"}
    if any(tap.kind == "stage" for tap in classifier.taps):
        words |= {"layers.gram"}
    if classifier.pooled:
        words |= {"pooled", "layers.rank1"}
    if classifier.last_map is not None:
        words |= {"layers.peak"}
    if classifier.dropouts:
        words |= {"dropout.logits"}
    if classifier.batchnorms:
        words |= {"batchnorm.running", "layers.sensitivity"}
    if classifier.batchnorms and not only_smooth(classifier.network):
        words |= {"layers.nonzero"}
    return frozenset(words)


FLAT = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardtanh, nn.Threshold)
SMOOTH = (nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.PReLU, nn.Softplus)
"""Activations with and without a part on which the gradient is 0."""


def only_smooth(network: nn.Module) -> bool:
    """Whether the network has activation modules, and no gradient is ever 0 behind them."""
    modules = list(network.modules())
    smooth, flat = (any(isinstance(m, kinds) for m in modules) for kinds in (SMOOTH, FLAT))
    return smooth and not flat


def records_of(classifier: Classifier, tap: Tap) -> list[str]:
    """Which words of ``ROW_RECORDS`` a tap gives."""
    words = {"layers.mean", "layers.std", "layers.gradient"}
    if tap.kind == "batchnorm":
        words |= {"batchnorm.mean", "batchnorm.var", "layers.sensitivity"}
    if tap.kind == "batchnorm":
        words |= recordable(classifier) & {"layers.nonzero"}
    if tap.kind == "stage":
        words |= {"layers.gram"}
    if tap == classifier.last_map:
        words |= {"layers.peak"}
        words |= {"layers.rank1"} if classifier.pooled else set()
    return [word for word in ROW_RECORDS if word in words]


def why_not(classifier: Classifier, words: list[str]) -> str:
    """One sentence for what a network cannot give."""
    reasons = impossible(words, tapped=bool(classifier.taps))
    return f"{classifier.arch} cannot give {', '.join(words)}: {reasons}"
