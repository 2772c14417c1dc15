"""Segmentors and discriminators of the user's own behind the package's interface."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from distseg.cli import main
from distseg.config import loading
from distseg.models import (
    OfBothOutputs,
    build_discriminator,
    build_segmentor,
    check_training,
    set_batch_norm,
)
from distseg.models.own_segmentor import OwnSegmentor
from distseg.parallel.optimizers import parameter_groups
from distseg.parallel.sync_batch_norm import synchronise
from distseg.train.flops import StepWork
from distseg.train.networks import build_networks
from shards.errors import InputError

EXAMPLES = Path(__file__).parent.parent / "examples"
UNET = f"{EXAMPLES}/own_network.py:SmallUNet"
NUM_CLASSES = 5


class Strided(nn.Module):
    """Stride 4; of any size, with a last cell that hangs over."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Conv2d(8, num_classes, 3, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.encoder(image).relu())


class Floored(Strided):
    """Stride 4, rounded down where 4 does not divide a side."""

    def forward(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(super().forward(F.interpolate(image, scale_factor=2)), 2)


class WithAuxiliary(nn.Module):
    """As torchvision's: logits of the image's size in a dict, in evaluation mode too."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.classifier = nn.Conv2d(8, num_classes, 1)
        self.aux_classifier = nn.Conv2d(8, num_classes, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.backbone(image)
        scores = OrderedDict(out=self.classifier(x), aux=self.aux_classifier(x))
        return OrderedDict(
            (name, F.interpolate(score, image.shape[-2:], mode="bilinear"))
            for name, score in scores.items()
        )


class Patches16(Strided):
    """Refuses every size but multiples of 14, as a vision transformer does."""

    size_multiple = 14

    def forward(self, image: Tensor) -> Tensor:
        if any(side % 14 for side in image.shape[-2:]):
            raise ValueError(f"{tuple(image.shape[-2:])} are no multiples of 14")
        x = F.avg_pool2d(self.encoder(image), 7)
        return F.interpolate(self.head(x), image.shape[-2:])


class Normalising(Strided):
    """In place: what is done with the image next sees another one."""

    def forward(self, image: Tensor) -> Tensor:
        image -= 0.5
        return super().forward(image)


class FixedSize(Strided):
    def forward(self, image: Tensor) -> Tensor:
        return F.interpolate(super().forward(image), (32, 48))


class OneSize(Strided):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) + torch.zeros(1, NUM_CLASSES, 32, 48)


class Tuple(Strided):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(image), image


class OtherDict(Strided):
    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(image)}


class TwentyOne(Strided):
    def __init__(self, num_classes: int):
        super().__init__(21)


class NotANumber(Strided):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) / (image.sum() * 0)


class Unused(Strided):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.forgotten = nn.Linear(2, 2)


class FrozenUnused(Unused):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.forgotten.requires_grad_(False)


class Detached(Strided):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).detach()


class Raises(Strided):
    def forward(self, image: Tensor) -> Tensor:
        raise RuntimeError("out of order")


class OtherInTraining(Strided):
    def forward(self, image: Tensor) -> Tensor:
        logits = super().forward(image)
        return logits[..., ::2, ::2] if self.training else logits


class NoClasses(nn.Module):
    def __init__(self, classes: int):
        super().__init__()


def no_network(num_classes: int) -> list[int]:
    return [num_classes]


def reference(network: object) -> str:
    return f"{Path(__file__)}:{network.__name__}"  # type: ignore[attr-defined]


def built(network: object, **options: object) -> OwnSegmentor:
    made = build_segmentor(reference(network), NUM_CLASSES, init="random", **options)
    assert isinstance(made, OwnSegmentor)
    return made


@pytest.mark.parametrize(
    ("network", "stride", "multiple"),
    [(Strided, 4, 1), (Floored, 4, 4), (WithAuxiliary, 1, 1), (Patches16, 1, 14)],
)
def test_stride_and_multiple_are_found(network: type, stride: int, multiple: int) -> None:
    segmentor = built(network).eval()
    assert (segmentor.output_stride, segmentor.size_multiple) == (stride, multiple)
    for height, width in ((64, 64), (61, 90), (97, 131)):
        logits = segmentor(torch.rand(2, 3, height, width))
        assert logits.shape == (2, NUM_CLASSES, -(-height // stride), -(-width // stride))


def test_where_nothing_is_missing_logits_are_the_networks_own() -> None:
    torch.manual_seed(0)
    segmentor, image = built(WithAuxiliary).eval(), torch.rand(2, 3, 96, 56)
    assert torch.equal(segmentor(image), segmentor.network(image)["out"])
    unet = build_segmentor(UNET, NUM_CLASSES, init="random", width=4).eval()
    assert unet.size_multiple == 4 and unet.output_stride == 1
    assert torch.equal(unet(image), unet.network(image))


def test_a_border_that_is_repeated_changes_what_lies_near_it_alone() -> None:
    unet = build_segmentor(UNET, NUM_CLASSES, init="random", width=4).eval()
    image = torch.rand(1, 3, 97, 101)
    expected = unet.network(image[..., :96, :100])
    reach = 22  # of its field of view
    found = unet(image)[..., : 96 - reach, : 100 - reach]
    assert torch.allclose(found, expected[..., : 96 - reach, : 100 - reach], atol=1e-5)


def test_auxiliary_logits_come_in_training_mode_alone() -> None:
    segmentor = built(WithAuxiliary)
    check_training(reference(WithAuxiliary), segmentor)
    assert segmentor.has_auxiliary
    image = torch.rand(2, 3, 64, 48)
    answer = segmentor.train()(image)
    assert list(answer) == ["out", "aux"]
    assert answer["aux"].shape == answer["out"].shape == (2, NUM_CLASSES, 64, 48)
    assert isinstance(segmentor.eval()(image), Tensor)
    plain = built(Strided)
    check_training(reference(Strided), plain)
    assert not plain.has_auxiliary and isinstance(plain.train()(image), Tensor)


def test_trying_changes_neither_weights_nor_statistics_nor_random_numbers() -> None:
    torch.manual_seed(3)
    alone = WithAuxiliary(NUM_CLASSES)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    segmentor = built(WithAuxiliary)
    check_training(reference(WithAuxiliary), segmentor)
    assert torch.equal(torch.rand(4), drawn)
    for name, value in alone.state_dict().items():
        assert torch.equal(segmentor.network.state_dict()[name], value), name


def test_encoder_and_batch_norm_are_the_packages_to_set() -> None:
    segmentor = built(Strided)
    assert segmentor.encoder is segmentor.network.encoder and built(WithAuxiliary).encoder is None
    config = loading.load(["data.shards=unused", "segmentor_optimizer.encoder_lr_factor=0.1"])
    rates = {group["lr"] for group in parameter_groups(segmentor, config.segmentor_optimizer)}
    lr = config.segmentor_optimizer.lr
    assert rates == {lr, 0.1 * lr}
    frozen, image = built(WithAuxiliary), torch.rand(2, 3, 32, 32)
    set_batch_norm(frozen, "frozen")
    before = frozen.network.backbone[1].running_mean.clone()
    frozen.train()(image)
    assert torch.equal(frozen.network.backbone[1].running_mean, before)
    assert synchronise(built(WithAuxiliary)) == 1


def test_weights_load_from_a_file_by_either_name(tmp_path: Path) -> None:
    state = {name: torch.rand_like(it) for name, it in Strided(NUM_CLASSES).state_dict().items()}
    save_file(state, tmp_path / "own.safetensors")
    save_file({f"network.{key}": it for key, it in state.items()}, tmp_path / "run.safetensors")
    save_file(
        {"weight": state["encoder.weight"], "bias": state["encoder.bias"]},
        tmp_path / "encoder.safetensors",
    )
    for name, num in (("own", 4), ("run", 4), ("encoder", 2)):
        made = build_segmentor(
            reference(Strided), NUM_CLASSES, init=str(tmp_path / f"{name}.safetensors")
        )
        assert made.init_report is not None and len(made.init_report.loaded) == num
        assert torch.equal(made.network.encoder.weight, state["encoder.weight"])


class Lazy(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.classifier = nn.LazyConv2d(num_classes, 1)


class NoMultiple(Strided):
    size_multiple = 0


class LayerCalledHead(nn.Module):
    """As many networks have one: it says nothing of the scores."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.head = nn.Conv2d(num_classes, 1, 1)

    def forward(self, label_map: Tensor) -> Tensor:
        return self.head(label_map)


class NoHead(nn.Module):
    head = "patches"  # of no such name

    def __init__(self, num_classes: int):
        super().__init__()
        self.classifier = nn.Conv2d(num_classes, 1, 1)

    def forward(self, label_map: Tensor) -> Tensor:
        return self.classifier(label_map)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (FixedSize, "logits of 32x48 for 128x192|logits of 32x48 for 192x128"),
        (Normalising, "changes the tensor that it is called with"),
        (OneSize, r"called with \(2, 3, 192, 128\): RuntimeError: .*test_own_networks.py, line"),
        (Tuple, "answers with a tuple of 2"),
        (OtherDict, "a dict with the keys logits"),
        (TwentyOne, "logits of 21 classes, made with num_classes=5"),
        (NotANumber, "its logits are not finite"),
        (Raises, "RuntimeError: out of order .*test_own_networks.py, line"),
        (NoClasses, "NoClasses does not take num_classes"),
        (no_network, "makes a list"),
        (Lazy, "weight has no shape yet"),
        (NoMultiple, "size_multiple=0"),
    ],
)
def test_what_is_no_segmentor_is_refused(network: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        built(network)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Unused, "no gradient reaches forgotten.weight, forgotten.bias"),
        (Detached, "has no gradient"),
        (OtherInTraining, "logits of 16x24 for 128x192 px in training mode"),
    ],
)
def test_what_cannot_be_trained_is_refused(network: type, message: str) -> None:
    segmentor = built(network)
    with pytest.raises(InputError, match=message):
        check_training(reference(network), segmentor)


