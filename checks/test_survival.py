"""Runs that are interrupted, killed, starved of disk or memory, on one process and on two, by every launcher."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from checks import fault_drill
from checks.conftest import FIXED_CUT, ROOT, Started, begun, launch, process_of_rank, run, train
from runs import checkpoint

BIN = Path(sys.executable).parent
NETWORK = ["--dataset=checks.fault_drill:augmented_digits", "--model=checks.fault_drill:Net"]
ENDLESS = ["--accelerator=cpu", "--max_samples=9000000", "--batch_size=32", "--max_batch_size=32", "--run_name=run"]
ENDLESS += [FIXED_CUT]
WORKERS = ["--dataset=checks.fault_drill:streamed_digits", "--num_workers=2"]
LAUNCHERS = {  # PORT: one of their own, as the tests run beside each other
    "python": [sys.executable, "main.py", "--devices=2"],
    "fabric": [BIN / "fabric", "run", "main.py", "--main-port=PORT", "--devices=2"],
}


def begin(launcher: str, port: int, *options: str) -> subprocess.Popen:
    command = [str(word).replace("PORT", str(port)) for word in LAUNCHERS[launcher]] + list(options)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    begun.append(subprocess.Popen(command, **output, cwd=ROOT, env=env, start_new_session=True))
    return begun[-1]


def wait_for_rows(folder: Path, rows: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if (folder / "metrics.csv").exists() and (folder / "metrics.csv").read_text().count("\n") > rows:
            return
        time.sleep(0.05)
    raise TimeoutError


def processes_of(out_dir: Path) -> list[str]:
    return subprocess.run(["pgrep", "-f", f"out_dir={out_dir} "], capture_output=True, text=True).stdout.split()


@pytest.mark.long
def test_drill():
    """Three kills on one process: see fault_drill."""
    done = launch(sys.executable, "-m", "checks.fault_drill", "--rounds=3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 rounds equal" in done.stdout and "while saving" in done.stdout


@pytest.mark.long
def test_the_default_goes_on_after_a_kill_and_its_config_repeats_it(tmp_path):
    """What it has measured of this machine is measured once, and stands in config.yaml."""
    options = [*NETWORK, "--max_samples=3000", "--checkpoint_interval=4", "--resume=auto", f"--out_dir={tmp_path}"]
    first = Started(*options, "--run_name=killed")
    wait_for_rows(tmp_path / "killed", 6)
    first.ranks[0].kill()
    assert first.wait().returncode == -signal.SIGKILL
    done = run(*options, "--run_name=killed")
    assert done.returncode == 0 and "resuming" in done.stdout, done.stdout + done.stderr
    again = run(f"--config={tmp_path / 'killed' / 'config.yaml'}", "--run_name=again", f"--out_dir={tmp_path}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert fault_drill.differences(tmp_path / "again", tmp_path / "killed") == []
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert summary["final_batch_size"] > 16 and not summary["measured_options"]


SOURCES = {
    "in memory": ["--max_samples=8000"],
    "streamed": ["--max_samples=8000", "--dataset=checks.fault_drill:streamed_digits", "--num_workers=1"],
}


@pytest.mark.long
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_two_processes_stopped_on_one_and_resumed(tmp_path, source):
    """SIGUSR1 on rank 1; the printed command, typed or not, goes on; all is as in the run that was never stopped."""
    options = [*NETWORK, *fault_drill.TESTS["ip+orth"], "--batch_size=24", "--max_batch_size=96", "--log_interval=3"]
    options += [*source, "--eval_interval=11", FIXED_CUT]
    whole = train(tmp_path, *options, processes=2, name="whole")
    program = Started(*options, f"--out_dir={tmp_path}", "--run_name=run", processes=2)
    wait_for_rows(tmp_path / "run", 2)
    os.kill(program.ranks[1].pid, signal.SIGUSR1)
    stopped = program.wait(60)
    assert stopped.returncode == 85, stopped.stdout + stopped.stderr
    interrupted = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert interrupted["status"] == "interrupted" and interrupted["steps"] < whole.summary["steps"]
    command = shlex.split(re.search(r"interrupted by SIGUSR1; go on with:\n  (.*)\n", stopped.stdout)[1])
    done = launch(*command) if source is SOURCES["in memory"] else run(*command[2:], processes=2)
    assert done.returncode == 0 and f"step {interrupted['steps']:,}," in done.stdout, done.stdout + done.stderr
    assert fault_drill.differences(whole.folder, tmp_path / "run") == []
    resumed = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert resumed["wall_time"] > interrupted["wall_time"]


def test_another_number_of_processes(tmp_path):
    """Two processes, then one, the run growing longer meanwhile: the batch sizes of one process throughout."""
    options = ["--precision=64-true", "--eta=0.8", "--learning_rate=0.003", "--lr_decay_samples=3000", "--seed=1"]
    train(tmp_path, *options, "--max_samples=1000", processes=2)
    moved = train(tmp_path, *options, "--max_samples=2500", "--resume=auto")
    alone = train(tmp_path, *options, "--max_samples=2500", name="alone")
    names = ("step", "samples", "batch_size", "next_batch_size")
    assert [[row[name] for name in names] for row in moved.rows] == [
        [row[name] for name in names] for row in alone.rows
    ]
    losses = [[float(row["train_loss"]) for row in run.rows] for run in (moved, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert moved.summary["final_batch_size"] > 4 * 16


@pytest.mark.parametrize("launcher", ["python", pytest.param("fabric", marks=pytest.mark.long)])
def test_a_rank_that_dies_ends_the_run(tmp_path, launcher, free_port):
    process = begin(launcher, free_port, *ENDLESS, f"--out_dir={tmp_path}")
    wait_for_rows(tmp_path / "run", 3)
    victim = process_of_rank(1, tmp_path)
    os.kill(victim, signal.SIGKILL)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    named = {
        "python": f"main.py: error: rank 1 (process {victim}) was killed by SIGKILL",
        "fabric": f"rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: {victim})",
    }
    assert named[launcher] in told and not processes_of(tmp_path)


def test_a_rank_that_hangs_ends_the_run(tmp_path):
    """Stopped, it neither answers nor dies: its connections stay, and the exchange would be waited for on and on."""
    program = Started(*ENDLESS, f"--out_dir={tmp_path}", processes=2, clocks={"launch.heartbeat.INTERVAL": 0.5})
    wait_for_rows(tmp_path / "run", 3)
    os.kill(program.ranks[1].pid, signal.SIGSTOP)
    program.ranks[0].join(60)
    program.ranks[1].kill()
    done = program.wait()
    assert done.returncode == 1
    assert re.search(r"error: rank 1 on \S+ has given no sign of life for 5 s: the run ends", done.stderr), done.stderr


class FallsAsleep(torch.nn.Linear):
    """On rank 1, in some pass of the training: it lives, and its heart beats."""

    passes = 0

    def forward(self, x):
        self.passes += self.training
        if self.passes > 12 and os.environ.get("LOCAL_RANK") == "1":
            time.sleep(600)
        return super().forward(x.flatten(1))


def falls_asleep(image_shape, num_classes) -> torch.nn.Module:
    return FallsAsleep(64, num_classes)


@pytest.mark.long
def test_a_rank_that_does_not_answer_ends_the_run(tmp_path):
    options = [f"--out_dir={tmp_path}", "--model=checks.test_survival:falls_asleep", "--timeout_minutes=0.2"]
    program = Started(*ENDLESS, *options, processes=2)
    program.ranks[0].join(120)
    program.ranks[1].kill()
    done = program.wait()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"error: rank 0 on \S+: another rank has not answered within --timeout_minutes", done.stderr)


def test_machines_that_do_not_reach_each_other(tmp_path):
    done = run(f"--out_dir={tmp_path}", processes=2, GLOO_SOCKET_IFNAME="nowhere0")
    assert done.returncode == 1 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
    assert "do not reach each other: set GLOO_SOCKET_IFNAME" in done.stderr


@pytest.mark.parametrize("launcher", ["python", pytest.param("fabric", marks=pytest.mark.long)])
def test_a_signal_to_all_processes(tmp_path, launcher, free_port):
    """As `timeout`, torchrun and Slurm send it: the worker processes get it, too, and are still needed."""
    process = begin(launcher, free_port, *ENDLESS, *WORKERS, f"--out_dir={tmp_path}")
    wait_for_rows(tmp_path / "run", 3)
    os.killpg(process.pid, signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert "interrupted by SIGTERM" in told and not processes_of(tmp_path), told
    if launcher == "python":
        assert process.returncode == 75 and "Traceback" not in told, told


SLOW = """
import os, signal, time
from dataclasses import replace
from torch.utils.data import Dataset
from checks import fault_drill

