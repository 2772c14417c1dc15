"""FSDP2: DDP's steps, from parameters, gradients and optimizer states that the ranks hold shards
of.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from distseg.cli import main
from distseg.config.world_size import check_shard_size
from distseg.distributed.compat import set_collective_timeout
from distseg.distributed.ranks import Ranks
from distseg.models import ENCODERS, build_discriminator, build_segmentor
from distseg.parallel import check_network, fsdp, wrap
from distseg.parallel.parameter_shards import shard_of
from distseg.train import run
from distseg.train.batch import Images
from distseg.train.ema import MovingAverage
from distseg.train.networks import Networks
from distseg.train.replicas import check_equal, share_first_weights
from distseg.train.schedules import phase
from distseg.train.step import Pair, training_step
from shards.errors import InputError
from tests import test_engine, test_engine_terms, tiny
from tests.ranks import run_ranks, slow
from tests.test_engine import BATCH, NUM_CLASSES, make_batch, make_config, make_networks
from tests.test_train import DROPOUT, curve, finish, kill_after_checkpoint, start

FSDP = ("parallel.strategy=fsdp",)
HYBRID = (*FSDP, "parallel.shard_size=2")
# of how many ranks which runs are looked at
OF_RANKS = {
    1: ["steps", "synchronised", "average"],
    2: ["steps", "bad batch", "synchronised", "ddp", "spoiled", "half", "average", "large", "bf16"],
    3: ["terms", "norms", "sums"],
    4: ["steps", "spoiled", "average", "differences", "first weights", "limits"],
}
OfRanks = dict[int, list[dict[str, Any]]]
STEPS = [case for case in test_engine.CASES if case[2] == "two_branch"]
TERMS = ["semi, a score per cell", "semi, blocks"]


def with_blocks(num_parameters: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), while layers of so many parameters are gathered by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp, "BLOCK_PARAMETERS", num_parameters)
        return function(*arguments)


def train_steps(ranks: Ranks, overrides: tuple[str, ...]) -> list[Any]:
    return [test_engine.train(ranks, case, overrides) for case in STEPS]


@pytest.fixture(scope="module")
def references() -> list[Any]:
    torch.set_num_threads(1)
    return [test_engine.reference(*case) for case in STEPS]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_six_steps_equal_the_reference(
    num_ranks: int, of_ranks: OfRanks, references: list[Any]
) -> None:
    for of_rank in of_ranks[num_ranks]:
        for case, got, expected in zip(STEPS, of_rank["steps"], references, strict=True):
            test_engine.check_equal(case, got, expected)


def train_terms(ranks: Ranks) -> list[Any]:
    whole = [
        test_engine_terms.train(ranks, [*test_engine_terms.CASES[name], *FSDP]) for name in TERMS
    ]
    return [*whole, test_engine_terms.train(ranks, [*test_engine_terms.IN_PARTS[0], *FSDP], 2)]


def test_semi_supervised_terms_and_images_in_parts_equal_their_formulas(of_ranks: OfRanks) -> None:
    """Three ranks, by which few parameters can be divided.

    The last one's images are void, its mask is empty.
    """
    cases = [*(test_engine_terms.CASES[name] for name in TERMS), test_engine_terms.IN_PARTS[0]]
    expected = [test_engine_terms.reference(case) for case in cases]
    for of_rank in of_ranks[3]:
        for case, got, wanted in zip(cases, of_rank["terms"], expected, strict=True):
            test_engine_terms.check_equal(str(case), got, wanted)


def test_a_bad_batch_on_one_rank_is_left_out_by_all(of_ranks: OfRanks) -> None:
    test_engine.check_bad_batch([of_rank["bad batch"] for of_rank in of_ranks[2]])


def test_synchronised_batch_norm_is_that_of_one_rank(of_ranks: OfRanks) -> None:
    one = of_ranks[1][0]["synchronised"]
    for of_rank in of_ranks[2]:
        assert max(abs(of_rank["synchronised"][name] - one[name]).max() for name in one) < 1e-12


def make_pair(ranks: Ranks, overrides: tuple[str, ...]) -> Any:
    config = make_config("fp64", "simultaneous", "adversarial", overrides)
    config.segmentor_optimizer.clip_norm = 0.05  # below every norm
    optimizers = (config.segmentor_optimizer, config.discriminator_optimizer)
    learners = [
        wrap(*both, config, ranks)
        for both in zip(make_networks("two_branch"), optimizers, strict=True)
    ]
    return Pair.of(config, *learners), config


def gradients(ranks: Ranks, pair: Any, config: Any, step: int) -> None:
    share = slice(
        ranks.rank * BATCH // ranks.world_size, (ranks.rank + 1) * BATCH // ranks.world_size
    )
    image, label = (part[share] for part in make_batch(step, torch.float64))
    training_step(pair, phase(step, config), Images(image, label))


def values(network: nn.Module) -> dict[str, Any]:
    return {name: tensor.detach().clone().numpy() for name, tensor in network.state_dict().items()}


def spoil(ranks: Ranks, overrides: tuple[str, ...], spoiled: str) -> list[Any]:
    """Three steps; in the second, a part of the last rank's gradient of one network is infinite.

    Under DDP before gradients are averaged; under FSDP after it, in the shards of one rank alone.
    """
    pair, config = make_pair(ranks, overrides)
    learners = {"segmentor": pair.segmentor, "discriminator": pair.discriminator}
    history = []
    for step in range(3):
        bad = list(learners[spoiled].network.parameters()) if spoiled and step == 1 else []
        bad = bad if ranks.rank == ranks.world_size - 1 else []
        hooks = [
            p.register_hook(lambda g: torch.full_like(g, float("inf")))
            for p in bad[-1:]
            if not overrides
        ]
        gradients(ranks, pair, config, step)
        [hook.remove() for hook in hooks]
        if bad and overrides:
            some = [p for p in bad if shard_of(p.grad).rows.numel()]
            shard_of(some[-1].grad).rows.view(-1)[0] = float("inf")
        metrics = {
            name: {k: float(v) for k, v in learner.step(1.0).items()}
            for name, learner in learners.items()
        }
        history.append(
            (metrics, {name: values(learner.full_network()) for name, learner in learners.items()})
        )
    return history


def spoil_each(ranks: Ranks, overrides: tuple[str, ...]) -> dict[str, list[Any]]:
    return {
        spoiled: spoil(ranks, overrides, spoiled) for spoiled in ("", "segmentor", "discriminator")
    }


@pytest.mark.parametrize(("num_ranks", "name"), [(2, "ddp"), (2, "spoiled"), (4, "spoiled")])
@pytest.mark.parametrize("spoiled", ["segmentor", "discriminator"])
def test_an_infinity_on_one_rank_skips_that_network_on_all(
    num_ranks: int, name: str, spoiled: str, of_ranks: OfRanks
) -> None:
    histories = [of_rank[name][spoiled] for of_rank in of_ranks[num_ranks]]
    good = of_ranks[num_ranks][0][name][""]
    (other,) = {"segmentor", "discriminator"} - {spoiled}
    for history in histories:
        metrics = [metrics for metrics, _ in history]
        assert [(m[spoiled]["skips"], m[spoiled]["skips_in_a_row"]) for m in metrics] == [
            (0, 0),
            (1, 1),
            (1, 0),
        ]
        assert [m[other]["skips"] for m in metrics] == [0, 0, 0]
        assert (
            metrics == [metrics for metrics, _ in histories[0]]
            or metrics[1][spoiled]["grad_norm"] == np.inf
        )
        before, after = history[0][1], history[1][1]
        assert all(
            (before[spoiled][name] == after[spoiled][name]).all() for name in before[spoiled]
        )
        assert all((good[1][1][other][name] == after[other][name]).all() for name in after[other])
        assert any((before[other][name] != after[other][name]).any() for name in before[other])


def test_norms_are_those_of_the_whole_gradient(of_ranks: OfRanks) -> None:
    ddp = of_ranks[2][0]["ddp"][""]
    for num_ranks in (2, 3, 4):
        for of_rank in of_ranks[num_ranks]:
            found = of_rank["norms" if num_ranks == 3 else "spoiled"][""]
            for (got, _), (expected, _) in zip(found, ddp, strict=True):
                for name in ("segmentor", "discriminator"):
                    assert got[name]["grad_norm"] == pytest.approx(
                        expected[name]["grad_norm"], rel=1e-9
                    )


def train_in_half(ranks: Ranks) -> list[Any]:
    """Under DDP and under FSDP six steps in fp16.

    Loss scales and skips of every step, and the last networks.
    """
    found = []
    for overrides in ((), FSDP):
        config = make_config("fp32", "simultaneous", "adversarial", overrides)
        config.precision = "fp16"
        optimizers = (config.segmentor_optimizer, config.discriminator_optimizer)
        learners = [
            wrap(*both, config, ranks)
            for both in zip(make_networks("two_branch"), optimizers, strict=True)
        ]
        pair, counts = Pair.of(config, *learners), []
        share = slice(
            ranks.rank * BATCH // ranks.world_size, (ranks.rank + 1) * BATCH // ranks.world_size
        )
        for step in range(6):
            image, label = (part[share] for part in make_batch(step, torch.float32))
            training_step(pair, phase(step, config), Images(image, label))
            said = [learner.step(1.0) for learner in learners]
            counts += [(float(of_it["loss_scale"]), float(of_it["skips"])) for of_it in said]
        found.append((counts, [values(learner.full_network()) for learner in learners]))
    return found


def test_fp16_has_the_loss_scales_and_the_steps_of_ddp(of_ranks: OfRanks) -> None:
    for of_rank in of_ranks[2]:
        (ddp_counts, ddp_networks), (counts, networks) = of_rank["half"]
        assert counts == ddp_counts and any(skips == 0 for _, skips in counts[-2:])
        for mine, theirs in zip(networks, ddp_networks, strict=True):
            assert max(abs(mine[name] - theirs[name]).max() for name in theirs) <= 1e-5


def average(ranks: Ranks, overrides: tuple[str, ...]) -> list[dict[str, Any]]:
    """The average and the network after each of three steps.

    Then, the average alone is looked at in between.
    """
    pair, config = make_pair(ranks, overrides)
    ema = MovingAverage(pair.segmentor, decay=0.5)
    seen = []
    for step in range(3):
        gradients(ranks, pair, config, step)
        pair.segmentor.step(1.0)
        pair.discriminator.step(1.0)
        ema.update()
        seen.append(values(ema.full_network()))
        check_equal(ranks, pair, step)
    size = sum(shard_of(tensor).rows.numel() for tensor in ema.state_dict()["network"].values())
    return [*seen, {"held": np.array(size)}]


def test_the_moving_average_is_that_of_ddp_from_shards(of_ranks: OfRanks) -> None:
    expected = of_ranks[1][0]["average"]
    for num_ranks in (2, 4):
        for of_rank in of_ranks[num_ranks]:
            got = of_rank["average"]
            for mine, theirs in zip(got[:-1], expected[:-1], strict=True):
                assert max(abs(mine[name] - theirs[name]).max() for name in theirs) < 1e-12
            assert got[-1]["held"] == expected[-1]["held"] / 2  # every dimension is even


def find_difference(ranks: Ranks, overrides: tuple[str, ...], wrong: int) -> str:
    pair, _ = make_pair(ranks, overrides)
    if ranks.rank == wrong:
        shard_of(next(pair.discriminator.network.parameters())).rows.view(-1)[0] += 1
    try:
        check_equal(ranks, pair, 7)
    except RuntimeError as error:
        return str(error)
    return ""


def test_replicas_that_hold_different_shards_are_found(of_ranks: OfRanks) -> None:
    for of_rank in of_ranks[4]:
        different, same = of_rank["differences"]
        assert "the discriminator of rank 3 differs" in different
        assert same == ""


def changed_on(ranks: Ranks, others: tuple[int, ...]) -> Networks:
    """Networks of which some ranks have built others, in a parameter or a buffer alone."""
    networks = Networks(*make_networks("two_branch"))
    networks.segmentor.register_buffer("mean", torch.zeros(3))
    if ranks.rank in others:
        changed = networks.segmentor.mean if ranks.rank == 1 else next(networks[1].parameters())
        changed.data.view(-1)[0] += 1
    return networks


def share_weights(ranks: Ranks, others: tuple[int, ...]) -> tuple[str | None, list[Any], bool]:
    networks, moved = changed_on(ranks, others), []
    if ranks.rank in others:
        networks.segmentor.init_report = "resnet50-0676ba61.pth: 320 tensors loaded"
    told = share_first_weights(ranks, networks, lambda: moved.append(1))
    config = make_config("fp64", "simultaneous", "adversarial", HYBRID)
    learners = [wrap(each, config.segmentor_optimizer, config, ranks) for each in networks]
    return told, [values(learner.full_network()) for learner in learners], bool(moved)


def test_all_ranks_begin_with_the_first_weights_of_rank_0(of_ranks: OfRanks) -> None:
    expected = [values(network) for network in changed_on(Ranks(0, 4, 0, torch.device("cpu")), ())]
    for of_rank in of_ranks[4]:
        for (told, networks, was_sent), others in zip(
            of_rank["first weights"], ("", "1, 3"), strict=True
        ):
            assert was_sent == (told is not None) == bool(others)
            for mine, wanted in zip(networks, expected, strict=True):
                assert all((mine[name] == wanted[name]).all() for name in wanted)
        assert "rank 1, 3 had built other ones than rank 0" in told
        assert re.search("rank 0 on .*: none; rank 1 on .*: resnet50-0676ba61.pth", told)


def slow_from_other_weights(arguments: list[str]) -> int:
    """As `slow`, but the networks that rank 1 builds are others."""
    build = run.build_networks

    def others(*given: Any) -> Networks:
        networks = build(*given)
        for network in networks if os.environ["RANK"] == "1" else ():
            for tensor in network.state_dict().values():
                tensor.add_(1)
        return networks

    run.build_networks = others
    return slow(arguments)


def run_large(ranks: Ranks) -> list[float]:
    """Networks of every kind with their large layers by themselves.

    How far from the plain network, all in all.
    """
    config = make_config("fp64", "simultaneous", "adversarial", FSDP)
    judge: dict[str, Any] = {"width": 0.5, "head": "patch"}
    networks: list[tuple[nn.Module, tuple[Tensor, ...]]] = []
    torch.manual_seed(1)
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    maps = torch.rand(2, NUM_CLASSES, 8, 8, dtype=torch.float64).softmax(1).requires_grad_()
    for name in ("deeplabv3plus_efficientnet_lite0", "multiscale"):
        networks.append((build_segmentor(name, NUM_CLASSES, init="random"), (image,)))
    networks.append(
        (
            build_discriminator("two_branch", NUM_CLASSES, **judge),
            (image, maps, maps.detach().flip(0)),
        )
    )
    far = []
    for network, inputs in networks:
        learner = wrap(network, config.segmentor_optimizer, config, ranks)
        assert len(fsdp.blocks(network)) > 1
        plain = learner.full_network()
        plain.requires_grad_().train()
        results = []
        for forward in (learner, plain):
            torch.manual_seed(2)  # dropout
            outputs = forward(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.grad(
                outputs[0].square().mean(), maps, retain_graph=True, allow_unused=True
            )  # the proxy
            sum((output.square().mean() for output in outputs), start=torch.zeros(())).backward()
            results.append([output.detach() for output in outputs])
        far += [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]
        for mine, theirs in zip(network.parameters(), plain.parameters(), strict=True):
            far.append(float((mine.grad.full_tensor() - theirs.grad).abs().max()))  # type: ignore[union-attr]
    return far


def test_layers_gathered_one_at_a_time_give_the_plain_networks_gradients(
    of_ranks: OfRanks,
) -> None:
    for of_rank in of_ranks[2]:
        assert max(of_rank["large"]) < 1e-12


IN_BF16 = (*FSDP, "precision=bf16", "parallel.gather_dtype=bf16")


class Summed(TorchDispatchMode):
    """Notes of which type gradients are summed over the ranks, and how many times."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[str] = set()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce_scatter" in func.__name__:
            tensors = (it for it in tree_iter((args, kwargs)) if isinstance(it, Tensor))
            self.dtypes |= {str(tensor.dtype) for tensor in tensors}
            self.number += 1
        return func(*args, **(kwargs or {}))


