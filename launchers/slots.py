"""How many jobs of a sweep run at a time on this machine, where nothing queues them.

    python -m launchers.slots FOLDER NUMBER    what submitit starts in the place of a local job

It waits for one of so many slots in submitit's folder and becomes the job's process: the lock of a
slot, and the process id that the job is known by, stay with that, and end with it however it ends.
A job's own time limit begins when it has its slot.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import sys
import time
from pathlib import Path

POLL_SECONDS = 0.5
# of submitit: whether its process is a shell's child, and known by the shell's id
SHELL_VARIABLE = "SUBMITIT_LOCAL_WITH_SHELL"


def setup(folder: str, number: int) -> list[str]:
    """What submitit is given as a local job's setup, to have it wait for a slot."""
    words = [sys.executable, "-m", "launchers.slots", folder, str(number)]
    # exec: submitit's own command, which it writes behind this, is never come to
    return [f"exec {shlex.join(words)}"]


def is_waiting(command_line: list[bytes]) -> bool:
    """Whether this is the command line of a job without a slot."""
    return b"launchers.slots" in command_line


def take(folder: Path, number: int) -> int:
    """Wait for a slot; the descriptor that holds it, which processes made by exec keep."""
    while True:
        for index in range(number):
            # not inherited by the children of the job's process, only by what this becomes
            held = os.open(folder / f"slot-{index}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.set_inheritable(held, True)
                return held
            except OSError as error:
                os.close(held)
                # a file system without locks: better all at once than none
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
                    return -1
        time.sleep(POLL_SECONDS)


def main(folder: str, number: str) -> None:
    """Wait, then be what submitit would have started."""
    take(Path(folder), int(number))
    os.environ[SHELL_VARIABLE] = ""
    os.execv(sys.executable, [sys.executable, "-m", "submitit.local._local", folder])


if __name__ == "__main__":
    main(*sys.argv[1:])
