"""ResNet encoders: torchvision's keys and values, the two layouts by formula, dilation in place of
a stride.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from distseg.models import BatchNorm2d, build_segmentor, set_batch_norm
from distseg.models.resnet import CAFFE_MEAN, IMAGENET_FILES, NUM_BLOCKS, ResNet
from shards.errors import InputError

DATA = Path(__file__).parent / "data"


def published(network: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's state dict.

    `for k, v in resnet101().state_dict().items()`, 0.29.2.
    """
    lines = (line.split() for line in (DATA / f"{network}.txt").read_text().splitlines())
    return {
        key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape in lines
    }


def shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def waves(state: dict[str, torch.Tensor]) -> None:
    """Fill a state dict with numbers that anyone can recompute."""
    for index, (key, value) in enumerate(state.items()):
        wave = torch.cos(
            torch.arange(value.numel(), dtype=torch.float64) * (0.7 + 0.01 * index)
        ).view(value.shape)
        if value.ndim == 4:
            value.copy_(wave * (4 / value[0].numel()) ** 0.5)
        elif key.endswith(("bn3.weight", "running_mean", "bias")):
            value.copy_(0.3 * wave)
        elif value.ndim == 1:
            value.copy_(1 + 0.5 * wave)


def narrow(depth: int, output_stride: int, **options) -> ResNet:
    """A ResNet of width 2 in float64 whose batch norms do something."""
    network = ResNet(depth, output_stride, width=2, **options).double().eval()
    waves(network.state_dict())
    return network


@pytest.mark.parametrize(("depth", "num_keys"), [(50, 320), (101, 626)])
@pytest.mark.parametrize("layout", ["torchvision", "caffe"])
def test_keys_and_shapes_are_torchvisions(depth, num_keys, layout):
    reference = published(f"resnet{depth}")
    assert len(reference) == num_keys
    with torch.device("meta"):
        ours = shapes(ResNet(depth, 8, layout=layout))
    assert list(ours.items()) == [
        item for item in reference.items() if not item[0].startswith("fc.")
    ]


@pytest.mark.parametrize(
    ("output_stride", "size", "expected"),
    [
        (8, (9, 10), [0.346905009, 0.392492721, 0.107629087, 1.813430959, 0.29569151]),
        (16, (5, 5), [0.342497795, 0.38672154, 0.107663103, 1.601832624, 0.284099383]),
    ],
)
def test_values_are_torchvisions(output_stride, size, expected):
    """Mean, deviation and three values of layer4's map that torchvision 0.29.2 gives for these
    weights.

    They are resnet50's, with replace_stride_with_dilation=[False, output_stride == 8, True].
    """
    network = ResNet(50, output_stride).double().eval()
    waves(network.state_dict())
    y, x = torch.meshgrid(torch.arange(65), torch.arange(73), indexing="ij")
    image = torch.stack(
        [(torch.sin(y * 0.3) + 1) / 2, (torch.cos(x * 0.2) + 1) / 2, ((x + y) % 7) / 6.0]
    )
    with torch.no_grad():
        last = network(image.double()[None])[-1]
    assert last.shape == (1, 2048, *size)
    values = [last.mean().item(), last.std().item(), *last[0, (3, 800, 2000), 2, 4].tolist()]
    assert values == pytest.approx(expected, rel=1e-5)


