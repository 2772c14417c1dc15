"""What has a side on GPUs, on the device of `--device`: the same tests dry-run on CPUs.

On a GPU the CPU is the reference, mostly in float64. What the CPU's own tests prove is skipped
there.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distseg
from distseg.config import loading
from distseg.data.plan import Plan
from distseg.data.samples import SampleSet
from distseg.data.stream import TrainStream
from distseg.data.strong import StrongView, strong_draws
from distseg.data.transforms import TrainView
from distseg.distributed.compat import SYNC_BATCH_NORM_FUNCTION
from distseg.distributed.device import allow_tf32, resolve_precision
from distseg.distributed.ranks import Ranks, all_reduce_sum, joined, on_all, on_each, on_main
from distseg.distributed.stop import StopRequest
from distseg.evaluate.evaluator import Evaluator
from distseg.evaluate.inference import TestTimeAugmentation
from distseg.losses.tensors import of_neighbours, sent
from distseg.models import build_segmentor
from distseg.models.batch_norm import BatchNorm2d
from distseg.parallel import wrap
from distseg.parallel.sync_batch_norm import SynchronisedBatchNorm2d
from distseg.runs import checkpoint
from distseg.runs.checkpointer import Checkpointer
from distseg.train.batch import Images
from distseg.train.clock import StepClock
from distseg.train.ema import MovingAverage
from distseg.train.replicas import check_equal
from distseg.train.schedules import phase
from distseg.train.step import Pair, training_step
from distseg.train.trainer import to_device
from shards.reader import ShardReader
from tests import test_engine, test_host_waits
from tests.ranks import Program
from tests.test_engine import NUM_CLASSES, make_batch, make_config, make_networks
from tests.tiny import SETTINGS

pytestmark = pytest.mark.gpu
CPU = Ranks(0, 1, 0, torch.device("cpu"))
STRATEGIES = {"ddp": [], "fsdp": ["parallel.strategy=fsdp"]}
STRATEGIES |= {
    f"deepspeed, stage {stage}": ["parallel.strategy=deepspeed", f"parallel.zero_stage={stage}"]
    for stage in range(4)
}


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """A job of this process alone; NCCL on a GPU."""
    threads = torch.get_num_threads()
    with joined(request.config.getoption("--device"), 120) as ranks:
        allow_tf32(False)
        yield ranks
    torch.set_num_threads(threads)


@pytest.fixture
def gpu(ranks: Ranks) -> torch.device:
    """Of tests that only a GPU can run."""
    if ranks.device.type != "cuda":
        pytest.skip("needs a GPU; other tests have the CPU's side")
    return ranks.device


def difference(found: Tensor, expected: Tensor) -> float:
    """As a share of the size of what is expected."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


# ------------------------------------------------------------------ the job of one process


def test_a_job_of_one_process_has_both_backends(ranks: Ranks) -> None:
    assert all_reduce_sum(torch.ones(3, device=ranks.device)).tolist() == [1, 1, 1]
    tensor = torch.full((5,), 2.0, device=ranks.device)
    dist.all_reduce(tensor)  # all_reduce_sum leaves it out on one rank
    assert tensor.tolist() == [2.0] * 5
    on_host = torch.ones(2)
    dist.all_reduce(on_host)  # by gloo
    assert on_host.tolist() == [1, 1]
    assert on_all(ranks, "x") == ["x"] and on_main(ranks, lambda: 1) == on_each(ranks, lambda: 1)
    stop = StopRequest()
    stop.begin(False)
    assert not stop.agreed()
    stop.begin(True)
    assert stop.agreed()
    stop.release()


def test_nccl_carries_what_is_on_the_gpu(gpu: torch.device) -> None:
    group = dist.group.WORLD
    assert group._get_backend(gpu).name() == "nccl"
    assert group._get_backend(torch.device("cpu")).name() == "gloo"
    for collective in (dist.all_gather_into_tensor, dist.reduce_scatter_tensor):
        out, given = torch.zeros(4, device=gpu), torch.arange(4.0, device=gpu)
        collective(out, given)
        assert out.tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------ the step


