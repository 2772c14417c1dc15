"""Dilated-8: the paper's sizes, alignment at any size, the published borders as valid convolutions,
the identity.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from distseg.models import build_segmentor, vgg
from distseg.models.dilated import WIDTHS, Dilated8, context_module, mirrored
from distseg.models.vgg import VGG16
from shards.errors import InputError
from tests.tiny import NARROW_VGG

NAME = "dilated8_vgg16"


def num_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def thin(num_classes=2, **options):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vgg, "LAYOUT", NARROW_VGG)
        network = build_segmentor(NAME, num_classes, init="random", fc_channels=8, **options)
    # scores of some units: of those at first, which are nearly 0, an error would not be seen
    network.score.weight.data *= 3000
    return network.eval()


@pytest.mark.parametrize("context", ["large", "basic", "none"])
@pytest.mark.parametrize("size", [(8, 8), (33, 47), (64, 72), (61, 130)])
def test_logits_come_at_an_eighth_rounded_up(context, size):
    logits = thin(context=context)(torch.rand(2, 3, *size))
    assert logits.shape == (2, 2, -(-size[0] // 8), -(-size[1] // 8))


@pytest.mark.parametrize(
    ("context", "num_classes", "widths"),
    [
        ("none", 21, []),
        ("basic", 21, [21] * 7),
        ("large", 21, [42, 42, 84, 168, 336, 672, 672]),  # the released network for PASCAL VOC
        ("large", 8, [16, 16, 32, 64, 128, 256, 256]),
    ],
)
def test_parameter_counts_by_formula(context, num_classes, widths):
    with torch.device("meta"):
        network = build_segmentor(NAME, num_classes, init="random", context=context)
    front = 14_714_688 + (512 * 49 + 1) * 4096 + 4097 * 4096 + 4097 * num_classes
    layers = [(9, num_classes, widths[0])] if widths else []
    layers += [(9, *pair) for pair in pairwise(widths)]
    layers += [(1, widths[-1], num_classes)] if widths else []
    expected = front + sum((taps * inputs + 1) * outputs for taps, inputs, outputs in layers)
    assert num_parameters(network) == expected


def test_the_encoder_takes_torchvisions_weights(tmp_path):
    vgg = VGG16(fc_channels=8)
    torch.save(vgg.state_dict(), tmp_path / "vgg16.pth")
    network = build_segmentor(NAME, 2, init=str(tmp_path / "vgg16.pth"), fc_channels=8)
    assert network.init_report.missing == () and network.init_report.left_over == ()
    assert all(
        torch.equal(value, network.encoder.state_dict()[key])
        for key, value in vgg.state_dict().items()
    )
    with pytest.raises(InputError, match=r"segmentor\.init=PATH"):
        build_segmentor(NAME, 2)


class RampEncoder(torch.nn.Module):
    """Stands for VGG16: fc7 holds the x and y position (px) of its cells' centres."""

    def forward(self, image):
        y, x = torch.meshgrid(
            *(torch.arange(side // 8) for side in image.shape[-2:]), indexing="ij"
        )
        return torch.stack([x * 8 + 3.5, y * 8 + 3.5]).float()[None]


@pytest.mark.parametrize("size", [(64, 88), (61, 75), (33, 130)])
def test_logits_upsampled_to_the_image_land_where_they_belong(size):
    network = Dilated8(2, fc_channels=2, context="basic")
    network.encoder = RampEncoder()
    network.context = context_module(2, WIDTHS["basic"], noise=0)
    network.score.weight.data = torch.eye(2)[:, :, None, None]
    up = F.interpolate(network(torch.rand(1, 3, *size)), size, mode="bilinear", align_corners=False)
    for channel, side in ((0, size[1]), (1, size[0])):
        stretched = -(-side // 8) * 8
        own = (torch.arange(side) + 0.5) * stretched / side - 0.5
        read = up[0, channel].mean(0) if channel == 0 else up[0, channel].mean(1)
        # half a cell at the border has no neighbour to interpolate with
        inside = slice(4, side - 4)
        torch.testing.assert_close(read[inside], own[inside], rtol=0, atol=1e-3)


def test_a_turned_network_on_a_turned_image_gives_the_turned_logits():
    """True only if every layer's grid is centred on the image: half a cell of shift would show."""
    network, twin = thin(context="basic"), thin(context="basic")
    for parameter in twin.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.flip(2, 3)
    image = torch.rand(1, 3, 29, 43)
    with torch.no_grad():
        torch.testing.assert_close(
            twin(image.flip(2, 3)), network(image).flip(2, 3), rtol=1e-3, atol=1e-5
        )


def test_mirrored_equals_reflection_and_goes_on_where_that_ends():
    image = torch.rand(1, 3, 9, 12)
    torch.testing.assert_close(mirrored(image, 8), F.pad(image, (8,) * 4, mode="reflect"))
    row = mirrored(torch.tensor([0.0, 1, 2]).view(1, 1, 1, 3), 7)[0, 0, 0]
    assert row.tolist() == [1, 2, 1, 0, 1, 2, 1, *(0, 1, 2), 1, 0, 1, 2, 1, 0, 1]


def published(network, image):
    """The reference: 186 mirrored px around the image, no convolution padded, 33 zeros around the
    scores.
    """

    def conv(x, layer):
        return F.conv2d(x, layer.weight, layer.bias, dilation=layer.dilation)

    x = (mirrored(image, 186) - network.encoder.mean) / network.encoder.std
    features = network.encoder.features
    for index, layer in enumerate(features):
        if isinstance(layer, torch.nn.Conv2d):
            assert layer.dilation == ((2, 2) if index >= 24 else (1, 1))
            x = F.relu(conv(x, layer))
        elif isinstance(layer, torch.nn.MaxPool2d):
            x = F.max_pool2d(x, 2)
    assert network.encoder.classifier[0].dilation == (4, 4)
    for index in (0, 3):
        x = F.relu(conv(x, network.encoder.classifier[index]))
    x = F.pad(conv(x, network.score), (33,) * 4)
    for layer in network.context[:-1:2]:
        x = F.relu(conv(x, layer))
    return conv(x, network.context[-1])


def test_mirror_equals_the_published_network():
    network = thin(border="mirror", context="large")
    for layer in network.context[::2]:
        torch.nn.init.normal_(layer.weight, std=0.1)
        torch.nn.init.normal_(layer.bias)  # what the zeros around the scores turn into
    image = torch.rand(1, 3, 24, 40)
    with torch.no_grad():
        expected = published(network, image)
        assert expected.shape == (1, 2, 3, 5)
        torch.testing.assert_close(
            network(image), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )


@pytest.mark.parametrize("context", ["basic", "large"])
def test_the_context_starts_as_the_identity_on_scores_that_are_not_negative(context):
    scores = torch.rand(1, 5, 70, 40)
    quiet, noisy = context_module(5, WIDTHS[context], noise=0), context_module(5, WIDTHS[context])
    torch.testing.assert_close(quiet(scores), scores)
    # by weights of a hundredth of the diagonal's
    assert (noisy(scores) - scores).abs().mean() < 0.5
    torch.testing.assert_close(quiet(scores - 0.5), (scores - 0.5).relu())


def test_noise_of_the_identity_is_a_hundredth_of_its_weight():
    for layer in context_module(5, WIDTHS["large"])[::2]:
        share = 5 / layer.out_channels
        middle = layer.weight[:, :, layer.kernel_size[0] // 2, layer.kernel_size[0] // 2]
        # class, its outputs, class, its inputs
        per_class = middle.unflatten(0, (5, -1)).unflatten(2, (5, -1))
        for index in range(5):
            assert (per_class[index, :, index] == share).all()
        assert (layer.weight == share).sum() == (middle == share).sum() == middle.numel() / 5
        rest = layer.weight[layer.weight != share]
        assert rest.std().item() == pytest.approx(0.01 * share, rel=0.2)


@pytest.mark.parametrize("context", ["basic", "large"])
def test_context_sees_67_by_67_cells(context):
    network = context_module(2, WIDTHS[context]).double()
    for parameter in network.parameters():
        parameter.data.abs_()  # no cancellation and no dead unit: every path has a gradient
    scores = torch.rand(1, 2, 81, 83).double().requires_grad_()
    network(scores)[0, 0, 40, 41].backward()
    seen = scores.grad[0].abs().sum(0) > 0
    assert seen.any(1).nonzero().ravel().tolist() == list(range(40 - 33, 40 + 34))
    assert seen.any(0).nonzero().ravel().tolist() == list(range(41 - 33, 41 + 34))


def test_a_training_step_reaches_every_parameter():
    network = thin(4).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    image, label = torch.rand(2, 3, 24, 33), torch.randint(0, 4, (2, 3, 5))
    before = [parameter.detach().clone() for parameter in network.parameters()]
    F.cross_entropy(network(image), label).backward()
    optimizer.step()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in network.parameters())
    assert all(
        not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "huge"}, "context=huge.*large.*none"),
        ({"border": "reflect"}, "border=reflect.*zeros, mirror"),
        ({"fc_channels": 0}, "fc_channels=0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        build_segmentor(NAME, 2, init="random", **options)


def test_an_image_too_small_is_refused():
    with pytest.raises(InputError, match="image of 64x7 px"):
        thin()(torch.rand(1, 3, 64, 7))
