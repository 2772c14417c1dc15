"""The multi-scale network of Farabet et al. 2013, as Luc et al. 2016 use it on Stanford."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_exporting

from distseg.models.batch_norm import BatchNorm2d
from distseg.models.checks import require_choice, require_number, require_size
from distseg.models.grids import num_cells
from distseg.models.weights import LoadReport

SCALES = 3  # 1, 1/2, 1/4
CHANNELS = (16, 64, 256)  # of the three 7x7 convolutions
WINDOW_PX = 15  # of the local normalisation
# BT.601, luma and the two colour differences of RGB in [0, 1]
YUV = ((0.299, 0.587, 0.114), (-0.14713, -0.28886, 0.436), (0.615, -0.51499, -0.10001))


class MultiScale(nn.Module):
    """One small encoder, with the same weights, over three scales of the image; their features side
    by side.

    forward: image (N, 3, H, W) float in [0, 1], RGB, H and W >= 32 -> logits (N, C, ceil(H/4),
    ceil(W/4)). pyramid: "laplacian", locally normalised YUV band-pass images as in Farabet et al.;
    "gaussian", the image itself at three scales, which keeps colours as they are. norm: "none" as
    published, or "batch" after each convolution. activation: "tanh" as published, or "relu".
    hidden: channels of the classifier's hidden layer. Luc et al. leave out the superpixels, so does
    this. Raises InputError for a bad option or a smaller image.
    """

    yuv: Tensor
    output_stride = 4
    min_size_px = 32
    init_report: LoadReport | None = None

    def __init__(
        self,
        num_classes: int,
        *,
        pyramid: str = "laplacian",
        norm: str = "none",
        activation: str = "tanh",
        hidden: int = 1024,
        dropout: float = 0.0,
    ):
        super().__init__()
        require_choice("segmentor.options.pyramid", pyramid, ("laplacian", "gaussian"))
        require_choice("segmentor.options.norm", norm, ("none", "batch"))
        require_choice("segmentor.options.activation", activation, ("tanh", "relu"))
        require_number("segmentor.options.hidden", hidden, 1, 8192)
        require_number("segmentor.options.dropout", dropout, 0, 0.9)
        self.num_classes, self.pyramid = num_classes, pyramid
        self.encoder = _encoder(norm, activation)
        self.classifier = nn.Sequential(
            *_layer(SCALES * CHANNELS[-1], hidden, 1, norm, activation),
            nn.Dropout(dropout),
            nn.Conv2d(hidden, num_classes, 1),
        )
        # by the activation: a tanh that starts out saturated would not learn
        gain = nn.init.calculate_gain(activation)  # type: ignore[arg-type]
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_normal_(layer.weight, gain)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        # small first logits: the loss begins near ln C, that of a network without an opinion
        nn.init.normal_(self.classifier[-1].weight, std=0.01)  # type: ignore[arg-type]
        # not persistent: a constant, which checkpoints need not hold
        self.register_buffer("yuv", torch.tensor(YUV).view(3, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        require_size(image, self.min_size_px)
        # (h, w) of the logits
        grid = tuple(num_cells(side, self.output_stride) for side in image.shape[-2:])
        # bands are small differences of pixels, which half precision would round to steps
        with torch.autocast(image.device.type, enabled=False):
            levels = self._levels(image, grid)
        features = []
        # fmt: off
        for level in levels:                            # (N, 3, 4h / 2^k, 4w / 2^k)
            x = self.encoder(level)                     # (N, 256, h / 2^k, w / 2^k), rounded up
            if is_exporting() or x.shape[-2:] != grid:  # see grids.py
                x = F.interpolate(x, grid, mode="bilinear", align_corners=False)
            features.append(x)                          # (N, 256, h, w)
        x = torch.cat(features, 1)                      # (N, 768, h, w)
        return self.classifier(x)                       # (N, C, h, w)
        # fmt: on

    def _levels(self, image: Tensor, grid: tuple[int, ...]) -> list[Tensor]:
        """The pyramid. Each level is stretched to whole cells of 4 px, so that all grids cover the
        same image.
        """
        sizes = []
        for k in range(SCALES):
            sizes.append(tuple(4 * num_cells(side, 2**k) for side in grid))
        whole = not is_exporting() and image.shape[-2:] == sizes[0]
        levels = [image if whole else _resize(image, sizes[0])]
        # each from the one before, whose filter is half as wide as one over the image
        for size in sizes[1:]:
            levels.append(_resize(levels[-1], size))
        # to [-1, 1], the range of a tanh
        if self.pyramid == "gaussian":
            return [2 * level - 1 for level in levels]
        # (N, 3, ...) YUV: brightness apart from colour, so that each is normalised by itself
        levels = [F.conv2d(level, self.yuv.to(level)) for level in levels]
        bands = [
            fine - _resize(coarse, fine.shape[-2:]) for fine, coarse in itertools.pairwise(levels)
        ]
        # the last level is no band: it keeps what is left, the coarsest brightness and colour
        return [_locally_normalised(band) for band in [*bands, levels[-1]]]


def _encoder(norm: str, activation: str) -> nn.Sequential:
    first, second, third = CHANNELS
    return nn.Sequential(
        *_layer(3, first, 7, norm, activation),
        nn.MaxPool2d(2),
        *_layer(first, second, 7, norm, activation),
        nn.MaxPool2d(2),
        *_layer(second, third, 7, norm, activation),
    )


def _layer(
    in_channels: int, channels: int, kernel: int, norm: str, activation: str
) -> list[nn.Module]:
    batch_norm = norm == "batch"
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=not batch_norm)
    ]
    layers += [BatchNorm2d(channels)] if batch_norm else []
    return [*layers, nn.Tanh() if activation == "tanh" else nn.ReLU(inplace=True)]


def _resize(x: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    # antialias: plain bilinear shrinking skips pixels, and fine texture would come back as coarse
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False, antialias=True)


def _locally_normalised(x: Tensor) -> Tensor:
    """Zero mean and unit deviation in a window around each pixel.

    Divides by the image's mean deviation at least, or flat sky would be blown up to noise.
    """

    half = WINDOW_PX // 2

    def mean(y: Tensor) -> Tensor:
        # a box is separable, and so is the count of its pixels inside the image
        for window, padding in (((WINDOW_PX, 1), (half, 0)), ((1, WINDOW_PX), (0, half))):
            y = F.avg_pool2d(y, window, stride=1, padding=padding, count_include_pad=False)
        return y

    centred = x - mean(x)
    # of centred values and not E[x^2] - E[x]^2, whose difference cancels on flat sky
    deviation = mean(centred.square()).clamp(min=0).sqrt()
    return centred / deviation.clamp(min=1e-3).maximum(deviation.mean((2, 3), keepdim=True))