def train_in_bf16(ranks: Ranks) -> list[Any]:
    """What three steps change a vision transformer by: in fp32 under DDP, with autocast under FSDP,
    and with blocks that are gathered in bf16; and of that what is held in which type.
    """
    found: list[Any] = []
    entry = tiny.narrow_encoder(ENCODERS["vits14"])
    with pytest.MonkeyPatch.context() as patch, Summed() as summed:
        patch.setitem(ENCODERS, "vits14", entry)
        for overrides in ((), (*FSDP, "precision=bf16"), IN_BF16):
            config = make_config("fp32", "simultaneous", "supervised", overrides)
            torch.manual_seed(0)
            network = build_segmentor("linear_vits14", NUM_CLASSES, init="random")
            first = {name: p.detach().clone() for name, p in network.named_parameters()}
            learner = wrap(network, config.segmentor_optimizer, config, ranks)
            seen = computed_with(network)
            pair, share = Pair.of(config, learner), BATCH // ranks.world_size
            where = slice(ranks.rank * share, (ranks.rank + 1) * share)
            for step in range(3):
                image, label = (part[where] for part in make_batch(step, torch.float32))
                training_step(pair, phase(step, config), Images(image, label))
                gradients = {str(p.grad.dtype) for p in network.parameters() if p.grad is not None}
                learner.step(1.0)
            last = learner.full_network().named_parameters()
            found.append([(p.detach() - first[name]).double().flatten() for name, p in last])
    state = learner.optimizer.state.values()
    held = {str(tensor.dtype) for each in state for tensor in each.values()}
    held |= {str(parameter.dtype) for parameter in network.parameters()} | gradients
    return [*(torch.cat(each).numpy() for each in found), seen, held, summed.dtypes]


