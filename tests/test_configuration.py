"""Configuration: precedence, and one clear error for every kind of bad value."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from distseg.cli import main
from distseg.config import compare, from_data, layers, loading, presets, reference
from distseg.config.keys import Key, key, keys_of
from distseg.config.layers import preset_names
from distseg.config.names import KEYS, OLD_NAMES, SECTIONS, find, with_full_names
from distseg.config.schema import WITH_DISCRIMINATOR, Config
from distseg.models import build_segmentor
from distseg.runs import checkpoint
from distseg.train.dry_run import summary
from distseg.train.initial import initial_weights
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


def test_every_preset_loads_and_names_itself(toy_shards: Path) -> None:
    for name in preset_names():
        shards = [f"data.shards={toy_shards}"] if name == "own" else []
        assert loading.load([f"preset={name}", *shards]).preset == name


def test_a_preset_takes_from_the_data_what_is_not_said(
    toy_shards: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(from_data, "_told", set())  # by other tests
    caplog.set_level(logging.WARNING, logger="distseg.config")  # which other tests have quietened
    own = ["preset=own", f"data.shards={toy_shards}"]
    config = loading.load(own)
    # of images of median 62 x 68 px; 30 epochs of 8 images would be 15 steps
    assert (config.data.crop_px, config.batch_size, config.steps) == (64, 16, 300)
    every = (
        config.schedule.warmup_steps,
        config.evaluate.every_steps,
        config.checkpoint.every_steps,
    )
    assert every == (30, 60, 30) and config.data.num_classes is None
    said = "data.crop_px=64 batch_size=16 steps=300"
    assert said in caplog.text and "8 labelled images of median 62x68 px" in caplog.text
    # what is said counts, wherever it stands, and the rest goes by it
    asked = loading.load(["steps=50", *own, "data.crop_px=96"])
    assert (asked.data.crop_px, asked.steps, asked.evaluate.every_steps) == (96, 50, 10)
    assert loading.load([*own, "data.crop_px=288"]).batch_size == 8
    monkeypatch.setattr(from_data, "MIN_STEPS", 0)
    # 30 epochs of the eight labels, or of half of them, to hundreds
    for labelled, steps in (("all", 200), ("1/2", 100)):
        assert loading.load([*own, "batch_size=1", f"data.labelled={labelled}"]).steps == steps
    # a file is of all sets together, and not of each of them
    (tmp_path / "keys.txt").write_text("a b c d")
    both = [f"data.shards=[{toy_shards},{toy_shards}/]", f"data.labelled={tmp_path}/keys.txt"]
    assert loading.load([*own, *both, "batch_size=1"]).steps == 100
    with pytest.raises(InputError, match=r"(?s)preset=own without data\.shards.*distseg pack"):
        loading.load(["preset=own"])
    with pytest.raises(InputError, match="no split 'nowhere'"):
        loading.load([*own, "data.train_split=nowhere"])


@pytest.mark.parametrize(
    ("num", "size", "crop_px", "batch_size", "steps"),
    [
        (2, (60, 80), 64, 16, 300),
        (572, (240, 320), 224, 16, 1100),
        (330, (375, 500), 352, 8, 1200),
        (2975, (1024, 2048), 512, 8, 11200),
        (10**6, (20, 20), 64, 16, 20_000),
    ],
)
def test_sizes_and_steps_fit_the_images(
    num: int,
    size: tuple[int, int],
    crop_px: int,
    batch_size: int,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(from_data, "_look", lambda config: from_data._Images(num, *size))
    config = loading.load(["preset=own", "data.shards=x"])
    assert (config.data.crop_px, config.batch_size, config.steps) == (crop_px, batch_size, steps)


def test_a_part_is_chosen_by_its_name_and_drops_the_other_ones_options() -> None:
    config = loading.load(["preset=stanford", "discriminator=fully_convolutional"])
    assert config.discriminator.name == "fully_convolutional"
    assert config.discriminator.options == {}
    kept = loading.load(["preset=stanford", "discriminator=two_branch"])
    assert kept.discriminator.options == {"width": 0.5}


def test_options_and_weights_are_of_the_network_that_is_named_wherever_they_stand() -> None:
    asked = ["segmentor.options.dropout=0.2", "segmentor.init=weights.pth"]
    for name in ("segmentor=deeplabv3_resnet50", "segmentor=net.py:Net"):
        before, after = (
            loading.load(["preset=toy", *both]) for both in ([*asked, name], [name, *asked])
        )
        assert before == after
        assert (
            before.segmentor.options == {"dropout": 0.2} and before.segmentor.init == "weights.pth"
        )
    # and with the network that they were said of they go
    other = ["segmentor=multiscale", "segmentor.options.hidden=64", "segmentor=fcn32s_vgg16"]
    assert loading.load(["preset=toy", "segmentor.init=random", *other]).segmentor.options == {}


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
        ("steps=0", "from 1 to 99999999"),
        ("steps", "key=value"),
        ("loss.adv_weight=nan", "loss.adv_weight=nan"),
        ("data.horizontal_flip=maybe", "data.horizontal_flip"),
        ("data=3", "unknown key 'data'"),
        ("loss.adv_form=wgan", "one of: non_saturating, saturating, hinge, least_squares"),
        ("loss.adv_form=hinge loss.real_target=0.9", "loss.real_target=1"),
        ("mode=semi_supervised loss.adv_form=hinge", "write semi.weight=0"),
        ("evaluate.scales=[1,9]", "numbers from 0.1 to 8"),
        ("data.cache_bytes=-1", "a finite number from 0 on"),
        ("data.crop_px.more=1", "unknown key 'data.crop_px.more'"),
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
        loading.load(["preset=toy", *argument.split(" ")])
    assert expected in str(caught.value)


def test_differences_leave_out_what_may_change_on_resume() -> None:
    old = loading.load(["preset=toy"])
    free = ["data.num_threads=7", "data.keep_decoded_bytes=1e9", "tracking.wandb=disabled"]
    new = loading.load(["preset=toy", *free, "loss.adv_weight=1"])
    assert loading.differences(old, new) == {"loss.adv_weight": (0.05, 1.0)}


def test_a_runs_teacher_counts_only_where_it_has_one() -> None:
    """A default that has changed since refuses no run without one."""
    told = ["run_dir=none", "data.shards=unused"]
    joint = "consistency.batch_norm=joint"
    assert not loading.differences(loading.load([*told, joint]), loading.load(told))
    told += ["mode=consistency", "consistency.weight=1", "ema_decay=0.9"]
    found = loading.differences(loading.load([*told, joint]), loading.load(told))
    assert found == {"consistency.batch_norm": ("joint", "auto")}


def test_differences_name_a_term_and_not_the_empty_dictionary_without_it() -> None:
    words = ["preset=toy", "run_dir=r"]
    old, new = loading.load([*words, "loss.terms.dice=0.5"]), loading.load(words)
    for found in (loading.differences(old, new), loading.differences(new, old)):
        assert {*found} >= {"loss.terms.dice.weight"} and "loss.terms" not in found
        assert all(name.startswith("loss.terms.dice.") for name in found)


def test_without_shards_the_commands_that_make_them_are_named() -> None:
    with pytest.raises(InputError, match="distseg pack"):
        loading.load(["steps=5"])


def test_a_preset_with_another_network_leaves_its_bases_options_behind() -> None:
    base, semi = (loading.load([f"preset={name}"]) for name in ("stanford", "stanford_semi"))
    assert (base.discriminator.name, base.discriminator.options) == ("two_branch", {"width": 0.5})
    assert (semi.discriminator.name, semi.discriminator.options) == ("fully_convolutional", {})
    assert semi.segmentor == base.segmentor


@dataclass
class Example:
    """A schema of its own."""

    side: int = key(2, "a side", unit="px", low=1, high=4, on_resume=True)
    names: list[str] = key(["a"], "some names")
    word: str = key("x", "a word", choices=("x", "y"))


def test_a_key_is_an_ordinary_field_that_omegaconf_understands() -> None:
    assert Example() == Example(2, ["a"], "x")
    assert Example().names is not Example().names
    merged = OmegaConf.merge(OmegaConf.structured(Example), {"side": 3})
    assert OmegaConf.to_object(merged) == Example(3, ["a"], "x")
    with pytest.raises(TypeError, match="positional"):
        key(1, "meaning", "px")  # type: ignore[misc]
    expected = Key(
        *("a side", "side", "int", 2), low=1, high=4, unit="px", on_resume=True, grouping="none"
    )
    assert keys_of(Example)["side"] == expected
    assert keys_of(Example)["word"].choices == {"x": "", "y": ""}


def test_a_field_without_a_description_is_refused() -> None:
    @dataclass
    class Bare:
        side: int = 2

    with pytest.raises(TypeError, match=r"Bare\.side"):
        keys_of(Bare)


def test_the_keys_are_those_of_the_configuration_with_their_defaults() -> None:
    values = loading.flattened(loading.to_dict(Config()))
    assert list(KEYS) == list(values)
    assert {name: entry.default for name, entry in KEYS.items()} == values
    for name, entry in KEYS.items():
        assert entry.meaning, name
        assert not entry.choices or entry.default in entry.choices, name


def test_what_holds_for_a_section_holds_for_its_keys() -> None:
    assert KEYS["tracking.tags"].on_resume and not KEYS["tracking.tags"].at_evaluation
    assert KEYS["evaluate.every_steps"].at_prediction
    assert KEYS["discriminator_optimizer.lr"].modes == WITH_DISCRIMINATOR
    assert KEYS["segmentor_optimizer.lr"].modes == () and KEYS["loss.ce_reduction"].modes == ()
    assert KEYS["evaluate.scales"].grouping == "view" and KEYS["evaluate.scales"].on_resume


def test_a_key_of_a_dictionary_is_found_as_that_dictionary() -> None:
    assert find("segmentor.options.width") is KEYS["segmentor.options"]
    assert find("segmentor") is None and find("data.shards.more") is None and find("") is None


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_an_old_name_is_understood_with_one_note(
    old: str, new: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_noted", set())
    value = 3 if KEYS[new].type == "int" else not KEYS[new].default
    with caplog.at_level(logging.WARNING, logger="distseg.config"):
        for _ in range(2):
            config = loading.load(["preset=toy", f"{old}={value}"])
    assert loading.flattened(loading.to_dict(config))[new] == value
    assert [record.getMessage() for record in caplog.records] == [
        f"note: {old} is now called {new}"
    ]


def with_old_names(config: Config) -> str:
    """config.yaml as a version before the renaming wrote it."""
    values = loading.to_dict(config)
    for old, new in OLD_NAMES.items():
        section, _, name = old.rpartition(".")
        inside = values[section] if section else values
        inside[name] = inside.pop(new.rpartition(".")[2])
    assert not set(OLD_NAMES.values()) & loading.flattened(values).keys()
    return yaml.safe_dump(values)


def test_a_saved_configuration_with_old_names_is_read_without_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["data.horizontal_flip=false", "evaluate.horizontal_flip=true"]
    config = loading.load(["preset=toy", *options, "gradient_accumulation_steps=4"])
    path = tmp_path / loading.CONFIG_FILE
    path.write_text(with_old_names(config))
    assert loading.from_file(path) == config and not caplog.records
    loading.check_same(tmp_path, config)
    other = loading.load(["preset=toy", *options, "gradient_accumulation_steps=2"])
    with pytest.raises(InputError, match="gradient_accumulation_steps: 4 there, 2 now"):
        loading.check_same(tmp_path, other)


def test_what_is_no_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / loading.CONFIG_FILE
    for content in ("[1, 2]", "steps: many", "stpes: 3", "a: [", "data: {mirror: maybe}"):
        path.write_text(content)
        with pytest.raises(InputError, match="of this version"):
            loading.from_file(path)


def test_present_names_stay_as_they_are() -> None:
    values = {"data": {"horizontal_flip": True, "shards": "x"}, "steps": 3, "semi": None}
    assert with_full_names(values) == values
    assert with_full_names({"data": "mirror", "evaluate": {"mirror": True}}) == {
        "data": "mirror",
        "evaluate": {"horizontal_flip": True},
    }


def flat(*overrides: str) -> dict[str, object]:
    return loading.flattened(loading.to_dict(loading.load(["preset=toy", *overrides])))


def test_runs_that_differ_in_seed_and_place_only_are_one_setting() -> None:
    free = ["seed=3", "run_dir=x", "data.shards=y", "data.worker_type=process", "max_skips=3"]
    one, other = flat(), flat(*free, "tracking.tags=[a]", "evaluate.num_pictures=0")
    assert compare.setting(one) == compare.setting(other) and not compare.differing(one, other)


def test_a_view_sets_scores_apart_but_not_networks() -> None:
    one, other = flat(), flat("evaluate.horizontal_flip=true")
    assert compare.setting(one) != compare.setting(other) and not compare.differing(one, other)


def test_a_key_that_a_mode_does_not_use_makes_no_difference() -> None:
    plain, other = flat("mode=supervised"), flat("mode=supervised", "semi.weight=0")
    other |= {"loss.adv_form": "saturating", "discriminator.options.width": 2}
    assert compare.setting(plain) == compare.setting(other) and not compare.differing(plain, other)
    assert compare.differing(flat(), flat("semi.threshold=0.9")) == []
    semi = ["mode=semi_supervised", "data.labelled=1/8"]
    differs = compare.differing(flat(*semi), flat(*semi, "semi.threshold=0.9"))
    assert differs == ["semi.threshold"]


def test_an_unknown_key_of_another_version_is_a_difference() -> None:
    assert compare.differing(flat(), {**flat(), "data.cutmix": 1}) == ["data.cutmix"]


def test_help_says_all_that_is_known_of_a_key() -> None:
    text = reference.help_text("loss.adv_form")
    for part in (
        "loss.adv_form: str = non_saturating",
        "saturating      BCE; the segmentor's is - BCE(D(fake), fake)",
        "used with:  mode=adversarial or semi_supervised",
        "Luc et al. 2016, eq. 3",
        "may change: never",
    ):
        assert part in text
    text = reference.help_text("evaluate.mirror")
    assert text.startswith("evaluate.horizontal_flip: bool = false")
    assert "may change: on resuming, at evaluation, at prediction" in text
    assert "range:      from 32 to 4096" in reference.help_text("data.crop_px")
    assert "unit:       px" in reference.help_text("data.crop_px")


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_help_of_a_key_and_of_a_section(command: str, capsys: pytest.CaptureFixture) -> None:
    for arguments, code, part in (
        (["--help", "semi.threshold"], 0, "T_semi"),
        (["-h", "semi.threshold=0.3"], 0, "T_semi"),
        (["--help", "semi"], 0, "semi.adv_start_step = 0"),
        (["--help"], 0, "usage: distseg"),
        (["--help", "semi.treshold"], 2, "did you mean semi.threshold?"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([command, *arguments])
        seen = capsys.readouterr()
        assert exit_.value.code == code and part in (seen.err if code else seen.out)


def test_the_reference_has_a_row_for_every_key_and_a_table_for_every_section() -> None:
    lines = reference.markdown().splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(KEYS)
    assert all(row.replace("\\|", "").count("|") == 6 for row in rows)
    assert [line[3:] for line in lines if line.startswith("## ")] == list(SECTIONS)


def test_the_page_of_the_reference_is_up_to_date() -> None:
    page = Path(__file__).parent.parent / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == reference.markdown(), reference.COMMAND


def test_the_page_of_the_presets_is_up_to_date() -> None:
    page = Path(__file__).parent.parent / "docs" / "presets.md"
    assert page.read_text(encoding="utf-8") == presets.markdown(), presets.COMMAND


def test_a_preset_is_described_by_the_first_sentence_of_its_file() -> None:
    hung, own = presets.described("voc_hung"), presets.described("own")
    assert hung.endswith("adversarial training on PASCAL VOC 2012 with all labels")
    assert own.startswith("Your own images") and own.endswith("docs/your_data.md leads there")
    text = reference.help_text("preset")
    assert all(f"\n    {name} " in text for name in preset_names())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate", "run", "steps=5"], "precision, data.shards, data.val_shards, data.cache_dir"),
        (["evaluate", "run", "mode=supervised"], "evaluate.*, parallel.*"),
        (["predict", "run", "image.png", "--out", "x", "device=cpu"], "one of: precision, eval"),
        (["predict", "run", "image.png", "--out", "x", "accumulate_steps=2"], "as the run was tr"),
    ],
)
def test_what_is_fixed_by_training_is_refused_elsewhere(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("image.png").touch()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert f"argument {arguments[-1]!r}" in message and expected in message


@pytest.mark.parametrize("option", ["num_classes", "init", "name"])
def test_an_option_that_the_package_gives_is_refused(option: str) -> None:
    with pytest.raises(InputError, match=rf"segmentor\.options\.{option}"):
        loading.load(["preset=toy", "segmentor=my.py:Net", f"segmentor.options.{option}=5"])


def test_a_loss_term_has_a_name() -> None:
    with pytest.raises(InputError, match="a name"):
        loading.load(["preset=toy", "loss.terms={'': {use: dice}}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.terms.dice=abc", r"loss\.terms\.dice=abc\n.*weight, a number"),
        ("loss.terms.dice=null", r"loss\.terms\.dice=None\n.*weight, a number"),
        ("loss.terms=3", r"loss\.terms=3\n.*terms by their names"),
        ("loss.terms.dice.wieght=1", r"dice\.wieght\n.*one of: use, weight.*\n.*weight"),
        ("loss.terms.loss/x=1", r"loss/x\n.*letters"),
        ("loss.terms.discriminator.use=dice", r"a name that no built-in term has"),
    ],
)
def test_a_wrong_term_is_told_in_the_words_of_the_configuration(
    override: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as found:
        loading.load(["preset=toy", override])
    assert "TermConfig" not in str(found.value)
    short = loading.load(["preset=toy", "loss.terms={dice: 3}"])
    assert short.loss.terms["dice"].weight == 3.0


def test_an_adversarial_run_has_a_loss() -> None:
    zero = ["preset=toy", "mode=adversarial", "loss.ce_weight=0", "loss.adv_weight=0"]
    with pytest.raises(InputError, match=r"mode=adversarial with loss\.ce_weight=0"):
        loading.load(zero)
    loading.load([*zero, "loss.adv_weight=0.1"])
    loading.load([*zero, "loss.terms.dice=1"])
    with pytest.raises(InputError, match=r"mode=domain_adaptation with loss\.ce_weight=0"):
        loading.load([*zero, "mode=domain_adaptation"])
    loading.load([*zero, "mode=domain_adaptation", "semi.entropy_weight=1"])


def test_a_run_is_not_extended_to_fewer_steps(tmp_path: Path) -> None:
    config = loading.load(["preset=toy", "steps=12"])
    (tmp_path / "config.yaml").write_text(loading.to_yaml(config))
    fewer = loading.override(config, ["steps=5", "extend=true"])
    with pytest.raises(InputError, match=r"extend=true with steps=5, and .* of 12 steps"):
        loading.check_same(tmp_path, fewer)


def test_what_follows_the_steps_is_named_when_a_run_is_to_be_extended(
    toy_shards: Path, tmp_path: Path
) -> None:
    own = ["preset=own", f"data.shards={toy_shards}"]
    (tmp_path / "config.yaml").write_text(loading.to_yaml(loading.load([*own, "steps=20"])))
    meant = r"write (extend=true schedule\.warmup_steps=2) to train on to step 30"
    for more in ([], ["extend=true"]):
        with pytest.raises(InputError, match=meant) as refused:
            loading.check_same(tmp_path, loading.load([*own, "steps=30", *more]))
    # what it says is accepted
    words = re.search(meant, str(refused.value))[1].split()  # type: ignore[index]
    assert loading.check_same(tmp_path, loading.load([*own, "steps=30", *words])) == 20
    # another run is not taken for a longer one
    with pytest.raises(InputError, match="run_dir=DIR to start a new run"):
        loading.check_same(tmp_path, loading.load([*own, "steps=30", "seed=5"]))


def test_a_checkpoint_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train first"):
        checkpoint.find(tmp_path, "77")
    folder = tmp_path / "checkpoints" / "step-00000012"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"no checkpoint '77'[\s\S]*or last: 12$"):
        checkpoint.find(tmp_path, "77")
    with pytest.raises(InputError, match=r"segmentor\.init=.*@\n"):
        initial_weights(f"{tmp_path}@", "segmentor")


def test_a_file_stands_on_its_preset_and_below_the_command_line(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    text = "discriminator: large_fov_light\n"
    text += (
        "preset: stanford\nsteps: 7\nsegmentor: multiscale\ndata: {mirror: false, crop_px: 96}\n"
    )
    mine.write_text(text + "segmentor.init: random\nloss: {terms: {dice: 0.5}}\n")
    config = loading.load(["data.crop_px=64", str(mine), "seed=3"])
    preset = loading.load(["preset=stanford"])
    assert (config.steps, config.data.crop_px, config.seed) == (7, 64, 3)
    assert config.batch_size == preset.batch_size and not config.data.horizontal_flip
    # the preset's options were of its own network
    assert config.segmentor.name == "multiscale" and config.segmentor.options == {}
    assert config.discriminator.name == "large_fov_light" and config.discriminator.options == {}
    assert preset.discriminator.options and config.loss.terms["dice"].weight == 0.5
    origins = loading.origins(["data.crop_px=64", str(mine), "seed=3"], config)
    expected = {"data.crop_px": "command line", "steps": str(mine), "device": "default"}
    expected |= {"batch_size": "preset stanford", "run_dir": "from other keys"}
    assert expected.items() <= origins.items() and origins["loss.terms.dice.use"] == str(mine)


def test_the_file_of_a_run_is_the_run_wherever_it_is_called_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "lr=0.1"
    (run / "checkpoints").mkdir(parents=True)
    config = loading.load(["preset=toy", "loss.terms.dice=0.5", "run_dir=runs/lr=0.1"])
    config.code = {"segmentor": "0" * 64}
    (run / "config.yaml").write_text(loading.to_yaml(config))
    again = loading.load(["runs/lr=0.1/config.yaml"])
    # which training fills in
    config.code = {}
    assert again == config
    other = loading.load(["runs/lr=0.1/config.yaml", "run_dir=runs/other", "steps=9"])
    assert (other.run_dir, other.steps) == ("runs/other", 9)
    # it would go on with the run of the former place
    shutil.move(run, tmp_path / "moved")
    with pytest.raises(InputError, match=r"run_dir=moved to go on with it"):
        loading.load(["moved/config.yaml"])
    assert loading.load(["moved/config.yaml", "run_dir=moved"]).run_dir == "moved"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stps: 5", r"mine.yaml: unknown key 'stps'\n.*\n.*did you mean steps\?"),
        ("steps: many", r"mine.yaml: steps=many"),
        ("ema_decay: from_data", r"mine.yaml: ema_decay=from_data"),
        ("- steps", "a list"),
        ("steps: [", "mine.yaml: "),
        ("preset: voc", r"preset=voc \(.*mine.yaml\), preset=toy \(command line\)"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_name(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        loading.load(["preset=toy", str(tmp_path / "mine.yaml")])


def test_a_dry_run_says_where_values_are_from_and_is_a_file_of_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, toy_shards: Path
) -> None:
    words = ["preset=toy", "steps=8", f"data.shards={toy_shards}", 'tracking.tags=["a: b", "#c"]']
    words += ["segmentor=multiscale", "segmentor.init=random", "loss.terms.dice=0.5"]
    assert main(["train", "--dry-run", *words]) == 0
    shown = capsys.readouterr().out
    lines = {line.split(":")[0].rstrip(): line for line in shown.splitlines()}
    assert re.search(r"^steps: 8 +# command line: updates in all", lines["steps"])
    assert re.search(r"^batch_size: 16 +# preset toy: GLOBAL: images per step", shown, re.M)
    assert "# default: what the segmentor learns from" in lines["mode"]
    # 8 steps of 16 of the 8 images
    assert "16.0 epochs of 8 training images" in shown
    segmentor = build_segmentor("multiscale", 8, init="random")
    counted = f"{sum(parameter.numel() for parameter in segmentor.parameters()):,} parameters"
    assert f"segmentor multiscale: {counted}" in shown and "\n# discriminator two_branch" in shown
    (tmp_path / "mine.yaml").write_text(shown)
    assert loading.load([str(tmp_path / "mine.yaml")]) == loading.load(words)


@pytest.mark.parametrize("shards", ["", "not/there"])
def test_a_dry_run_without_the_data_leaves_to_them_what_is_theirs(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture, toy_shards: Path
) -> None:
    words = ["preset=own", "batch_size=4", "run_dir=runs/x"]
    named = [f"data.shards={shards}"] if shards else []
    assert main(["train", "--dry-run", *words, *named]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^  crop_px: from_data +# preset own, from your images: side", shown, re.M)
    assert re.search(r"^steps: from_data ", shown, re.M)
    assert re.search(r"^batch_size: 4 +# command line: GLOBAL", shown, re.M)
    assert shown.startswith("# from your images: data.crop_px, steps, ")
    assert ("not/there is not there yet" in shown) == bool(shards)
    assert "# segmentor deeplabv3plus_efficientnet_lite0, for the classes of" in shown
    # a file that training takes when the data are there
    (tmp_path / "mine.yaml").write_text(shown)
    there = f"data.shards={toy_shards}"
    assert loading.load([str(tmp_path / "mine.yaml"), there]) == loading.load([*words, there])


HALVES = ["gradient_accumulation_steps=2"]
TWO_OUTPUTS = ["mode=domain_adaptation", "adaptation.aux_adv_weight=0.1", "segmentor=multiscale"]


def test_a_dry_run_refuses_what_is_there_and_no_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture, toy_shards: Path
) -> None:
    own = ["train", "--dry-run", "preset=own"]
    for wrong, said in (
        ([f"data.shards={tmp_path}"], "manifest.json"),
        ([f"data.shards={toy_shards}", "data.train_split=nowhere"], "no split 'nowhere'"),
        # what needs no images is checked without them
        (["ema_decay=2"], "ema_decay=2"),
        (["batch_size=3", "strong.labelled=true"], "3 labelled images"),
        ([f"data.shards={toy_shards}", *TWO_OUTPUTS], "segmentor=multiscale, which has no aux"),
        (
            ["batch_size=4", "mode=semi_supervised", "semi.batch_size=5", *HALVES],
            "semi.batch_size=5",
        ),
    ):
        assert main([*own, *wrong]) == 2
        assert said in capsys.readouterr().err
    # for a run they are needed, whatever the preset
    assert main(["train", "preset=own"]) == main(["train", "steps=7"]) == 2


@pytest.mark.parametrize("mode", ["supervised", "consistency"])
def test_a_dry_run_shows_the_networks_of_its_mode(mode: str, toy_shards: Path) -> None:
    words = [f"data.shards={toy_shards}", f"mode={mode}", "ema_decay=0.9"]
    words += [f"consistency.weight={int(mode == 'consistency')}"]  # 0 is refused by no mode
    assert not any("discriminator" in line for line in summary(loading.load(words), 1))


@pytest.mark.parametrize("command", ["report", "summarize", "evaluate", "export", "pictures"])
def test_of_a_folder_of_runs_its_runs_are_named(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    assert main([command, str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    names = ", ".join(f"{tmp_path}/{name}" for name in "abc")
    assert f"to do: name a run in it: {names} or another of its 4 runs" in said
