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
    """An error's kind and words, for a message."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def say(line: str) -> None:
    """A line on standard error, where no run has a log yet."""
    print(f"main.py: {line}", file=sys.stderr, flush=True)


def say_error(line: str) -> None:
    say(f"error: {line}")