def count_sums(ranks: Ranks) -> list[int]:
    """How many times a step sums gradients, of one micro-batch, and of two."""
    numbers = []
    for num_micro_batches in (1, 2):
        pair, config = make_pair(ranks, FSDP)
        image, label = (part[ranks.rank * 4 :][:4] for part in make_batch(0, torch.float64))
        with Summed() as summed:
            training_step(
                pair, phase(0, config), Images(image, label), num_micro_batches=num_micro_batches
            )
        numbers.append(summed.number)
    return numbers


def test_gradients_of_micro_batches_are_exchanged_once(of_ranks: OfRanks) -> None:
    for of_rank in of_ranks[3]:
        # each network is one block; the proxy goes through the discriminator too
        assert of_rank["sums"] == [2, 2]


def computed_with(network: nn.Module) -> dict[str, str]:
    """Filled by each forward: the type of some layers' weights as they are used, and of inputs."""
    seen: dict[str, str] = {}
    for name, layer in network.named_modules():
        if name in ("encoder.blocks.0.mlp.fc1", "encoder.blocks.0.norm1", "head.norm"):

            def look(layer: nn.Module, inputs: Any, name: str = name) -> None:
                seen[name] = str(layer.weight.dtype)
                seen[f"into {name}"] = str(inputs[0].dtype)

            layer.register_forward_pre_hook(look)
    return seen


