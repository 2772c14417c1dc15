"""What a terminal or a locale cannot show is shown as well as it can be, and ends nothing.

Imports nothing heavy.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from typing import Any

UTF8_VARIABLE = "PYTHONUTF8"


def use_utf8() -> None:
    """Start this process anew in Python's UTF-8 mode, where names of files are no more than ASCII.

    Python does so by itself in the C locale, unless PYTHONUTF8=0 is set. Without it, no path with
    an umlaut could be opened, written down or passed on.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name != "ascii":
        return
    # for the processes that this one will start
    os.environ[UTF8_VARIABLE] = "1"
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def forgive(*streams: Any) -> None:
    """Let streams show "?" for what their encoding has not, instead of raising an error."""
    for stream in streams:
        # not one of a caller's own, such as a notebook's
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def has_no_reader(stream: Any) -> bool:
    """Whether a stream is a pipe whose reader has gone; what is written next then goes nowhere."""
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    # else Python would complain once more when it ends
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return True


class Forgiving:
    """The process's stdout of the moment, which shows "?" for what its encoding has not."""

    def write(self, text: str) -> int:
        try:
            return sys.stdout.write(text)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding or "ascii"
            return sys.stdout.write(text.encode(encoding, "replace").decode(encoding))

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)
