"""First weights from files and other runs: wrappers, other classes, and what is too little."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distseg.cli import main
from distseg.config import loading
from distseg.models import build_discriminator, build_segmentor
from distseg.models.weights import read_weights
from distseg.runs import checkpoint
from distseg.train.initial import initial_weights
from distseg.train.networks import build_networks
from distseg.train.run import fit
from shards.errors import InputError
from tests.tiny import SETTINGS, no_curves

SMALL = {"norm": "batch", "hidden": 8}


def segmentor(num_classes: int = 3, **options: Any) -> Any:
    return build_segmentor("multiscale", num_classes, **{"init": "random"} | SMALL | options)


def test_containers_and_prefixes_of_wrappers_are_understood(tmp_path: Path) -> None:
    network = segmentor()
    whole, encoder = network.state_dict(), network.encoder.state_dict()
    forms = {
        "state_dict": {"epoch": 3, "state_dict": whole},
        "model within": {"model": {"model_state": {f"module.{k}": v for k, v in whole.items()}}},
        "compiled": {"model": {f"_orig_mod.module.{k}": v for k, v in whole.items()}},
        "inside": {k.replace("encoder.", "encoder._orig_mod."): v for k, v in whole.items()},
        "backbone": {k.replace("encoder.", "module.backbone."): v for k, v in whole.items()},
        "encoder alone": {f"module.backbone.{key}": value for key, value in encoder.items()},
        "nested": {f"_orig_mod.encoder.module.{key}": value for key, value in encoder.items()},
    }
    for form, content in forms.items():
        torch.save(content, tmp_path / "weights.pth")
        loaded = segmentor(init=str(tmp_path / "weights.pth"))
        own = loaded.encoder if form in ("encoder alone", "nested") else loaded
        expected = encoder if own is loaded.encoder else whole
        assert all(torch.equal(t, expected[k]) for k, t in own.state_dict().items()), form
        report = loaded.init_report
        assert report.missing == report.left_over == () and len(report.loaded) == len(expected)


def test_what_training_scripts_keep_beside_the_weights_is_no_obstacle(tmp_path: Path) -> None:
    state = {"weight": torch.ones(2)}
    beside = {"epoch": 3, "args": Namespace(lr=0.1, names=["a"]), "best": np.float64(71.2)}
    beside |= {"counts": [np.int64(3), np.float32(0.5), np.bool_(True)]}
    torch.save({"model": state} | beside, tmp_path / "model.pth")
    assert torch.equal(read_weights(tmp_path / "model.pth")["weight"], torch.ones(2))
    # a whole module is code
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "module.pth")
    with pytest.raises(InputError, match="could run code"):
        read_weights(tmp_path / "module.pth")


def test_two_networks_in_one_file_are_refused(tmp_path: Path) -> None:
    state = segmentor().state_dict()
    twice = {f"{prefix}{k}": v for k, v in state.items() for prefix in ("", "module.")}
    torch.save(twice, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"both stand for encoder\.0\.weight"):
        segmentor(init=str(tmp_path / "weights.pth"))


def test_a_file_with_half_of_the_tensors_is_refused_unless_that_is_meant(tmp_path: Path) -> None:
    state = segmentor().state_dict()
    half = {key: value for key, value in state.items() if "encoder" not in key}
    save_file(half | {"stranger": torch.zeros(1)}, tmp_path / "half.safetensors")
    num_named = sum(not key.endswith("num_batches_tracked") for key in state)
    present = sum(not key.endswith("num_batches_tracked") for key in half)
    with pytest.raises(InputError) as error:
        segmentor(init=str(tmp_path / "half.safetensors"))
    message = str(error.value)
    assert f"{present / num_named:.0%} of the {num_named} tensors" in message
    for part in ("encoder.0.weight", "stranger", "segmentor.init_partial=true"):
        assert part in message
    loaded = segmentor(init=str(tmp_path / "half.safetensors"), init_partial=True)
    assert torch.equal(loaded.classifier[0].weight, half["classifier.0.weight"])
    assert loaded.init_report.missing[0] == "encoder.0.weight"


def test_layers_for_another_number_of_classes_are_made_anew_and_no_others(tmp_path: Path) -> None:
    network = segmentor(5)
    save_file(network.state_dict(), tmp_path / "five.safetensors")
    torch.manual_seed(1)
    fresh = segmentor(3).state_dict()
    torch.manual_seed(1)
    loaded = segmentor(3, init=str(tmp_path / "five.safetensors"))
    last = ("classifier.4.weight", "classifier.4.bias")
    for name, tensor in loaded.state_dict().items():
        source = fresh if name in last else network.state_dict()
        assert torch.equal(tensor, source[name]), name
    assert loaded.init_report.renewed == last
    assert "made anew for another number of classes: classifier.4.weight" in str(loaded.init_report)
    with pytest.raises(InputError, match=r"classifier\.0\.weight has shape \(8, 768, 1, 1\)"):
        segmentor(3, init=str(tmp_path / "five.safetensors"), hidden=16)


def test_a_discriminator_starts_from_a_file(tmp_path: Path) -> None:
    network = build_discriminator("two_branch", 5, width=0.125)
    save_file(network.state_dict(), tmp_path / "five.safetensors")
    init = str(tmp_path / "five.safetensors")
    loaded = build_discriminator("two_branch", 3, init=init, width=0.125)
    assert loaded.init_report.renewed == ("label_conv.weight",)
    own = loaded.state_dict()
    given = network.state_dict()
    same = {name for name in given if name in loaded.init_report.loaded}
    assert same == given.keys() - {"label_conv.weight"}
    assert all(torch.equal(given[name], own[name]) for name in same)
    other = build_discriminator("small_fov_light", 3)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"none of its keys fits|discriminator\.init=random"):
        build_discriminator("two_branch", 3, init=str(tmp_path / "other.safetensors"))


@pytest.fixture(scope="module")
@no_curves()
def run(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with eight classes, scored after each, so that the better one is the best."""
    run_dir = tmp_path_factory.mktemp("weights") / "run"
    every_step = {"evaluate.every_steps": 1, "checkpoint.every_steps": 1}
    fit(**SETTINGS | every_step | {"data.shards": toy_shards, "run_dir": run_dir})
    return run_dir


