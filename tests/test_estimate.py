"""What `distseg estimate` counts, against hand counts, the step's own operations and the memory
that a real step takes; on pretended jobs of up to 1,024 ranks.
"""

from __future__ import annotations

import copy
import functools
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from distseg.cli import main
from distseg.config.loading import outline
from distseg.estimate import command, run
from distseg.estimate.hollow import SMALL as SMALL_ELEMENTS
from distseg.estimate.hollow import Collective, Hollow, Work
from distseg.estimate.job import (
    build_job,
    filled,
    fullest_step,
    made_up,
    prepared,
    take_step,
    without_memory,
)
from distseg.estimate.simulated import NUM_STEPS, pretended, simulate
from distseg.estimate.timing import (
    CHIPS,
    Hardware,
    Seconds,
    exchange_seconds,
    seconds_of,
    word_of,
)
from distseg.train.flops import StepWork
from distseg.train.schedules import phase
from shards.errors import InputError

SMALL = ["preset=stanford_semi", "data.num_classes=5", "data.crop_px=48", "precision=fp32"]
SMALL += ["segmentor=multiscale", "segmentor.init=random", "segmentor.options.norm=batch"]
SMALL += ["segmentor.options.hidden=8", "segmentor.batch_norm=per_rank"]
SMALL += ["discriminator=two_branch", "discriminator.options.width=0.125"]


@functools.cache
def job(world_size: int, *overrides: str, per_rank: int = 2):
    sizes = [f"batch_size={per_rank * world_size}", f"semi.batch_size={per_rank * world_size}"]
    config = prepared(outline([*SMALL, *sizes, *overrides])[0])
    return config, without_memory(config, 5, world_size)


@functools.cache
def counted(world_size: int, *overrides: str, per_rank: int = 2):
    config, networks = job(world_size, *overrides, per_rank=per_rank)
    with pretended(world_size) as ranks:
        return simulate(config, networks, ranks)


def num_parameters(networks) -> dict[str, int]:
    kinds = ("segmentor", "discriminator")
    return {
        kind: sum(it.numel() for it in network.parameters())
        for kind, network in zip(kinds, networks, strict=True)
    }


def test_ddp_holds_whole_networks_and_sends_their_gradients_once():
    config, networks = job(8)
    ddp = counted(8)
    assert config.segmentor_optimizer.name == "adamw" and config.ema_decay > 0
    sizes = num_parameters(networks)
    for name, size in sizes.items():
        num_tensors = len([*getattr(networks, name).parameters()])
        assert ddp.parts["parameters", name] == ddp.parts["gradients", name] == 4 * size
        # AdamW: two moments, and a counter for each tensor
        assert ddp.parts["optimizer", name] == 8 * size + 4 * num_tensors
    state = networks.segmentor.state_dict().values()
    assert ddp.parts["average", "segmentor"] == sum(it.nbytes for it in state)
    assert sum(ddp.parts.values()) == ddp.peak
    sent = Counter({word_of(it.name): 0 for it in ddp.collectives})
    for it in ddp.collectives:
        sent[word_of(it.name)] += it.num_bytes
        assert it.ranks == tuple(range(8))
    # beside the gradients: running statistics, counts and metrics
    gradients = 4 * sum(sizes.values())
    assert gradients < sent["all_reduce"] < 1.05 * gradients and not sent["all_gather"]


def test_operations_are_those_of_the_step():
    for words in (("mode=supervised",), ()):
        config, networks = job(8, *words)
        current, num_unlabelled = phase(fullest_step(config), config), 0 if words else 2
        work = StepWork.of(config, *networks).of_step(current, 2, num_unlabelled)
        found = counted(8, *words).operations
        if words:
            assert found == work
        # a discriminator of two branches sees the images once, for both kinds of label maps
        assert 0.97 * work < found <= work


