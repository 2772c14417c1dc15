"""Is this machine, or are these machines, fit for a run? One screen, in seconds.

The exit code is 1 for what is not.
"""

from __future__ import annotations

import socket
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from distseg.distributed.ranks import Ranks, joined, on_all, on_main
from distseg.doctor import checkup
from distseg.doctor.checkup import CheckResult, Checkup, check_rank, nearest
from shards.words import counted

TIMEOUT_SECONDS = 60.0  # for all ranks to come, and for a collective
_SLOW = 1.5  # times the median rank's work: such a rank holds all others up
_MAX_SKEW_SECONDS = 1.0  # between clocks: logs of several machines, and expiring credentials
_MESSAGES, _EXCHANGES = 50, 11  # small all-reduces; readings of the clocks, odd for their median
# about the gradients of a large, of a small network
_NUM_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
_SECONDS = 2.0  # that the large all-reduces take in all, about
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def run(run_dir: Path, shards: str | None, split: str, device: str) -> int:
    """`distseg doctor`: check, print, and return 1 when there is an error, on every rank alike.

    Raises InputError, as training would, when the ranks do not meet.
    """
    started = time.perf_counter()
    # a check too: ranks that do not find each other end here, with the reason
    with joined(device, TIMEOUT_SECONDS) as ranks:
        hosts = on_all(ranks, socket.gethostname())
        # on every rank, since most of it is exchanged; all get the same list, and so exit alike
        found = examine(ranks, hosts, run_dir, shards, split)
        if ranks.is_main:
            machines = counted(len(set(hosts)), "machine")
            where = f"{counted(ranks.world_size, 'rank')} on {machines}"
            show(found, where, time.perf_counter() - started)
    return int(any(result.level == "error" for result in found))


def examine(
    ranks: Ranks, hosts: Sequence[str], run_dir: Path, shards: str | None, split: str
) -> list[CheckResult]:
    """Everything that is found, the same list on every rank.

    hosts: the name of every rank's machine.
    """
    everyone = on_all(
        ranks, check_rank(ranks, hosts.count(hosts[ranks.rank]), run_dir, shards, split)
    )
    # after the exchange above: nobody's test of a disk is still running beside these
    together = [straggler(ranks, hosts), clocks(ranks, hosts), communication(ranks)]
    return [
        *common(everyone),
        *of_ranks(everyone),
        shared_directory(ranks, run_dir, hosts),
        *together,
    ]


def of_ranks(everyone: Sequence[Checkup]) -> list[CheckResult]:
    """The ranks' own results; what several found alike is said once, and where else it was
    found.
    """
    alike: dict[CheckResult, list[Checkup]] = {}
    for checkup_of_rank in everyone:
        for result in checkup_of_rank.results:
            alike.setdefault(result, []).append(checkup_of_rank)
    # several answers to one check: only then it matters who gave which
    num_answers = Counter(result.name for result in alike)
    # on a single machine its name would say nothing
    has_machines = len({one.host for one in everyone}) > 1
    # by check, in the order in which they were first met
    order = list(num_answers)
    merged = []
    for result, found_by in sorted(alike.items(), key=lambda item: order.index(item[0].name)):
        where = _where(found_by, has_machines) if num_answers[result.name] > 1 else ""
        merged.append(replace(result, text=where + result.text))
    return merged


def _where(found_by: Sequence[Checkup], has_machines: bool) -> str:
    """The machines, or on a single one the ranks, as the beginning of a text."""
    if has_machines:
        return f"{', '.join(dict.fromkeys(one.host for one in found_by))}: "
    return f"rank {', '.join(str(one.rank) for one in found_by)}: "


def common(everyone: Sequence[Checkup]) -> list[CheckResult]:
    """Versions and devices, which must be the same for all."""
    versions = []
    for one in everyone:
        versions.append(
            ", ".join(f"{name} {text}" for name, text in one.values["versions"].items())
        )
    devices = [one.values["device"] for one in everyone]
    has_kinds = len({one.values["kind"] for one in everyone}) > 1
    return [
        _same("versions", versions, everyone, "error"),
        _same("device", devices, everyone, "error" if has_kinds else "warning"),
    ]


def _same(name: str, texts: Sequence[str], everyone: Sequence[Checkup], level: str) -> CheckResult:
    """Whether all ranks have the same; level: of the result when not."""
    counts = Counter(texts)
    if len(counts) == 1:
        times = f"{len(texts)} x " if name == "device" else ""
        return CheckResult("ok", name, times + texts[0])
    # the odd one out is named, not whichever differs from rank 0
    usual = counts.most_common(1)[0][0]
    odd = next(rank for rank, text in enumerate(texts) if text != usual)
    text = f"rank {odd} on {everyone[odd].host} has {texts[odd]}, others {usual}"
    action = "start all ranks with the same software, on the same devices"
    return CheckResult(level, name, text, action)


def straggler(ranks: Ranks, hosts: Sequence[str]) -> CheckResult:
    """Whether a rank takes much longer than the others for the same work, which they do at the same
    time.
    """
    on_all(ranks, None)  # all at once, as in a step
    seconds = on_all(ranks, checkup.compute_seconds(ranks.device))
    # of the ranks: one slow rank moves a mean, and would hide in it
    median = statistics.median(seconds)
    text = f"the same work takes {1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f} ms"
    slow = [rank for rank, value in enumerate(seconds) if value > _SLOW * median]
    if not slow:
        return CheckResult(
            "ok",
            "slow ranks",
            text if ranks.world_size > 1 else f"one rank; work takes {1e3 * median:.1f} ms",
        )
    named = ", ".join(
        f"rank {rank} on {hosts[rank]} ({seconds[rank] / median:.1f} times the median)"
        for rank in slow[:4]
    )
    action = "look for other processes there, throttling, or too few cores; every step waits for it"
    return CheckResult("warning", "slow ranks", f"{text}: {named}", action)


