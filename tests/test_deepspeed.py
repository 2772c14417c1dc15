"""DeepSpeed's learner, every ZeRO stage.

The same steps as one process, the same skips, the same checkpoints.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distseg.cli import main
from distseg.config import loading
from distseg.config.schema import Config
from distseg.distributed.ranks import Ranks, setup, teardown
from distseg.parallel import check_installed, check_settings, deepspeed_config, wrap
from distseg.parallel.parameter_shards import is_sharded, num_elements
from distseg.runs.checkpoint import find, verified
from distseg.runs.checkpointer import Checkpointer
from distseg.train.batch import Images
from distseg.train.ema import MovingAverage
from distseg.train.replicas import check_equal
from distseg.train.schedules import phase
from distseg.train.step import Pair, training_step
from shards.errors import InputError
from tests import (
    test_adaptation,
    test_adversary,
    test_consistency,
    test_engine,
    test_engine_terms,
    test_running_statistics,
    tiny,
)
from tests.ranks import Program, environments, run_ranks
from tests.test_engine import BATCH, STEPS, make_batch, make_config, make_networks
from tests.test_train import DROPOUT, finish, small, start

MISSING = importlib.util.find_spec("deepspeed") is None
needs_deepspeed = pytest.mark.skipif(
    MISSING, reason="no deepspeed here: pip install -e '.[deepspeed]'"
)
STAGES = [0, 1, 2, 3]
# stage 3 keeps small parameters whole otherwise
SPLIT_ALL = Path(__file__).parent / "deepspeed_split_all.json"

CASES = [
    ("fp32", "simultaneous", "two_branch"),
    ("fp32", "blocks", "two_branch"),
    ("fp32", "simultaneous", "fully_convolutional"),
    ("fp32", "simultaneous", "two_branch", "supervised"),
]
TERMS = [(test_engine_terms.CASES[name], 1) for name in ("semi, a score per cell", "semi, blocks")]
TERMS += [(test_engine_terms.IN_PARTS[0], 2)]  # the images of a step in two parts
TWO_OUTPUTS = test_adaptation.CASES["two outputs"]  # which two discriminators judge


def deepspeed(stage: int) -> list[str]:
    split_all = [f"parallel.deepspeed_config={SPLIT_ALL}"] if stage == 3 else []
    return ["parallel.strategy=deepspeed", f"parallel.zero_stage={stage}", *split_all]


STRATEGIES = {"ddp": [], "fsdp": ["parallel.strategy=fsdp"]} | {
    f"stage {n}": deepspeed(n) for n in STAGES
}

# stage 3 has no whole teacher, and refuses one
WITH_TEACHER = ("ddp", "stage 0", "stage 1", "stage 2")
TAUGHT = ["consistency.alignment=0.6", "strong.mix=classmix", "gradient_accumulation_steps=3"]

PRECISELY = [("fp16", 0), ("fp16", 1), ("fp16", 2), ("fp16", 3), ("bf16", 2)]


def make_pair(config: Config, ranks: Ranks) -> Pair:
    optimizers = (config.segmentor_optimizer, config.discriminator_optimizer)
    learners = [
        wrap(*both, config, ranks)
        for both in zip(make_networks("two_branch"), optimizers, strict=True)
    ]
    return Pair.of(config, *learners)


def one_step(pair: Pair, config: Config, ranks: Ranks, step: int) -> dict[str, dict[str, float]]:
    """A step on this rank's part of a batch, and the updates; what each learner said of its own."""
    share = slice(
        ranks.rank * BATCH // ranks.world_size, (ranks.rank + 1) * BATCH // ranks.world_size
    )
    training_step(
        pair,
        phase(step, config),
        Images(*(part[share] for part in make_batch(step, torch.float32))),
    )
    return {
        name: {k: float(v) for k, v in it.step(1.0).items()}
        for name, it in learners_of(pair).items()
    }


def learners_of(pair: Pair) -> dict[str, Any]:
    return {"segmentor": pair.segmentor, "discriminator": pair.discriminator}


def state_of(learner: Any) -> dict[str, Any]:
    """Every tensor that a checkpoint would hold, and of the network that would be evaluated."""
    parts = learner.state_dict() | {"evaluated": learner.full_network().state_dict()}
    named = {
        f"{part}/{name}": tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
    return {
        name: (t.full_tensor() if is_sharded(t) else t).numpy().copy() for name, t in named.items()
    }


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(abs(one[name] - other[name]).max()) for name in other)


