"""Errors: bad input (what was got, what is needed, what to do), faults that pass, damaged bytes."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used, raised before time is spent on it.

    got: what was found, with the file or key named; needed: what would be accepted; action: what
    the user can do now, a command where there is one.
    """

    def __init__(self, got: str, needed: str, action: str):
        self.got, self.needed, self.action = got, needed, action
        super().__init__(got, needed, action)  # all three, so that the exception survives pickling

    def __str__(self) -> str:
        return f"{self.got}\n  needed: {self.needed}\n  to do:  {self.action}"


class TemporaryError(RuntimeError):
    """What is nobody's input to mend, and may be gone when the same command is started again.

    exit_code: what a command that it ends returns: EX_TEMPFAIL of sysexits.h, which the supervisor
    and schedulers take for "try again".
    """

    exit_code = 75


# no InputError: the reader first tries another copy, and only then bothers the user
class DamageError(Exception):
    """Bytes that are not the ones that were packed."""
