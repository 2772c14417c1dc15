"""A run of which a process is killed (SIGKILL), anywhere, and that is started again.

    python -m tests.killed_processes [COUNT] [--first N] [--seed SEED] [--timeout SECONDS]
                                     [--only WORD ...]

COUNT cases (40), in turn those of CASES: under which launcher, who is killed, and where: in one of
the calls that change the run's files (in the middle of what it writes; tests/failing_storage.c), at
a moment, or while the final pictures are drawn. Which call and which moment is drawn at random from
all that the undisturbed run has. The other processes must have left within the timeout. Then the
same command is run again, and must leave what the undisturbed run has: every byte of checkpoints,
scores, tables and pictures, every row of metrics.jsonl but for what a clock measures, and no other
file. A line for each case. Needs gcc; takes about a minute a case.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distseg.config import loading
from distseg.tracking.tracker import read_metrics
from shards.maps import write_maps
from shards.pack import pack
from shards.sample import STANFORD
from tests.conftest import toy_samples
from tests.ranks import TIMEOUT_SECONDS, Program, environments, free_port
from tests.tiny import SETTINGS

NUM_RANKS = 2
FILE, MOMENT, PICTURES = "file operation", "moment", "pictures"
# launcher, who is killed, and where
Case = tuple[str, str, str]
CASES: tuple[Case, ...] = (
    ("plain", "rank 0", FILE),
    ("plain", "rank 1", FILE),
    ("torchrun", "torchrun", MOMENT),
    ("plain", "rank 0", PICTURES),
    ("plain", "rank 0", MOMENT),
    ("torchrun", "rank 0", FILE),
    ("plain", "rank 1", MOMENT),
    ("plain", "rank 0", FILE),
    ("plain", "rank 1", PICTURES),
    ("torchrun", "rank 1", MOMENT),
)
LENGTH = {
    "steps": 6,
    "checkpoint": {"every_steps": 2},
    "evaluate": {"every_steps": 3, "num_pictures": 3},
}
# of rows of metrics.jsonl, what no two runs have alike
OF_THE_CLOCK = re.compile(
    r"time|.*seconds|images_per_second|.*_share|memory_bytes|(ranks|sections)/.*"
    r"|health/(data_starved|slow_rank)"
)
# files that tell of the run's starts and machine, or of what a clock measures
OF_THE_STARTS = re.compile(
    r"config\.yaml|environment\.json|attempts\.jsonl|lock|health\.json|pictures/curves\.png|hangs/.*"
    r"|tables/ranks-.*"
)


def outcome(run_dir: Path) -> dict[str, object]:
    """What a finished run has left: the content of each file, by its name."""
    found: dict[str, object] = {}
    for path in run_dir.rglob("*"):
        name = str(path.relative_to(run_dir))
        if path.is_file() and not OF_THE_STARTS.fullmatch(name):
            found[name] = path.read_bytes()
    found["metrics.jsonl"] = [
        {name: value for name, value in row.items() if not OF_THE_CLOCK.fullmatch(name)}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]
    return found


def differences(run_dir: Path, other: Path) -> list[str]:
    """The files that two finished runs do not have alike."""
    one, two = outcome(run_dir), outcome(other)
    return sorted(name for name in one | two if one.get(name) != two.get(name))


def build_layer(folder: Path) -> Path:
    """The layer that makes storage fail or kills, to be preloaded; see its source for how."""
    layer, source = folder / "layer.so", Path(__file__).with_name("failing_storage.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", layer, source, "-ldl"], check=True)
    return layer


@dataclass
class Job:
    """`distseg train` under a launcher, with the environment that tells the layer what to do."""

    launcher: str
    folder: Path
    timeout: float
    variables: dict[str, str] = field(default_factory=dict)
    programs: list[Program] = field(default_factory=list)
    torchrun: subprocess.Popen | None = None

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def start(self) -> Job:
        """Start its processes."""
        own = {"data.shards": self.folder.parent / "shards", "run_dir": self.run_dir}
        settings = SETTINGS | LENGTH | own | {"parallel": {"timeout_seconds": self.timeout}}
        arguments = loading.arguments(settings)
        if self.launcher == "plain":
            of_ranks = environments(NUM_RANKS)
            self.programs = [Program(["train", *arguments], v | self.variables) for v in of_ranks]
            return self
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={NUM_RANKS}"]
        command += [f"--master_port={free_port()}", "-m", "distseg.train", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | self.variables
        with (self.folder / "output").open("w") as out:
            self.torchrun = subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.STDOUT
            )
        return self

    def pids(self) -> dict[str, int]:
        """Who is there, by name; also a rank that has lost its torchrun."""
        if self.torchrun is None:
            there = {f"rank {rank}": program for rank, program in enumerate(self.programs)}
            return {name: program.pid for name, program in there.items() if program.poll() is None}
        found = {} if self.torchrun.poll() is not None else {"torchrun": self.torchrun.pid}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError):  # it has left
                words = (path / "cmdline").read_bytes().decode().split("\0")
                variables = (path / "environ").read_bytes().decode().split("\0")
                ranks = [item[5:] for item in variables if item.startswith("RANK=")]
                if f"run_dir={self.run_dir}" in words and ranks:
                    found[f"rank {ranks[0]}"] = int(path.name)
        return found

    def wait(self, seconds: float) -> bool:
        """Whether all have left within so many seconds."""
        deadline = time.monotonic() + seconds
        while self.pids():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def codes(self) -> list[int | None]:
        """The exit codes of its ranks, or torchrun's."""
        if self.torchrun is not None:
            return [self.torchrun.poll()]
        return [program.poll() for program in self.programs]

    def said(self) -> str:
        """What its processes have said; called when they have left."""
        if self.torchrun is not None:
            return (self.folder / "output").read_text(errors="replace")
        return "".join(program.communicate()[0] for program in self.programs)

    def kill(self) -> None:
        """End what is left."""
        for pid in self.pids().values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait(10)


