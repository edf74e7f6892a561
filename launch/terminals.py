"""Terminals: what a stream's encoding cannot show is written by letters that it can, and ends no program."""

import codecs
import contextlib
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator

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


def show_what_can_be_shown() -> None:
    """Standard output and standard error put up with every letter, whatever their encoding is."""
    codecs.register_error("stand_ins", stand_ins)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook has streams of its own
            stream.reconfigure(errors="stand_ins")


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
