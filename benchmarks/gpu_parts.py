"""The parts of the GPU check, see benchmarks/gpu.py: each notes its numbers as it goes, so that one
that is stopped leaves those that it has.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from distseg.config import loading
from distseg.config.schema import Config
from distseg.distributed.device import allow_tf32
from distseg.distributed.ranks import Ranks, setup, teardown
from distseg.train.flops import StepWork, convolution_peak

ROOT = Path(__file__).parent.parent
# of a step of Hung et al.: their crops, and as many labelled as unlabelled images
SIZE, BATCH = 321, 10
AIM_MS, LIMIT_MS = 22.0, 12.0  # on an H200: what is aimed at, and the arithmetic at its peak
QUICK = {"size": 33, "batch": 1, "repetitions": 1, "warm_up": 0}
FULL = {"size": SIZE, "batch": BATCH, "repetitions": 30, "warm_up": 8}
# how many layers wide a dry run is: the operations are the same
QUICK_WIDTH = 16


@dataclass(frozen=True)
class Setting:
    """What a part is given. note: keeps a value under a name, at once."""

    device: str  # cpu or cuda
    quick: bool
    note: Callable[[str, Any], None]

    def __getitem__(self, name: str) -> int:
        return (QUICK if self.quick else FULL)[name]


@contextmanager
def job(setting: Setting) -> Iterator[Ranks]:
    """This process as a job of one rank."""
    ranks = setup(setting.device, 120)
    yield ranks
    teardown()


def machine(setting: Setting) -> None:
    """What it is that was measured."""
    from benchmarks.conditions import _processor

    cores = len(os.sched_getaffinity(0))
    setting.note("processor", f"{_processor()}, {cores} cores")
    setting.note("torch", torch.__version__)
    if setting.device == "cpu":
        setting.note("chip", "none: a dry run on the CPU")
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible to torch: check the driver (nvidia-smi)")
    properties = torch.cuda.get_device_properties(0)
    setting.note("chip", properties.name)
    setting.note("memory", f"{properties.total_memory / 2**30:.0f} GiB")
    setting.note("capability", ".".join(map(str, torch.cuda.get_device_capability(0))))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    cudnn = torch.backends.cudnn.version()
    setting.note("libraries", f"CUDA {torch.version.cuda}, cuDNN {cudnn}, NCCL {nccl}")
    setting.note("driver", _driver())


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def tests(setting: Setting) -> None:
    """Every test with a side on GPUs."""
    import pytest

    class Outcomes:
        """Each as soon as it is known, so that a hang loses none."""

        def __init__(self) -> None:
            self.counts = {"passed": 0, "failed": 0, "skipped": 0}

        def pytest_runtest_logreport(self, report: Any) -> None:
            # of a test that was set up well its call counts
            if report.when != "call" and report.outcome == "passed":
                return
            self.counts[report.outcome] += 1
            setting.note("counts", dict(self.counts))
            if report.failed:
                text = str(report.longrepr).strip().splitlines()
                setting.note(f"failed: {report.nodeid}", text[-1] if text else "")

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                self.counts["failed"] += 1
                setting.note("counts", dict(self.counts))
                setting.note(f"failed: {report.nodeid}", str(report.longrepr).splitlines()[-1])

    # a test that hangs leaves its stacks in the log
    arguments = ["tests/test_gpu.py", "-m", "gpu", "-q", "--device", setting.device]
    arguments += ["-o", "faulthandler_timeout=60", "-p", "no:cacheprovider", "--durations=10"]
    if setting.quick:
        arguments += ["-k", "job_of_one_process or strong_views"]
    code = pytest.main(arguments, plugins=[Outcomes()])
    if code:
        raise SystemExit(f"pytest ends with {int(code)}: see the log")


def peaks(setting: Setting) -> None:
    """What the chip can do at best: convolutions, and copies on it and to it."""
    with job(setting) as ranks:
        for precision in ("bf16", "fp16"):
            speed = convolution_peak(ranks.device, precision)
            setting.note(f"{precision} convolutions, TFLOP/s", speed / 1e12)
        for allowed, name in ((True, "with"), (False, "without")):
            allow_tf32(allowed)
            speed = convolution_peak(ranks.device, "fp32")
            setting.note(f"fp32 convolutions {name} TF32, TFLOP/s", speed / 1e12)
        num_bytes = 2**24 if setting.quick else 2**30
        there = torch.zeros(num_bytes, dtype=torch.uint8, device=ranks.device)
        other = torch.empty_like(there)
        pinned = torch.zeros(num_bytes // 8, dtype=torch.uint8)
        pinned = pinned.pin_memory() if ranks.device.type == "cuda" else pinned
        copies: dict[str, tuple[Callable[[], Any], int]] = {
            "copy on it, GB/s read and written": (lambda: other.copy_(there), 2 * num_bytes),
            "copy to it from pinned memory, GB/s": (
                lambda: there[: len(pinned)].copy_(pinned, non_blocking=True),
                len(pinned),
            ),
        }
        for name, (copy, moved) in copies.items():
            seconds = statistics.median(seconds_of(copy, ranks.device, 5, 2))
            setting.note(name, moved / seconds / 1e9)


def seconds_of(
    step: Callable[[], Any], device: torch.device, repetitions: int, warm_up: int
) -> list[float]:
    """Of each of so many steps in a row, as the device sees them: on a GPU from event to event, so
    that where the host is late, that counts.
    """
    for _ in range(warm_up):
        step()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(repetitions):
            step()
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)]
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    pairs = itertools.pairwise(events)
    return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def our_config(setting: Setting, *overrides: str) -> Config:
    """The semi-supervised step of Hung et al., every term on."""
    width = [f"segmentor.options.width={QUICK_WIDTH}"] if setting.quick else []
    sizes = [f"data.crop_px={setting['size']}", f"batch_size={setting['batch']}"]
    sizes += [f"semi.batch_size={setting['batch']}", f"device={setting.device}"]
    return loading.load(["preset=voc_hung_semi", *sizes, *width, *overrides])


def ours(setting: Setting, ranks: Ranks, *overrides: str) -> Callable[[], None]:
    """Our step, as the trainer makes it."""
    from benchmarks.worker import build, stepper

    config = our_config(setting, *overrides)
    allow_tf32(config.tf32)
    return stepper(config, *build(config, ranks, setting["size"], setting["batch"]))


def timed(setting: Setting, ranks: Ranks, name: str, step: Callable[[], None]) -> float:
    """Note what a step takes: ms, its spread, images a second, memory. Returns seconds."""
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
    before = time.perf_counter()
    step()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    first = time.perf_counter() - before
    seconds = seconds_of(step, ranks.device, setting["repetitions"], setting["warm_up"])
    median = statistics.median(seconds)
    setting.note(f"{name}, ms", median * 1e3)
    setting.note(f"{name}, ms from to", [min(seconds) * 1e3, max(seconds) * 1e3])
    setting.note(f"{name}, first step s", first)
    setting.note(f"{name}, images/s", 2 * setting["batch"] / median)
    if ranks.device.type == "cuda":
        most = torch.cuda.max_memory_allocated(ranks.device)
        setting.note(f"{name}, peak memory GB", most / 1e9)
    return median


def step(setting: Setting) -> None:
    """The semi-supervised step of Hung et al., in each precision."""
    from benchmarks.step import flops_of

    with job(setting) as ranks:
        for precision in ("bf16",) if setting.quick else ("bf16", "fp16", "fp32"):
            each = ours(setting, ranks, f"precision={precision}")
            seconds = timed(setting, ranks, f"ours, {precision}", each)
            if precision == "bf16":
                work = flops_of(each)
                setting.note("ours, TFLOP a step", work / 1e12)
            peak = convolution_peak(ranks.device, precision)
            setting.note(f"ours, {precision}, share of peak", work / seconds / peak)
            setting.note(f"ours, {precision}, ms at peak", work / peak * 1e3)
            del each
            _free(ranks)


def reference(setting: Setting) -> None:
    """The same update by the passes of the public trainer, in its precision, fp32."""
    from benchmarks.step import flops_of, reference_step

    with job(setting) as ranks:
        # torch's own defaults, which that trainer leaves as they are
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
        sizes = setting["size"], setting["batch"]
        width = QUICK_WIDTH if setting.quick else 64
        each = reference_step(*sizes, ranks.device, width)
        timed(setting, ranks, "reference, fp32", each)
        setting.note("reference, TFLOP a step", flops_of(each) / 1e12)


def compiled(setting: Setting) -> None:
    """Our step with compile=true; its first step compiles."""
    if setting.quick:
        setting.note("left out", "compiling takes a minute")
        return
    with job(setting) as ranks:
        each = ours(setting, ranks, "precision=bf16", "compile=true")
        timed(setting, ranks, "ours, bf16, compiled", each)


def _free(ranks: Ranks) -> None:
    gc.collect()  # what DDP and its networks hold of each other
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()


class Timeline:
    """When the device begins and ends what is called, by section."""

    def __init__(self, device: torch.device):
        self._device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, section: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which notes its own time under the section."""

        def call(*arguments: Any, **options: Any) -> Any:
            begun = self._mark()
            result = function(*arguments, **options)
            self._spans[section].append((begun, self._mark()))
            return result

        return call

    def seconds(self) -> dict[str, float]:
        """Of each section, in all; waits for the device."""
        if self._device.type != "cuda":
            return {
                name: sum(end - begin for begin, end in spans)
                for name, spans in self._spans.items()
            }
        torch.cuda.synchronize(self._device)
        return {
            name: sum(begin.elapsed_time(end) for begin, end in spans) / 1e3
            for name, spans in self._spans.items()
        }