@dataclass
class Undisturbed:
    """The run that nothing happens to: what it leaves, and what there is to be killed in."""

    run_dir: Path
    # by rank, the paths of the calls that change the run's files
    calls: dict[str, list[str]]
    seconds: dict[str, float]  # from the run's first file to its end, by launcher
    timeout: float

    @staticmethod
    def of(parent: Path, timeout: float) -> Undisturbed:
        """Run it under both launchers, which must leave the same."""
        jobs, seconds = {}, {}
        for launcher in ("torchrun", "plain"):
            (parent / launcher).mkdir()
            job = Job(launcher, parent / launcher, timeout, {"FAILING_STORAGE": "/run/:0:0:0"})
            wait_for(job.start().run_dir, job)
            start = time.monotonic()
            if not job.wait(TIMEOUT_SECONDS) or set(job.codes()) != {0}:
                job.kill()
                raise SystemExit(f"the undisturbed run does not end well:\n{job.said()[-3000:]}")
            seconds[launcher], jobs[launcher] = time.monotonic() - start, job
        found = differences(jobs["torchrun"].run_dir, jobs["plain"].run_dir)
        if found:
            raise SystemExit(f"not alike under torchrun and in plain processes: {found}")
        calls = {}
        for rank, program in enumerate(jobs["plain"].programs):
            calls[f"rank {rank}"] = calls_told(program.communicate()[0])
        return Undisturbed(jobs["plain"].run_dir, calls, seconds, timeout)


def calls_told(said: str) -> list[str]:
    """The calls that the layer has told of."""
    return re.findall(r"^file operation \d+: (.*)$", said, re.MULTILINE)


