"""Where a part of a job runs: which node of how many, with how many ranks, and where they meet."""

from __future__ import annotations

import shlex
import socket
import sys
from dataclasses import dataclass

from distseg.distributed.launch import first_host, port_of_job
from shards.errors import InputError

RANKS_VARIABLE = "DISTSEG_RANKS_PER_NODE"
PYTHON_VARIABLE = "DISTSEG_NODE_PYTHON"
TRY_VARIABLE = "DISTSEG_TRY"  # how often the job has started its nodes before, in this allocation


@dataclass(frozen=True)
class Place:
    """One node of a job; first_host and port: where its nodes meet."""

    num_nodes: int
    node: int
    num_ranks: int
    first_host: str
    port: int

    @staticmethod
    def of_step(environment: dict[str, str]) -> Place:
        """This task of a step of srun that has one task per node."""
        try:
            # the step's variables, not the job's: they are right where srun was given fewer nodes,
            # too
            num_nodes, node = (
                int(environment["SLURM_STEP_NUM_NODES"]),
                int(environment["SLURM_NODEID"]),
            )
            nodes = environment["SLURM_STEP_NODELIST"]
        # never a default: each node would then train by itself, as node 0 of one, and all of them
        # write to one run directory
        except (KeyError, ValueError) as error:
            action = "start it with srun, or with --alone for one machine"
            raise InputError(
                f"SLURM's variables: {error}", "those of a step of srun", action
            ) from None
        # computed alike on every node, so that nobody has to be told; another one for each try,
        # since a rank of the last that hangs may still hold its port
        port = port_of_job(environment, int(environment.get(TRY_VARIABLE, "0")))
        return Place(num_nodes, node, ranks_per_node(environment), first_host(nodes), port)

    @staticmethod
    def alone(environment: dict[str, str]) -> Place:
        """This machine, as the only one."""
        with socket.socket() as probe:
            # port 0: the kernel picks a free one, so that runs on one machine do not meet
            probe.bind(("127.0.0.1", 0))
            return Place(1, 0, ranks_per_node(environment), "127.0.0.1", probe.getsockname()[1])


def ranks_per_node(environment: dict[str, str]) -> int:
    """DISTSEG_RANKS_PER_NODE where that is set, else a rank for each GPU that the job has on this
    node, else one.
    """
    for name in (RANKS_VARIABLE, "SLURM_GPUS_ON_NODE"):
        text = environment.get(name, "")
        if text:
            if not text.isdecimal() or int(text) < 1:
                raise InputError(
                    f"{name}={text}",
                    "a number of ranks, at least 1",
                    f"correct {name}, or unset it",
                )
            return int(text)
    return 1


def python_on_nodes(environment: dict[str, str]) -> list[str]:
    """The words after srun's own options with which Python is started on a node:
    DISTSEG_NODE_PYTHON, which enters a container, else this Python.
    """
    text = environment.get(PYTHON_VARIABLE, "")
    try:
        return shlex.split(text) or [sys.executable]
    except ValueError as error:
        action = f"correct {PYTHON_VARIABLE} in slurm/cluster.sh"
        raise InputError(f"{PYTHON_VARIABLE}={text}: {error}", "words of a shell", action) from None
