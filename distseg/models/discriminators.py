"""Networks that tell label maps of ground truth from predicted ones.

All are called as discriminator(image, *label_maps), image (N, 3, H, W) float in [0, 1], RGB, each
label map (k, C, h, w) float, summing to 1 over C, with k <= N: it belongs to the first k images,
and h, w are the same for all. So one call takes the ground truth of the labelled images and the
predictions for all images, which come after them in the batch, and what is computed of the image is
computed once. The answer is one tensor of k rows of logits per label map, > 0 = real. With
features=True it is a pair, of these and of as many tensors (k, K): what the last layer gets, as a
mean over cells. InputError: more label maps than images, sizes that differ or are too small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.models.checks import require_choice, require_number, require_size
from distseg.models.spectral_norm import normalise, normalised_once
from shards.errors import InputError
from shards.words import counted

HEADS = ("gap", "patch")
INPUTS = ("basic", "product")
RANGES = {"unit": (0.0, 1.0), "centred": (-1.0, 1.0)}  # of RGB where it multiplies a label map
POOL = None  # 2x2
# kernel size and channels of each hidden convolution, or POOL
Layout = tuple[tuple[int, int] | None, ...]


class Discriminator(nn.Module):
    """What all have in common: a call, and what is asked of a network before training.

    num_classes: C; num_channels: of its input, which follow from C. head: "patch", a logit per
    cell, or "gap", their mean, one per image. sees_image: whether the answer depends on the image.
    min_size_px: of label maps, on a side. An option of all is spectral_norm, see
    distseg/models/spectral_norm.py.
    """

    has_features = True
    sees_image = True
    min_size_px: int
    num_classes: int
    num_channels: int
    head: str

    def forward(self, image: Tensor, *label_maps: Tensor, features: bool = False) -> Any:
        image = _images_with_maps(image, label_maps, self.min_size_px)
        with normalised_once(self):
            # computed once, whatever the number of label maps
            of_image = self._of_image(image, label_maps[0].shape[-2:])  # (N, ...)
            logits, means = [], []
            for label_map in label_maps:
                # the first k images are those of the k label maps
                some = None if of_image is None else of_image[: len(label_map)]
                x = self._hidden(label_map, some)  # (k, K, h', w')
                logits.append(_pool(self._logits(x), self.head))  # (k, 1, h', w') or (k, 1, 1, 1)
                if features:
                    means.append(_mean_over_cells(x))  # (k, K)
        return (tuple(logits), tuple(means)) if features else tuple(logits)

    def _of_image(self, image: Tensor, label_size: torch.Size) -> Tensor | None:
        """What is computed of the images (N, 3, H, W) alone; None: nothing."""
        raise NotImplementedError

    def _hidden(self, label_map: Tensor, of_image: Tensor | None) -> Tensor:
        """What the last layer gets, (k, K, h', w')."""
        raise NotImplementedError

    def _logits(self, x: Tensor) -> Tensor:
        """The last layer: (k, 1, h', w')."""
        raise NotImplementedError


class TwoBranch(Discriminator):
    """Luc et al. 2016, figure 1: image and label map get the same number of channels before they
    meet.

    forward: image and label maps (k, C, h, w) with h and w >= 4 -> logits (k, 1, 1, 1) for head
    "gap" (mean over the image), (k, 1, h/4, w/4) for "patch". image_pool: True, the image is
    brought to 4h x 4w and halved after each of its convolutions; False, it is brought to h x w and
    keeps that size, a quarter of the work. width: factor on every hidden layer's channels (1: the
    paper's, 1,671,874 parameters at 8 classes). Raises InputError for a bad option.
    """

    min_size_px = 4

    def __init__(
        self,
        num_classes: int,
        *,
        width: float = 1.0,
        head: str = "gap",
        image_pool: bool = True,
        spectral_norm: bool = False,
    ):
        super().__init__()
        _check_head(head)
        require_number("discriminator.options.width", width, 0.05, 8)
        if not isinstance(image_pool, bool):
            got = f"discriminator.options.image_pool={image_pool}"
            raise InputError(
                got, "true or false", "true: the label map is at a quarter of the image or so"
            )
        thin, branch, *trunk = (round(width * wide) or 1 for wide in (16, 64, 128, 256, 512))
        self.num_classes, self.head, self.image_pool = num_classes, head, image_pool
        self.num_channels = num_classes
        self.label_conv = nn.Conv2d(num_classes, branch, 5, padding=2)
        self.image_conv1 = nn.Conv2d(3, thin, 5, padding=2)
        self.image_conv2 = nn.Conv2d(thin, branch, 5, padding=2)
        # label channels first, then the image's
        self.meet = nn.Conv2d(2 * branch, trunk[0], 3, padding=1)
        self.trunk = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(trunk[0], trunk[1], 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(trunk[1], trunk[2], 3, padding=1),
            nn.ReLU(inplace=True),
        )
        # of fake and real; the name is that of saved weights
        self.verdict = nn.Conv2d(trunk[2], 2, 3, padding=1)
        _init_hidden(self, self.verdict)
        normalise(self, spectral_norm)

    def _of_image(self, image: Tensor, label_size: torch.Size) -> Tensor:
        """What the image adds to `meet`: a concatenation's convolution is a sum over halves."""
        if self.image_pool:
            size = (4 * label_size[0], 4 * label_size[1])
            if tuple(image.shape[-2:]) != size:
                image = F.interpolate(image, size, mode="bilinear", align_corners=False)
        else:
            image = _shrunk(image, label_size)
        # fmt: off
        x = self.image_conv1(2 * image - 1)                    # (N, 16, 4h, 4w); unpooled: h, w
        x = self._halved(x.relu_())                            # (N, 16, 2h, 2w)
        x = self._halved(self.image_conv2(x).relu_())          # (N, 64, h, w)
        weight = self.meet.weight[:, x.shape[1] :]             # (128, 64, 3, 3), the image's half
        return F.conv2d(x, weight, self.meet.bias, padding=1)  # (N, 128, h, w)
        # fmt: on

    def _halved(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2) if self.image_pool else x

    def _hidden(self, label_map: Tensor, of_image: Tensor | None) -> Tensor:
        assert of_image is not None
        # fmt: off
        x = self.label_conv(label_map).relu_()         # (k, 64, h, w)
        weight = self.meet.weight[:, : x.shape[1]]     # (128, 64, 3, 3), the label map's half
        x = F.conv2d(x, weight, padding=1) + of_image  # (k, 128, h, w)
        return self.trunk(x)                           # (k, 512, h/4, w/4)
        # fmt: on

    def _logits(self, x: Tensor) -> Tensor:
        return _log_odds(self.verdict(x))  # (k, 1, h/4, w/4)