@pytest.mark.parametrize("case", test_engine.CASES, ids=" ".join)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steps_equal_the_reference(strategy: str, case: tuple[str, ...], ranks: Ranks) -> None:
    """Written out on the CPU; AdamW in float64, SGD in float32 without TF32."""
    on_gpu, is_zero = ranks.device.type == "cuda", strategy.startswith("deepspeed")
    if not on_gpu and (is_zero or case != test_engine.CASES[4]):
        pytest.skip("tests of the strategy have the CPU's side")
    if is_zero:
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("no deepspeed here")
        if case[0] != "fp32":
            pytest.skip("ZeRO's updates are float32")
    with patch.dict(os.environ):  # DeepSpeed leaves LOCAL_RANK there
        got = test_engine.train(ranks, case, STRATEGIES[strategy])
    expected = reference(*case)
    pairs = zip(got[:2], expected, strict=True)
    worst = max(abs(mine[name] - theirs[name]).max() for mine, theirs in pairs for name in theirs)
    # a GPU adds up in other orders, which AdamW's quotients magnify
    bounds = {"fp64": 1e-9, "fp32": 1e-5} if on_gpu else {"fp64": 1e-12, "fp32": 1e-6}
    assert worst < bounds[case[0]]
    assert not got[3], f"a gradient on {got[3]}"


@functools.lru_cache
def reference(*case: str) -> Any:
    """For all strategies once."""
    return test_engine.reference(*case)


def make_pair(ranks: Ranks, precision: str, overrides: list[str]) -> tuple[Pair, Any]:
    config = make_config(precision, "simultaneous", "adversarial", overrides)
    optimizers = config.segmentor_optimizer, config.discriminator_optimizer
    networks = make_networks("two_branch")
    learners = [wrap(*both, config, ranks) for both in zip(networks, optimizers, strict=True)]
    return Pair.of(config, *learners), config


def images(ranks: Ranks, precision: str, step: int = 0, layout: Any = None) -> Images:
    dtype = torch.float64 if precision == "fp64" else torch.float32
    pixels, label = (part.to(ranks.device) for part in make_batch(step, dtype))
    return Images(pixels.contiguous(memory_format=layout or torch.contiguous_format), label)


def gradients(ranks: Ranks, precision: str, overrides: list[str]) -> list[Tensor]:
    """Of one step, of both networks, each in one row; without the loss scale."""
    pair, config = make_pair(ranks, precision, overrides)
    channels_last = config.channels_last and config.parallel.strategy == "ddp"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    learners = pair.segmentor, pair.adversary
    for learner in learners if precision == "fp16" else ():
        learner._loss_scale.scale.fill_(2.0**8)  # type: ignore[attr-defined]  # not to overflow
    training_step(pair, phase(0, config), images(ranks, precision, layout=layout))
    rows = []
    for learner in learners:
        scale = learner._loss_scale  # type: ignore[attr-defined]
        parts = [it.grad.double().flatten() for it in learner.network.parameters()]
        rows.append(torch.cat(parts) / (1.0 if scale is None else scale.scale.double()))
    return rows


# with 24, 11, 8 and 11 bits of a factor, through some ten layers: twice what was seen on a CPU (2 %
# with fp16's, 5 % with bf16's, of the discriminator), as a GPU rounds elsewhere
@pytest.mark.parametrize(
    ("precision", "option", "bound"),
    [
        ("fp32", "tf32=false", 1e-4),
        ("fp32", "tf32=true", 4e-2),
        pytest.param("bf16", "", 0.1, marks=pytest.mark.cpu),
        pytest.param("fp16", "", 4e-2, marks=pytest.mark.cpu),
        ("fp32", "channels_last=true", 1e-4),
        ("fp32", "channels_last=false", 1e-4),
        ("fp32", "compile=true", 1e-4),
        pytest.param("bf16", "compile=true", 0.1, marks=pytest.mark.cpu),
    ],
)
def test_gradients_are_near_those_of_float64(
    precision: str, option: str, bound: float, ranks: Ranks
) -> None:
    if option and ranks.device.type == "cpu":
        pytest.skip("a CPU has no TF32, and its compiler takes a minute")
    expected = gradients(CPU, "fp64", [])
    allow_tf32(option == "tf32=true")
    try:
        found = gradients(ranks, precision, [option] if option else [])
    finally:
        allow_tf32(False)
    for own, exact in zip(found, expected, strict=True):
        assert difference(own, exact) < bound
    if precision != "fp32":  # else nothing was rounded
        assert difference(found[0], expected[0]) > 1e-5