def wait_for(path: Path, job: Job) -> None:
    """Until it is there, or the job has ended."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not path.exists() and job.pids() and time.monotonic() < deadline:
        time.sleep(0.01)


def kill_in_a_call(job: Job, target: str, part: str, number: int) -> str:
    """Start the job, and have a rank killed in one of its calls on paths with such a part; which
    call that was, "" where the rank ended without coming to it.
    """
    job.variables["FAILING_STORAGE"] = f"{part}:0:{number}:0"
    job.variables["FAILING_RANK"] = target.removeprefix("rank ")
    job.start()
    # torchrun starts its ranks after a while
    while job.pids() and target not in job.pids():
        time.sleep(0.05)
    while target in job.pids():
        time.sleep(0.05)
    if not job.wait(job.timeout):
        return f"in call {number}"
    told = calls_told(job.said())
    return f"in {told[-1].replace(str(job.folder), '')}" if len(told) == number else ""


def kill_after(job: Job, target: str, path: Path, seconds: float) -> str:
    """Start the job, and kill one of its processes so many seconds after a path is there; when that
    was, "" where the process had ended by then.
    """
    job.start()
    wait_for(path, job)
    time.sleep(seconds)
    there = job.pids()
    if target not in there:
        return ""
    os.kill(there[target], signal.SIGKILL)
    job.wait(job.timeout)
    return f"{seconds:.2f} s after {path.name} was made"


def disturb(job: Job, case: Case, undisturbed: Undisturbed, rng: np.random.Generator) -> str:
    """Start the job and kill one of its processes; where that was, "" where it had ended by then.

    Returns when all others have left, or when their time is up.
    """
    launcher, target, place = case
    part = "/run/pictures/" if place == PICTURES else "/run/"
    count = sum(part in call for call in undisturbed.calls.get(target, []))
    if place != MOMENT and count:
        return kill_in_a_call(job, target, part, int(rng.integers(1, count + 1)))
    if place == PICTURES:  # of a rank that draws none; drawing takes about as long
        return kill_after(job, target, job.run_dir / "pictures", float(rng.uniform(0, 0.5)))
    seconds = float(rng.uniform(0, undisturbed.seconds[launcher]))
    return kill_after(job, target, job.run_dir, seconds)


def try_case(case: Case, parent: Path, undisturbed: Undisturbed, rng: np.random.Generator) -> str:
    """One line on it; it begins with "ok" or "BAD"."""
    launcher = case[0]
    job = Job(launcher, Path(tempfile.mkdtemp(dir=parent)), undisturbed.timeout)
    while not (where := disturb(job, case, undisturbed, rng)):
        job.wait(TIMEOUT_SECONDS)  # the process had ended by then: another draw
        job = Job(launcher, Path(tempfile.mkdtemp(dir=parent)), undisturbed.timeout)
    name, codes = f"{' | '.join(case)}, killed {where}", job.codes()
    if job.pids():
        job.kill()
        return f"BAD {name}: not all have left within {job.timeout:.0f} s"
    again = Job(launcher, job.folder, job.timeout).start()
    if not again.wait(TIMEOUT_SECONDS) or set(again.codes()) != {0}:
        again.kill()
        return f"BAD {name}: the second time {again.codes()}\n{again.said()[-3000:]}"
    resumed = re.search(r"resumed at step \d+", again.said())
    found = differences(job.run_dir, undisturbed.run_dir)
    result = f"other {', '.join(found)}" if found else "the same files"
    how = resumed.group() if resumed else "begun anew"
    shutil.rmtree(job.folder)
    return f"{'BAD' if found else 'ok '} {name}; left with {codes}; {how}: {result}"


def main() -> int:
    """COUNT cases, and how many of them end as they must."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=40)
    parser.add_argument("--first", type=int, default=1, help="to go on with a part of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=30.0, help="parallel.timeout_seconds")
    parser.add_argument("--only", nargs="*", default=[], help="words that a case must have")
    options = parser.parse_args()
    cases = [case for case in CASES if all(word in " | ".join(case) for word in options.only)]
    good, numbers = 0, range(options.first - 1, options.count)
    with tempfile.TemporaryDirectory() as name:
        # now: what all processes are forked from is started by the first of them
        os.environ["LD_PRELOAD"] = str(build_layer(Path(name)))
        samples = toy_samples()
        write_maps(Path(name) / "maps.h5", "toy", STANFORD, samples, total=len(samples))
        pack(Path(name) / "maps.h5", Path(name) / "shards", samples_per_shard=3)
        undisturbed = Undisturbed.of(Path(name), options.timeout)
        for number in numbers:
            rng = np.random.default_rng([options.seed, number])
            line = try_case(cases[number % len(cases)], Path(name), undisturbed, rng)
            good += line.startswith("ok")
            print(line, flush=True)
    print(f"{good} of {len(numbers)}")
    return int(good < len(numbers))


if __name__ == "__main__":
    sys.exit(main())
