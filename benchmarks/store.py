"""What the ranks of a large job ask of each other besides gradients, at so many simulated ranks:
messages, bytes at the main rank, seconds.

Each rank is an object with a connection of its own to a real TCPStore; all are threads of this
process, so that seconds are those of one interpreter and an upper bound. Collectives are those of
torch's `threaded` process group, of which only what each rank is given is counted.

Run: python -m benchmarks.store [--ranks 64 256 1024]
"""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from benchmarks.conditions import conditions
from distseg.distributed import mailbox, ranks, rendezvous
from distseg.distributed.beats import Beat, Beats
from distseg.distributed.mailbox import Mailbox
from distseg.distributed.ranks import Ranks
from distseg.distributed.stop import StopRequest
from distseg.distributed.store import BoundedStore
from distseg.distributed.watchdog import Watchdog
from distseg.parallel.parameter_shards import ParameterShard
from distseg.runs import tensor_files

SECONDS = 300.0  # the usual time limit
CPU = torch.device("cpu")
Result = TypeVar("Result")


@dataclass
class Traffic:
    """messages: calls of the store; num_bytes: of their keys and values, both ways."""

    messages: int = 0
    num_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, *texts: str | bytes) -> None:
        with self.lock:
            self.messages += 1
            self.num_bytes += sum(map(len, texts))


class CountedStore:
    """A connection of one rank, whose calls are counted."""

    def __init__(self, store: Any, traffic: Traffic):
        self._store, self._traffic = store, traffic

    def set(self, key: str, value: str) -> None:
        self._traffic.count(key, value)
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        value = self._store.get(key)
        self._traffic.count(key, value)
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        values = self._store.multi_get(keys)
        self._traffic.count(*keys, *values)
        return values

    def add(self, key: str, amount: int) -> int:
        self._traffic.count(key, 8 * b" ")
        return self._store.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        self._traffic.count(*keys)
        return self._store.check(keys)

    def delete_key(self, key: str) -> bool:
        self._traffic.count(key)
        return self._store.delete_key(key)

    def wait(self, keys: list[str], timeout: Any) -> None:
        self._traffic.count(*keys)
        self._store.wait(keys, timeout)


class Job:
    """So many ranks, each with its own connection to one store."""

    def __init__(self, num_ranks: int):
        self.num_ranks, self.traffic = num_ranks, Traffic()
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.stores = [self._connected() for _ in range(num_ranks)]

    def _connected(self) -> CountedStore:
        client = dist.TCPStore(
            "127.0.0.1", self.server.port, is_master=False, wait_for_workers=False
        )
        return CountedStore(client, self.traffic)

    def rank(self, number: int) -> Ranks:
        return Ranks(number, self.num_ranks, 0, CPU)

    def watchdogs(self) -> list[Watchdog]:
        """One for each rank, whose thread this benchmark takes the place of."""
        members = []
        for number, store in enumerate(self.stores):
            # one of a job of one rank has no thread
            member = Watchdog(Ranks(0, 1, 0, CPU), SECONDS, lambda code: None)
            member._ranks, member._store = self.rank(number), BoundedStore(store, SECONDS)
            waits = member._interval, member._patience
            member._beats = Beats(member._ranks, member._store, *waits)
            member.report("step 1")
            members.append(member)
        return members

    def measured(
        self, work: Callable[[int], object], num_threads: int | None = None
    ) -> tuple[float, float, float]:
        """Messages of a rank, kB at the store's keeper, and seconds, of what all ranks do at
        once.
        """
        before, start = (self.traffic.messages, self.traffic.num_bytes), time.perf_counter()
        with ThreadPoolExecutor(num_threads or self.num_ranks) as threads:
            list(threads.map(work, range(self.num_ranks)))
        seconds = time.perf_counter() - start
        messages, num_bytes = self.traffic.messages - before[0], self.traffic.num_bytes - before[1]
        return messages / self.num_ranks, num_bytes / 1e3, seconds


