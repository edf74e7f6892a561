"""What a run says where it fails without anybody having foreseen it, and while it takes its time."""

import re

import pytest

from checks.conftest import run

OWN = """
import os
import time
import torch
import data

class Net(torch.nn.Module):
    def __init__(self, image_shape, num_classes):
        super().__init__()
        self.layer = torch.nn.Linear(64, num_classes)

    def forward(self, x):
        if os.path.exists("out/run/metrics.csv"):  # training has begun
            raise ZeroDivisionError("of my own: ηθν")
        return self.layer(x.flatten(1))

def slowly(data_dir):
    time.sleep(1.5)
    return data.digits(data_dir)
"""
OPTIONS = ["--accelerator=cpu", "--batch_size=32", "--max_samples=400", "--test=False", "--run_name=run"]


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


@pytest.mark.parametrize("processes", [1, 2])
def test_unforeseen_errors(own, processes):
    """The traceback is in the run's folder, on standard error one line with the way there. On two processes each tells
    of its own, as far as it comes to that before the other one has ended it."""
    options = [*OPTIONS, "--model=own:Net", f"--batch_size={32 * processes}"]
    done = run(*options, processes=processes, cwd=own)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "ZeroDivisionError" in line]
    assert 1 <= len(lines) <= processes
    path = own / "out" / "run" / "error.log"
    found = re.match(
        r"main\.py: error: (rank \d on .*: )?see the traceback in (.*): ZeroDivisionError: of my own: ηθν", lines[0]
    )
    assert (own / found[2]).samefile(path)
    kept = path.read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in kept and 'own.py", line 14, in forward' in kept
    assert "--model=own:Net" in kept.splitlines()[0]


def test_before_there_is_a_folder(own):
    (own / "own.py").write_text(
        OWN + "\nNet.__init__ = lambda self, *a: torch.nn.Module.__init__(self)\nNet.named_parameters = 3\n"
    )
    done = run(*OPTIONS, "--model=own:Net", cwd=own)
    assert done.returncode in (1, 2) and re.match(r"main\.py: error: ", done.stderr.splitlines()[-1])
    assert not (own / "out").exists()


def test_long_work_is_named(own):
    options = [*OPTIONS, "--dataset=own:slowly", "--model=logistic"]
    done = run(*options, cwd=own, clocks={"launch.processes.LONG": 0.5})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("main.py: reading own:slowly in data …\n") == 1
    done = run(*OPTIONS, "--model=logistic", "--run_name=quick", cwd=own, clocks={"launch.processes.LONG": 60.0})
    assert done.returncode == 0 and "reading" not in done.stderr
