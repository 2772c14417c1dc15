"""DeepLabV2 with weights of AdvSemiSeg: from an image's bytes to logits of its size, against the
architecture written out by hand in float64.

Sources: Hung et al. 2018, section 4.2; Chen et al. 2016; and of the public implementation the
pooling's ceil mode, the mean colour, the order of the channels and the aligned corners.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distseg.evaluate.inference import TestTimeAugmentation, probabilities
from distseg.export.formats import FullResolution
from distseg.losses.cross_entropy import cross_entropy_sum
from distseg.models import build_segmentor, resnet, set_batch_norm
from tests.test_resnet import waves

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)
NUM_CLASSES = 5
# where the pooling rounds up and where it does not, odd and even, not square
SIZES = [(161, 161), (168, 200), (321, 241), (64, 64), (35, 90)]


def convolution(state: dict[str, Tensor], x: Tensor, key: str, stride: int, dilation: int):
    weight = state[f"{key}.weight"]
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, state.get(f"{key}.bias"), stride, padding, dilation)


def normalised(state: dict[str, Tensor], x: Tensor, key: str) -> Tensor:
    mean, variance, scale, shift = (
        state[f"{key}.{name}"][:, None, None]
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def pooled(x: Tensor) -> Tensor:
    """3x3 maxima around every second pixel; the last window may begin on the last pixel."""
    cells = [math.ceil((side - 1) / 2) + 1 for side in x.shape[-2:]]
    # windows around 0, 2, 4, ...: one before, and whatever is missing behind
    behind = [2 * count - side for count, side in zip(cells, x.shape[-2:], strict=True)]
    x = F.pad(x, (1, behind[1], 1, behind[0]), value=-math.inf)
    return x.unfold(2, 3, 2).unfold(3, 3, 2).amax((-1, -2))


def stretched(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, the first and the last cell on the first and the last pixel."""
    for axis, side in ((2, size[0]), (3, size[1])):
        cells = x.shape[axis]
        place = torch.arange(side, dtype=torch.float64) * (cells - 1) / (side - 1)
        weights = (1 - (place[:, None] - torch.arange(cells)).abs()).clamp(min=0)  # (side, cells)
        x = torch.tensordot(x, weights, ([axis], [1])).movedim(-1, axis)
    return x


def by_hand(state: dict[str, Tensor], bgr: np.ndarray, rates: tuple[int, ...], is_rgb: bool = True):
    """Logits (1, C, H, W) float64 of an image (H, W, 3) uint8 BGR, as cv2 reads it."""
    pixels = bgr.astype(np.float64) - MEAN_BGR
    if is_rgb:  # what the code turns round before its network sees it
        pixels = pixels[:, :, ::-1]
    x = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
    x = normalised(state, convolution(state, x, "encoder.conv1", 2, 1), "encoder.bn1").relu()
    x = pooled(x)
    for stage, (blocks, stride, dilation) in enumerate(
        [(3, 1, 1), (4, 2, 1), (23, 1, 2), (3, 1, 4)], start=1
    ):
        for block in range(blocks):
            key = f"encoder.layer{stage}.{block}"
            step = stride if block == 0 else 1  # on the first 1x1
            y = normalised(state, convolution(state, x, f"{key}.conv1", step, 1), f"{key}.bn1")
            y = convolution(state, y.relu(), f"{key}.conv2", 1, dilation)
            y = normalised(state, y, f"{key}.bn2").relu()
            y = normalised(state, convolution(state, y, f"{key}.conv3", 1, 1), f"{key}.bn3")
            if block == 0:
                x = convolution(state, x, f"{key}.downsample.0", step, 1)
                x = normalised(state, x, f"{key}.downsample.1")
            x = (x + y).relu()
    branches = [convolution(state, x, f"aspp.{i}", 1, rate) for i, rate in enumerate(rates)]
    return stretched(sum(branches[1:], start=branches[0]), bgr.shape[:2])


