"""Ranks: who am I, sums over all ranks, work that one rank does for all, and the agreed stop."""

from __future__ import annotations

import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distseg.distributed.bounded import LateError, in_time
from distseg.distributed.compat import destroy_process_groups
from distseg.distributed.launch import rendezvous_of_srun, resolve_ranks
from distseg.distributed.rendezvous import join
from shards.errors import InputError
from shards.words import counted

Result = TypeVar("Result")
Conclusion = TypeVar("Conclusion")
_TEARDOWN_SECONDS = 20.0  # after an error


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank of world_size, local_rank on its machine, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that talks, and writes all files but the other ranks' parts of
        checkpoints.
        """
        return self.rank == 0


def setup(device: str, timeout_seconds: float) -> Ranks:
    """Join the job: NCCL for CUDA tensors, gloo for CPU tensors (those carry the control messages
    too).

    device: auto, cpu or cuda. Raises InputError for a device that is not there or a port that is
    taken, and TemporaryError, with their names, for ranks that have not come within the timeout.
    """
    rank, world_size, local_rank = resolve_ranks(dict(os.environ))
    # srun tells a rank its number, but not where the ranks meet
    if world_size > 1 and "RANK" not in os.environ:
        os.environ.update(rendezvous_of_srun(dict(os.environ)))
    on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    own_device = _cuda_device(local_rank) if on_gpu else torch.device("cpu")
    ranks = Ranks(rank, world_size, local_rank, own_device)
    if on_gpu:
        # before NCCL's first use: it takes the current GPU, number 0 in every new process
        torch.cuda.set_device(own_device)
    elif world_size == 1 and "OMP_NUM_THREADS" not in os.environ:
        # torch counts the machine's cores; of several ranks the launcher sets the number
        torch.set_num_threads(_usable_cores())
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    join(rank, world_size, backend, timeout_seconds)
    if on_gpu:
        _check_own_gpus(ranks)
    return ranks


def _cuda_device(local_rank: int) -> torch.device:
    """This process's GPU: the one of its local rank, or the only one, where a launcher shows each
    process its own.
    """
    there = torch.cuda.device_count()
    if not there:
        action = "write device=cpu, or check the driver"
        raise InputError("device=cuda, and no CUDA device is visible", "a CUDA device", action)
    return torch.device("cuda", local_rank % there)  # one GPU twice is found once all have joined


def _check_own_gpus(ranks: Ranks) -> None:
    """Raise InputError, on every rank, when two processes of a machine have the same GPU."""
    # not by its number: where a launcher shows each process one GPU, all of them have number 0
    uuid = str(torch.cuda.get_device_properties(ranks.device).uuid)
    of_all(ranks, (socket.gethostname(), uuid), _check_no_gpu_twice)


def _check_no_gpu_twice(owners: list[tuple[str, str]]) -> None:
    shared = [rank for rank, owner in enumerate(owners) if owners.index(owner) != rank]
    if shared:
        got = f"rank {shared[0]} has the same GPU as rank {owners.index(owners[shared[0]])}"
        action = "lower --nproc_per_node, or write device=cpu"
        raise InputError(got, "one CUDA device per process", action)


def _usable_cores() -> int:
    """Cores that this process may run on: a cluster's job can have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def teardown() -> None:
    """Leave the job; without effect when it was never joined."""
    if dist.is_initialized():
        destroy_process_groups()


def check_alone() -> None:
    """Raise InputError where this process has joined a job of its own already."""
    if dist.is_initialized():
        ranks = counted(dist.get_world_size(), "rank")
        got = f"a process group of {ranks}, which this process has made"
        action = "call torch.distributed.destroy_process_group() first; torchrun's ranks are found"
        raise InputError(got, "none: distseg joins and leaves its own", action)


@contextmanager
def joined(device: str = "auto", timeout_seconds: float = 300.0) -> Iterator[Ranks]:
    """`setup`, and `teardown` however the block ends.

    Raises InputError as `setup` does, and where the process has a process group already.
    """
    check_alone()
    try:
        # inside of the try: a setup that fails late has made a process group already
        yield setup(device, timeout_seconds)
    except BaseException as error:
        # for whoever tells it to the user, when the group is gone: ranks no longer fail alike
        error.raised_in_job = dist.is_initialized()  # type: ignore[attr-defined]
        # the other ranks may be gone, and NCCL could wait for them
        with suppress(LateError):
            in_time(_TEARDOWN_SECONDS, teardown)
        raise
    teardown()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place; every rank gets the same bits."""
    # a process that has joined no job is the whole of it
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def on_main(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """What `work` returns on the main rank, on every rank; its exception is raised on every rank
    too.

    Without this, an error while one rank writes a file leaves the others waiting for it.
    """
    outcome: list[Any] = [None, None]
    if ranks.is_main:
        try:
            outcome[0] = work()
            pickle.dumps(outcome)  # or nothing would be sent, and the others would wait for it
        except Exception as error:
            outcome = [None, _sendable(error)]
    result, failure = _sent_by(ranks, 0, outcome)
    if failure is not None:
        raise shared_error(failure)
    return result


def on_each(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """What `work` returns on this rank, once it has succeeded on all of them; the first that fails,
    fails on every one.

    `work` must not communicate: a rank that fails in it would leave the others waiting.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = _sendable(error)
    # the same error everywhere, and no rank goes on alone into the next collective
    first = _first(ranks, failure is not None)
    if first is not None:
        raise shared_error(_sent_by(ranks, first, failure))
    return result  # type: ignore[return-value]


