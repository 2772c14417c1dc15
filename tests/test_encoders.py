"""Mix transformers and ConvNeXt, SegFormer's head and UPerNet's.

Published sizes and keys, formulas and transformers' networks, files of other libraries, learning,
and export.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from distseg.config.schema import OptimizerConfig
from distseg.export import formats
from distseg.export.formats import describe
from distseg.models import build_segmentor
from distseg.models.composed import Composed
from distseg.models.encoders import ENCODERS, convnext, mit
from distseg.models.encoders.convnext import ConvNeXt
from distseg.models.encoders.mit import MixTransformer
from distseg.models.heads.segformer import SegFormer
from distseg.models.heads.upernet import BINS, Bins, UPerNet
from distseg.models.levels import Level
from distseg.parallel.optimizers import parameter_groups
from shards.errors import InputError

# with all that the large ones have: several blocks, heads and strides
MIT = mit.Size((16, 32, 40, 64), (1, 2, 1, 1))
CONVNEXT = convnext.Size((8, 16, 24, 32), (1, 2, 1, 1), 0.4, "none.pth")
HEAD = {"channels": 24}
NAMES = ["segformer_mitb0", "upernet_mitb0", "segformer_convnext_tiny", "upernet_convnext_tiny"]
SIZES = [(64, 96), (65, 97), (131, 70)]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """mitb0 and convnext_tiny with few channels, by their names."""
    for name, size in (("mitb0", MIT), ("convnext_tiny", CONVNEXT)):
        monkeypatch.setitem(ENCODERS, name, replace(ENCODERS[name], size={"size": size}))
    yield


def lively(network: nn.Module) -> nn.Module:
    """Float64, in evaluation, with every weight, scale and statistic of a size that matters."""
    torch.manual_seed(0)
    network = network.double().eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return network


def image(size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.manual_seed(seed), dtype=torch.float64)


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# with 150 classes: those of transformers 5.24 for these sizes, in millions the paper's 3.8, 13.7,
# 27.5, 47.3, 64.1 and 84.7 (Xie et al. 2021, table 1)
SEGFORMERS = {
    "mitb0": 3_752_694,
    "mitb1": 13_715_798,
    "mitb2": 27_461_974,
    "mitb3": 47_337_814,
    "mitb4": 64_108_374,
    "mitb5": 84_708_694,
}
# torchvision's `num_params` of the classification networks, and those of UPerNet in transformers
CONVNEXTS = {
    "convnext_tiny": (28_589_128, 59_318_838),
    "convnext_small": (50_223_688, 80_953_398),
    "convnext_base": (88_591_464, 120_884_246),
}


@pytest.fixture(scope="module")
def published() -> dict[str, Composed]:
    """Each encoder with the head that it was published with, without memory."""
    with pytest.MonkeyPatch.context() as patched, torch.device("meta"):
        # first values take longer than all else here, and there are none
        for draw in ("trunc_normal_", "normal_", "kaiming_normal_", "kaiming_uniform_"):
            patched.setattr(nn.init, draw, lambda tensor, *_, **__: tensor)
        names = [f"segformer_{name}" for name in SEGFORMERS]
        names += [f"upernet_{name}" for name in CONVNEXTS]
        return {
            name.partition("_")[2]: build_segmentor(name, 150, init="random").eval()
            for name in names
        }


def test_segformers_have_the_published_parameters(published: dict[str, Composed]) -> None:
    assert {name: num_parameters(published[name]) for name in SEGFORMERS} == SEGFORMERS
    assert set(SEGFORMERS) == set(mit.SIZES) and set(CONVNEXTS) == set(convnext.SIZES)


def test_convnexts_have_torchvisions_parameters(published: dict[str, Composed]) -> None:
    for name, (classifier, whole) in CONVNEXTS.items():
        assert num_parameters(published[name]) == whole
        encoder = published[name].encoder
        last = encoder.levels[-1].channels
        # those have a last norm and 1,000 scores; these a norm for each map
        without = classifier - 2 * last - 1000 * (last + 1)
        norms = sum(2 * level.channels for level in encoder.levels)
        assert num_parameters(encoder) == without + norms


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("mitb0", (32, 64, 160, 256)),
        ("mitb1", (64, 128, 320, 512)),
        ("convnext_tiny", (96, 192, 384, 768)),
    ],
)
def test_maps_have_the_published_shapes(
    name: str, channels: tuple[int, ...], published: dict[str, Composed]
) -> None:
    image = torch.empty(1, 3, 512, 512, device="meta")
    maps = published[name].encoder(image)
    grids = zip(channels, (128, 64, 32, 16), strict=True)
    assert [tuple(x.shape) for x in maps] == [(1, c, side, side) for c, side in grids]
    assert [x.shape[1] for x in maps] == [
        level.channels for level in published[name].encoder.levels
    ]
    assert published[name].head(maps).shape == (1, 150, 128, 128)


def mit_keys(channels: tuple[int, ...], depths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the authors' mix_transformer.py."""
    keys: dict[str, tuple[int, ...]] = {}
    before = 3
    for s, (c, depth, ratio) in enumerate(zip(channels, depths, (8, 4, 2, 1), strict=True), 1):
        kernel = 7 if s == 1 else 3
        keys[f"patch_embed{s}.proj.weight"] = (c, before, kernel, kernel)
        names = [f"patch_embed{s}.proj.bias", f"patch_embed{s}.norm.weight"]
        names += [f"patch_embed{s}.norm.bias", f"norm{s}.weight", f"norm{s}.bias"]
        for i in range(depth):
            block = f"block{s}.{i}"
            shapes = {"attn.q": (c, c), "attn.kv": (2 * c, c), "attn.proj": (c, c)}
            shapes |= {"mlp.fc1": (4 * c, c), "mlp.dwconv.dwconv": (4 * c, 1, 3, 3)}
            shapes["mlp.fc2"] = (c, 4 * c)
            norms = ["norm1", "norm2"]
            if ratio > 1:
                shapes["attn.sr"] = (c, c, ratio, ratio)
                norms.append("attn.norm")
            for layer, shape in shapes.items():
                keys[f"{block}.{layer}.weight"] = shape
                keys[f"{block}.{layer}.bias"] = shape[:1]
            names += [f"{block}.{norm}.{part}" for norm in norms for part in ("weight", "bias")]
        keys |= dict.fromkeys(names, (c,))
        before = c
    return keys


