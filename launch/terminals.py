"""Terminals: what a stream's encoding cannot show is written by letters that it can; nobody need be listening."""

import codecs
import contextlib
import os
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from typing import IO, Any

NAMES = {"η": "eta", "θ": "theta", "ν": "nu", "×": "x", "±": "+-", "…": "...", "−": "-", "–": "-", "—": "-", "·": "*",
         "‖": "||", "√": "sqrt", "≤": "<=", "≥": ">=", "→": "->", "“": '"', "”": '"', "’": "'"}  # fmt: skip
"""Signs of the program's own words; of what users name, accents go and the rest becomes question marks."""


def stand_ins(error: UnicodeEncodeError) -> tuple[str | bytes, int]:
    """A handler of encoding errors: what is written in place of the letters that cannot be, and where to go on."""
    letters = error.object[error.start : error.end]
    if all("\udc80" <= letter <= "\udcff" for letter in letters):  # bytes of a file's name that were never letters
        return letters.encode("utf-8", "surrogateescape"), error.end
    return "".join(NAMES.get(letter) or _plain(letter) for letter in letters), error.end


def _plain(letter: str) -> str:
    return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"


class Unheard:
    """A stream that goes on where nobody listens: its pipe is closed, its device is full or gone."""

    def __init__(self, stream: IO[str]):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._dropping():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self.stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # the rest of what is said goes nowhere, also what libraries and the interpreter's end write
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def show_what_can_be_shown() -> None:
    """Standard output and standard error put up with every letter, whatever their encoding is, and with no listener.

    To be called before a file is opened: it would get the number of a stream that is closed.
    """
    codecs.register_error("stand_ins", stand_ins)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                while os.open(os.devnull, os.O_RDWR) < number:
                    pass
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure") and not isinstance(stream, Unheard):  # a notebook has streams of its own
            stream.reconfigure(errors="stand_ins")
            setattr(sys, name, Unheard(stream))


@contextlib.contextmanager
def after(seconds: float, say: Callable[[], None]) -> Iterator[None]:
    """Call `say`, in a thread of its own, where what is inside takes longer."""
    timer = threading.Timer(seconds, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


if __name__ == "__main__":  # for expt.sh
    show_what_can_be_shown()
    sys.stdout.writelines(sys.stdin.buffer.read().decode("utf-8"))