def test_tf32_is_what_the_key_says(gpu: torch.device) -> None:
    if torch.cuda.get_device_capability(gpu) < (8, 0):
        pytest.skip("a GPU without TF32")
    generator = torch.Generator().manual_seed(0)
    # around 0: of positive numbers the errors would cancel
    shapes = (256, 256), (256, 256), (4, 256, 41, 41), (256, 256, 3, 3)
    a, b, x, w = (torch.randn(shape, generator=generator) for shape in shapes)
    expected = a.double() @ b.double(), F.conv2d(x.double(), w.double())
    errors = {}
    for allowed in (True, False):
        allow_tf32(allowed)
        found = a.to(gpu) @ b.to(gpu), F.conv2d(x.to(gpu), w.to(gpu))
        pairs = zip(found, expected, strict=True)
        errors[allowed] = [difference(own, exact) for own, exact in pairs]
    assert max(errors[False]) < 3e-5, errors  # which Winograd's transforms may take of float32
    assert min(errors[True]) > 1e-4 and max(errors[True]) < 2e-3, errors


def test_auto_is_bf16_where_it_is_multiplied(gpu: torch.device, ranks: Ranks) -> None:
    has_bf16 = torch.cuda.get_device_capability(gpu) >= (8, 0)
    assert resolve_precision("auto", ranks) == ("bf16" if has_bf16 else "fp32")


@pytest.mark.cpu
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_overflow_of_one_network_leaves_the_other_alone(strategy: str, ranks: Ranks) -> None:
    pair, config = make_pair(ranks, "fp16", STRATEGIES[strategy])
    learners = {"segmentor": pair.segmentor, "discriminator": pair.adversary}
    for name, learner in learners.items():
        for each in learners.values():
            each._loss_scale.scale.fill_(2.0**12)  # type: ignore[attr-defined]
        # so large that its own gradients pass fp16's largest number, and fp32's
        learner._loss_scale.scale.fill_(2.0**126)  # type: ignore[attr-defined]
        before = {each: weights(of_each) for each, of_each in learners.items()}
        training_step(pair, phase(0, config), images(ranks, "fp16"))
        told = {each: of_each.step(1.0) for each, of_each in learners.items()}
        for each, of_each in learners.items():
            was_skipped = each == name
            assert torch.equal(weights(of_each), before[each]) == was_skipped, each
            assert float(told[each]["skips_in_a_row"]) == was_skipped
            scale = 2.0**125 if was_skipped else 2.0**12
            assert float(told[each]["loss_scale"]) == scale
            assert bool(told[each]["grad_norm"].isfinite()) != was_skipped


def weights(learner: Any) -> Tensor:
    network = learner.full_network()
    return torch.cat([it.detach().flatten().clone() for it in network.parameters()])


def test_channels_last_stays_through_updates(ranks: Ranks) -> None:
    pair, config = make_pair(ranks, "fp32", ["channels_last=true"])
    for step in range(2):
        batch = images(ranks, "fp32", step, torch.channels_last)
        training_step(pair, phase(step, config), batch)
        for learner in (pair.segmentor, pair.adversary):
            learner.step(1.0)
    every = [
        tensor
        for learner in (pair.segmentor, pair.adversary)
        for part in learner.state_dict().values()
        for tensor in part.values()
        if tensor.ndim == 4 and min(tensor.shape[1:]) > 1
    ]
    assert len(every) > 6  # weights and their optimizer's
    assert all(it.is_contiguous(memory_format=torch.channels_last) for it in every)


def test_synchronised_batch_norm_of_one_rank_is_batch_norm(ranks: Ranks) -> None:
    """What GPUs and CPUs run on several ranks, against torch's own layer in float64."""
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(6, 5, 7, 9, dtype=torch.float64)
    of_output = torch.randn_like(x)
    plain, own = nn.BatchNorm2d(5).double(), BatchNorm2d(5).to(ranks.device)
    for layer in (plain, own):
        nn.init.constant_(layer.weight, 1.5)
        nn.init.constant_(layer.bias, -0.5)
    own.__class__ = SynchronisedBatchNorm2d
    expected_in, given = x.clone().requires_grad_(), x.float().to(ranks.device).requires_grad_()
    expected = plain(expected_in)
    expected.backward(of_output)
    if given.is_cuda:
        statistics = own.running_mean, own.running_var
        factors = own.eps, own.momentum
        found = SYNC_BATCH_NORM_FUNCTION.apply(
            given, own.weight, own.bias, *statistics, *factors, dist.group.WORLD, 1
        )
    else:
        found = own._normalised_on_cpu(given)
    found.backward(of_output.to(found))
    pairs = [(found, expected), (given.grad, expected_in.grad)]
    pairs += [(own.weight.grad, plain.weight.grad), (own.bias.grad, plain.bias.grad)]
    pairs += [(own.running_mean, plain.running_mean), (own.running_var, plain.running_var)]
    for mine, theirs in pairs:
        assert difference(mine, theirs) < 1e-5


