"""What users bring: metrics, models and optimizers that keep other things than tensors; where nobody listens."""

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import batches
import main
from adadagrad.gradients.isolation import random_states, set_random_states
from batches.augment import Normalise
from checks.conftest import FIXED_CUT, ROOT, Started, run
from data import DataSet
from launch import processes
from launch.signals import Interrupts
from launch.terminals import Unheard
from options.effective import refuse_unequal_numbers
from options.errors import UsageError
from options.schema import Config
from runs.lock import locked
from training import tuner
from training.components import Components, draw_by_rank
from training.reporter import Reporter
from training.state import State

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

class Unpicklable(Counting):
    def get_extra_state(self):
        return {"calls": 3, "of": lambda: 3}

class Raising(Counting):
    def get_extra_state(self):
        raise AttributeError("nothing was counted")

def unpicklable(shape, n):
    return Unpicklable(4, n)

def raising(shape, n):
    return Raising(4, n)

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


@pytest.mark.parametrize("model, words", [("unpicklable", "local object"), ("raising", "nothing was counted")])
def test_a_state_that_cannot_be_had_is_refused_in_a_line(tmp_path, own, model, words):
    done = run(*options(tmp_path, model=f"own:{model}"), **own)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "get_extra_state() of --model" in done.stderr
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


@pytest.mark.skipif(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="under nohup runs ignore SIGHUP, too")
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
    monkeypatch.setattr("runs.texts.introduction", lambda *_: "the run")
    reporter.introduce(
        SimpleNamespace(module=torch.nn.Linear(1, 1), fabric=mock.Mock(), config=None, samples_per_epoch=1),
        ["late", "before"],
    )
    reporter.notify("early")
    assert said == ["the run", "early", "late"]


def test_a_sample_that_is_no_number_is_named(tmp_path, own):
    (tmp_path / "bad.py").write_text(
        OWN
        + "def bad(folder):\n    found = regression(lambda loss: loss)\n    found.train.tensors[0][77, 2] = math.nan\n"
        "    return found\n"
    )
    words = options(tmp_path, dataset="bad:bad", max_iters="40", eval_interval="40")
    done = run(*words, "--log_interval=20", **own)
    assert done.returncode == 3 and "sample 77 of the training set has NaN or infinite numbers" in done.stdout


def test_a_rate_that_is_too_large_is_not_blamed_on_the_data(tmp_path, own):
    done = run(*options(tmp_path, learning_rate="1e30", optimizer="sgd", max_iters="40"), **own)
    assert done.returncode == 3 and "lower --learning_rate" in done.stdout


class Turns:
    """Ranks of two nodes with a disk each."""

    def __init__(self, local_rank: int, first: bool):
        self.local_rank, self.is_global_zero, self.world_size = local_rank, first, 1


@pytest.mark.parametrize("local_rank, first, prepares", [(0, True, 1), (0, False, 1), (1, False, 0)])
def test_data_are_prepared_once_on_every_node(monkeypatch, local_rank, first, prepares):
    class Enough(Exception):
        pass

    prepared = []
    monkeypatch.setattr("data.prepare", lambda *_: prepared.append(1))
    monkeypatch.setattr("data.load", mock.Mock(side_effect=Enough))
    monkeypatch.setattr("runs.checkpoint.resumption", lambda fabric, config: (config, None))
    with pytest.raises(Enough):
        Components._read_data(SimpleNamespace(fabric=Turns(local_rank, first)), Config())
    assert len(prepared) == prepares


def test_the_best_checkpoint_is_one_that_is_there(tmp_path):
    state = SimpleNamespace(
        controller=mock.Mock(samples=1, steps=1, findings=dict),
        best_step=4,
        checkpoints=mock.Mock(path=lambda step: tmp_path / f"{step}.pt"),
        validation=mock.Mock(results=dict),
        fabric=mock.Mock(),
    )
    assert State.results(state)["best_checkpoint"] is None
    (tmp_path / "4.pt").touch()
    assert State.results(state)["best_checkpoint"] == "4.pt"


@pytest.mark.parametrize("number, works", [(errno.EPERM, False), (errno.ENOLCK, False), (errno.EACCES, True)])
def test_locks_where_there_are_none(tmp_path, monkeypatch, number, works):
    monkeypatch.setattr("fcntl.lockf", mock.Mock(side_effect=OSError(number, os.strerror(number))))
    if works:
        with pytest.raises(UsageError, match="another process"):
            locked(tmp_path)
    else:
        assert locked(tmp_path) is None


