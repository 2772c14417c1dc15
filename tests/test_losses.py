"""Every loss against its hand formula in float64, gradients included."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from distseg.config import forms
from distseg.config.names import KEYS
from distseg.losses import adversarial, cross_entropy, tensors


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cross_entropy_sums_valid_pixels_of_upsampled_logits() -> None:
    logits = rand(2, 3, 4, 4).requires_grad_()
    label = torch.randint(
        0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    label[0, :3] = 255
    total = cross_entropy.cross_entropy_sum(logits, label)
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
    total = cross_entropy.cross_entropy_sum(logits, torch.full((1, 8, 8), 255, dtype=torch.uint8))
    (gradient,) = torch.autograd.grad(total, logits)
    assert total == 0 and (gradient == 0).all()


def by_formula(z: float, target: float, form: str) -> float:
    """The discriminator's loss on one score."""
    if form == "hinge":
        return max(0.0, 1 - z) if target else max(0.0, 1 + z)
    if form == "least_squares":
        return ((1 + z) / 2 - target) ** 2
    return target * math.log1p(math.exp(-z)) + (1 - target) * math.log1p(math.exp(z))


FORMS = tuple(KEYS["loss.adv_form"].choices)


def discriminator_sum(
    logits: torch.Tensor, valid: torch.Tensor | None, target: float, form: str
) -> torch.Tensor:
    loss = partial(adversarial.FORMS[form].of_discriminator, target=target)
    return adversarial.sum_of(loss, logits, valid)


def real_by_formula(z: float, form: str) -> float:
    return min(1, max(0, (1 + z) / 2)) if form == "least_squares" else 1 / (1 + math.exp(-z))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_known_of_a_form_without_torch_is_what_its_formulas_say(form: str) -> None:
    facts, losses = forms.FORMS[form], adversarial.FORMS[form]
    zero = torch.zeros(1, dtype=torch.float64)
    for target in (0.0, 1.0):
        assert float(losses.of_discriminator(zero, target)) == pytest.approx(facts.undecided)
    assert float(losses.of_segmentor(zero)) == pytest.approx(facts.undecided_segmentor)
    assert float(losses.realness(zero)) == 0.5
    assert losses.has_probability == facts.has_probability
    # the loss of maps of which a share is real is least at that share, where it is a probability
    scores, share = torch.linspace(-3, 3, 601, dtype=torch.float64), 0.7
    on_both = share * losses.of_discriminator(scores, 1.0)
    on_both += (1 - share) * losses.of_discriminator(scores, 0.0)
    best = float(losses.realness(scores[on_both.argmin()]))
    assert (abs(best - share) < 0.01) == facts.has_probability
    smoothed = [losses.of_discriminator(scores, target) for target in (1.0, 0.9)]
    assert torch.equal(*smoothed) != facts.has_target


@pytest.mark.parametrize("target", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("form", FORMS)
def test_the_discriminators_loss_is_its_formula_per_image_and_per_cell(
    form: str, target: float
) -> None:
    logits = rand(3, 1, 1, 1).requires_grad_()
    total = discriminator_sum(logits, None, target, form)
    expected = sum(by_formula(z, target, form) for z in logits.flatten().tolist())
    assert abs(total - expected) < 1e-12
    if form == "saturating":
        (gradient,) = torch.autograd.grad(total, logits)
        # d/dz BCE = sigmoid(z) - target
        assert (gradient - (torch.sigmoid(logits) - target)).abs().max() < 1e-12

    logits, valid = rand(2, 1, 2, 2), rand(2, 8, 8, seed=1) > 0
    up = torch.nn.functional.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)[:, 0]
    cells = up[valid].tolist()
    total = discriminator_sum(logits, valid, target, form)
    assert abs(total - sum(by_formula(z, target, form) for z in cells)) < 1e-10
    for real in (True, False):
        sums = adversarial.score_sums(logits, valid, real, adversarial.FORMS[form])
        correct, scores, realness = sums.tolist()
        assert correct == int(((up[valid] > 0) == real).sum())
        assert abs(realness - sum(real_by_formula(z, form) for z in cells)) < 1e-10
        assert abs(scores - up[valid].sum()) < 1e-10


def test_the_segmentors_loss_falls_where_its_maps_pass_for_real() -> None:
    logits, valid = rand(2, 1, 2, 2).requires_grad_(), rand(2, 8, 8, seed=1) > 0
    z = torch.nn.functional.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)
    z = z[:, 0][valid]
    expected = {
        "non_saturating": torch.log1p(torch.exp(-z)),
        "saturating": -torch.log1p(torch.exp(z)),
        "hinge": -z,
        "least_squares": ((z - 1) / 2).square(),
    }
    assert expected.keys() == set(FORMS)
    for form, losses in expected.items():
        total = adversarial.sum_of(adversarial.FORMS[form].of_segmentor, logits, valid)
        assert abs(total - losses.sum()) < 1e-10
        (gradient,) = torch.autograd.grad(total, logits)
        assert gradient.sum() < 0, form