def _first(ranks: Ranks, is_it: bool) -> int | None:
    """The lowest rank that says so, on every rank; None: none does."""
    found = torch.tensor([ranks.rank if is_it else ranks.world_size])
    if ranks.world_size > 1:
        # a number, and not every rank's answer to every rank: nearly always there is nothing to say
        dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found) if found < ranks.world_size else None


def _sent_by(ranks: Ranks, source: int, value: Any) -> Any:
    """The value of one rank, on every rank."""
    values = [value]
    if ranks.world_size > 1:
        # by gloo: over NCCL the message would queue behind the GPU's work
        dist.broadcast_object_list(values, src=source, device=torch.device("cpu"))
    return values[0]


def on_main_for_long(
    ranks: Ranks, work: Callable[[], Result], alive: Callable[[], None], turn_seconds: float = 0.5
) -> Result:
    """As `on_main`, for work that may take longer than ranks wait in a collective, but has a limit
    of its own. alive: called on every rank again and again meanwhile.
    """
    task: Future[Result] = Future()
    if ranks.is_main:
        # a daemon: an interrupt must not wait for it
        threading.Thread(target=_settle, args=(task, work), name="for all", daemon=True).start()
    # in short turns: in one broadcast the others would run into its time limit
    while not on_main(ranks, lambda: bool(wait([task], turn_seconds).done)):
        alive()
    return on_main(ranks, task.result)


def _settle(task: Future[Result], work: Callable[[], Result]) -> None:
    try:
        task.set_result(work())
    except BaseException as error:
        task.set_exception(error)


def shared_error(error: Exception) -> Exception:
    """An error that every rank raises at this place, marked as such, so that one of them tells the
    user.
    """
    # a mark, and no type of its own: callers still catch it as the InputError that it is
    error.raised_on_all_ranks = True  # type: ignore[attr-defined]
    return error


def is_shared(error: BaseException) -> bool:
    """Whether every rank raises it."""
    return hasattr(error, "raised_on_all_ranks")


def _sendable(error: Exception) -> Exception:
    # some hold an open file or a lock, and could not reach the other ranks
    try:
        pickle.dumps(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def gathered_tensors(ranks: Ranks, tensor: Tensor) -> list[Tensor]:
    """On the main rank the CPU tensors of all ranks, which are of one shape; on the others []."""
    if ranks.world_size == 1:
        return [tensor]
    into = [torch.empty_like(tensor) for _ in range(ranks.world_size)] if ranks.is_main else None
    dist.gather(tensor, into, dst=0)
    return into or []


def gathered(ranks: Ranks, value: Result) -> list[Result]:
    """On the main rank [the `value` of rank 0, of rank 1, ...]; on the others []."""
    # not gather_object, which tells every rank the size of every other one's value
    content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    size = torch.tensor([len(content)])
    if ranks.world_size > 1:
        dist.all_reduce(size, dist.ReduceOp.MAX)
    # a pickle ends where it says so, whatever follows it
    padded = torch.zeros(int(size), dtype=torch.uint8)
    padded[: len(content)] = content
    return [pickle.loads(one.numpy().tobytes()) for one in gathered_tensors(ranks, padded)]


def of_all(ranks: Ranks, value: Result, work: Callable[[list[Result]], Conclusion]) -> Conclusion:
    """What `work` makes of [the `value` of rank 0, of rank 1, ...], on every rank; its exception is
    raised on every rank too.

    The main rank alone sees all values: at a thousand ranks a list of them on each would be a
    million messages.
    """
    # and on_main sends an error of it to all, so that none goes on alone
    values = gathered(ranks, value)
    return on_main(ranks, lambda: work(values))


def on_all(ranks: Ranks, value: Result) -> list[Result]:
    """[the `value` of rank 0, of rank 1, ...], on every rank: messages by the square of the ranks,
    so nothing for training.
    """
    values: list[Any] = [value] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(values, value)
    return values
