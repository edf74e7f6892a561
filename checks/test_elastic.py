"""Machines that come and go: two agents of torchrun, one of which is killed with all its processes."""

import csv
import os
import signal
import subprocess
import time

import pytest

from checks.conftest import ROOT, process_of_rank
from checks.test_runs import BIN

OPTIONS = ["--model=logistic", "--test=False", "--batch_size=4", "--max_samples=6000", "--accelerator=cpu"]
OPTIONS += ["--max_micro_batch_size=64", "--precision=64-true", "--checkpoint_interval=20", "--eval_interval=100000"]


def rows(out_dir) -> list[dict[str, str]]:
    with open(out_dir / "run" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc"), reason="looks for processes in /proc")
def test_the_loss_of_a_machine(tmp_path, free_port):
    """The other one goes on alone, from the newest checkpoint, with the same batches; the rows say on how many."""
    command = [BIN / "torchrun", "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=5", "--rdzv_backend=c10d"]
    command += [f"--rdzv_endpoint=127.0.0.1:{free_port}", "--rdzv_id=run"]
    patience = "last_call_timeout=8,join_timeout=60,timeout=60,keep_alive_interval=2"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def agent(log, keeps_the_rendezvous: bool) -> subprocess.Popen:
        words = [*map(str, command), f"--rdzv_conf={patience},is_host={keeps_the_rendezvous}", "main.py", *OPTIONS]
        words += [f"--out_dir={tmp_path}", "--run_name=run", "--resume=auto"]
        with open(log, "w") as file:
            return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)

    agents = [agent(tmp_path / "first.log", True), agent(tmp_path / "second.log", False)]
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(list(tmp_path.glob("run/checkpoints/step-*.pt"))) < 1:
            time.sleep(0.2)
        workers = [process_of_rank(rank, tmp_path, "RANK") for rank in range(2)]
        of_second = [pid for pid in workers if os.getpgid(pid) == agents[1].pid or parent(pid) == agents[1].pid]
        agents[1].kill()
        for pid in of_second:
            os.kill(pid, signal.SIGKILL)
        assert agents[0].wait(timeout=200) == 0, (tmp_path / "first.log").read_text()[-3000:]
    finally:
        for process in agents:
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=60)
    found = rows(tmp_path)
    sizes = [int(row["world_size"]) for row in found]
    assert sizes[0] == 2 and sizes[-1] == 1 and sizes == sorted(sizes, reverse=True)
    assert [int(row["step"]) for row in found] == list(range(1, 1501))


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])
