"""A segmentor of the user's own: any nn.Module from images to logits, as the package needs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.models.batch_norm import BatchNorm2d
from distseg.models.grids import cropped, num_cells, to_multiple
from distseg.models.trial import MAX_SIZE_PX, StepImages, Trial, made, odd_multiple, random_images
from distseg.models.weights import LoadReport, Weights, load_own
from shards import user_code
from shards.errors import InputError

MULTIPLES = (1, 2, 4, 8, 16, 32, 64)  # of pixels a side, that networks ask for
MAX_STRIDE = MULTIPLES[-1]
# as torchvision's and segmentation_models_pytorch's answer; of the second in training mode alone
OUT, AUXILIARY = "out", "aux"


class OwnSegmentor(nn.Module):
    """A network of the user's own behind the interface of the package's segmentors.

    forward: image (N, 3, H, W) float in [0, 1], RGB -> logits (N, C, ceil(H/s), ceil(W/s)); in
    training mode, where the network answers with an auxiliary head's logits too, {"out", "aux"}.
    A network that takes multiples of `size_multiple` pixels only gets an image whose border is
    repeated up to there, and the logits are cropped.

    Found by trying it: output_stride s, size_multiple. Its own attributes come first: encoder,
    whose learning rate has a factor of its own, size_multiple, and min_size_px. Layers of
    nn.BatchNorm2d become the package's, which can be frozen and synchronised; names and numbers
    stay.
    """

    init_report: LoadReport | None = None  # what was taken from a file of weights
    has_auxiliary = False  # whether it answers with "aux" in training mode; see check_training

    def __init__(self, trial: Trial, num_classes: int):
        super().__init__()
        self.network, self.num_classes = trial.network, num_classes
        for layer in self.network.modules():
            if type(layer) is nn.BatchNorm2d:
                # the class alone is changed: weights, statistics and whoever else holds the layer
                # keep it
                layer.__class__ = BatchNorm2d
        self.min_size_px = trial.positive("min_size_px", 32)
        self.size_multiple = trial.positive("size_multiple", 1)
        # a copy: forwards of the trial would move counters and statistics of the network that is
        # trained
        evaluated = Evaluated(trial, trial.copied().eval(), num_classes)
        self.output_stride = evaluated.output_stride(self.size_multiple)
        if not hasattr(self.network, "size_multiple"):
            self.size_multiple = evaluated.size_multiple(self.output_stride)

    @property
    def encoder(self) -> nn.Module | None:
        """The network's own `encoder`, where it has one."""
        encoder = getattr(self.network, "encoder", None)
        return encoder if isinstance(encoder, nn.Module) else None

    def forward(self, image: Tensor) -> Any:
        stride, multiple = self.output_stride, self.size_multiple
        if multiple == 1:
            answer, size = self.network(image), None
        else:
            if stride > 1:
                image = to_multiple(image, stride)  # or the last cell would hang over
            size = image.shape[-2:]
            below, right = (num_cells(side, multiple) * multiple - side for side in size)
            # the border is repeated: zeros would be an edge that is in no picture
            answer = self.network(F.pad(image, (0, right, 0, below), mode="replicate"))
        if not isinstance(answer, Mapping):
            return _cropped(answer, size, stride)
        logits = _cropped(answer[OUT], size, stride)
        # in evaluation always a tensor, as exports, predictions and scores know of no auxiliary
        # head
        if not self.training or answer.get(AUXILIARY) is None:
            return logits
        return {OUT: logits, AUXILIARY: _like(answer[AUXILIARY], answer[OUT], logits)}


def own_segmentor(
    reference: str, num_classes: int, weights: Weights | None, options: Mapping[str, Any]
) -> OwnSegmentor:
    """The segmentor that a reference makes (see shards.user_code), tried in evaluation mode.

    weights: of it or its encoder; None: as its constructor makes them. Raises InputError for
    whatever keeps it from being a segmentor.
    """
    segmentor = OwnSegmentor(made("segmentor", reference, num_classes, options), num_classes)
    if weights is not None:
        segmentor.init_report = load_own(segmentor.network, weights, num_classes)
    return segmentor


def check_training(segmentor: OwnSegmentor, reference: str) -> None:
    """Try it in training mode, and note whether it has an auxiliary head.

    Raises InputError for an answer that is none, and unless every parameter gets a gradient.
    """
    trial = Trial(segmentor.network, user_code.load(reference, "segmentor"), "segmentor")
    network = trial.copied().train()
    height, width = _sides(segmentor.size_multiple)
    answer = trial.answer(network, random_images(2, height, width))
    logits = {OUT: _logits(trial, answer, segmentor.num_classes)}
    auxiliary = answer.get(AUXILIARY) if isinstance(answer, Mapping) else None
    if auxiliary is not None:
        logits[AUXILIARY] = _logits(trial, {OUT: auxiliary}, segmentor.num_classes)
    segmentor.has_auxiliary = auxiliary is not None
    if tuple(logits[OUT].shape[-2:]) != tuple(
        side // segmentor.output_stride for side in (height, width)
    ):
        got = f"logits of {_size(logits[OUT])} for {height}x{width} px in training mode"
        needed = f"the size that it has in evaluation mode: stride {segmentor.output_stride}"
        raise trial.refused(got, needed)
    trial.check_gradients(network, logits.values())
    trial.check_same_tensors(network)
    images = random_images(2, height, width)

    def answers(redrawn: nn.Module) -> list[Tensor]:
        found = trial.answer(redrawn, images)
        return [found[OUT] if isinstance(found, Mapping) else found]

    trial.check_range([logits[OUT]], answers, lambda each: (each < 0) | (each > 1))


