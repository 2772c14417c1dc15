"""One machine's part of a job: torchrun, which leaves signals for checkpoints to its ranks and says
how they ended.

Started once per node, by the supervisor: `python -m launchers.agent [--run-dir DIR] MODULE
ARGUMENT...`. Where torchrun would die of SIGUSR1 and turn every exit code into 1, this ignores it
and leaves with the code of its first rank that failed. On a cluster SLURM ends it with its job;
alone, it tells its ranks to stop once the supervisor is gone.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distseg.runs import attempts
from launchers.places import Place
from launchers.stopping import REPEAT_SECONDS, stop_signal, tell_ranks

# nodes of a job do not start together: an image or an environment may have to be loaded on each
JOIN_SECONDS = 300  # how long the machines of a job wait for each other
WATCH_SECONDS = 0.5


@dataclass(frozen=True)
class Work:
    """A module with its arguments, as every rank runs it; where a rank that fails is noted."""

    module: str
    arguments: tuple[str, ...]
    run_dir: Path | None = None


def run(work: Work, place: Place) -> int:
    """Run `work` on this node's ranks.

    Returns the first bad exit code, 128 + n for a death by signal n, or 0.
    """
    # the ranks inherit this, until they are ready to be stopped
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # torchrun's default is 1, which leaves most cores of a CPU node idle
    # of the cores that the job may use, which on a shared node are fewer than the machine has
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // place.num_ranks))
    )
    config = LaunchConfig(
        min_nodes=place.num_nodes,
        max_nodes=place.num_nodes,
        nproc_per_node=place.num_ranks,
        run_id=f"distseg-{place.port}",
        # static: the nodes are known and stay, so that node 0 is where rank 0 is, whatever the
        # order they come in
        rdzv_backend="static",
        rdzv_endpoint=f"{place.first_host}:{place.port}",
        rdzv_configs={"rank": place.node, "timeout": JOIN_SECONDS},
        max_restarts=0,  # the supervisor starts all nodes again
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", work.module, *work.arguments)
    except ChildFailedError as error:
        # the first in time: the others were killed by torchrun because of it
        rank, failure = error.get_first_failure()
        if work.run_dir is not None:
            attempts.note_failure(work.run_dir, socket.gethostname(), rank, failure.exitcode)
        # as a shell has it: an exit code of -9 would arrive as 247, and be taken for an error of
        # the run's own
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def stop_without(supervisor: int) -> None:
    """Wait until the parent process is no longer the one of this id, then tell the ranks to stop
    until they have.
    """
    # an orphan gets another parent at once, so that this cannot miss it
    while os.getppid() == supervisor:
        time.sleep(WATCH_SECONDS)
    since = time.monotonic()
    while True:
        tell_ranks(os.getpid(), stop_signal(time.monotonic() - since))
        time.sleep(REPEAT_SECONDS)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser("launchers.agent")
    parser.add_argument("--run-dir", type=Path, help="where a rank that fails is noted")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="this is the only machine, whatever SLURM's variables say",
    )
    parser.add_argument(
        "--supervisor", type=int, help="process id of the parent; without it the ranks stop"
    )
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    environment = dict(os.environ)
    if options.supervisor is not None:
        threading.Thread(target=stop_without, args=(options.supervisor,), daemon=True).start()
    place = Place.alone(environment) if options.alone else Place.of_step(environment)
    return run(Work(options.module, tuple(options.arguments), options.run_dir), place)


if __name__ == "__main__":
    sys.exit(main())