def test_outputs_without_a_tensor_somewhere():
    parts = SimpleNamespace(loss=lambda outputs, targets: outputs["logits"] - targets)
    outputs = {"logits": torch.ones(2), "cache": None, "layers": 3}
    assert Components.mean_loss(parts, outputs, torch.zeros(2)) == 1


def test_ranks_draw_other_numbers_whoever_draws():
    outer = random_states(torch.device("cpu"))
    drawn = []
    for rank in (0, 1):
        draw_by_rank(1 + rank)
        drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
    set_random_states(outer, torch.device("cpu"))
    assert all(a != b for a, b in zip(*drawn))


def test_pixels_are_normalised_before_they_are_rounded():
    images = SimpleNamespace(mean=(0.4914,), std=(0.2470,))
    pixels = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    exact = Normalise(images, torch.device("cpu"), torch.float64)(pixels)
    rounded = Normalise(images, torch.device("cpu"), torch.bfloat16)(pixels)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, exact.bfloat16())


def test_as_many_micro_batches_on_every_rank():
    synchronised = torch.nn.Sequential(torch.nn.SyncBatchNorm(1))
    for least in (1, 2):
        too_small = 2 * least - 1
        with pytest.raises(UsageError, match="SyncBatchNorm needs as many"):
            refuse_unequal_numbers(Config(max_micro_batch_size=too_small), synchronised, least)
        refuse_unequal_numbers(Config(max_micro_batch_size=too_small + 1), synchronised, least)
        for size in range(2 * least, 80):
            plan = batches.cut(0, size, 2, too_small + 1, 1, least, even=True)
            assert len(plan.micro_batches(0)) == len(plan.micro_batches(1))
    refuse_unequal_numbers(Config(), synchronised, 2)


class FullDevice:
    """Components on a device that has room for seven samples."""

    samples_per_epoch, fabric = 100, SimpleNamespace(device=torch.device("cpu"), world_size=1)

    def __init__(self):
        self.stream = mock.Mock(read=lambda positions: (self.made(len(positions)),) * 2)

    def made(self, count: int) -> torch.Tensor:
        if count > 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(count)


def test_out_of_memory_where_the_tuner_makes_its_samples():
    assert math.isinf(tuner._slowest(FullDevice(), lambda *_: None, 8))
    assert tuner._slowest(FullDevice(), lambda inputs, targets: inputs + targets, 7) < 10


@pytest.mark.parametrize("available, found", [(False, "cpu"), (True, "cuda")])
def test_auto_is_no_accelerator_without_float64(monkeypatch, available, found):
    class Enough(Exception):
        pass

    asked = mock.Mock(side_effect=Enough)
    monkeypatch.setattr("launch.processes.Fabric", asked)
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    with pytest.raises(Enough):
        processes.start_fabric(Config(devices=1))
    assert asked.call_args.kwargs["accelerator"] == found


class Drawing(torch.utils.data.Dataset):
    """Draws by generators of its own, and reads a file that it has opened."""

    def __init__(self, path: Path):
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.numpy = np.random.default_rng(0)
        self.transforms = [SimpleNamespace(own=random.Random(0)), {"torch": torch.Generator()}]

    def __len__(self) -> int:
        return 256

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.file.seek(4 * i)
        time.sleep(0.0005)
        read = int.from_bytes(self.file.read(4), "little")
        draws = [self.numpy.random(), self.transforms[0].own.random()]
        draws.append(torch.rand((), generator=self.transforms[1]["torch"], dtype=torch.float64).item())
        return torch.tensor(draws), torch.tensor([float(read)])


def test_generators_and_files_of_a_data_set(tmp_path):
    """The same by worker processes as without; no two samples draw alike, and none is another one's record."""
    (tmp_path / "records").write_bytes(b"".join(i.to_bytes(4, "little") for i in range(256)))
    samples = Drawing(tmp_path / "records")
    whole = DataSet(samples, samples, loss=lambda outputs, targets: outputs, num_outputs=1)
    taken = []
    for workers in (0, 2):
        stream = batches.build(whole, 0, False, torch.device("cpu"), torch.float64, workers)
        taken.append(next(iter(stream.take([range(256)]))))
    (draws, records), (of_workers, also) = taken
    assert torch.equal(draws, of_workers) and len(draws.unique()) == 3 * 256
    assert torch.equal(records, also) and records.flatten().tolist() == list(range(256))
