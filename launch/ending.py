"""Ending together: where one process of a run fails, all do, and one line says why.

torchrun (also inside `fabric run`) and srun see to their processes; those that Fabric starts itself watch each other. A
launcher that is killed cannot see to anything: its processes watch it. The heartbeat finds a process that is silent.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.utilities.rank_zero import rank_zero_only

from launch import heartbeat
from launch.collectives import all_gather_object, broadcast_object
from launch.environments import launcher, started_by_the_first_process
from options.errors import GRACE, RunError, UsageError, in_one_line, say_error

_children: list[subprocess.Popen] = []
_leaving = threading.Event()
_beating: list[threading.Thread] = []


def _is_child() -> bool:
    """Started by the first process of this machine, which Fabric made a copy of (and whose exit status counts)."""
    return not launcher() and started_by_the_first_process()


def watch(fabric: Fabric) -> None:
    """From before the processes meet on."""
    own_launcher = getattr(fabric.strategy, "launcher", None)
    if _is_child() or launcher() == "torchrun":
        threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    elif hasattr(own_launcher, "procs"):
        threading.Thread(target=_watch_children, args=(own_launcher,), daemon=True).start()


def _watch_parent(parent: int) -> None:
    while not _leaving.wait(0.5):
        if os.getppid() != parent:
            name = "first process of this machine" if _is_child() else "launcher"
            say_error(f"rank {rank_zero_only.rank}: the {name} ({parent}) is gone: the run ends")
            os._exit(1)


def _watch_children(launcher) -> None:
    while not _leaving.wait(0.2):
        # Taken away from Fabric's own observer, which kills everything, this process included, without a word.
        _children.extend(launcher.procs)
        launcher.procs.clear()
        for local_rank, process in enumerate(_children, start=1):
            if process.poll():
                rank = int(os.environ.get("NODE_RANK", 0)) * launcher.num_processes + local_rank
                say_error(f"rank {rank} (process {process.pid}) {_ended(process.returncode)}: the run ends")
                leave(1)


def _ended(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def give_signs_of_life(fabric: Fabric) -> None:
    """And look for those of the other ranks, until `leave`."""
    if fabric.world_size > 1:
        hosts, address = all_gather_object(fabric, socket.gethostname()), broadcast_object(fabric, heartbeat.open_store)
        arguments = (fabric.global_rank, hosts, address, _leaving, lambda: leave(1))
        _beating.append(threading.Thread(target=heartbeat.beat, args=arguments, daemon=True))
        _beating[-1].start()


def report(error: Exception) -> None:
    """Say in one line why the run ends; where nobody has foreseen it, the traceback is kept."""
    rank = rank_zero_only.rank
    if _is_lost_worker(error):
        error = RunError(
            "--num_workers: where memory or shared memory (/dev/shm) ran out, take fewer --num_workers "
            f"({in_one_line(error)})"
        )
    several = dist.is_initialized() and dist.get_world_size() > 1
    where = f"rank {rank} on {socket.gethostname()}: " if several else ""
    if several and _is_lost_contact(error):
        time.sleep(GRACE)  # for the launcher, which knows which process died, to say so
        _leaving.set()
        reason = in_one_line(error)
        silent = "has not answered within --timeout_minutes" if "timed out" in reason.lower() else "is gone"
        say_error(f"{where}another rank {silent} ({reason}): the run ends")
        return
    _leaving.set()
    if isinstance(error, UsageError) or getattr(error, "on_all_ranks", False):
        if rank == 0:
            say_error(str(error))
        elif not _is_child():
            time.sleep(GRACE)  # launchers end all processes when the first one ends: let rank 0 speak before
    elif isinstance(error, RunError):
        say_error(f"{where}{error}")
    else:
        say_error(f"{where}{_traceback_kept(error)}{in_one_line(error)}")


_run_folder: Path | None = None


def errors_go_to(folder: Path) -> None:
    """From now on `report` has a folder for tracebacks."""
    global _run_folder
    _run_folder = folder


def _traceback_kept(error: Exception) -> str:
    """Write the traceback to the run's error.log, and say so; on standard error, where there is no folder yet."""
    lines = "".join(traceback.format_exception(error))
    heading = f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank_zero_only.rank} on {socket.gethostname()}"
    try:
        with open(_run_folder / "error.log", "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{heading}: {shlex.join(sys.argv)}\n{lines}\n")
    except (OSError, TypeError):  # TypeError: there is none
        print(lines, end="", file=sys.stderr)
        return ""
    return f"see the traceback in {_run_folder / 'error.log'}: "


def _is_lost_contact(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _is_lost_worker(error: Exception) -> bool:
    """A loader's worker process has died: torch raises it wherever the main thread is at that moment."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def leave(status: int) -> int:
    """End what the processes share; returns the exit status.

    After a failure nothing is waited for: other ranks may be inside an exchange that nobody will answer.
    """
    _leaving.set()
    if status == 1 and dist.is_initialized():
        for process in _children:
            process.kill()
        _end_at_once(status)
    if dist.is_initialized():
        dist.destroy_process_group()
    status = 0 if _is_child() else status
    for thread in _beating:  # of several processes
        thread.join(2 * heartbeat.INTERVAL)
        # All is written. The end of an interpreter aborts the process where a thread is inside the store or frees the
        # tensors of an exchange (gloo's do).
        _end_at_once(status)
    return status


def _end_at_once(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
