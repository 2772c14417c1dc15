"""Segmentors that are any head on any encoder, by the name HEAD_ENCODER: `dpt_vitb14`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_exporting

from distseg.models.aspp import fcn_head
from distseg.models.checks import require_flag, require_size
from distseg.models.encoders import ENCODERS
from distseg.models.grids import cropped, num_cells, to_multiple
from distseg.models.heads import HEADS
from distseg.models.levels import Encoder, Head, scaled
from distseg.models.weights import LoadReport
from shards.errors import InputError


class Composed(nn.Module):
    """An encoder and a head on its feature maps.

    forward: image (N, 3, H, W) float in [0, 1], RGB, H and W >= 32 -> logits (N, C, ceil(H/s),
    ceil(W/s)), s the head's output_stride, on a grid that starts at the image's corner. An image of
    no whole number of the encoder's coarsest cells gets a border, its own repeated, below and to
    the right, and the logits there are cut off; one of a whole number is taken as it is, which is
    what windows of such a size make of every image (evaluate.sliding_window). feature_factors:
    what each channel of the encoder's maps is multiplied by, (N, c) for each c of
    feature_channels; None: nothing is. auxiliary: a second head, a small FCN, on the level before
    the last (Zhao et al. 2017), whose logits forward gives in training mode: {"out": logits, "aux":
    logits of the same size}. Raises InputError for a smaller image.
    """

    min_size_px = 32
    init_report: LoadReport | None = None  # what was taken from a file of weights

    def __init__(self, encoder: Encoder, head: Head, *, auxiliary: bool = False):
        super().__init__()
        require_flag("segmentor.options.auxiliary", auxiliary)
        self.encoder, self.head = encoder, head
        self.num_classes, self.output_stride = head.num_classes, head.output_stride
        # with whole cells of the coarsest level every level's grid ends where the image does
        self.size_multiple = max(level.stride for level in encoder.levels)
        self.feature_channels = tuple(level.channels for level in encoder.levels)
        # last, so that the other layers' first weights do not depend on it
        self.has_auxiliary = auxiliary
        if auxiliary:
            self.auxiliary = fcn_head(encoder.levels[-2:][0].channels, head.num_classes)

    def forward(self, image: Tensor, feature_factors: Sequence[Tensor] | None = None) -> Any:
        require_size(image, self.min_size_px)
        # fmt: off
        image = to_multiple(image, self.output_stride)   # (N, 3, H, W), whole cells of the logits
        grid = (image.shape[-2] // self.output_stride, image.shape[-1] // self.output_stride)
        maps = self.encoder(self._bordered(image))       # (N, channels, H/stride, W/stride) each
        maps = scaled(maps, feature_factors)             # the same
        logits = self.head(maps)                         # (N, C, h + border, w + border)
        # fmt: on
        if not (self.training and self.has_auxiliary):
            return cropped(logits, grid)
        auxiliary = self.auxiliary(maps[-2:][0])
        auxiliary = F.interpolate(auxiliary, logits.shape[-2:], mode="bilinear")
        return {"out": cropped(logits, grid), "aux": cropped(auxiliary, grid)}

    def _bordered(self, image: Tensor) -> Tensor:
        """The image with its last row and column repeated up to whole cells of every level."""
        multiple = self.size_multiple
        below, right = (num_cells(side, multiple) * multiple - side for side in image.shape[-2:])
        if not is_exporting() and not (below or right):
            return image
        # repeated: zeros would be an edge that is in no picture
        return F.pad(image, (0, right, 0, below), mode="replicate")


@dataclass(frozen=True)
class Composition:
    """What makes the segmentor of a name; its signature has the options of both parts."""

    head: str
    encoder: str

    @property
    def weights_file(self) -> Callable[[], Path] | None:
        """Where the encoder's published weights lie, once called; None: there are none."""
        return ENCODERS[self.encoder].weights_file

    def __call__(self, num_classes: int, **options: Any) -> Composed:
        """The segmentor. Raises InputError for bad options, and a head that the encoder's levels
        cannot carry.
        """
        entry, head_class = ENCODERS[self.encoder], HEADS[self.head]
        # a head says what it wants of an encoder that has a choice; the user's word comes before
        chosen = {"layers": head_class.layers} if "layers" in entry.options() else {}
        encoder = entry.make(**entry.size, **{**chosen, **_among(entry.options(), options)})
        published = entry.head_options.get(self.head, {})
        own = {**published, **_among(_head_options(self.head), options)}
        try:
            head = head_class(encoder.levels, num_classes, **own)
        except InputError as error:
            raise InputError(
                f"segmentor={self.head}_{self.encoder}: {error.got}", error.needed, error.action
            ) from None
        return Composed(encoder, head, **_among({"auxiliary"}, options))

    @property
    def __signature__(self) -> inspect.Signature:
        # an option belongs to one part: two parts that share a name could not both be given theirs
        parts = (_head_options(self.head), ENCODERS[self.encoder].options())
        own = inspect.signature(Composed).parameters
        parameters = [inspect.Parameter("num_classes", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        for part in parts:
            parameters += part.values()
        return inspect.Signature([*parameters, own["auxiliary"]])


def _head_options(head: str) -> Mapping[str, inspect.Parameter]:
    parameters = inspect.signature(HEADS[head]).parameters
    return {key: value for key, value in parameters.items() if value.kind is value.KEYWORD_ONLY}


def _among(names: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in names}


# every head on every encoder; one that cannot stand there says so when it is built
COMPOSITIONS: dict[str, Composition] = {}
for _encoder in ENCODERS:
    COMPOSITIONS |= {f"{head}_{_encoder}": Composition(head, _encoder) for head in HEADS}
