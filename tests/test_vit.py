"""Vision transformers: DINOv2's and DINOv3's as their formulas and as transformers computes them,
their files, the heads on them, and what makes them train.
"""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from distseg.catalogue.parts import measure_encoder, measure_head
from distseg.catalogue.run import measure_segmentor
from distseg.distributed.ranks import Ranks
from distseg.models import COMPOSITIONS, ENCODERS, HEADS, build_segmentor
from distseg.models.blocks import checkpoint_activations, rising
from distseg.models.encoders import dinov3
from distseg.models.encoders.dinov3 import DINOv3
from distseg.models.encoders.resampling import resampled, resampling
from distseg.models.encoders.vit import DINOv2, GatedMLP, Size
from distseg.models.heads import DPT
from distseg.models.levels import Encoder, Level
from distseg.parallel import fsdp, wrap
from distseg.parallel.optimizers import parameter_groups
from distseg.train.batch import Images
from distseg.train.step import Pair, training_step
from shards.errors import InputError
from tests.ranks import run_ranks
from tests.test_engine import BATCH, NUM_CLASSES, SUPERVISED, make_batch, make_config
from tests.tiny import narrow_encoder

# what the released files hold, the mask token included: DINOv2's MODEL_CARD says 21 M, 86 M, 300 M
# and 1,100 M; DINOv3's README 21 M, 29 M, 86 M, 300 M, 840 M and 6,716 M
PARAMETERS = {
    "vits14": 22_056_576,
    "vitb14": 86_580_480,
    "vitl14": 304_368_640,
    "vitg14": 1_136_480_768,
    "vits14_reg": 22_058_112,
    "vitb14_reg": 86_583_552,
    "vitl14_reg": 304_372_736,
    "vitg14_reg": 1_136_486_912,
    "vits16": 21_601_152,
    "vits16plus": 28_697_472,
    "vitb16": 85_669_632,
    "vitl16": 303_154_176,
    "vith16plus": 840_633_600,
    "vit7b16": 6_716_035_072,
}
BLOCK_KEYS = {
    *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"),
    *("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"),
}
MLP_KEYS = {
    "plain": {"mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"},
    "g": {"mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight", "mlp.w3.bias"},
}
KEYS = {"cls_token", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
KEYS |= {"norm.weight", "norm.bias"}
# small ones of every kind: stored for a grid of 3 x 3
TINY = Size(24, 2, 3, (0, 1), grid=3, patch_px=4)
KINDS: dict[str, tuple[type[Encoder], Size]] = {
    "v2": (DINOv2, TINY),
    "v2 gated": (DINOv2, replace(TINY, mlp=GatedMLP)),
    "v2 registers": (DINOv2, replace(TINY, registers=4, offset=0.0, antialias=True)),
    "v3": (DINOv3, dinov3.sized(24, 2, 3, (0, 1), patch_px=4)),
    "v3 gated": (DINOv3, dinov3.sized(24, 2, 3, (0, 1), patch_px=4, mlp=dinov3.WIDE)),
}
GRIDS = ((3, 3), (2, 5), (7, 4))


def encoder_of(kind: str, **options: Any) -> Any:
    """A small encoder whose every number matters."""
    make, size = KINDS[kind]
    torch.manual_seed(0)
    encoder = make(size=size, layers=[0, 1], **options)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.3)
    return encoder.double().eval()