def of_store(num_ranks: int) -> Iterator[tuple[str, float, float, float]]:
    """What goes through the store: a row for each occasion."""
    job = Job(num_ranks)
    yield "all arrive", *job.measured(_arrival(job, num_ranks))
    members = job.watchdogs()
    for member in members:
        member._look()
    # few at once: in a job they are spread over the interval of 5 s
    yield "the watchdog, an interval", *job.measured(lambda r: members[r]._look(), 8)
    yield "a stall is found", *job.measured(lambda r: members[r]._beats.stall("step 1"), 64)
    beating, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=_beat, args=(job, beating, ended))
    thread.start()
    beating.wait()
    for member in members:
        # listens for 2 s instead of 12.5, as nothing but waiting is done
        member._beats._interval = 0.8
    row = job.measured(lambda r: members[r]._beats.silent())
    ended.set()
    thread.join()
    yield "a lost rank breaks a collective", *row
    boxes = _mailboxes(job)
    yield "a checkpoint's parts are told", *job.measured(lambda r: _round(boxes[r], r))


def _arrival(job: Job, num_expected: int) -> Callable[[int], None]:
    def arrive(rank: int) -> None:
        rendezvous._wait_for_all(job.stores[rank], rank, num_expected, SECONDS)  # type: ignore[arg-type]

    return arrive


def _beat(job: Job, beating: threading.Event, ended: threading.Event) -> None:
    """All but rank 1, which is lost, past the counters: they beat for themselves."""
    number = 0
    while not ended.is_set():
        number += 1
        beat = json.dumps(asdict(Beat(number, 1, "step 1", "a host", False, False)))
        for rank in range(job.num_ranks):
            if rank != 1:
                job.server.set(f"beat/{rank}", beat)
        beating.set()
        ended.wait(0.3)


def _mailboxes(job: Job) -> list[Mailbox]:
    boxes = []
    opened = mailbox.own_store
    for number, store in enumerate(job.stores):
        mailbox.own_store = lambda *_, store=store: BoundedStore(store, SECONDS)  # type: ignore
        boxes.append(Mailbox(job.rank(number), SECONDS))
    mailbox.own_store = opened
    return boxes


def _round(box: Mailbox, rank: int) -> None:
    # three files with FSDP: network, optimizer, average
    letter = {f"segmentor.part-{n}.{rank}-of-1024.safetensors": 64 * "0" for n in range(3)}
    if rank:
        box.send(1, letter)  # type: ignore[arg-type]
    else:
        box.collect(1, SECONDS)


def of_collectives(num_ranks: int) -> Iterator[tuple[str, float, float]]:
    """kB that the main rank and another one are given, for each occasion."""
    occasions: dict[str, Callable[[Ranks], object]] = {
        "an agreed error, of which there is none": lambda r: ranks.on_each(r, lambda: None),
        "something that all must have alike": lambda r: ranks.of_all(r, (r.rank, "a host"), len),
        "the agreed stop, in a step": lambda r: _step(StopRequest()),
    }
    for name, work in occasions.items():
        _, given = together(num_ranks, work)
        yield name, given[0] / 1e3, given[1] / 1e3


def of_agreement(num_ranks: int) -> Counter[tuple[bool, bool, str]]:
    """How many ranks are told in which of two steps to stop, and then raise which error: a signal
    comes to one of them in the second step, and in the end two fail, each alone.
    """
    one, later = num_ranks // 3, num_ranks // 2

    def work(own: Ranks) -> tuple[bool, bool, str]:
        stop = StopRequest()
        told = _step(stop), _step(stop, own.rank == one)
        try:
            ranks.on_each(own, lambda: _fail(own.rank) if own.rank in (one, later) else None)
        except ValueError as error:
            return *told, str(error)
        return *told, "none"

    found, _ = together(num_ranks, work)
    return Counter(found)


def _step(stop: StopRequest, is_signalled: bool = False) -> bool:
    """Whether training stops after a step, as the trainer asks."""
    if is_signalled:
        # as Python calls it, but in a main thread
        stop._on_signal(signal.SIGUSR1, None)
    stop.begin()
    return stop.agreed()


def _fail(rank: int) -> None:
    raise ValueError(f"of rank {rank}")


