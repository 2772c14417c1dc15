"""Configuration: precedence, and one clear error for every kind of bad value."""

from __future__ import annotations

from pathlib import Path

import pytest

from distseg.config import loading
from shards.errors import InputError


def test_later_values_win() -> None:
    defaults = loading.load(["data.shards=x"])
    preset = loading.load(["preset=stanford"])
    overridden = loading.load(["loss.adv_weight=0.3", "preset=stanford", "loss.adv_weight=0.2"])
    assert defaults.segmentor_optimizer.encoder_lr_factor == 1.0
    assert preset.segmentor_optimizer.encoder_lr_factor == 0.25
    assert overridden.loss.adv_weight == 0.2
    assert loading.load(["preset=toy", "loss.adv_weight=1", "loss.adv_weight=0", "mode=supervised"])
    assert overridden.segmentor_optimizer.encoder_lr_factor == 0.25


def test_every_preset_loads_and_names_itself() -> None:
    for name in loading.preset_names():
        assert loading.load([f"preset={name}"]).preset == name


def test_a_part_is_chosen_by_its_name_and_drops_the_other_ones_options() -> None:
    config = loading.load(["preset=stanford", "discriminator=fully_convolutional"])
    assert config.discriminator.name == "fully_convolutional"
    assert config.discriminator.options == {}
    kept = loading.load(["preset=stanford", "discriminator=two_branch"])
    assert kept.discriminator.options == {"width": 0.5}


def test_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = loading.load(
        ["preset=toy", "evaluate.scales=[0.75,1,1.25]", "segmentor.options.dropout=0.2"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(loading.to_yaml(config))
    assert loading.from_file(path) == config


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("loss.adv_wieght=1", "did you mean loss.adv_weight?"),
        ("adv_weight=1", "did you mean loss.adv_weight?"),
        ("preset=stanfrod", "did you mean stanford?"),
        ("mode=supervized", "did you mean supervised?"),
        ("steps=many", "steps=many"),
        ("steps=1.5", "steps=1.5"),
        ("steps=0", "from 1 to 1000000000"),
        ("steps", "key=value"),
        ("loss.adv_weight=nan", "loss.adv_weight=nan"),
        ("data.horizontal_flip=maybe", "data.horizontal_flip"),
        ("data=3", "unknown key 'data'"),
        ("evaluate.scales=[]", "at least one scale"),
        ("evaluate.scales=[1,", "a YAML value"),
        ("evaluate.scales=[nan]", "from 0.1 to 8"),
        ("evaluate.window_px=500", "multiples of 32"),
        ("evaluate.window_px=224", "at most half the window"),
        ("steps=${nothing}", "plain values"),
        ("run_dir=???", "plain values"),
        ("segmentor_optimizer.beta1=2", "from 0 to 0.99999"),
        ("data.scale_min=3", "scale_min <= scale_max"),
    ],
)
def test_bad_values_are_named_with_what_to_do(argument: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        loading.load(["preset=toy", argument])
    assert expected in str(caught.value)


def test_differences_leave_out_what_may_change_on_resume() -> None:
    old = loading.load(["preset=toy"])
    free = ["data.num_threads=7", "data.keep_decoded_bytes=1e9", "tracking.wandb=disabled"]
    new = loading.load(["preset=toy", *free, "loss.adv_weight=1"])
    assert loading.differences(old, new) == {"loss.adv_weight": (0.05, 1.0)}


def test_without_shards_the_commands_that_make_them_are_named() -> None:
    with pytest.raises(InputError, match="distseg pack"):
        loading.load(["steps=5"])


def test_a_preset_with_another_network_leaves_its_bases_options_behind() -> None:
    base, semi = (loading.load([f"preset={name}"]) for name in ("stanford", "stanford_semi"))
    assert (base.discriminator.name, base.discriminator.options) == ("two_branch", {"width": 0.5})
    assert (semi.discriminator.name, semi.discriminator.options) == ("fully_convolutional", {})
    assert semi.segmentor == base.segmentor
