"""FCN-32s, -16s and -8s on VGG16 (Long, Shelhamer, Darrell 2015), and FCN-8s trained at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.models.checks import require_choice, require_number, require_size
from distseg.models.grids import cropped, to_multiple
from distseg.models.vgg import VGG16
from distseg.models.weights import LoadReport
from shards.errors import InputError
from shards.words import counted


class _FCN(nn.Module):
    """Scores from fc7, then from pool4 and pool3 where the stride asks for them, each upsampled and
    summed.

    forward: image (N, 3, H, W) float in [0, 1], RGB, H and W >= 32 -> logits (N, C, ceil(H/s),
    ceil(W/s)), s = 32, 16 or 8. The fixed bilinear upsampling of the reference's last layer is left
    to the loss and to inference. Where the reference pads the image by 100 px and crops by
    hand-counted offsets, every grid here starts at the image's corner, so bilinear upsampling
    (align_corners=False) puts each score where it belongs. A finer network starts from a coarser
    one's weights with segmentor.init=FILE: its new scores are zero. fc_channels: width of fc6 and
    fc7 (published weights need 4096). binary_head, for 2 classes: "two_classes", a score each, or
    "sigmoid", one score z whose logits are (0, z), since softmax((0, z)) = (1 - sigmoid(z),
    sigmoid(z)). Raises InputError for a bad option or a smaller image.
    """

    output_stride: int
    pool4_scale = pool3_scale = 1.0  # what the maps are multiplied by before they are scored
    min_size_px = 32
    init_report: LoadReport | None = None  # what was taken from a file of weights

    def __init__(
        self, num_classes: int, *, fc_channels: int = 4096, binary_head: str = "two_classes"
    ):
        super().__init__()
        require_number("segmentor.options.fc_channels", fc_channels, 1, 4096)
        require_choice("segmentor.options.binary_head", binary_head, ("two_classes", "sigmoid"))
        self.num_classes, self.is_sigmoid = num_classes, binary_head == "sigmoid"
        if self.is_sigmoid and num_classes != 2:
            got = "segmentor.options.binary_head=sigmoid for "
            got += counted(num_classes, "class", "classes")
            raise InputError(
                got,
                "2 classes",
                "write segmentor.options.binary_head=two_classes, or merge classes",
            )
        num_scores = 1 if self.is_sigmoid else num_classes
        self.encoder = VGG16(fc_channels)
        self.score_fr = _score(fc_channels, num_scores)
        if self.output_stride <= 16:
            self.score_pool4 = _score(512, num_scores)
        if self.output_stride <= 8:
            self.score_pool3 = _score(256, num_scores)
        if self.output_stride <= 16:
            self.upscore2 = Upscore(num_scores)
        if self.output_stride <= 8:
            self.upscore_pool4 = Upscore(num_scores)

    def forward(self, image: Tensor) -> Tensor:
        require_size(image, self.min_size_px)
        # fmt: off
        image = to_multiple(image, self.output_stride)                 # (N, 3, H, W), whole cells
        pool3, pool4, fc7 = self.encoder(image)                        # at 1/8, 1/16, 1/32
        x = self.score_fr(fc7)                                         # (N, C, H/32, W/32)
        if self.output_stride <= 16:
            skip = _scaled(pool4, self.pool4_scale)                    # (N, 512, H/16, W/16)
            x = self.upscore2(x, pool4) + self.score_pool4(skip)       # (N, C, H/16, W/16)
        if self.output_stride <= 8:
            skip = _scaled(pool3, self.pool3_scale)                    # (N, 256, H/8, W/8)
            x = self.upscore_pool4(x, pool3) + self.score_pool3(skip)  # (N, C, H/8, W/8)
        if self.is_sigmoid:
            x = torch.cat([torch.zeros_like(x), x], 1)                 # (N, 2, h, w)
        return x                                                       # (N, C, h, w)
        # fmt: on


class FCN32s(_FCN):
    """FCN-32s: logits at stride 32."""

    output_stride = 32


class FCN16s(_FCN):
    """FCN-16s: logits at stride 16."""

    output_stride = 16


class FCN8s(_FCN):
    """FCN-8s: logits at stride 8."""

    output_stride = 8


class FCN8sAtOnce(FCN8s):
    """FCN-8s for training in one go.

    Scaled down, pool4 and pool3 score on a level with fc7 from the first step.
    """

    pool4_scale, pool3_scale = 0.01, 0.0001  # the reference's voc-fcn8s-atonce


class Upscore(nn.ConvTranspose2d):
    """A learned k4 s2 upsampling that starts as the bilinear one, class by class."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes, num_classes, 4, stride=2, padding=3, bias=False)
        ramp = torch.tensor([0.25, 0.75, 0.75, 0.25])
        with torch.no_grad():
            self.weight.zero_()
            self.weight[range(num_classes), range(num_classes)] = torch.outer(ramp, ramp)

    def forward(self, score: Tensor, finer: Tensor) -> Tensor:  # type: ignore[override]
        """score: (N, C, h, w) -> (N, C, H, W), the size of `finer`, which is 2h or 2h - 1."""
        # the border repeated: without it the outermost row would be three quarters of its value
        up = super().forward(F.pad(score, (1, 1, 1, 1), mode="replicate"))  # (N, C, 2h, 2w)
        return cropped(up, (finer.shape[-2], finer.shape[-1]))


def _score(channels: int, num_scores: int) -> nn.Conv2d:
    """Zero at first, so that each finer net starts from the coarser one (the paper, 4.2)."""
    layer = nn.Conv2d(channels, num_scores, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale
