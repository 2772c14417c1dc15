"""The agreed stop: a signal to any rank ends all ranks at the same step boundary."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
# one Ctrl-C reaches a worker twice: from the terminal, and passed on by torchrun
SECOND_SIGNAL_SECONDS = 2.0
# ranks: 126 messages of some 0.05 ms are done beside a step
RING_AT_MOST = 64
HEARD = b"\nCtrl-C: training stops after this step and saves it; a second Ctrl-C does not wait\n"


class StopRequest:
    """Turns a signal to any rank into a stop of all ranks at the same step boundary.

    A handler may do next to nothing, so it sets a flag. `begin` sends the flags (gloo, beside the
    step's own work), `agreed` waits for what they come to; both are called once a step on every
    rank.

    Of few ranks by a sum, which gloo takes round a ring. At 1,024 ranks that is 2,046 messages one
    after the other, longer than a step: of many ranks the flags come to the main one all at once,
    and its answer goes out by a tree, in ten. For that the hosts wait at the end of each step (1 ms
    between processes of one machine, where the sum costs 0.3), a GPU does not.
    """

    def __init__(self, answers: bool = False) -> None:
        """answers: a first Ctrl-C is acknowledged on stderr; for one rank of a job."""
        self._answers = answers
        self._flag, self._signalled = 0, 0.0
        # on the CPU, so by gloo: it takes part in no order of the GPU's collectives
        self._tensor = torch.zeros(1, dtype=torch.int32)
        # on the main rank of many, a row for each
        self._of_all = torch.zeros(0, 1, dtype=torch.int32)
        self._work: Any = None
        self.signal_name = ""
        # Python lets no other thread set handlers, and calls them in none
        self._listens = threading.current_thread() is threading.main_thread()
        for number in SIGNALS if self._listens else ():
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._flag and now - self._signalled > SECOND_SIGNAL_SECONDS:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        if number == signal.SIGINT and self._answers and not self._flag:
            # not print(): the signal may have come in the middle of one. Nobody may read it: in
            # `distseg train ... 2>&1 | tee log` the same Ctrl-C ends tee.
            with suppress(OSError):
                os.write(2, HEARD)
        # from the first signal on: torchrun's copy of a Ctrl-C must not start the time anew
        self._signalled = now if not self._flag else self._signalled
        self._flag = 1
        self.signal_name = signal.Signals(number).name

    def release(self) -> None:
        """Let SIGTERM and Ctrl-C end the process again; SIGUSR1, a mere warning, still does not."""
        if self._listens:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @staticmethod
    def ignore() -> None:
        """Nothing is left to stop.

        Python takes its handlers back as it ends, and would die of a late signal.
        """
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def reason(self) -> str:
        """Which signal it was, for people."""
        return f"{self.signal_name} here" if self.signal_name else "a signal to another rank"

    def begin(self, is_wanted: bool = False) -> None:
        """Start to exchange the flags of all; `is_wanted` asks for a stop as a signal does."""
        # read once: a signal that comes later is exchanged at the next step, on all ranks alike
        self._tensor.fill_(self._flag or is_wanted)
        if dist.get_world_size() <= RING_AT_MOST:
            self._work = dist.all_reduce(self._tensor, async_op=True)
            return
        if dist.get_rank() == 0 and not len(self._of_all):
            self._of_all = self._tensor.new_zeros(dist.get_world_size(), 1)
        into = [*self._of_all] or None
        self._work = dist.gather(self._tensor, into, dst=0, async_op=True)

    def agreed(self) -> bool:
        """True on all ranks when any rank had been signalled at `begin`."""
        # sent a step's work ago, so as a rule they are all there
        self._work.wait()
        if dist.get_world_size() > RING_AT_MOST:
            if dist.get_rank() == 0:
                self._tensor.copy_(self._of_all.amax(dim=0))
            dist.broadcast(self._tensor, src=0)
        return bool(self._tensor.item())