def make(branches: int = 4, **options: str):
    torch.manual_seed(0)
    network = build_segmentor(
        "deeplabv2_resnet101",
        NUM_CLASSES,
        init="random",
        layout="caffe",
        width=2,
        aspp_branches=branches,
        **options,
    )
    waves(network.state_dict())
    for classifier in network.aspp.children():  # logits of a few units
        classifier.weight.data /= 1000
    return network.eval()


def exact(network) -> dict[str, Tensor]:
    return {key: value.double() for key, value in network.state_dict().items()}


def picture(height: int, width: int) -> np.ndarray:
    """Bytes whose neighbours are alike, RGB."""
    rng = np.random.default_rng(height * width)
    coarse = torch.from_numpy(rng.random((1, 3, 9, 11)))
    fine = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]
    return (255 * fine).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", SIZES)
def test_logits_are_those_of_the_architecture_by_hand(size: tuple[int, int]) -> None:
    network, rgb = make(), picture(*size)
    expected = by_hand(exact(network), rgb[:, :, ::-1], (6, 12, 18, 24))
    image = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        found, exported = network(image), FullResolution(network)(image)
    assert found.shape == expected.shape == (1, NUM_CLASSES, *size) and expected.std() > 0.1
    atol = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(exported, found, rtol=0, atol=0)
    scored = probabilities(network, rgb)[None].double()
    torch.testing.assert_close(scored, expected.softmax(1), rtol=0, atol=1e-4)


def test_the_two_branches_of_released_weights_and_the_other_order_of_channels() -> None:
    rgb = picture(72, 88)
    for options, is_rgb in (({}, True), ({"channel_order": "bgr"}, False)):
        network = make(2, **options)
        expected = by_hand(exact(network), rgb[:, :, ::-1], (6, 12), is_rgb)
        found = probabilities(network, rgb)[None].double()
        torch.testing.assert_close(found, expected.softmax(1), rtol=0, atol=1e-4)


def test_the_flip_and_each_window_follow_the_same_rule() -> None:
    network, rgb = make(), picture(168, 200)

    def scored(part: np.ndarray) -> Tensor:
        logits = by_hand(exact(network), part[:, :, ::-1], (6, 12, 18, 24))
        return logits.softmax(1)[0].float()

    device = torch.device("cpu")
    flipped = TestTimeAugmentation((1.0,), True, "fp32", device)(network, rgb)
    expected = (scored(rgb) + scored(rgb[:, ::-1]).flip(2)) / 2
    torch.testing.assert_close(flipped, expected, rtol=0, atol=1e-4)
    windows = TestTimeAugmentation((1.0,), False, "fp32", device, window_px=96, overlap_px=32)
    found = windows(network, rgb)
    # alone there: windows begin at every 64th pixel, and fade in 8 px behind their edge
    first, last = found[:, :72, :72], found[:, 152:, 152:]
    torch.testing.assert_close(first, scored(rgb[:96, :96])[:, :72, :72], rtol=0, atol=1e-4)
    torch.testing.assert_close(last, scored(rgb[128:, 128:])[:, 24:, 24:], rtol=0, atol=1e-4)


def test_the_training_loss_takes_the_same_logits() -> None:
    network, rgb = make(), picture(57, 65)
    set_batch_norm(network, "frozen")
    label = torch.randint(0, NUM_CLASSES, (1, 57, 65), dtype=torch.uint8)
    expected = F.cross_entropy(
        by_hand(exact(network), rgb[:, :, ::-1], (6, 12, 18, 24)), label.long(), reduction="sum"
    )
    image = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
    loss = cross_entropy_sum(network.train()(image), label)
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)


def test_an_exported_network_pools_the_same_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = make(), [torch.rand(1, 3, *size) for size in [(64, 66), (57, 63), (35, 60)]]
    with torch.no_grad():
        expected = [network.encoder(image)[-1] for image in images]
        monkeypatch.setattr(resnet, "is_exporting", lambda: True)
        for image, maps in zip(images, expected, strict=True):
            torch.testing.assert_close(network.encoder(image)[-1], maps, rtol=0, atol=0)