class Slow(Dataset):
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return 121

    def __getitem__(self, i):
        if "SLOW" in os.environ:
            open(os.environ["SLOW"], "w")
            time.sleep(0.05)
        return self.samples[i]

def load(data_dir):
    if "STOP" in os.environ:
        os.kill(os.getpid(), signal.SIGTERM)
    whole = fault_drill.streamed_digits(data_dir)
    return replace(whole, val=Slow(whole.val))
"""


def test_a_signal_cuts_an_evaluation_off(tmp_path, monkeypatch):
    """With 4 micro-batches on one rank and 3 on the other; it is made up for, and all is as in the undisturbed run."""
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = [
        "--dataset=slow:load",
        "--model=checks.fault_drill:Net",
        *fault_drill.TESTS["ip+orth"],
        "--batch_size=24",
    ]
    options += ["--max_batch_size=60", "--max_samples=1000", "--eval_interval=10", "--max_micro_batch_size=20"]
    whole = train(tmp_path, *options, processes=2, name="whole")
    monkeypatch.setenv("SLOW", str(tmp_path / "evaluating"))
    options += [f"--out_dir={tmp_path}", "--run_name=run", "--resume=auto"]
    program = Started(*options, processes=2)
    while not (tmp_path / "evaluating").exists():
        time.sleep(0.01)
    os.kill(program.ranks[1].pid, signal.SIGTERM)
    done = program.wait(60)
    interrupted = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert done.returncode == 75 and interrupted["steps"] == 10 and interrupted["val_loss"] is None, done
    monkeypatch.delenv("SLOW")
    done = run(*options, processes=2)
    assert done.returncode == 0 and fault_drill.differences(whole.folder, tmp_path / "run") == [], done.stderr
    monkeypatch.setenv("STOP", "before training")
    done = run(*options, "--run_name=other")
    assert done.returncode == -signal.SIGTERM and not (tmp_path / "other").exists()


@pytest.mark.long
def test_the_first_process_dies(tmp_path):
    process = begin("python", 0, *ENDLESS, *WORKERS, f"--out_dir={tmp_path}")
    wait_for_rows(tmp_path / "run", 3)
    process.kill()
    told, _ = process.communicate(timeout=30)  # the pipe is closed when the last process has gone
    assert f"the first process of this machine ({process.pid}) is gone" in told and not processes_of(tmp_path)


@pytest.mark.long
def test_the_launcher_dies(tmp_path, free_port):
    """Its processes end with it. While they last nobody else may write into the run's folder."""
    options = [*ENDLESS, f"--out_dir={tmp_path}"]
    process = begin("fabric", free_port, *options)
    wait_for_rows(tmp_path / "run", 3)
    refused = run(*options, "--resume=auto")
    writer = process_of_rank(0, tmp_path)
    assert refused.returncode == 2 and f"another process (pid {writer} on " in refused.stderr, refused.stderr
    process.kill()
    told, _ = process.communicate(timeout=30)
    assert f"rank 0: the launcher ({process.pid}) is gone" in told and not processes_of(tmp_path), told


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few hundred kilobytes; gives its folder and a function that makes room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("what", ["logging", "saving"])
def test_a_full_disk(small_disk, what):
    """One clear line, the last checkpoint whole, and with more room the run goes on from there."""
    folder, make_room = small_disk
    options = [f"--out_dir={folder}", "--run_name=run", "--accelerator=cpu", "--devices=1", "--model=logistic"]
    options += ["--batch_size=32", "--max_batch_size=32", "--max_samples=12800", "--eval_interval=1000000"]
    # Many rows and a checkpoint now and then, or few rows and checkpoints that are all kept.
    options += {
        "logging": ["--checkpoint_interval=50", "--keep_checkpoints=1"],
        "saving": ["--log_interval=50", "--checkpoint_interval=20", "--keep_checkpoints=99", "--test=False"],
    }[what]
    done = run(*options)
    where = "metrics.csv|events|run" if what == "logging" else r"step-\d+\.pt"
    line = rf"main.py: error: \S*({where})\S* could not be written \(No space left on device\).*--resume=auto"
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.fullmatch(line, done.stderr.strip()), done.stderr
    saved = checkpoint.steps_of(folder / "run" / "checkpoints")
    assert saved and not list((folder / "run" / "checkpoints").glob("*.tmp"))
    assert all(checkpoint.problem_of(path) == "" for path in saved.values())
    make_room()
    done = run(*options, "--resume=auto")
    assert done.returncode == 0 and f"step {max(saved):,}," in done.stdout, done.stdout + done.stderr
    with open(folder / "run" / "metrics.csv", newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(1, 401) if what == "logging" else range(50, 401, 50))


