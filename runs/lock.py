"""A lock on a run's folder: one process writes there at a time, rank 0 of a run."""

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from options.errors import UsageError

NAME = ".lock"


def locked(folder: Path) -> IO | None:
    """Lock the folder until this process ends; None where the file system does not support locks.

    A POSIX lock: worker processes, which may outlive this one briefly, do not inherit it.

    Raises:
        UsageError: another process has it.
    """
    try:
        lock = open(folder / NAME, "ab+", buffering=0)  # noqa: SIM115 (the lock goes when the process ends)
    except OSError:
        return None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # POSIX allows either; all else: there are no locks here
            lock.close()
            return None
        lock.seek(0)
        raise UsageError(
            f"--run_name={folder.name}: another process ({lock.read().decode()}) writes into {folder}: "
            "wait until it has ended, or choose another name"
        ) from None
    with contextlib.suppress(OSError):  # no room for these words
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}".encode())
    return lock


def refuse_another_writer(folder: Path) -> None:
    """Check before reading a folder: a run that is still writing removes old checkpoints under the reader.

    Raises:
        UsageError: another process writes into this folder.
    """
    if (folder / NAME).exists() and (lock := locked(folder)):  # none is left where there is no run
        lock.close()
