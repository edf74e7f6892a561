"""status.json, which other programs read while a run goes on, and what is done with it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adadagrad.control import CRITICAL
from checks.conftest import ROOT, column, train
from options import command_line
from runs.status import FILE, Status, by_devices

TINY = ("--model=logistic", "--max_samples=4000", "--decay_lr=False", "--optimizer=sgd", "--learning_rate=0.1")


def test_says_where_the_run_stands(tmp_path):
    run = train(tmp_path, *TINY, "--knee=100")
    status = json.loads((run.folder / "status.json").read_text())
    last = run.rows[-1]
    for name in ("step", "samples", "world_size"):
        assert status[name] == int(last[name])
    assert (status["batch_size"], status["samples_left"], status["knee"]) == (int(last["next_batch_size"]), 0, 100)
    assert status["noise_scale"] == column(run, "noise_scale")[-1]
    critical, b = CRITICAL * status["noise_scale"], int(last["batch_size"])
    worth = b * critical / (critical + b)
    assert status["progress_per_second"] == pytest.approx(worth / float(last["step_time"]))
    speeds = [status["progress_per_second_by_devices"][str(2**k)] for k in range(4)]
    assert speeds == sorted(speeds) and all(more <= 2 * less for less, more in zip(speeds, speeds[1:]))
    assert not list(run.folder.glob("status*.tmp"))


def test_whoever_reads_it_meets_a_whole_one(tmp_path, monkeypatch):
    """The former one, until the new one has all of its words."""
    run = train(tmp_path, *TINY, "--knee=100")
    path, config = run.folder / FILE, command_line.parse([*TINY, "--knee=100"])
    row = {"step": 7, "samples": 9, "next_batch_size": 4, "batch_size": 4, "step_time": 0.1, "world_size": 1}
    before, seen = path.read_text(), []

    def replace(source, target, replace=os.replace):
        seen.append((path.read_text(), json.loads(Path(source).read_text())["step"]))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    Status(run.folder, config).update(row | {"samples_per_second": 40.0})
    assert seen == [(before, 7)] and json.loads(path.read_text())["step"] == 7


def test_what_is_not_known_is_null(tmp_path):
    run = train(tmp_path, *TINY, "--test=False", "--training_type=iter", "--max_iters=5")
    status = json.loads((run.folder / "status.json").read_text())
    for name in ("noise_scale", "knee", "progress_per_second", "progress_per_second_by_devices", "samples_left"):
        assert status[name] is None
    assert status["steps_left"] == 0 and status["samples_per_second"] > 0


def test_other_numbers_of_devices():
    """Against the least over all batches, found by trying them all."""
    fixed, per_sample, critical = 3e-3, 2e-5, 400.0
    found = by_devices(fixed + per_sample * 64, 64, fixed / per_sample, critical, 2, 100_000)
    for devices, speed in found.items():
        each = per_sample * 2 / int(devices)
        rates = [b / (1 + b / critical) / (fixed + each * b) for b in range(int(devices), 20_000)]
        assert speed == pytest.approx(max(rates), rel=1e-6), devices
    assert set(by_devices(1.0, 8, 10.0, 50.0, 1, max_batch_size=6)) == {"1", "2", "4"}


def test_the_policy_of_the_documentation(tmp_path):
    """Twelve devices for a run that gains by each, one that gains by four at most, and one that knows nothing."""
    (policy,) = re.findall(r"```python\n(# policy\.py.*?)```", (ROOT / "docs" / "running.md").read_text(), re.S)
    (tmp_path / "policy.py").write_text(policy)
    speeds = {
        "scales": {str(2**k): 2.0**k for k in range(6)},
        "little": {"1": 1.0, "2": 1.5, "4": 1.6, "8": 1.6},
        "unknown": None,
    }
    for name, known in speeds.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(json.dumps({"progress_per_second_by_devices": known}))
    done = subprocess.run(
        [sys.executable, "policy.py", "12", *speeds], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"scales": 8, "little": 2, "unknown": 1}
