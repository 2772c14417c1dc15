"""VGG16 (Simonyan and Zisserman 2015), fully convolutional, with the state-dict keys of
torchvision.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_exporting

from distseg.models.weights import downloaded_file

# output channels of the 3x3 convolutions, "P" = 2x2 pooling; the positions give torchvision's
# features.N
LAYOUT = (64, 64, "P", 128, 128, "P", 256, 256, 256, "P", 512, 512, 512, "P", 512, 512, 512, "P")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's weights, RGB in [0, 1]
POOL3, POOL4 = 16, 23  # positions in `features`


class VGG16(nn.Module):
    """The 13 convolutions and, as convolutions too, fc6 and fc7; gives pool3, pool4 and fc7.

    image: (N, 3, H, W) float in [0, 1], RGB. fc_channels: width of fc6 and fc7 (torchvision's
    weights for them need 4096). Pooling rounds sizes up (Caffe's ceil mode), so no border pixel is
    dropped and cell i of a stride-s map covers exactly the pixels i*s to (i+1)*s - 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, fc_channels: int = 4096):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for step in LAYOUT:
            if isinstance(step, int):
                layers += [nn.Conv2d(channels, step, 3, padding=1), nn.ReLU(inplace=True)]
                channels = step
            else:
                layers.append(Halve(2, 2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            # this padding keeps the grid, where the reference pads the image by 100 px
            nn.Conv2d(channels, fc_channels, 7, padding=3),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(fc_channels, fc_channels, 1),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # fmt: off
        x = (image - self.mean) / self.std                   # (N, 3, H, W)
        pool3 = self.features[: POOL3 + 1](x)                # (N, 256, H/8, W/8), rounded up
        pool4 = self.features[POOL3 + 1 : POOL4 + 1](pool3)  # (N, 512, H/16, W/16)
        pool5 = self.features[POOL4 + 1 :](pool4)            # (N, 512, H/32, W/32)
        fc7 = self.classifier(pool5)                         # (N, fc_channels, H/32, W/32)
        return pool3, pool4, fc7
        # fmt: on


class Halve(nn.MaxPool2d):
    """2x2 max pooling that rounds sizes up: (N, C, H, W) -> (N, C, ceil(H/2), ceil(W/2))."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_exporting():
            return super().forward(x)
        # the rule of ceil mode asks about the size, see grids.py; the last row twice has the same
        # maximum
        return F.max_pool2d(
            F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="replicate"), 2, 2
        )


def imagenet_weights_file() -> Path:
    """torchvision's file. Raises InputError where there is none."""
    return downloaded_file("VGG16", ("vgg16-397923af.pth",))
