"""What the tests of other people's trainers share: the steps of main.py that each is compared with, the samples in its
order, and two processes that have joined a group.
"""

import functools
import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp

from adadagrad import Controller, Limits
from checks.conftest import column, forks, train, unused_port
from checks.test_library import B0, OPTIONS, Samples, new_controller

PIECE, STEPS, LARGEST = 8, 20, 1432
"""Samples of a micro-batch, over all processes; both numbers divide by it."""


digits = functools.cache(Samples)  # read once a process


def controller() -> Controller:
    new = new_controller()
    new.limits = Limits(LARGEST, max_growth=2.0, multiple=PIECE)
    return new


@functools.cache
def decisions_of_main() -> list[tuple[float, float]]:
    """Batch size and learning rate of every step of main.py, of one process."""
    more = [f"--max_iters={STEPS}", f"--batch_size_multiple={PIECE}", f"--max_batch_size={LARGEST}"]
    with tempfile.TemporaryDirectory() as folder:
        ours = train(Path(folder), *OPTIONS, *more)
    decisions = list(zip(column(ours, "batch_size"), column(ours, "lr")))
    assert len(decisions) == STEPS and decisions[-1][0] >= 3 * B0
    return decisions


def two_processes(function: Callable[[int, Path], dict], folder: Path) -> list[dict]:
    """What this function of the rank and a folder gives on each of two processes that have joined a group."""
    forks()
    mp.start_processes(_joined, (unused_port(), function, folder), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"found{rank}", weights_only=False) for rank in range(2)]


def _joined(rank: int, port: int, function: Callable[[int, Path], dict], folder: Path) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "checks"}
    os.environ.update({name: str(value) for name, value in own.items()})
    gc.freeze()  # trainers collect garbage often, among all that has been imported
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo")
    torch.save(function(rank, folder), folder / f"found{rank}")
    torch.distributed.barrier()
    os._exit(0)  # Lightning's trainer has the group still in use: Python's own end would wait for it


def weights(model: torch.nn.Module) -> list[float]:
    return torch.nn.utils.parameters_to_vector(model.parameters()).tolist()


def same_on_both(found: list[dict], *names) -> None:
    for name in names:
        assert found[0][name] == found[1][name], name