def image_of(encoder: Any, grid: tuple[int, int], count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sides = (side * encoder.size.patch_px for side in grid)
    return torch.rand(count, 3, *sides, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_parameters_and_keys_are_those_of_the_released_files(name: str) -> None:
    entry = ENCODERS[name]
    size = entry.size["size"]
    with torch.device("meta"):
        whole = entry.make(**entry.size)
    number = sum(parameter.numel() for parameter in whole.parameters())
    assert number + whole.mask_token.numel() == PARAMETERS[name]
    if entry.make is not DINOv2:
        return
    keys = KEYS | {"pos_embed"} | ({"register_tokens"} if size.registers else set())
    inside = BLOCK_KEYS | MLP_KEYS["g" if "vitg" in name else "plain"]
    keys |= {f"blocks.{number}.{key}" for number in range(size.depth) for key in inside}
    assert set(whole.state_dict()) == keys
    assert whole.state_dict()["pos_embed"].shape == (1, 1370, size.dim)


# What the networks are by their papers, on a state dict, in float64
def reference(state: dict[str, Tensor], kind: str, image: Tensor) -> list[Tensor]:
    """The normalised maps after each block."""
    _, size = KINDS[kind]
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    patches = (image - mean) / std
    patches = F.unfold(patches, size.patch_px, stride=size.patch_px).transpose(1, 2)
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    grid = [side // size.patch_px for side in image.shape[-2:]]
    first = state["cls_token"]
    if "v2" in kind:
        places = state["pos_embed"][:, 1:].transpose(1, 2).reshape(1, -1, 3, 3)
        if grid != [3, 3] and size.antialias:
            places = F.interpolate(places, grid, mode="bicubic", antialias=True)
        elif grid != [3, 3]:
            scale = [(side + 0.1) / 3 for side in grid]
            places = F.interpolate(places, scale_factor=scale, mode="bicubic")
        x = x + places.flatten(2).transpose(1, 2)
        first = first + state["pos_embed"][:, :1]
    extra = state.get("register_tokens", state.get("storage_tokens"))
    first = first if extra is None else torch.cat([first, extra], 1)
    x = torch.cat([first.expand(len(x), -1, -1), x], 1)
    maps = []
    for number in range(2):
        part = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"blocks.{number}")}
        y = attention(part, norm(x, part, "norm1", size), size, grid, "v3" in kind)
        x = x + y * part["ls1.gamma"]
        x = x + mlp(part, norm(x, part, "norm2", size)) * part["ls2.gamma"]
        tokens = norm(x, state, "norm", size)[:, first.shape[1] :]
        maps.append(tokens.transpose(1, 2).reshape(len(x), size.dim, *grid))
    return maps


def norm(x: Tensor, part: dict[str, Tensor], name: str, size: Size) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + size.epsilon).sqrt()
    return centred / deviation * part[f"{name}.weight"] + part[f"{name}.bias"]


def attention(part: dict[str, Tensor], x: Tensor, size: Size, grid: list[int], turned: bool) -> Any:
    bias = part["attn.qkv.bias"].clone()
    if turned:
        bias[size.dim : 2 * size.dim] = 0
    qkv = x @ part["attn.qkv.weight"].T + bias
    seen, width = [], size.dim // size.num_heads
    for head in range(size.num_heads):
        where = slice(head * width, (head + 1) * width)
        query, key, value = (each[..., where] for each in qkv.split(size.dim, -1))
        if turned:
            query, key = turn(query, grid), turn(key, grid)
        weights = (query @ key.transpose(1, 2) / math.sqrt(width)).softmax(-1)
        seen.append(weights @ value)
    return torch.cat(seen, -1) @ part["attn.proj.weight"].T + part["attn.proj.bias"]


