"""Under a real Slurm, where there is one (checks/slurm.sh starts one)."""

import csv
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from checks.conftest import ROOT, process_of_rank


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def nodes_up() -> int:
    """Nodes that take jobs, now or when the job that they have, perhaps that of the test before, has ended."""
    if not shutil.which("sbatch"):
        return 0
    states = "idle,allocated,mixed,completing"
    listing = subprocess.run(["sinfo", "--noheader", "--Node", f"--states={states}"], capture_output=True, text=True)
    return len(listing.stdout.split("\n")) - 1


pytestmark = [
    pytest.mark.skipif(not nodes_up(), reason="needs Slurm with a node: export SLURM_CONF=$(checks/slurm.sh up)"),
    pytest.mark.xdist_group("slurm"),
    pytest.mark.long,
]
OPTIONS = ["--dataset=digits", "--accelerator=cpu", "--batch_size=64", "--max_batch_size=64", "--log_interval=5"]


@pytest.fixture
def submit(tmp_path):
    """`sbatch` from a folder that is not the project's; gives the job's number. The rest is cancelled in the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    jobs = []

    def submit(*arguments: str) -> str:
        command = ["sbatch", "--parsable", f"--output={tmp_path}/%A.%a.out", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        jobs.append(done.stdout.strip())
        return jobs[-1]

    yield submit
    subprocess.run(["scancel", *jobs])


def wait_until(holds, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, slurm("squeue", "--long")
        time.sleep(0.2)


def output_of(tmp_path: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.out")))


def test_requeued_before_the_time_limit_and_resumed(tmp_path, submit):
    """Two tasks, on two nodes where there are as many: USR1, a checkpoint, `scontrol requeue`, the rest of the run."""
    nodes = min(2, nodes_up())
    out_dir = tmp_path / "out"
    options = [*OPTIONS, f"--out_dir={out_dir}", "--max_samples=64000", "--eval_interval=100000"]
    job = submit(f"--nodes={nodes}", "--ntasks=2", str(ROOT / "expt.sh"), "logistic", *options)
    rows = out_dir / f"slurm-{job}" / "metrics.csv"
    wait_until(lambda: rows.exists() and rows.read_text().count("\n") > 5)
    slurm("scancel", "--signal=USR1", job)  # as Slurm itself does 120 s before the limit (#SBATCH --signal)
    wait_until(lambda: re.search(r"Restarts=1 ", slurm("scontrol", "show", "job", job)))
    # Slurm lets a requeued job wait until its old credential has expired: after 2 minutes, where nothing else is set.
    wait_until(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job), seconds=240)
    told = output_of(tmp_path)
    assert told.count("interrupted by SIGUSR1") == 1 and told.count("resuming from") == 1
    assert told.count("\nfinished") == 1
    with open(rows, newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(5, 1001, 5))
    effective = yaml.safe_load((rows.parent / "config.yaml").read_text())
    assert (effective["num_nodes"], effective["num_nodes"] * effective["devices"]) == (nodes, 2)


def test_array_jobs_are_seeds(tmp_path, submit):
    out_dir = tmp_path / "out"
    options = [*OPTIONS, f"--out_dir={out_dir}", "--max_samples=640"]
    job = submit("--array=3-4", "--ntasks=1", str(ROOT / "expt.sh"), "logistic", *options)
    summaries = [out_dir / f"slurm-{job}-{seed}" / "summary.json" for seed in (3, 4)]
    wait_until(lambda: all(path.exists() for path in summaries))
    assert [yaml.safe_load((path.parent / "config.yaml").read_text())["seed"] for path in summaries] == [3, 4]


def test_only_what_runs_out_of_time_is_requeued(tmp_path, submit):
    """Of two array tasks the last one, whose number is the array's own, gets USR1; then the other one is cancelled."""
    out_dir = tmp_path / "out"
    options = [*OPTIONS, f"--out_dir={out_dir}", "--max_samples=90000000"]
    job = submit("--array=1-2", "--ntasks=1", str(ROOT / "expt.sh"), "logistic", *options)
    rows = [out_dir / f"slurm-{job}-{task}" / "metrics.csv" for task in (1, 2)]
    wait_until(lambda: all(path.exists() and path.read_text().count("\n") > 5 for path in rows))
    slurm("scancel", "--signal=USR1", f"{job}_2")
    wait_until(lambda: re.search(r"Restarts=1 ", slurm("scontrol", "show", "job", f"{job}_2")))
    assert re.search(r"JobState=RUNNING(.|\n)* Restarts=0 ", slurm("scontrol", "show", "job", f"{job}_1"))
    slurm("scancel", f"{job}_1")
    wait_until(lambda: "interrupted by SIGTERM" in (tmp_path / f"{job}.1.out").read_text())
    wait_until(lambda: "JobState=COMPLETING" not in slurm("scontrol", "show", "job", f"{job}_1"))
    assert re.search(r"JobState=CANCELLED(.|\n)* Restarts=0 ", slurm("scontrol", "show", "job", f"{job}_1"))


def test_a_task_that_dies_ends_the_job(tmp_path, submit):
    out_dir = tmp_path / "out"
    options = [*OPTIONS, f"--out_dir={out_dir}", "--max_samples=90000000"]
    job = submit("--ntasks=2", str(ROOT / "expt.sh"), "logistic", *options)
    rows = out_dir / f"slurm-{job}" / "metrics.csv"
    wait_until(lambda: rows.exists() and rows.read_text().count("\n") > 5)
    os.kill(process_of_rank(1, out_dir, "SLURM_PROCID"), signal.SIGKILL)
    wait_until(lambda: "JobState=FAILED" in slurm("scontrol", "show", "job", job), seconds=60)
    assert re.search(r"task 1: Killed", output_of(tmp_path))