# functions of distseg/train/step.py by section; what is left is the adversary's gradient at the
# predictions, counts and metrics
SECTIONS = {
    "predict": "segmentor forward",
    "judge": "discriminator forward",
    "segmentor_losses": "losses",
    "discriminator_loss": "losses",
    "split_scores": "losses",
    "backward": "backward of both",
}


def sections(setting: Setting) -> None:
    """Where our step's time goes, and which share of the peak each section reaches."""
    from benchmarks.worker import build, stepper
    from distseg.train import step as module

    with job(setting) as ranks:
        config = our_config(setting, "precision=bf16")
        pair, parts = build(config, ranks, setting["size"], setting["batch"])
        timeline, num_steps = Timeline(ranks.device), setting["repetitions"]
        with ExitStack() as stack:
            for name, section in SECTIONS.items():
                measured = timeline.around(section, getattr(module, name))
                stack.enter_context(patch.object(module, name, measured))
            for learner in (pair.segmentor, pair.adversary):
                measured = timeline.around("updates", learner.step)
                stack.enter_context(patch.object(learner, "step", measured))
            each = stepper(config, pair, parts)
            for _ in range(setting["warm_up"]):
                each()
            timeline._spans.clear()
            total = sum(seconds_of(each, ranks.device, num_steps, 0)) / num_steps
        found = {name: value / num_steps for name, value in timeline.seconds().items()}
        found["all else"] = total - sum(found.values())
        work = _work_of_sections(setting, config, pair)
        peak = convolution_peak(ranks.device, "bf16")
        for name, seconds in found.items():
            setting.note(f"{name}, ms", seconds * 1e3)
            setting.note(f"{name}, share of the step", seconds / total)
            if name in work:
                setting.note(f"{name}, share of peak", work[name] / seconds / peak)