@pytest.mark.cpu
def test_blocks_gathered_in_bf16_make_the_steps_of_fp32_to_its_rounding(of_ranks: OfRanks) -> None:
    for of_rank in of_ranks[2]:
        exact, autocast, gathered, seen, held, summed = of_rank["bf16"]
        size = np.linalg.norm(exact)
        assert 0 < np.linalg.norm(gathered - exact) < 0.02 * size
        # rounded at another place: not the numbers of autocast, but no worse
        assert np.linalg.norm(gathered - exact) < 2 * np.linalg.norm(autocast - exact)
        # a rounded master would have lost most of these changes
        assert {seen[f"encoder.blocks.0.{name}"] for name in ("mlp.fc1", "norm1")} == {
            "torch.bfloat16"
        }
        # the embeddings' sum is fp32, and some kernels take no parameters of another type
        assert seen["into encoder.blocks.0.norm1"] == "torch.bfloat16"
        assert seen["head.norm"] == "torch.float32"
        assert held == summed == {"torch.float32"}


class ResidualPair(nn.Module):
    """A layer that is gathered whole, with a norm inside."""

    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside = inside


def test_a_gathering_in_bf16_that_cannot_be_is_refused() -> None:
    for words in (FSDP, ("precision=bf16",)):
        with pytest.raises(InputError, match=r"gather_dtype=bf16 with parallel\.strategy"):
            make_config("fp32", "simultaneous", "supervised", (*words, IN_BF16[-1]))
    config = make_config("fp32", "simultaneous", "supervised", IN_BF16)
    # the narrow one has no large layer; of the other the only ones have batch normalisation
    narrow = build_segmentor("multiscale", 3, init="random", hidden=64)
    residual = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(2**19)))
    for network in (narrow, nn.Sequential(ResidualPair(residual))):
        with pytest.raises(InputError, match="no block for it"):
            check_network(network, config)