def convnext_keys(channels: tuple[int, ...], depths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's convnext.py under `features`."""
    keys: dict[str, tuple[int, ...]] = {}
    before = 3
    for s, (c, depth) in enumerate(zip(channels, depths, strict=True)):
        conv, norm = (0, 1) if s == 0 else (1, 0)
        kernel = 4 if s == 0 else 2
        keys[f"features.{2 * s}.{conv}.weight"] = (c, before, kernel, kernel)
        keys[f"features.{2 * s}.{conv}.bias"] = (c,)
        of_norm = (c if s == 0 else before,)
        keys |= {f"features.{2 * s}.{norm}.{part}": of_norm for part in ("weight", "bias")}
        for i in range(depth):
            block = f"features.{2 * s + 1}.{i}"
            keys[f"{block}.layer_scale"] = (c, 1, 1)
            shapes = {0: (c, 1, 7, 7), 2: (c,), 3: (4 * c, c), 5: (c, 4 * c)}
            for place, shape in shapes.items():
                keys[f"{block}.block.{place}.weight"] = shape
                keys[f"{block}.block.{place}.bias"] = shape[:1]
        before = c
    return keys


@pytest.mark.parametrize("name", [*mit.SIZES, *convnext.SIZES])
def test_keys_are_the_published_ones(name: str, published: dict[str, Composed]) -> None:
    state = published[name].encoder.state_dict()
    own = {key: tuple(value.shape) for key, value in state.items()}
    size = (mit.SIZES | convnext.SIZES)[name]
    if name in mit.SIZES:
        assert own == mit_keys(size.channels, size.depths)
        return
    norms = {f"norm{s}.{part}": (c,) for s, c in enumerate(size.channels) for part in WEIGHT_BIAS}
    assert own == convnext_keys(size.channels, size.depths) | norms


WEIGHT_BIAS = ("weight", "bias")


def test_keys_of_the_heads_are_the_published_ones() -> None:
    levels = [Level(4, 4), Level(6, 8), Level(8, 16), Level(10, 32)]
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    of_segformer = {f"linear_c{i}.proj.{part}" for i in (1, 2, 3, 4) for part in WEIGHT_BIAS}
    of_segformer |= {"linear_fuse.conv.weight", *(f"linear_fuse.bn.{part}" for part in norm)}
    of_segformer |= {"linear_pred.weight", "linear_pred.bias"}
    assert set(SegFormer(levels, 3, channels=8).state_dict()) == of_segformer
    modules = {f"psp_modules.{i}.1" for i in range(4)} | {"bottleneck", "fpn_bottleneck"}
    modules |= {f"{kind}_convs.{i}" for kind in ("lateral", "fpn") for i in range(3)}
    of_upernet = {f"{module}.conv.weight" for module in modules}
    of_upernet |= {f"{module}.bn.{part}" for module in modules for part in norm}
    head = UPerNet(levels, 3, channels=8)
    assert set(head.state_dict()) == of_upernet | {"conv_seg.weight", "conv_seg.bias"}
    assert head.bottleneck.conv.weight.shape == (8, 10 + 4 * 8, 3, 3)
    assert head.fpn_bottleneck.conv.weight.shape == (8, 4 * 8, 3, 3)


def plain_norm(x: Tensor, state: dict[str, Tensor], key: str, epsilon: float) -> Tensor:
    """Layer normalisation of x (N, C, ...) by its formula."""
    shape = [1, -1] + [1] * (x.ndim - 2)
    x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + epsilon).sqrt()
    return x * state[f"{key}.weight"].view(shape) + state[f"{key}.bias"].view(shape)