def skip(ranks: Ranks, stage: int) -> list[Any]:
    """Four steps; an infinite gradient on rank 1 in the segmentor at step 1, on rank 0 in the
    discriminator at 2.
    """
    config = make_config("fp32", "simultaneous", "adversarial", deepspeed(stage))
    pair, history = make_pair(config, ranks), []
    spoiled = {
        (1, 1): pair.segmentor.network.head[2].weight,
        (2, 0): pair.discriminator.network.verdict.bias,
    }
    for step in range(4):
        bad = spoiled.get((step, ranks.rank))
        handle = (
            None
            if bad is None
            else bad.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
        )
        said = one_step(pair, config, ranks, step)
        if handle is not None:
            handle.remove()
        check_equal(ranks, pair, step)
        networks = {
            name: learner.state_dict()["network"] for name, learner in learners_of(pair).items()
        }
        values = {
            name: {k: t.numpy().copy() for k, t in tensors.items()}
            for name, tensors in networks.items()
        }
        history.append((said, values))
    return history


def train_precisely(ranks: Ranks, precision: str, overrides: Sequence[str]) -> Any:
    """Loss scales and skips of six steps, and the networks and the segmentor's moving average after
    them.

    In one memory format for all, that of ZeRO's flat parameters: a CPU without bf16 sums products
    in bf16, so that another format, and with it another order, gives a gradient that is off by
    bf16's rounding.
    """
    config = make_config("fp32", "simultaneous", "adversarial", [*overrides, "channels_last=false"])
    config.precision = precision
    pair = make_pair(config, ranks)
    learners, counts = learners_of(pair), []
    if config.parallel.zero_stage < 3:
        learners["average"] = MovingAverage(pair.segmentor, decay=0.5)
    for step in range(STEPS):
        said = one_step(pair, config, ranks, step)
        counts += [(it.get("loss_scale"), it["skips"]) for it in said.values()]
        if "average" in learners:
            learners["average"].update()
    tensors = {name: learner.state_dict()["network"] for name, learner in learners.items()}
    return counts, {
        name: {k: t.numpy().copy() for k, t in own.items()} for name, own in tensors.items()
    }


def go_on(ranks: Ranks, run_dir: Path, overrides: Sequence[str], resumed: bool) -> dict[str, Any]:
    """The state after six steps, saved after three or resumed from what was."""
    config = make_config("fp32", "simultaneous", "adversarial", overrides)
    config.segmentor_optimizer.name = "adamw"
    pair = make_pair(config, ranks)
    learners = learners_of(pair)
    checkpoints = Checkpointer(run_dir, 2, {}, ranks)
    if resumed:
        for step in range(2):  # nothing of what these change may stay
            one_step(pair, config, ranks, step + 10)
        assert checkpoints.load(verified(find(run_dir, "last")), learners) == {"step": 3}
    for step in range(3 if resumed else 0, STEPS):
        one_step(pair, config, ranks, step)
        if step == 2 and not resumed:
            checkpoints.save(learners, {"step": 3})
    return {name: state_of(learner) for name, learner in learners.items()}


def copied_buffer(ranks: Ranks, overrides: Sequence[str]) -> Any:
    """Of a whole copy: a buffer that no state_dict holds, such as an encoder's pixel mean."""
    config, (network, _) = (
        make_config("fp32", "simultaneous", "adversarial", overrides),
        make_networks("two_branch"),
    )
    network.register_buffer("mean", torch.full((3,), 0.25), persistent=False)
    size = sum(parameter.numel() for parameter in network.parameters())
    learner = wrap(network, config.segmentor_optimizer, config, ranks)
    assert sum(num_elements(parameter) for parameter in learner.network.parameters()) == size
    whole: Any = learner.full_network()
    return whole.mean.tolist()


def refusal(ranks: Ranks, file: Path) -> str:
    """What is said of a value that DeepSpeed does not take."""
    if ranks.is_main:
        file.write_text('{"zero_optimization": {"reduce_bucket_size": "large"}}')
    torch.distributed.barrier()
    overrides = [*deepspeed(1), f"parallel.deepspeed_config={file}"]
    try:
        make_pair(make_config("fp32", "simultaneous", "adversarial", overrides), ranks)
    except InputError as error:
        return str(error)
    return ""


