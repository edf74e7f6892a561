"""What users bring: metrics, models and optimizers that keep other things than tensors; where nobody listens."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import main
from checks.conftest import FIXED_CUT, ROOT, Started, run
from launch.signals import Interrupts
from launch.terminals import Unheard
from training.reporter import Reporter

OWN = """
import collections, math
import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset
from data import DataSet

def regression(metric):
    x = torch.randn(160, 4, generator=torch.Generator().manual_seed(0))
    parts = (TensorDataset(part, part.sum(1, keepdim=True)) for part in x.split([128, 32]))
    return DataSet(*parts, loss=lambda out, y: (out - y).square().squeeze(1), num_outputs=1, metrics={"rmse": metric})

numpy_metric = lambda folder: regression(lambda loss: np.float32(np.sqrt(loss)))
tensor_metric = lambda folder: regression(lambda loss: torch.tensor(loss).sqrt())

def linear(shape, n):
    return nn.Linear(4, n)

class Counting(nn.Linear):
    def get_extra_state(self):
        return {"calls": np.int64(3)}

    def set_extra_state(self, state):
        assert state == {"calls": 3}

class Arrays(Counting):
    def get_extra_state(self):
        return np.array([3])

def counting(shape, n):
    return Counting(4, n)

def arrays(shape, n):
    return Arrays(4, n)

class NumPyRate(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        self.param_groups[0]["d"] = np.float64(self.param_groups[0].get("d", 0.01)) * 1.01

class Deque(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["last"] = collections.deque([1.0], maxlen=3)
"""


@pytest.fixture
def own(tmp_path) -> dict:
    (tmp_path / "own.py").write_text(OWN)
    return {"cwd": tmp_path}


def options(tmp_path: Path, **more: str) -> list[str]:
    chosen = {"dataset": "own:numpy_metric", "model": "own:linear", "training_type": "iter", "max_iters": "4"}
    chosen |= {"batch_size": "16", "test": "False", "decay_lr": "False", "eval_interval": "2", "learning_rate": "0.1"}
    words = [f"--{name}={value}" for name, value in (chosen | more).items()]
    return [*words, FIXED_CUT, f"--out_dir={tmp_path}", "--run_name=run"]


@pytest.mark.parametrize(
    "more",
    [
        {"optimizer": "own:NumPyRate", "model": "own:counting"},
        {"dataset": "own:tensor_metric"},
    ],
)
def test_numbers_of_other_libraries_are_saved_as_plain_ones(tmp_path, own, more):
    for steps in ("4", "6"):
        done = run(*options(tmp_path, **more, max_iters=steps), "--resume=auto", **own)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming" in done.stdout
    assert isinstance(json.loads((tmp_path / "run" / "summary.json").read_text())["val_rmse"], float)
    assert torch.load(tmp_path / "run" / "model.pt", weights_only=True)


@pytest.mark.parametrize(
    "more, kind", [({"optimizer": "own:Deque"}, "collections.deque"), ({"model": "own:arrays"}, "numpy.")]
)
def test_what_could_not_be_read_again_is_refused_at_the_first_checkpoint(tmp_path, own, more, kind):
    done = run(*options(tmp_path, **more), **own)
    assert done.returncode == 2 and "cannot be read again" in done.stderr and kind in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_the_end_writes_what_it_can(tmp_path, capsys, monkeypatch):
    def failing(*_):
        raise ValueError("no figures today")

    monkeypatch.setattr("runs.figures.curves", failing)
    monkeypatch.setattr("runs.log.RunLog.save_weights", failing)
    words = ["--model=logistic", "--accelerator=cpu", "--devices=1", "--max_samples=64", "--run_name=run"]
    assert main.main([*words, f"--out_dir={tmp_path}"]) == 1
    told = capsys.readouterr()
    assert "no figures today" in told.err and "run folder" in told.out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def test_the_last_checkpoint_fails_and_the_rest_is_written(tmp_path, capsys, monkeypatch):
    def save(state, file, write=torch.save):
        if "ranks" in state:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(state, file)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr("training.metrics.Validation.is_best", lambda self: False)
    words = ["--model=logistic", "--accelerator=cpu", "--devices=1", "--max_samples=64", "--run_name=run"]
    assert main.main([*words, f"--out_dir={tmp_path}"]) == 1
    assert "could not be written (No space left" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.pt").exists() and (tmp_path / "run" / "summary.json").exists()


def test_output_that_nobody_reads_is_dropped():
    reading, writing = os.pipe()
    os.close(reading)
    for stream in (open(writing, "w"), open("/dev/full", "w")):  # noqa: SIM115
        heard = Unheard(stream)
        for _ in range(3):
            assert heard.write("word\n" * 10000) == 50000
            heard.flush()
        stream.close()  # as the interpreter does at its end


def test_no_streams_at_all(tmp_path):
    """What is opened then must not get their numbers; --help is quick: torch is not imported."""
    program = "import sys; from launch.terminals import show_what_can_be_shown as show; show()\n"
    program += "assert open(sys.argv[1], 'w').fileno() > 2\nprint(1); print(2, file=sys.stderr); sys.stderr.isatty()"
    command = f'exec {sys.executable} -c "{program}" {tmp_path}/file <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", command], cwd=ROOT).returncode == 0


def test_a_terminal_that_goes_away_stops_a_run(tmp_path):
    words = ["--model=logistic", f"--out_dir={tmp_path}", "--run_name=run", FIXED_CUT, "--max_samples=100000000"]
    started = Started(*words, "--dataset=digits", "--batch_size=16", "--eta=1000")
    rows = tmp_path / "run" / "metrics.csv"
    while not (rows.exists() and len(rows.read_text().splitlines()) > 3):
        assert started.ranks[0].is_alive()
        started.ranks[0].join(0.1)
    os.kill(started.ranks[0].pid, signal.SIGHUP)
    done = started.wait()
    assert done.returncode == 75 and "interrupted by SIGHUP" in done.stdout
    assert list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_run_after_the_other_in_a_thread(tmp_path):
    words = ["--model=logistic", "--accelerator=cpu", "--devices=1", "--max_samples=64", f"--out_dir={tmp_path}"]
    statuses = []
    for name, precision in (("a", "64-true"), ("b", "32-true")):
        arguments = [*words, f"--precision={precision}", f"--run_name={name}"]
        thread = threading.Thread(target=lambda arguments=arguments: statuses.append(main.main(arguments)))
        thread.start()
        thread.join()
        assert torch.get_default_dtype() == torch.float32
    assert statuses == [0, 0]
    dtypes = {name: torch.load(tmp_path / name / "model.pt", weights_only=True)["1.weight"].dtype for name in "ab"}
    assert dtypes == {"a": torch.float64, "b": torch.float32}


def test_what_is_said_before_there_is_a_log(monkeypatch):
    reporter, said = Reporter(), []
    reporter.notify("early")
    reporter.load_state_dict({"notices": ["before"], "undecided": ""})  # a run that goes on
    monkeypatch.setattr(reporter, "say", said.append)
    monkeypatch.setattr("runs.log.introduction", lambda *_: "the run")
    reporter.introduce(
        SimpleNamespace(module=torch.nn.Linear(1, 1), fabric=mock.Mock(), config=None, samples_per_epoch=1),
        ["late", "before"],
    )
    reporter.notify("early")
    assert said == ["the run", "early", "late"]
