"""Where the ranks of a job find each other, and what is said of those that do not come."""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import time
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from distseg.distributed.bounded import LateError, ends_within, in_time
from distseg.distributed.by_first import by_first
from distseg.distributed.launch import (
    end_stopped_torchrun,
    is_store_of_torchrun,
    store_keeper,
)
from shards.errors import InputError, TemporaryError

# Of the time limit. What is left of it is for the ranks to tell each other who is missing.
_SHARE_FOR_ARRIVALS = 0.8
_ALL_ARRIVED = "all have arrived"

_joins = itertools.count()  # of this process, as many as of every other one
_stores: dict[str, dist.Store] = {}  # by address


def join(rank: int, world_size: int, backend: str, timeout_seconds: float) -> None:
    """Make the job's process group.

    Raises InputError where the port is taken, and TemporaryError, with their names, for ranks that
    have not come in time. Where another process does not answer at all, as it is stopped, this one
    ends, with TemporaryError's exit code: a call of torch that waits for it cannot be given up.
    """
    if world_size == 1:
        _init_process_group(rank, 1, backend, dist.HashStore(), timeout_seconds)  # no port needed
        return
    end = time.monotonic() + timeout_seconds * _SHARE_FOR_ARRIVALS
    try:
        # both know limits of their own, but none for an answer of a process that is stopped
        store = in_time(end - time.monotonic(), _opened_store, rank, timeout_seconds)
        left = max(1.0, end - time.monotonic())
        in_time(left + timeout_seconds / 10, _wait_for_all, store, rank, world_size, left)
    except LateError as error:
        _leave(rank, str(_no_answer(error)))
    except dist.DistError as error:  # it has left, before this rank's own time was up
        raise _no_answer(error) from None
    stopped = f"a rank has stopped while all joined: no connection for {timeout_seconds:.0f} s"
    with ends_within(timeout_seconds, lambda: _leave(rank, stopped)):
        _init_process_group(rank, world_size, backend, store, timeout_seconds)


def _init_process_group(
    rank: int, world_size: int, backend: str, store: dist.Store, timeout_seconds: float
) -> None:
    timeout = timedelta(seconds=timeout_seconds)
    try:
        dist.init_process_group(
            backend, rank=rank, world_size=world_size, store=store, timeout=timeout
        )
    except RuntimeError as error:  # torch's DistError too
        got = f"the ranks do not reach each other: {str(error).splitlines()[0]}"
        raise TemporaryError(f"{got} (is a firewall between the machines?)") from None


def _opened_store(rank: int, timeout_seconds: float) -> dist.Store:
    """This start's part of the job's store.

    On one machine torchrun keeps its store when it starts lost ranks again, and their addresses in
    it, where nobody is any more. So each start has a part of its own. (On several its machines may
    count the restarts differently.)
    """
    on_one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if on_one_machine else "any"
    try:
        store = _job_store(rank, timedelta(seconds=timeout_seconds))
    except dist.DistError as error:
        raise _error_of_store(error) from None
    return dist.PrefixStore(f"start-{start}-{next(_joins)}", store)


def _job_store(rank: int, timeout: timedelta) -> dist.Store:
    """Kept from one job of a process to its next: a rank that is quicker would find a server that
    is about to end.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    address = f"{host}:{port}"
    if address not in _stores:
        # not dist.rendezvous, which waits for all ranks in here and does not say who is missing
        is_of_torchrun = is_store_of_torchrun(dict(os.environ))
        _stores[address] = dist.TCPStore(
            host,
            port,
            is_master=rank == 0 and not is_of_torchrun,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=not is_of_torchrun,
        )
    # one that was kept has the timeout of the job before
    _stores[address].set_timeout(timeout)
    return _stores[address]


def _wait_for_all(store: dist.Store, rank: int, world_size: int, seconds: float) -> None:
    """Until every rank has come. Raises TemporaryError, naming those that have not."""
    store.set(_key(rank), json.dumps(_place()))
    # one message a rank, where asking for all the others would be as many as there are ranks
    if store.add("number of arrivals", 1) >= world_size:
        store.set(_ALL_ARRIVED, "")
    try:
        store.wait([_ALL_ARRIVED], timedelta(seconds=seconds))
    except dist.DistError:
        moment = min(1.0, seconds / 16)
        named = by_first(store, "missing", lambda: _missing(store, world_size), moment)
        # a moment in which the others can ask too: this process may keep the store
        time.sleep(moment if rank == 0 else 0.0)
        raise TemporaryError(
            f"{named} did not come to the rendezvous at {_address()} within {seconds:.0f} s"
        ) from None


def _missing(store: dist.Store, world_size: int) -> str:
    """The ranks that have not come, for people."""
    missing, places = [], {}
    for other in range(world_size):
        if store.check([_key(other)]):
            places[other] = json.loads(store.get(_key(other)))
        else:
            missing.append(other)
    return ", ".join(_named(other, places) for other in missing) or "a rank"


def _key(rank: int) -> str:
    return f"arrived/{rank}"


def _place() -> dict[str, Any]:
    """Where this rank runs: its host, and which ranks its launcher has started there."""
    number = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "1"
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return {
        "host": socket.gethostname(),
        "local_rank": int(local),
        "num_local": int(number) if number.isdecimal() else 1,
    }


def _named(rank: int, places: dict[int, dict[str, Any]]) -> str:
    """A rank that has not come, with its host where one of its neighbours there has."""
    for other, place in places.items():
        # launchers number the ranks of a machine in a row
        first = other - place["local_rank"]
        if first <= rank < first + place["num_local"]:
            return f"rank {rank} on {place['host']}"
    return f"rank {rank}"


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _leave(rank: int, said: str) -> NoReturn:
    """End the process: one of its threads waits for another process, and knows no limit."""
    # not by an exception: the interpreter's end would crash with a thread inside of torch
    print(f"error on rank {rank}: {said}", file=sys.stderr, flush=True)
    end_stopped_torchrun()
    os._exit(TemporaryError.exit_code)


def _error_of_store(error: Exception) -> Exception:
    # torch has one type for all of these, so its words must do
    if "EADDRINUSE" not in str(error) and "in use" not in str(error):
        return _no_answer(error)
    # so that the advice can be followed as it stands
    with socket.socket() as probe:
        probe.bind(("", 0))
        free = probe.getsockname()[1]
    action = f"set MASTER_PORT={free} (free now), or use torchrun --standalone, which finds one"
    return InputError(
        f"the port of {_address()} is in use", "a free port for the rendezvous", action
    )


def _no_answer(error: Exception) -> TemporaryError:
    what = str(error).splitlines()[0]
    return TemporaryError(
        f"{store_keeper(dict(os.environ))} does not answer at {_address()} ({what}): it hangs, has "
        "stopped or not started, or a firewall is between"
    )
