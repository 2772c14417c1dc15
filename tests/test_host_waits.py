"""In a step that is not logged the host never waits for the device, in any mode: it would stand
still meanwhile, and the device after it.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distseg.config import loading
from distseg.distributed.compat import measure_no_backwards
from distseg.distributed.ranks import Ranks
from distseg.models import SEGMENTORS, BatchNorm2d
from distseg.train import assembly, run
from distseg.train.clock import StepClock
from distseg.train.flops import StepWork
from distseg.train.inputs import open_streams
from distseg.train.trainer import Trainer
from tests.pretended import HostWaits, OnDevice, pretended
from tests.ranks import leave_out, run_ranks
from tests.tiny import SETTINGS

COMMON = [
    "data.crop_px=64",
    "batch_size=4",
    "steps=100",
    "tracking.log_every=50",
    "data.num_threads=0",
]
SEMI = ["mode=semi_supervised", "data.labelled=1/2", "semi.start_step=0", "semi.threshold=0"]
TAUGHT = ["data.labelled=1/2", "consistency.weight=1", "consistency.threshold=0.1"]
CASES = {
    "supervised, hard pixels": [
        *("mode=supervised", "segmentor_optimizer.name=sgd", "loss.ohem_threshold=0.7"),
        "loss.ohem_min_share=0.1",
        "loss.logit_adjustment=1",
        *("loss.class_weights=balanced", "loss.label_smoothing=0.1"),
    ],
    "supervised, focal and overlap": [
        *("mode=supervised", "loss.focal_gamma=2", "loss.class_weights=median_frequency"),
        *("loss.terms.dice.weight=1", "loss.terms.lovasz.weight=1", "strong.labelled=true"),
        "strong.mix=cutout",
    ],
    "adversarial, in blocks, fp16": [
        *("mode=adversarial", "precision=fp16", "segmentor_optimizer.clip_norm=1"),
        *("alternation.name=blocks", "alternation.segmentor=1", "alternation.discriminator=1"),
        *("loss.map_resolution=image", "loss.real_map=scaling"),
    ],
    "adversarial, feature matching, R1": [
        *("mode=adversarial", "discriminator=image_conditioned", "loss.feature_weight=0.1"),
        *("loss.r1_weight=1", "loss.r1_every=1", "loss.mismatched_weight=0.5"),
    ],
    "semi-supervised, accumulation": [
        *(*SEMI, "gradient_accumulation_steps=2", "precision=fp16"),
        "discriminator.options.spectral_norm=true",
    ],
    "consistency, EMA teacher, two views": [
        *("mode=consistency", *TAUGHT, "strong.labelled=true", "strong.mix=classmix"),
        *("consistency.teacher=ema", "consistency.logit_adjustment=1", "consistency.alignment=0.5"),
        *("consistency.num_views=2", "consistency.batch_norm=separate", "batch_size=8"),
        *("gradient_accumulation_steps=2", "data.crop_px=32"),
    ],
    "consistency and an adversary's gate": [
        *("mode=semi_supervised", *TAUGHT, "consistency.gate=rank", "semi.entropy_weight=0.1"),
        *("consistency.target=probabilities", "consistency.weighting=image"),
        *("consistency.start_step=1", "consistency.mix_with=labelled"),
    ],
    "domain adaptation": [
        *("mode=domain_adaptation", "discriminator=large_fov", "data.labelled=1/2"),
        *("semi.entropy_weight=0.1", "adaptation.input=self_information"),
        "adaptation.aux_adv_weight=0.1",
    ],
}


class Small(nn.Module):
    """In place of a segmentor: those have many layers, of which each operation passes through
    Python here. That theirs do not wait, tests/test_compile.py sees.
    """

    output_stride = 4
    has_auxiliary = True
    init_report = None

    def __init__(self, num_classes: int, *, norm: str, hidden: int):
        super().__init__()
        self.num_classes = num_classes
        self.encoder = nn.Conv2d(3, hidden, 4, 4)
        self.head = nn.Sequential(
            BatchNorm2d(hidden), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(hidden, num_classes, 1)
        )
        self.auxiliary = nn.Conv2d(hidden, num_classes, 1, 2)

    def forward(self, image: Tensor) -> Any:
        x = self.encoder(image)
        return {"out": self.head(x), "aux": self.auxiliary(x)} if self.training else self.head(x)


def settings(case: list[str], shards: Path, run_dir: Path) -> list[str]:
    """Arguments of a tiny run of a case."""
    options = loading.arguments(SETTINGS)
    common = [f"data.shards={shards}", f"run_dir={run_dir}", "segmentor.batch_norm=per_rank"]
    return [*options, *COMMON, *common, *case]


def make_trainer(ranks: Ranks, arguments: list[str]) -> tuple[Trainer, Any]:
    """The loop of a run, without what it writes; and its batches."""
    config = loading.load(arguments)
    prepared = run.check(config, 1)
    pair = assembly.spread(config, prepared.networks, prepared.objective, ranks)
    found = assembly.learned(config, ranks, pair, prepared.data, None)
    trainer = Trainer(
        config=config,
        ranks=ranks,
        pair=found.pair,
        ema=found.ema,
        evaluator=SimpleNamespace(samples=prepared.data.val),  # type: ignore[arg-type]
        checkpoints=found.checkpoints,
        tracker=SimpleNamespace(),  # type: ignore[arg-type]
        progress=SimpleNamespace(),  # type: ignore[arg-type]
        watchdog=SimpleNamespace(report=lambda what: None),  # type: ignore[arg-type]
        work=StepWork(1.0),
        peak=1.0,
    )
    return trainer, open_streams(config, ranks, prepared.data, 0)


def steps(ranks: Ranks, arguments: list[str], everywhere: bool = False) -> dict[str, list[str]]:
    """What waits in the second and the third step of a run, as the loop takes them; and in the
    step proper of one that is logged.
    """
    trainer, stream = make_trainer(ranks, arguments)
    stop = SimpleNamespace(begin=lambda failed: None)
    clock = StepClock(4, 1.0, 0)
    with closing(stream):
        trainer._advance(stream, stop, clock)  # type: ignore[arg-type]  # makes what is kept
        with HostWaits(everywhere) as usual:
            for _ in range(2):
                trainer._advance(stream, stop, clock)  # type: ignore[arg-type]
        trainer.state.step = 49
        with HostWaits(everywhere) as watched:
            trainer.train_step(next(stream))
    return {"usual": usual.found, "logged": watched.found}


def planted(device: torch.device) -> dict[str, list[str]]:
    """What is found of each way to wait, and of ways that do not."""
    there = OnDevice(torch.tensor([1.0, 0.0, 2.0]))
    here = torch.ones(3)
    ways = {
        "item": lambda: there[0].item(),
        "if": lambda: bool(there[0] > 0),
        "float": lambda: float(there.sum()),
        "tolist": lambda: there.tolist(),
        "cpu": lambda: there.cpu(),
        "cpu, later": lambda: there.to("cpu", non_blocking=True),
        "numpy": lambda: there.cpu().numpy(),
        "mask": lambda: there[there > 0],
        "assigned by mask": lambda: there.clone().__setitem__(there > 0, there[:2]),
        "nonzero": lambda: there.nonzero(),
        "equal": lambda: torch.equal(there, there),
        "masked_select": lambda: there.masked_select(there > 0),
        "unique": lambda: there.unique(),
        "sent": lambda: here.to(device),
        "made there of numbers": lambda: torch.tensor([1.0, 2.0], device=device),
        "copied in": lambda: there.clone().copy_(here),
    }
    fine = {
        "sent, later": lambda: here.to(device, non_blocking=True),
        "filled": lambda: torch.full((), 3.0, device=device),
        "where": lambda: there.where(there > 0, 0.0) * 2 + torch.zeros(3, device=device),
        "a number of the host": lambda: there * torch.tensor(2.0),
        "by whole numbers": lambda: there[OnDevice(torch.tensor([0, 2]))],
        "on the host": lambda: (here.sum().item(), here[here > 0], here.tolist()),
    }
    found = {}
    for name, way in (ways | fine).items():
        with HostWaits() as waits:
            way()
        found[name] = waits.found
    return {name: found[name] for name in ways} | {f"fine: {name}": found[name] for name in fine}


def of_a_rank(ranks: Ranks, shards: Path, folder: Path) -> dict[str, Any]:
    """In a process of its own: what waits, by case."""
    leave_out()
    SEGMENTORS["multiscale"] = Small  # type: ignore[assignment]
    found: dict[str, Any] = {}
    # first: a backward settles for the process which devices there are
    with pretended() as device:
        found["planted"] = planted(device)
        of_device = Ranks(0, 1, 0, device)
        for name, case in CASES.items():
            where = folder / name.replace(" ", "")
            found[name] = steps(of_device, settings(case, shards, where))
    # with torch's own C++, of one rank, on the CPU
    case = [*SEMI, "gradient_accumulation_steps=2"]
    for strategy in ("ddp", "fsdp"):
        spread = [*case, f"parallel.strategy={strategy}"]
        found[strategy] = steps(ranks, settings(spread, shards, folder / strategy), True)
    found["ddp's log"] = measured_backwards(205)
    return found


def measured_backwards(num_steps: int) -> list[int]:
    """The steps after the first ten that DDP measures for its log."""
    ddp = DistributedDataParallel(nn.Linear(1, 1))
    measure_no_backwards(ddp)
    seen = set()
    for _ in range(num_steps):
        ddp(torch.ones(1, 1)).sum().backward()
        seen.add(ddp._get_ddp_logging_data()["iteration"])
    return [step for step in seen if step > 10]


@pytest.fixture(scope="module")
def found(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (of_rank,) = run_ranks(1, of_a_rank, toy_shards, tmp_path_factory.mktemp("waits"))
    return of_rank


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_nothing_in_a_step(name: str, found: dict[str, Any]) -> None:
    assert found[name] == {"usual": [], "logged": []}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nor_under_what_spreads_a_network(strategy: str, found: dict[str, Any]) -> None:
    # the average counts its updates on the host
    for kind, waits in found[strategy].items():
        assert [wait for wait in waits if "train/ema.py" not in wait] == [], kind


def test_nor_for_ddps_own_log(found: dict[str, Any]) -> None:
    assert found["ddp's log"] == []


def test_each_way_to_wait_is_found(found: dict[str, Any]) -> None:
    for name, waits in found["planted"].items():
        assert bool(waits) != name.startswith("fine"), f"{name}: {waits}"