def real_peak(world_size: int, *overrides: str) -> int:
    """As benchmarks/memory.py measures it; of a pretended job, with real values."""
    config, networks = job(world_size, *overrides)
    with (
        pretended(world_size) as ranks,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        networks = filled(copy.deepcopy(networks))
        for network in networks:
            for tensor in network.state_dict().values():
                tensor.zero_()
        trainer = build_job(config, networks, ranks)
        for _ in range(NUM_STEPS):
            take_step(trainer, made_up(config, fullest_step(config), world_size))
    events = recorded.profiler.kineto_results.events()
    changes = sorted((it.start_ns(), it.nbytes()) for it in events if it.name() == "[memory]")
    most = total = 0
    for _, change in changes:
        total += change
        most = max(most, total)
    return most


def test_memory_is_that_of_a_real_step():
    words = "parallel.strategy=fsdp", "parallel.shard_size=2"
    assert counted(4, *words).peak == pytest.approx(real_peak(4, *words), rel=0.02)


def test_a_thousand_ranks_in_a_mesh_of_128_by_8():
    small = counted(8, "parallel.strategy=fsdp")
    large = counted(1024, "parallel.strategy=fsdp", "parallel.shard_size=8")
    # a rank of 1,024 holds what one of 8 does, as both have an eighth of the parameters
    for kind in ("parameters", "optimizer", "average"):
        assert large.of_kind(kind) == small.of_kind(kind)
    whole = 4 * sum(num_parameters(job(8)[1]).values())
    assert whole / 8 <= large.of_kind("parameters") < 1.2 * whole / 8
    groups = Counter((word_of(it.name), len(it.ranks)) for it in large.collectives)
    gathers, scatters = groups["all_gather", 8], groups["reduce_scatter", 8]
    assert gathers >= scatters > 0 and not groups["all_gather", 1024]
    # each shard's gradient once more, over the 128 ranks that hold the same
    assert groups["all_reduce", 128] == scatters
    between = [it for it in large.collectives if len(it.ranks) == 128]
    assert {it.ranks for it in between} == {tuple(range(0, 1024, 8))}
    scattered = sum(it.num_bytes for it in large.collectives if "reduce_scatter" in it.name)
    assert sum(it.num_bytes for it in between) == scattered / 8


def sent(*words: str) -> Counter[str]:
    """Bytes by kind of collective, of a step on four ranks of two images of each kind."""
    total: Counter[str] = Counter()
    for it in counted(4, *words).collectives:
        total[word_of(it.name)] += it.num_bytes
    return total


def test_a_teacher_sends_nothing_of_its_own_but_is_gathered_where_it_is_sharded():
    preset, fsdp = "preset=stanford_consistency", "parallel.strategy=fsdp"
    size = 4 * num_parameters(job(4)[1])["segmentor"]
    for words in ((), (fsdp,)):
        more = sent(preset, *words)
        more.subtract(sent(preset, "mode=supervised", *words))
        # the teacher's forward; a shard may end in padding
        assert more.pop("all_gather", 0) == pytest.approx(size if words else 0, rel=1e-3)
        # as this step is logged: the classes of labels and of pseudo-labels, and five metrics
        assert more.pop("all_reduce") == 2 * 256 * 8 + 5 * 8
        assert not any(more.values())
    taught = ("consistency.weight=1", "consistency.start_step=1", "semi.weight=0")
    gated = sent(*taught, "consistency.gate=rank")
    gated.subtract(sent(*taught))
    assert gated.pop("all_reduce") == 4 * 2 * 8 and not any(gated.values())


@pytest.mark.slow
def test_deepspeed_splits_parameters_and_states_at_stage_3():
    pytest.importorskip("deepspeed")
    found = counted(4, "parallel.strategy=deepspeed", "parallel.zero_stage=3", "ema_decay=0")
    sizes = num_parameters(job(8)[1])
    assert found.of_kind("optimizer") == pytest.approx(2 * 4 * sum(sizes.values()) / 4, rel=0.02)
    # small parameters stay whole beside their quarter
    assert found.parts["parameters", "segmentor"] < 0.6 * 4 * sizes["segmentor"]
    sent = Counter(word_of(it.name) for it in found.collectives)
    assert sent["all_gather"] and sent["reduce_scatter"]


def test_what_the_host_reads_has_no_value_and_storages_are_counted():
    hollow = Hollow()
    with hollow.counting():
        one = torch.rand(300, 300)
        assert float(one.sum()) == 0.0 and not bool((one > 0).any())
        assert torch.arange(4).sum().item() == 6  # small, and made of nothing without values
        peak = (one @ one).relu_().sum()
        del peak
        assert hollow.ledger.block(one).size == 4 * 300 * 300
        one.untyped_storage().resize_(0)
        assert hollow.ledger.block(one).size == 0
        with pytest.raises(InputError, match=r"of 4000000\.0 GB"):
            one.new_empty(10**15)
    most, held = hollow.ledger.totals().max(), hollow.ledger.at_most()
    assert most == sum(held.values()) == pytest.approx(2 * 4 * 300 * 300, abs=2000)
    assert len(held) >= 2


def test_what_is_gathered_of_tensors_without_values_touches_no_page():
    whole, hollow = torch.full((8 * SMALL_ELEMENTS,), 7.0), Hollow()
    with pretended(4), hollow.counting():
        shard = torch.rand(2 * SMALL_ELEMENTS)
        dist.all_gather(list(whole.chunk(4)), shard)
        # and nobody takes for values what was there before
        assert float(whole[0]) == 0.0
    assert (whole == 7).all()
    assert [(it.num_bytes, len(it.ranks)) for it in hollow.collectives] == [(whole.nbytes, 4)]


@pytest.mark.parametrize("goes_other_ways", [False, True])
def test_images_that_fit_are_counted_moment_by_moment(monkeypatch, goes_other_ways):
    """In GB: 2 and one an image in a backward; but 9 at the start, and 23 in an update, beside the
    images themselves.
    """
    config, networks = job(4, per_rank=2)

    def simulated(larger, *_):
        number = larger.batch_size / 4
        totals = 1e9 * np.array([9, 2 + number, 23 + 0.004 * number])
        if goes_other_ways:  # then by what is most of all, here of 60 and 120 images
            totals = np.append(totals, 0) if number > 100 else totals
        return SimpleNamespace(totals=totals, peak=int(totals.max()))

    monkeypatch.setattr(run, "simulate", simulated)
    monkeypatch.setattr(run, "LARGE_BYTES", (30 if goes_other_ways else 2) * simulated(config).peak)
    with pretended(4) as ranks:
        fits = run.fitting(config, simulated(config).peak, networks, ranks, reserve_gb=2)
    # a GPU of 24 GB has no room for the update
    assert fits == {24: 20 if goes_other_ways else 0, 40: 36, 80: 76, 141: 137}


def test_the_model_of_seconds_is_its_formula():
    hardware = Hardware({"bf16": 100.0, "tf32": 50.0, "fp32": 10.0}, 40.0, 8.0, 2.0, 0.5, 4)
    work = [
        Work(1000.0, 10, torch.bfloat16),
        Work(1000.0, 10, torch.float32),
        Work(0, 200, torch.half),
    ]
    of_all = Collective("allreduce_", 16, tuple(range(8)))
    found = seconds_of(work, [of_all], hardware, tf32=True)
    assert found.compute == pytest.approx(1000 / 50 + 1000 / 25 + 200 / 20)
    ring = 2 * 3 / 4 * 16 / 8 + 2 * 1 / 2 * 16 / 2
    assert exchange_seconds(of_all, hardware) == pytest.approx(ring, rel=1e-4)
    assert found.exposed == 0.0 and found.step == found.compute
    slow = replace(hardware, node_link=0.1)
    assert seconds_of(work, [of_all], slow, tf32=False).exposed > 0
    assert tuple(CHIPS) == command.CHIPS


def test_the_command_prints_80_columns_and_what_fits(capsys, monkeypatch):
    monkeypatch.setattr(run, "LARGE_BYTES", 2e8)
    monkeypatch.setattr(run, "CAPACITIES_GB", (1, 2))
    words = ["estimate", *SMALL, "nodes=2", "gpus_per_node=2", "batch_size=8", "semi.batch_size=8"]
    assert main([*words, "--json", "--reserve-gb=0"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["strategies"].values()
    assert found["peak_bytes"] == sum(sum(it.values()) for it in found["parts_bytes"].values())
    fits = found["fits"]["1"]
    assert counted(4, per_rank=fits).peak == pytest.approx(1e9, rel=0.03)
    config, _ = job(4)
    it = run.Estimate("ddp", config, counted(4), found["fits"], Seconds(0.1, 0.1, 0.0, 0.1))
    shape = {"nodes": 2, "gpus_per_node": 2}
    lines = [*run.heading(config, shape, ()), *run.details(it), *run.comparison([it], {"x": "y"})]
    assert max(map(len, lines)) <= 80
    assert any("MODELLED, not measured" in line for line in lines)
    assert f"{fits:>11}" in "".join(lines)


def refusal(capsys, *words: str) -> str:
    assert main(["estimate", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    return error


def test_what_cannot_be_trained_is_refused(capsys):
    assert "batch_size=10 for 64 ranks" in refusal(capsys, *SMALL, "nodes=8", "batch_size=10")
    assert "nodes=none" in refusal(capsys, *SMALL, "nodes=none")
    sized = [*SMALL, "gpus_per_node=4", "batch_size=8", "semi.batch_size=8"]
    words = ["strategy=fsdp", "shard_size=3"]
    assert "shard_size=3 for 4 ranks" in refusal(capsys, *sized, *words)
    words = ["strategy=deepspeed", "zero_stage=3"]
    assert "ema_decay" in refusal(capsys, *sized, *words)
    assert "--tflops X --memory-bandwidth X" in refusal(capsys, *sized, "--chip=v100")
    for word in ("--efficiency=0", "--efficiency=60", "--reserve-gb=-1"):
        assert word.replace("=", " ") in refusal(capsys, *sized, word)
    unnamed = [word for word in sized if "num_classes" not in word and "preset" not in word]
    assert "--classes" in refusal(capsys, *unnamed)
    assert not dist.is_initialized()


OWN = """
import torch
from torch import nn
from torch.nn import functional as F


class Segmentor(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Conv2d(3, num_classes, 3, 2, 1)

    def forward(self, image):
        return self.layers(2 * image if image.mean() > 1 else image)


class Discriminator(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Conv2d(num_classes, 1, 3, 2, 1)

    def forward(self, label_map):
        return self.layers(label_map)


def chosen(logits, label):
    scores = F.interpolate(logits.float(), label.shape[-2:]).permute(0, 2, 3, 1)
    is_valid = label != 255
    return F.cross_entropy(scores[is_valid], label[is_valid].long(), reduction="sum"), 1


def looped(logits, label):
    return sum(logits.sum() * value for value in label.unique()), 1


def scripted(num_classes):
    return torch.jit.script(Discriminator(num_classes))
"""


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_code_of_the_users_own_is_counted_or_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "LARGE_BYTES", 1e6)
    file = tmp_path / "own.py"
    file.write_text(OWN)
    words = ["preset=toy", "data.crop_px=48", "batch_size=4", "gpus_per_node=4", "ema_decay=0"]
    words += [f"segmentor={file}:Segmentor", f"discriminator={file}:Discriminator"]
    term = f"loss.terms.own.use={file}:"
    assert main(["estimate", *words, "data.num_classes=5", "--json", f"{term}chosen"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["strategies"].values()
    parameters = found["parts_bytes"]["parameters"]
    assert parameters["segmentor"] == 4 * (3 * 5 * 9 + 5)
    assert parameters["discriminator"] == 4 * (5 * 9 + 1)
    line = 1 + OWN.splitlines().index(
        "    return sum(logits.sum() * value for value in label.unique()), 1"
    )
    error = refusal(capsys, *words, "data.num_classes=5", f"{term}looped")
    assert f"loss.terms.own.use={file}:looped: in a step without values" in error
    assert f"({file}, line {line})" in error and not dist.is_initialized()
    words.append(f"discriminator={file}:scripted")
    error = refusal(capsys, *words, "data.num_classes=5")
    assert f"discriminator={file}:scripted: a network of torch.jit.script" in error