def turn(x: Tensor, grid: list[int]) -> Tensor:
    """The pairs (i, i + half) of each patch's channels, as complex numbers, by its place."""
    half = x.shape[-1] // 2
    first = x.shape[1] - grid[0] * grid[1]
    turned = x.clone()
    for number in range(grid[0] * grid[1]):
        place = [
            2 * (along + 0.5) / side - 1
            for along, side in zip(divmod(number, grid[1]), grid, strict=True)
        ]
        periods = [100 ** (2 * index / half) for index in range(half // 2)]
        angles = torch.tensor([2 * math.pi * p / each for p in place for each in periods])
        pairs = torch.complex(x[:, first + number, :half], x[:, first + number, half:])
        pairs = pairs * torch.polar(torch.ones(half, dtype=torch.float64), angles.double())
        turned[:, first + number] = torch.cat([pairs.real, pairs.imag], -1)
    return turned


def mlp(part: dict[str, Tensor], x: Tensor) -> Tensor:
    def layer(name: str, y: Tensor) -> Tensor:
        return y @ part[f"mlp.{name}.weight"].T + part[f"mlp.{name}.bias"]

    if "mlp.fc1.weight" in part:
        y = layer("fc1", x)
        return layer("fc2", 0.5 * y * (1 + torch.erf(y / math.sqrt(2))))
    if "mlp.w12.weight" in part:
        gate, value = layer("w12", x).chunk(2, -1)
    else:
        gate, value = layer("w1", x), layer("w2", x)
    return layer("w3", gate * torch.sigmoid(gate) * value)


@pytest.mark.parametrize("kind", list(KINDS))
def test_maps_equal_the_formulas_at_every_size(kind: str) -> None:
    encoder = encoder_of(kind)
    for grid in GRIDS:
        image = image_of(encoder, grid)
        with torch.no_grad():
            maps = encoder(image)
        for ours, wanted in zip(maps, reference(encoder.state_dict(), kind, image), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
        assert encoder.levels == (Level(24, 4),) * 2


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("new", [2, 9, 16])
def test_positions_are_resampled_as_torch_does(antialias: bool, new: int) -> None:
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(9, 9, 5, generator=generator, dtype=torch.float64)
    offset = 0.0 if antialias else 0.1
    wanted = F.interpolate(
        cells.permute(2, 0, 1)[None],
        scale_factor=((new + offset) / 9, (12 + offset) / 9),
        mode="bicubic",
        antialias=antialias,
    )
    matrices = (resampling(9, side, offset, antialias) for side in (new, 12))
    ours = resampled(cells, *matrices).unflatten(0, (new, 12)).permute(2, 0, 1)[None]
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)


def in_transformers(kind: str, encoder: Any) -> Any:
    """transformers' class of the same network, and the keys that it has been released with."""
    transformers = pytest.importorskip("transformers")
    size = encoder.size
    about = {
        "hidden_size": size.dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "patch_size": size.patch_px,
        "image_size": 3 * size.patch_px,
    }
    if "v3" in kind:
        gated = {"use_gated_mlp": True, "hidden_act": "silu"} if "gated" in kind else {}
        config = transformers.DINOv3ViTConfig(
            **about, intermediate_size=4 * size.dim, num_register_tokens=4, **gated
        )
        return transformers.DINOv3ViTModel(config)
    if "registers" in kind:
        config = transformers.Dinov2WithRegistersConfig(**about, num_register_tokens=4)
        return transformers.Dinov2WithRegistersModel(config)
    return transformers.Dinov2Model(
        transformers.Dinov2Config(**about, use_swiglu_ffn="gated" in kind)
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_maps_equal_transformers_from_its_own_state_dict(kind: str) -> None:
    encoder = encoder_of(kind)
    encoder.size = replace(encoder.size, offset=0.0)  # which transformers has not
    theirs = in_transformers(kind, encoder).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.3)
    state = encoder.translated(theirs.state_dict())
    left = encoder.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all("bias_mask" in key or "periods" in key for key in left.missing_keys)
    for grid in GRIDS:
        image = image_of(encoder, grid)
        with torch.no_grad():
            ours = encoder(image)[-1]
            tokens = theirs((image - encoder.mean) / encoder.deviation).last_hidden_state
        wanted = tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def as_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's file of a network with registers: the class token has its position, the grid alone is
    left.
    """
    renamed = {key: value for key, value in state.items() if key != "mask_token"}
    renamed["reg_token"] = renamed.pop("register_tokens")
    places = renamed["pos_embed"]
    renamed["cls_token"] = renamed["cls_token"] + places[:, :1]
    return renamed | {"pos_embed": places[:, 1:]}


def as_released_by_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys that facebook/dinov2-giant's file has."""
    names = {}
    for key, value in state.items():
        name = re.sub(r"^blocks", "encoder.layer", key).replace("patch_embed.proj", "X")
        name = re.sub(r"\bls(\d)\.gamma", r"layer_scale\1.lambda1", name)
        name = name.replace("attn.proj", "attention.output.dense").replace("w3", "weights_out")
        name = name.replace("w12", "weights_in").replace("pos_embed", "position_embeddings")
        name = re.sub(r"^norm\.", "layernorm.", name)
        top = ("cls_token", "mask_token", "position_embeddings", "X")
        name = f"embeddings.{name}" if name.startswith(top) else name
        if "attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                names[name.replace("attn.qkv", f"attention.attention.{part}")] = rows
            continue
        names[name.replace("X", "patch_embeddings.projection")] = value
    return names


@pytest.mark.parametrize(
    ("kind", "form"),
    [("v2 registers", as_timm), ("v2 gated", as_released_by_transformers), ("v3", dict)],
)
def test_files_of_other_libraries_give_the_same_maps(
    kind: str, form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(kind).float()
    make, size = KINDS[kind]
    entry = replace(
        ENCODERS["vits14"], make=make, size={"size": replace(size, layers=(0, 1, 1, 1))}
    )
    monkeypatch.setitem(ENCODERS, "vits14", entry)
    state = {key: value.contiguous() for key, value in form(encoder.state_dict()).items()}
    save_file(state, tmp_path / "file.safetensors")
    segmentor = build_segmentor("linear_vits14", 3, init=str(tmp_path / "file.safetensors")).eval()
    left = segmentor.init_report.missing
    assert left in ((), ("mask_token",)) and segmentor.init_report.left_over == ()
    image = image_of(encoder, (2, 5)).float()
    with torch.no_grad():
        torch.testing.assert_close(segmentor.encoder(image)[-1], encoder(image)[-1])


def test_positions_of_another_grid_are_resampled_when_loaded() -> None:
    encoder = encoder_of("v2")
    state = dict(encoder.state_dict())
    flat = torch.arange(25.0).repeat_interleave(1).view(1, 25, 1).expand(-1, -1, 24)
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), flat], 1)
    got = encoder.translated(state)["pos_embed"]
    assert got.shape == (1, 10, 24)
    # a ramp over 5 x 5 cells stays one over 3 x 3, about the same middle
    middle = got[0, 1:, 0].view(3, 3)
    assert middle[1, 1] == pytest.approx(12) and (middle.diff(dim=1) > 1).all()


