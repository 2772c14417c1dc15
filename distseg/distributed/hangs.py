"""What a job that hangs leaves behind: of each rank its Python stacks and the collectives that it
has entered, and one summary that names the collective, who waits in it, and who has not come.

The collectives are torch's own record (its Flight Recorder, on by default in torch 2.13, for gloo
and NCCL). Nothing of it costs a step anything: it is read when the job is given up.
"""

from __future__ import annotations

import faulthandler
import json
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from distseg.distributed.compat import flight_record
from shards.files import published, write_json, write_text
from shards.words import counted

FOLDER = "hangs"  # in the run's directory, with a folder for each attempt that hung
SUMMARY = "summary.txt"
# of a group and rank: enough to see where two ranks parted, and small enough to be sent
_NUM_COLLECTIVES = 64
_EVERYONE = "default_pg"  # torch's name of the group of all ranks
_NUM_PLACES = 3  # of a stack, in the summary
_POLL_SECONDS = 0.05
_PACKAGES = str(Path(__file__).parents[2]) + "/"  # whose files are named without it
# frames in here say how a call was made, and not which
_TORCH, _PYTHON = str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"]

_Frame = tuple[str, int, str]  # file, line, function


@dataclass(frozen=True)
class Collective:
    """One that a rank has entered. number: of its group, on each rank in the same order."""

    number: int
    what: str  # "all_reduce of Float [4]"
    is_open: bool  # entered and not left
    place: str  # "distseg/train/step.py:88 in training_step"


@dataclass(frozen=True)
class Record:
    """What a rank knows of itself. places: where its main thread is, the innermost first;
    collectives: of each group the last ones, in order.
    """

    rank: int
    host: str
    activity: str
    places: list[str]
    collectives: dict[str, list[Collective]] = field(default_factory=dict)

    def to_json(self) -> str:
        """As text that can be sent."""
        return json.dumps(asdict(self))

    @staticmethod
    def of_json(text: str | bytes) -> Record:
        values = json.loads(text)
        groups = values.pop("collectives").items()
        found = {name: [Collective(**one) for one in entered] for name, entered in groups}
        return Record(**values, collectives=found)


