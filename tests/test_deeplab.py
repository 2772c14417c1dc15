"""DeepLabV2, V3 and V3+.

Published sizes, grids that lie on the image, atrous pooling by hand, foreign weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from distseg.models import build_segmentor, set_batch_norm
from distseg.models.aspp import ASPP, SummedClassifiers
from distseg.models.deeplab import (
    DeepLabV2ResNet101,
    DeepLabV3Lite0,
    DeepLabV3PlusLite0,
    DeepLabV3PlusResNet50,
    DeepLabV3PlusResNet101,
    DeepLabV3ResNet50,
    DeepLabV3ResNet101,
)
from distseg.models.grids import upsample_nodes
from shards.errors import InputError

DATA = Path(__file__).parent / "data"
NARROW = {"width": 4}
# name, options that make it small, output stride
NETWORKS = [
    ("deeplabv2_resnet101", NARROW, 8),
    ("deeplabv2_resnet101", NARROW | {"layout": "caffe"}, 1),
    ("deeplabv3_resnet50", NARROW, 16),
    ("deeplabv3_resnet101", NARROW | {"encoder_stride": 8}, 8),
    ("deeplabv3_efficientnet_lite0", {}, 16),
    ("deeplabv3plus_resnet50", NARROW, 4),
    ("deeplabv3plus_resnet101", NARROW | {"encoder_stride": 8}, 4),
]


def num_parameters(network, only_trained=False):
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not only_trained)


def on_meta(kind, *args, **options):
    with torch.device("meta"):
        return kind(*args, **options)


def test_deeplabv2_has_the_parameters_of_hung_et_al():
    network = on_meta(DeepLabV2ResNet101, 21, layout="caffe")
    assert num_parameters(network) == 44_048_532
    set_batch_norm(network, "frozen")
    assert num_parameters(network, only_trained=True) == 43_943_188


@pytest.mark.parametrize(
    ("kind", "published"), [(DeepLabV3ResNet50, 39_638_869), (DeepLabV3ResNet101, 58_630_997)]
)
def test_deeplabv3_has_torchvisions_parameters_but_for_known_ones(kind, published):
    """torchvision's (0.29.2, 21 classes, no auxiliary head) has a 3x3 more, which is not in the
    paper.

    And it normalises the image-level branch, where we have a bias.
    """
    one_more = 256 * 256 * 9 + 2 * 256
    assert num_parameters(on_meta(kind, 21)) == published - one_more - 2 * 256 + 256
    assert num_parameters(on_meta(kind, 21, encoder_stride=8)) == num_parameters(on_meta(kind, 21))


@pytest.mark.parametrize(
    ("plus", "kind"),
    [(DeepLabV3PlusResNet50, DeepLabV3ResNet50), (DeepLabV3PlusResNet101, DeepLabV3ResNet101)],
)
def test_deeplabv3plus_adds_the_decoder_of_chen_et_al(plus, kind):
    skip, refine = 256 * 48 + 2 * 48, (304 + 256) * 256 * 9 + 4 * 256
    assert num_parameters(on_meta(plus, 21)) == num_parameters(on_meta(kind, 21)) + skip + refine


def test_lite0_keeps_its_keys_and_sizes():
    network = on_meta(DeepLabV3PlusLite0, 8)
    assert num_parameters(network) == 3_306_040
    shapes = [
        f"{key} {'x'.join(map(str, value.shape)) or 'scalar'}"
        for key, value in network.state_dict().items()
    ]
    expected = (DATA / "deeplabv3plus_lite0_head.txt").read_text().splitlines()
    assert [line for line in shapes if not line.startswith("encoder.")] == expected
    light = on_meta(DeepLabV3Lite0, 8).state_dict()
    assert set(light) == {
        key for key in network.state_dict() if not key.startswith(("skip_", "refine_"))
    }


@pytest.mark.parametrize(("name", "options", "stride"), NETWORKS)
def test_logits_come_at_the_output_stride_rounded_up(name, options, stride):
    network = build_segmentor(name, 3, init="random", **options).eval()
    assert network.output_stride == stride
    for size in ((32, 32), (33, 47), (64, 96), (113, 90)):
        cells = [-(-side // stride) for side in size]
        with torch.no_grad():
            assert network(torch.rand(1, 3, *size)).shape == (1, 3, *cells)
    with pytest.raises(InputError, match="image of 64x31 px"):
        network(torch.rand(1, 3, 64, 31))


def test_321_px_give_41_cells():
    network = build_segmentor("deeplabv2_resnet101", 21, init="random", width=1).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, 321, 321)).shape == (1, 21, 41, 41)


def make_linear(network):
    """Every kernel looks at its middle alone and averages its channels; pooling averages too; no
    image-level branch.

    So each logit is a linear function of the pixels at its place, as long as these are in the upper
    half.
    """
    encoder = network.encoder
    if hasattr(encoder, "maxpool"):
        encoder.mean.fill_(0.5), encoder.std.fill_(0.5)
        encoder.maxpool = torch.nn.AvgPool2d(
            3, 2, 1, encoder.maxpool.ceil_mode, count_include_pad=False
        )
    for key, layer in network.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            middle = layer.kernel_size[0] // 2
            layer.weight.data.zero_()
            layer.weight.data[:, :, middle, middle] = 1 / layer.weight.shape[1]
        elif isinstance(layer, torch.nn.BatchNorm2d):
            # of a residual block a tenth, or the sums would leave ReLU6's range
            layer.weight.data.fill_(0.1 if key.endswith(("bn3", "_bn2")) else 1)
    for layer in network.modules():
        if isinstance(layer, ASPP):
            layer.mean[0].weight.data.zero_(), layer.mean[0].bias.data.zero_()
    return network.double().eval()


def positions(network, size):
    """For every pixel the y and the x that its upsampled logit has read."""
    rows, columns = (torch.arange(side, dtype=torch.float64) / side for side in size)
    ramps = [rows[:, None].expand(size), columns.expand(size)]
    images = torch.stack([torch.zeros(size), torch.ones(size), *ramps])
    with torch.no_grad():
        logits = network(0.5 + 0.5 * images[:, None].expand(-1, 3, -1, -1))[:, :1]
    zero, one, *own = F.interpolate(logits, size, mode="bilinear", align_corners=False)[:, 0]
    return [(read - zero) / (one - zero) * side for read, side in zip(own, size, strict=True)]


# the caffe layout's lie where AdvSemiSeg's do: tests/test_advsemiseg.py
ON_THE_IMAGE = [network for network in NETWORKS if "layout" not in network[1]]


@pytest.mark.parametrize(("name", "options", "stride"), ON_THE_IMAGE)
@pytest.mark.parametrize("size", [(160, 96), (113, 150)])
def test_logits_lie_on_the_image_at_any_size(name, options, stride, size):
    network = make_linear(build_segmentor(name, 2, init="random", **options))
    decoders = [None]
    if "plus" in name:  # each of the two inputs of the decoder alone: it is linear in them
        weight = network.refine[0][0].weight.data
        only_coarse, only_skip = weight.clone(), weight.clone()
        only_coarse[:, 256:], only_skip[:, :256] = 0, 0
        decoders = [only_coarse, only_skip]
    for decoder in decoders:
        if decoder is not None:
            network.refine[0][0].weight.data = decoder
        for axis, at in enumerate(positions(network, size)):
            side = size[axis]
            half_px = 0.5 * side / (-(-side // stride) * stride)  # what no odd kernel can give
            read = at.mean(1 - axis)
            own = torch.arange(side, dtype=torch.float64) + half_px
            torch.testing.assert_close(read[24:-40], own[24:-40], rtol=0, atol=1e-3)


@pytest.mark.parametrize("factor", [2, 4])
def test_nodes_keep_their_values_and_lines_stay_straight(factor):
    coarse = torch.randn(2, 3, 5, 4)
    size = (factor * 5, factor * 3 + 1)
    fine = upsample_nodes(coarse, factor, size)
    assert fine.shape[-2:] == size
    torch.testing.assert_close(fine[..., ::factor, ::factor], coarse)
    between = (coarse[..., :-1, :] + coarse[..., 1:, :]) / 2
    torch.testing.assert_close(fine[..., factor // 2 : -factor : factor, ::factor], between)
    assert torch.equal(fine[..., -1, :], fine[..., -factor, :])


@pytest.mark.parametrize(("branches", "rates"), [(4, (6, 12, 18, 24)), (2, (6, 12))])
def test_deeplabv2_sums_its_atrous_classifiers(branches, rates):
    network = (
        build_segmentor("deeplabv2_resnet101", 5, init="random", width=4, aspp_branches=branches)
        .double()
        .eval()
    )
    image = torch.rand(1, 3, 96, 128, dtype=torch.float64)
    with torch.no_grad():
        features = network.encoder(F.pad(image, (4, 0, 4, 0), mode="replicate"))[-1]
        expected = torch.zeros(1, 5, 13, 17, dtype=torch.float64)
        for branch, rate in zip(network.aspp.children(), rates, strict=True):
            expected += F.conv2d(features, branch.weight, branch.bias, padding=rate, dilation=rate)
        torch.testing.assert_close(network(image), expected[..., 1:, 1:])


@pytest.mark.parametrize("size", [(22, 22), (5, 9), (1, 3)])
def test_taps_moved_and_added_are_the_sum_of_the_convolutions(size):
    torch.manual_seed(0)
    pooling = SummedClassifiers(17, 5, (6, 12, 2)).double()
    for classifier in pooling.children():
        torch.nn.init.normal_(classifier.bias)
    x = torch.randn(2, 17, *size, dtype=torch.float64, requires_grad=True)
    ways = pooling(x), sum(classifier(x) for classifier in pooling.children())
    torch.testing.assert_close(*ways, atol=1e-12, rtol=0)
    upstream = torch.randn_like(ways[0])
    gradients = [torch.autograd.grad(way, [x, *pooling.parameters()], upstream) for way in ways]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert pooling.float()(x.float()).dtype == torch.float32  # summed in it


def test_deeplabv2_classifiers_start_as_published():
    network = build_segmentor("deeplabv2_resnet101", 21, init="random", width=16)
    for branch in network.aspp.children():
        assert branch.weight.std().item() == pytest.approx(0.01, rel=0.02) and not branch.bias.any()


def test_doubled_rates_give_the_strided_pooling_at_every_second_cell():
    strided, dense = (
        build_segmentor("deeplabv3_resnet50", 2, init="random", width=4, encoder_stride=stride)
        .double()
        .eval()
        for stride in (16, 8)
    )
    dense.load_state_dict(strided.state_dict())
    for network in (strided, dense):
        network.aspp.mean[0].weight.data.zero_()  # the mean over twice as many cells is another one
    image = torch.rand(1, 3, 225, 257, dtype=torch.float64)
    with torch.no_grad():
        fine, coarse = (network.aspp(network.encoder(image)[-1]) for network in (dense, strided))
    torch.testing.assert_close(fine[..., ::2, ::2], coarse)


@pytest.mark.parametrize(("name", "options", "stride"), NETWORKS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_step_changes_every_tensor_and_stays_finite(name, options, stride, batch_size):
    torch.manual_seed(0)
    network = build_segmentor(name, 3, init="random", **options).train()
    before = {key: parameter.detach().clone() for key, parameter in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    logits = network(torch.rand(batch_size, 3, 48, 40))
    F.cross_entropy(logits, torch.randint(3, (batch_size, *logits.shape[-2:]))).backward()
    optimizer.step()
    for key, parameter in network.named_parameters():
        assert torch.isfinite(parameter).all(), key
        # the batch norm after it removes what is the same at all pixels of a single image
        is_removed = batch_size == 1 and key.startswith("aspp.mean.")
        assert is_removed or not torch.equal(parameter, before[key]), key


def foreign_state(num_classes, prefix=""):
    """DeepLabV2's random weights under the keys of AdvSemiSeg.

    No num_batches_tracked, layer5 for the classifiers.
    """
    network = build_segmentor(
        "deeplabv2_resnet101", num_classes, init="random", layout="caffe", width=2
    )
    state = {}
    for key, value in network.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            state[prefix + key.removeprefix("encoder.").replace("aspp.", "layer5.conv2d_list.")] = (
                value
            )
    return network, state


@pytest.mark.parametrize("prefix", ["", "Scale."])
def test_weights_of_advsemiseg_load_whole(prefix, tmp_path):
    network, state = foreign_state(3, prefix)
    assert (
        f"{prefix}layer5.conv2d_list.3.bias" in state
        and f"{prefix}layer4.2.bn3.running_var" in state
    )
    torch.save(state, tmp_path / "advsemiseg.pth")
    init = {"init": str(tmp_path / "advsemiseg.pth"), "layout": "caffe", "width": 2}
    loaded = build_segmentor("deeplabv2_resnet101", 3, **init)
    assert all(
        torch.equal(value, network.state_dict()[key]) for key, value in loaded.state_dict().items()
    )
    assert loaded.init_report.missing == loaded.init_report.left_over == ()
    two = build_segmentor("deeplabv2_resnet101", 3, aspp_branches=2, **init)
    left_over = [
        f"{prefix}layer5.conv2d_list.{i}.{part}" for i in (2, 3) for part in ("weight", "bias")
    ]
    assert list(two.init_report.left_over) == left_over


def test_classifiers_for_other_classes_are_left_out_and_reported(tmp_path):
    network, state = foreign_state(5, "Scale.")
    torch.save(state, tmp_path / "coco.pth")
    init = {"init": str(tmp_path / "coco.pth"), "layout": "caffe", "width": 2}
    loaded = build_segmentor("deeplabv2_resnet101", 3, **init)
    keys = [(i, part) for i in range(4) for part in ("weight", "bias")]
    assert list(loaded.init_report.left_over) == [
        f"Scale.layer5.conv2d_list.{i}.{part}" for i, part in keys
    ]
    assert list(loaded.init_report.missing) == [f"aspp.{i}.{part}" for i, part in keys]
    assert torch.equal(
        loaded.encoder.layer4[2].conv3.weight, network.encoder.layer4[2].conv3.weight
    )
    with pytest.raises(InputError, match=r"encoder\.conv1\.weight has shape \(2, 3, 7, 7\)"):
        build_segmentor("deeplabv2_resnet101", 3, **init | {"width": 4})


def test_weights_of_the_other_layout_are_refused(tmp_path, monkeypatch):
    network, state = foreign_state(3)
    torch.save(state, tmp_path / "advsemiseg.pth")
    with pytest.raises(InputError, match="layout=caffe"):
        build_segmentor("deeplabv2_resnet101", 3, init=str(tmp_path / "advsemiseg.pth"), width=2)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(
        network.encoder.state_dict() | {"fc.weight": torch.zeros(1)},
        folder / "resnet101-63fe2227.pth",
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match="layout=torchvision"):
        build_segmentor("deeplabv2_resnet101", 3, width=2, layout="caffe")


@pytest.mark.parametrize(("name", "options", "stride"), NETWORKS)
def test_a_saved_segmentor_loads_whole(name, options, stride, tmp_path):
    network = build_segmentor(name, 3, init="random", **options)
    save_file(network.state_dict(), tmp_path / "segmentor.safetensors")
    again = build_segmentor(name, 3, init=str(tmp_path / "segmentor.safetensors"), **options)
    assert all(
        torch.equal(value, network.state_dict()[key]) for key, value in again.state_dict().items()
    )
    assert again.init_report.missing == again.init_report.left_over == ()


def test_other_numbers_of_branches_are_refused():
    with pytest.raises(InputError, match=r"aspp_branches=3(.|\n)*4 or 2"):
        build_segmentor("deeplabv2_resnet101", 3, init="random", aspp_branches=3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deeplabv3_resnet50", {"encoder_stride": 8}),
        ("deeplabv3_resnet50", {}),
        ("deeplabv3plus_resnet50", {}),
        ("deeplabv3plus_resnet50", {"encoder_stride": 8}),
        ("deeplabv2_resnet101", {}),
        ("deeplabv2_resnet101", {"layout": "caffe"}),
        ("deeplabv3_efficientnet_lite0", {}),
        ("deeplabv3plus_efficientnet_lite0", {}),
    ],
)
@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_an_auxiliary_head_lies_on_the_cells_of_the_logits_and_changes_nothing_else(
    name: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    if "resnet" in name:
        options = {"width": 8, **options}
    torch.manual_seed(0)
    plain = build_segmentor(name, 5, init="random", **options)
    torch.manual_seed(0)
    network = build_segmentor(name, 5, init="random", auxiliary=True, **options)
    own = network.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in plain.state_dict().items())
    assert network.has_auxiliary and not plain.has_auxiliary
    image = torch.rand(2, 3, *size)
    assert torch.equal(plain.eval()(image), network.eval()(image))  # a tensor, as ever
    answer = network.train()(image)
    assert answer["out"].shape == answer["aux"].shape == plain.train()(image).shape
    (answer["aux"].square().sum()).backward()
    reached = {key for key, p in network.named_parameters() if p.grad is not None}
    assert {key for key, _ in network.named_parameters() if key.startswith("auxiliary")} <= reached
    last = ("encoder.layer4", "encoder._blocks.15", "aspp", "classifier")
    assert not any(key.startswith(last) for key in reached)


def test_the_auxiliary_heads_cells_are_those_of_layer3() -> None:
    """A head that copies layer3's first channel gives it at the places of the logits' cells."""
    network = build_segmentor(
        "deeplabv3plus_resnet50", 5, init="random", width=8, auxiliary=True
    ).train()
    network.auxiliary = torch.nn.Identity()
    seen: dict[str, torch.Tensor] = {}
    network.encoder.layer3.register_forward_hook(lambda *at: seen.update(map=at[2]))
    answer = network(torch.rand(2, 3, 64, 96))
    # cell i + 1 of layer3's map lies on the image's i-th cell of 16 px, so on 4 * i of 4 px cells,
    # less the one that the margin adds before the image
    fine, coarse = answer["aux"], seen["map"]
    torch.testing.assert_close(fine[..., 3::4, 3::4], coarse[..., 1:5, 1:7])


def test_the_auxiliary_heads_cells_are_those_of_the_light_encoders_eighths() -> None:
    """What one of the logits' cells shows is found on that cell of the auxiliary ones."""
    network = build_segmentor("deeplabv3_efficientnet_lite0", 5, init="random", auxiliary=True)
    network.train()
    network.auxiliary = torch.nn.Identity()
    for layer in network.modules():
        layer.training = layer is network  # no statistics, which all of an image have a part in
    black = torch.zeros(1, 3, 160, 160)
    image = black.clone()
    image[..., 64:80, 96:112] = 1
    with torch.no_grad():
        found = (network(image)["aux"] - network(black)["aux"]).abs().sum((0, 1))  # (10, 10)
    for axis, cell in ((1, 4), (0, 6)):
        shares = found.sum(axis) / found.sum()
        assert float(shares @ torch.arange(10.0)) == pytest.approx(cell, abs=0.1)
