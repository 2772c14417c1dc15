"""What `distseg models` prints, against the papers' figures, hand formulas and gradients of the
real networks.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distseg.catalogue import command
from distseg.catalogue.run import measure, measure_discriminator, measure_segmentor
from distseg.cli import main
from distseg.config import schema
from distseg.models import COMPOSITIONS, DISCRIMINATORS, SEGMENTORS, build_segmentor
from distseg.models.connections import Filled, _ones, geometry
from shards.errors import InputError


@pytest.fixture(scope="module")
def everything():
    names = [name for name in SEGMENTORS if name not in COMPOSITIONS]
    found = measure((*names, *DISCRIMINATORS))
    kinds = found["segmentors"], found["discriminators"]
    return tuple({entry.name: entry for entry in entries} for entries in kinds)


def test_every_network_is_listed_with_the_stride_it_declares(everything):
    segmentors, discriminators = everything
    assert {*segmentors, *COMPOSITIONS} == {*SEGMENTORS}
    assert list(discriminators) == list(DISCRIMINATORS)
    with torch.device("meta"):
        declared = {
            name: build_segmentor(name, 21, init="random").output_stride for name in segmentors
        }
    assert {name: entry.output_stride for name, entry in segmentors.items()} == declared
    assert all(
        entry.parameters >= entry.encoder_parameters > 0 and entry.gflop > 0
        for entry in segmentors.values()
    )


def test_figures_of_the_papers(everything):
    segmentors, discriminators = everything
    strides = {"fully_convolutional": 32, "two_branch": 4, "large_fov": 4, "small_fov_light": 4}
    assert {name: discriminators[name].output_stride for name in strides} == strides
    views = {"fully_convolutional": 94, "two_branch": 30, "large_fov": 34, "large_fov_light": 34}
    views |= {"small_fov": 18, "small_fov_light": 18}
    assert {name: discriminators[name].field_of_view_px for name in views} == {
        n: (v, v) for n, v in views.items()
    }
    assert discriminators["large_fov"].parameters == 2_351_170
    assert discriminators["fully_convolutional"].parameters == 2_783_169
    assert segmentors["fcn32s_vgg16"].field_of_view_px == (404, 404)  # Long et al. 2015, table 1
    assert segmentors["deeplabv2_resnet101"].parameters == 44_048_532
    # the mean of the image in its ASPP
    assert segmentors["deeplabv3plus_resnet50"].field_of_view_px is None
    assert (
        segmentors["dilated8_vgg16"].encoder_parameters
        == segmentors["fcn8s_vgg16"].encoder_parameters
    )


def test_options_are_measured_too():
    front, basic = (
        measure_segmentor("dilated8_vgg16", 8, context=context) for context in ("none", "basic")
    )
    assert front.field_of_view_px == (2 * 186 + 8,) * 2  # what valid convolutions eat, and the cell
    assert basic.field_of_view_px == (2 * 186 + 67 * 8,) * 2  # 67 x 67 cells
    assert measure_discriminator("small_fov", 8, head="gap").field_of_view_px is None
    assert measure_discriminator("small_fov", 21, inputs="product").parameters == 1_609_090


def test_a_multiply_add_counts_as_two(everything):
    # kernel, inputs, outputs, side of the output: 321 px are halved to 160 and 80, 41 to 20 and 10
    for sides, measured in (
        ((321, 160, 80), everything[1]["large_fov"].gflop),
        ((41, 20, 10), everything[1]["large_fov"].gflop_at_stride_8),
    ):
        layers = [
            (21, 96, 0),
            (96, 128, 0),
            (128, 128, 0),
            (128, 256, 1),
            (256, 256, 1),
            (256, 512, 2),
            (512, 2, 2),
        ]
        operations = sum(
            2 * 9 * inputs * outputs * sides[level] ** 2 for inputs, outputs, level in layers
        )
        assert measured == pytest.approx(operations / 1e9, rel=1e-9)


class Odd(nn.Module):
    """What the stand-ins must not lose.

    Dead units, maxima, sums in place, channels apart, coarse and fine joined.
    """

    min_size_px = 32
    output_stride = 4

    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.num_classes = num_classes
        self.encoder = self.stem = nn.Sequential(
            nn.Conv2d(3, 8, (3, 5), 2, (1, 2)), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.depthwise = nn.Conv2d(8, 8, 3, padding=4, dilation=4, groups=8)
        self.coarse = nn.Conv2d(8, 16, 3, 2, 1)
        self.up = nn.ConvTranspose2d(16, 4, 4, 2, 1)
        self.out = nn.Conv2d(12, num_classes, (1, 3), padding=(0, 1))

    def forward(self, x):
        x = self.stem(x - 0.5)
        y = self.depthwise(x)
        y += torch.tanh(x)
        x = F.max_pool2d(y, 3, 2, 1)
        fine = self.up(F.hardtanh(self.coarse(x)).relu_())
        return self.out(torch.cat([x, fine[..., : x.shape[2], : x.shape[3]]], 1))


def seen_by_the_real_one(network, shape):
    """Extent of the middle logit's gradient, largest over draws of weights, with maxima and dead
    units as they are.
    """
    extent = torch.zeros(shape[2], shape[3])
    for seed in range(40):
        torch.manual_seed(seed)
        network = type(network)().eval().double()
        image = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        logits = network(image)
        logits[0, :, logits.shape[2] // 2, logits.shape[3] // 2].sum().backward()
        extent += image.grad[0].abs().sum(0)
    rows, columns = (extent.any(axis).nonzero().ravel() for axis in (1, 0))
    return tuple(int(side[-1] - side[0] + 1) for side in (rows, columns))


def test_field_of_view_equals_the_gradient_of_the_real_network():
    with torch.device("meta"):
        network = Odd().eval()
    stride, view = geometry(network, lambda module, image: module(image), 3)
    assert stride == 4 and view == seen_by_the_real_one(network, (1, 3, 96, 128))
    assert view[0] < view[1] < 96


class Normalised(nn.Module):
    """Sees the whole image by its statistics alone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 1))

    def forward(self, x):
        return self.layers(x)