def plain_linear(x: Tensor, state: dict[str, Tensor], key: str) -> Tensor:
    """Of every pixel's channels, (N, C, h, w)."""
    y = torch.einsum("oc,nchw->nohw", state[f"{key}.weight"], x)
    return y + state[f"{key}.bias"].view(1, -1, 1, 1)


def plain_conv(
    x: Tensor, state: dict[str, Tensor], key: str, stride: int, padding: int, groups: int = 1
) -> Tensor:
    weight, bias = state[f"{key}.weight"], state[f"{key}.bias"]
    return F.conv2d(x, weight, bias, stride, padding, groups=groups)


def normalised(x: Tensor) -> Tensor:
    # as float32 has them, as buffers of a network do
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).to(x.dtype)
    return (x - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1)


def plain_mit(state: dict[str, Tensor], x: Tensor, size: mit.Size) -> list[Tensor]:
    """Xie et al. 2021, section 3.1, as formulas on a state dict, channels first."""
    x, maps = normalised(x), []
    heads_and_ratios = zip(size.depths, (1, 2, 5, 8), (8, 4, 2, 1), strict=True)
    for stage, (depth, num_heads, ratio) in enumerate(heads_and_ratios, start=1):
        patches = f"patch_embed{stage}"
        stride, padding = (4, 3) if stage == 1 else (2, 1)
        x = plain_conv(x, state, f"{patches}.proj", stride, padding)
        x = plain_norm(x, state, f"{patches}.norm", 1e-5)
        for index in range(depth):
            block = f"block{stage}.{index}"
            y = plain_norm(x, state, f"{block}.norm1", 1e-6)
            seen = y
            if ratio > 1:
                seen = plain_conv(y, state, f"{block}.attn.sr", ratio, 0)
                seen = plain_norm(seen, state, f"{block}.attn.norm", 1e-5)
            query = plain_linear(y, state, f"{block}.attn.q").flatten(2)
            key, value = plain_linear(seen, state, f"{block}.attn.kv").flatten(2).chunk(2, 1)
            seen = []
            heads = (each.chunk(num_heads, 1) for each in (query, key, value))
            for q, k, v in zip(*heads, strict=True):
                weights = torch.einsum("ndi,ndj->nij", q, k) / q.shape[1] ** 0.5
                weights = weights.exp() / weights.exp().sum(2, keepdim=True)
                seen.append(torch.einsum("nij,ndj->ndi", weights, v))
            y = torch.cat(seen, 1).view_as(x)
            x = x + plain_linear(y, state, f"{block}.attn.proj")
            y = plain_linear(
                plain_norm(x, state, f"{block}.norm2", 1e-6), state, f"{block}.mlp.fc1"
            )
            y = plain_conv(y, state, f"{block}.mlp.dwconv.dwconv", 1, 1, groups=y.shape[1])
            x = x + plain_linear(plain_gelu(y), state, f"{block}.mlp.fc2")
        x = plain_norm(x, state, f"norm{stage}", 1e-6)
        maps.append(x)
    return maps


def plain_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def plain_convnext(state: dict[str, Tensor], x: Tensor, size: convnext.Size) -> list[Tensor]:
    """Liu et al. 2022, figure 4, as formulas on a state dict, channels first."""
    x, maps = normalised(x), []
    for stage, depth in enumerate(size.depths):
        before = f"features.{2 * stage}"
        if stage == 0:
            x = plain_norm(plain_conv(x, state, f"{before}.0", 4, 0), state, f"{before}.1", 1e-6)
        else:
            x = plain_conv(plain_norm(x, state, f"{before}.0", 1e-6), state, f"{before}.1", 2, 0)
        for index in range(depth):
            block = f"features.{2 * stage + 1}.{index}"
            y = plain_conv(x, state, f"{block}.block.0", 1, 3, groups=x.shape[1])
            y = plain_linear(
                plain_norm(y, state, f"{block}.block.2", 1e-6), state, f"{block}.block.3"
            )
            y = plain_linear(plain_gelu(y), state, f"{block}.block.5")
            x = x + state[f"{block}.layer_scale"] * y
        maps.append(plain_norm(x, state, f"norm{stage}", 1e-6))
    return maps


