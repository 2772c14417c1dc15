"""Ranks: where they come from, agreed stops, errors that reach everyone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import store
from distseg.distributed import device, launch, mailbox, rendezvous
from distseg.distributed import ranks as ranks_module
from distseg.distributed import stop as stop_module
from distseg.distributed.by_first import by_first
from distseg.distributed.launch import first_host, rendezvous_of_srun, resolve_ranks
from distseg.distributed.mailbox import Failure, Mailbox
from distseg.distributed.ranks import (
    Ranks,
    gathered,
    is_shared,
    of_all,
    on_all,
    on_each,
    on_main,
    setup,
)
from distseg.distributed.stop import SIGNALS, StopRequest
from distseg.distributed.store import BoundedStore, SilentStoreError
from shards.errors import InputError, TemporaryError
from tests.ranks import CONTEXT, environments, run_ranks

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "1",
}


def test_ranks_come_from_torchrun_or_are_one() -> None:
    assert resolve_ranks({}) == (0, 1, 0)
    assert resolve_ranks({"MASTER_PORT": "1"}) == (0, 1, 0)
    assert resolve_ranks(TORCHRUN) == (1, 4, 1)


SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "71234",
}


def test_ranks_come_from_srun_where_torchrun_has_set_none() -> None:
    assert resolve_ranks(SRUN) == (3, 8, 1)
    assert resolve_ranks(SRUN | TORCHRUN) == (1, 4, 1)
    batch_script = {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "7",
    }
    assert resolve_ranks(batch_script) == (0, 1, 0)
    with pytest.raises(InputError, match="not SLURM_PROCID"):
        resolve_ranks({key: value for key, value in SRUN.items() if key != "SLURM_PROCID"})
    with pytest.raises(InputError, match="0 <= SLURM_PROCID"):
        resolve_ranks(SRUN | {"SLURM_PROCID": "8"})


@pytest.mark.parametrize(
    ("command", "ranks"),
    [
        (["bash", "--norc"], (0, 1, 0)),
        (["sh"], (0, 1, 0)),
        (["bash", "-c", "read line"], (3, 8, 1)),  # in every task, with or without a terminal
        (["bash", "/dev/stdin"], (3, 8, 1)),
        (["cat"], (3, 8, 1)),
    ],
)
def test_a_shell_of_srun_pty_has_no_other_ranks(
    command: list[str], ranks: tuple[int, int, int], caplog: pytest.LogCaptureFixture
) -> None:
    launch._say_that_it_is_alone.cache_clear()
    with subprocess.Popen(command, stdin=subprocess.PIPE) as task:
        interactive = SRUN | {"SLURM_PTY_PORT": "1", "SLURM_TASK_PID": str(task.pid)}
        # the kernel shows the words of a new process a moment late
        while not Path(f"/proc/{task.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        assert resolve_ranks(interactive) == resolve_ranks(interactive) == ranks
        assert resolve_ranks(interactive | TORCHRUN) == (1, 4, 1)
        task.communicate(b"\n")
    assert caplog.text.count("srun --pty with 8 tasks") == (ranks[1] == 1)


def test_a_step_of_srun_meets_at_its_first_host() -> None:
    nodes = {"SLURM_STEP_NODELIST": "gpu[003-007,12],login1", "SLURM_RESTART_COUNT": "2"}
    assert rendezvous_of_srun(SRUN | nodes) == {"MASTER_ADDR": "gpu003", "MASTER_PORT": "25290"}
    assert rendezvous_of_srun(SRUN | nodes | {"MASTER_PORT": "5"})["MASTER_PORT"] == "5"
    for text, host in (
        ("node1", "node1"),
        ("a-b,c", "a-b"),
        ("n[1-4]", "n1"),
        ("rack2n[09,11]", "rack2n09"),
    ):
        assert first_host(text) == host


@pytest.mark.parametrize(
    "missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
)
def test_a_half_set_environment_is_an_error_that_names_what_is_missing(missing: str) -> None:
    with pytest.raises(InputError, match=f"not {missing}"):
        resolve_ranks({key: value for key, value in TORCHRUN.items() if key != missing})


@pytest.mark.parametrize(("key", "value"), [("RANK", "4"), ("RANK", "-1"), ("WORLD_SIZE", "two")])
def test_contradictory_ranks_are_an_error(key: str, value: str) -> None:
    with pytest.raises(InputError):
        resolve_ranks(TORCHRUN | {key: value})


def test_a_port_in_use_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ranks = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for key, value in ranks.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(InputError, match=f"{port} is in use") as caught:
            setup("cpu", 5)
        assert "MASTER_PORT=" in str(caught.value)


def test_ranks_that_do_not_come_are_named_with_their_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # ranks 0 and 1 here, 2 and 3 elsewhere
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "1")
    store = torch.distributed.HashStore()

    def wait(rank: int) -> str:
        with pytest.raises(TemporaryError) as caught:
            rendezvous._wait_for_all(store, rank, 4, 0.8)
        return str(caught.value)

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(wait, 0)
        said = wait(0)
        assert said == other.result()
    assert said.startswith(f"rank 1 on {socket.gethostname()}, rank 2, rank 3 did not come")
    assert TemporaryError.exit_code == 75


def test_a_rank_that_came_late_does_not_outwait_a_rank_0_that_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in environments(2)[1].items():
        monkeypatch.setenv(key, value)

    def gone(*arguments: Any) -> None:
        raise torch.distributed.DistNetworkError("Failed to recv, got 0 bytes.")

    monkeypatch.setattr(rendezvous, "_opened_store", lambda *arguments: None)
    monkeypatch.setattr(rendezvous, "_wait_for_all", gone)
    with pytest.raises(TemporaryError, match=r"rank 0 on .* does not answer .*Failed to recv"):
        rendezvous.join(1, 2, "gloo", 5)


def join_in_vain(environment: dict[str, str], out: Path) -> None:
    os.environ.update(environment)
    with out.open("w") as file:
        os.dup2(file.fileno(), 2)
    rendezvous.join(1, 2, "gloo", 1.5)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_no_rank_waits_for_ever_for_a_rank_0_that_is_not_there_or_stopped(
    is_stopped: bool, tmp_path: Path
) -> None:
    environment = environments(2)[1]
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", int(environment["MASTER_PORT"])))
        if is_stopped:  # as the system does for a process that is stopped, which then says nothing
            silent.listen()
        process = CONTEXT.Process(target=join_in_vain, args=(environment, tmp_path / "said"))
        process.start()
        process.join(60)
        process.kill()
        assert process.exitcode == TemporaryError.exit_code
    said = (tmp_path / "said").read_text()
    assert "error on rank 1: rank 0 on 127.0.0.1 does not answer at 127.0.0.1:" in said


def test_letters_are_taken_out_of_the_store_as_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(mailbox, "own_store", lambda ranks, seconds: store)
    main, other = (Mailbox(Ranks(rank, 2, 0, torch.device("cpu")), 9.0) for rank in range(2))
    empty = store.num_keys()
    other.send(1, {"file": "sum"})
    other.send(2, Failure("full", "room", "free some"))
    assert main.collect(1, 5) == [{"file": "sum"}]
    assert main.collect(2, 5) == [Failure("full", "room", "free some")]
    assert store.num_keys() == empty


def test_a_store_that_does_not_answer_is_no_fault_of_the_rank_that_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Silent:
        def check(self, keys: list[str]) -> bool:
            raise SilentStoreError("no answer for 9 s")

    limits: list[float] = []
    monkeypatch.setattr(
        mailbox, "own_store", lambda ranks, seconds: limits.append(seconds) or Silent()
    )
    (failure,) = Mailbox(Ranks(0, 2, 0, torch.device("cpu")), 9.0).collect(1, 5)
    # not before the watchdog, which names who keeps the store
    assert isinstance(failure, Failure) and limits == [9.0]
    error = failure.to_error()
    assert isinstance(error, TemporaryError) and "rank" not in str(error)
    assert "the job's store is gone or does not answer (no answer for 9 s)" in str(error)


@pytest.mark.parametrize("is_silent", [True, False])
def test_a_store_that_is_lost_is_asked_no_more(is_silent: bool) -> None:
    asked: list[str] = []
    back = threading.Event()

    class Lost:
        def check(self, keys: list[str]) -> bool:
            asked.extend(keys)
            if is_silent:
                return back.wait(60)
            raise torch.distributed.DistNetworkError("connection reset")

    store: Any = BoundedStore(Lost(), 0.1)  # type: ignore[arg-type]
    said = []
    for key in "ab":
        kind = SilentStoreError if is_silent else torch.distributed.DistNetworkError
        with pytest.raises(kind) as raised:
            store.check([key])
        said.append(str(raised.value))
    back.set()
    assert asked == ["a"] and said[0] == said[1] != ""


def fail_on_main(ranks: Ranks) -> Any:
    def work() -> None:
        raise InputError("disk full", "space", "free some")

    try:
        on_main(ranks, work)
    except InputError as error:
        return str(error), on_main(ranks, lambda: ranks.rank), *at_length(ranks, work)
    return None


def at_length(ranks: Ranks, fail: Any) -> Any:
    """The same of work that outlasts the turns in which the other ranks wait for it."""
    turns: list[int] = []
    enough = threading.Event()

    def work() -> int:
        assert enough.wait(60)
        return ranks.rank

    def alive() -> None:
        turns.append(0)
        # the main rank's own; the others have waited as often by then
        if len(turns) == 3:
            enough.set()

    found = ranks_module.on_main_for_long(ranks, work, alive, turn_seconds=0.01)
    try:
        ranks_module.on_main_for_long(ranks, fail, alive)
    except InputError as error:
        return found, error.got, len(turns) >= 3
    return None


def test_what_fails_on_the_main_rank_fails_on_all_and_results_reach_all() -> None:
    message = "disk full\n  needed: space\n  to do:  free some"
    assert run_ranks(2, fail_on_main) == [(message, 0, 0, "disk full", True)] * 2


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("not for sending")


def fail_unpicklably(ranks: Ranks) -> str:
    def work() -> None:
        raise Unpicklable("no such thing")

    try:
        on_main(ranks, work)
    except RuntimeError as error:
        return str(error)
    return ""


def test_an_error_that_cannot_be_sent_reaches_all_ranks_by_name() -> None:
    assert run_ranks(2, fail_unpicklably) == ["Unpicklable: no such thing"] * 2


def collect(ranks: Ranks) -> Any:
    """What comes of values of all ranks, of different lengths."""
    own = ranks.rank * "long "
    failed = "nothing"
    try:
        on_each(ranks, lambda: _refuse(ranks.rank))
    except InputError as error:
        failed = f"{error.got}, {is_shared(error)}"
    good = on_each(ranks, lambda: ranks.rank)
    try:
        of_all(ranks, own, lambda values: _refuse(len(values) - 1))
    except InputError as error:
        failed += f", {error.got}, {is_shared(error)}"
    joined = of_all(ranks, own, "|".join)
    return on_all(ranks, 10 * ranks.rank), joined, gathered(ranks, own), good, failed


def _refuse(rank: int) -> None:
    if rank:
        raise InputError(f"bad {rank}", "good", "mend")


def test_values_of_all_ranks_come_to_the_main_one_and_what_it_makes_of_them_to_all() -> None:
    values, joined = ["", "long ", "long long "], "|long |long long "
    failed = "bad 1, True, bad 2, True"  # of two ranks that fail the first
    for rank, found in enumerate(run_ranks(3, collect)):
        assert found == ([0, 10, 20], joined, [] if rank else values, rank, failed)


def test_one_rank_looks_for_all_and_where_it_is_lost_the_next_one() -> None:
    shared, looked = torch.distributed.HashStore(), []

    def ask(number: int) -> str:
        def look() -> str:
            looked.append(number)
            time.sleep(0.2)  # the others ask meanwhile
            return f"by {number}"

        return by_first(shared, "who", look, 30.0)

    with ThreadPoolExecutor(8) as threads:
        said = set(threads.map(ask, range(8)))
    assert len(looked) == 1 and said == {f"by {looked[0]}"}
    shared.add("lost/number asking", 1)  # and never answers
    start = time.monotonic()
    assert by_first(shared, "lost", lambda: "by the next", 0.3) == "by the next"
    assert time.monotonic() - start >= 0.3 and by_first(shared, "lost", str, 9.0) == "by the next"


def test_what_ranks_ask_of_each_other_grows_with_their_number_and_not_with_its_square() -> None:
    few, many = (dict(named(store.of_store(number))) for number in (4, 16))
    for occasion in few:
        # of a rank; the main one's part of what it reads for all is shared out among them
        assert many[occasion] < 1.5 * few[occasion] + 4, (occasion, few, many)
    for two, sixteen in zip(*map(store.of_collectives, (2, 16)), strict=True):
        assert 0 < two[2] == sixteen[2] < 0.1, "kB of a rank that is not the main one"
        assert sixteen[1] <= 8 * two[1]


def test_a_thousand_ranks_stop_at_the_same_step_and_raise_the_same_error() -> None:
    # of two that fail the first
    assert store.of_agreement(1024) == {(False, True, "of rank 341"): 1024}


def named(rows: Iterator[tuple[str, float, float, float]]) -> Iterator[tuple[str, float]]:
    for occasion, messages, _, _ in rows:
        # how often a rank asks again while another listens depends on the machine
        if occasion != "a lost rank breaks a collective":
            yield occasion, messages


def precision_with_an_old_rank(ranks: Ranks) -> list[str]:
    device._has_bf16 = lambda where: ranks.rank != 1
    return [device.resolve_precision(name, ranks) for name in ("auto", "bf16", "fp32")]


def test_bf16_is_chosen_only_where_every_rank_has_it() -> None:
    assert run_ranks(2, precision_with_an_old_rank) == [["fp32", "bf16", "fp32"]] * 2


def same_gpu(ranks: Ranks) -> str:
    class Properties:
        uuid = "one GPU for both"

    torch.cuda.get_device_properties = lambda where: Properties()
    try:
        ranks_module._check_own_gpus(ranks)
    except InputError as error:
        return error.got
    return ""


def test_one_gpu_for_two_processes_is_refused_on_both() -> None:
    assert run_ranks(2, same_gpu) == ["rank 1 has the same GPU as rank 0"] * 2


@pytest.mark.parametrize(("local_rank", "there", "expected"), [(0, 8, 0), (5, 8, 5), (5, 1, 0)])
def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one(
    local_rank: int, there: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert ranks_module._cuda_device(local_rank).index == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="no CUDA device"):
        ranks_module._cuda_device(local_rank)


def signal_last_rank(ranks: Ranks) -> list[list[bool]]:
    """What each of four steps is told: of few ranks, and as of many."""
    of_steps: list[list[bool]] = []
    for ring_at_most in (ranks.world_size, ranks.world_size - 1):
        stop_module.RING_AT_MOST = ring_at_most
        stop, agreed = StopRequest(), []
        for step in range(4):
            if step == 2 and ranks.rank == ranks.world_size - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            stop.begin()
            agreed.append(stop.agreed())
        of_steps.append(agreed)
    return of_steps


def test_a_signal_to_one_rank_stops_all_at_the_same_step() -> None:
    assert run_ranks(3, signal_last_rank) == [[[False, False, True, True]] * 2] * 3


@pytest.fixture
def handlers() -> Iterator[None]:
    """A StopRequest of the test takes none from the tests after it."""
    before = {each: signal.getsignal(each) for each in SIGNALS}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize(
    ("answers", "number", "said"),
    [(True, signal.SIGINT, 1), (False, signal.SIGINT, 0), (True, signal.SIGTERM, 0)],
)
def test_the_first_ctrl_c_is_answered_by_one_rank_at_once(
    answers: bool, number: int, said: int, handlers: None, capfd: pytest.CaptureFixture
) -> None:
    StopRequest(answers)
    for _ in range(2):  # the second within the time in which torchrun passes it on
        os.kill(os.getpid(), number)
    assert capfd.readouterr().err.count("training stops after this step and saves it") == said


def test_a_stop_is_asked_for_where_nobody_reads_the_answer(handlers: None) -> None:
    """As in `distseg train ... 2>&1 | tee log`: the same Ctrl-C has ended tee."""
    stop, stderr, (reading, writing) = StopRequest(answers=True), os.dup(2), os.pipe()
    os.close(reading)
    os.dup2(writing, 2)
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(writing)
    assert stop.signal_name == "SIGINT"


@pytest.mark.parametrize(
    ("keeps_store", "is_stopped"), [(True, True), (True, False), (False, True)]
)
def test_ranks_that_leave_end_a_torchrun_that_is_stopped_with_its_stopped_ranks(
    keeps_store: bool, is_stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sh", "-c", "sleep 60 & echo $!; sleep 60 & echo $!; wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        one, other = (int(parent.stdout.readline()) for _ in range(2))
        stopped = [one, parent.pid] if is_stopped else [one]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        while any(state(pid) != "T" for pid in stopped):
            time.sleep(0.01)
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(keeps_store))
        launch.end_stopped_torchrun()
        if keeps_store and is_stopped:
            assert parent.wait(30) == -signal.SIGKILL
            while state(one):
                time.sleep(0.01)
        else:
            assert parent.poll() is None and state(one) == "T"
        assert state(other) == "S"
        for pid in (one, other, parent.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def state(pid: int) -> str:
    """As /proc has it; "" of a process that has ended."""
    try:
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return found.replace("Z", "")