class SingleBranch(Discriminator):
    """Luc et al. 2016, on PASCAL VOC: convolutions over the label map, or over its products with
    the image.

    forward: image and label maps (k, C, h, w) with h and w >= 4 -> logits (k, 1, 1, 1) for head
    "gap" (mean over the image), (k, 1, h/4, w/4) for "patch". inputs: "basic", the label map alone;
    "product", each RGB channel, brought to h x w, times each map: 3C channels. image_range: of RGB
    in the products, "unit" [0, 1] or "centred" [-1, 1]; the paper's is not known to us. width:
    factor on every hidden layer's channels. Raises InputError for a bad option.
    """

    min_size_px = 4
    layout: ClassVar[Layout]
    last_kernel: ClassVar[int]  # of the convolution that gives the scores of fake and real

    def __init__(
        self,
        num_classes: int,
        *,
        inputs: str = "basic",
        head: str = "gap",
        width: float = 1.0,
        image_range: str = "unit",
        spectral_norm: bool = False,
    ):
        super().__init__()
        _check_head(head)
        require_choice("discriminator.options.inputs", inputs, INPUTS)
        require_choice("discriminator.options.image_range", image_range, tuple(RANGES))
        require_number("discriminator.options.width", width, 0.05, 8)
        self.num_classes, self.head = num_classes, head
        self.inputs, self.image_range = inputs, image_range
        self.sees_image = inputs == "product"
        layers: list[nn.Module] = []
        channels = self.num_channels = num_classes * (3 if inputs == "product" else 1)
        for step in self.layout:
            if step is POOL:
                layers.append(nn.MaxPool2d(2))
                continue
            kernel, hidden = step[0], round(width * step[1]) or 1
            layers += [
                nn.Conv2d(channels, hidden, kernel, padding=kernel // 2),
                nn.ReLU(inplace=True),
            ]
            channels = hidden
        last = nn.Conv2d(channels, 2, self.last_kernel, padding=self.last_kernel // 2)
        self.layers = nn.Sequential(*layers, last)
        _init_hidden(self, last)
        normalise(self, spectral_norm)

    def _of_image(self, image: Tensor, label_size: torch.Size) -> Tensor | None:
        if self.inputs == "basic":
            return None
        low, high = RANGES[self.image_range]
        return low + (high - low) * _shrunk(image, label_size)  # (N, 3, h, w)

    def _hidden(self, label_map: Tensor, of_image: Tensor | None) -> Tensor:
        x = label_map if of_image is None else _product(of_image, label_map)  # (k, C or 3C, h, w)
        return _hidden_of(self.layers, x)  # (k, 512, h/4, w/4)

    def _logits(self, x: Tensor) -> Tensor:
        return _log_odds(self.layers[-1](x))  # (k, 1, h/4, w/4)


class LargeFOV(SingleBranch):
    """Field of view 34 x 34 of the label map.

    2,351,170 parameters at 21 classes, 2,387,458 with products.
    """

    layout = ((3, 96), (3, 128), (3, 128), POOL, (3, 256), (3, 256), POOL, (3, 512))
    last_kernel = 3


class LargeFOVLight(SingleBranch):
    """Field of view 34 x 34 of the label map.

    871,490 parameters at 21 classes, 907,778 with products.
    """

    layout = ((3, 96), (3, 128), (3, 128), POOL, (3, 128), (3, 128), POOL, (3, 256))
    last_kernel = 3


class SmallFOV(SingleBranch):
    """Field of view 18 x 18 of the label map.

    1,572,802 parameters at 21 classes, 1,609,090 with products. The paper tells the field of view,
    which is the same however its 1x1 convolutions are padded. Not to pad them keeps the size, as
    all other layers do, and the TensorFlow port (SnoopyHui's) does so too. The Chainer port
    (oyam's) pads each by one pixel, which adds a border of cells that see nothing but biases, and
    its mean counts them: its scores are others than these.
    """

    layout = ((3, 96), (1, 128), POOL, (3, 256), (1, 256), POOL, (3, 512))
    last_kernel = 1


class SmallFOVLight(SingleBranch):
    """Field of view 18 x 18 of the label map.

    490,434 parameters at 21 classes, 526,722 with products. 1x1 convolutions without padding, as in
    SmallFOV.
    """

    layout = ((3, 96), (1, 128), POOL, (3, 128), (1, 128), POOL, (3, 256))
    last_kernel = 1


class FullyConvolutional(Discriminator):
    """Hung et al. 2018: five convolutions over the label map alone, a logit per 32 x 32 px cell.

    forward: image (only counted) and label maps (k, C, h, w) with h and w >= 32 -> logits (k, 1,
    h/32, w/32) for head "patch", (k, 1, 1, 1) for "gap" (their mean). 2,783,169 parameters at 21
    classes. Raises InputError for a bad head.
    """

    min_size_px = 32
    sees_image = False

    def __init__(self, num_classes: int, *, head: str = "patch", spectral_norm: bool = False):
        super().__init__()
        _check_head(head)
        self.num_classes, self.head = num_classes, head
        layers: list[nn.Module] = []
        channels = self.num_channels = num_classes
        for width in (64, 128, 256, 512):
            layers += [
                nn.Conv2d(channels, width, 4, stride=2, padding=1),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, stride=2, padding=1))
        normalise(self, spectral_norm)

    def _of_image(self, image: Tensor, label_size: torch.Size) -> Tensor | None:
        return None

    def _hidden(self, label_map: Tensor, of_image: Tensor | None) -> Tensor:
        return _hidden_of(self.layers, label_map)  # (k, 512, h/16, w/16)

    def _logits(self, x: Tensor) -> Tensor:
        return self.layers[-1](x)  # (k, 1, h/32, w/32)


class ImageConditioned(Discriminator):
    """Mittal et al. 2019 (s4GAN): four convolutions over the label map joined with the image, and
    one logit an image.

    forward: image, brought to h x w, and label maps (k, C, h, w) with h and w >= 16 -> logits (k,
    1, 1, 1) for head "gap", (k, 1, h/16, w/16) for "patch". The paper's linear layer on the mean
    over cells is the mean of the same layer on each cell. dropout: share of channels that are left
    out after each convolution in training mode. width: factor on every hidden layer's channels (1:
    the paper's, 2,778,561 parameters at 21 classes). Raises InputError for a bad option.
    """

    min_size_px = 16

    def __init__(
        self,
        num_classes: int,
        *,
        head: str = "gap",
        width: float = 1.0,
        dropout: float = 0.5,
        spectral_norm: bool = False,
    ):
        super().__init__()
        _check_head(head)
        require_number("discriminator.options.width", width, 0.05, 8)
        require_number("discriminator.options.dropout", dropout, 0, 0.95)
        self.num_classes, self.head = num_classes, head
        layers: list[nn.Module] = []
        channels = self.num_channels = num_classes + 3
        for wide in (64, 128, 256, 512):
            hidden = round(width * wide) or 1
            layers += [
                nn.Conv2d(channels, hidden, 4, stride=2, padding=1),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Dropout2d(dropout),
            ]
            channels = hidden
        self.layers, self.linear = nn.Sequential(*layers), nn.Linear(channels, 1)
        normalise(self, spectral_norm)

    def _of_image(self, image: Tensor, label_size: torch.Size) -> Tensor | None:
        return _shrunk(image, label_size)  # (N, 3, h, w)

    def _hidden(self, label_map: Tensor, of_image: Tensor | None) -> Tensor:
        assert of_image is not None
        joined = torch.cat([label_map, of_image], 1)  # (k, C + 3, h, w)
        return self.layers(joined)  # (k, 512, h/16, w/16)

    def _logits(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(1, 3)).movedim(3, 1)  # (k, 1, h/16, w/16)


class OfBothOutputs(nn.Module):
    """A discriminator of the segmentor's logits, and one of its auxiliary logits, which know
    nothing of each other (Tsai et al. 2018, multi-level adversarial learning); as one network, so
    that they are spread, updated and saved together.

    forward: images, and label maps of the one and of the other -> the logits of each on its own. Of
    the first label map alone, what the first says of it. What is asked of a discriminator before
    training, the first says for both.
    """

    num_outputs = 2

    def __init__(self, of_logits: nn.Module, of_auxiliary: nn.Module):
        super().__init__()
        self.of_logits, self.of_auxiliary = of_logits, of_auxiliary
        told: Any = of_logits
        self.num_classes, self.min_size_px = told.num_classes, told.min_size_px
        self.head, self.sees_image = told.head, told.sees_image
        self.init_report = getattr(told, "init_report", None)

    def forward(self, image: Tensor, *label_maps: Tensor) -> tuple[Tensor, ...]:
        # of a teacher's predictions, which have no auxiliary ones, the first is asked alone
        judges = (self.of_logits, self.of_auxiliary)[: len(label_maps)]
        pairs = zip(judges, label_maps, strict=True)
        return tuple(judge(image, label_map)[0] for judge, label_map in pairs)


def of_output(state: Mapping[str, Tensor], name: str = "of_logits") -> Mapping[str, Tensor]:
    """The part of a state dict of `OfBothOutputs` that is of_logits or of_auxiliary; any other
    discriminator's as it is.
    """
    # by both names: a network of the user's own may have a child of either
    if {key.partition(".")[0] for key in state} != {"of_logits", "of_auxiliary"}:
        return state
    prefix = f"{name}."
    return {key.removeprefix(prefix): it for key, it in state.items() if key.startswith(prefix)}


def _images_with_maps(image: Tensor, label_maps: tuple[Tensor, ...], min_size_px: int) -> Tensor:
    """The images that have at least one label map.

    Raises InputError when images and maps do not fit together.
    """
    size = tuple(label_maps[0].shape[-2:])
    for label_map in label_maps:
        require_size(label_map, min_size_px, "label map")
        if tuple(label_map.shape[-2:]) != size:
            got = (
                f"label maps of {size[0]}x{size[1]} and "
                f"{label_map.shape[-2]}x{label_map.shape[-1]} px in one call"
            )
            raise InputError(got, "one size", "bring them to one size, or call once for each")
        if len(label_map) > len(image):
            got = f"{counted(len(label_map), 'label map')} for {counted(len(image), 'image')}"
            raise InputError(
                got, "at most one per image", "pass the image of every label map, in the same order"
            )
    return image[: max(len(label_map) for label_map in label_maps)]


def _shrunk(image: Tensor, size: torch.Size) -> Tensor:
    """The image at `size`, averaged over what each pixel now covers.

    At an eighth, bilinear interpolation would look at four pixels of 64: noise.
    """
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image, tuple(size), mode="bilinear", align_corners=False, antialias=True)


