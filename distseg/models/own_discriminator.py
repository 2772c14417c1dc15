"""A discriminator of the user's own, as the package needs it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distseg.models.checks import require_size
from distseg.models.trial import StepImages, Trial, made, random_images, random_label_maps
from distseg.models.weights import LoadReport
from shards import user_code
from shards.errors import InputError

SIDES = (1, 2, 4, 8, 16, 32, 64, 128)  # of label maps, for the smallest that it takes
LARGE = 128  # a label map that patches, if there are any, have several of
FEATURES = "features"  # the option of a forward that has any
FORMS = "forward(image, *label_maps), forward(image, label_map) or forward(label_map)"


class OwnDiscriminator(nn.Module):
    """A network of the user's own behind the interface of the package's discriminators.

    It is called as its forward is written: with image and all label maps, with an image and one
    label map, or with one label map alone; the last two once for each. Answers of one number per
    image, (k,) or (k, 1), become (k, 1, 1, 1). Found by trying it, unless it has an attribute of
    the name: min_size_px, and head, "patch" where an answer has several cells, else "image".
    has_features: its forward takes features=True, of which it answers with a pair, the logits as
    ever and as many (k, K).
    """

    init_report: LoadReport | None = None  # what was taken from a file of weights

    def __init__(self, trial: Trial, num_classes: int, label_map_px: int | None = None):
        super().__init__()
        self.network, self.num_classes = trial.network, num_classes
        self.num_inputs = _num_inputs(trial)
        self.sees_image = self.num_inputs != 1
        self.has_features = FEATURES in inspect.signature(self.network.forward).parameters
        own_size = getattr(self.network, "min_size_px", None)
        self.min_size_px = 1 if own_size is None else trial.positive("min_size_px", 1)
        # before anything of that size is tried, which may take minutes
        if label_map_px is not None and self.min_size_px > label_map_px:
            got = f"min_size_px={self.min_size_px}, for label maps of {label_map_px} px in training"
            action = "write a larger data.crop_px, or loss.map_resolution=image"
            raise trial.refused(got, "label maps that are as large", action)
        # one size is tried whatever it asks for; the smallest is searched only where it does not
        # say
        large = max(LARGE, self.min_size_px)
        scores = _tried(trial, self, large, training=False)
        has_cells = scores[0].shape[-2:] != (1, 1)
        own_head = getattr(self.network, "head", None)
        # a word: many networks call a layer of theirs so
        is_said = isinstance(own_head, str)
        self.head = str(own_head) if is_said else "patch" if has_cells else "image"
        # its losses are means over cells or over images, by this word
        if self.head not in ("patch", "image") or (self.head == "image" and has_cells):
            got = f"head={self.head!r}, with scores of {tuple(scores[0].shape)}"
            needed = "'patch', or 'image' where an image has one score"
            raise trial.refused(got, needed, "correct the attribute head, or remove it")
        if own_size is None:
            self.min_size_px = next(
                side for side in (*SIDES[:-1], large) if side == large or _takes(trial, self, side)
            )

    def forward(self, image: Tensor, *label_maps: Tensor, features: bool = False) -> Any:
        for label_map in label_maps:
            require_size(label_map, self.min_size_px, "label map")
        if not features:
            return judged(self.network, self.num_inputs, image, label_maps)
        return judged_with_features(self.network, self.num_inputs, image, label_maps)


def judged(
    network: nn.Module, num_inputs: int | None, image: Tensor, label_maps: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The network's logits, called as its forward is written; see _num_inputs."""
    answers = _called(network, num_inputs, image, label_maps)
    if not isinstance(answers, tuple | list):
        answers = [answers]
    return tuple(_scores(answer) for answer in answers)


