"""`distseg estimate`: one rank of a job counted under one strategy or all, as tables or JSON."""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap
import traceback
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distseg.config.code import references
from distseg.config.schema import WITH_UNLABELLED, Config
from distseg.config.world_size import check_world_size
from distseg.distributed.ranks import Ranks
from distseg.estimate.job import prepared, without_memory
from distseg.estimate.simulated import KINDS, Simulated, pretended, simulate
from distseg.estimate.timing import (
    CHIPS,
    Hardware,
    Seconds,
    seconds_of,
    sent_bytes,
    word_of,
)
from distseg.parallel import check_installed, check_settings
from distseg.train.dry_run import sizes_of
from distseg.train.networks import Networks
from shards import user_code
from shards.errors import InputError
from shards.words import counted

CAPACITIES_GB = (24, 40, 80, 141)
GB, MB = 1e9, 1e6
COLUMNS = 80
LARGE_BYTES = 6e9  # of address space, of which nothing is touched


@dataclass(frozen=True)
class Estimate:
    """Of one strategy. fits: by GB of a GPU the most labelled images of a step that a rank has room
    for; 0: none.
    """

    name: str
    config: Config
    found: Simulated
    fits: dict[int, int]
    seconds: Seconds


def run(
    config: Config,
    shape: dict[str, int],
    every: bool,
    waiting: Collection[str],
    options: argparse.Namespace,
) -> int:
    """Print what a job of this configuration would hold, send and cost; returns the exit code.

    shape: nodes and gpus_per_node. every: under all strategies. waiting: keys whose values come
    from images that are not there yet. Raises InputError for what could not be trained so.
    """
    # a rank for each GPU, as every launcher of ours starts them
    world_size = shape["nodes"] * shape["gpus_per_node"]
    num_classes = _num_classes(config, options.classes)
    check_world_size(config, world_size)
    chosen, refused = _chosen(config, shape, every)
    hardware = _hardware(options, shape["gpus_per_node"])
    # built once: the strategies wrap copies
    networks = without_memory(prepared(config), num_classes, world_size)
    # one job for all strategies: DeepSpeed keeps the first group that it sees
    with _own_code_named(config), pretended(world_size) as ranks:
        kept: dict[str, Any] = {"hardware": hardware, "reserve_gb": options.reserve_gb}
        # one after the other, each with its own copy of the networks
        found = [
            estimated(name, prepared(under), networks, ranks, **kept)
            for name, under in chosen.items()
        ]
    # nothing else may be printed then
    if options.json:
        print(json.dumps(document(found, refused, shape, options), indent=1))
        return 0
    lines = [*heading(config, shape, waiting)]
    lines += comparison(found, refused) if every else details(found[0])
    print("\n".join([*lines, *_modelled(options)]))
    return 0


@contextmanager
def _own_code_named(config: Config) -> Iterator[None]:
    """Within it, what goes wrong in code of the user's own is an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # an operator that has no shapes without values fails below the user's own line
        frames = traceback.extract_tb(error.__traceback__)
        for key, reference in references(config).items():
            code = user_code.load(reference, key)
            # by lines: several may be in one file
            lines, first = inspect.getsourcelines(code.value)
            own = range(first, first + len(lines))
            if any(it.filename == str(code.path) and it.lineno in own for it in frames):
                told = user_code.told(error, code.path)
                got = f"{key}={reference}: in a step without values: {told}"
                needed = "results whose sizes follow from the sizes of the inputs"
                action = f"estimate without {key}, or find what it takes by a short training"
                raise InputError(got, needed, action) from error
        raise


def estimated(
    name: str,
    config: Config,
    networks: Networks,
    ranks: Ranks,
    *,
    hardware: Hardware,
    reserve_gb: float,
) -> Estimate:
    """One strategy's."""
    found = simulate(config, networks, ranks)
    fits = fitting(config, found.peak, networks, ranks, reserve_gb)
    # of the configured batch, not of those that were tried
    times = seconds_of(found.work, found.collectives, hardware, config.tf32)
    return Estimate(name, config, found, fits, times)