def _work_of_sections(setting: Setting, config: Config, pair: Any) -> dict[str, float]:
    """Operations of the convolutions of a step, by section."""
    work = StepWork.of(config, pair.segmentor.network, pair.adversary.network)
    labelled, every = setting["batch"], 2 * setting["batch"]
    judged = every + labelled  # predictions, and ground truth
    return {
        "segmentor forward": every * work.segmentor,
        "discriminator forward": judged * work.discriminator,
        "backward of both": every * work.segmentor_backward + judged * work.discriminator_backward,
    }


def loop(setting: Setting) -> None:
    """What the training loop adds to the bare step, logging and checkpoints included."""
    from benchmarks.loop import measure

    threads = 1 if setting.quick else max(2, len(os.sched_getaffinity(0)) - 2)
    words = [f"device={setting.device}", "precision=bf16", f"data.num_threads={threads}"]
    words += [f"data.crop_px={setting['size']}"]
    # batch norm needs two images
    words += [f"{key}={max(2, setting['batch'])}" for key in ("batch_size", "semi.batch_size")]
    has_wandb = importlib.util.find_spec("wandb") is not None and not setting.quick
    words += [f"tracking.wandb={'offline' if has_wandb else 'disabled'}", "data.labelled=1/2"]
    if setting.quick:
        words += [f"segmentor.options.width={QUICK_WIDTH}"]
    found = measure(2 if setting.quick else 5, 1 if setting.quick else 40, words)
    bare = statistics.median(found["bare"])
    setting.note("bare step, ms", bare * 1e3)
    setting.note("loop adds, share", statistics.median(found["ratios"]) - 1)
    setting.note("loop adds, share from to", [min(found["ratios"]) - 1, max(found["ratios"]) - 1])
    setting.note("a checkpoint holds the loop, ms", found["saving"] * 1e3)
    setting.note("and is written beside it in, s", found["writing"])
    setting.note("a logged step waits and takes, ms", found["logging"] * 1e3)
    wait = statistics.median(found["waits"])
    setting.note("wait for data, ms a step", wait * 1e3)
    setting.note("wait for data, share of a step", wait / bare)
    setting.note("data threads", threads)


