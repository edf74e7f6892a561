"""Checkpoints: written whole, read safely, kept, found again, and refused where the mathematics would change."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import main
from checks.conftest import FIXED_CUT, ROOT
from launch import environments
from options import command_line
from options.errors import UsageError
from options.schema import Config
from runs import checkpoint

TINY = ["--model=logistic", "--accelerator=cpu", "--devices=1"]
TINY += ["--max_samples=320", "--batch_size=32", "--max_batch_size=32", FIXED_CUT]


def run(out_dir: Path, *options: str) -> int:
    return main.main([*TINY, f"--out_dir={out_dir}", "--run_name=run", *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run with a checkpoint at every step."""
    out_dir = tmp_path_factory.mktemp("finished")
    assert run(out_dir, "--checkpoint_interval=1", "--keep_checkpoints=4") == 0
    return out_dir / "run"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_the_newest_and_the_best_are_kept(tmp_path, capsys):
    # With so high a learning rate the accuracy goes up and down.
    options = ["--eval_interval=2", "--checkpoint_interval=3", "--keep_checkpoints=1", "--max_samples=384"]
    options += ["--optimizer=sgd", "--learning_rate=300", "--decay_lr=False", "--weight_average=0", "--grad_clip=0"]
    assert run(tmp_path, *options) == 0
    accuracy = {
        int(row["step"]): float(row["val_accuracy"])
        for row in _rows(tmp_path / "run" / "metrics.csv")
        if row["val_accuracy"]
    }
    best = max(accuracy, key=accuracy.get)
    assert best != 12
    assert set(checkpoint.steps_of(tmp_path / "run" / "checkpoints")) == {best, 12}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_checkpoint"] == f"step-{best:08}.pt"


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_plain_weights_need_nothing_of_this_program(finished):
    program = f"import torch; print(list(torch.load({str(finished / 'model.pt')!r}, weights_only=True)))"
    done = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == "['1.weight', '1.bias']"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit_of_the_weights(path: Path) -> None:
    content = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["model"]["1.weight"].numpy().tobytes()
    content[content.index(weights) + 1000] ^= 1
    path.write_bytes(content)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["MALICIOUS"],)


def make_malicious(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "more": Malicious()}, path)


DAMAGES = {
    truncate: "is no intact checkpoint (BadZipFile: File is not a zip file)",
    flip_a_bit_of_the_weights: "is no intact checkpoint (archive/data/0 in it is damaged)",
    make_malicious: "holds more than weights and plain values (posix.mkdir): not loaded",
}


@pytest.mark.parametrize("damage, words", DAMAGES.items())
def test_what_is_damaged_is_skipped_for_the_one_before_it(copy, damage, words, capfd, monkeypatch):
    monkeypatch.setenv("MALICIOUS", str(copy / "made by the checkpoint"))
    newest, before = copy / "checkpoints" / "step-00000010.pt", copy / "checkpoints" / "step-00000009.pt"
    damage(newest)
    damaged = newest.read_bytes()
    assert run(copy.parent, "--resume=auto") == 0
    told = capfd.readouterr()
    assert f"warning: {newest} {words}: taking the one before it" in told.err.splitlines()
    assert f"resuming from {before}: step 9" in told.out
    assert not (copy / "made by the checkpoint").exists()
    assert checkpoint.problem_of(newest) == ""  # written anew
    assert newest.with_name(newest.name + ".damaged").read_bytes() == damaged
    damage(newest)
    assert run(copy.parent, f"--resume={newest}") == 2
    assert words in capfd.readouterr().err


