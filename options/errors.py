"""How the program says that something cannot be: the two errors that are shown as one line, and that line."""

import sys

REFUSED = 2
"""Exit status of a program whose options, or the data that they name, are refused."""
GRACE = 5.0
"""Seconds that a rank waits with its end, so that whoever knows the reason can say it first."""


class UsageError(Exception):
    """Something the user can put right: shown as one line, without a traceback. Names the option and the remedy."""


class RunError(Exception):
    """A run that cannot go on: shown as one line, without a traceback. Says what happened and what to do."""


def in_one_line(error: Exception) -> str:
    """What went wrong, for a message: the system's words, or the error's kind and its own, without torch's stack."""
    if isinstance(error, OSError):
        words = [error.strerror, error.filename] if error.strerror else [str(error)]
    else:
        words = [type(error).__name__, str(error).partition("\nException raised from")[0]]
    line = " ".join(": ".join(str(word) for word in words if word).split()) or type(error).__name__
    return line if len(line) <= 300 else f"{line[:300]}…"


def say(line: str) -> None:
    """A line on standard error, where no run has a log yet."""
    print(f"main.py: {line}", file=sys.stderr, flush=True)


def say_error(line: str) -> None:
    say(f"error: {line}")
