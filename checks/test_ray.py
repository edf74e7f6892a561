"""examples/ray_train.py on a real Ray: a worker is lost with its machine, or a machine is added, and the run goes on
with the same samples.
"""

import csv
import importlib.util
import itertools
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checks.conftest import FIXED_CUT, column, launch, train

pytestmark = [
    pytest.mark.long,
    pytest.mark.xdist_group("ray"),  # one cluster at a time
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="pip install -r requirements-ray.txt"),
]
OPTIONS = ("--model=checks.test_ray:mortal", "--knee=100", "--max_samples=1500", FIXED_CUT)
OPTIONS = (*OPTIONS, "--checkpoint_interval=4", "--precision=64-true", "--eval_samples=500")


class Mortal(torch.nn.Linear):
    """In its twentieth pass it ends with its machine: the process that has started it, where the file LOST names it.

    Where the file names none, a single worker goes no further: that it has come so far is said by an empty file.
    """

    passes = 0

    def forward(self, x):
        self.passes += self.training
        if self.passes == 20 and "LOST" in os.environ:
            self.comes_to_its_end(Path(os.environ["LOST"]))
        return super().forward(x.flatten(1))

    def comes_to_its_end(self, lost: Path) -> None:
        named = lost.read_text() if lost.exists() else ""
        if named == str(os.getppid()):
            for process in (os.getppid(), os.getpid()):
                os.kill(process, signal.SIGKILL)
        if not named and torch.distributed.get_world_size() == 1:
            lost.touch()
            threading.Event().wait()


def mortal(image_shape, num_classes) -> torch.nn.Module:
    return Mortal(64, num_classes)


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """A cluster of one machine with one core."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("LOST", str(tmp_path / "lost"))
    for name in ("USAGE_STATS_ENABLED", "TRAIN_ENABLE_PREEMPTION_WATCHER", "TRAIN_METRICS_ENABLED", "worker_niceness"):
        monkeypatch.setenv(f"RAY_{name}", "0")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")  # on as many machines as there were before
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}  # noticed: that one is gone
    cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": soon})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> SimpleNamespace:
    return train(tmp_path_factory.mktemp("undisturbed"), *OPTIONS, processes=2)


def command(storage: Path) -> list[str]:
    own = ["--workers=1:2", "--look=1", f"--storage={storage}"]
    return [sys.executable, "examples/ray_train.py", *own, "--", *OPTIONS]


def ends_as(undisturbed: SimpleNamespace, run: Path, processes: list[int]) -> None:
    """The steps of this run were taken on so many workers, one after the other, and are the undisturbed one's."""
    with open(run / "metrics.csv", newline="") as file:
        ours = SimpleNamespace(rows=list(csv.DictReader(file)))
    assert [size for size, _ in itertools.groupby(column(ours, "world_size"))] == processes
    for name in ("step", "samples", "batch_size", "next_batch_size"):
        assert column(ours, name) == column(undisturbed, name)
    for name in ("train_loss", "val_loss"):
        assert column(ours, name) == pytest.approx(column(undisturbed, name), rel=1e-9)
    for weights, others in zip(*(torch.load(folder / "model.pt").values() for folder in (run, undisturbed.folder))):
        torch.testing.assert_close(weights, others, rtol=1e-9, atol=1e-12)


def test_a_lost_worker(tmp_path, machines, undisturbed):
    (raylet,) = machines.add_node(num_cpus=1).all_processes["raylet"]
    (tmp_path / "lost").write_text(str(raylet.process.pid))
    done = launch(*command(tmp_path), timeout=600, RAY_ADDRESS=machines.address)
    run = tmp_path / "adadagrad" / "run"
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"in {run}" in done.stdout and "'val_loss'" in done.stdout
    ends_as(undisturbed, run, [2, 1])


def test_a_worker_more(tmp_path, machines, undisturbed):
    """A machine is added while the run has one worker, which ends only with its group."""
    with ThreadPoolExecutor() as pool:
        job = pool.submit(launch, *command(tmp_path), timeout=600, RAY_ADDRESS=machines.address)
        while not (tmp_path / "lost").exists() and not job.done():
            time.sleep(0.1)
        machines.add_node(num_cpus=1)
    done = job.result()
    assert done.returncode == 0, done.stdout + done.stderr
    ends_as(undisturbed, tmp_path / "adadagrad" / "run", [1, 2])


def test_options_that_are_refused(tmp_path):
    done = launch(sys.executable, "examples/ray_train.py", f"--storage={tmp_path}", "--", "--modell=cnn")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "main.py: error: " in done.stderr and "--model" in done.stderr
