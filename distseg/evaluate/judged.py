"""What a run's discriminator says of label maps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from distseg.config.schema import ADAPTATION, Config
from distseg.losses.adversarial import FORMS, real_label_map, realness_at, self_information
from distseg.losses.tensors import at_least_float32, label_at, upsample
from shards.errors import InputError


def sees_self_information(config: Config) -> bool:
    """Whether a run's discriminator sees that of predictions, and not their probabilities."""
    return config.mode in ADAPTATION and config.adaptation.input == "self_information"


def judges_auxiliary(config: Config) -> bool:
    """Whether a run has a second discriminator, of the segmentor's auxiliary output."""
    return config.mode in ADAPTATION and config.adaptation.aux_adv_weight > 0


@torch.no_grad()
def confidence_map(
    segmentor: nn.Module,
    discriminator: nn.Module,
    config: Config,
    image: np.ndarray,
    label: Tensor | None = None,
) -> np.ndarray:
    """How real the discriminator takes a label map of an image to be, at every pixel.

    segmentor, discriminator: in evaluation mode, on one device. image: (H, W, 3) uint8 RGB. label:
    (H, W) uint8, 255 = void, seen as ground truth is in training; None: the segmentor's own
    probabilities. Returns (H, W) float32 in [0, 1], the probability of being real (of hinge the
    sigmoid of the score, which is none); one value throughout where the discriminator judges the
    image as a whole. Of mode=domain_adaptation "real" is the source; InputError for a label there.
    """
    loss = config.loss
    if label is not None and config.mode in ADAPTATION:
        got = f"a mask for the discriminator of a run with mode={config.mode}"
        needed = "the segmentor's own prediction: it has never seen ground truth"
        raise InputError(got, needed, "leave the mask out")
    weight = next(segmentor.parameters())
    pixels = torch.from_numpy(image.copy()).to(weight.device).permute(2, 0, 1)[None] / 255
    logits = at_least_float32(segmentor(pixels.to(weight.dtype)))  # (1, C, h, w)
    if loss.map_resolution == "image":
        logits = upsample(logits, pixels.shape[-2:])
    label_map = logits.softmax(1).float()  # as the discriminator's weights are stored
    if label is not None:
        index, valid = label_at(label.to(pixels.device)[None], label_map.shape[-2:])
        tau = loss.scaling_tau if loss.real_map == "scaling" else None
        label_map = real_label_map(index, valid, label_map, tau)
    if sees_self_information(config):
        label_map = self_information(label_map)
    (scores,) = discriminator(pixels, label_map)  # (1, 1, h', w') or (1, 1, 1, 1)
    confidence = realness_at(scores, image.shape[:2], FORMS[loss.adv_form])
    return confidence[0].float().cpu().numpy()
