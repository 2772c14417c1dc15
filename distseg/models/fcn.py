"""FCN-8s on VGG16 (Long, Shelhamer, Darrell, CVPR 2015)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.models.checks import require_number, require_size
from distseg.models.vgg import VGG16
from distseg.models.weights import LoadReport


class FCN8s(nn.Module):
    """Scores from fc7, pool4 and pool3, each twice as fine as the one before, summed.

    forward: image (N, 3, H, W) float in [0, 1], RGB, H and W >= 32 -> logits (N, C, ceil(H/8), ceil(W/8)).
    Where the reference pads the image by 100 px and crops by hand-counted offsets, every grid here starts at
    the image's corner, so bilinear upsampling (align_corners=False) puts each score where it belongs.
    Raises InputError for a smaller image.
    """

    output_stride = 8
    min_size_px = 32
    init_report: LoadReport | None = None  # what the encoder took from a file of weights

    def __init__(self, num_classes: int, *, fc_channels: int = 4096):
        super().__init__()
        require_number("segmentor.options.fc_channels", fc_channels, 1, 4096)
        self.num_classes = num_classes
        self.encoder = VGG16(fc_channels)
        self.score_fr = _score(fc_channels, num_classes)
        self.score_pool4 = _score(512, num_classes)
        self.score_pool3 = _score(256, num_classes)
        self.upscore2 = Upscore(num_classes)
        self.upscore_pool4 = Upscore(num_classes)

    def forward(self, image: Tensor) -> Tensor:
        require_size(image, self.min_size_px)
        pool3, pool4, fc7 = self.encoder(_to_multiple(image, self.output_stride))
        score = self.score_fr(fc7)  # (N, C, H/32, W/32)
        score = self.upscore2(score, pool4) + self.score_pool4(pool4)  # (N, C, H/16, W/16)
        return self.upscore_pool4(score, pool3) + self.score_pool3(pool3)  # (N, C, H/8, W/8)


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
        return up[..., : finer.shape[-2], : finer.shape[-1]]


def _score(channels: int, num_classes: int) -> nn.Conv2d:
    """Zero at first, so that each finer net starts from the coarser one (section 4.2 of the paper)."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def _to_multiple(image: Tensor, stride: int) -> Tensor:
    """The image stretched to the next multiple of `stride`.

    A last cell that hangs over the image would shift all logits when they are upsampled to the image's size.
    """
    height, width = (-(-side // stride) * stride for side in image.shape[-2:])
    if (height, width) == tuple(image.shape[-2:]):
        return image
    return F.interpolate(image, (height, width), mode="bilinear", align_corners=False)
