"""Who has started this process, and how: torchrun (also in `fabric run`), srun, the program itself, or nobody of these.

Containers and shells carry variables of launchers that are gone or were never asked. Taken at their word, a process
waits for others that nobody starts.
"""

import functools
import os
import shlex
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from options.errors import UsageError

BY_TORCHRUN = {"TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"}
BY_AN_OPERATOR = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What every operator of a cluster sets; LOCAL_RANK and LOCAL_WORLD_SIZE only where a machine has several processes."""
BY_SRUN = {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID"}
FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm's own steps have numbers from here on: the batch script, the shell of an interactive allocation."""
FIRST_PROCESS = "ADADAGRAD_FIRST_PROCESS"
"""Names the process that has started others on this machine by itself, for these."""


def launcher(env: Mapping[str, str] = os.environ) -> str | None:
    """ "torchrun" or "srun", where one of them has started this process as one of its tasks."""
    if env.keys() >= BY_TORCHRUN:
        return "torchrun"
    task = env.keys() >= BY_SRUN and not _in_a_shell(env) and int(env["SLURM_STEP_ID"]) < FIRST_SPECIAL_STEP
    return "srun" if task else None


def _in_a_shell(env: Mapping[str, str]) -> bool:
    """Somebody is at work in `srun --pty bash`. An srun in there hands the variable on, but no terminal."""
    return "SLURM_PTY_PORT" in env and _has_a_terminal()


def _has_a_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


@functools.cache  # as it was at the start: a parent may be gone when somebody asks again
def started_by_the_first_process() -> bool:
    """This process is one of several that `python main.py` has made of itself."""
    return os.environ.get(FIRST_PROCESS) == str(os.getppid())


def rank(env: Mapping[str, str] = os.environ) -> int:
    """The rank that torchrun or srun has given this process; 0 where nothing has."""
    variable = {"torchrun": "RANK", "srun": "SLURM_PROCID"}.get(launcher(env))
    return int(env[variable]) if variable else 0


def take_as_given(env: MutableMapping[str, str] = os.environ) -> None:
    """Take the variables of an operator, which starts the processes as torchrun does, for torchrun's.

    Raises:
        UsageError: one is missing, or is no number where it must be one.
    """
    if launcher(env) == "torchrun":
        return
    missing = [name for name in BY_AN_OPERATOR if not env.get(name)]
    if missing:
        raise UsageError(
            f"--launcher=env: {', '.join(missing)} not set: the operator sets it for every process; leave "
            "--launcher out for `fabric run`, torchrun and srun"
        )
    given = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **env}
    sizes = {name: given[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")}
    for name, value in sizes.items():
        if not value.isdigit():
            raise UsageError(f"--launcher=env: {name}={value} must be a whole number")
    rank, size, local_rank, local_size, _ = map(int, sizes.values())
    if not (rank < size and local_rank < local_size and size % local_size == 0):
        raise UsageError(
            f"--launcher=env: RANK={rank} of WORLD_SIZE={size} and LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE="
            f"{local_size} do not fit together: ranks count from 0, and every machine has as many processes"
        )
    env |= sizes | {"GROUP_RANK": str(rank // local_size), "TORCHELASTIC_RUN_ID": "none"}


def missing_launcher(devices: int | str, env: Mapping[str, str] = os.environ) -> str:
    """Why this process should have been started otherwise, "" where it is meant as it is.

    Args:
        devices: the option. Who names a number means the processes that the program itself starts here.
    """
    if launcher(env) or started_by_the_first_process() or devices != "auto":
        return ""
    tasks, nodes = _number(env, "SLURM_NTASKS"), _number(env, "SLURM_NNODES")
    # By these names Lightning, too, tells that somebody is at work in the job and starts what is to be started.
    interactive = _in_a_shell(env) or env.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_JOB_ID" in env and max(tasks, nodes) > 1 and not interactive:
        what = f"{tasks} tasks" if tasks > 1 else f"{nodes} nodes"
        return f"Slurm gave this job {what}, but srun has started none: use srun python main.py …; or add --devices=1"
    if "RANK" in env and _number(env, "WORLD_SIZE") > 1:
        return (
            f"RANK={env['RANK']} and WORLD_SIZE={env['WORLD_SIZE']} are set, but neither torchrun nor `fabric run` has "
            "started this process: start it by one of them; or add --launcher=env where an operator has set them; or "
            "unset both, or add --devices=1"
        )
    return ""


def _number(env: Mapping[str, str], name: str) -> int:
    return int(env[name]) if env.get(name, "").isdigit() else 1


def forget_left_overs(num_nodes: int) -> None:
    """Without a launcher, remove what would look like one; to be called before Fabric is imported, which looks, too.

    Args:
        num_nodes: the option. Where it is larger, the user has named the first machine and this one's number.
    """
    if launcher() or started_by_the_first_process():
        return
    names = {"LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"}
    names |= {name for name in os.environ if name.startswith("LT_")}  # `fabric run` works by torchrun
    if num_nodes == 1:
        names |= {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
    for name in names:
        os.environ.pop(name, None)


def resume_command(out_dir: Path, run_name: str) -> str:
    """The command that started this run, made to go on with it."""
    command, kept = _started_by(), []
    for word in command:
        option, _, value = word.partition("=")
        if kept and kept[-1] is None:  # the value of an option that is left out
            kept[-1] = ""
        elif option.lstrip("-").replace("-", "_") in ("out_dir", "run_name", "resume") and word.startswith("--"):
            kept.append("" if value else None)
        else:
            kept.append(word)
    options = [f"--out_dir={out_dir}", f"--run_name={run_name}", "--resume=auto"]
    return shlex.join([*filter(None, kept), *options])


def _started_by() -> Sequence[str]:
    """The command line of the launcher, or of this process where there is none."""
    if launcher() == "torchrun":
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().rstrip("\0").split("\0")
        if sys.orig_argv[-1] in words:  # else it has died, and this is the process that inherits orphans
            return words
    return ["srun", *sys.orig_argv] if launcher() == "srun" else sys.orig_argv