def clocks(ranks: Ranks, hosts: Sequence[str]) -> CheckResult:
    """The largest difference of two ranks' clocks, from what they read when all have met."""
    readings = []
    for _ in range(_EXCHANGES):
        on_all(ranks, None)
        readings.append(on_all(ranks, time.time()))
    offsets = []
    for rank in range(ranks.world_size):
        # of several: a rank can be late to read its clock when all have met
        offsets.append(statistics.median(one[rank] - one[0] for one in readings))
    skew = max(offsets) - min(offsets)
    if skew <= _MAX_SKEW_SECONDS:
        return CheckResult(
            "ok", "clocks", f"agree within {1e3 * skew:.0f} ms" if ranks.world_size > 1 else "one"
        )
    worst = max(
        range(len(offsets)), key=lambda rank: abs(offsets[rank] - statistics.median(offsets))
    )
    text = f"differ by {skew:.1f} s; that of {hosts[worst]} most"
    return CheckResult(
        "warning", "clocks", text, "let the machines follow a time server (chrony, ntpd)"
    )


def shared_directory(ranks: Ranks, run_dir: Path, hosts: Sequence[str]) -> CheckResult:
    """Whether every rank sees in the run directory what the main rank writes there."""
    # of the main rank's making, or every rank would look for a name of its own
    name = on_main(ranks, lambda: f".distseg-doctor-{uuid.uuid4().hex}")
    parent = on_main(ranks, lambda: str(nearest(run_dir)))
    path = Path(parent) / name
    with suppress(OSError):  # that is a result already
        on_main(ranks, lambda: path.touch())
    # once all have looked (on_all waits for them) it can be removed
    sees = on_all(ranks, path.exists())
    if ranks.is_main:
        with suppress(OSError):
            path.unlink()
    # `run_directory` has said so already, as an error
    if not sees[0]:
        return CheckResult("ok", "shared directory", "not looked for: it cannot be written")
    blind = [rank for rank, it_sees in enumerate(sees) if not it_sees]
    if blind:
        text = f"rank {blind[0]} on {hosts[blind[0]]} does not see what rank 0 writes in {parent}"
        return CheckResult(
            "error",
            "shared directory",
            text,
            "choose a --run-dir on a file system that all machines share",
        )
    return CheckResult(
        "ok", "shared directory", "all ranks see it" if ranks.world_size > 1 else "one rank"
    )


def communication(ranks: Ranks) -> CheckResult:
    """Latency and bandwidth of an all-reduce over all ranks."""
    if ranks.world_size == 1:
        return CheckResult(
            "ok", "all-reduce", "one rank; start it with torchrun or srun to measure the network"
        )
    small = torch.ones(1, device=ranks.device)
    # bytes / 4: fp32, as gradients are
    large = torch.ones(_NUM_BYTES[ranks.device.type] // 4, device=ranks.device)
    latency, first = _timed(ranks, small, _MESSAGES), _timed(ranks, large, 1)
    # as many as fit into half of the time, by how long the first took
    times = max(1, min(20, int(_SECONDS / 2 / first)))
    seconds = _timed(ranks, large, times)
    # over each rank's link, by a ring
    moved = 2 * (ranks.world_size - 1) / ranks.world_size * large.numel() * 4
    backend = "NCCL" if ranks.device.type == "cuda" else "gloo"
    text = f"{backend}: {1e6 * latency:.0f} us for one number, "
    text += f"{moved / seconds / 1e9:.2f} GB/s per rank "
    return CheckResult(
        "ok", "all-reduce", text + f"({large.numel() * 4 >> 20} MiB in {1e3 * seconds:.1f} ms)"
    )


def _timed(ranks: Ranks, tensor: torch.Tensor, times: int) -> float:
    """Seconds of one all-reduce, the median of `times`; of the slowest rank, so that all agree."""
    dist.all_reduce(tensor.clone())  # the first one connects
    seconds = []
    for _ in range(times):
        # a copy, or the sums of sums would end at infinity
        work = tensor.clone()
        _wait(ranks)
        start = time.perf_counter()
        dist.all_reduce(work)
        _wait(ranks)
        seconds.append(time.perf_counter() - start)
    # the slowest rank's, as it is what a step waits for
    return max(on_all(ranks, statistics.median(seconds)))


def _wait(ranks: Ranks) -> None:
    # a collective on a GPU returns before it is done
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)


def show(
    found: Sequence[CheckResult], where: str, seconds: float, console: Console | None = None
) -> None:
    """Print the results, each with what to do about it."""
    console = console or Console(highlight=False)
    table = Table(
        title=escape(f"distseg doctor: {where}"), title_justify="left", box=None, pad_edge=False
    )
    for column in ("", "check", "found"):
        # folded and not cut off: the end of a path is what tells it from others
        table.add_column(column, overflow="fold", no_wrap=column != "found")
    for result in found:
        text = Text(result.text)
        if result.level != "ok":
            text.append(f"\nto do: {result.action}", "bold")
        table.add_row(Text(result.level, _STYLES[result.level]), result.name, text)
    console.print(table)
    counts = Counter(result.level for result in found)
    outcome = "fit for a run"
    if counts["error"]:
        outcome = "a run would break"
    elif counts["warning"]:
        outcome = "a run may suffer"
    console.print(
        f"{counted(counts['error'], 'error')}, {counted(counts['warning'], 'warning')}: "
        f"{outcome} ({seconds:.1f} s)"
    )
