"""What the test modules share: running the program as a user does, in processes of their own.

A process that imports the program takes some 5 s before it does anything. `train`, `run` and `Started` fork theirs off
a server that has imported it once, and go through main.py from its first line. Tests of command lines and launchers
take `launch`.
"""

import csv
import functools
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from options import command_line, errors
from runs import figures
from training import tuner

errors.GRACE = 0.0  # no launcher ends these processes
ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes to come
torch.set_num_threads(1)
command_line.build_parser = functools.cache(command_line.build_parser)  # a thousand times the same one
command_line.build_parser()  # here, so that forked processes have it
tuner.ROUNDS = (1, 1)  # a knee that is measured need not be right here
draw_curves, figures.curves = figures.curves, lambda folder: None
"""It takes longer than a short run itself: a test of the figure puts it back, and real command lines draw it."""
FIXED_CUT = "--max_micro_batch_size=4096"
"""By default the size is measured: it differs from run to run, and sums with it, in the last digits."""


def launch(*command: str, timeout: float = 300, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a command of the virtual environment's Python; output is captured."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env)


IMPORTED_LATER = ("sklearn.datasets", "sklearn.model_selection", "scipy.special", "PIL.Image")
IMPORTED_LATER += ("torch.utils.tensorboard", "tensorboard.plugins.hparams.metadata")
IMPORTED_LATER += ("tensorboard.plugins.custom_scalar.summary", "fsspec.implementations.local")
"""What the program imports where it needs it."""


@functools.cache
def forks() -> multiprocessing.context.BaseContext:
    """Makes processes that have imported the program already, off a server that has done nothing else: no thread, no
    kernel, no backward pass, which a forked process would not bear."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["checks.conftest", "main", *IMPORTED_LATER])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # whatever the folder is in which the tests are at the moment
        multiprocessing.forkserver.ensure_running()
    return context


def _as_main(
    arguments: Sequence[str], environment: dict[str, str], cwd: Path, outputs: Sequence[str], clocks: dict[str, float]
) -> None:
    """In a process of `forks`: what `python main.py` does."""
    multiprocessing.set_start_method(None, force=True)  # a data loader's workers are forked, not off the server
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for stream, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    sys.path[:0] = [str(ROOT), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [str(ROOT / "main.py"), *arguments]
    sys.orig_argv = [sys.executable, *sys.argv]
    rank_zero_only.rank = int(environment.get("RANK", 0))  # Lightning looks when it is imported
    for name, seconds in clocks.items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, seconds)
    runpy.run_path(sys.argv[0], run_name="__main__")


begun: list[multiprocessing.Process | subprocess.Popen] = []
"""Processes to be ended with the test, where it has failed before it has come to that; of Popen, the whole session."""


@pytest.fixture(autouse=True)
def no_variables_stay():
    """A strategy of several processes that starts in this one writes a launcher's variables; who comes after it, in
    this process or in one that it starts, is of no group."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def nothing_goes_on():
    yield
    while begun:
        process = begun.pop()
        if isinstance(process, subprocess.Popen):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        elif process.is_alive():
            process.kill()
            process.join()


class Started:
    """main.py on these arguments on the CPU, begun; of several processes, which find each other as torchrun's do.

    Args:
        clocks: other values for constants of the program that are waited for: dotted name → seconds.
        environment: variables beside those of this process.

    Attributes:
        ranks: its processes.
    """

    def __init__(
        self,
        *arguments: str,
        processes: int = 1,
        cwd: Path = ROOT,
        clocks: dict[str, float] | None = None,
        **environment: str,
    ):
        words = ("--accelerator=cpu", f"--devices={processes}", *map(str, arguments))
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.outputs = [tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self.outputs]
        self.ranks = [
            forks().Process(target=_as_main, args=(words, env | own, cwd, names, clocks or {}))
            for own in (_as_of_torchrun(processes) if processes > 1 else [{}])
        ]
        for process in self.ranks:
            process.start()
        begun.extend(self.ranks)

    def says(self, words: str, timeout: float = 120) -> str:
        """Wait for a line on standard error that has these words; gives it."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            for line in Path(self.outputs[1].name).read_text(encoding="utf-8").splitlines():
                if words in line:
                    return line
            time.sleep(0.05)
        raise TimeoutError(words)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """For its end; the status is the first one that is not 0."""
        until = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, until - time.monotonic()))
        late = [process for process in self.ranks if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        status = next((process.exitcode for process in self.ranks if process.exitcode), 0)
        stdout, stderr = (file.read() for file in self.outputs)
        assert not late, f"{len(late)} of {len(self.ranks)} have not ended within {timeout} s: {stdout}{stderr}"
        return subprocess.CompletedProcess("main.py", status, stdout, stderr)


def _as_of_torchrun(processes: int) -> list[dict[str, str]]:
    """Every rank's variables."""
    size, port = str(processes), str(unused_port())
    common = {"TORCHELASTIC_RUN_ID": "checks", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(processes)]


def run(*arguments: str, timeout: float = 300, **how) -> subprocess.CompletedProcess:
    """main.py on these arguments from its begin to its end: see `Started`."""
    return Started(*arguments, **how).wait(timeout)


def train(out_dir: Path, *arguments: str, processes: int = 1, name: str = "run", **environment: str) -> SimpleNamespace:
    """Run main.py to its end; gives its rows, summary, folder and output."""
    options = [f"--out_dir={out_dir}", f"--run_name={name}", FIXED_CUT, *arguments]
    done = run(*options, processes=processes, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = out_dir / name
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((folder / "summary.json").read_text())
    return SimpleNamespace(rows=rows, summary=summary, folder=folder, stdout=done.stdout, stderr=done.stderr)


def process_of_rank(rank: int, out_dir: Path, variable: str = "LOCAL_RANK") -> int:
    """The process on this machine that trains as this rank of the run in `out_dir`; `variable` is the launcher's."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
            environment = dict(e.partition("=")[::2] for e in (process / "environ").read_text().split("\0"))
        except OSError:  # it has ended meanwhile, or is not ours
            continue
        trains = any(word.endswith("main.py") for word in words[:3]) and f"--out_dir={out_dir}" in words
        if trains and int(environment.get(variable, 0)) == rank:
            return int(process.name)
    raise ProcessLookupError(rank)


def column(result: SimpleNamespace, name: str) -> list[float]:
    return [float(row[name]) for row in result.rows if row[name]]


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """Real MNIST, where ADADAGRAD_DATA names a folder that has it."""
    folder = os.environ.get("ADADAGRAD_DATA", "")
    if not folder or not (Path(folder) / "MNIST" / "raw").is_dir():
        pytest.skip("set ADADAGRAD_DATA to a folder with MNIST/raw to run this")
    return Path(folder)


@pytest.fixture
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    return unused_port()