def data(setting: Setting) -> None:
    """How fast views come on this host, and how long a step of the aimed length waits for them."""
    from benchmarks import data as views
    from shards.maps import write_maps
    from shards.pack import pack
    from shards.reader import ShardReader
    from shards.sample import STANFORD

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    samples = views.synthetic(32 if setting.quick else 256)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_maps(folder / "maps.h5", "synthetic", STANFORD, samples, len(samples))
        pack(folder / "maps.h5", folder / "shards", samples_per_shard=32)
        reader = ShardReader(folder / "shards", "train")
        length, kept = (0.05 if setting.quick else 2.0), views.decoded(reader)
        for threads in dict.fromkeys((1, max(1, cores // 2), cores)):
            for name, found in (("anew", views.SampleSet(reader)), ("decoded before", kept)):
                source = _batches(views, found, threads, setting.device == "cuda")
                wall, _ = views.timed(source, length)
                setting.note(f"{threads} threads, {name}, views/s", 1 / wall)
        wait = _wait_at_pace(setting, views, views.SampleSet(reader), cores)
        setting.note(f"{cores} threads, wait of a step of {AIM_MS:.0f} ms, ms", wait * 1e3)


def _batches(views: Any, samples: Any, threads: int, pinned: bool) -> Iterator[Any]:
    options = {"batch_size": views.BATCH, "rank": 0, "world_size": 1, "num_threads": threads}
    view, plan = views.TrainView(views.SIDE, *views.SCALES), views.Plan(len(samples), 0)
    with closing(views.TrainStream(samples, plan, view, pin_memory=pinned, **options)) as source:
        yield from source


def _wait_at_pace(setting: Setting, views: Any, samples: Any, threads: int) -> float:
    """Seconds that a step of both kinds of images waits, where it takes AIM_MS besides."""
    options = {"batch_size": 2 * setting["batch"], "rank": 0, "world_size": 1}
    view, plan = views.TrainView(SIZE, *views.SCALES), views.Plan(len(samples), 0)
    pinned, num_steps = setting.device == "cuda", 3 if setting.quick else 150
    stream = views.TrainStream(
        samples, plan, view, num_threads=threads, pin_memory=pinned, **options
    )
    with closing(stream):
        for number in range(num_steps + num_steps // 3):
            if number == num_steps // 3:
                before = stream.wait_seconds
            next(stream)
            time.sleep(AIM_MS / 1e3)
        return (stream.wait_seconds - before) / num_steps


def broken(setting: Setting) -> None:
    """Fails, to see that the others go on."""
    setting.note("before", 1.0)
    raise RuntimeError("as asked for")


def stuck(setting: Setting) -> None:
    """Never ends, to see that it is stopped."""
    setting.note("before", math.pi)
    time.sleep(3600)


@dataclass(frozen=True)
class Part:
    """One of the check. expected, limit: seconds on one GPU."""

    run: Callable[[Setting], None]
    expected: float
    limit: float


# the most telling first: what comes last is what a late check leaves out
PARTS = {
    "machine": Part(machine, 10, 60),
    "step": Part(step, 40, 100),
    "tests": Part(tests, 150, 240),
    "reference": Part(reference, 25, 60),
    "sections": Part(sections, 20, 60),
    "peaks": Part(peaks, 10, 40),
    "data": Part(data, 30, 60),
    "loop": Part(loop, 60, 100),
    "compiled": Part(compiled, 90, 150),
}
ON_PURPOSE = {"broken": Part(broken, 1, 30), "stuck": Part(stuck, 1, 2)}
