"""`distseg submit` and `distseg sweep`.

The part of the command that hands runs to a cluster. Imports nothing heavy.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distseg.config.arguments import configured_command
from shards.command_line import Commands, add_command, add_overrides
from shards.errors import InputError
from shards.words import counted


def add_submit(commands: Commands) -> None:
    """Add `submit` to the commands."""
    text = """Hand one run to SLURM, or to a process in the background here. \
All of it is checked first, the batch for as many ranks as --ranks-per-node or --gpus-per-node say \
(else one a node, since what nodes have is known when they run).

The job saves before its time limit, or when it is preempted, \
and comes back until the run is done."""
    parser = configured_command(commands, "submit", "train as a job of a cluster", text)
    _add_resources(parser)
    add_overrides(parser, "preset=voc seed=1 ..., or FILE.yaml as for train")
    parser.set_defaults(handler=_submit)


def add_sweep(commands: Commands) -> None:
    """Add `sweep` to the commands."""
    text = """Many runs with other settings, as one array of jobs.

distseg sweep run PLAN.yaml DIR   submit every trial of a plan \
(grid, zip, list, random: see launchers/trials.py)
distseg sweep status DIR          states, scores and errors, also while they run
distseg sweep resubmit DIR        submit again what failed or was lost; \
each trial goes on from its last checkpoint"""
    sweep = add_command(commands, "sweep", "many runs with other settings", text)
    actions = sweep.add_subparsers(title="actions", required=True, metavar="ACTION")
    parser = add_command(
        actions, "run", "submit every trial of a plan", "Submit every trial of a plan."
    )
    parser.add_argument(
        "plan", type=Path, metavar="PLAN.yaml", help="with base, and grid, zip, list or random"
    )
    parser.add_argument(
        "--parallelism", type=int, default=4, metavar="N", help="trials at a time (4)"
    )
    _add_resources(parser)
    # DIR behind PLAN.yaml: argparse takes positional arguments in the order that they were added
    actions_of = {"run": (parser, _sweep_run)}
    for name, handler in (("status", _sweep_status), ("resubmit", _sweep_resubmit)):
        actions_of[name] = (
            add_command(actions, name, f"{name} of a sweep", "See `distseg sweep --help`."),
            handler,
        )
    for parser, handler in actions_of.values():
        parser.add_argument("directory", type=Path, metavar="DIR", help="directory of the sweep")
        parser.set_defaults(handler=handler)


def _add_resources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--executor",
        default="slurm",
        help="slurm, local (in the background, here) or debug (waits)",
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="of each job (1)")
    parser.add_argument(
        "--min-nodes", type=int, metavar="N", help="go on with so few, when one is lost or not fit"
    )
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="N", help="default: whole nodes, with all their GPUs"
    )
    parser.add_argument(
        "--ranks-per-node",
        type=int,
        metavar="N",
        help="default: one for each GPU, one without GPUs",
    )
    parser.add_argument(
        "--minutes", type=int, default=240, metavar="N", help="time limit of one turn (240)"
    )
    parser.add_argument(
        "--signal-seconds", type=int, default=300, metavar="N", help="so long before it, save (300)"
    )
    text = "further option of sbatch, e.g. --slurm partition=gpu"
    parser.add_argument("--slurm", action="append", default=[], metavar="NAME=VALUE", help=text)


def _resources(options: argparse.Namespace) -> dict[str, Any]:
    names = ["executor", "nodes", "min_nodes", "gpus_per_node", "ranks_per_node"]
    names += ["minutes", "signal_seconds"]
    # at the first "=": a value may have others, as in --slurm gres=gpu:1 or export=A=B
    pairs = [option.partition("=") for option in options.slurm]
    for name, separator, _ in pairs:
        if not separator:
            raise InputError(
                f"--slurm {name}", "NAME=VALUE", "write for example --slurm partition=gpu"
            )
    slurm = {name.lstrip("-"): value for name, _, value in pairs}
    return {name: getattr(options, name) for name in names} | {"slurm": slurm}


def _submit(options: argparse.Namespace) -> int:
    # inside, here and below: `distseg --help` need not wait for submitit
    from launchers import submit

    job = submit(*options.overrides, **_resources(options))
    print(f"job {job.job_id}: output in {job.paths.stdout}")
    if options.executor == "debug":
        job.result()  # raises what the run did, so that the exit code says it
    return 0


def _sweep_run(options: argparse.Namespace) -> int:
    from launchers import sweep, trials

    plan = trials.from_file(options.plan)
    jobs = sweep(plan, options.directory, options.parallelism, **_resources(options))
    print(f"{counted(len(jobs), 'trial')}; next: distseg sweep status {options.directory}")
    return 0


def _sweep_status(options: argparse.Namespace) -> int:
    from launchers import status, table

    print(table(status(options.directory)))
    return 0


def _sweep_resubmit(options: argparse.Namespace) -> int:
    from launchers import resubmit

    jobs = resubmit(options.directory)
    print(f"{len(jobs)} submitted again" if jobs else "nothing failed")
    return 0