def judged_with_features(
    network: nn.Module, num_inputs: int | None, image: Tensor, label_maps: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The network's logits and its features (k, K) of each label map."""
    answers = _called(network, num_inputs, image, label_maps, **{FEATURES: True})
    pairs = [answers] if num_inputs is None else answers
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        got = f"a discriminator that answers to {FEATURES}=True without a pair"
        action = f"return logits, {FEATURES} where {FEATURES} is true"
        raise InputError(got, f"a pair of logits and {FEATURES}", action)
    logits, features = answers if num_inputs is None else zip(*pairs, strict=True)
    return tuple(_scores(answer) for answer in logits), tuple(features)


def _called(
    network: nn.Module,
    num_inputs: int | None,
    image: Tensor,
    label_maps: tuple[Tensor, ...],
    **options: bool,
) -> Any:
    """What the network answers to all label maps together, or a list of answers to each."""
    if num_inputs is None:
        return network(image, *label_maps, **options)
    if num_inputs == 2:
        # ground truth has the labelled images alone, which are the first
        return [network(image[: len(each)], each, **options) for each in label_maps]
    return [network(each, **options) for each in label_maps]


def own_discriminator(
    reference: str,
    num_classes: int,
    options: Mapping[str, Any],
    label_map_px: int | None = None,
) -> OwnDiscriminator:
    """The discriminator that a reference makes (see shards.user_code), tried in evaluation mode.

    label_map_px: of the label maps that it is to judge; None: any size. Raises InputError for
    whatever keeps it from being a discriminator.
    """
    trial = made("discriminator", reference, num_classes, options)
    return OwnDiscriminator(trial, num_classes, label_map_px)


def check_training(discriminator: OwnDiscriminator, reference: str) -> None:
    """Try it in training mode.

    Raises InputError for an answer that is none, and unless every parameter and the label map get a
    gradient.
    """
    trial = Trial(
        discriminator.network, user_code.load(reference, "discriminator"), "discriminator"
    )
    side = max(32, discriminator.min_size_px)
    scores = _tried(trial, discriminator, side, training=True)
    label_map = random_label_maps(2, discriminator.num_classes, side)
    image = random_images(2, side, side)

    def answers(redrawn: nn.Module) -> tuple[Tensor, ...]:
        return judged(redrawn, discriminator.num_inputs, image, (label_map,))

    # above 0 is real: one that is never below 0 could call nothing fake
    trial.check_range(scores, answers, lambda each: each < 0)
    if discriminator.has_features:
        _check_features(trial, discriminator, side)


def _check_features(trial: Trial, discriminator: OwnDiscriminator, side: int) -> None:
    """Raise InputError unless it gives features of label maps, through which the segmentor learns.

    Of 2 and 3 images, so that features of another number are told from a mean over images.
    """
    copy = trial.copied().train()
    maps = [random_label_maps(k, discriminator.num_classes, side) for k in (2, 3)]
    for each in maps:
        each.requires_grad_()

    def forward(image: Tensor, *label_maps: Tensor) -> Any:
        return judged_with_features(copy, discriminator.num_inputs, image, label_maps)

    with torch.enable_grad():
        _, features = trial.answer(forward, random_images(3, side, side), *maps)
    shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each) for each in features]
    # of any width, but one: means over images of two label maps are compared
    width = features[0].shape[-1] if isinstance(features[0], Tensor) and features[0].ndim else 0
    if shapes != [(2, width), (3, width)] or not width:
        got = f"{FEATURES} {', '.join(map(str, shapes))} of label maps of 2 and 3 images"
        raise trial.refused(got, "a tensor (k, K) for each label map, K the same for all")
    for each in features:
        trial.check_finite(each, f"its {FEATURES}")
    # squared, as a sum of normalised features would have no gradient
    total = torch.stack([each.float().square().sum() for each in features]).sum()
    found = torch.autograd.grad(total, maps, allow_unused=True) if total.requires_grad else [None]
    if any(gradient is None for gradient in found):
        got = f"no gradient of its {FEATURES} reaches the label map"
        raise trial.refused(got, "one that the segmentor can follow")


def check_step(discriminator: OwnDiscriminator, reference: str, images: StepImages) -> None:
    """Try it in training mode on what a step gives it. Raises InputError for what goes wrong."""
    trial = Trial(
        discriminator.network, user_code.load(reference, "discriminator"), "discriminator"
    )
    side, of_maps = images.side_px, images.label_map_px
    # three stand for any number, as two for the labelled ones: what one image lacks is a second
    real, fake = (
        random_label_maps(count, discriminator.num_classes, of_maps)
        for count in (min(images.num_labelled, 2), min(images.num_all, 3))
    )
    pixels = random_images(len(fake), side, side)
    needed = (
        f"scores of {images.num_labelled} label map(s) of {of_maps}x{of_maps} at a time, with "
        f"images of {side}x{side} px"
    )
    with torch.no_grad():
        # of predictions alone too, as in the segmentor's turn of alternation=blocks
        for label_maps in ((real, fake), (fake,)):
            trial.tried(discriminator.train(), pixels, *label_maps, needed=needed)


def _tried(
    trial: Trial, discriminator: OwnDiscriminator, side: int, training: bool
) -> list[Tensor]:
    """Its answers to two label maps, of fewer images and of all. Raises InputError for others."""
    copy = trial.copied().train(training)
    # of 2 and 3 images, so that answers of another number are told from those of a mean over images
    label_maps = [random_label_maps(k, discriminator.num_classes, side) for k in (2, 3)]
    for each in label_maps:
        # the segmentor learns through the label map: without its gradient the adversary teaches
        # nothing
        each.requires_grad_(training)

    def forward(image: Tensor, *label_maps: Tensor) -> tuple[Tensor, ...]:
        return judged(copy, discriminator.num_inputs, image, label_maps)

    with torch.set_grad_enabled(training):
        scores = trial.answer(forward, random_images(3, side, side), *label_maps)
    needed = "for each label map (k, C, h, w) logits (k,), (k, 1) or (k, 1, h', w')"
    shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each) for each in scores]
    rows = [shape[:2] if isinstance(shape, tuple) else None for shape in shapes]
    if rows != [(2, 1), (3, 1)] or any(each.ndim != 4 or each.numel() == 0 for each in scores):
        got = f"answers {', '.join(map(str, shapes))} to label maps of 2 and 3 images"
        raise trial.refused(got, needed)
    for each in scores:
        trial.check_finite(each, "its logits")
    if training:
        trial.check_gradients(copy, scores, label_maps)
        trial.check_same_tensors(copy)
    return list(scores)


def _takes(trial: Trial, discriminator: OwnDiscriminator, side: int) -> bool:
    try:
        return bool(_tried(trial, discriminator, side, training=False))
    except InputError:  # part of the search
        return False


def _num_inputs(trial: Trial) -> int | None:
    """2: an image and a label map; 1: a label map; None: an image and any number of label maps."""
    taken = list(inspect.signature(trial.network.forward).parameters.values())
    if any(each.kind is each.VAR_POSITIONAL for each in taken):
        return None
    needed = [each for each in taken if each.default is each.empty and each.name != FEATURES]
    if len(needed) not in (1, 2):
        got = f"forward({', '.join(each.name for each in taken)})"
        raise trial.refused(got, FORMS)
    return len(needed)


def _scores(answer: Any) -> Any:
    """One number per image with the dimensions of a map; everything else as it is."""
    if isinstance(answer, Tensor) and (answer.ndim == 1 or answer.shape[1:] == (1,)):
        return answer.reshape(-1, 1, 1, 1)
    return answer