def run_steps(ranks: Ranks) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in WITH_TEACHER:
        words = [*TAUGHT, *STRATEGIES[name]]
        results["taught", name] = test_consistency.train(ranks, "fp32", words)
        words = [*test_running_statistics.SEPARATE, *STRATEGIES[name]]
        found = test_running_statistics.buffers_after_steps(ranks, words, "fp32")
        results["statistics", name] = found[0]
    for stage in STAGES:
        results["steps", stage] = [
            test_engine.train(ranks, case, deepspeed(stage)) for case in CASES
        ]
        results["skips", stage] = skip(ranks, stage)
    for stage in (1, 3):
        results["bad batch", stage] = test_engine.bad_batch_on_one_rank(ranks, deepspeed(stage))
    return results


def run_two(ranks: Ranks, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in ("fsdp", "stage 3"):
        results["buffer", name] = copied_buffer(ranks, STRATEGIES[name])
    results["refusal"] = refusal(ranks, folder / "own.json")
    for precision, stage in PRECISELY:
        results[precision, stage] = train_precisely(ranks, precision, deepspeed(stage))
        results[precision] = results.get(precision) or train_precisely(ranks, precision, [])
    for name, overrides in STRATEGIES.items():
        results["final", name] = [
            go_on(ranks, folder / name, overrides, resumed) for resumed in (False, True)
        ]
    return results


def run_three(ranks: Ranks, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for stage in STAGES:
        more = ["precision=fp32", *deepspeed(stage)]
        results["terms", stage] = [
            test_engine_terms.train(ranks, [*each, *more], parts) for each, parts in TERMS
        ]
        adapted = test_adversary.train(ranks, [*TWO_OUTPUTS, *more])
        results["two outputs", stage] = adapted[:2]
    names = list(STRATEGIES)
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        results["resumed", name] = go_on(ranks, folder / name, STRATEGIES[other], True)
    return results


def run_one(ranks: Ranks, folder: Path) -> dict[str, Any]:
    results = {
        ("resumed", f"stage {n}"): go_on(ranks, folder / f"stage {n}", [], True) for n in STAGES
    }
    results["steps", 1] = [test_engine.train(ranks, case, deepspeed(1)) for case in CASES]
    results["again", 1] = train_again()
    return results


def train_again() -> list[Any]:
    """In the next job of a process that has trained in one, as in a notebook."""
    teardown()
    again = setup("cpu", 60)
    return [test_engine.train(again, case, deepspeed(1)) for case in CASES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def steps() -> list[Any]:
    """Of every stage, on two ranks: starting them takes longer than what they do for one test."""
    return run_ranks(2, run_steps)


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[Any]:
    return run_ranks(2, run_two, folder)


@pytest.fixture(scope="module")
def three_ranks(two_ranks: list[Any], folder: Path) -> list[Any]:
    return run_ranks(3, run_three, folder)


@pytest.fixture(scope="module")
def references() -> tuple[list[Any], list[Any]]:
    torch.set_num_threads(1)
    terms = [test_engine_terms.reference(overrides) for overrides, _ in TERMS]
    return [test_engine.reference(*case) for case in CASES], terms


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_six_steps_equal_the_reference(stage: int, steps: list[Any], references: Any) -> None:
    for of_rank in steps:
        for case, got, expected in zip(CASES, of_rank["steps", stage], references[0], strict=True):
            test_engine.check_equal(case, got, expected)


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_semi_supervised_terms_and_images_in_parts_equal_their_formulas(
    stage: int, three_ranks: list[Any], references: Any
) -> None:
    """The last rank's images are void, its mask is empty."""
    for of_rank in three_ranks:
        for case, got, expected in zip(TERMS, of_rank["terms", stage], references[1], strict=True):
            for mine, theirs in zip(got, expected, strict=True):
                assert distance(mine, theirs) <= 1e-6, case


@needs_deepspeed
def test_two_domains_at_two_outputs_equal_their_formulas(three_ranks: list[Any]) -> None:
    *expected, _ = test_adaptation.reference(TWO_OUTPUTS)
    for of_rank in three_ranks:
        for stage in STAGES:
            for mine, theirs in zip(of_rank["two outputs", stage], expected, strict=True):
                assert distance(mine, theirs) <= 1e-6, stage


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_an_infinity_on_one_rank_skips_that_network_on_all(stage: int, steps: list[Any]) -> None:
    expected = {
        "segmentor": [(0, 0), (1, 1), (1, 0), (1, 0)],
        "discriminator": [(0, 0), (0, 0), (1, 1), (1, 0)],
    }
    for of_rank in steps:
        history = of_rank["skips", stage]
        for name, counts in expected.items():
            said = [said[name] for said, _ in history]
            assert [(it["skips"], it["skips_in_a_row"]) for it in said] == counts
            skipped = [in_a_row > 0 for _, in_a_row in counts]
            assert [not torch.tensor(it["grad_norm"]).isfinite() for it in said] == skipped
            values = [values[name] for _, values in history]
            stayed = [distance(values[step - 1], values[step]) == 0 for step in range(1, 4)]
            assert stayed == skipped[1:]
            on_main = [values[name] for _, values in steps[0]["skips", stage]]
            assert all(distance(*both) == 0 for both in zip(values, on_main, strict=True))


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_a_bad_batch_on_one_rank_is_left_out_by_all(stage: int, steps: list[Any]) -> None:
    test_engine.check_bad_batch([of_rank["bad batch", stage] for of_rank in steps])


@needs_deepspeed
@pytest.mark.parametrize("name", WITH_TEACHER[1:])
def test_a_teacher_and_statistics_without_strong_views_are_those_of_ddp(
    name: str, steps: list[Any]
) -> None:
    for of_rank in steps:
        *ours, confident = of_rank["taught", name]
        *theirs, expected = of_rank["taught", "ddp"]
        # the segmentor's parameters, and the teacher's, which are others by now
        for mine, other in zip(ours, theirs, strict=True):
            assert max(abs(a - b).max() for a, b in zip(mine, other, strict=True)) <= 1e-6
        assert max(abs(a - b).max() for a, b in zip(*ours, strict=True)) > 1e-3
        assert confident == expected and max(confident) > 0
        assert distance(of_rank["statistics", name], of_rank["statistics", "ddp"]) <= 1e-6


@pytest.mark.cpu
@needs_deepspeed
@pytest.mark.parametrize(("precision", "stage"), PRECISELY)
def test_a_precision_and_the_average_are_those_of_ddp(
    precision: str, stage: int, two_ranks: list[Any]
) -> None:
    for of_rank in two_ranks:
        counts, states = of_rank[precision, stage]
        expected_counts, expected = of_rank[precision]
        assert counts == expected_counts
        assert all(distance(states[name], expected[name]) <= 1e-5 for name in states)
        assert ("average" in states) == (stage < 3)


@needs_deepspeed
@pytest.mark.parametrize("name", ["fsdp", "stage 3"])
def test_a_whole_copy_has_the_buffers_that_no_checkpoint_holds(
    name: str, two_ranks: list[Any]
) -> None:
    assert [of_rank["buffer", name] for of_rank in two_ranks] == [[0.25] * 3] * 2


@needs_deepspeed
def test_a_value_that_deepspeed_does_not_take_is_refused_by_name(two_ranks: list[Any]) -> None:
    assert all(
        "reduce_bucket_size" in it["refusal"] and "deepspeed_config" in it["refusal"]
        for it in two_ranks
    )


@needs_deepspeed
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_is_plain_and_goes_on_to_the_same_bits(
    name: str, two_ranks: list[Any], folder: Path
) -> None:
    uninterrupted, resumed = two_ranks[0]["final", name]
    for learner, tensors in uninterrupted.items():
        assert distance(resumed[learner], tensors) == 0
    files = sorted(path.name for path in find(folder / name, "last").iterdir())
    if name != "fsdp":
        parts = [
            f"{a}.{b}.safetensors"
            for a in uninterrupted
            for b in ("counters", "network", "optimizer")
        ]
        assert files == sorted([*parts, "state.json"])


@needs_deepspeed
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_goes_on_under_another_strategy_on_another_number_of_ranks(
    name: str, two_ranks: list[Any], three_ranks: list[Any]
) -> None:
    for learner, tensors in two_ranks[0]["final", name][0].items():
        assert distance(three_ranks[0]["resumed", name][learner], tensors) <= 1e-5


@needs_deepspeed
def test_one_rank_takes_the_steps_and_the_checkpoints_of_two(
    two_ranks: list[Any], references: Any, folder: Path
) -> None:
    (one,) = run_ranks(1, run_one, folder)
    for name in ("steps", "again"):
        for case, got, expected in zip(CASES, one[name, 1], references[0], strict=True):
            test_engine.check_equal(case, got, expected)
    for stage in STAGES:
        for learner, tensors in two_ranks[0]["final", f"stage {stage}"][0].items():
            assert distance(one["resumed", f"stage {stage}"][learner], tensors) <= 1e-5


@needs_deepspeed
def test_a_run_resumes_to_the_same_bits_and_keeps_an_average(
    toy_shards: Path, tmp_path: Path
) -> None:
    settings = [
        *tiny.OVERRIDES,
        DROPOUT,
        *deepspeed(2),
        "ema_decay=0.9",
        "segmentor.batch_norm=synchronised",
        "checkpoint.keep_last=4",
    ]
    finish(start(2, toy_shards, tmp_path / "one", *settings))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for step in ("step-00000009", "step-00000012"):
        shutil.rmtree(tmp_path / "two" / "checkpoints" / step)
    assert "resumed at step 6" in finish(start(2, toy_shards, tmp_path / "two", *settings))
    files = [
        sorted((tmp_path / run / "checkpoints/step-00000012").glob("*.safetensors"))
        for run in ("one", "two")
    ]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert len(files[0]) == 8  # three parts of each network, two of the average
    scores = [
        json.loads((tmp_path / run / "evaluation.json").read_text()) for run in ("one", "two")
    ]
    assert scores[0] == scores[1]


@needs_deepspeed
def test_a_split_network_is_evaluated_as_the_one_of_its_checkpoint(
    toy_shards: Path, tmp_path: Path
) -> None:
    finish(start(2, toy_shards, tmp_path, *tiny.OVERRIDES, *deepspeed(3), "ema_decay=0"))
    assert main(["evaluate", str(tmp_path), "device=cpu"]) == 0  # in plain torch, on one rank
    scores = json.loads((tmp_path / "evaluation.json").read_text())
    again = json.loads(next(tmp_path.glob("evaluation-step-00000012*")).read_text())
    assert again["val/mean_iou"] == pytest.approx(scores["val/mean_iou"], abs=1e-3)


@needs_deepspeed
def test_one_process_needs_no_launcher(toy_shards: Path, tmp_path: Path) -> None:
    """DeepSpeed reads LOCAL_RANK, at stage 3 in every forward."""
    settings = [*tiny.OVERRIDES, *deepspeed(3), "ema_decay=0", "steps=1"]
    finish(start(1, toy_shards, tmp_path / "alone", *settings))
    (variables,) = environments(1)
    finish(Program(["train", *small(toy_shards, tmp_path / "launched", *settings)], variables))
    files = [
        sorted(find(tmp_path / name, "last").glob("*.safetensors"))
        for name in ("alone", "launched")
    ]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_a_process_that_sees_one_gpu_of_several_uses_that_one(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As srun and others arrange it.

    The fourth process of the machine has the fourth GPU, and calls it 0.
    """
    import deepspeed as package

    def start_engine(**arguments: Any) -> tuple[str, int]:
        return os.environ["LOCAL_RANK"], arguments["args"].device_rank

    monkeypatch.setattr(package, "initialize", start_engine)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "3")
    settings: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters())
    seen = deepspeed_config.initialize(
        network, optimizer, settings, Ranks(3, 4, 3, torch.device("cuda", 0))
    )
    assert seen == "0"
    assert os.environ["LOCAL_RANK"] == ("0" if stage == 3 else "3")  # stage 3 goes on reading it


COMMON = ["data.shards=unused", "parallel.strategy=deepspeed", "parallel.zero_stage=3"]


@pytest.mark.parametrize(
    "override", ["precision=fp64", "compile=true", "ema_decay=0.9", "parallel.zero_stage=4"]
)
def test_what_does_not_go_together_is_refused(override: str) -> None:
    with pytest.raises(InputError, match=override.split("=")[0]):
        check_settings(loading.load([*COMMON, override]))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bf16": {"enabled": True}}, "precision"),
        ({"train_batch_size": 8}, "batch_size"),
        ({"zero_optimization": {"stage": 1}}, "parallel.zero_stage"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ([1], "JSON"),
    ],
)
def test_deepspeeds_settings_that_are_ours_are_refused_by_name(
    settings: Any, named: str, tmp_path: Path
) -> None:
    (tmp_path / "own.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=named):
        check_settings(
            loading.load([*COMMON, f"parallel.deepspeed_config={tmp_path / 'own.json'}"])
        )


def test_without_deepspeed_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_installed("ddp")
    with pytest.raises(InputError, match=r"pip install -e '\.\[deepspeed\]'"):
        check_installed("deepspeed")