def test_where_no_checkpoint_is_whole_nothing_is_started_or_removed(copy, capfd):
    for path in checkpoint.steps_of(copy / "checkpoints").values():
        truncate(path)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert run(copy.parent, "--resume=auto") == 2
    told = capfd.readouterr().err
    assert told.count("is no intact checkpoint") == 4 and "taking" not in told and len(told.splitlines()) == 1
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_what_cannot_be_read_is_not_taken_for_damaged(copy, capfd):
    newest = copy / "checkpoints" / "step-00000010.pt"
    newest.unlink()
    newest.mkdir()  # reading it is an error of the system's, as from a failing disk
    assert run(copy.parent, "--resume=auto") == 2
    assert f"{newest} cannot be read (Is a directory" in capfd.readouterr().err
    assert run(copy.parent, f"--resume={copy / 'model.pt'}") == 2
    assert "model.pt is no checkpoint of this program" in capfd.readouterr().err


def test_writing_fails_without_a_trace(tmp_path):
    path = tmp_path / "step-00000001.pt"
    path.write_text("the one before")
    with pytest.raises(OSError), checkpoint.replacing(path) as file:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [(path.name, "the one before")]


def test_left_overs_go(copy):
    (copy / "checkpoints" / "step-00000011.pt.tmp").write_text("killed here")
    assert run(copy.parent, "--resume=auto") == 0
    assert not list((copy / "checkpoints").glob("*.tmp"))


def test_auto_starts_where_there_is_nothing(tmp_path, capsys):
    assert run(tmp_path, "--resume=auto") == 0
    assert "resuming" not in capsys.readouterr().out
    assert run(tmp_path) == 2 and "exists already" in capsys.readouterr().err
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()  # killed before the first one
    assert run(tmp_path, "--resume=auto") == 0
    assert len(_rows(tmp_path / "run" / "metrics.csv")) == 10


def test_a_branch_in_a_new_folder(copy, tmp_path):
    step = copy / "checkpoints" / "step-00000008.pt"
    assert main.main([*TINY, f"--out_dir={tmp_path}", "--run_name=branch", f"--resume={step}"]) == 0
    assert [row["step"] for row in _rows(tmp_path / "branch" / "metrics.csv")] == [str(n) for n in range(1, 11)]
    assert (copy / "checkpoints" / "step-00000010.pt").exists()


def test_a_branch_does_not_name_a_best_checkpoint_of_another_folder(copy, tmp_path):
    """The last step before it was the best; the learning rate is 0 since, so that none after it is."""
    options = [f"--out_dir={tmp_path}", "--run_name=branch", f"--resume={copy / 'checkpoints' / 'step-00000010.pt'}"]
    assert main.main([*TINY, *options, "--max_samples=384"]) == 0
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (copy, tmp_path / "branch")]
    assert [own["best_checkpoint"] for own in summaries] == ["step-00000010.pt", None]
    assert summaries[0]["best_val_accuracy"] == summaries[1]["best_val_accuracy"]


def test_a_folder_by_another_name_and_rows_that_are_lost(copy, capfd):
    (copy / "metrics.csv").write_text("")
    step = copy / "checkpoints" / "step-00000008.pt"
    assert run(copy.parent / "run" / "..", f"--resume={step}") == 0
    told = capfd.readouterr()
    assert "step 8" in told.out and "learning rate is 0" not in told.out
    assert told.err.count("warning") == 1 and "metrics.csv is shorter than at the checkpoint" in told.err


