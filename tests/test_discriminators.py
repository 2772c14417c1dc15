"""The discriminators against the papers' parameter counts, fields of view and formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from distseg.models import DISCRIMINATORS, Weights, build_discriminator
from distseg.models.spectral_norm import norms_of
from shards.errors import InputError

FOV = ("large_fov", "large_fov_light", "small_fov", "small_fov_light")
NAMES = tuple(DISCRIMINATORS)
# what needs the image, and what does not; thin where the network can be
VARIANTS = [
    ("two_branch", {"width": 0.25}),
    ("two_branch", {"width": 0.25, "image_pool": False}),
    ("fully_convolutional", {}),
    ("image_conditioned", {"width": 0.25, "dropout": 0}),
    *((name, {"width": 0.25, "inputs": inputs}) for name in FOV for inputs in ("basic", "product")),
]


def num_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def label_maps(num, num_classes, height, width):
    generator = torch.Generator().manual_seed(height)
    return torch.randn(num, num_classes, height, width, generator=generator).softmax(1)


def test_parameter_counts_of_the_papers():
    assert num_parameters(build_discriminator("two_branch", 8)) == 1_671_874
    assert num_parameters(build_discriminator("fully_convolutional", 21)) == 2_783_169
    # four convolutions of 4 x 4 and a linear layer, each with a bias
    channels = (21 + 3, 64, 128, 256, 512)
    pairs = itertools.pairwise(channels)
    expected = sum(16 * before * after + after for before, after in pairs) + 512 + 1
    assert num_parameters(build_discriminator("image_conditioned", 21)) == expected
    basic, product = {}, {}
    with torch.device("meta"):
        for name in FOV:
            basic[name] = num_parameters(build_discriminator(name, 21))
            product[name] = num_parameters(build_discriminator(name, 21, inputs="product"))
    assert basic == dict(zip(FOV, (2_351_170, 871_490, 1_572_802, 490_434), strict=True))
    assert product == dict(zip(FOV, (2_387_458, 907_778, 1_609_090, 526_722), strict=True))


@pytest.mark.parametrize(
    ("name", "head", "size", "shape"),
    [
        ("two_branch", "gap", (33, 47), (1, 1)),
        ("two_branch", "patch", (33, 47), (8, 11)),
        ("two_branch", "patch", (60, 60), (15, 15)),
        *((name, "patch", (66, 66), (16, 16)) for name in FOV),
        ("large_fov", "gap", (66, 66), (1, 1)),
        ("fully_convolutional", "gap", (54, 80), (1, 1)),
        ("fully_convolutional", "patch", (321, 321), (10, 10)),
        ("fully_convolutional", "patch", (512, 1024), (16, 32)),
        ("image_conditioned", "gap", (33, 47), (1, 1)),
        ("image_conditioned", "patch", (33, 47), (2, 2)),
    ],
)
def test_one_logit_an_image_or_a_cell(name, head, size, shape):
    network = build_discriminator(name, 5, head=head)
    maps = label_maps(1, 5, *size)
    outputs = network(torch.rand(1, 3, 64, 64), maps, maps)
    assert [tuple(output.shape) for output in outputs] == [(1, 1, *shape)] * 2


def test_gap_is_the_mean_of_the_patch_logits():
    for name in NAMES:
        patch, gap = (build_discriminator(name, 4, head=head).eval() for head in ("patch", "gap"))
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


def test_two_branch_without_image_pooling_sees_the_image_at_the_label_maps_size():
    pooled, network = (
        build_discriminator("two_branch", 6, width=0.25, head="patch", image_pool=p)
        for p in (True, False)
    )
    network.load_state_dict(pooled.state_dict())  # one architecture: the same keys and shapes
    image, maps = torch.rand(2, 3, 45, 64), label_maps(2, 6, 12, 16)

    small = F.interpolate(image, (12, 16), mode="bilinear", align_corners=False, antialias=True)
    x = F.relu(network.image_conv2(F.relu(network.image_conv1(2 * small - 1))))
    both = torch.cat([F.relu(network.label_conv(maps)), x], 1)
    z = network.verdict(network.trunk(network.meet(both)))

    torch.testing.assert_close(network(image, maps)[0], z[:, 1:] - z[:, :1])


@pytest.mark.parametrize(
    ("name", "kernels", "channels"),
    [
        ("large_fov", (3, 3, 3, 3, 3, 3, 3), (96, 128, 128, 256, 256, 512, 2)),
        ("large_fov_light", (3, 3, 3, 3, 3, 3, 3), (96, 128, 128, 128, 128, 256, 2)),
        ("small_fov", (3, 1, 3, 1, 3, 1), (96, 128, 256, 256, 512, 2)),
        ("small_fov_light", (3, 1, 3, 1, 3, 1), (96, 128, 128, 128, 256, 2)),
    ],
)
def test_single_branch_equals_the_layer_lists(name, kernels, channels):
    """The parameters in order, as plain convolutions, with two poolings."""
    network = build_discriminator(name, 3, head="patch")
    weights = list(network.parameters())
    assert [(w.shape[-1], w.shape[0]) for w in weights[::2]] == list(
        zip(kernels, channels, strict=True)
    )
    maps = label_maps(2, 3, 18, 22)
    x, pooled_after = maps, (2, 4) if name.startswith("large") else (1, 3)
    for index, (weight, bias) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
        x = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        x = x if index == len(kernels) - 1 else F.relu(x)
        x = F.max_pool2d(x, 2) if index in pooled_after else x
    log_odds = x.log_softmax(1)[:, 1:] - x.log_softmax(1)[:, :1]
    torch.testing.assert_close(network(torch.rand(2, 3, 8, 8), maps)[0], log_odds)


def test_image_conditioned_equals_its_layers_and_the_linear_layer_sees_the_mean():
    network = build_discriminator("image_conditioned", 5, width=0.25).double().eval()
    image, maps = torch.rand(2, 3, 90, 70).double(), label_maps(2, 5, 45, 35).double()
    small = F.interpolate(image, (45, 35), mode="bilinear", align_corners=False, antialias=True)
    x = torch.cat([maps, small], 1)
    for convolution in network.layers[::3]:
        x = F.conv2d(x, convolution.weight, convolution.bias, stride=2, padding=1)
        x = torch.where(x > 0, x, 0.2 * x)
    mean = x.mean((2, 3))
    (scores,), (features,) = network(image, maps, features=True)
    torch.testing.assert_close(features, mean)
    torch.testing.assert_close(scores.flatten(), network.linear(mean)[:, 0])
    # half of the channels, whole ones, and twice the rest
    torch.manual_seed(0)
    dropped = network.layers[2].train()(torch.ones(50, 16, 3, 3))
    assert set(dropped.flatten().tolist()) == {0.0, 2.0}
    assert abs(dropped.mean() - 1) < 0.1 and (dropped.amax((2, 3)) == dropped.amin((2, 3))).all()


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_features_are_the_mean_over_cells_of_what_the_last_layer_gets(name, options):
    network = build_discriminator(name, 4, **options, head="gap").double()
    image, predicted = torch.rand(3, 3, 64, 80).double(), label_maps(3, 4, 32, 40).double()
    truth, seen = label_maps(2, 4, 32, 40).double(), []
    named = {"two_branch": "verdict", "image_conditioned": "linear"}
    last = getattr(network, named.get(name, "layers"))
    last = last[-1] if name not in named else last

    def hook(_, inputs, __):
        x = inputs[0]
        seen.append((x.movedim(3, 1) if name == "image_conditioned" else x).mean((2, 3)))

    last.register_forward_hook(hook)
    logits, features = network(image, truth, predicted, features=True)
    assert [len(each) for each in features] == [2, 3]
    for ours, theirs in zip(features, seen, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(logits, network(image, truth, predicted), strict=True):
        assert torch.equal(ours, theirs)
    # of each image by itself, whatever else is in the batch
    (alone,) = network(image[1:2], predicted[1:2], features=True)[1]
    torch.testing.assert_close(features[1][1:2], alone)
    takes_the_map_alone = name == "fully_convolutional" or options.get("inputs") == "basic"
    assert network.sees_image != takes_the_map_alone
    moved = network(1 - image, predicted)[0] != logits[1]
    assert bool(moved.all()) == network.sees_image


@pytest.mark.parametrize("name", ["two_branch", "small_fov_light", "image_conditioned"])
def test_spectral_norm_divides_by_the_largest_singular_value(name):
    network = build_discriminator(name, 4, width=0.1, spectral_norm=True).double().eval()
    plain = build_discriminator(name, 4, width=0.1).double().eval()
    image, maps = torch.rand(2, 3, 64, 64).double(), label_maps(2, 4, 32, 32).double()
    assert num_parameters(network) == num_parameters(plain)
    layers = {key: it for key, it in network.named_modules() if hasattr(it, "parametrizations")}
    before = {key: it.clone() for key, it in network.state_dict().items()}
    network(image, maps, maps)
    assert all(torch.equal(it, before[key]) for key, it in network.state_dict().items())
    state = {key: before[key] for key in plain.state_dict() if key.endswith("bias")}
    assert len(layers) == len(state)  # all that have weights
    network.train()
    for key, layer in layers.items():
        (norm,), matrix = norms_of(layer), layer.parametrizations.weight.original.detach()
        matrix = matrix.flatten(1)
        u = torch.nn.functional.normalize(matrix @ norm.norm._v, dim=0)
        network(image, maps, maps)  # one iteration, however many label maps there are
        torch.testing.assert_close(norm.norm._u, u)
        v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
        torch.testing.assert_close(norm.norm._v, v)
        largest = torch.linalg.matrix_norm(matrix, 2)
        state[f"{key}.weight"] = layer.parametrizations.weight.original.detach() / largest
    network.eval()
    for key, layer in layers.items():  # to where many iterations lead
        (norm,), weight = norms_of(layer), state[f"{key}.weight"].flatten(1)
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        norm.norm._u.copy_(left[:, 0]), norm.norm._v.copy_(right[0])
    plain.load_state_dict(state)
    torch.testing.assert_close(network(image, maps)[0], plain(image, maps)[0])
    assert len(norms_of(build_discriminator("fully_convolutional", 4, spectral_norm=True))) == 5


@pytest.mark.parametrize(("image_range", "low", "high"), [("unit", 0, 1), ("centred", -1, 1)])
def test_product_is_every_colour_times_every_class(image_range, low, high):
    options = {"width": 0.25, "head": "patch"}
    network = build_discriminator(
        "small_fov_light", 4, inputs="product", image_range=image_range, **options
    )
    image, maps = torch.rand(2, 3, 12, 16), label_maps(2, 4, 12, 16)
    channels = [
        (low + (high - low) * image[:, rgb]) * maps[:, c] for rgb in range(3) for c in range(4)
    ]
    z = network.layers(torch.stack(channels, 1))
    torch.testing.assert_close(network(image, maps)[0], z[:, 1:] - z[:, :1])


def test_product_averages_the_image_over_the_cells_of_the_label_map():
    network = build_discriminator("small_fov_light", 4, inputs="product", width=0.25)
    cells, maps = torch.rand(1, 3, 12, 16), label_maps(1, 4, 12, 16)
    fine = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)
    # stripes that two pixels in the middle of a cell, all that plain interpolation reads, do not
    # cancel
    striped = fine + 0.5 * torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(32)
    torch.testing.assert_close(
        network(striped, maps)[0], network(fine, maps)[0], rtol=0.02, atol=0.002
    )


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("num_labelled", [1, 2, 3])
def test_fewer_label_maps_than_images_belong_to_the_first(name, options, num_labelled):
    network = build_discriminator(name, 4, **options)
    image, predicted = torch.rand(3, 3, 64, 80), label_maps(3, 4, 32, 40)
    truth = label_maps(num_labelled, 4, 32, 40).round()
    on_truth, on_predicted = network(image, truth, predicted)
    assert on_truth.shape[0] == num_labelled and on_predicted.shape[0] == 3
    torch.testing.assert_close(on_truth, network(image[:num_labelled], truth)[0])
    torch.testing.assert_close(on_predicted, network(image, predicted)[0])
    # no map for the last images at all
    torch.testing.assert_close(network(image, truth)[0], on_truth)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_gradients_of_one_call_equal_those_of_separate_calls(name, options):
    network = build_discriminator(name, 4, **options).double()
    image, predicted = torch.rand(3, 3, 64, 80).double(), label_maps(3, 4, 32, 40).double()
    truth = label_maps(2, 4, 32, 40).double()
    parameters = list(network.parameters())
    on_truth, on_predicted = network(image, truth, predicted)
    together = torch.autograd.grad(on_truth.sum() - 2 * on_predicted.sum(), parameters)
    apart = network(image[:2], truth)[0].sum() - 2 * network(image, predicted)[0].sum()
    for ours, reference in zip(together, torch.autograd.grad(apart, parameters), strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("name", NAMES)
def test_label_maps_that_do_not_fit_the_images_or_each_other_are_refused(name):
    network = build_discriminator(name, 4)
    image = torch.rand(2, 3, 64, 64)
    with pytest.raises(InputError, match="3 label maps for 2 images"):
        network(image, label_maps(2, 4, 32, 32), label_maps(3, 4, 32, 32))
    with pytest.raises(InputError, match="32x32 and 32x40 px"):
        network(image, label_maps(2, 4, 32, 32), label_maps(2, 4, 32, 40))


def test_the_image_is_brought_to_four_times_the_label_map():
    network = build_discriminator("two_branch", 3, width=0.25)
    maps = label_maps(1, 3, 13, 9)
    image = torch.rand(1, 3, 50, 40)
    resized = F.interpolate(image, (52, 36), mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(image, maps)[0], network(resized, maps)[0])


def test_image_branch_runs_once_for_all_label_maps():
    network = build_discriminator("two_branch", 4, width=0.25)
    batches = []
    network.image_conv2.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    network(torch.rand(5, 3, 32, 32), *label_maps(6, 4, 8, 8).split((1, 3, 2)))
    assert batches == [3]  # and not for images without a label map


@pytest.mark.parametrize("name", NAMES)
def test_label_maps_do_not_touch_each_other(name):
    network = build_discriminator(name, 4).eval()
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
    # a maximum passes one gradient of four
    two_branch.trunk[1] = two_branch.trunk[4] = torch.nn.AvgPool2d(2)
    # 5 (label) + 2 (meet) + 1 (pool) + 2 x 2 (conv) + 2 (pool) + 4 x 2 (conv) + 4 x 2 (verdict)
    assert field_of_view(two_branch, 64) == (30, 30)


@pytest.mark.parametrize(("name", "pixels"), list(zip(FOV, (34, 34, 18, 18), strict=True)))
@pytest.mark.parametrize("inputs", ["basic", "product"])
def test_fields_of_view_of_the_paper(name, pixels, inputs):
    network = build_discriminator(name, 2, width=0.1, head="patch", inputs=inputs)
    for index, layer in enumerate(network.layers):
        if isinstance(layer, torch.nn.MaxPool2d):
            network.layers[index] = torch.nn.AvgPool2d(2)  # a maximum passes one gradient of four
    assert field_of_view(network, 66) == (pixels, pixels)


@pytest.mark.parametrize("name", ["fully_convolutional", *FOV])
def test_what_takes_the_label_map_alone_ignores_the_image(name):
    network = build_discriminator(name, 3)
    maps = label_maps(1, 3, 40, 40)
    assert torch.equal(
        network(torch.zeros(1, 3, 8, 8), maps)[0], network(torch.ones(1, 3, 9, 9), maps)[0]
    )


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("fully_convolutional", 31),
        ("two_branch", 3),
        ("image_conditioned", 15),
        *((n, 3) for n in FOV),
    ],
)
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


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("two_branch", {"image_pool": "no"}, "image_pool=no.*true or false"),
        ("large_fov", {"inputs": "scaling"}, "inputs=scaling.*basic, product"),
        ("small_fov", {"image_range": 255}, "image_range=255.*unit, centred"),
        ("small_fov", {"head": "mean"}, "gap, patch"),
        ("large_fov_light", {"width": 9}, "0.05 to 8"),
        ("fully_convolutional", {"width": 1}, "width.*does not have"),
        ("image_conditioned", {"spectral_norm": 1}, "spectral_norm=1.*true or false"),
        ("image_conditioned", {"dropout": 1}, "dropout=1.*0 to 0.95"),
    ],
)
def test_bad_options_of_the_others_are_named(name, options, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        build_discriminator(name, 8, **options)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_weights_for_other_classes_load_but_for_the_input_layer(name, options):
    saved = build_discriminator(name, 4, **options).state_dict()
    network = build_discriminator(name, 6, init=Weights(saved, "file"), **options)
    first = "label_conv.weight" if name == "two_branch" else "layers.0.weight"
    assert network.init_report.renewed == (first,)
    for key, tensor in network.state_dict().items():
        assert key == first or torch.equal(tensor, saved[key]), key


def test_unknown_name_lists_the_choices():
    with pytest.raises(InputError, match="two_branch, fully_convolutional"):
        build_discriminator("three_branch", 8)
