"""One attempt at a run: noted in attempts.jsonl, and everything closed, however it ends."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from distseg.data.stream import PairedStream, TrainStream
from distseg.distributed.ranks import gathered, is_shared
from distseg.distributed.watchdog import is_of_lost_peer
from distseg.runs import attempts
from distseg.train import out_of_memory
from distseg.train.trainer import Trainer


@contextmanager
def noted(trainer: Trainer, stream: TrainStream | PairedStream) -> Iterator[attempts.Note]:
    """The note of an attempt that goes on from the trainer's step; called on every rank.

    What ends it with an error is noted, and so is what the watchdog says before it ends the
    process. What ends it well, its block notes.
    """
    # before the note is opened: a collective that fails leaves no attempt without hosts
    ranks, hosts = trainer.ranks, gathered(trainer.ranks, socket.gethostname())
    # of the main rank; the others' writes nothing, so that no condition is needed anywhere
    run_dir = Path(trainer.config.run_dir) if ranks.is_main else None
    note = trainer.note = attempts.Note(run_dir, hosts, trainer.state.step, trainer.ledger)
    # the watchdog ends the process by os._exit, which runs no `finally`: the only chance to say why
    trainer.watchdog.last_words = lambda diagnosis: note.finish(
        trainer.state.step, "failed", diagnosis
    )
    exit_code = 1
    try:
        yield note
        exit_code = 0
    # KeyboardInterrupt too: the second Ctrl-C must not wait for the others' parts either
    except BaseException as error:
        # sys.exit in code of the user's own: its exit code 0 would say that the run is done
        cause = RuntimeError(f"SystemExit: {error}") if isinstance(error, SystemExit) else error
        if isinstance(cause, torch.OutOfMemoryError):
            where = f"step {trainer.state.step + 1}"
            out_of_memory.explain(trainer.config, ranks, where, trainer.ledger.part)
        if not is_shared(cause):
            trainer.checkpoints.give_up()  # the other ranks' parts may never come
        # an interrupt is told by the shell; of a lost rank the watchdog has the better words
        if isinstance(cause, Exception) and not is_of_lost_peer(cause):
            note.fail(trainer.state.step, cause)
        if cause is not error:
            raise cause from error
        raise
    finally:
        _close(trainer, stream, exit_code)


def _close(trainer: Trainer, stream: TrainStream | PairedStream, exit_code: int) -> None:
    # first and alone worth waiting for: what this rank is writing becomes a checkpoint, or does not
    trainer.checkpoints.close()
    stream.close()
    trainer.profiler.close()
    # before the tracker, whose warnings would land in the middle of the live line
    trainer.progress.close()
    trainer.tracker.finish(exit_code)