def together(
    num_ranks: int, work: Callable[[Ranks], Result]
) -> tuple[list[Result], dict[int, int]]:
    """What `work` returns on each rank, all in threads of this process; and the bytes that its
    collectives give to ranks 0 and 1.
    """
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    given, number = {0: 0, 1: 0}, threading.local()
    names = ("all_reduce", "gather", "broadcast", "all_gather_object", "broadcast_object_list")
    patched = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = patched[name](*arguments, **options)
            if number.rank in given:
                given[number.rank] += _num_bytes(name, arguments)
            return result

        return call

    def run(rank: int) -> Result:
        number.rank = rank
        dist.init_process_group("threaded", rank=rank, world_size=num_ranks, store=store)
        result = work(Ranks(rank, num_ranks, 0, CPU))
        dist.destroy_process_group()
        return result

    threaded._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    # for groups beside the first, and at each arrival it wakes all that have come
    barrier, threaded._store_based_barrier = threaded._store_based_barrier, lambda *_: None
    store, interval = dist.HashStore(), sys.getswitchinterval()
    # nearly all wait for each other, and would wake up every 5 ms to ask for their turn
    sys.setswitchinterval(1.0)
    try:
        for name in patched:
            setattr(dist, name, counting(name))
        with ThreadPoolExecutor(num_ranks) as threads:
            return list(threads.map(run, range(num_ranks))), given
    finally:
        sys.setswitchinterval(interval)
        threaded._store_based_barrier = barrier
        for name, function in patched.items():
            setattr(dist, name, function)
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        threaded._uninstall_threaded_pg()


def _num_bytes(name: str, arguments: Sequence[Any]) -> int:
    if name in ("all_reduce", "broadcast"):
        return arguments[0].nbytes
    if name == "gather":
        # the main rank alone is given something
        return sum(tensor.nbytes for tensor in arguments[1] or ())
    return sum(len(pickle.dumps(value)) for value in arguments[0])


def of_checkpoint(num_ranks: int, num_tensors: int = 100) -> tuple[int, float]:
    """Files that a rank opens of a part which so many have written, and the seconds."""
    rows = 2 * num_ranks
    with tempfile.TemporaryDirectory() as folder:
        for index in range(num_ranks):
            names = [f"layer{number}.weight" for number in range(num_tensors)]
            tensors = {name: torch.full((2, 4), float(index)) for name in names}
            file = tensor_files.TensorFile(f"segmentor.network.{index + 1}-of-{num_ranks}")
            file.tensors, file.shards = tensors, dict.fromkeys(names, (2 * index, rows))
            header = {tensor_files.SHARDS_KEY: json.dumps(file.shards)}
            save_file(tensors, Path(folder) / (file.name + tensor_files.SUFFIX), header)
        return _read_own(Path(folder), names, num_ranks)


def _read_own(folder: Path, names: Sequence[str], num_ranks: int) -> tuple[int, float]:
    """As rank 3 reads: its two rows of each tensor."""
    opened, own = [0], torch.zeros(2, 4)
    safe_open, of, like = tensor_files.safe_open, tensor_files.shard_of, tensor_files.sharded_like

    def counted(*arguments: Any, **options: Any) -> Any:
        opened[0] += 1
        return safe_open(*arguments, **options)

    tensor_files.safe_open = counted  # type: ignore[misc, assignment]
    tensor_files.shard_of = lambda t: ParameterShard(own, tuple(t.shape), 6, 3, num_ranks)
    tensor_files.sharded_like = lambda rows, like: rows
    start = time.perf_counter()
    try:
        whole = dict.fromkeys(names, torch.zeros(2 * num_ranks, 4))
        found = tensor_files.read(folder, "segmentor.network", whole)
    finally:
        tensor_files.safe_open, tensor_files.shard_of = safe_open, of
        tensor_files.sharded_like = like
    assert all(torch.equal(tensor, torch.full((2, 4), 3.0)) for tensor in found.values())
    return opened[0], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    chosen = parser.parse_args().ranks
    # a connection is an open file, at both of its ends here
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    print(conditions(threads=1))
    for num_ranks in chosen:
        print(f"\n{num_ranks} ranks, through the store: messages a rank, kB at the main rank, s")
        for name, messages, kilobytes, seconds in of_store(num_ranks):
            print(f"  {name:42}{messages:10.1f}{kilobytes:12.1f}{seconds:9.2f}")
        print("  collectives: kB given to the main rank, and to another one")
        for name, of_main, of_other in of_collectives(num_ranks):
            print(f"  {name:42}{of_main:10.3f}{of_other:12.3f}")
        for (*told, error), count in of_agreement(num_ranks).items():
            print(f"  {count} ranks: told to stop in steps 1 and 2: {told}, then the error {error}")
        opened, seconds = of_checkpoint(num_ranks)
        print(f"  a part of {num_ranks} files, 100 tensors: {opened} opened, {seconds:.2f} s")


if __name__ == "__main__":
    main()
