"""Networks that tell label maps of ground truth from predicted ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.models.checks import require_number, require_size
from shards.errors import InputError

HEADS = ("gap", "patch")


class TwoBranch(nn.Module):
    """Luc et al. 2016, figure 1: image and label map get the same number of channels before they meet.

    forward: image (N, 3, H, W) float in [0, 1], RGB; each label map (N, C, h, w) float, summing to 1 over C,
    h and w >= 4 -> one tensor of logits per label map, > 0 = real: (N, 1, 1, 1) for head "gap" (mean over the
    image), (N, 1, h/4, w/4) for "patch". The image is brought to 4h x 4w; its branch runs once for all maps.
    width: factor on every hidden layer's channels (1: the paper's, 1,671,874 parameters at 8 classes).
    Raises InputError for a bad option or a smaller label map.
    """

    min_size_px = 4

    def __init__(self, num_classes: int, *, width: float = 1.0, head: str = "gap"):
        super().__init__()
        _check_head(head)
        require_number("discriminator.options.width", width, 0.05, 8)
        thin, branch, *trunk = (round(width * channels) or 1 for channels in (16, 64, 128, 256, 512))
        self.num_classes, self.head = num_classes, head
        self.label_conv = nn.Conv2d(num_classes, branch, 5, padding=2)
        self.image_conv1 = nn.Conv2d(3, thin, 5, padding=2)
        self.image_conv2 = nn.Conv2d(thin, branch, 5, padding=2)
        self.meet = nn.Conv2d(2 * branch, trunk[0], 3, padding=1)  # label channels first, then the image's
        self.trunk = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(trunk[0], trunk[1], 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(trunk[1], trunk[2], 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.verdict = nn.Conv2d(trunk[2], 2, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and layer is not self.verdict:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor, *label_maps: Tensor) -> tuple[Tensor, ...]:
        for label_map in label_maps:
            require_size(label_map, self.min_size_px, "label map")
        image_part = self._image_part(image, label_maps[0].shape[-2:])
        return tuple(self._judge(label_map, image_part) for label_map in label_maps)

    def _image_part(self, image: Tensor, label_size: torch.Size) -> Tensor:
        """What the image adds to `meet`: the convolution of a concatenation is the sum over its halves."""
        size = (4 * label_size[0], 4 * label_size[1])
        if tuple(image.shape[-2:]) != size:
            image = F.interpolate(image, size, mode="bilinear", align_corners=False)
        x = F.max_pool2d(self.image_conv1(2 * image - 1).relu_(), 2)  # (N, 16, 2h, 2w)
        x = F.max_pool2d(self.image_conv2(x).relu_(), 2)  # (N, 64, h, w)
        return F.conv2d(x, self.meet.weight[:, x.shape[1] :], self.meet.bias, padding=1)

    def _judge(self, label_map: Tensor, image_part: Tensor) -> Tensor:
        x = self.label_conv(label_map).relu_()  # (N, 64, h, w)
        x = F.conv2d(x, self.meet.weight[:, : x.shape[1]], padding=1) + image_part  # (N, 128, h, w)
        z = self.verdict(self.trunk(x))  # (N, 2, h/4, w/4)
        return _pool(z[:, 1:] - z[:, :1], self.head)  # log-odds of a softmax over both


class FullyConvolutional(nn.Module):
    """Hung et al. 2018: five convolutions over the label map alone, a logit per 32 x 32 px cell.

    forward: image (ignored); each label map (N, C, h, w) float, summing to 1 over C, h and w >= 32 -> one
    tensor of logits per label map, > 0 = real: (N, 1, h/32, w/32) for head "patch", (N, 1, 1, 1) for "gap"
    (their mean). 2,783,169 parameters at 21 classes. Raises InputError for a bad head or a smaller label map.
    """

    min_size_px = 32

    def __init__(self, num_classes: int, *, head: str = "patch"):
        super().__init__()
        _check_head(head)
        self.num_classes, self.head = num_classes, head
        layers: list[nn.Module] = []
        channels = num_classes
        for width in (64, 128, 256, 512):
            layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, stride=2, padding=1))

    def forward(self, image: Tensor, *label_maps: Tensor) -> tuple[Tensor, ...]:
        for label_map in label_maps:
            require_size(label_map, self.min_size_px, "label map")
        return tuple(_pool(self.layers(label_map), self.head) for label_map in label_maps)


def _pool(logits: Tensor, head: str) -> Tensor:
    return logits.mean((2, 3), keepdim=True) if head == "gap" else logits


def _check_head(head: str) -> None:
    if head not in HEADS:
        got = f"discriminator.options.head={head}"
        raise InputError(got, f"one of: {', '.join(HEADS)}", "gap: one verdict an image; patch: one a cell")
