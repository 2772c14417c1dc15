"""The discriminators against the papers' parameter counts, fields of view and formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distseg.models import build_discriminator
from shards.errors import InputError


def num_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def label_maps(num, num_classes, height, width):
    generator = torch.Generator().manual_seed(height)
    return torch.randn(num, num_classes, height, width, generator=generator).softmax(1)


def test_parameter_counts_of_the_papers():
    assert num_parameters(build_discriminator("two_branch", 8)) == 1_671_874
    assert num_parameters(build_discriminator("fully_convolutional", 21)) == 2_783_169


@pytest.mark.parametrize(
    ("name", "head", "size", "shape"),
    [
        ("two_branch", "gap", (33, 47), (1, 1)),
        ("two_branch", "patch", (33, 47), (8, 11)),
        ("two_branch", "patch", (60, 60), (15, 15)),
        ("fully_convolutional", "gap", (54, 80), (1, 1)),
        ("fully_convolutional", "patch", (321, 321), (10, 10)),
        ("fully_convolutional", "patch", (512, 1024), (16, 32)),
    ],
)
def test_one_logit_an_image_or_a_cell(name, head, size, shape):
    network = build_discriminator(name, 5, head=head)
    maps = label_maps(1, 5, *size)
    outputs = network(torch.rand(1, 3, 64, 64), maps, maps)
    assert [tuple(output.shape) for output in outputs] == [(1, 1, *shape)] * 2


def test_gap_is_the_mean_of_the_patch_logits():
    for name in ("two_branch", "fully_convolutional"):
        patch, gap = (build_discriminator(name, 4, head=head) for head in ("patch", "gap"))
        gap.load_state_dict(patch.state_dict())
        image, maps = torch.rand(2, 3, 160, 160), label_maps(2, 4, 40, 40)
        (cells,), (verdict,) = patch(image, maps), gap(image, maps)
        torch.testing.assert_close(verdict, cells.mean((2, 3), keepdim=True))


def test_two_branch_equals_the_figure_layer_by_layer():
    network = build_discriminator("two_branch", 6, width=0.25, head="patch")
    image, maps = torch.rand(2, 3, 48, 64), label_maps(2, 6, 12, 16)

    x = F.max_pool2d(F.relu(network.image_conv1(2 * image - 1)), 2)
    x = F.max_pool2d(F.relu(network.image_conv2(x)), 2)
    both = torch.cat([F.relu(network.label_conv(maps)), x], 1)
    z = network.verdict(network.trunk(network.meet(both)))
    log_odds = z.log_softmax(1)[:, 1:] - z.log_softmax(1)[:, :1]

    torch.testing.assert_close(network(image, maps)[0], log_odds)


def test_the_image_is_brought_to_four_times_the_label_map():
    network = build_discriminator("two_branch", 3, width=0.25)
    maps = label_maps(1, 3, 13, 9)
    image = torch.rand(1, 3, 50, 40)
    resized = F.interpolate(image, (52, 36), mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(image, maps)[0], network(resized, maps)[0])


def test_image_branch_runs_once_for_all_label_maps():
    network = build_discriminator("two_branch", 4, width=0.25)
    calls = []
    network.image_conv2.register_forward_hook(lambda *_: calls.append(1))
    network(torch.rand(2, 3, 32, 32), *label_maps(6, 4, 8, 8).split(2))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["two_branch", "fully_convolutional"])
def test_label_maps_do_not_touch_each_other(name):
    network = build_discriminator(name, 4)
    image = torch.rand(2, 3, 160, 160)
    real, fake = (maps.requires_grad_() for maps in label_maps(4, 4, 40, 40).split(2))
    on_real, on_fake = network(image, real, fake)
    assert torch.autograd.grad(on_fake.sum(), real, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(on_real.sum(), fake, allow_unused=True) == (None,)
    torch.testing.assert_close(on_fake, network(image, fake)[0])


def field_of_view(network, size):
    """Height and width of the label map that the middle logit depends on."""
    for parameter in network.double().parameters():
        parameter.data.abs_()  # no cancellation and no dead unit: every path has a gradient
    maps = label_maps(1, network.num_classes, size, size).double().requires_grad_()
    (logits,) = network(torch.rand(1, 3, 64, 64).double(), maps)
    (grad,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], maps)
    seen = grad[0].abs().sum(0) > 0
    return int(seen.any(1).sum()), int(seen.any(0).sum())


def test_fields_of_view_measured_from_gradients():
    assert field_of_view(build_discriminator("fully_convolutional", 2), 224) == (94, 94)
    two_branch = build_discriminator("two_branch", 2, width=0.1, head="patch")
    two_branch.trunk[1] = two_branch.trunk[4] = torch.nn.AvgPool2d(2)  # a maximum passes one gradient of four
    # 5 (label) + 2 (meet) + 1 (pool) + 2 x 2 (conv) + 2 (pool) + 4 x 2 (conv) + 4 x 2 (verdict)
    assert field_of_view(two_branch, 64) == (30, 30)


def test_fully_convolutional_ignores_the_image():
    network = build_discriminator("fully_convolutional", 3)
    maps = label_maps(1, 3, 40, 40)
    assert torch.equal(network(torch.zeros(1, 3, 8, 8), maps)[0], network(torch.ones(1, 3, 9, 9), maps)[0])


@pytest.mark.parametrize(("name", "size"), [("fully_convolutional", 31), ("two_branch", 3)])
def test_a_label_map_too_small_is_refused(name, size):
    network = build_discriminator(name, 3)
    assert network.min_size_px == size + 1
    with pytest.raises(InputError, match=f"label map of 64x{size} px"):
        network(torch.rand(1, 3, 64, 64), label_maps(1, 3, 64, size))
    network(torch.rand(1, 3, 64, 64), label_maps(1, 3, size + 1, size + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "gap"}, "discriminator.options.heads"),
        ({"head": "mean"}, "gap, patch"),
        ({"width": 0}, "0.05 to 8"),
        ({"width": "half"}, "0.05 to 8"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        build_discriminator("two_branch", 8, **options)


def test_unknown_name_lists_the_choices():
    with pytest.raises(InputError, match="two_branch, fully_convolutional"):
        build_discriminator("three_branch", 8)
