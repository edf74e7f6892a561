"""Signals: SIGTERM, SIGINT, SIGHUP, SIGUSR1 ask for an end after the current step; a second SIGINT is obeyed now."""

import contextlib
import os
import signal
import socket
import threading
import time
from types import TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SAME_KEY = 1.0
"""Seconds within which a second SIGINT is the first one again: a terminal and a launcher both hand it on."""


class Interrupts(contextlib.AbstractContextManager):
    """Notes signals while the context lasts. In a thread that is not the main one, where Python lets nobody: none.

    The signals are read by a thread: the main thread may be inside an exchange whose other side does not answer, and
    Python calls its handlers only between two of its own instructions.
    """

    def __init__(self):
        self.received = 0  # the number of the first signal, 0: none
        self.stopped = False  # the run has come to its end by a signal, here or on another rank
        self._interrupted_at: float | None = None

    def __enter__(self) -> "Interrupts":
        self._handlers = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
                self._handlers[number] = signal.signal(number, lambda *_: None)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._read, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if not self._handlers:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            # A launcher may hand a signal on once more while this process ends, whose exit status is to stand.
            signal.signal(number, signal.SIG_IGN if self.stopped else handler)
        self._writer.close()

    def _forget(self) -> None:
        """In a forked process (a loader's worker): launchers signal whole groups, and the parent still needs it."""
        if self._writer.fileno() == -1:
            return
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # not handlers: torch sets its own in a worker

    def _read(self) -> None:
        while numbers := self._reader.recv(1):
            if numbers[0] in SIGNALS:
                self._note(numbers[0])
        self._reader.close()

    def _note(self, number: int) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is not None and now - self._interrupted_at > SAME_KEY:
                os._exit(128 + number)
            self._interrupted_at = self._interrupted_at or now


def heed_the_parent_alone() -> None:
    """In a worker process, where `SIGNALS` are blocked: SIGTERM from the parent ends it, that of others does not."""

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)  # as torch's own handler has it: this is no failure

    threading.Thread(target=wait, name="signals", daemon=True).start()