def test_ranks_that_hold_the_same_are_found_equal(ranks: Ranks) -> None:
    for strategy in ("ddp", "fsdp"):
        pair, _ = make_pair(ranks, "fp32", STRATEGIES[strategy])
        check_equal(ranks, pair, 1)


@pytest.mark.parametrize("name", test_host_waits.CASES)
def test_a_step_waits_for_nothing(
    name: str, gpu: torch.device, ranks: Ranks, toy_shards: Path, tmp_path: Path
) -> None:
    """As tests/test_host_waits.py, but by what torch itself says of a GPU."""
    arguments = test_host_waits.settings(test_host_waits.CASES[name], toy_shards, tmp_path)
    trainer, stream = test_host_waits.make_trainer(ranks, [*arguments, "device=cuda"])
    stop: Any = SimpleNamespace(begin=lambda failed: None)
    clock = StepClock(4, 1.0, 0)
    with closing(stream):
        for _ in range(3):  # cuDNN and the allocators make what they keep
            trainer._advance(stream, stop, clock)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                trainer._advance(stream, stop, clock)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.step == 5


def test_a_wait_is_an_error_where_it_is_looked_for(gpu: torch.device) -> None:
    tensor = torch.ones(3, device=gpu)
    ways = [lambda: tensor.sum().item(), lambda: tensor[tensor > 0], lambda: torch.ones(3).to(gpu)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for way in ways:
            with pytest.raises(RuntimeError, match="synchroniz"):
                way()
        sent(torch.ones(3), gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------ data, views, checkpoints


def test_pinned_batches_arrive_whole_while_the_gpu_is_busy(
    gpu: torch.device, ranks: Ranks, toy_shards: Path
) -> None:
    """The stream's blocks are used again as soon as torch lets them: never before they were
    copied.
    """
    samples = SampleSet(ShardReader(toy_shards, "train"))
    options: dict[str, Any] = {"batch_size": 8, "rank": 0, "world_size": 1, "num_threads": 4}
    config = loading.load(["data.shards=unused", "precision=fp32"])

    def stream(pin_memory: bool) -> TrainStream:
        return TrainStream(
            samples, Plan(len(samples), 1), TrainView(96), pin_memory=pin_memory, **options
        )

    work = torch.rand(2048, 2048, device=gpu)
    arrived = []
    with closing(stream(True)) as source:
        for _ in range(40):
            for _ in range(8):  # copies queue behind it, and the host runs ahead
                work = (work @ work).clamp(0, 1)
            batch = next(source)
            assert batch.image.is_pinned() and batch.label.is_pinned()
            arrived.append(to_device(batch, gpu, config))
            del batch
    with closing(stream(False)) as source:
        for found in arrived:
            batch = next(source)
            # divided by 255 there, which may round the last bit otherwise
            assert torch.equal((found.pixels * 255).round().to(torch.uint8).cpu(), batch.image)
            assert torch.equal(found.label.cpu(), batch.label)


@pytest.mark.parametrize("mix", ["cutmix", "classmix", "cutout"])
def test_strong_views_are_the_cpus(mix: str, ranks: Ranks) -> None:
    view = StrongView(mix=mix, jitter_probability=1.0, blur_probability=0.7, mix_probability=0.8)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(8, 3, 64, 64, generator=generator)
    label = torch.randint(0, NUM_CLASSES, (8, 64, 64), generator=generator).to(torch.uint8)
    label[::2, :, 50:] = 255
    draws = strong_draws(3, range(8), NUM_CLASSES)
    found = {}
    for device in (torch.device("cpu"), ranks.device):
        there, labels = pixels.to(device), label.to(device)
        changed = view.changed(there, labels != 255, draws)
        mask = view.mask(of_neighbours(labels), draws)
        mixed = view.mixed(changed, of_neighbours(changed), mask)
        found[str(device)] = changed, mask, mixed, view.mixed(labels, of_neighbours(labels), mask)
    own, expected = found[str(ranks.device)], found["cpu"]
    for index in (0, 2):  # rounded otherwise, at most
        assert (own[index].cpu() - expected[index]).abs().max() < 1e-5
    for index in (1, 3):
        assert torch.equal(own[index].cpu(), expected[index])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_checkpoint_holds_its_step_though_the_next_ones_go_on(
    strategy: str, ranks: Ranks, tmp_path: Path
) -> None:
    pair, config = make_pair(ranks, "fp32", STRATEGIES[strategy])
    ema = MovingAverage(pair.segmentor, 0.9)
    learners = {"segmentor": pair.segmentor, "discriminator": pair.adversary, "ema": ema}

    def step(number: int) -> None:
        training_step(pair, phase(number, config), images(ranks, "fp32", number))
        for learner in (pair.segmentor, pair.adversary):
            learner.step(1.0)
        ema.update()

    step(0)
    expected = values(learners)
    checkpoints = Checkpointer(tmp_path, 2, {}, ranks, async_save=True)
    checkpoints.save(learners, {"step": 1})
    for number in range(1, 4):  # while it is copied and written
        step(number)
    checkpoints.wait()
    assert any(not torch.equal(values(learners)[name], expected[name]) for name in expected)
    found = checkpoint.verified(checkpoint.find(tmp_path, "last"))
    assert checkpoints.load(found, learners) == {"step": 1}
    loaded = values(learners)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def values(learners: dict[str, Any]) -> dict[str, Tensor]:
    """All that a checkpoint holds, on the host."""
    return {
        f"{name}/{part}/{key}": getattr(tensor, "_local_tensor", tensor).detach().cpu().clone()
        for name, learner in learners.items()
        for part, tensors in learner.state_dict().items()
        for key, tensor in tensors.items()
    }


# ------------------------------------------------------------------ evaluation, export, a whole run


def make_segmentor() -> nn.Module:
    """With logits that are far apart, or rounding would choose between classes."""
    torch.manual_seed(0)
    options = {"norm": "batch", "hidden": 16}
    network = build_segmentor("multiscale", 8, init="random", **options).eval()
    with torch.no_grad():
        scale = network(torch.rand(1, 3, 64, 64)).std()
        network.classifier[-1].weight.div_(scale / 4)
    return network


def test_an_evaluation_is_the_cpus(ranks: Ranks, toy_shards: Path) -> None:
    samples, network = SampleSet(ShardReader(toy_shards, "val")), make_segmentor()
    tallies = {}
    for own in (CPU, ranks):
        look = TestTimeAugmentation((0.75, 1.25), True, "fp32", own.device)
        network = network.to(own.device)
        evaluator = Evaluator(lambda network=network: network, samples, own, look, num_threads=2)
        scores = evaluator()
        tallies[own.device.type] = evaluator.tally, scores
    (tally, scores), (expected, of_cpu) = tallies[ranks.device.type], tallies["cpu"]
    assert abs(scores.mean_iou - of_cpu.mean_iou) < 1e-3
    confusion, exact = (np.asarray(it.confusion.cpu()) for it in (tally, expected))
    assert np.array_equal(confusion.sum(1), exact.sum(1))  # every pixel once, under its class
    assert abs(confusion - exact).sum() <= 2e-3 * exact.sum()


def test_an_exported_program_gives_the_same_there(gpu: torch.device, tmp_path: Path) -> None:
    from torch.export.passes import move_to_device_pass

    from distseg.export import formats
    from shards.sample import STANFORD

    segmentor, path = make_segmentor(), tmp_path / "model.pt2"
    about = formats.describe("multiscale", {}, list(STANFORD.names), STANFORD.palette)
    formats.export(segmentor, about, "torch-export", path)
    image = torch.rand(2, 3, 97, 131)
    expected = formats.FullResolution(segmentor)(image)
    program = move_to_device_pass(torch.export.load(path), gpu)
    with torch.no_grad():
        found = program.module()(image.to(gpu))
    assert found.is_cuda
    assert difference(found, expected) < 1e-4


def test_a_run_goes_on_is_evaluated_and_predicts_as_on_a_cpu(
    gpu: torch.device, toy_shards: Path, tmp_path: Path
) -> None:
    """The command itself, from shards to scores."""
    case = ["mode=semi_supervised", "data.labelled=1/2", "precision=auto", "semi.start_step=0"]
    words = [*loading.arguments(SETTINGS), *case, f"data.shards={toy_shards}", "device=cuda"]
    words += [f"run_dir={tmp_path / 'run'}", "data.num_threads=2", "checkpoint.every_steps=2"]
    for steps in (2, 4):
        program = Program(["train", *words, f"steps={steps}", "extend=true"])
        output, _ = program.communicate()
        assert program.returncode == 0, output
    assert "resumed at step 2" in output
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert 0 <= scores["val/mean_iou"] <= 1
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    found = [
        distseg.load(tmp_path / "run", device=device).probabilities(image)
        for device in ("cuda", "cpu")
    ]
    assert np.abs(found[0] - found[1]).max() < 0.05  # in bf16 there, in fp32 here