def config_of(shards: Path, **keys: Any) -> Any:
    return loading.load(loading.arguments(SETTINGS | {"data.shards": shards} | keys))


def test_a_run_gives_its_ema_weights_of_the_chosen_checkpoint(toy_shards: Path, run: Path) -> None:
    best = checkpoint.read_best(run / "checkpoints")["step"]
    chosen = {"": best, "@best": best, "@last": 2, "@1": 1, "@2": 2}
    for suffix, step in chosen.items():
        config = config_of(
            toy_shards,
            **{"segmentor.init": f"{run}{suffix}", "discriminator.init": f"{run}{suffix}"},
        )
        networks = build_networks(config, 3)
        folder = run / "checkpoints" / f"step-{step:08d}"
        for network, part in zip(networks, ("ema", "discriminator"), strict=True):
            assert network is not None
            tensors, report = checkpoint.read(folder, f"{part}.network"), network.init_report
            assert report.renewed and f"step {step}" in report.source
            own = network.state_dict()
            assert all(torch.equal(own[name], tensors[name]) for name in report.loaded)


@no_curves()
def test_the_headline_tells_what_was_loaded(
    toy_shards: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    keys = {"segmentor.init": run, "data.keep_classes": ["sky", "tree"], "steps": 1}
    fit(**SETTINGS | keys | {"data.shards": toy_shards, "run_dir": tmp_path / "run"})
    printed = re.sub(r"\s+", " ", "".join(capfd.readouterr()))
    assert f"weights: {run}, step" in printed
    assert "EMA weights: 24 tensors loaded; made anew for another number of classes: " in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["segmentor.init={run}@9"], "no checkpoint '9'"),
        (["segmentor.init={run}/nowhere@best"], "no file of weights"),
        (["segmentor.init={run}/checkpoints"], "no checkpoint 'last'"),
        (["discriminator.init={run}/nothing.pth"], "no file of weights"),
        (["segmentor.init={run}", "segmentor=fcn32s_vgg16"], "none of its keys fits"),
        (["segmentor.freeze=backbone"], "'backbone' matches no parameter"),
        (["segmentor.freeze=[encoder,classifier.9.*]"], r"'classifier\.9\.\*' matches no"),
        (['segmentor.freeze="*"'], "all 14 parameters are frozen"),
    ],
)
def test_bad_first_weights_end_it_before_data_are_read(
    toy_shards: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    overrides: list[str],
    message: str,
) -> None:
    def unread(self: Any, index: int) -> Any:
        raise AssertionError("a sample was read")

    monkeypatch.setattr("distseg.data.samples.SampleSet.load", unread)
    keys = SETTINGS | {"data.shards": toy_shards, "run_dir": tmp_path / "run"}
    named = [item.replace("{run}", str(run)) for item in overrides]
    assert main(["train", *loading.arguments(keys), *named]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("error") == 1
    assert not (tmp_path / "run").exists()


@no_curves()
def test_a_run_without_the_network_is_refused(run: Path, tmp_path: Path, toy_shards: Path) -> None:
    keys = {"mode": "supervised", "steps": 1, "run_dir": tmp_path / "run"}
    fit(**SETTINGS | keys | {"data.shards": toy_shards})
    with pytest.raises(InputError, match="has no discriminator"):
        initial_weights(str(tmp_path / "run"), "discriminator")


def test_a_folder_of_its_name_is_no_match_for_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("random", "imagenet"):  # data often lie in a folder called imagenet
        (tmp_path / word).mkdir()
        assert initial_weights(word, "segmentor") == word


def torchvisions_deeplabv3(encoder: dict[str, torch.Tensor], channels: int) -> dict[str, Any]:
    """A state dict of torchvision's deeplabv3_resnet101 (0.29.2) with its auxiliary classifier."""

    def normalised(key: str, size: int) -> dict[str, torch.Tensor]:
        names = ("weight", "bias", "running_mean", "running_var")
        numbers = {f"{key}.{name}": torch.rand(size) for name in names}
        return numbers | {f"{key}.num_batches_tracked": torch.tensor(3)}

    state = {f"backbone.{key}": value for key, value in encoder.items()}
    # the 1x1 branch, the atrous ones, and the image-level one, whose layer 0 is the pooling
    for branch, layer, kernel in [(0, 0, 1), (1, 0, 3), (2, 0, 3), (3, 0, 3), (4, 1, 1)]:
        key = f"classifier.0.convs.{branch}"
        state[f"{key}.{layer}.weight"] = torch.rand(8, channels, kernel, kernel)
        state |= normalised(f"{key}.{layer + 1}", 8)
    state["classifier.0.project.0.weight"] = torch.rand(8, 40, 1, 1)
    state |= normalised("classifier.0.project.1", 8)
    state["classifier.1.weight"] = torch.rand(8, 8, 3, 3)
    state |= normalised("classifier.2", 8)
    state["aux_classifier.0.weight"] = torch.rand(4, channels // 2, 3, 3)
    state |= normalised("aux_classifier.1", 4)
    for key, wide in (("classifier.4", 8), ("aux_classifier.4", 4)):
        state |= {f"{key}.weight": torch.rand(21, wide, 1, 1), f"{key}.bias": torch.rand(21)}
    return state


@pytest.mark.parametrize("auxiliary", [False, True])
def test_torchvisions_deeplabv3_gives_its_encoder(auxiliary: bool, tmp_path: Path) -> None:
    """The head is another one there: a 3x3 more, and a norm where the paper has none."""
    name, options = "deeplabv3_resnet101", {"width": 2, "auxiliary": auxiliary}
    encoder = build_segmentor(name, 3, init="random", **options).encoder.state_dict()
    encoder = {key: torch.rand_like(value.float()).to(value) for key, value in encoder.items()}
    torch.save(torchvisions_deeplabv3(encoder, 64), tmp_path / "coco.pth")
    loaded = build_segmentor(name, 3, init=str(tmp_path / "coco.pth"), **options)
    assert all(torch.equal(t, encoder[key]) for key, t in loaded.encoder.state_dict().items())
    report = loaded.init_report
    assert report is not None and set(report.loaded) == set(encoder)
    assert all(key.startswith(("classifier.", "aux_classifier.")) for key in report.left_over)
    assert "classifier.4.weight" in report.left_over and report.missing == ()
