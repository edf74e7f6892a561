"""Output in encodings that do not have every letter: the programs say what they can and end as they should."""

import codecs
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checks.conftest import ROOT
from launch.terminals import show_what_can_be_shown, stand_ins

NARROW = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "ascii:strict": {"PYTHONIOENCODING": "ascii:strict"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def run(command: list[str], cwd: Path, encoding: str) -> tuple[int, str]:
    """Status and output, in a pipe as in a batch system's log."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONIOENCODING", "LC_ALL")}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=cwd, env={**environment, **NARROW[encoding]}, capture_output=True)
    narrow = "latin-1" if encoding == "latin-1" else "ascii"
    return done.returncode, (done.stdout + done.stderr).decode(narrow)  # fails where a letter slipped through


def test_letters_by_name():
    codecs.register_error("stand_ins", stand_ins)
    assert "η = 0.1, 2 × cpu … Größe 猫".encode("ascii", "stand_ins") == b"eta = 0.1, 2 x cpu ... Gro?e ?"
    assert "2 × Größe, ν".encode("latin-1", "stand_ins") == b"2 \xd7 Gr\xf6\xdfe, nu"
    assert "no\udcfftext".encode("utf-8", "stand_ins") == b"no\xfftext"  # a file's name as it is on the disk


@pytest.mark.parametrize("encoding", NARROW)
def test_help_and_experiments(tmp_path, encoding):
    status, text = run([sys.executable, str(ROOT / "main.py"), "--help"], tmp_path, encoding)
    assert status == 0 and " eta of the norm test" in text
    status, text = run(["bash", str(ROOT / "expt.sh")], tmp_path, encoding)
    assert status == 0 and "norm test, eta = 0.1" in text and "[options...]" in text
    status, text = run(
        [sys.executable, str(ROOT / "main.py"), "--stagewise_ramp_up=True", "--test=False"], tmp_path, encoding
    )
    assert status == 2 and "[SIZE,SIZE,...]" in text and text.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii:strict"])
def test_a_run_and_its_report(tmp_path, encoding):
    """In a folder with a name of its own, too."""
    (folder := tmp_path / "Maße").mkdir()
    options = [
        "--accelerator=cpu",
        "--batch_size=16",
        "--max_samples=60",
        "--run_name=a",
        "--model=logistic",
        "--eta=1",
    ]
    status, text = run([sys.executable, str(ROOT / "main.py"), *options], folder, encoding)
    assert status == 0 and "(norm test, eta = 1), adam, 1 x cpu" in text
    options = ["out", "--format=latex"]
    status, text = run([sys.executable, str(ROOT / "report.py"), *options], folder, encoding)
    assert status == 0 and "norm test, " in text


def test_files_are_utf8_whatever_the_terminal_is(tmp_path):
    command = [sys.executable, "-m", "options.command_line"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **NARROW["C"]}, capture_output=True)
    assert done.stdout == (ROOT / "docs" / "options.md").read_bytes()


def test_letters_that_python_could_not_read(tmp_path):
    command, environment = [sys.executable, str(ROOT / "main.py"), "--out_dir=Maße"], {**os.environ, **NARROW["C"]}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 2 and b"set PYTHONUTF8=1" in done.stderr and not list(tmp_path.iterdir())


def test_streams_of_a_notebook(monkeypatch):
    monkeypatch.setattr(sys, "stdout", object())
    show_what_can_be_shown()