def check_step(segmentor: OwnSegmentor, reference: str, images: StepImages) -> None:
    """Try it in training mode on what a step gives it; its batch normalisation is chosen by now.

    Raises InputError for what goes wrong in it, and for logits of another size.
    """
    trial = Trial(segmentor.network, user_code.load(reference, "segmentor"), "segmentor")
    side, count = images.side_px, images.num_all
    needed = f"an answer in training to {count} image(s) of {side}x{side} px at a time"
    with torch.no_grad():
        # two stand for any number: what one image lacks is a second one
        pixels = random_images(min(count, 2), side, side)
        answer = trial.tried(segmentor.train(), pixels, needed=needed)
    logits = answer[OUT] if isinstance(answer, Mapping) else answer
    cells = num_cells(side, segmentor.output_stride)
    if tuple(logits.shape[-2:]) != (cells, cells):
        got = f"logits of {_size(logits)} for {side}x{side} px in training mode"
        raise trial.refused(got, f"{cells}x{cells}, by its stride of {segmentor.output_stride}")


@dataclass(frozen=True)
class Evaluated:
    """A copy of a network in evaluation mode, to measure it."""

    trial: Trial
    network: nn.Module
    num_classes: int

    @torch.no_grad()
    def logits(self, height: int, width: int) -> Tensor:
        """Of two random images. Raises InputError where they are none."""
        answer = self.trial.answer(self.network, random_images(2, height, width))
        return _logits(self.trial, answer, self.num_classes)

    def output_stride(self, multiple: int) -> int:
        """At two sizes, or a network of one size would be taken for one of any."""
        sides = _sides(multiple)
        strides = set()
        # not square, or a network that swaps both sides would pass
        for height, width in (sides, sides[::-1]):
            logits = self.logits(height, width)
            strides |= {height / logits.shape[2], width / logits.shape[3]}
        # height and width at both sizes: four quotients, which have to be one
        stride = strides.pop()
        if strides or not stride.is_integer() or stride > MAX_STRIDE:
            got = f"logits of {_size(logits)} for {height}x{width} px"
            needed = f"the image's size by a whole number, the output stride (1 to {MAX_STRIDE})"
            raise self.trial.refused(got, needed)
        return int(stride)

    def size_multiple(self, stride: int) -> int:
        """The smallest of MULTIPLES whose multiples it takes: U-Nets, for one, join halved maps."""
        # upwards: the smallest pads least
        return next((each for each in MULTIPLES[:-1] if self._takes(each, stride)), MULTIPLES[-1])

    def _takes(self, multiple: int, stride: int) -> bool:
        # odd multiples, as an even one would be a multiple of twice the number as well
        height, width = odd_multiple(multiple, 32), odd_multiple(multiple, 65)
        try:
            logits = self.logits(height, width)
        except InputError:  # part of the search
            return False
        return tuple(logits.shape[-2:]) == (num_cells(height, stride), num_cells(width, stride))


def _sides(multiple: int) -> tuple[int, int]:
    """Two sides that every stride divides, and `multiple`."""
    common = math.lcm(MAX_STRIDE, multiple)
    # a number without a factor of 2 would ask for images that no memory holds
    common = common if common <= MAX_SIZE_PX else multiple
    least = math.ceil(128 / common)
    return least * common, (least + 1) * common


def _logits(trial: Trial, answer: Any, num_classes: int) -> Tensor:
    """The logits of an answer. Raises InputError where there are none, or not as they should be."""
    needed = f"logits (N, {num_classes}, h, w), or a dict with them as {OUT!r}"
    if isinstance(answer, Mapping):
        if OUT not in answer:
            raise trial.refused(f"a dict with the keys {', '.join(map(str, answer))}", needed)
        answer = answer[OUT]
    if not isinstance(answer, Tensor):
        what = type(answer).__name__
        length = f" of {len(answer)}" if isinstance(answer, tuple | list) else ""
        raise trial.refused(f"answers with a {what}{length}", needed, "return the tensor of logits")
    if answer.ndim != 4 or len(answer) != 2 or not answer.is_floating_point():
        got = f"an answer of shape {tuple(answer.shape)}, {answer.dtype}, for 2 images"
        raise trial.refused(got, needed)
    if answer.shape[1] != num_classes:
        got = f"logits of {answer.shape[1]} classes, made with num_classes={num_classes}"
        raise trial.refused(got, needed, "use num_classes in its last layer")
    trial.check_finite(answer, "its logits")
    return answer


def _cropped(logits: Tensor, size: Any, stride: int) -> Tensor:
    """The logits of an image of `size` (None: of all that the network saw)."""
    if size is None:
        return logits
    return cropped(logits, (num_cells(size[0], stride), num_cells(size[1], stride)))


def _like(auxiliary: Tensor, whole: Tensor, part: Tensor) -> Tensor:
    """Auxiliary logits, at a resolution of their own, cropped as `part` was from `whole`."""
    rows, columns = (
        math.ceil(of * kept / all_)
        for of, kept, all_ in zip(
            auxiliary.shape[-2:], part.shape[-2:], whole.shape[-2:], strict=True
        )
    )
    return auxiliary[..., :rows, :columns]


def _size(logits: Tensor) -> str:
    return f"{logits.shape[-2]}x{logits.shape[-1]}"
