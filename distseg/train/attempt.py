"""One attempt at a run: noted in attempts.jsonl, and everything closed, however it ends."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distseg.data.stream import PairedStream, TrainStream
from distseg.distributed.ranks import is_shared, on_all
from distseg.runs import attempts
from distseg.train.trainer import Trainer


@contextmanager
def noted(trainer: Trainer, stream: TrainStream | PairedStream) -> Iterator[attempts.Note]:
    """The note of an attempt that goes on from the trainer's step; called on every rank.

    What ends it with an error is noted, and so is what the watchdog says before it ends the
    process. What ends it well, its block notes.
    """
    ranks, hosts = trainer.ranks, on_all(trainer.ranks, socket.gethostname())
    run_dir = Path(trainer.config.run_dir) if ranks.is_main else None
    note = attempts.Note(run_dir, hosts, trainer.state.step)
    trainer.watchdog.last_words = lambda diagnosis: note.finish(
        trainer.state.step, "failed", diagnosis
    )
    exit_code = 1
    try:
        yield note
        exit_code = 0
    except BaseException as error:
        if not is_shared(error):
            trainer.checkpoints.give_up()  # the other ranks' parts may never come
        if isinstance(error, Exception):
            note.fail(trainer.state.step, error)
        raise
    finally:
        trainer.checkpoints.close()
        stream.close()
        trainer.progress.close()
        trainer.tracker.finish(exit_code)
