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
"""So many looks without a new one mean that there will be none. (Looks, not seconds: whoever was himself stopped for a
while has not looked either.)"""
Address = tuple[str, int]


def open_store() -> Address:
    """To be called on the first rank, whose process keeps the signs of life: where the others find them."""
    global _kept
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    _kept = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    return host, _kept.port


_kept: dist.TCPStore | None = None


class Heartbeat(threading.Thread):
    """Gives signs of life, and looks for those of the other ranks, until the run is over.

    Args:
        rank: of this process.
        hosts: of every rank, the machine's name.
        address: where the first rank keeps the store.
        leaving: set when the run is over.
        end: called where another rank has ceased to; it ends this process.
    """

    def __init__(
        self, rank: int, hosts: list[str], address: Address, leaving: threading.Event, end: Callable[[], object]
    ):
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.hosts, self.address, self.leaving, self.end = rank, hosts, address, leaving, end
        self.store: dist.TCPStore | None = None
        self.seen, self.missed = [0] * len(hosts), [0] * len(hosts)

    def run(self) -> None:
        looked_at = time.monotonic()
        while not self.leaving.wait(max(0.0, looked_at + INTERVAL - time.monotonic())):
            looked_at = time.monotonic()
            self._look()
            for other, host in enumerate(self.hosts):
                if self.missed[other] >= MISSED and not self.leaving.is_set():
                    silence = f"has given no sign of life for {MISSED * INTERVAL:.0f} s"
                    say_error(f"rank {other} on {host} {silence}: the run ends")
                    self.end()

    def _look(self) -> None:
        try:
            self.store = self.store or _connected(self.address)
            self.store.add(str(self.rank), 1)
            beats = [self.store.add(str(other), 0) for other in range(len(self.hosts))]
        except (RuntimeError, ValueError):  # the first process, which keeps the store, does not answer
            self.store, self.missed[0] = None, self.missed[0] + 1
        else:
            self.missed = [0 if now != before else m + 1 for now, before, m in zip(beats, self.seen, self.missed)]
            self.seen = beats


def _connected(address: Address) -> dist.TCPStore:
    return dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=INTERVAL))