def run_all(ranks: Ranks) -> dict[str, Any]:
    """All that the tests look at, of one number of ranks."""
    n = ranks.world_size
    overrides = HYBRID if n == 4 else FSDP
    runs: dict[str, Callable[[], Any]] = {
        # on one rank nothing but the whole, on more each layer by itself
        "steps": partial(with_blocks, n - 1, train_steps, ranks, overrides),
        "terms": partial(with_blocks, 10_000, train_terms, ranks),
        "bad batch": partial(test_engine.bad_batch_on_one_rank, ranks, overrides),
        # of one rank: torch's own batch norm, and the average of a plain network
        "synchronised": partial(test_engine.train_synchronised, ranks, FSDP if n > 1 else ()),
        "average": partial(average, ranks, overrides if n > 1 else ()),
        "ddp": partial(spoil_each, ranks, ()),
        "spoiled": partial(spoil_each, ranks, overrides),
        "norms": lambda: {"": spoil(ranks, overrides, "")},
        "half": partial(train_in_half, ranks),
        "sums": partial(count_sums, ranks),
        "large": partial(with_blocks, 20_000, run_large, ranks),
        "bf16": partial(with_blocks, 1_000, train_in_bf16, ranks),
        "first weights": lambda: [share_weights(ranks, others) for others in ((), (1, 3))],
        "limits": limits_of_groups,
        "differences": lambda: [find_difference(ranks, HYBRID, wrong) for wrong in (3, -1)],
    }
    return {name: runs[name]() for name in OF_RANKS[n]}


