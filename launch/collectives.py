"""Agreeing: what the ranks of a run tell each other beside gradients.

It goes from host to host: objects do not travel over devices, and no host waits for its device.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric

from options.errors import RunError, UsageError


def on_all_ranks(fabric: Fabric, function: Callable):
    """Call on every rank; where one is refused or fails, all do, with the same words: none is left waiting."""
    result, problem = None, None
    try:
        result = function()
    except (UsageError, RunError) as error:
        problem = error
    for first in filter(None, all_gather_object(fabric, problem)):
        first.on_all_ranks = True
        raise first
    return result


def all_gather_object(fabric: Fabric, value: Any) -> list[Any]:
    """Every rank's value, on all ranks."""
    values = [value]
    if fabric.world_size > 1:
        values = [None] * fabric.world_size
        dist.all_gather_object(values, value, group=host_group())
    return values


def broadcast_object(fabric: Fabric, function: Callable) -> Any:
    """What the function gives on the first rank, where alone it is called, on all ranks."""
    values = [function() if fabric.global_rank == 0 else None]
    if fabric.world_size > 1:
        dist.broadcast_object_list(values, src=0, group=host_group())
    return values[0]


class Agreement:
    """The largest of the ranks' numbers one call later: no rank waits for the others."""

    def __init__(self, fabric: Fabric):
        self.fabric, self.largest, self.work = fabric, torch.tensor(0), None

    def exchange(self, number: int) -> int:
        """Hand in a number; gives the largest of the last call's (of a single process: this one), 0 at first."""
        if self.fabric.world_size == 1:
            return number
        agreed, self.largest = self.last(), torch.tensor(number)
        self.work = dist.all_reduce(self.largest, dist.ReduceOp.MAX, group=host_group(), async_op=True)
        return agreed

    def last(self) -> int:
        """The largest of what was handed in last."""
        if self.work:
            self.work.wait()
        return int(self.largest)


@lru_cache(maxsize=1)
def host_group() -> dist.ProcessGroup | None:
    """Made at the start: where the machines do not reach each other this way, it is said before anything is done."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
