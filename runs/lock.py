"""A run's folder belongs to one process at a time: rank 0 of the run that writes there."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from options.errors import UsageError

NAME = ".lock"


def locked(folder: Path) -> IO | None:
    """The folder is this process's own until it ends; None where the file system knows no locks.

    A lock of POSIX's kind: worker processes, which may live a little longer, do not inherit it.

    Raises:
        UsageError: another process has it.
    """
    try:
        lock = open(folder / NAME, "ab+", buffering=0)  # noqa: SIM115 (the lock goes when the process ends)
    except OSError:
        return None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}".encode())
    except (BlockingIOError, PermissionError):  # POSIX allows either
        lock.seek(0)
        raise UsageError(
            f"--run_name={folder.name}: another process ({lock.read().decode()}) writes into {folder}: "
            "wait until it has ended, or choose another name"
        ) from None
    except OSError:  # no locks here, or no room for these words
        pass
    return lock


def refuse_another_writer(folder: Path) -> None:
    """Before this process reads what is there: a run that goes on takes its old checkpoints away under the reader.

    Raises:
        UsageError: another process writes into this folder.
    """
    if (folder / NAME).exists() and (lock := locked(folder)):  # none is left where there is no run
        lock.close()