HUNGRY = """
import resource
import torch

calls = 0

class Net(torch.nn.Module):
    def __init__(self, image_shape, num_classes):
        super().__init__()
        self.hidden = torch.nn.Linear(64, MIDDLE)
        self.out = torch.nn.Linear(MIDDLE, num_classes)

    def forward(self, x):
        global calls
        calls += 1
        if calls == 3:  # the program is set up; from here on it gets so much more
            pages = int(open("/proc/self/statm").read().split()[0])
            size = pages * resource.getpagesize() + MEGABYTES * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        return self.out(torch.relu(self.hidden(x.flatten(1))))
"""


@pytest.mark.parametrize("where", ["test", "training"])
def test_out_of_memory(tmp_path, where):
    """Real limits. A sample's gradients are 3 MB; activations of a training batch of 1,400 are 100 MB a tensor."""
    middle, megabytes, batch = (10_000, 350, 256) if where == "test" else (20_000, 150, 1400)
    (tmp_path / "hungry.py").write_text(HUNGRY.replace("MIDDLE", str(middle)).replace("MEGABYTES", str(megabytes)))
    options = ["--model=hungry:Net", f"--out_dir={tmp_path}", "--run_name=run", "--accelerator=cpu", "--devices=1"]
    options += [f"--batch_size={batch}", f"--max_samples={3 * batch}", FIXED_CUT]
    options += ["--test_gradients=vmap", "--test_type=norm"] if where == "test" else ["--test=False"]
    done = run(*options, cwd=tmp_path)
    if where == "test":
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"out of memory in the test's own pass: it goes on with (64|32|16) samples", done.stdout)
    else:
        assert done.returncode == 1 and "out of memory on the device in a micro-batch: lower" in done.stderr
        assert "--max_micro_batch_size (this one has 1400 samples)" in done.stderr and "Traceback" not in done.stderr


BUSY_HEARTBEAT = """
import sys, threading
from launch import ending, heartbeat
arguments = (0, ["here"] * 200, heartbeat.open_store(), ending._leaving, lambda: None)
ending._beating.append(threading.Thread(target=heartbeat.beat, args=arguments, daemon=True))
heartbeat.INTERVAL, interval = 0.0, heartbeat.INTERVAL  # it is inside the store all the time
ending._beating[0].start()
heartbeat._kept.wait(["0"])
heartbeat.INTERVAL = interval if "leaving" in sys.argv else 0.0
sys.exit(ending.leave(3) if "leaving" in sys.argv else 3)
"""


def test_a_process_ends_with_its_status_while_its_heart_beats():
    """The end of the interpreter aborts a process with a thread inside the store: `leave` does not come to it."""
    done = launch(sys.executable, "-c", BUSY_HEARTBEAT, "leaving")
    assert done.returncode == 3 and not done.stderr
