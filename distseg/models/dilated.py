"""Dilated-8 (Yu and Koltun 2016): VGG16 at output stride 8, a context module over its scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.models.checks import require_choice, require_number, require_size
from distseg.models.grids import to_multiple
from distseg.models.vgg import POOL4, VGG16
from distseg.models.weights import LoadReport

DILATIONS = (1, 1, 2, 4, 8, 16, 1)  # of the context module's 3x3 convolutions
# their channels, as multiples of the number of classes; a 1x1 convolution back to the classes
# follows
WIDTHS = {"basic": (1, 1, 1, 1, 1, 1, 1), "large": (2, 2, 4, 8, 16, 32, 32)}
CONTEXTS = (*WIDTHS, "none")
BORDERS = ("zeros", "mirror")
# what valid convolutions would eat on each side: 186 px up to the scores, here in whole cells of 8;
# 33 cells after
IMAGE_MARGIN_PX, SCORE_MARGIN = 192, sum(DILATIONS)


class Dilated8(nn.Module):
    """Scores from a VGG16 that keeps 1/8 of the image's size, then 3x3 convolutions of growing
    dilation over them.

    forward: image (N, 3, H, W) float in [0, 1], RGB, H and W >= 8 -> logits (N, C, ceil(H/8),
    ceil(W/8)); logit i belongs to the pixels 8i to 8i + 7 of the image, stretched to whole cells.
    context: "large" or "basic", the paper's two modules, or "none", the front end alone. border:
    "zeros", each convolution pads its own input; "mirror", as published: no padding inside, but 186
    mirrored pixels around the image and 33 zero cells around the scores. The same where no border
    is in sight; a crop of 321 px becomes one of 712, so mirror costs about five times as much.
    fc_channels: width of fc6 and fc7 (published weights need 4096). Raises InputError for a bad
    option or a smaller image.
    """

    output_stride = 8
    min_size_px = 8
    init_report: LoadReport | None = None  # what the encoder took from a file of weights

    def __init__(
        self,
        num_classes: int,
        *,
        context: str = "large",
        border: str = "zeros",
        fc_channels: int = 4096,
    ):
        super().__init__()
        require_choice("segmentor.options.context", context, CONTEXTS)
        require_choice("segmentor.options.border", border, BORDERS)
        require_number("segmentor.options.fc_channels", fc_channels, 1, 4096)
        self.num_classes, self.border = num_classes, border
        self.encoder = DilatedVGG16(fc_channels)
        self.score = nn.Conv2d(fc_channels, num_classes, 1)
        # not zero: the context module's ReLUs would pass no gradient back to scores that are all 0
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.zeros_(self.score.bias)  # type: ignore[arg-type]
        self.context = (
            nn.Identity() if context == "none" else context_module(num_classes, WIDTHS[context])
        )

    def forward(self, image: Tensor) -> Tensor:
        require_size(image, self.min_size_px)
        image = to_multiple(image, self.output_stride)
        # fmt: off
        x = self._scores(image)                  # (N, C, h, w), h = H/8 and w = W/8
        if self.border == "zeros" or isinstance(self.context, nn.Identity):
            return self.context(x)               # (N, C, h, w)
        x = F.pad(x, (SCORE_MARGIN,) * 4)        # (N, C, h + 66, w + 66)
        x = self.context(x)                      # (N, C, h + 66, w + 66)
        return _without_margin(x, SCORE_MARGIN)  # (N, C, h, w)
        # fmt: on

    def _scores(self, image: Tensor) -> Tensor:
        """The front end: (N, 3, H, W) -> (N, C, H/8, W/8)."""
        if self.border == "zeros":
            return self.score(self.encoder(image))
        # with its padding inside a margin as wide as its reach, the rest is what valid convolutions
        # give
        # fmt: off
        x = mirrored(image, IMAGE_MARGIN_PX)                           # (N, 3, H + 384, W + 384)
        x = self.encoder(x)                                            # (N, F, h + 48, w + 48)
        x = _without_margin(x, IMAGE_MARGIN_PX // self.output_stride)  # (N, F, h, w), F of fc7
        return self.score(x)                                           # (N, C, h, w)
        # fmt: on


class DilatedVGG16(VGG16):
    """VGG16 without its last two poolings, dilated instead: conv5 by 2, fc6 by 4; gives fc7 alone.

    image: (N, 3, H, W) float in [0, 1], RGB -> (N, fc_channels, H/8, W/8). State-dict keys are
    torchvision's.
    """

    def __init__(self, fc_channels: int = 4096):
        super().__init__(fc_channels)
        for index in range(POOL4, len(self.features)):
            layer = self.features[index]
            if isinstance(layer, nn.MaxPool2d):
                self.features[index] = nn.Identity()  # the layers after it keep their numbers
            elif isinstance(layer, nn.Conv2d):
                _dilate(layer, 2)
        _dilate(self.classifier[0], 4)

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        # fmt: off
        x = (image - self.mean) / self.std  # (N, 3, H, W)
        x = self.features(x)                # (N, 512, H/8, W/8)
        return self.classifier(x)           # (N, fc_channels, H/8, W/8)
        # fmt: on


def context_module(num_classes: int, widths: tuple[int, ...], noise: float = 0.01) -> nn.Sequential:
    """Lets every cell of the scores hear of 67 x 67 of them, at their resolution: (N, C, h, w) ->
    (N, C, h, w).

    widths: channels of the 3x3 convolutions, as multiples of C. It starts as the identity on scores
    >= 0, but for the noise; its ReLUs cut off the rest.
    """
    layers: list[nn.Module] = []
    channels = num_classes
    for width, dilation in zip(widths, DILATIONS, strict=True):
        conv = nn.Conv2d(channels, width * num_classes, 3, padding=dilation, dilation=dilation)
        layers += [conv, nn.ReLU(inplace=True)]
        channels = width * num_classes
    layers.append(nn.Conv2d(channels, num_classes, 1))
    for layer in layers[::2]:
        _init_identity(layer, num_classes, noise)
    return nn.Sequential(*layers)


def _init_identity(conv: nn.Module, num_classes: int, noise: float) -> None:
    """A class's channels share its score: each takes C / outputs of the sum over the same class's
    inputs, in place.

    So the sum over a class's channels passes unchanged (Yu and Koltun 2016, equations 4 and 5). All
    other weights are normal; their std is `noise` times that share, or the sum over thousands of
    them would drown it.
    """
    assert isinstance(conv, nn.Conv2d)
    outputs, inputs = conv.weight.shape[:2]
    class_of_output = torch.arange(outputs) * num_classes // outputs
    class_of_input = torch.arange(inputs) * num_classes // inputs
    share, middle = num_classes / outputs, conv.kernel_size[0] // 2
    with torch.no_grad():
        conv.weight.normal_(std=noise * share)
        conv.weight[:, :, middle, middle].masked_fill_(
            class_of_output[:, None] == class_of_input, share
        )
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]


def _dilate(conv: nn.Module, dilation: int) -> None:
    """Spread a convolution's taps, and pad as much as keeps the grid."""
    assert isinstance(conv, nn.Conv2d)
    conv.dilation = (dilation, dilation)
    conv.padding = (dilation * (conv.kernel_size[0] // 2),) * 2


def mirrored(image: Tensor, margin: int) -> Tensor:
    """`image` (N, C, H, W) with `margin` more pixels on each side, mirrored at the outermost
    pixels' centres.

    Where F.pad refuses a margin wider than the image, this mirrors again and again.
    """
    for dim in (-2, -1):
        size = image.shape[dim]
        period = max(2 * (size - 1), 1)
        index = torch.arange(-margin, size + margin, device=image.device)
        # a tensor: ONNX takes no number yet unknown
        index = index.remainder(torch.full_like(index, period))
        image = image.index_select(dim, torch.minimum(index, period - index) if size > 1 else index)
    return image


def _without_margin(x: Tensor, margin: int) -> Tensor:
    return x[..., margin:-margin, margin:-margin]