@pytest.mark.parametrize("size", SIZES)
def test_a_mix_transformer_equals_the_formulas(size: tuple[int, int]) -> None:
    encoder = lively(MixTransformer(size=MIT))
    maps = encoder(image(size))
    plain = plain_mit(encoder.state_dict(), image(size), MIT)
    for stride, x, y in zip(mit.STRIDES, maps, plain, strict=True):
        assert x.shape[2:] == tuple(-(-side // stride) for side in size) and y.std() > 0.5
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_a_convnext_equals_the_formulas(size: tuple[int, int]) -> None:
    encoder = lively(ConvNeXt(size=CONVNEXT))
    maps = encoder(image(size))
    plain = plain_convnext(encoder.state_dict(), image(size), CONVNEXT)
    for stride, x, y in zip(convnext.STRIDES, maps, plain, strict=True):
        assert x.shape[2:] == tuple(side // stride for side in size) and y.std() > 0.5
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def batch_norm_relu(x: Tensor, state: dict[str, Tensor], key: str) -> Tensor:
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, scale, shift = (state[f"{key}.bn.{name}"].view(1, -1, 1, 1) for name in names)
    return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)


def resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def random_maps(levels: list[Level], height: int, width: int) -> list[Tensor]:
    generator = torch.manual_seed(3)
    return [
        torch.randn(
            2, c, height // s, width // s, generator=generator, dtype=torch.float64
        ).requires_grad_()
        for c, s in levels
    ]


LEVELS = [Level(6, 4), Level(8, 8), Level(10, 16), Level(12, 32)]


def test_segformers_head_equals_the_published_order_gradients_too() -> None:
    """Project, upsample, join, mix: Xie et al. 2021, equation 4."""
    head = lively(SegFormer(LEVELS, 3, **HEAD)).requires_grad_(True)
    state, maps = dict(head.named_parameters()) | dict(head.named_buffers()), None
    answers = []
    for is_plain in (False, True):
        maps = random_maps(LEVELS, 96, 160)
        if is_plain:
            projected = [
                plain_linear(x, state, f"linear_c{i}.proj") for i, x in enumerate(maps, start=1)
            ]
            x = torch.cat([resized(y, maps[0]) for y in reversed(projected)], 1)
            x = F.conv2d(x, state["linear_fuse.conv.weight"])
            x = batch_norm_relu(x, state, "linear_fuse")
            logits = F.conv2d(x, state["linear_pred.weight"], state["linear_pred.bias"])
        else:
            logits = head(maps)
        assert logits.shape == (2, 3, 24, 40) and logits.std() > 0.1
        loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
        answers.append([logits, *torch.autograd.grad(loss, [*maps, *head.parameters()])])
    for ours, plain in zip(*answers, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_segformers_gradients_lie_in_memory_as_the_weights(layout: torch.memory_format) -> None:
    """Or DDP copies them, and warns."""
    head = SegFormer(LEVELS, 3, **HEAD).to(memory_format=layout)  # type: ignore[call-overload]
    head([x.detach().float() for x in random_maps(LEVELS, 64, 96)]).sum().backward()
    for parameter in head.parameters():
        assert parameter.grad is not None and parameter.grad.stride() == parameter.stride()


def test_upernets_head_equals_the_formulas() -> None:
    head = lively(UPerNet(LEVELS, 3, **HEAD))
    state, maps = head.state_dict(), random_maps(LEVELS, 128, 224)

    def layer(x: Tensor, key: str) -> Tensor:
        weight = state[f"{key}.conv.weight"]
        return batch_norm_relu(F.conv2d(x, weight, padding=weight.shape[-1] // 2), state, key)

    pooled = [
        resized(layer(F.adaptive_avg_pool2d(maps[-1], bins), f"psp_modules.{i}.1"), maps[-1])
        for i, bins in enumerate(BINS)
    ]
    top_down = [layer(torch.cat([maps[-1], *pooled], 1), "bottleneck")]
    for i in (2, 1, 0):
        lateral = layer(maps[i], f"lateral_convs.{i}")
        top_down.insert(0, lateral + resized(top_down[0], lateral))
    joined = [layer(x, f"fpn_convs.{i}") for i, x in enumerate(top_down[:3])] + [top_down[3]]
    x = layer(torch.cat([resized(y, joined[0]) for y in joined], 1), "fpn_bottleneck")
    expected = F.conv2d(x, state["conv_seg.weight"], state["conv_seg.bias"])
    logits = head(maps)
    assert logits.shape == (2, 3, 32, 56) and logits.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(1, 1), (4, 7), (5, 6), (13, 12)])
def test_means_over_bins_are_torchs(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    for bins in BINS:
        torch.testing.assert_close(Bins(bins)(x), F.adaptive_avg_pool2d(x, bins))


def test_a_single_image_of_upernet_needs_other_statistics(narrow: None) -> None:
    network = build_segmentor("upernet_convnext_tiny", 3, init="random", **HEAD).train()
    with pytest.raises(InputError, match=r"one image for a rank(.|\n)*batch_norm=synchronised"):
        network(torch.rand(1, 3, 64, 64))
    network.eval()(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (113, 90)])
def test_logits_come_at_a_quarter_rounded_up(
    name: str, size: tuple[int, int], narrow: None
) -> None:
    network = build_segmentor(name, 3, init="random", **HEAD).eval()
    with torch.no_grad():
        assert network(torch.rand(2, 3, *size)).shape == (2, 3, *(-(-side // 4) for side in size))


def test_an_encoder_in_stages_gives_what_a_head_asks_for(narrow: None) -> None:
    """A norm whose map nobody looks at would get no gradient, and ranks would wait for it."""
    for encoder in ("mitb0", "convnext_tiny"):
        network = build_segmentor(f"linear_{encoder}", 3, init="random").train()
        network(torch.rand(2, 3, 64, 64)).sum().backward()
        assert all(p.grad is not None for p in network.parameters())
    two = ConvNeXt(size=CONVNEXT, layers=[0, 2])
    assert two.levels == (Level(8, 4), Level(24, 16)) and len(two.features) == 6
    for layers in ("first", [4], [2, 1], []):
        with pytest.raises(InputError, match=r"options\.layers"):
            ConvNeXt(size=CONVNEXT, layers=layers)


def test_layers_are_numbered_from_the_head_to_the_image() -> None:
    for encoder, first, last in (
        (MixTransformer(size=MIT), "patch_embed1.proj.weight", "norm4.weight"),
        (ConvNeXt(size=CONVNEXT), "features.0.0.weight", "norm3.bias"),
    ):
        numbers = {name: encoder.layers_above(name) for name, _ in encoder.named_parameters()}
        assert numbers[first] == 6 == max(numbers.values()) and numbers[last] == 0
        assert set(numbers.values()) == set(range(7))
    assert encoder.layers_above("features.7.0.layer_scale") == 1
    assert encoder.layers_above("features.3.0.block.3.weight") == 4
    assert encoder.layers_above("features.2.1.weight") == 4  # beside the block that follows
    assert encoder.layers_above("norm0.weight") == 4
    mixed = MixTransformer(size=MIT)
    assert mixed.layers_above("block2.1.attn.q.weight") == 3
    assert mixed.layers_above("patch_embed4.norm.bias") == mixed.layers_above("norm3.bias") == 1


def test_scales_of_channels_are_not_decayed(narrow: None) -> None:
    """ConvNeXt's are (C, 1, 1), as torchvision has them, and still no weights."""
    network = build_segmentor("upernet_convnext_tiny", 1, init="random", **HEAD)
    groups = parameter_groups(network, OptimizerConfig(weight_decay=0.05))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in network.named_parameters():
        is_weight = name.endswith("weight") and parameter.ndim > 1
        assert (id(parameter) in decayed) == is_weight, name


def test_stochastic_depth_rises_from_the_image_to_the_head(published: dict[str, Composed]) -> None:
    mixed = MixTransformer(size=MIT, drop_path=0.4)
    rates = [block.drop_path for stage in (1, 2, 3, 4) for block in getattr(mixed, f"block{stage}")]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    blocks = [block for stage in ConvNeXt(size=CONVNEXT).features[1::2] for block in stage]
    assert [block.drop_path for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert published["convnext_small"].encoder.features[7][2].drop_path == 0.3


# what others call the parts of a block, of the patches before it and of the norm after
MIT_LAYOUTS = {
    "transformers": {
        "patch_embed{}.proj": "segformer.encoder.patch_embeddings.{}.proj",
        "patch_embed{}.norm": "segformer.encoder.patch_embeddings.{}.layer_norm",
        "norm{}": "segformer.encoder.layer_norm.{}",
        "block{}.": "segformer.encoder.block.{}.",
        "norm1": "layer_norm_1",
        "norm2": "layer_norm_2",
        "attn.q": "attention.self.query",
        "attn.k": "attention.self.key",
        "attn.v": "attention.self.value",
        "attn.sr": "attention.self.sr",
        "attn.norm": "attention.self.layer_norm",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "mlp.dense1",
        "mlp.fc2": "mlp.dense2",
        "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
    },
    "mmsegmentation": {
        "patch_embed{}.proj": "layers.{}.0.projection",
        "patch_embed{}.norm": "layers.{}.0.norm",
        "norm{}": "layers.{}.2",
        "block{}.": "layers.{}.1.",
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.sr": "attn.sr",
        "attn.norm": "attn.norm",
        "attn.proj": "attn.attn.out_proj",
        "mlp.fc1": "ffn.layers.0",
        "mlp.fc2": "ffn.layers.4",
        "mlp.dwconv.dwconv": "ffn.layers.1",
    },
}


def foreign_mit(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The state dict of a mix transformer as another library has it."""
    names, found = MIT_LAYOUTS[layout], {}
    for key, tensor in state.items():
        part, _, last = key.rpartition(".")
        stage = int(re.search(r"\d", part)[0])  # type: ignore[index]
        if not part.startswith("block"):
            found[f"{names[part.replace(str(stage), '{}')].format(stage - 1)}.{last}"] = tensor
            continue
        _, index, inside = part.split(".", 2)
        block = names["block{}."].format(stage - 1) + f"{index}."
        if inside == "attn.q" and layout == "mmsegmentation":
            both = [tensor, state[key.replace(".q.", ".kv.")]]
            found[f"{block}attn.attn.in_proj_{last}"] = torch.cat(both)
        elif inside == "attn.kv" and layout == "transformers":
            for name, rows in zip("kv", tensor.chunk(2), strict=True):
                found[f"{block}{names[f'attn.{name}']}.{last}"] = rows.contiguous()
        elif inside in names:
            is_1x1 = layout == "mmsegmentation" and ".fc" in inside and last == "weight"
            found[f"{block}{names[inside]}.{last}"] = tensor[..., None, None] if is_1x1 else tensor
    return found


# stage, index within it, and the parts of a block in torchvision's order: 0, 2, 3, 5
CONVNEXT_LAYOUTS = {
    "authors": ("downsample_layers.{}", "stages.{}.{}", "dwconv norm pwconv1 pwconv2 gamma"),
    "timm": (
        "stages.{}.downsample",
        "stages.{}.blocks.{}",
        "conv_dw norm mlp.fc1 mlp.fc2 gamma",
    ),
    "transformers": (
        "convnext.encoder.stages.{}.downsampling_layer",
        "convnext.encoder.stages.{}.layers.{}",
        "dwconv layernorm pwconv1 pwconv2 layer_scale_parameter",
    ),
    "mmpretrain": (
        "backbone.downsample_layers.{}",
        "backbone.stages.{}.{}",
        "depthwise_conv norm pointwise_conv1 pointwise_conv2 gamma",
    ),
}
STEMS = {
    "timm": {"0": "stem.0", "1": "stem.1"},
    "transformers": {
        "0": "convnext.embeddings.patch_embeddings",
        "1": "convnext.embeddings.layernorm",
    },
}


def foreign_convnext(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The state dict of a ConvNeXt, without the norms of its maps, as another library has it."""
    reduction, block, names = CONVNEXT_LAYOUTS[layout]
    parts = dict(zip(("0", "2", "3", "5", "layer_scale"), names.split(), strict=True))
    found = {}
    for key, tensor in state.items():
        if key.startswith("norm"):
            continue
        _, feature, index, *rest = key.split(".")
        stage = int(feature) // 2
        if int(feature) % 2:
            start = block.format(stage, index)
            if rest == ["layer_scale"]:
                found[f"{start}.{parts['layer_scale']}"] = tensor.flatten()
            else:
                found[f"{start}.{parts[rest[1]]}.{rest[2]}"] = tensor
        elif stage == 0 and layout in STEMS:
            found[f"{STEMS[layout][index]}.{rest[0]}"] = tensor
        else:
            found[f"{reduction.format(stage)}.{index}.{rest[0]}"] = tensor
    return found


def foreign_head(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """SegFormer's head as its authors' files and transformers' have it, with what is more there."""
    found = {f"decode_head.{key}": tensor for key, tensor in state.items()}
    if layout == "authors":
        return found | {"decode_head.conv_seg.weight": torch.zeros(3, 8, 1, 1)}
    for own, other in (
        ("linear_fuse.conv", "linear_fuse"),
        ("linear_fuse.bn", "batch_norm"),
        ("linear_pred", "classifier"),
        *((f"linear_c{i + 1}", f"linear_c.{i}") for i in range(4)),
    ):
        found = {key.replace(own, other): tensor for key, tensor in found.items()}
    return found


def same(network: nn.Module, other: nn.Module, but: str = "nothing") -> bool:
    own = network.state_dict()
    return all(
        torch.equal(tensor, own[key])
        for key, tensor in other.state_dict().items()
        if not re.search(but, key)
    )


@pytest.mark.parametrize("layout", ["authors", "transformers", "mmsegmentation"])
def test_files_of_mix_transformers_load(layout: str, narrow: None, tmp_path: Path) -> None:
    network = build_segmentor("segformer_mitb0", 3, init="random", **HEAD)
    state = network.encoder.state_dict()
    classifier = {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}
    content = (state if layout == "authors" else foreign_mit(state, layout)) | classifier
    torch.save({"state_dict": content}, tmp_path / "encoder.pth")
    loaded = build_segmentor("segformer_mitb0", 3, init=str(tmp_path / "encoder.pth"), **HEAD)
    assert same(loaded.encoder, network.encoder)
    assert loaded.init_report.missing == () and set(loaded.init_report.left_over) == set(classifier)


@pytest.mark.parametrize("layout", ["authors", "transformers"])
def test_files_of_segformer_load_whole(layout: str, narrow: None, tmp_path: Path) -> None:
    network = build_segmentor("segformer_mitb0", 3, init="random", **HEAD)
    encoder = network.encoder.state_dict()
    if layout == "authors":
        encoder = {f"backbone.{key}": tensor for key, tensor in encoder.items()}
    else:
        encoder = foreign_mit(encoder, layout)
    content = encoder | foreign_head(network.head.state_dict(), layout)
    save_file(content, tmp_path / "segformer.safetensors")
    init = {"init": str(tmp_path / "segformer.safetensors")}
    loaded = build_segmentor("segformer_mitb0", 3, **init, **HEAD)
    assert same(loaded, network) and loaded.init_report.missing == ()
    left_over = ("head.conv_seg.weight",) if layout == "authors" else ()
    assert loaded.init_report.left_over == left_over
    five = build_segmentor("segformer_mitb0", 5, **init, **HEAD)
    assert same(five, network, but="linear_pred")
    assert five.init_report.renewed == ("head.linear_pred.weight", "head.linear_pred.bias")


@pytest.mark.parametrize("layout", ["torchvision", *CONVNEXT_LAYOUTS])
def test_files_of_convnext_load(layout: str, narrow: None, tmp_path: Path) -> None:
    network = build_segmentor("upernet_convnext_tiny", 3, init="random", **HEAD)
    state = network.encoder.state_dict()
    content = state if layout == "torchvision" else foreign_convnext(state, layout)
    content = {key: tensor for key, tensor in content.items() if not key.startswith("norm")}
    classifier = {"classifier.2.weight": torch.zeros(1000, 32)}
    save_file(content | classifier, tmp_path / "encoder.safetensors")
    init = str(tmp_path / "encoder.safetensors")
    loaded = build_segmentor("upernet_convnext_tiny", 3, init=init, **HEAD)
    assert same(loaded.encoder, network.encoder)
    # no classification file has the norms of the maps
    assert all(key.startswith("norm") for key in loaded.init_report.missing)
    assert len(loaded.init_report.missing) == 8
    assert loaded.init_report.left_over == tuple(classifier)


def test_a_file_of_upernet_loads_whole(narrow: None, tmp_path: Path) -> None:
    network = build_segmentor("upernet_convnext_tiny", 3, init="random", **HEAD)
    encoder, head = network.encoder.state_dict(), network.head.state_dict()
    norms = {f"backbone.{key}": encoder[key] for key in encoder if key.startswith("norm")}
    content = foreign_convnext(encoder, "mmpretrain") | norms
    content |= {f"decode_head.{key}": tensor for key, tensor in head.items()}
    torch.save({"state_dict": content}, tmp_path / "mmsegmentation.pth")
    init = str(tmp_path / "mmsegmentation.pth")
    loaded = build_segmentor("upernet_convnext_tiny", 3, init=init, **HEAD)
    assert (
        same(loaded, network) and loaded.init_report.missing == loaded.init_report.left_over == ()
    )


def test_absent_weights_tell_where_they_are_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"mit_b2\.pth or mit_b2_\w+-66e8bf70\.pth(.|\n)*NVlabs"):
        build_segmentor("segformer_mitb2", 3)
    with pytest.raises(InputError, match=r"convnext_small-0c510722\.pth of .*pytorch\.org"):
        build_segmentor("upernet_convnext_small", 3)


def test_imagenet_weights_are_found_where_torchvision_puts_them(
    narrow: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name, file in (
        ("segformer_mitb0", "mit_b0_20220624-7e0fe6dd.pth"),
        ("upernet_convnext_tiny", "convnext_tiny-983f1562.pth"),
    ):
        network = build_segmentor(name, 3, init="random", **HEAD)
        torch.save(network.encoder.state_dict(), folder / file)
        assert same(build_segmentor(name, 3, **HEAD).encoder, network.encoder)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_learns_images_by_heart(name: str, narrow: None) -> None:
    torch.manual_seed(0)
    network = build_segmentor(name, 3, init="random", drop_path=0.1, **HEAD).train()
    # four squares on each image, in a colour of their class
    label = torch.randint(3, (4, 2, 2)).repeat_interleave(32, 1).repeat_interleave(32, 2)
    pixels = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.2], [0.2, 0.1, 0.9]])[label]
    pixels = pixels.permute(0, 3, 1, 2) + 0.05 * torch.randn(4, 3, 64, 64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(network(pixels), label[:, 2::4, 2::4])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9 and losses[-1] < 0.25


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param("segformer_mitb0", "torch-export", marks=pytest.mark.slow),
        pytest.param("segformer_mitb0", "onnx", marks=pytest.mark.slow),
        pytest.param("upernet_convnext_tiny", "torch-export", marks=pytest.mark.slow),
        pytest.param("upernet_convnext_tiny", "onnx", marks=pytest.mark.slow),
    ],
)
def test_an_exported_network_gives_the_same_logits_at_any_size(
    name: str, form: str, narrow: None, tmp_path: Path
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")
    network = lively(build_segmentor(name, 3, init="random", **HEAD)).float()
    with torch.no_grad():
        assert network(torch.rand(1, 3, 97, 131)).std() > 0.1
    about = describe(name, HEAD, ["a", "b", "c"], [[0, 0, 0]] * 3)
    # it compares at other sizes than the one of export
    assert formats.export(network, about, form, tmp_path / "model") <= 1e-4


def reference(kind: str, tmp_path: Path) -> Any:
    """transformers' network with random weights, and the file that it saves."""
    transformers = pytest.importorskip("transformers")
    if kind == "segformer":
        sizes = {"hidden_sizes": list(MIT.channels), "depths": list(MIT.depths)}
        config = transformers.SegformerConfig(
            **sizes, num_attention_heads=[1, 2, 5, 8], decoder_hidden_size=24, num_labels=3
        )
        network = transformers.SegformerForSemanticSegmentation(config)
    else:
        sizes = {"hidden_sizes": list(CONVNEXT.channels), "depths": list(CONVNEXT.depths)}
        backbone = transformers.ConvNextConfig(
            **sizes, out_indices=[1, 2, 3, 4], layer_scale_init_value=0.3
        )
        config = transformers.UperNetConfig(
            backbone_config=backbone, hidden_size=24, num_labels=3, use_auxiliary_head=False
        )
        network = transformers.UperNetForSemanticSegmentation(config)
    # numbers that float32 has, so that the file says all of them
    network = lively(network).float()
    network.save_pretrained(tmp_path)
    return network.double(), str(tmp_path / "model.safetensors")


def test_a_segformer_equals_transformers(narrow: None, tmp_path: Path) -> None:
    network, file = reference("segformer", tmp_path)
    own = build_segmentor("segformer_mitb0", 3, init=file, **HEAD).double().eval()
    assert own.init_report.missing == own.init_report.left_over == ()
    for name, module in network.named_modules():
        # its norms have 1e-5 everywhere, the authors' 1e-6 in and behind blocks
        if re.search(r"layernorm_(before|after)$|stages\.\d\.layer_norm$", name):
            module.eps = 1e-6
    for size in SIZES:
        x = normalised(image(size))
        with torch.no_grad():
            maps = own.encoder(image(size))
            answers = [*maps, own.head(maps)]
            of_reference = network.segformer(x, output_hidden_states=True).hidden_states
            expected = [*of_reference, network(x).logits]
        for ours, theirs in zip(answers, expected, strict=True):
            assert theirs.std() > 0.01
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_an_upernet_on_convnext_equals_transformers(narrow: None, tmp_path: Path) -> None:
    network, file = reference("upernet", tmp_path)
    own = build_segmentor("upernet_convnext_tiny", 3, init=file, **HEAD).double().eval()
    assert own.init_report.missing == own.init_report.left_over == ()
    for size in SIZES:
        with torch.no_grad():
            maps = own.encoder(image(size))
            expected = network.backbone(normalised(image(size))).feature_maps
            logits = network.decode_head(expected)
        for ours, theirs in zip([*maps, own.head(maps)], [*expected, logits], strict=True):
            assert theirs.std() > 0.01
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