def test_what_a_full_disk_leaves(copy, tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "the checkpoints written before are intact" in str(checkpoint.unwritable(copy / "metrics.csv", full))
    assert "nothing was saved yet" in str(checkpoint.unwritable(tmp_path / "metrics.csv", full))


def test_the_command_that_goes_on_when_the_launcher_has_died(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # but the parent is no launcher of this process
    monkeypatch.setattr(sys, "orig_argv", ["python", "main.py", "--seed=3"])
    command = environments.resume_command(Path("out"), "run")
    assert command == "python main.py --seed=3 --out_dir=out --run_name=run --resume=auto"


@pytest.mark.parametrize(
    "options, words",
    [
        (["--batch_size=16", "--eta=0.3"], ["--batch_size=16 was 32", "--eta=0.3 was 1.0"]),
        (["--max_samples=100"], ["--max_samples=100 was 320"]),
        (["--resume=nowhere"], ["--resume=nowhere has no checkpoint"]),
    ],
)
def test_refused(copy, options, words, capsys):
    before = {path.name: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert run(copy.parent, "--resume=auto", *options) == 2
    refused = capsys.readouterr().err
    assert all(word in refused for word in words) and len(refused.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_auto_needs_a_name(tmp_path, capsys):
    assert main.main([*TINY, f"--out_dir={tmp_path}", "--resume=auto"]) == 2
    assert "--resume=auto needs --run_name=NAME" in capsys.readouterr().err


@pytest.mark.parametrize("resume", ["auto", "folder", "checkpoint"])
def test_a_folder_in_use_is_refused_before_it_is_read(copy, capsys, resume):
    """Whoever writes there takes checkpoints away that another one has chosen to read."""
    for path in (copy / "checkpoints").iterdir():
        path.write_bytes(b"not whole")
    hold = (
        "import sys, pathlib; from runs.lock import locked; l = locked(pathlib.Path(sys.argv[1])); print(1, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold + "; input()", copy], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        writer.stdout.readline()
        where = {"auto": "auto", "folder": copy, "checkpoint": path}[resume]
        named = ["--run_name=run"] if resume == "auto" else []
        assert main.main([*TINY, f"--out_dir={copy.parent}", *named, f"--resume={where}"]) == 2
        assert f"another process (pid {writer.pid} on " in capsys.readouterr().err
        writer.communicate(b"\n")


def test_what_may_differ(copy, capsys):
    """All that is no mathematics; a longer run keeps the learning rate's schedule of the shorter one."""
    assert set(checkpoint.FREE) | set(checkpoint.GROWING) <= set(Config.__dataclass_fields__)
    path = copy / "checkpoints" / "step-00000010.pt"
    options = command_line.parse([*TINY, "--max_samples=640", "--num_workers=3", "--log_interval=2", "--resume=auto"])
    options = checkpoint.continued(replace(options, run_name="run", out_dir=copy.parent), path, ("cpu", 1))
    assert options.lr_decay_samples == 320
    assert run(copy.parent, "--max_samples=640", "--log_interval=2", "--eval_interval=3", "--resume=auto") == 0
    assert "the learning rate is 0 from sample 320 on" in capsys.readouterr().out
    assert yaml.safe_load((copy / "config.yaml").read_text())["lr_decay_samples"] == 320
    rows = {row["step"]: row for row in _rows(copy / "metrics.csv")[10:]}
    assert {"12", "14", "15", "16", "18", "20"} <= set(rows)
    assert all(rows[step]["variance"] for step in {"11", "13", "17", "19"} & set(rows))  # measured steps have theirs
    with pytest.raises(UsageError, match="--lr_decay_samples=640 was 320"):
        checkpoint.refuse_differences(replace(options, lr_decay_samples=640, max_batch_size=32), path)


def test_on_other_hardware_the_knee_is_measured_anew(copy):
    path = copy / "checkpoints" / "step-00000010.pt"
    options, measured = command_line.parse(TINY), checkpoint.options_of(path)["knee"]
    assert measured >= 1
    for hardware, knee in {("cpu", 1): measured, ("cuda", 1): None, ("cpu", 2): None}.items():
        assert checkpoint.continued(options, path, hardware).knee == knee
        assert checkpoint.continued(replace(options, knee=7.0), path, hardware).knee == 7.0
    torch.save(torch.load(path, weights_only=True) | {"hardware": ["NVIDIA A100", 1]}, path)
    for name, knee in {"NVIDIA A100": measured, "NVIDIA H100": None, "cpu": None}.items():
        assert checkpoint.continued(options, path, (name, 1)).knee == knee


def test_a_second_interrupt_ends_at_once():
    """Also while the main thread is inside a call that never returns; copies of the first one do not count."""
    program = (
        "import ctypes; from launch.signals import Interrupts\n"
        "mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock\n"
        "with Interrupts():\n    lock(mutex); print('ready', flush=True); lock(mutex)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.poll() is None
    time.sleep(0.8)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