def plain_resnet(state, image, depth, output_stride, layout):
    """The encoder as formulas on a state dict.

    Where each stride and dilation is, written out per stage.
    """

    def conv(x, key, stride=1, dilation=1):
        weight = state[f"{key}.weight"]
        return F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation)

    def norm(x, key):
        mean, var, scale, shift = (
            state[f"{key}.{name}"].view(1, -1, 1, 1)
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    if layout == "caffe":
        x = image * 255 - torch.tensor(CAFFE_MEAN, dtype=image.dtype).view(1, 3, 1, 1)
    else:
        mean, std = torch.tensor(
            [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=image.dtype
        ).view(2, 1, 3, 1, 1)
        x = (image - mean) / std
    x = norm(conv(x, "conv1", 2), "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=layout == "caffe")
    # per stage: stride and dilation of the first block's 3x3, dilation of the others' (caffe: of
    # all of them)
    if output_stride == 8:
        stages = {"torchvision": [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)]}
        stages["caffe"] = [(1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 4, 4)]
    else:
        stages = {"torchvision": [(1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1, 2)]}
        stages["caffe"] = [(1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 2, 2)]
    for stage, num_blocks in enumerate(NUM_BLOCKS[depth]):
        first_stride, first_dilation, dilation = stages[layout][stage]
        for index in range(num_blocks):
            block = f"layer{stage + 1}.{index}"
            stride = first_stride if index == 0 else 1
            on_1x1, on_3x3 = (stride, 1) if layout == "caffe" else (1, stride)
            y = norm(conv(x, f"{block}.conv1", on_1x1), f"{block}.bn1").relu()
            y = conv(y, f"{block}.conv2", on_3x3, first_dilation if index == 0 else dilation)
            y = norm(conv(norm(y, f"{block}.bn2").relu(), f"{block}.conv3"), f"{block}.bn3")
            if index == 0:
                x = norm(conv(x, f"{block}.downsample.0", stride), f"{block}.downsample.1")
            x = (x + y).relu()
    return x


@pytest.mark.parametrize("layout", ["torchvision", "caffe"])
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("depth", [50, 101])
def test_encoder_equals_the_formulas(depth, output_stride, layout):
    network = narrow(depth, output_stride, layout=layout)
    image = torch.rand(2, 3, 66, 79, dtype=torch.float64)
    with torch.no_grad():
        expected = plain_resnet(network.state_dict(), image, depth, output_stride, layout)
        # means and deviations of the pixels are kept in float32
        torch.testing.assert_close(
            network(image)[-1], expected, rtol=1e-5, atol=1e-6 * expected.max().item()
        )


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_through_stored_statistics_equal_the_formulas(frozen):
    network = narrow(50, 16)
    if frozen:
        set_batch_norm(network, "frozen")
        network.train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    image = torch.rand(2, 3, 66, 79, dtype=torch.float64)
    network(image)[-1].square().mean().backward()
    for name in names:
        state[name].requires_grad_()
    plain_resnet(state, image, 50, 16, "torchvision").square().mean().backward()
    assert len(names) == (53 if frozen else 159)
    for name in names:
        got, expected = network.get_parameter(name).grad, state[name].grad
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
        )


@pytest.mark.parametrize("layout", ["torchvision", "caffe"])
@pytest.mark.parametrize("size", [(64, 64), (97, 130)])
def test_dilation_gives_the_strided_network_at_every_second_cell(layout, size):
    image = torch.rand(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        dense, strided = (
            narrow(50, 8, layout=layout)(image)[1],
            narrow(50, 16, layout=layout)(image)[1],
        )
    torch.testing.assert_close(dense[..., ::2, ::2], strided, rtol=1e-9, atol=1e-9)


def test_bgr_is_the_same_network_with_its_first_filters_turned_round():
    image = torch.rand(1, 3, 40, 40, dtype=torch.float64)
    rgb, bgr = (narrow(50, 16, layout="caffe", channel_order=order) for order in ("rgb", "bgr"))
    bgr.conv1.weight.data = bgr.conv1.weight.flip(1)
    with torch.no_grad():
        torch.testing.assert_close(bgr(image)[1], rgb(image)[1])


def test_frozen_batch_norm_leaves_its_105344_parameters_alone():
    with torch.device("meta"):
        network = ResNet(101, 8)
    layers = [layer for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert len(layers) == 104 and all(isinstance(layer, BatchNorm2d) for layer in layers)
    set_batch_norm(network, "frozen")
    assert sum(p.numel() for p in network.parameters() if not p.requires_grad) == 105_344


def test_torchvisions_file_is_found_where_torchvision_puts_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    with pytest.raises(InputError) as error:
        build_segmentor("deeplabv3_resnet50", 2)
    for part in (str(folder), *IMAGENET_FILES[50], "segmentor.init=PATH", "segmentor.init=random"):
        assert part in str(error.value)
    folder.mkdir(parents=True)
    state = narrow(50, 16).float().state_dict()
    head = {"fc.weight": torch.zeros(1000, 64), "fc.bias": torch.zeros(1000)}
    torch.save(state | head, folder / IMAGENET_FILES[50][1])
    segmentor = build_segmentor("deeplabv3_resnet50", 2, width=2)
    assert all(
        torch.equal(value, state[key]) for key, value in segmentor.encoder.state_dict().items()
    )
    assert segmentor.init_report.missing == () and segmentor.init_report.left_over == (
        "fc.weight",
        "fc.bias",
    )
    with pytest.raises(InputError, match=r"conv1\.weight has shape \(2, 3, 7, 7\)"):
        build_segmentor("deeplabv3plus_resnet50", 2, width=4)


def test_older_files_without_num_batches_tracked_are_complete(tmp_path):
    state = {
        k: v
        for k, v in narrow(50, 16).float().state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "old.pth")
    segmentor = build_segmentor("deeplabv3_resnet50", 2, init=str(tmp_path / "old.pth"), width=2)
    assert segmentor.init_report.missing == () and len(segmentor.init_report.loaded) == len(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "tensorflow"}, "torchvision, caffe"),
        ({"channel_order": "bgr"}, "layout=caffe"),
        ({"channel_order": "gbr", "layout": "caffe"}, "rgb, bgr"),
        ({"width": 0}, "width=0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build_segmentor("deeplabv2_resnet101", 2, init="random", **options)


def test_other_strides_are_refused():
    with pytest.raises(InputError, match=r"encoder_stride=32(.|\n)*8 or 16"):
        build_segmentor("deeplabv3_resnet50", 2, init="random", encoder_stride=32)
