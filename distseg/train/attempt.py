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
    # before the note is opened: a collective that fails leaves no attempt without hosts
    ranks, hosts = trainer.ranks, on_all(trainer.ranks, socket.gethostname())
    # one note for all ranks: the others keep one that writes nothing, and need no condition
    # anywhere
    run_dir = Path(trainer.config.run_dir) if ranks.is_main else None
    note = attempts.Note(run_dir, hosts, trainer.state.step)
    # The watchdog ends the process by os._exit, which runs no `finally`. This call is the only
    # chance to say why the attempt ended.
    trainer.watchdog.last_words = lambda diagnosis: note.finish(
        trainer.state.step, "failed", diagnosis
    )
    exit_code = 1
    try:
        yield note
        exit_code = 0
    # KeyboardInterrupt too: the second Ctrl-C must not wait for the others' parts either
    except BaseException as error:
        if not is_shared(error):
            trainer.checkpoints.give_up()  # the other ranks' parts may never come
        # an interrupt is told by the shell, and is no failure of the run
        if isinstance(error, Exception):
            note.fail(trainer.state.step, error)
        raise
    finally:
        # first and alone worth waiting for: what this rank is writing becomes a checkpoint, or does
        # not
        trainer.checkpoints.close()
        stream.close()
        # before the tracker, whose warnings would land in the middle of the live line
        trainer.progress.close()
        trainer.tracker.finish(exit_code)