def fitting(
    config: Config, peak: int, networks: Networks, ranks: Ranks, reserve_gb: float
) -> dict[int, int]:
    """By GB of a GPU the most labelled images of a step that a rank has room for, unlabelled ones
    in proportion; 0: none.

    peak: bytes with the configured batch. By two large batches: of small ones the weights' share is
    other, as kernels copy them.
    """
    # whole multiples, so that micro-batches and pairs still divide the images
    factor, per_rank = max(2, round(LARGE_BYTES / peak)), config.batch_size // ranks.world_size

    def of_times(times: int) -> Simulated:
        semi = replace(config.semi, batch_size=times * config.semi.batch_size)
        larger = replace(config, batch_size=times * config.batch_size, semi=semi)
        return simulate(larger, networks, ranks)

    one, other = of_times(factor), of_times(2 * factor)
    at, then = one.totals, other.totals
    # Moment by moment, each of which has its own line: with few images it may be an update that
    # holds most, or the start, and with many a backward. Code that goes other ways with other
    # batches has no such moments in common.
    if len(at) != len(then):
        at, then = np.array([one.peak]), np.array([other.peak])
    of_image = (then - at) / (factor * per_rank)
    # what an image takes nothing of holds for any number
    grows = of_image > 0
    fits, unit = {}, config.gradient_accumulation_steps
    for capacity in CAPACITIES_GB:
        free = (capacity - reserve_gb) * GB - at
        most = factor * per_rank + (free[grows] / of_image[grows]).min()
        fits[capacity] = max(0, int(most) // unit * unit) if (free[~grows] >= 0).all() else 0
    return fits


def strategies(config: Config, shape: dict[str, int]) -> dict[str, Config]:
    """The configuration under every strategy, by name."""

    def under(**keys: Any) -> Config:
        return replace(config, parallel=replace(config.parallel, **keys))

    # in the order in which they split more
    found = [under(strategy="ddp"), under(strategy="fsdp", shard_size=0)]
    # on one node it would be the line above
    if shape["nodes"] > 1:
        found.append(under(strategy="fsdp", shard_size=shape["gpus_per_node"]))
    found += [under(strategy="deepspeed", zero_stage=stage) for stage in range(4)]
    return {name_of(it): it for it in found}


def name_of(config: Config) -> str:
    """A strategy in a word or two."""
    options = config.parallel
    # as its users know the stages
    if options.strategy == "deepspeed":
        return f"ZeRO {options.zero_stage}"
    of_shards = options.strategy == "fsdp" and options.shard_size
    return f"fsdp / {options.shard_size}" if of_shards else options.strategy


def _chosen(
    config: Config, shape: dict[str, int], every: bool
) -> tuple[dict[str, Config], dict[str, str]]:
    """The configuration under its strategy, or under all; and why some of these are refused."""
    under = strategies(config, shape) if every else {name_of(config): config}
    refused: dict[str, str] = {}
    for name, own in under.items():
        try:
            _check_strategy(own, shape["nodes"] * shape["gpus_per_node"])
        except InputError as error:
            # of several, one that cannot be is a line of the table
            if not every:
                raise
            refused[name] = error.got
    return {name: own for name, own in under.items() if name not in refused}, refused


def _check_strategy(config: Config, world_size: int) -> None:
    # the cheapest first, as in training: arithmetic, what does not go together, packages
    check_world_size(config, world_size)
    check_settings(config)
    check_installed(config.parallel.strategy)


def _num_classes(config: Config, told: int | None) -> int:
    # the keys first, as in training
    sizes = sizes_of(config)
    found = config.data.num_classes or (None if sizes is None else sizes[1]) or told
    if not found or found < 1:
        action = "write --classes N, or data.shards=DIR of packed shards"
        raise InputError("no number of classes", "one that keys or data name", action)
    return found


def _hardware(options: argparse.Namespace, gpus_per_node: int) -> Hardware:
    # one number of the user counts for all types: it is of the run at hand
    chip = CHIPS[options.chip]
    tflops = {kind: options.tflops or value for kind, value in chip.tflops.items()}
    return Hardware(
        tflops={kind: value * 1e12 for kind, value in tflops.items()},
        memory_bandwidth=(options.memory_bandwidth or chip.memory_bandwidth) * 1e12,
        link=(options.link_gbs or chip.link_gbs) * GB,
        node_link=options.node_link_gbs * GB,
        efficiency=options.efficiency,
        gpus_per_node=gpus_per_node,
    )


def heading(config: Config, shape: dict[str, int], waiting: Collection[str]) -> list[str]:
    """The job in a few lines."""
    # "auto" is told as what it was counted as
    nodes, of_node = shape["nodes"], shape["gpus_per_node"]
    world_size, own = nodes * of_node, prepared(config)
    gpus = counted(of_node, "GPU")
    ranks = f"{counted(world_size, 'rank')} ({counted(nodes, 'node')} of {gpus})"
    images = counted(config.batch_size // world_size, "labelled image")
    if config.mode in WITH_UNLABELLED:
        unlabelled = (config.semi.batch_size or config.batch_size) // world_size
        images += f" and {unlabelled} unlabelled"
    images += f" of {config.data.crop_px} px a rank and step"
    if config.gradient_accumulation_steps > 1:
        images += f", in {config.gradient_accumulation_steps} micro-batches"
    # the recipe's name may be any: keys count more than the preset
    networks = user_code.short(config.segmentor.name)
    if config.mode not in ("supervised",):
        networks += f", {config.mode}"
    lines = [f"{networks}, {own.precision}: {ranks}", images]
    if waiting:
        lines.append(f"from your images, and here assumed: {', '.join(waiting)}")
    # a compiled graph could not be followed kernel by kernel
    if config.compile:
        lines.append("as if compile=false: a compiled network may hold less")
    return lines


def details(it: Estimate) -> list[str]:
    """One strategy's tables."""
    return [*memory(it), *exchange(it), *cost(it)]


def memory(it: Estimate) -> list[str]:
    """What a rank holds when it holds most, and which batches fit."""
    found, names = it.found, ("segmentor", "discriminator")
    lines = ["", f"memory of a rank when it holds most, GB, counted: {it.name}"]
    lines.append(f"  {'':24}{'segmentor':>13}{'discriminator':>16}{'neither alone':>16}{'all':>9}")
    for kind in KINDS:
        sizes = [found.parts.get((kind, name), 0) for name in names]
        # the rest is of both, such as images, or was made in the common backward
        whole = found.of_kind(kind)
        cells = f"{_gb(sizes[0]):>13}{_gb(sizes[1]):>16}{_gb(whole - sum(sizes)):>16}"
        lines.append(f"  {WORDS.get(kind, kind):24}{cells}{_gb(whole):>9}")
    lines.append(f"  {'together':24}{_gb(found.peak):>54}")
    lines.append(f"  {'between steps':24}{_gb(found.between):>54}")
    lines += ["", "labelled images a rank and step that fit a GPU of"]
    cells = "".join(f"{f'{capacity} GB':>11}" for capacity in it.fits)
    fits = "".join(f"{count or 'none':>11}" for count in it.fits.values())
    return [*lines, f"  {'':14}{cells}", f"  {'':14}{fits}"]


WORDS = {
    "optimizer": "optimizer state",
    "average": "average or teacher",
    "exchange": "buckets, flat copies",
    "activations": "activations, temporaries",
}


def exchange(it: Estimate) -> list[str]:
    """What a step sends, by collective."""
    lines = ["", "exchange of a step, counted"]
    lines.append(f"  {'':20}{'number':>10}{'of ranks':>12}{'MB':>14}{'MB a rank sends':>20}")
    # by their size, so that what weighs stands first
    rows = exchanged(it.found)
    for row in rows:
        size = f"{row['bytes'] / MB:14,.1f}{row['sent_bytes'] / MB:20,.1f}"
        lines.append(f"  {row['collective']:20}{row['number']:10}{row['ranks']:12}{size}")
    if not rows:
        lines.append("  none: one rank")
    return lines


def exchanged(found: Simulated) -> list[dict[str, Any]]:
    """By collective and number of ranks: how many, their bytes, and those that a rank sends."""
    rows: dict[tuple[str, int], dict[str, Any]] = defaultdict(
        lambda: {"number": 0, "bytes": 0, "sent_bytes": 0.0}
    )
    for one in found.collectives:
        row = rows[word_of(one.name), len(one.ranks)]
        row["number"] += 1
        row["bytes"] += one.num_bytes
        row["sent_bytes"] += sent_bytes(one)
    named = [{"collective": name, "ranks": ranks, **row} for (name, ranks), row in rows.items()]
    # of one rank nothing is sent
    return sorted((row for row in named if row["ranks"] > 1), key=lambda row: -row["bytes"])


def cost(it: Estimate) -> list[str]:
    """Operations, counted, and seconds, modelled."""
    # as if no kernel found anything in a cache
    moved = sum(work.bytes_moved for work in it.found.work)
    done = f"{it.found.operations / 1e12:.2f} TFLOP, {moved / GB:.0f} GB read and written"
    times = it.seconds
    exposed = f"{times.exchange * 1e3:.1f} ms, {times.exposed * 1e3:.1f} of it not hidden"
    return [
        "",
        f"work of a rank and step, counted: {done}",
        f"a step, MODELLED, not measured: {times.step * 1e3:.1f} ms",
        f"  computation {times.compute * 1e3:.1f} ms, exchange {exposed}",
    ]


def comparison(found: list[Estimate], refused: dict[str, str]) -> list[str]:
    """All strategies, a line each."""
    # a column for each GPU size
    capacities = "".join(f"{f'{capacity} GB':>7}" for capacity in CAPACITIES_GB)
    heads = f"{'':12}{'most':>8}{'between':>9}{'MB sent':>10}{'ms*':>9}"
    lines = ["", f"{heads}  {capacities}"]
    for it in found:
        # what a link carries, and not the payload: an all-reduce sends it nearly twice
        sent = sum(row["sent_bytes"] for row in exchanged(it.found))
        sizes = f"{_gb(it.found.peak):>8}{_gb(it.found.between):>9}{sent / MB:10,.0f}"
        fits = "".join(f"{count or 'none':>7}" for count in it.fits.values())
        lines.append(f"{it.name:12}{sizes}{it.seconds.step * 1e3:9.1f}  {fits}")
    # whole: the end of a reason is where the key stands
    for name, why in refused.items():
        lines += textwrap.wrap(
            f"{name:12}refused: {why}", COLUMNS, subsequent_indent=12 * " ", break_on_hyphens=False
        )
    legend = [
        "most, between: GB that a rank holds within a step and between steps; MB sent by",
        "a rank and step; labelled images of a rank that fit such a GPU; all counted",
        "*: a step, MODELLED, not measured",
    ]
    return [*lines, "", *legend]


def _modelled(options: argparse.Namespace) -> list[str]:
    chip = CHIPS[options.chip]
    share = f"{options.efficiency:.0%} of the {options.chip} of the {chip.source}"
    links = f"{options.link_gbs or chip.link_gbs:g} GB/s a GPU, {options.node_link_gbs:g} a node"
    # or the page would name a data sheet for numbers that are not of it
    own = [name for name in ("tflops", "memory_bandwidth") if getattr(options, name)]
    changed = f" (but your {' and '.join(own)})" if own else ""
    kept = (
        f"{options.reserve_gb:g} GB of a GPU are left to CUDA, NCCL and fragments, which is assumed"
    )
    return [f"modelled with {share}{changed},", f"links of {links};", kept]


def _gb(size: float) -> str:
    return f"{size / GB:.2f}"


def document(
    found: list[Estimate], refused: dict[str, str], shape: dict[str, int], options: Any
) -> dict[str, Any]:
    """All of it for machines: bytes, operations, seconds."""
    strategies = {}
    for it in found:
        parts: dict[str, dict[str, int]] = defaultdict(dict)
        for (kind, network), size in it.found.parts.items():
            # the internal names of moments, such as the backward, are of no use outside
            place = network if network in ("segmentor", "discriminator") else "neither"
            parts[kind][place] = parts[kind].get(place, 0) + size
        strategies[it.name] = {
            "peak_bytes": it.found.peak,
            "between_steps_bytes": it.found.between,
            "parts_bytes": parts,
            "exchange": exchanged(it.found),
            "operations": it.found.operations,
            "fits": it.fits,
            "modelled_seconds": vars(it.seconds),
        }
    # what the seconds and the fits depend on beside the counts
    given = {name: getattr(options, name) for name in ("chip", "efficiency", "reserve_gb")}
    return {"shape": shape, "hardware": given, "strategies": strategies, "refused": refused}