def test_published_files_are_named_where_they_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nowhere")
    with pytest.raises(InputError, match=r"dinov2_vits14_reg4_pretrain\.pth of https://dl\.fbai"):
        build_segmentor("linear_vits14_reg", 3)
    with pytest.raises(InputError, match=r"dinov3_vitb16_pretrain_lvd1689m-73cec8be\.pth"):
        build_segmentor("dpt_vitb16", 3)


@pytest.fixture
def narrow_vits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PARAMETERS:
        monkeypatch.setitem(ENCODERS, name, narrow_encoder(ENCODERS[name]))


STRIDES = {"linear": (14, 16), "multilevel": (14, 16), "dpt": (1, 2)}


@pytest.mark.parametrize("head", list(STRIDES))
def test_logits_of_any_image_come_at_the_heads_stride(head: str, narrow_vits: None) -> None:
    for encoder, stride in zip(("vitb14_reg", "vits16"), STRIDES[head], strict=True):
        segmentor = build_segmentor(f"{head}_{encoder}", 5, init="random").eval()
        assert segmentor.output_stride == stride
        for size in ((32, 45), (56, 112)):
            with torch.no_grad():
                logits = segmentor(torch.rand(1, 3, *size))
            assert logits.shape == (1, 5, *(-(-side // stride) for side in size))
    with pytest.raises(InputError, match="image of 31x32 px"):
        segmentor(torch.rand(1, 3, 31, 32))


def test_a_border_is_cut_off_and_whole_cells_have_none(narrow_vits: None) -> None:
    segmentor = build_segmentor("dpt_vits16", 3, init="random").double().eval()
    image = torch.rand(1, 3, 44, 64, dtype=torch.float64)
    seen: list[Tensor] = []
    segmentor.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = segmentor(image)
        bordered = F.pad(image, (0, 0, 0, 4), mode="replicate")
        torch.testing.assert_close(seen[0], bordered)
        torch.testing.assert_close(logits, segmentor(bordered)[..., :22, :])
        segmentor(image[..., :32, :])
    assert torch.equal(seen[2], image[..., :32, :])


def test_linear_heads_are_a_norm_and_a_product(narrow_vits: None) -> None:
    for name, count in (("linear", 1), ("multilevel", 4)):
        segmentor = build_segmentor(f"{name}_vits14", 3, init="random").double().eval()
        head = segmentor.head
        nn.init.normal_(head.norm.running_mean)
        image = torch.rand(2, 3, 42, 56, dtype=torch.float64)
        with torch.no_grad():
            maps = segmentor.encoder(image)
            assert len(maps) == count and segmentor.encoder.layers[-1] == 3
            x = torch.cat(maps, 1) - head.norm.running_mean.view(-1, 1, 1)
            x = x / (head.norm.running_var.view(-1, 1, 1) + head.norm.eps).sqrt()
            weight, bias = head.classifier.weight[..., 0, 0], head.classifier.bias
            wanted = torch.einsum("cd,ndhw->nchw", weight, x) + bias.view(-1, 1, 1)
            torch.testing.assert_close(segmentor(image), wanted)


def test_dpt_is_a_pyramid_that_is_fused_from_the_coarsest_on() -> None:
    torch.manual_seed(0)
    head = DPT([Level(8, 16)] * 4, 3, channels=6).double().eval()
    maps = [torch.rand(2, 8, 5, 4, dtype=torch.float64) for _ in range(4)]

    def residual(unit: Any, x: Tensor) -> Tensor:
        one, other = unit.layers[1], unit.layers[3]
        y = F.conv2d(x.relu(), one.weight, one.bias, padding=1)
        return x + F.conv2d(y.relu(), other.weight, other.bias, padding=1)

    def up(x: Tensor, size: Any) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    with torch.no_grad():
        pyramid = [layers(x) for layers, x in zip(head.reassemble, maps, strict=True)]
        assert [tuple(x.shape[-2:]) for x in pyramid] == [(20, 16), (10, 8), (5, 4), (3, 2)]
        x = head.fuse[3].mix(residual(head.fuse[3].of_sum, pyramid[3]))
        # cell i of a map of stride 2 lies on cell 2i: half-way ones are means of two
        rows = torch.stack([x[:, :, 0], x[:, :, :2].mean(2), x[:, :, 1], x[:, :, 1:].mean(2)], 2)
        rows = torch.cat([rows, x[:, :, 2:]], 2)
        x = torch.cat([rows[..., :1], rows.mean(3, keepdim=True), rows[..., 1:], rows[..., 1:]], 3)
        for number in (2, 1, 0):
            x = up(x, pyramid[number].shape[-2:])
            x = x + residual(head.fuse[number].of_map, pyramid[number])
            x = residual(head.fuse[number].of_sum, x)
            x = F.conv2d(x, head.fuse[number].mix.weight, head.fuse[number].mix.bias)
        wanted = head.classifier(up(x, (40, 32)))
        torch.testing.assert_close(head(maps), wanted)
    assert head.output_stride == 2 and head.fuse[3].of_map is None


def test_dpt_takes_a_pyramid_as_it_is_and_refuses_other_levels() -> None:
    levels = [Level(8 * 2**number, 4 * 2**number) for number in range(4)]
    head = DPT(levels, 3, channels=4, norm="batch")
    logits = head([torch.rand(2, c, 64 // s, 96 // s) for c, s in levels])
    assert logits.shape == (2, 3, 32, 48) and head.output_stride == 2
    for wrong in (levels[:3], [Level(8, 4), Level(8, 4), Level(8, 8), Level(8, 16)]):
        with pytest.raises(InputError, match=r"at strides 4, .*(.|\n)*four, all of one stride"):
            DPT(wrong, 3)


def test_a_head_that_an_encoder_cannot_carry_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "vits14", narrow_encoder(ENCODERS["vits14"]))
    with pytest.raises(InputError, match=r"segmentor=dpt_vits14: .* at strides 14, 14\n"):
        build_segmentor("dpt_vits14", 3, init="random", layers=[0, 3])
    for bad in ("middle", [3, 1], [0, 4], [], 2.5):
        with pytest.raises(InputError, match=r"segmentor\.options\.layers="):
            build_segmentor("linear_vits14", 3, init="random", layers=bad)


def test_options_of_both_parts_are_told_and_no_two_share_a_name() -> None:
    for name, made in COMPOSITIONS.items():
        head = set(inspect.signature(HEADS[made.head]).parameters) - {"levels", "num_classes"}
        parts = [head, set(ENCODERS[made.encoder].options()), {"auxiliary"}]
        assert len(set().union(*parts)) == sum(map(len, parts)), name
        assert set(inspect.signature(made).parameters) == {"num_classes"}.union(*parts)
    with pytest.raises(InputError, match="among: channels, norm, layers, drop_path, auxiliary"):
        build_segmentor("dpt_vits14", 3, init="random", width=3)


def test_an_auxiliary_head_looks_at_the_level_before_the_last(narrow_vits: None) -> None:
    segmentor = build_segmentor("dpt_vits16", 3, init="random", auxiliary=True).train()
    image = torch.rand(2, 3, 44, 64)
    answer = segmentor(image)
    assert answer["aux"].shape == answer["out"].shape == (2, 3, 22, 32)
    answer["aux"].sum().backward()
    assert segmentor.encoder.blocks[2].mlp.fc1.weight.grad is not None
    assert segmentor.encoder.blocks[3].mlp.fc1.weight.grad is None
    assert segmentor.eval()(image).shape == (2, 3, 22, 32)


def test_stochastic_depth_leaves_out_branches_by_sample(narrow_vits: None) -> None:
    assert rising(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    segmentor = build_segmentor("linear_vits14", 3, init="random", drop_path=0.5)
    assert [block.drop_path for block in segmentor.encoder.blocks] == pytest.approx(rising(0.5, 4))
    block = segmentor.encoder.blocks[-1].train()
    torch.manual_seed(0)
    branch = torch.ones(4000, 2, 3)
    kept = block.kept(branch)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))  # of a sample all or nothing
    assert float(kept.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(block.eval().kept(branch), branch)
    # of both branches of a block
    branches: list[Tensor] = []
    block.kept = lambda branch: branches.append(branch) or branch
    block(torch.rand(2, 5, 24))
    assert len(branches) == 2
    del block.kept
    # by the seed alone, as the trainer gives one to each step
    network, image = segmentor.train(), torch.rand(4, 3, 42, 42)
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(network(image))
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


def gradients(segmentor: nn.Module, image: Tensor) -> dict[str, Tensor]:
    segmentor.zero_grad()
    torch.manual_seed(3)
    segmentor(image).square().mean().backward()
    named = segmentor.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def train_on(ranks: Ranks, overrides: tuple[str, ...], recomputed: str) -> dict[str, Any]:
    """Two steps on this rank's part of each batch; the parameters then."""
    precision = "fp64" if overrides in ((), FSDP) else "fp32"
    config = make_config(precision, "simultaneous", "supervised", overrides)
    config.segmentor_optimizer.layer_decay = 0.7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp, "BLOCK_PARAMETERS", 1000)
        patch.setitem(ENCODERS, "vits14_reg", narrow_encoder(ENCODERS["vits14_reg"]))
        torch.manual_seed(0)
        segmentor = build_segmentor("dpt_vits14_reg", NUM_CLASSES, init="random")
        checkpoint_activations(segmentor, recomputed)
        if "parallel.strategy=fsdp" in overrides:
            assert set(segmentor.encoder.blocks) <= set(fsdp.blocks(segmentor))
        learner = wrap(segmentor, config.segmentor_optimizer, config, ranks)
    share = BATCH // ranks.world_size
    where = slice(ranks.rank * share, (ranks.rank + 1) * share)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    pair = Pair.of(config, learner)
    for step in range(2):
        image, label = (part[where] for part in make_batch(step, dtype))
        training_step(pair, SUPERVISED, Images(image, label))
        learner.step(1.0)
    named = learner.full_network().named_parameters()
    return {name: parameter.detach().double().numpy().copy() for name, parameter in named}


FSDP, ZERO = ("parallel.strategy=fsdp",), ("parallel.strategy=deepspeed",)
# each beside the first of its precision, whose steps tests/test_engine.py proves
IN_FP64: dict[str, tuple[tuple[str, ...], str]] = {
    "ddp": ((), "none"),
    "fsdp": (FSDP, "blocks"),
}
IN_FP32: dict[str, tuple[tuple[str, ...], str]] = {
    "ddp in fp32": (("precision=fp32",), "none"),
    "stage 3": ((*ZERO, "parallel.zero_stage=3"), "blocks"),
}


def train_all(
    ranks: Ranks, runs: dict[str, tuple[tuple[str, ...], str]]
) -> dict[str, dict[str, Any]]:
    return {name: train_on(ranks, *run) for name, run in runs.items()}


# each rank is a process that imports the libraries; tests/test_systems.py has a step of two ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "most"),
    [
        pytest.param(IN_FP64, 1e-9, id="ddp and fsdp"),
        pytest.param(IN_FP32, 1e-5, id="deepspeed"),
    ],
)
def test_strategies_with_activation_checkpointing_make_the_same_steps(
    runs: dict[str, tuple[tuple[str, ...], str]], most: float
) -> None:
    if runs is IN_FP32:
        pytest.importorskip("deepspeed")
    of_ranks = run_ranks(2, train_all, runs)
    wanted = next(iter(of_ranks[0].values()))
    for of_rank in of_ranks:
        for name, parameters in of_rank.items():
            far = (abs(parameters[key] - wanted[key]).max() for key in wanted)
            assert max(map(float, far)) < most, name


def test_activations_that_are_computed_again_change_no_bit(narrow_vits: None) -> None:
    segmentor = build_segmentor("dpt_vits14_reg", 3, init="random", drop_path=0.4).train()
    image = torch.rand(2, 3, 42, 56)
    plain = gradients(segmentor, image)
    forwards: list[int] = []
    first = segmentor.encoder.blocks[0]
    first.mlp.register_forward_hook(lambda *_: forwards.append(1))
    for recomputed, number in (("selective", 2), ("blocks", 2), ("none", 1)):
        checkpoint_activations(segmentor, recomputed)
        forwards.clear()
        again = gradients(segmentor, image)
        assert all(torch.equal(again[name], plain[name]) for name in plain)
        assert len(forwards) == number, recomputed
    with pytest.raises(InputError, match=r"activation_checkpointing=blocks for a network without"):
        checkpoint_activations(nn.Linear(2, 2), "blocks")


def test_rates_fall_from_the_head_to_the_image(narrow_vits: None) -> None:
    config = make_config("fp32", "simultaneous", "supervised").segmentor_optimizer
    config.lr, config.encoder_lr_factor, config.layer_decay = 1.0, 0.5, 0.8
    segmentor = build_segmentor("dpt_vits14_reg", 3, init="random")
    rates = {
        id(parameter): group["lr"]
        for group in parameter_groups(segmentor, config)
        for parameter in group["params"]
    }
    above = {"norm": 0, "blocks.3": 1, "blocks.0": 4, "patch_embed": 5, "cls_token": 5}
    above |= {"pos_embed": 5, "register_tokens": 5}
    for name, parameter in segmentor.encoder.named_parameters():
        number = next((n for part, n in above.items() if name.startswith(part)), None)
        if number is not None:
            assert rates[id(parameter)] == pytest.approx(0.5 * 0.8**number), name
    assert all(rates[id(parameter)] == 1.0 for parameter in segmentor.head.parameters())
    assert len(rates) == len(list(segmentor.parameters()))
    with pytest.raises(InputError, match=r"layer_decay=0\.8 for a network that has no such layers"):
        parameter_groups(build_segmentor("multiscale", 3, init="random"), config)


def test_parts_are_measured_and_attention_sees_the_whole_image(narrow_vits: None) -> None:
    entry = measure_encoder("vits14_reg")
    assert entry.levels == (Level(24, 14),) * 4 and entry.kind == "DINOv2"
    patches = 23 * 23  # of 322 px, the next multiple of 14 above 321
    tokens = patches + 5
    block = 2 * tokens * 24 * (3 * 24 + 24 + 2 * 96) + 2 * 2 * tokens**2 * 24
    work = (2 * patches * 3 * 14 * 14 * 24 + 4 * block) / 1e9
    assert entry.gflop == pytest.approx(work, rel=1e-3)
    head = measure_head("multilevel", 21)
    assert head.parameters == 2 * 96 + 96 * 21 + 21 and head.output_stride == 14
    assert head.gflop == pytest.approx(2 * patches * 96 * 21 / 1e9, rel=1e-3)
    # also where queries, keys and values are all that leads from pixel to pixel
    assert measure_segmentor("linear_vits16", 3).field_of_view_px is None
