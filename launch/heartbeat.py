"""Heartbeat: every process of a run gives a sign of life; where one ceases to, the others end with its name.

A process that waits for its device or for others in an exchange need not notice that one of them is gone: under NCCL
it waits on until the time-out. A thread of its own does.
"""

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from options.errors import say_error

INTERVAL = 3.0
"""Seconds between two signs of life."""
MISSED = 10
"""A rank is dead after so many polls without a new one: polls, not seconds, so that a process that was suspended does
not declare the others dead when it wakes."""
ANSWER = timedelta(seconds=3)
"""So long the store may take to answer."""
Address = tuple[str, int]


def open_store() -> Address:
    """To be called on the first rank, whose process keeps the signs of life: where the others find them."""
    global _kept
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    _kept = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    return host, _kept.port


_kept: dist.TCPStore | None = None


def beat(rank: int, hosts: list[str], address: Address, leaving: threading.Event, end: Callable[[], object]) -> None:
    """Give signs of life, and look for those of the other ranks, until the run is over; in a thread of its own.

    Args:
        rank: of this process.
        hosts: of every rank, the machine's name.
        address: where the first rank keeps the store.
        leaving: set when the run is over.
        end: called where another rank has ceased to; it ends this process.
    """
    store, seen, missed = None, [0] * len(hosts), [0] * len(hosts)
    looked_at = time.monotonic()
    while not leaving.wait(max(0.0, looked_at + INTERVAL - time.monotonic())):
        looked_at = time.monotonic()
        try:
            store = store or dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=ANSWER)
            store.add(str(rank), 1)
            beats = [store.add(str(other), 0) for other in range(len(hosts))]
        except (RuntimeError, ValueError):  # the first process, which keeps the store, does not answer
            store, missed[0] = None, missed[0] + 1
        else:
            missed = [0 if now != before else m + 1 for now, before, m in zip(beats, seen, missed)]
            seen = beats
        for other, host in enumerate(hosts):
            if missed[other] >= MISSED and not leaving.is_set():
                silence = f"has given no sign of life for {MISSED * INTERVAL:.0f} s"
                say_error(f"rank {other} on {host} {silence}: the run ends")
                end()
