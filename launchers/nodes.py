"""Which nodes of a job its next start takes: of those that are fit, as many as divide its batch.

Before each start every node looks at itself (`launchers.examine`); one that finds an error, or does
not answer in time, is left out where the job may run on fewer nodes (DISTSEG_MIN_NODES) and the
batch divides, or where it has more of them than it takes. A node that is given back to SLURM cannot
end the job any more when it dies. Why not torchrun's own `--nnodes=MIN:MAX`: its rendezvous knows
neither which numbers divide the batch nor which node is at fault, its store is lost with the first
node, and srun itself waits for a node that is gone until SLURM has noticed.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from distseg.config import loading
from distseg.config.schema import Config
from distseg.doctor import SHARED
from launchers import batch_job
from launchers.check import node_counts
from launchers.places import python_on_nodes, ranks_per_node
from shards.errors import InputError

NODE_VARIABLE = "SLURMD_NODENAME"  # as SLURM calls it, which need not be its host name
MIN_NODES_VARIABLE = "DISTSEG_MIN_NODES"  # with so few nodes the job may go on
SECONDS_VARIABLE = "DISTSEG_HEALTH_SECONDS"  # for all nodes to answer; 0: they are not asked
DEFAULT_SECONDS = 120.0  # an image or an environment may have to be loaded on each
SHARE_OF_A_NODE = 0.5  # of that time, for what a node looks at; the rest is for Python to start
MAX_SKEW_SECONDS = 5.0  # of clocks; an answer may come a moment late
LAST_WORDS_SECONDS = 5.0
# how a node's answer begins, one line of JSON: what is imported there may write others before
ANSWER = "distseg-node "


class UnfitError(Exception):
    """Too few nodes of the job are fit; nodes: that it should not get again."""

    def __init__(self, reason: str, nodes: Sequence[str]):
        super().__init__(reason)
        self.nodes = tuple(nodes)


@dataclass(frozen=True)
class Answer:
    """What a node has found of itself; skew: seconds that its clock is behind."""

    results: list[dict[str, str]]
    skew: float

    def errors(self) -> list[dict[str, str]]:
        return [result for result in self.results if result["level"] == "error"]


class JobNodes:
    """The nodes of this process's job.

    overrides: of a training run; None of what is no such run, and may have any number of ranks.
    """

    def __init__(self, overrides: Sequence[str] | None):
        self._overrides = overrides
        self._seconds = health_seconds()
        self._counts = counts_of_job(None if overrides is None else loading.load(list(overrides)))
        self._given_back: set[str] = set()
        self._chosen: list[str] = []  # none: all
        self.may_overlap = False  # with a step that SLURM believes to be running on a dead node

    @property
    def are_looked_at(self) -> bool:
        """Whether a node that is gone would be found before the next start."""
        return self._seconds > 0

    def srun(self, nodes: Sequence[str] = ()) -> list[str]:
        """srun and its options for one task on each of these nodes; without any, of the chosen."""
        names = list(nodes) or self._chosen
        number = str(len(names)) if names else os.environ["SLURM_JOB_NUM_NODES"]
        # said in full, since srun does not take over every option of sbatch; one task per node is
        # what Place counts on
        words = ["srun", f"--nodes={number}", f"--ntasks={number}", "--ntasks-per-node=1"]
        words += ["--input=none"]
        if names:
            words += [f"--nodelist={','.join(names)}"]
        if self.may_overlap:
            words += ["--overlap"]
        # of an exclusive node a step gets no GPU that it does not ask for
        if "SLURM_GPUS_ON_NODE" in os.environ:
            words += [f"--gpus-per-node={os.environ['SLURM_GPUS_ON_NODE']}"]
        return words

    def choose(self, is_told_to_stop: Callable[[], bool] = lambda: False) -> None:
        """Choose the nodes of the next start. Raises UnfitError where too few are fit, and
        InputError for what is wrong with all of them.
        """
        names = [name for name in batch_job.node_names() if name not in self._given_back]
        if not names:  # of SLURM: a start on all of them will say what is wrong
            return
        wrong = self._wrong(names, is_told_to_stop) if self._seconds else {}
        for node, why in wrong.items():
            print(f"{node} is not fit: {why}", flush=True)
        fit = self._kept(names, wrong)
        # the largest that goes: with spares that stays the same number, and so the same bits
        number = next((count for count in self._counts if count <= len(fit)), 0)
        if not number:
            raise UnfitError(_too_few(wrong, len(fit), self._counts), list(wrong))
        self._take(fit[:number], fit)

    def _kept(self, names: list[str], wrong: dict[str, str]) -> list[str]:
        """The fit nodes; the others are given back."""
        fit = [name for name in names if name not in wrong]
        # this process's own stays, whatever it is fit for
        own = os.environ.get(NODE_VARIABLE) or names[0]
        kept = [name for name in names if name in fit or name == own]
        # when one of the others dies for good, SLURM would end the whole job for it; and a job that
        # is requeued would wait until SLURM has noticed that it is dead
        if len(kept) < len(names):
            batch_job.give_back_all_but(kept)
            self._given_back |= set(names) - set(kept)
        return fit

    def _take(self, chosen: list[str], fit: list[str]) -> None:
        all_of_job = int(os.environ["SLURM_JOB_NUM_NODES"])
        self._chosen = chosen if len(chosen) < all_of_job else []
        if self._chosen:
            spare = [name for name in fit if name not in chosen]
            and_spare = f"; spare: {', '.join(spare)}" if spare else ""
            takes = f"{len(chosen)} of {all_of_job} nodes: {', '.join(chosen)}{and_spare}"
            print(f"takes {takes}", flush=True)

    def _wrong(self, names: list[str], is_told_to_stop: Callable[[], bool]) -> dict[str, str]:
        """{node: what is wrong with it}; where none has answered, of those that are dead."""
        answers, wrong = self._asked(names, is_told_to_stop)
        if is_told_to_stop():  # which leaves no time for an answer
            return {}
        if not answers:
            print("the nodes could not be looked at, and are started all the same", flush=True)
            return wrong
        # others have answered, so that it is not the look itself that went wrong
        for node in names:
            if node not in answers:
                wrong.setdefault(node, f"gave no answer in {self._seconds:.0f} s")
        _say_warnings(answers)
        of_all = _of_all(answers)
        for node, answer in answers.items():
            errors = [found for found in answer.errors() if found["name"] not in of_all]
            if errors:
                wrong[node] = "; ".join(_words(found) for found in errors)
        return {node: wrong[node] for node in names if node in wrong}

    def _asked(
        self, names: list[str], is_told_to_stop: Callable[[], bool]
    ) -> tuple[dict[str, Answer], dict[str, str]]:
        """The nodes' answers, and of those on which nothing can be started srun's words."""
        answers: dict[str, Answer] = {}
        lost: dict[str, str] = {}
        while left := [name for name in names if name not in answers and name not in lost]:
            # one step for all of them: a step each would load SLURM's controller
            look = _Look(self._command(left))
            look.wait(left, self._seconds, is_told_to_stop)
            self.may_overlap |= look.was_given_up
            answers |= {node: look.answers[node] for node in left if node in look.answers}
            new = {node: look.lost[node] for node in left if node in look.lost}
            lost |= new
            # srun ends the others' tasks when one node is dead, which may come before they answer
            if not new or is_told_to_stop():
                break
        return answers, lost

    def _command(self, nodes: list[str]) -> list[str]:
        # one that fails must not silence the others, nor one that is late
        srun = [*self.srun(nodes), "--kill-on-bad-exit=0", "--wait=0"]
        look = ["-u", "-m", "launchers.examine", f"--seconds={SHARE_OF_A_NODE * self._seconds}"]
        # last: options of srun may stand before a container's Python
        return [*srun, *python_on_nodes(dict(os.environ)), *look, *(self._overrides or [])]


def health_seconds() -> float:
    """How long nodes may take to answer; 0: they are not looked at."""
    text = os.environ.get(SECONDS_VARIABLE, "")
    try:
        seconds = float(text or DEFAULT_SECONDS)
        if not 0 <= seconds < 10**6:
            raise ValueError
    except ValueError:
        action = f"correct {SECONDS_VARIABLE}, or unset it"
        raise InputError(f"{SECONDS_VARIABLE}={text}", "seconds, from 0 on", action) from None
    return seconds


def counts_of_job(config: Config | None) -> list[int]:
    """The numbers of nodes with which this job may run, the largest first. Raises InputError where
    there is none, or none but the number of its nodes although fewer were allowed.
    """
    environment = dict(os.environ)
    most = int(environment["SLURM_JOB_NUM_NODES"])
    text = environment.get(MIN_NODES_VARIABLE, "")
    # without leave for fewer, all of them or none
    if not text:
        return [most]
    if not text.isdecimal() or not 1 <= int(text) <= most:
        action = f"correct {MIN_NODES_VARIABLE}, or ask for more nodes"
        raise InputError(f"{MIN_NODES_VARIABLE}={text}", f"a number from 1 to {most}", action)
    # without a look nobody would know which nodes are left
    if not health_seconds():
        got = f"{MIN_NODES_VARIABLE}={text} with {SECONDS_VARIABLE}=0"
        raise InputError(got, "a look at the nodes", f"unset {SECONDS_VARIABLE}")
    return node_counts(config, ranks_per_node(environment), int(text), most)


def _too_few(wrong: dict[str, str], num_fit: int, counts: list[int]) -> str:
    why = "".join(f"{node}: {reason}; " for node, reason in wrong.items())
    possible = " or ".join(map(str, counts))
    hint = "" if os.environ.get(MIN_NODES_VARIABLE) else f" ({MIN_NODES_VARIABLE} allows fewer)"
    verb = "is" if num_fit == 1 else "are"
    return f"{why}{num_fit} {verb} fit, and the job takes {possible}{hint}"


def _words(found: dict[str, str]) -> str:
    return f"{found['name']}: {found['text']} (to do: {found['action']})"


def _of_all(answers: dict[str, Answer]) -> set[str]:
    """The names of checks that all nodes fail in: what they share, which is no fault of theirs.

    Raises InputError where it is each machine's own, as then no other would do better.
    """
    # by the check's name: what it found, such as a free space, need not be alike
    errors = [answer.errors() for answer in answers.values()]
    common = set.intersection(*({found["name"] for found in of_node} for of_node in errors))
    for found in errors[0]:
        if found["name"] not in common:
            continue
        if found["name"] not in SHARED and len(answers) > 1:
            got = f"on all {len(answers)} nodes: {found['name']}: {found['text']}"
            action = f"{found['action']}; {SECONDS_VARIABLE}=0 starts all the same"
            raise InputError(got, "nodes that are fit", action)
        # the run itself has better words for it, and knows what to try again
        if found["name"] in SHARED:
            print(f"on all nodes: {found['name']}: {found['text']}", flush=True)
    return common & set(SHARED)


def _say_warnings(answers: dict[str, Answer]) -> None:
    nodes: dict[str, list[str]] = {}  # by what they say: of a hundred nodes alike it is one line
    for node, answer in answers.items():
        for found in answer.results:
            if found["level"] == "warning":
                nodes.setdefault(_words(found), []).append(node)
        if abs(answer.skew) > MAX_SKEW_SECONDS:
            text = f"clock: {abs(answer.skew):.0f} s {'behind' if answer.skew > 0 else 'ahead'}"
            nodes.setdefault(f"{text} (to do: follow a time server)", []).append(node)
    for text, names in nodes.items():
        print(f"warning: {', '.join(names)}: {text}", flush=True)


class _Look:
    """A step that looks at some nodes. answers and lost: by node, as they come."""

    def __init__(self, command: list[str]):
        # its own session: the job's signals reach the supervisor alone
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        self._errors = batch_job.Errors(self._process.stderr)
        self.answers: dict[str, Answer] = {}
        self.was_given_up = False
        source = self._process.stdout
        self._reader = threading.Thread(target=self._read, args=(source,), daemon=True)
        self._reader.start()

    @property
    def lost(self) -> dict[str, str]:
        return self._errors.not_launched

    def wait(
        self, nodes: Sequence[str], seconds: float, is_told_to_stop: Callable[[], bool]
    ) -> None:
        """Until all have answered, it has ended, or there is no time left."""
        # polled: a wish to stop comes by a handler, and must not wait for a node that hangs
        end = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < end and not is_told_to_stop():
            if all(node in self.answers for node in nodes):
                break
            time.sleep(0.1)
        self._finish()
        for thread in (self._reader, self._errors):
            thread.join(LAST_WORDS_SECONDS)

    def _finish(self) -> None:
        try:
            self._process.wait(LAST_WORDS_SECONDS)
        except subprocess.TimeoutExpired:
            batch_job.end_step(self._process, batch_job.termination_seconds())
            self.was_given_up = True

    def _read(self, source: IO[bytes]) -> None:
        for line in source:
            text = line.decode(errors="replace")
            if text.startswith(ANSWER):
                # one that srun has torn or mixed with another is no answer; those after it are
                with suppress(ValueError, KeyError, TypeError):
                    found: dict[str, Any] = json.loads(text.removeprefix(ANSWER))
                    # what srun takes to hand a line on is far below what counts as a wrong clock
                    skew = time.time() - found["time"]
                    self.answers[found["node"]] = Answer(found["results"], skew)