def test_what_is_frozen_needs_no_gradient() -> None:
    check_training(reference(FrozenUnused), built(FrozenUnused))


def test_published_weights_there_are_none_and_options_are_checked() -> None:
    with pytest.raises(InputError, match="init=imagenet"):
        build_segmentor(UNET, NUM_CLASSES)
    with pytest.raises(InputError, match=r"segmentor.options.depth, .*\n.*among: width"):
        build_segmentor(UNET, NUM_CLASSES, init="random", depth=2)
    with pytest.raises(InputError, match="num_classes=0"):
        build_segmentor(UNET, 0, init="random")
    config = loading.load(["data.shards=unused", f"segmentor={UNET}"])
    assert config.segmentor.init == "random" and config.segmentor.name == UNET


class OnLabelMap(nn.Sequential):
    def __init__(self, num_classes: int):
        super().__init__(nn.Conv2d(num_classes, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 1, 4, 2, 1))


class OnOneOfEach(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.layers = OnLabelMap(num_classes + 3)

    def forward(self, image: Tensor, label_map: Tensor) -> Tensor:
        image = F.interpolate(image, label_map.shape[-2:])
        return self.layers(torch.cat([image, label_map], 1)).mean((2, 3))


class OnAll(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.layers = OnOneOfEach(num_classes)

    def forward(self, image: Tensor, *label_maps: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.layers(image[: len(it)], it)[:, 0] for it in label_maps)


class OnlyTheFirst(OnAll):
    def forward(self, image: Tensor, *label_maps: Tensor) -> tuple[Tensor, ...]:
        return super().forward(image, *label_maps)[:1]


class TwoScores(nn.Sequential):
    def __init__(self, num_classes: int):
        super().__init__(nn.Conv2d(num_classes, 2, 4, 2, 1))


class BlindToLabels(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.layer = nn.Conv2d(num_classes, 1, 1)

    def forward(self, label_map: Tensor) -> Tensor:
        return self.layer(label_map.argmax(1, keepdim=True).float().expand_as(label_map))


class Three(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()

    def forward(self, image: Tensor, label_map: Tensor, more: Tensor) -> Tensor:
        return label_map


def judge(network: type) -> nn.Module:
    return build_discriminator(reference(network), NUM_CLASSES)


def test_a_discriminators_weights_load_from_a_file_by_either_name(tmp_path: Path) -> None:
    patches = f"{EXAMPLES}/own_discriminator.py:Patches"
    first = build_discriminator(patches, NUM_CLASSES, width=4)
    state = {name: torch.rand_like(it) for name, it in first.state_dict().items()}
    save_file(state, tmp_path / "run.safetensors")
    own = {name.removeprefix("network."): it for name, it in state.items()}
    save_file(own, tmp_path / "own.safetensors")
    for name in ("run", "own"):
        init = str(tmp_path / f"{name}.safetensors")
        made = build_discriminator(patches, NUM_CLASSES, init=init, width=4).state_dict()
        assert all(torch.equal(made[key], tensor) for key, tensor in state.items())
    with pytest.raises(InputError, match="no file of weights"):
        build_discriminator(patches, NUM_CLASSES, init=str(tmp_path / "absent.safetensors"))


def test_a_discriminator_is_called_as_its_forward_is_written() -> None:
    torch.manual_seed(0)
    image = torch.rand(3, 3, 64, 64)
    maps = [torch.rand(k, NUM_CLASSES, 16, 16) for k in (2, 3)]
    plain, pair, every = judge(OnLabelMap), judge(OnOneOfEach), judge(OnAll)
    assert [it.head for it in (plain, pair, every)] == ["patch", "image", "image"]
    assert judge(LayerCalledHead).head == "patch"
    assert [it.min_size_px for it in (plain, pair, every)] == [4, 4, 4]
    for found, label_map in zip(plain(image, *maps), maps, strict=True):
        assert torch.equal(found, plain.network(label_map)) and found.shape[1:] == (1, 4, 4)
    for found, label_map in zip(pair(image, *maps), maps, strict=True):
        k = len(label_map)
        assert torch.equal(found, pair.network(image[:k], label_map).view(k, 1, 1, 1))
    for found, expected in zip(every(image, *maps), every.network(image, *maps), strict=True):
        assert torch.equal(found, expected.view(-1, 1, 1, 1))
    with pytest.raises(InputError, match="label map of 2x2 px"):
        plain(image, torch.rand(1, NUM_CLASSES, 2, 2))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (OnlyTheFirst, r"answers \(2, 1, 1, 1\) to label maps of 2 and 3 images"),
        (TwoScores, r"answers \(2, 2, 64, 64\), \(3, 2, 64, 64\)"),
        (Three, r"forward\(image, label_map, more\)"),
        (BlindToLabels, "no gradient reaches the label map"),
        (NoHead, "head='patches'"),
    ],
)
def test_what_is_no_discriminator_is_refused(network: type, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_training(reference(network), judge(network))


class WithFeatures(nn.Module):
    """Of the image and one label map; what it answers to features=True is to be chosen."""

    def __init__(self, num_classes: int, returned: str = "pair"):
        super().__init__()
        self.hidden, self.last = nn.Conv2d(num_classes, 6, 3, padding=1), nn.Conv2d(6, 1, 1)
        self.returned = returned

    def forward(self, image: Tensor, label_map: Tensor, features: bool = False) -> Any:
        x = self.hidden(label_map).relu()
        logits, mean = self.last(x), x.mean((2, 3))
        if not features or self.returned == "none":
            return logits
        kinds = {"map": x, "batch": mean.mean(0, keepdim=True), "detached": mean.detach()}
        return logits, kinds.get(self.returned, mean)


class AllWithFeatures(WithFeatures):
    """The same in the other form."""

    def forward(self, image: Tensor, *label_maps: Tensor, features: bool = False) -> Any:
        found = [super(AllWithFeatures, self).forward(image, each, True) for each in label_maps]
        logits, means = zip(*found, strict=True)
        return (logits, means) if features else logits


@pytest.mark.parametrize("network", [WithFeatures, AllWithFeatures])
def test_a_discriminators_features_are_those_of_its_own_forward(network: type) -> None:
    own = judge(network)
    check_training(reference(network), own)
    assert own.has_features and own.sees_image and not judge(OnLabelMap).has_features
    assert not judge(OnLabelMap).sees_image
    image, maps = torch.rand(3, 3, 16, 16), [torch.rand(k, NUM_CLASSES, 8, 8) for k in (2, 3)]
    logits, features = own(image, *maps, features=True)
    for k, label_map in enumerate(maps):
        assert torch.equal(logits[k], own(image, *maps)[k])
        expected = own.network.hidden(label_map).relu().mean((2, 3))
        assert torch.equal(features[k], expected)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("none", "without a pair"),
        ("map", r"features \(2, 6, 32, 32\), \(3, 6, 32, 32\) of label maps of 2 and 3"),
        ("batch", r"features \(1, 6\), \(1, 6\)"),
        ("detached", "no gradient of its features"),
    ],
)
def test_features_that_are_none_are_refused(returned: str, message: str) -> None:
    own = build_discriminator(reference(WithFeatures), NUM_CLASSES, returned=returned)
    with pytest.raises(InputError, match=message):
        check_training(reference(WithFeatures), own)


class OddJudge(nn.Module):
    """Reads a value, which a count without values cannot give."""

    def forward(self, label_map: Tensor) -> Tensor:
        return label_map.mean(dim=(1, 2, 3)) * float(label_map.mean().item() > -1)


def test_operations_are_counted_or_the_reason_is_told() -> None:
    class Odd(nn.Module):
        """Reads a value, which a count without values cannot give."""

        def forward(self, image: Tensor) -> Tensor:
            return self.inner(image) * float(image.mean().item() > -1)

    config = loading.load(["data.shards=unused", "data.crop_px=64", "mode=supervised"])
    segmentor = built(Strided)
    work = StepWork.of(config, segmentor, None)
    # 32 x 32 and 16 x 16 cells, a multiply-add counted as two
    assert work.segmentor == 2 * (32 * 32 * 27 * 8 + 16 * 16 * 72 * NUM_CLASSES)
    odd = Odd()
    odd.inner = segmentor.network
    segmentor = copy.deepcopy(segmentor)
    segmentor.network = odd
    work = StepWork.of(config, segmentor, None)
    assert work.segmentor == 0 and work.uncounted
    # of two outputs, a discriminator of each
    judge = build_discriminator(reference(OnLabelMap), NUM_CLASSES)
    judge.network = OddJudge()
    work = StepWork.of(config, built(Strided), OfBothOutputs(judge, judge))
    assert work.segmentor == 0 and work.uncounted


def test_models_lists_them_with_their_sizes(capsys: pytest.CaptureFixture) -> None:
    names = [f"segmentor={reference(Strided)}", f"discriminator={reference(OnLabelMap)}"]
    assert main(["models", *names, "--classes", "5"]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    file = Path(__file__).name
    parameters = sum(it.numel() for it in Strided(5).parameters())
    assert rows[f"{file}:Strided"] == ["own", f"{parameters:,}", "224", "4", "7x7", "0.0"]
    assert rows[f"{file}:OnLabelMap"][1:3] == ["4", "10x10"] and "two_branch" not in text
    assert main(["models", reference(Strided)]) == 2
    assert "segmentor=FILE.py:NAME" in capsys.readouterr().err


class Pooled(Strided):
    """Batch normalisation of a 1x1 map, as of PSPNet's coarsest level."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.context = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.encoder(image).relu()
        return self.head(x + self.context(x))


class Growing(Strided):
    """A buffer that takes the size of what it has seen."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, image: Tensor) -> Tensor:
        self.seen = image.detach().mean((0, 1, 2))
        return super().forward(image)


class SmallTable(Strided):
    """As with absolute positions: larger images than its table are an error."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image + torch.zeros(400, 400)[: image.shape[-2], : image.shape[-1]])


class Softmaxed(Strided):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).softmax(1)


class Sigmoided(OnLabelMap):
    def forward(self, label_map: Tensor) -> Tensor:
        return super().forward(label_map).sigmoid()


class PooledJudge(nn.Sequential):
    def __init__(self, num_classes: int):
        super().__init__(
            nn.Conv2d(num_classes, 8, 3, 2, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 1, 1),
        )


def settings(*more: str) -> list[str]:
    return ["data.shards=unused", "mode=supervised", "data.crop_px=48", "batch_size=2", *more]


@pytest.mark.parametrize(
    ("more", "world_size", "refused"),
    [
        ((), 1, False),
        ((), 2, True),
        (("gradient_accumulation_steps=2",), 1, True),
        (("segmentor.batch_norm=synchronised",), 2, False),
        (("data.crop_px=512",), 2, True),
    ],
)
def test_a_batch_norm_of_one_value_is_told_before_training(
    more: tuple[str, ...], world_size: int, refused: bool
) -> None:
    config = loading.load(settings(f"segmentor={reference(Pooled)}", *more))
    if not refused:
        build_networks(config, NUM_CLASSES, world_size)
        return
    with pytest.raises(InputError, match=r"more than 1 value[\s\S]*1 image[\s\S]*batch_size"):
        build_networks(config, NUM_CLASSES, world_size)


def test_a_batch_norm_of_one_value_in_a_discriminator_too() -> None:
    more = (f"discriminator={reference(PooledJudge)}", "mode=adversarial")
    own = f"segmentor={reference(Strided)}"
    config = loading.load(settings(own, *more))
    build_networks(config, NUM_CLASSES, 1)
    with pytest.raises(InputError, match=r"discriminator=.*PooledJudge[\s\S]*1 label map"):
        build_networks(config, NUM_CLASSES, 2)


def test_what_depends_on_the_size_of_the_crop_is_found_at_that_size() -> None:
    own = f"segmentor={reference(SmallTable)}"
    build_networks(loading.load(settings(own)), NUM_CLASSES)
    with pytest.raises(InputError, match=r"called with \(2, 3, 416, 416\): RuntimeError"):
        build_networks(loading.load(settings(own, "data.crop_px=416")), NUM_CLASSES)


def test_a_buffer_that_changes_its_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"seen has the shape \(192,\) after a forward"):
        check_training(reference(Growing), built(Growing))


def test_probabilities_are_no_logits() -> None:
    for network in (Softmaxed, Sigmoided):
        made = built(network) if network is Softmaxed else judge(network)
        with pytest.raises(InputError, match="the range of probabilities"):
            check_training(reference(network), made)


def test_a_discriminator_for_larger_label_maps_is_refused_at_once() -> None:
    started = time.process_time()
    with pytest.raises(InputError, match="min_size_px=1000, for label maps of 12 px"):
        build_discriminator(reference(Huge), NUM_CLASSES, label_map_px=12)
    with pytest.raises(InputError, match="size_multiple=4097"):
        built(HugeMultiple)
    assert time.process_time() - started < 1


class Huge(OnLabelMap):
    min_size_px = 1000


class HugeMultiple(Strided):
    size_multiple = 4097


def test_all_of_the_logits_way_frozen_is_refused() -> None:
    own = f"segmentor={reference(WithAuxiliary)}"
    freeze = "segmentor.freeze=[network.backbone,network.classifier]"
    build_networks(loading.load(settings(own, freeze)), NUM_CLASSES)  # the auxiliary head alone
    for more in ("loss.aux_weight=0", "mode=adversarial"):
        with pytest.raises(InputError, match="all that the logits come from"):
            build_networks(loading.load(settings(own, freeze, more)), NUM_CLASSES)


def test_a_run_that_goes_on_needs_its_first_weights_no_more(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    own = settings(f"segmentor={reference(Strided)}", f"run_dir={run_dir}")
    config = loading.load([*own, f"segmentor.init={tmp_path}/gone.pth"])
    with pytest.raises(InputError, match="no file of weights"):
        build_networks(config, NUM_CLASSES)
    (run_dir / "checkpoints" / "step-00000004").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-00000004" / "state.json").write_text("{}")
    segmentor, _ = build_networks(config, NUM_CLASSES)
    assert segmentor.awaits_checkpoint  # without one, `build_trainer` refuses to begin