def record(rank: int, activity: str, failed: BaseException | None = None) -> Record:
    """Of this rank, from any of its threads.

    failed: the error of a collective, which the main thread is in no more.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    trace = None if failed is None else failed.__traceback__
    walked = traceback.walk_stack(frame) if trace is None else traceback.walk_tb(trace)
    # no lines of source: they would be read from a disk, which may be what everyone waits for
    frames = [(one.f_code.co_filename, line, one.f_code.co_name) for one, line in walked]
    entries = flight_record()
    if trace is not None:
        frames.reverse()  # a traceback begins outside
        # torch takes it for done
        entries[-1:] = [entry | {"retired": False} for entry in entries[-1:]]
    return Record(rank, socket.gethostname(), activity, _places(frames), _collectives(entries))


def _collectives(entries: Iterable[dict[str, Any]]) -> dict[str, list[Collective]]:
    found: dict[str, list[Collective]] = {}
    for entry in entries:
        # messages between two ranks are counted apart
        if entry["is_p2p"]:
            continue
        backend, _, name = entry["profiling_name"].rpartition(":")
        of_group = found.setdefault(" ".join(filter(None, (*entry["process_group"], backend))), [])
        shapes = zip(entry["input_dtypes"], entry["input_sizes"], strict=False)
        what = f"{name} of {', '.join(f'{dtype} {shape}' for dtype, shape in shapes)}"
        calls = [(one["filename"], one["line"], one["name"]) for one in entry.get("frames", [])]
        place = " < ".join(_places(calls)[:_NUM_PLACES])
        of_group.append(Collective(entry["collective_seq_id"], what, not entry["retired"], place))
    return {group: entered[-_NUM_COLLECTIVES:] for group, entered in found.items()}


def _places(frames: list[_Frame]) -> list[str]:
    """Of a stack, without calls inside of torch and of Python's own modules; all of it where there
    are no others.
    """
    own = [frame for frame in frames if not _is_of_library(frame[0])] or frames
    return [f"{file.removeprefix(_PACKAGES)}:{line} in {name}" for file, line, name in own]


def _is_of_library(file: str) -> bool:
    # packages lie within the folder of Python's own modules; "<string>" is no file
    is_python = file.startswith(_PYTHON) and "site-packages" not in file
    return is_python or file.startswith((_TORCH, "<"))


def tell_crashes() -> None:
    """Have a process that is ended inside of C code say where its threads were in Python: so gloo
    ends one whose ranks are at collectives of different sizes.
    """
    # whoever has turned it on already, such as a test's tool, has its own place for it
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)


def evidence_of(run_dir: Path) -> Path:
    """The folder of an attempt that begins now: run_dir/hangs/2026-11-29T22-30-05Z."""
    return run_dir / FOLDER / time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())


class Evidence:
    """Where the ranks of one attempt leave their records, and how they are brought together.

    send, receive: by the job's store, since a shared folder may show the files of other machines
    half a minute late. Where the store is gone, the files must do.
    """

    def __init__(self, folder: Path, world_size: int):
        self.folder = folder
        self._world_size = world_size
        self._once = threading.Lock()
        self._is_left = False

    def leave(
        self,
        own: Record,
        diagnosis: str,
        seconds: float,
        send: Callable[[str], Any],
        receive: Callable[[int], str | bytes | None],
    ) -> None:
        """Write this rank's files; on the first rank that comes, the summary too, which waits so
        many seconds for the others.

        Of several threads the first does it, and the others wait. Raises OSError.
        """
        with self._once:
            if self._is_left:
                return
            self._is_left = True
            # first: a file may block
            with suppress(RuntimeError, OSError):
                send(own.to_json())
            is_first = self._is_first()
            self._write_own(own)
            if is_first:
                self._summarise(own, diagnosis, seconds, receive)

    def _is_first(self) -> bool:
        self.folder.parent.mkdir(exist_ok=True)
        # of all ranks one makes it, on every file system
        try:
            self.folder.mkdir()
        except FileExistsError:
            return False
        return True

    def _write_own(self, own: Record) -> None:
        path = self.folder / f"rank-{own.rank}.stacks.txt"
        with published(path) as partial, partial.open("w") as file:
            faulthandler.dump_traceback(file)
        write_json(self.folder / f"rank-{own.rank}.collectives.json", flight_record())
        write_text(self._file(own.rank), own.to_json())

    def _summarise(
        self,
        own: Record,
        diagnosis: str,
        seconds: float,
        receive: Callable[[int], str | bytes | None],
    ) -> None:
        records = {own.rank: own}
        end = time.monotonic() + seconds
        while len(records) < self._world_size and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            for rank in set(range(self._world_size)) - records.keys():
                text = self._received(rank, receive)
                if text is not None:
                    records[rank] = Record.of_json(text)
        found = summary(records, self._world_size, diagnosis)
        write_json(self.folder / "summary.json", found)
        text = "\n".join([*lines_of(found), f"stacks of each rank: {self.folder}"])
        write_text(self.folder / SUMMARY, text + "\n")
        print(text, file=sys.stderr, flush=True)

    def _received(
        self, rank: int, receive: Callable[[int], str | bytes | None]
    ) -> str | bytes | None:
        with suppress(RuntimeError, OSError):
            text = receive(rank)
            if text is not None:
                return text
        with suppress(OSError):
            return self._file(rank).read_text()
        return None

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"


def summary(records: dict[int, Record], world_size: int, diagnosis: str) -> dict[str, Any]:
    """Plain values: the diagnosis, the collectives that ranks wait in, where each rank is, and
    which left nothing.
    """
    groups = dict.fromkeys(group for one in records.values() for group in one.collectives)
    waits = [_wait(group, records) for group in groups]
    return {
        "diagnosis": diagnosis,
        "waits": [wait for wait in waits if wait is not None],
        "at": {rank: records[rank].places[:_NUM_PLACES] for rank in sorted(records)},
        "silent": [rank for rank in range(world_size) if rank not in records],
    }


def _wait(group: str, records: dict[int, Record]) -> dict[str, Any] | None:
    """The first collective of a group in which ranks wait for others, or in which they differ."""
    # by rank and number; the same number twice is one operation in pieces
    entered = {
        rank: {one.number: one for one in reversed(record.collectives[group])}
        for rank, record in records.items()
        if group in record.collectives
    }
    if not any(one.is_open for of_rank in entered.values() for one in of_rank.values()):
        return None
    number = _parted(entered)
    ways: dict[tuple[str, str], list[int]] = {}
    for rank, of_rank in sorted(entered.items()):
        if number in of_rank:
            one = of_rank[number]
            ways.setdefault((one.what, one.place), []).append(rank)
    missing = [rank for rank in sorted(entered) if number > max(entered[rank])]
    # every rank is of this group; of others only those that have entered something are known
    if _EVERYONE in group:
        missing = sorted({*missing, *records.keys() - entered.keys()})
    return {
        "group": group,
        "number": number,
        "entered": [{"what": what, "at": at, "ranks": of} for (what, at), of in ways.items()],
        "not_entered": missing,
    }


def _parted(entered: dict[int, dict[int, Collective]]) -> int:
    """The number of the first collective that ranks know as different ones; else of the first that
    one has not entered; else of the last.
    """
    last = {rank: max(of_rank) for rank, of_rank in entered.items()}
    # of all ranks: older ones were forgotten by one of them, and cannot be compared
    first = max(min(of_rank) for of_rank in entered.values())
    for number in range(first, min(last.values()) + 1):
        known = {of_rank[number].what for of_rank in entered.values() if number in of_rank}
        if len(known) > 1:
            return number
    return min(max(last.values()), min(last.values()) + 1)


def lines_of(found: dict[str, Any]) -> Iterator[str]:
    """A summary for people."""
    yield f"hang: {found['diagnosis']}"
    for wait in found["waits"]:
        ways = wait["entered"]
        title = f"collective {wait['number']} of group {wait['group']}"
        if len({way["what"] for way in ways}) > 1:
            yield f"{title}: the ranks are not at the same one"
        else:
            yield title
        for way in ways:
            at = f", called at {way['at']}" if way["at"] else ""
            yield f"  {_ranks(way['ranks'])}: {way['what']}{at}"
        if wait["not_entered"]:
            yield f"  not entered by {_ranks(wait['not_entered'])}"
    if not found["waits"]:
        yield "no rank is known to wait in a collective"
    # a rank that is where it has called the collective was told above
    told = {
        (rank, way["at"])
        for wait in found["waits"]
        for way in wait["entered"]
        for rank in way["ranks"]
    }
    places: dict[str, list[int]] = {}
    for rank, of_rank in found["at"].items():
        place = " < ".join(of_rank)
        if (rank, place) not in told:
            places.setdefault(place, []).append(rank)
    for place, ranks in places.items():
        yield f"{_ranks(ranks)} at {place}"
    if found["silent"]:
        yield f"nothing was left by {_ranks(found['silent'])}: killed, stopped, or unreachable"


def _ranks(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "4 ranks: 0-2, 5"; one is "rank 1"."""
    numbers = sorted(numbers)
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    return f"{counted(len(numbers), 'rank')} ({shown})"
