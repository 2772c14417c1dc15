"""How the ranks of a machine are told to save and leave, and for how long they are asked before
they are killed.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

REPEAT_SECONDS = 5.0  # ranks that are still starting ignore the signal
STOP_VARIABLE = "DISTSEG_STOP_SECONDS"  # how long ranks may take to save once told to stop


def stop_signal(seconds: float) -> signal.Signals:
    """What ranks that were told to stop so many seconds ago are sent."""
    # below signal_seconds of a job, so that it is this process that ends ranks which hang
    patience = float(os.environ.get(STOP_VARIABLE) or 240)
    return signal.SIGKILL if seconds > patience else signal.SIGUSR1


def tell_ranks(agent: int, number: signal.Signals) -> None:
    """Send a signal to the ranks of an agent: its child processes, none when it has just ended."""
    with suppress(OSError):
        # children alone, not the process group: SIGKILL would end the agent too, and nobody would
        # note how its ranks ended
        for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), number)
