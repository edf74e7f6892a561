"""examples/ray_train.py on a real Ray: a worker is lost with its machine, and the run goes on with the same samples."""

import csv
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checks.conftest import FIXED_CUT, column, launch, train

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="pip install -r requirements-ray.txt"),
]
OPTIONS = ("--model=checks.test_ray:mortal", "--knee=100", "--max_samples=1500", FIXED_CUT)
OPTIONS = (*OPTIONS, "--checkpoint_interval=4", "--precision=64-true", "--eval_samples=500")


class Mortal(torch.nn.Linear):
    """In its twentieth pass it ends with its machine: the process that has started it, where the file LOST names it."""

    passes = 0

    def forward(self, x):
        self.passes += self.training
        if self.passes == 20 and Path(os.environ.get("LOST", os.devnull)).read_text() == str(os.getppid()):
            for process in (os.getppid(), os.getpid()):
                os.kill(process, signal.SIGKILL)
        return super().forward(x.flatten(1))


def mortal(image_shape, num_classes) -> torch.nn.Module:
    return Mortal(64, num_classes)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Two machines of one core each, the second of which is going to be lost; gives their address."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("LOST", str(tmp_path / "lost"))
    for name in ("USAGE_STATS_ENABLED", "TRAIN_ENABLE_PREEMPTION_WATCHER", "TRAIN_METRICS_ENABLED", "worker_niceness"):
        monkeypatch.setenv(f"RAY_{name}", "0")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")  # on as many machines as there were before
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}  # noticed: that one is gone
    machines = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": soon})
    try:
        (raylet,) = machines.add_node(num_cpus=1).all_processes["raylet"]
        (tmp_path / "lost").write_text(str(raylet.process.pid))
        yield machines.address
    finally:
        machines.shutdown()


def test_a_lost_worker(tmp_path, cluster):
    undisturbed = train(tmp_path, *OPTIONS, processes=2, name="undisturbed")
    command = [sys.executable, "examples/ray_train.py", "--workers=1:2", f"--storage={tmp_path}", "--", *OPTIONS]
    done = launch(*command, timeout=600, RAY_ADDRESS=cluster)
    run = tmp_path / "adadagrad" / "run"
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"in {run}" in done.stdout and "'val_loss'" in done.stdout
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = [int(row["world_size"]) for row in rows]
    assert sizes == sorted(sizes, reverse=True) and set(sizes) == {1, 2}
    for name in ("step", "samples", "batch_size", "next_batch_size"):
        assert [row[name] for row in rows] == [row[name] for row in undisturbed.rows]
    ours = SimpleNamespace(rows=rows)
    for name in ("train_loss", "val_loss"):
        assert column(ours, name) == pytest.approx(column(undisturbed, name), rel=1e-9)


def test_options_that_are_refused(tmp_path):
    done = launch(sys.executable, "examples/ray_train.py", f"--storage={tmp_path}", "--", "--modell=cnn")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "main.py: error: " in done.stderr and "--model" in done.stderr
