"""Probabilities at full resolution: against the formula written out, and by their symmetries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.evaluate.inference import probabilities, sliding_window
from shards.errors import InputError

SIZES = [(40, 64), (33, 47), (97, 32), (5, 7), (1, 1), (20, 90)]


class Small(nn.Module):
    """Logits at stride `stride` from `reach` pixels around.

    The mean of each stride x stride block below.
    """

    def __init__(self, num_classes: int = 4, stride: int = 4):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(3, num_classes, 3, padding=1, padding_mode="replicate")
        nn.init.normal_(self.conv.weight, std=2.0)

    def forward(self, image: Tensor) -> Tensor:
        assert min(image.shape[2:]) >= 32, "the segmentors' contract"
        return F.avg_pool2d(self.conv(image), self.stride, ceil_mode=True)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return Small().eval()


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )


def test_one_scale_is_the_softmax_of_the_upsampled_logits(model: nn.Module) -> None:
    image = picture(50, 71)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    logits = F.interpolate(model(tensor), (50, 71), mode="bilinear", align_corners=False)
    assert torch.equal(probabilities(model, image), logits.softmax(1)[0])


def test_scales_and_mirror_average_the_views(model: nn.Module) -> None:
    image = picture(60, 80)
    plain = [probabilities(model, image, (scale,)) for scale in (0.75, 1.0, 1.5)]
    flipped = [probabilities(model, image[:, ::-1], (scale,)).flip(2) for scale in (0.75, 1.0, 1.5)]
    expected = torch.stack(plain + flipped).mean(0)
    torch.testing.assert_close(
        probabilities(model, image, (0.75, 1.0, 1.5), horizontal_flip=True), expected
    )


@pytest.mark.parametrize("size", SIZES)
def test_a_mirrored_image_gives_the_mirrored_answer(
    model: nn.Module, size: tuple[int, int]
) -> None:
    image = picture(*size)
    straight = probabilities(model, image, (0.5, 1.0), horizontal_flip=True)
    mirrored = probabilities(model, image[:, ::-1], (0.5, 1.0), horizontal_flip=True)
    torch.testing.assert_close(mirrored.flip(2), straight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_probabilities_sum_to_one_at_the_images_size(
    model: nn.Module, size: tuple[int, int]
) -> None:
    result = probabilities(model, picture(*size), (0.5, 1.25), horizontal_flip=True)
    assert result.shape == (4, *size) and result.dtype == torch.float32
    torch.testing.assert_close(result.sum(0), torch.ones(size))
    assert result.min() >= 0


def test_padding_of_a_tiny_image_does_not_show_in_a_constant_one(model: nn.Module) -> None:
    large = probabilities(model, np.full((64, 64, 3), 90, np.uint8))
    tiny = probabilities(model, np.full((9, 6, 3), 90, np.uint8))
    torch.testing.assert_close(tiny, large[:, :9, :6])


def test_a_tiny_image_is_continued_at_the_right_and_below(model: nn.Module) -> None:
    image = picture(20, 45)
    continued = np.pad(image, ((0, 12), (0, 0), (0, 0)), mode="edge")
    expected = probabilities(model, continued)[:, :20]
    torch.testing.assert_close(probabilities(model, image), expected)


@pytest.mark.cpu
def test_bfloat16_autocast_stays_near_full_precision(model: nn.Module) -> None:
    image = picture(64, 64)
    rounded = probabilities(model, image, autocast_dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, probabilities(model, image), rtol=0, atol=0.03)
    assert not torch.equal(rounded, probabilities(model, image))


@pytest.mark.parametrize(
    ("stride", "size"),
    [
        (1, (400, 300)),
        (1, (129, 515)),
        (1, (50, 701)),
        (4, (400, 300)),
        (4, (132, 516)),
        (4, (96, 100)),
    ],
)
def test_tiles_equal_the_whole_image_for_a_model_that_sees_no_further_than_their_overlap(
    stride: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(1)
    model, image = Small(stride=stride).eval(), picture(*size)
    whole = probabilities(model, image)
    tiled = sliding_window(
        lambda tile: probabilities(model, tile), image, window_px=128, overlap_px=32
    )
    torch.testing.assert_close(tiled, whole, rtol=0, atol=2e-6)


def test_tiles_are_bounded_in_size_and_cover_every_pixel_once() -> None:
    shapes = []

    def ones(tile: np.ndarray) -> Tensor:
        shapes.append(tile.shape)
        return torch.ones(1, *tile.shape[:2])

    result = sliding_window(ones, picture(333, 450), window_px=128, overlap_px=64)
    torch.testing.assert_close(result, torch.ones(1, 333, 450))
    assert max(max(shape) for shape in shapes) <= 128 and len(shapes) > 9


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)],
)
def test_other_arrays_are_refused(model: nn.Module, image: np.ndarray) -> None:
    with pytest.raises(InputError, match="uint8"):
        probabilities(model, image)


def test_wrong_scales_and_tiles_are_refused(model: nn.Module) -> None:
    for scales in ((), (0.0,), (1.0, -1.0)):
        with pytest.raises(InputError, match="factor above 0"):
            probabilities(model, picture(40, 40), scales)
    for tile_px, overlap_px in ((100, 32), (128, 96), (128, 0)):
        with pytest.raises(InputError, match="multiples of 32"):
            sliding_window(
                lambda tile: torch.ones(1, *tile.shape[:2]), picture(40, 40), tile_px, overlap_px
            )
