"""What containers, batch systems and shells leave in the environment: taken for what it is, in little time."""

import socket
import sys

import pytest

from checks.conftest import ROOT, Started, launch, run
from launch import environments
from options.errors import UsageError

# As a real Slurm (22.05) sets them: for a batch script, by salloc, by srun and in the shell of `srun --pty bash`.
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "1", "SLURM_NTASKS": "4"}
BATCH = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
TASK = {**BATCH, "SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1"}
SHELL = {**TASK, "SLURM_JOB_NAME": "bash", "SLURM_PTY_PORT": "34471"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1",
    "MASTER_ADDR": "here", "MASTER_PORT": "1",
}  # fmt: skip
QUICK = ["--accelerator=cpu", "--batch_size=32", "--max_samples=64", "--model=logistic", "--run_name=run"]


@pytest.mark.parametrize(
    "env, terminal, expected",
    [
        ({}, True, (None, 0)),
        (TORCHRUN, True, ("torchrun", 3)),
        ({**TASK, **TORCHRUN}, False, ("torchrun", 3)),
        (TASK, False, ("srun", 3)),
        ({**TASK, "SLURM_JOB_NAME": "interactive"}, False, ("srun", 3)),  # srun in such an allocation
        ({**TASK, "SLURM_STEP_ID": "4294967290"}, True, (None, 0)),  # the shell of salloc's own step
        (BATCH, False, (None, 0)),
        (SHELL, True, (None, 0)),
        (SHELL, False, ("srun", 3)),  # srun within such a shell hands its variables on
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, True, (None, 0)),
    ],
)
def test_who_has_started_this_process(monkeypatch, env, terminal, expected):
    monkeypatch.setattr(environments, "_has_a_terminal", lambda: terminal)
    assert (environments.launcher(env), environments.rank(env)) == expected


@pytest.mark.parametrize(
    "env, words",
    [
        (BATCH, "Slurm gave this job 4 tasks"),
        (ALLOCATION, "use srun python main.py"),
        ({**BATCH, "SLURM_NTASKS": "1"}, ""),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}, "Slurm gave this job 2 nodes"),
        ({**ALLOCATION, "SLURM_JOB_NAME": "interactive"}, ""),
        ({**SHELL}, ""),
        (TASK, ""),
        (TORCHRUN, ""),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "RANK=1 and WORLD_SIZE=4 are set, but neither torchrun nor"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ""),
        ({"RANK": "", "WORLD_SIZE": "many"}, ""),
    ],
)
def test_what_was_meant(monkeypatch, env, words):
    monkeypatch.setattr(environments, "_has_a_terminal", lambda: env is not TASK)
    assert (
        (words in environments.missing_launcher("auto", env))
        if words
        else not environments.missing_launcher("auto", env)
    )
    assert environments.missing_launcher(1, env) == ""


@pytest.mark.parametrize(
    "env, devices",
    [
        pytest.param({"LOCAL_RANK": "0"}, 2, marks=pytest.mark.long),
        ({"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "NODE_RANK": "1", "LT_CLI_USED": "1"}, 1),
        pytest.param({**BATCH, "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "1"}, 2, marks=pytest.mark.long),
    ],
    ids=["container", "one left over", "batch script"],
)
def test_left_overs_are_left_alone(tmp_path, env, devices):
    words = [*QUICK, f"--devices={devices}"]
    done = launch(sys.executable, str(ROOT / "main.py"), *words, cwd=tmp_path, timeout=90, **env)
    assert done.returncode == 0 and f", {devices} × cpu" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "out" / "run" / "summary.json").exists()


def test_refused_by_whatever_rank_it_believes_to_have(tmp_path):
    done = launch(sys.executable, str(ROOT / "main.py"), *QUICK, cwd=tmp_path, RANK="1", WORLD_SIZE="2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "RANK=1" in done.stderr
    done = launch(sys.executable, str(ROOT / "main.py"), "--etta=1", cwd=tmp_path, RANK="1", WORLD_SIZE="2")
    assert done.returncode == 2 and "did you mean 'eta'" in done.stderr


OPERATOR = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"MASTER_PORT": ""}, "MASTER_PORT not set"),
        ({"RANK": "", "MASTER_ADDR": ""}, "RANK, MASTER_ADDR not set"),
        ({"RANK": "first"}, "RANK=first must be a whole number"),
        ({"RANK": "2"}, "do not fit together"),
        ({"LOCAL_RANK": "1"}, "do not fit together"),
        ({"LOCAL_WORLD_SIZE": "3"}, "do not fit together"),
    ],
)
def test_an_operators_variables_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        environments.take_as_given(OPERATOR | changes)


def test_an_operators_variables():
    env = dict(OPERATOR, LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    environments.take_as_given(env)
    assert environments.launcher(env) == "torchrun" and environments.rank(env) == 1 and env["GROUP_RANK"] == "0"
    environments.take_as_given(env := dict(OPERATOR))
    assert (env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"], env["GROUP_RANK"]) == ("0", "1", "1")
    environments.take_as_given(env := dict(TORCHRUN))
    assert env == TORCHRUN


@pytest.mark.long
def test_started_by_an_operator(tmp_path, free_port):
    """Two machines of one process each, which know of each other by the variables alone."""
    env, words = OPERATOR | {"MASTER_PORT": str(free_port)}, [*QUICK, "--launcher=env"]
    machines = [Started(*words, cwd=tmp_path, **env | {"RANK": rank}) for rank in "01"]
    ended = [machine.wait(timeout=120) for machine in machines]
    assert [done.returncode for done in ended] == [0, 0] and "2 × cpu" in ended[0].stdout
    refused = run(*words, cwd=tmp_path, RANK="0", WORLD_SIZE="2")
    assert refused.returncode == 2 and "--launcher=env: MASTER_ADDR, MASTER_PORT not set" in refused.stderr


@pytest.mark.parametrize("rank, words", [(0, "waits for ranks 1 to 2 at"), (2, "waits for rank 0 at")])
def test_says_for_whom_it_waits(tmp_path, free_port, rank, words):
    """One process of three, on a machine of its own, of which the others do not come."""
    env = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "3", "RANK": str(rank)}
    env |= {"LOCAL_RANK": "0", "GROUP_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    process = Started(*QUICK, clocks={"launch.processes.PATIENCE": 0.5}, **env)
    try:
        said = process.says("waits for")
        assert f"rank {rank} of 3 on {socket.gethostname()} {words} 127.0.0.1:{free_port}" in said
    finally:
        process.ranks[0].kill()
        process.wait()