def _product(colors: Tensor, label_map: Tensor) -> Tensor:
    """(k, 3, h, w), (k, C, h, w) -> (k, 3C, h, w): red times each map, then green, then blue."""
    # fmt: off
    colors = colors.unsqueeze(2)        # (k, 3, 1, h, w)
    label_map = label_map.unsqueeze(1)  # (k, 1, C, h, w)
    products = colors * label_map       # (k, 3, C, h, w)
    return products.flatten(1, 2)       # (k, 3C, h, w)
    # fmt: on


def _log_odds(scores: Tensor) -> Tensor:
    """scores: (k, 2, h, w), fake and real -> (k, 1, h, w), the log-odds of a softmax over both."""
    return scores[:, 1:] - scores[:, :1]


def _mean_over_cells(x: Tensor) -> Tensor:
    """(k, K, h, w) -> (k, K), in at least fp32."""
    # under autocast the result would be rounded to 8 bits, and differences of means are small
    return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def _hidden_of(layers: nn.Sequential, x: Tensor) -> Tensor:
    """What the last layer gets."""
    # one by one: a slice of them would be another module, which nothing that spreads networks knows
    for layer in list(layers)[:-1]:
        x = layer(x)
    return x


def _init_hidden(network: nn.Module, last: nn.Module) -> None:
    """He initialisation of all convolutions but the last, whose default keeps the first logits
    near 0.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer is not last:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def _pool(logits: Tensor, head: str) -> Tensor:
    return logits.mean((2, 3), keepdim=True) if head == "gap" else logits


def _check_head(head: str) -> None:
    if head not in HEADS:
        got = f"discriminator.options.head={head}"
        raise InputError(
            got, f"one of: {', '.join(HEADS)}", "gap: one verdict an image; patch: one a cell"
        )