@pytest.fixture(scope="module")
def of_ranks() -> OfRanks:
    """Starting ranks takes longer than what they do for one test."""
    return {num_ranks: run_ranks(num_ranks, run_all) for num_ranks in OF_RANKS}


def limits_of_groups() -> list[float]:
    """In seconds, once they have been set: of the job's group and of those of shards."""
    set_collective_timeout(1234)
    groups = torch.distributed.distributed_c10d._world.pg_map
    backends = (group._get_backend(torch.device("cpu")) for group in groups)
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_groups_of_shards_have_the_time_limit_of_the_job(of_ranks: OfRanks) -> None:
    for of_rank in of_ranks[4]:
        assert of_rank["limits"] == [1234] * 3


def test_groups_that_do_not_divide_the_ranks_are_refused() -> None:
    check_shard_size(0, 6)
    check_shard_size(3, 6)
    with pytest.raises(InputError, match="shard_size=4 for 6 ranks"):
        check_shard_size(4, 6)


def test_a_killed_run_resumes_to_the_same_bits_and_ends_as_under_ddp(
    toy_shards: Path, tmp_path: Path
) -> None:
    usual = [*tiny.OVERRIDES, DROPOUT, "segmentor.batch_norm=synchronised"]
    settings = ["parallel.strategy=fsdp", *usual]
    finish(start(2, toy_shards, tmp_path / "whole", *settings))
    # and its ranks had built different networks
    job = start(2, toy_shards, tmp_path / "killed", *settings, how=slow_from_other_weights)
    kill_after_checkpoint(job, tmp_path / "killed", "step-00000003")
    finish(start(2, toy_shards, tmp_path / "killed", *settings))
    files = [
        sorted((tmp_path / run / "checkpoints/step-00000012").glob("*.safetensors"))
        for run in ("whole", "killed")
    ]
    # five of them in two shards, and the counters of both networks and the average
    assert len(files[0]) == 13
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    # from the shards, on one rank
    assert main(["evaluate", str(tmp_path / "whole"), "--quick"]) == 0
    names = ("evaluation.json", "evaluation-step-00000012-val-quick.json")
    scores = [json.loads((tmp_path / "whole" / name).read_text()) for name in names]
    # a sum of floats: one rank's order is not that of two
    losses = [of_run.pop("val/loss") for of_run in scores]
    assert scores[0] == scores[1] and losses[0] == pytest.approx(losses[1], rel=1e-9)
    finish(start(2, toy_shards, tmp_path / "ddp", *usual))
    for name, value in curve(tmp_path / "ddp")[-1][1].items():
        assert curve(tmp_path / "whole")[-1][1][name] == pytest.approx(value, rel=0.02, abs=0.01), (
            name
        )
