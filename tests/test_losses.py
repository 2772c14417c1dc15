"""Every loss against its hand formula in float64, gradients included."""

from __future__ import annotations

import math

import pytest
import torch

from distseg import losses


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cross_entropy_sums_valid_pixels_of_upsampled_logits() -> None:
    logits = rand(2, 3, 4, 4).requires_grad_()
    label = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    label[0, :3] = 255
    total = losses.cross_entropy_sum(logits, label)
    up = torch.nn.functional.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)
    expected = torch.zeros((), dtype=torch.float64)
    for n in range(2):
        for y in range(8):
            for x in range(8):
                if label[n, y, x] != 255:
                    scores = up[n, :, y, x]
                    expected = expected + scores.exp().sum().log() - scores[int(label[n, y, x])]
    assert abs(total - expected) < 1e-10
    (mine,) = torch.autograd.grad(total, logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, logits)
    assert (mine - theirs).abs().max() < 1e-12


def test_cross_entropy_of_void_alone_is_zero_with_a_live_graph() -> None:
    logits = rand(1, 3, 4, 4).requires_grad_()
    total = losses.cross_entropy_sum(logits, torch.full((1, 8, 8), 255, dtype=torch.uint8))
    (gradient,) = torch.autograd.grad(total, logits)
    assert total == 0 and (gradient == 0).all()


@pytest.mark.parametrize("real", [True, False])
def test_adversarial_loss_per_image_is_its_formula(real: bool) -> None:
    logits = rand(3, 1, 1, 1).requires_grad_()
    total = losses.adversarial_sum(logits, None, real)
    chance = torch.sigmoid(logits)
    expected = -(chance if real else 1 - chance).log().sum()
    assert abs(total - expected) < 1e-12
    (gradient,) = torch.autograd.grad(total, logits)
    assert (gradient - (chance - float(real))).abs().max() < 1e-12  # d/dz BCE = sigmoid(z) - target
    assert losses.adversarial_count(logits, None) == 3


@pytest.mark.parametrize("real", [True, False])
def test_adversarial_loss_per_cell_sums_over_valid_pixels(real: bool) -> None:
    logits = rand(2, 1, 2, 2)
    valid = rand(2, 8, 8, seed=1) > 0
    up = torch.nn.functional.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)[:, 0]
    expected = sum(math.log1p(math.exp(-z if real else z)) for z in up[valid].tolist())
    assert abs(losses.adversarial_sum(logits, valid, real) - expected) < 1e-10
    assert losses.adversarial_count(logits, valid) == int(valid.sum())
    assert losses.correct_sum(logits, valid, real) == int(((up[valid] > 0) == real).sum())


def test_void_looks_the_same_in_the_real_and_the_fake_label_map() -> None:
    probabilities = rand(2, 4, 6, 6).softmax(1).requires_grad_()
    label = torch.randint(0, 4, (2, 24, 24), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    label[:, 8:16, 4:] = 255
    real, valid = losses.real_label_map(label, probabilities)
    centre = label[:, 2::4, 2::4]  # the pixel nearest to the centre of each 4 x 4 cell
    assert torch.equal(valid, centre != 255)
    assert torch.equal(real.argmax(1)[valid], centre[valid].long())
    assert torch.equal(real.permute(0, 2, 3, 1)[~valid], probabilities.detach().permute(0, 2, 3, 1)[~valid])
    assert (real.sum(1) - 1).abs().max() < 1e-12
    assert not real.requires_grad