class Blind(nn.Module):
    def forward(self, x):
        return x.detach()[:, :1] + torch.zeros(1, requires_grad=True, dtype=x.dtype) * x[:, :1] * 0


def test_statistics_of_the_image_are_the_whole_image():
    with torch.device("meta"):
        network = Normalised().eval()
    assert geometry(network, lambda module, image: module(image), 3)[1] is None


def test_a_network_that_sees_nothing_is_refused():
    with pytest.raises(InputError, match="Blind: its output does not depend on its input"):
        geometry(Blind(), lambda module, image: module(image), 3)


def test_parameters_take_no_memory():
    with torch.device("meta"):
        filled = Filled(nn.Conv2d(4096, 4096, 7), _ones)
    assert sum(value.untyped_storage().nbytes() for value in filled.values.values()) == 16


def test_the_names_that_need_no_torch_are_those_of_the_networks():
    assert tuple(SEGMENTORS) == schema.SEGMENTORS
    assert tuple(DISCRIMINATORS) == schema.DISCRIMINATORS


def test_a_network_added_to_the_dictionary_appears_by_itself(monkeypatch, capsys):
    monkeypatch.setitem(SEGMENTORS, "odd", Odd)
    monkeypatch.setattr(command, "SEGMENTORS", (*command.SEGMENTORS, "odd"))
    assert main(["models", "odd", "small_fov", "--classes", "5", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (segmentor,), (discriminator,) = document["segmentors"], document["discriminators"]
    assert document["num_classes"] == 5 and document["size_px"] == 321
    assert segmentor["name"] == "odd" and segmentor["encoder"] == "own"
    assert segmentor["parameters"] == sum(parameter.numel() for parameter in Odd(5).parameters())
    assert discriminator["name"] == "small_fov" and discriminator["field_of_view_px"] == [18, 18]


def test_tables_show_every_digit_where_there_is_no_terminal(capsys):
    assert main(["models", "fcn8s_vgg16", "deeplabv3plus_efficientnet_lite0", "large_fov"]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["fcn8s_vgg16"][:5] == ["VGG16", "134,376,863", "134,260,544", "8", "436x436"]
    assert rows["deeplabv3plus_efficientnet_lite0"][4] == "image"
    assert rows["large_fov"] == ["2,351,170", "4", "34x34", "117.4", "1.87"]
    assert "…" not in text and "two_branch" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["unet"], "no network unet"), (["two_branch", "--classes", "0"], "num_classes=0")],
)
def test_unknown_names_and_bad_numbers_are_refused(arguments, message, capsys):
    assert main(["models", *arguments]) == 2
    assert message in capsys.readouterr().err
