"""What the test modules share: running the program as a user does, in processes of their own."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
FIXED_CUT = "--max_micro_batch_size=4096"
"""By default the size is measured: it differs from run to run, and sums with it, in the last digits."""


def launch(*command: str, timeout: float = 300, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a command of the virtual environment's Python; output is captured."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env)


def train(out_dir: Path, *arguments: str, processes: int = 1, name: str = "run", **environment: str) -> SimpleNamespace:
    """Run main.py to its end; gives its rows, summary, folder and output."""
    command = [sys.executable, "main.py", f"--out_dir={out_dir}", f"--run_name={name}"]
    command += ["--accelerator=cpu", f"--devices={processes}", FIXED_CUT, *arguments]
    done = launch(*command, **environment)
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
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