def test_void_looks_the_same_in_the_real_and_the_fake_label_map() -> None:
    probabilities = rand(2, 4, 6, 6).softmax(1).requires_grad_()
    label = torch.randint(
        0, 4, (2, 24, 24), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )
    label[:, 8:16, 4:] = 255
    index, valid = tensors.label_at(label, probabilities.shape[-2:])
    real = adversarial.real_label_map(index, valid, probabilities)
    centre = label[:, 2::4, 2::4]  # the pixel nearest to the centre of each 4 x 4 cell
    assert torch.equal(valid, centre != 255)
    assert torch.equal(real.argmax(1)[valid], centre[valid].long())
    assert torch.equal(
        real.permute(0, 2, 3, 1)[~valid], probabilities.detach().permute(0, 2, 3, 1)[~valid]
    )
    assert (real.sum(1) - 1).abs().max() < 1e-12
    assert not real.requires_grad


def test_scaling_is_the_formula_of_the_paper() -> None:
    probabilities = (3 * rand(2, 4, 5, 5)).softmax(1).requires_grad_()
    index = torch.randint(0, 4, (2, 5, 5), generator=torch.Generator().manual_seed(4))
    valid = torch.ones(2, 5, 5, dtype=torch.bool)
    valid[:, 2] = False
    scaled = adversarial.real_label_map(index, valid, probabilities, tau=0.9)
    for n, y, x in ((n, y, x) for n in range(2) for y in range(5) for x in range(5)):
        s, truth = probabilities[n, :, y, x].detach(), int(index[n, y, x])
        expected = s.clone()
        if valid[n, y, x]:
            mass = max(0.9, float(s[truth]))
            expected = s * (1 - mass) / (1 - s[truth])
            expected[truth] = mass
        assert (scaled[n, :, y, x] - expected).abs().max() < 1e-12
    assert (scaled.sum(1) - 1).abs().max() < 1e-12
    on_truth = scaled.gather(1, index[:, None])[:, 0]
    assert (on_truth[valid] >= 0.9 - 1e-12).all() and not scaled.requires_grad


def test_scaling_of_a_certain_prediction_stays_a_distribution() -> None:
    certain = torch.zeros(1, 3, 1, 2, dtype=torch.float64)
    certain[0, 1] = 1.0  # right in the first pixel, wrong in the second
    index = torch.tensor([[[1, 0]]])
    scaled = adversarial.real_label_map(
        index, torch.ones(1, 1, 2, dtype=torch.bool), certain, tau=0.9
    )
    assert torch.equal(scaled[0, :, 0, 0], torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    assert (
        scaled[0, :, 0, 1] - torch.tensor([0.9, 0.1, 0.0], dtype=torch.float64)
    ).abs().max() < 1e-12


def test_pseudo_labels_are_the_own_classes_where_the_discriminator_believes() -> None:
    probabilities = rand(2, 3, 4, 4).softmax(1)
    on_fake = rand(2, 1, 2, 2, seed=5)
    inside = torch.ones(2, 4, 4, dtype=torch.bool)
    inside[1, :, 3] = False
    pseudo = adversarial.pseudo_label(probabilities, on_fake, inside, threshold=0.4)
    up = torch.nn.functional.interpolate(on_fake, (4, 4), mode="bilinear", align_corners=False)[
        :, 0
    ]
    for n, y, x in ((n, y, x) for n in range(2) for y in range(4) for x in range(4)):
        believed = inside[n, y, x] and 1 / (1 + math.exp(-float(up[n, y, x]))) > 0.4
        assert pseudo[n, y, x] == (int(probabilities[n, :, y, x].argmax()) if believed else 255)
    assert 0 < int((pseudo != 255).sum()) < int(inside.sum())


def test_the_semi_supervised_term_has_a_gradient_under_its_mask_only_zero_under_none() -> None:
    logits = rand(1, 3, 4, 4).requires_grad_()
    probabilities, inside = logits.softmax(1), torch.ones(1, 4, 4, dtype=torch.bool)
    on_fake = torch.full((1, 1, 4, 4), -9.0, dtype=torch.float64)
    on_fake[..., 1, 2] = 9.0
    pseudo = adversarial.pseudo_label(probabilities, on_fake, inside, threshold=0.2)
    (gradient,) = torch.autograd.grad(
        cross_entropy.cross_entropy_sum(logits, pseudo), logits, retain_graph=True
    )
    touched = gradient[0].abs().sum(0) > 0
    assert touched[1, 2] and int(touched.sum()) == 1
    chances = probabilities[0, :, 1, 2].detach()
    expected = chances - torch.nn.functional.one_hot(chances.argmax(), 3)  # d CE / d logits
    assert (gradient[0, :, 1, 2] - expected).abs().max() < 1e-12

    empty = adversarial.pseudo_label(probabilities, on_fake - 99, inside, threshold=0.2)
    total = cross_entropy.cross_entropy_sum(logits, empty)
    (gradient,) = torch.autograd.grad(total, logits)
    assert total == 0 and (gradient == 0).all()
