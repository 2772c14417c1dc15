"""FCN on VGG16: torchvision's keys, the reference's offsets and scores, coarse to fine, one score
for two classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from distseg.models import build_segmentor, vgg
from distseg.models.fcn import FCN8s, FCN8sAtOnce, FCN16s, FCN32s, Upscore
from distseg.models.vgg import VGG16
from shards.errors import InputError

DATA = Path(__file__).parent / "data"
NAMES = {"fcn32s_vgg16": 32, "fcn16s_vgg16": 16, "fcn8s_vgg16": 8, "fcn8s_atonce_vgg16": 8}


@pytest.fixture(scope="module")
def fcn():
    torch.manual_seed(0)
    return build_segmentor("fcn8s_vgg16", 3, init="random", fc_channels=16).eval()


def narrow(kind, monkeypatch, **options):
    """A network of kind with 4 channels in every layer and random scores."""
    monkeypatch.setattr(
        vgg, "LAYOUT", tuple(4 if isinstance(step, int) else step for step in vgg.LAYOUT)
    )
    network = kind(options.pop("num_classes", 2), fc_channels=4, **options)
    for name in ("score_fr", "score_pool4", "score_pool3"):
        if hasattr(network, name):
            setattr(network, name, torch.nn.Conv2d(4, getattr(network, name).out_channels, 1))
    return network


def test_vgg_has_torchvisions_keys_and_sizes():
    """Of `for k, v in vgg16().state_dict().items()`, 0.29.2, without the last layer.

    Fc6 and fc7 are flat there.
    """
    lines = (line.split() for line in (DATA / "vgg16.txt").read_text().splitlines())
    published = {key: tuple(map(int, shape.split("x"))) for key, shape in lines}
    assert len(published) == 32
    with torch.device("meta"):
        state = VGG16().state_dict()
    flat = {
        key: tuple((v.flatten(1) if key.startswith("classifier") and v.ndim == 4 else v).shape)
        for key, v in state.items()
    }
    assert list(flat.items()) == [
        item for item in published.items() if not item[0].startswith("classifier.6")
    ]
    assert state["classifier.0.weight"].shape == (4096, 512, 7, 7)


def test_fully_connected_weights_become_the_same_function_as_convolutions(tmp_path):
    state = {
        f"classifier.0.{key}": value
        for key, value in torch.nn.Linear(25088, 8).state_dict().items()
    }
    state |= {"classifier.6.weight": torch.zeros(1000, 8)}
    torch.save(state, tmp_path / "vgg.pth")
    init = {"init": str(tmp_path / "vgg.pth"), "fc_channels": 8}
    with pytest.raises(InputError, match=r"segmentor\.init_partial=true"):
        build_segmentor("fcn8s_vgg16", 2, **init)
    segmentor = build_segmentor("fcn8s_vgg16", 2, **init, init_partial=True)
    pool5 = torch.randn(1, 512, 7, 7)
    expected = F.linear(pool5.flatten(1), state["classifier.0.weight"], state["classifier.0.bias"])
    middle = segmentor.encoder.classifier[0](pool5)[:, :, 3, 3]
    torch.testing.assert_close(middle, expected, rtol=1e-4, atol=1e-4)
    assert segmentor.init_report.left_over == ("classifier.6.weight",)
    assert "features.0.weight" in segmentor.init_report.missing


def test_torchvisions_file_is_found_where_torchvision_puts_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    with pytest.raises(InputError) as error:
        build_segmentor("fcn32s_vgg16", 2)
    for part in (str(folder), "vgg16-397923af.pth", "segmentor.init=PATH", "segmentor.init=random"):
        assert part in str(error.value)
    folder.mkdir(parents=True)
    torch.save({"features.0.bias": torch.arange(64.0)}, folder / "vgg16-397923af.pth")
    segmentor = build_segmentor("fcn32s_vgg16", 2, init_partial=True, fc_channels=2)
    assert torch.equal(segmentor.encoder.features[0].bias, torch.arange(64.0))
    torch.save({"features.0.bias": torch.zeros(63)}, folder / "vgg16-397923af.pth")
    with pytest.raises(InputError, match=r"features\.0\.bias has shape \(63,\)"):
        build_segmentor("fcn32s_vgg16", 2, fc_channels=2)


def test_parameters_are_those_of_the_layers():
    """At 21 classes: VGG16's convolutions, fc6, fc7, the 1x1 scores and the k4 upsamplings of the
    reference's nets.

    The reference's last upsampling (k64, k32 or k16) is fixed; here the loss and inference do it.
    """
    vgg16 = 14_714_688 + (25088 * 4096 + 4096) + (4096 * 4096 + 4096)
    expected = {"fcn32s_vgg16": vgg16 + 4097 * 21}
    expected["fcn16s_vgg16"] = expected["fcn32s_vgg16"] + 513 * 21 + 21 * 21 * 16
    expected["fcn8s_vgg16"] = expected["fcn16s_vgg16"] + 257 * 21 + 21 * 21 * 16
    expected["fcn8s_atonce_vgg16"] = expected["fcn8s_vgg16"]
    with torch.device("meta"):
        for name, num_parameters in expected.items():
            network = build_segmentor(name, 21, init="random")
            assert sum(parameter.numel() for parameter in network.parameters()) == num_parameters


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 97), (129, 90)])
def test_logits_come_at_the_output_stride_rounded_up(name, size):
    network = build_segmentor(name, 3, init="random", fc_channels=4).eval()
    assert network.output_stride == NAMES[name]
    with torch.no_grad():
        assert network(torch.rand(1, 3, *size)).shape == (
            1,
            3,
            *(-(-side // NAMES[name]) for side in size),
        )
    with pytest.raises(InputError, match="image of 64x31 px"):
        network(torch.rand(1, 3, 64, 31))


def test_zero_scores_start_as_a_uniform_softmax(fcn):
    probabilities = fcn(torch.rand(1, 3, 40, 40)).softmax(1)
    torch.testing.assert_close(probabilities, torch.full_like(probabilities, 1 / 3))


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 2)])
def test_upscore_starts_as_bilinear_upsampling_up_to_the_border(size):
    score = torch.randn(2, 3, *size)
    finer = torch.empty(2, 1, 2 * size[0] - 1, 2 * size[1])
    expected = F.interpolate(score, scale_factor=2.0, mode="bilinear", align_corners=False)[
        ..., :-1, :
    ]
    torch.testing.assert_close(Upscore(3)(score, finer), expected)


class RampEncoder(torch.nn.Module):
    """Stands for VGG16: fc7 holds its cells' centres, x and y (px), the rest zero."""

    def forward(self, image):
        height, width = (-(-side // 32) for side in image.shape[-2:])
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        fc7 = torch.stack([(x + 0.5) * 32 - 0.5, (y + 0.5) * 32 - 0.5]).float()[None]
        sides = [tuple(-(-side // stride) for side in image.shape[-2:]) for stride in (8, 16)]
        return torch.zeros(1, 256, *sides[0]), torch.zeros(1, 512, *sides[1]), fc7


@pytest.mark.parametrize("kind", [FCN32s, FCN16s, FCN8s, FCN8sAtOnce])
@pytest.mark.parametrize("size", [(160, 224), (213, 320), (161, 187)])
def test_scores_land_where_they_belong_at_any_size(kind, size):
    network = kind(2, fc_channels=2)
    network.encoder = RampEncoder()
    network.score_fr.weight.data = torch.eye(2)[:, :, None, None]
    up = F.interpolate(network(torch.rand(1, 3, *size)), size, mode="bilinear", align_corners=False)
    # where no border is near, each pixel must read its own position, on the grid of multiples of
    # the stride
    for axis, side in ((0, size[1]), (1, size[0])):
        stretched = -(-side // kind.output_stride) * kind.output_stride
        own = (torch.arange(side) + 0.5) * stretched / side - 0.5
        read = up[0, axis].mean(0) if axis == 0 else up[0, axis].mean(1)
        torch.testing.assert_close(read[28 : side - 36], own[28 : side - 36], rtol=0, atol=1e-2)


def test_shifting_the_image_by_one_stride_shifts_the_logits(fcn):
    network = copy.deepcopy(fcn)
    torch.nn.init.normal_(network.score_fr.weight)
    torch.nn.init.normal_(network.score_pool3.weight)
    wide = torch.rand(1, 3, 32, 1024)
    with torch.no_grad():
        left, right = network(wide[..., :-32]), network(wide[..., 32:])
    middle = slice(48, 64)  # out of the field of view (404 px) of either border
    torch.testing.assert_close(right[..., middle], left[..., 52:68], rtol=1e-3, atol=1e-4)


@dataclass(frozen=True)
class Grid:
    """Cell i is centred on pixel step * i + start of the image."""

    step: float = 1
    start: float = 0

    def layer(self, kernel, stride=1, padding=0):
        """After a convolution or a pooling."""
        return Grid(self.step * stride, self.start + self.step * ((kernel - 1) / 2 - padding))

    def upscore(self, kernel, stride):
        """After a transposed convolution without padding."""
        step = self.step / stride
        return Grid(step, self.start - step * (kernel - 1) / 2)

    def cropped(self, offset):
        return Grid(self.step, self.start + self.step * offset)

    def offset_of(self, other):
        """How many cells must be cut off before this grid to make it start where `other` does."""
        assert self.step == other.step
        return (other.start - self.start) / self.step


def vgg_grids(first_padding, fc6_padding):
    """pool3, pool4 and fc7 of VGG16, with 13 convolutions 3x3, pools 2x2 and a 7x7 fc6."""
    grid, pools = Grid().layer(3, padding=first_padding), []
    for num_convolutions in (1, 2, 3, 3, 3):  # without the very first one
        for _ in range(num_convolutions):
            grid = grid.layer(3, padding=1)
        grid = grid.layer(2, 2)
        pools.append(grid)
    return pools[2], pools[3], grid.layer(7, padding=fc6_padding)


def test_the_references_crop_offsets_follow_from_its_layers():
    """19 (32s); 5, 27 (16s).

    9, 31 (8s): of voc-fcn32s, 16s and 8s net.py, here from their arithmetic.
    """
    pool3, pool4, fc7 = vgg_grids(first_padding=100, fc6_padding=0)
    assert fc7.upscore(64, 32).offset_of(Grid()) == 19
    up2 = fc7.upscore(4, 2)
    assert pool4.offset_of(up2) == 5
    assert up2.upscore(32, 16).offset_of(Grid()) == 27
    up_pool4 = up2.upscore(4, 2)
    assert pool3.offset_of(up_pool4) == 9
    assert up_pool4.upscore(16, 8).offset_of(Grid()) == 31


def test_our_grid_is_the_references_three_pixels_further():
    """Ours starts at the corner.

    Both put every cell at the middle of what it sees, and whole cells may be cropped.
    """
    ours, reference = (
        vgg_grids(first_padding=1, fc6_padding=3),
        vgg_grids(first_padding=100, fc6_padding=0),
    )
    for stride, mine, theirs in zip((8, 16, 32), ours, reference, strict=True):
        assert mine == Grid(stride, (stride - 1) / 2)
        assert (mine.start - theirs.start) % stride == 3
    assert ours[2].start - reference[2].start == 3


def reference_scores(network, image):
    """voc-fcn{32,16,8}s from its definition.

    100 px of padding, a valid fc6, bilinear deconvolutions, crops.
    """

    def upscore(score, stride):
        ramp = 1 - (torch.arange(2 * stride) - (stride - 0.5)).abs() / stride
        kernel = torch.outer(ramp, ramp).to(score).expand(score.shape[1], 1, -1, -1)
        return F.conv_transpose2d(score, kernel, stride=stride, groups=score.shape[1])

    def crop(x, offset, size):
        return x[..., offset : offset + size[0], offset : offset + size[1]]

    features, encoder, size = network.encoder.features, network.encoder, image.shape[-2:]
    x = F.conv2d(
        (image - encoder.mean) / encoder.std, features[0].weight, features[0].bias, padding=100
    )
    pools = []
    for layer in features[1:]:
        x = layer(x)
        pools += [x] if isinstance(layer, torch.nn.MaxPool2d) else []
    fc6, fc7 = encoder.classifier[0], encoder.classifier[3]
    score = network.score_fr(fc7(F.conv2d(x, fc6.weight, fc6.bias).relu()).relu())
    if network.output_stride == 32:
        return crop(upscore(score, 32), 19, size)
    score = upscore(score, 2)
    score = score + crop(network.score_pool4(pools[3]), 5, score.shape[-2:])
    if network.output_stride == 16:
        return crop(upscore(score, 16), 27, size)
    score = upscore(score, 2)
    return crop(
        upscore(score + crop(network.score_pool3(pools[2]), 9, score.shape[-2:]), 8), 31, size
    )


@pytest.mark.parametrize("kind", [FCN32s, FCN16s, FCN8s])
def test_scores_equal_the_references_on_the_image_three_pixels_further(kind, monkeypatch):
    network = narrow(kind, monkeypatch).double().eval()
    image = torch.rand(1, 3, 640, 640, dtype=torch.float64)
    with torch.no_grad():
        reference = reference_scores(network, image)
        ours = network(F.pad(image, (3, 0, 3, 0))[..., :640, :640])
        ours = F.interpolate(ours, (640, 640), mode="bilinear", align_corners=False)
    middle = slice(264, 376)  # out of the field of view of either border
    spread = reference[..., middle, middle].std()
    assert spread > 0
    torch.testing.assert_close(
        ours[..., 267:379, 267:379],
        reference[..., middle, middle],
        rtol=0,
        atol=1e-9 * spread.item(),
    )


@pytest.mark.parametrize(
    ("coarse", "fine", "new"),
    [
        (
            "fcn32s_vgg16",
            "fcn16s_vgg16",
            ("score_pool4.weight", "score_pool4.bias", "upscore2.weight"),
        ),
        (
            "fcn16s_vgg16",
            "fcn8s_vgg16",
            ("score_pool3.weight", "score_pool3.bias", "upscore_pool4.weight"),
        ),
    ],
)
def test_a_finer_network_starts_as_the_coarser_one(coarse, fine, new, tmp_path):
    network = build_segmentor(coarse, 3, init="random", fc_channels=8).eval()
    torch.nn.init.normal_(network.score_fr.weight)
    save_file(network.state_dict(), tmp_path / "coarse.safetensors")
    finer = build_segmentor(
        fine, 3, init=str(tmp_path / "coarse.safetensors"), fc_channels=8
    ).eval()
    assert finer.init_report.missing == new and finer.init_report.left_over == ()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = F.interpolate(
            network(image), scale_factor=2.0, mode="bilinear", align_corners=False
        )
        torch.testing.assert_close(finer(image), expected, rtol=1e-4, atol=1e-4)


def test_at_once_is_fcn8s_on_pools_scaled_down(monkeypatch):
    at_once = narrow(FCN8sAtOnce, monkeypatch).eval()
    plain = narrow(FCN8s, monkeypatch).eval()
    plain.load_state_dict(at_once.state_dict())
    plain.score_pool4.weight.data *= 0.01
    plain.score_pool3.weight.data *= 0.0001
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(at_once(image), plain(image))


@pytest.mark.parametrize("kind", [FCN32s, FCN16s, FCN8s, FCN8sAtOnce])
def test_cross_entropy_on_a_sigmoid_head_is_binary_cross_entropy(kind, monkeypatch):
    network = narrow(kind, monkeypatch, binary_head="sigmoid").double().eval()
    image = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    logits = network(image)
    label = torch.randint(2, (2, *logits.shape[-2:]))
    assert logits.shape[1] == network.num_classes == 2 and network.score_fr.out_channels == 1
    score = logits[:, 1]
    torch.testing.assert_close(logits.softmax(1)[:, 1], score.sigmoid())
    losses = (
        F.cross_entropy(logits, label),
        F.binary_cross_entropy_with_logits(score, label.double()),
    )
    torch.testing.assert_close(*losses)
    grads = [
        torch.autograd.grad(loss, list(network.parameters()), retain_graph=True) for loss in losses
    ]
    assert all(grad.any() for grad in grads[0])
    torch.testing.assert_close(*grads)


def test_a_sigmoid_head_is_for_two_classes():
    with pytest.raises(InputError, match=r"binary_head=sigmoid for 3 classes(.|\n)*two_classes"):
        build_segmentor("fcn8s_vgg16", 3, init="random", binary_head="sigmoid")
    with pytest.raises(InputError, match="two_classes, sigmoid"):
        build_segmentor("fcn8s_vgg16", 2, init="random", binary_head="softmax")


@pytest.mark.parametrize("kind", [FCN32s, FCN16s, FCN8s, FCN8sAtOnce])
@pytest.mark.parametrize("binary_head", ["two_classes", "sigmoid"])
def test_training_from_zero_scores_reaches_every_tensor(kind, binary_head, monkeypatch):
    torch.manual_seed(0)
    network = narrow(kind, monkeypatch, binary_head=binary_head).train()
    for name in ("score_fr", "score_pool4", "score_pool3"):
        if hasattr(network, name):
            (
                torch.nn.init.zeros_(getattr(network, name).weight),
                torch.nn.init.zeros_(getattr(network, name).bias),
            )
    before = {key: parameter.detach().clone() for key, parameter in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    image = torch.rand(2, 3, 64, 64)
    label = (image.mean(1) > 0.5).long()[:, :: kind.output_stride, :: kind.output_stride]
    for _ in range(4):  # the scores move first, then what is before them
        optimizer.zero_grad()
        F.cross_entropy(network(image), label).backward()
        optimizer.step()
    for key, parameter in network.named_parameters():
        assert torch.isfinite(parameter).all() and not torch.equal(parameter, before[key]), key
