"""Processes: Fabric under every launcher, what the options come to there, agreeing between ranks, ending together."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.plugins.precision import DoublePrecision
from lightning.fabric.strategies import STRATEGY_REGISTRY, DDPStrategy, ModelParallelStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only

from launch import heartbeat, sharding
from launch.environments import FIRST_PROCESS, launcher, started_by_the_first_process
from launch.options import GRACE, Config, RunError, UsageError, say, say_error
from launch.terminals import after

PATIENCE = 10.0
"""Seconds after which a start that waits for other processes says so."""
LONG = 5.0
"""Seconds after which whatever goes on says what it is."""


def start_fabric(config: Config) -> Fabric:
    """Fabric on the devices of the launcher (`fabric run`, torchrun, srun) or, without one, on those of the options.

    Raises:
        UsageError: there are no such devices.
    """
    by_fabric_run = bool(os.environ.get("LT_CLI_USED"))  # then Fabric itself reads what the launcher set
    strategy = os.environ.get("LT_STRATEGY", "auto") if by_fabric_run else config.strategy
    if strategy not in ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp"):  # the launcher takes any
        raise UsageError(f"--strategy={strategy} is not supported: choose auto, ddp or fsdp")
    _say_how_gradients_are_averaged(config)
    if strategy == "fsdp":  # by this name Fabric has FSDP's first version
        os.environ.pop("LT_STRATEGY", None)
        strategy = sharding.Sharded(config.shard_modules, timedelta(minutes=config.timeout_minutes))
    share_cores()
    launched = launched_size()
    if not launched:
        refuse_too_many_processes(config)
        if config.num_nodes > 1 and not {"MASTER_ADDR", "NODE_RANK"} <= os.environ.keys():
            raise UsageError(
                f"--num_nodes={config.num_nodes}: start one `fabric run` or torchrun on every node, or use srun "
                "(docs/running.md, Launching)"
            )
    environments = {"torchrun": TorchElasticEnvironment, "srun": SLURMEnvironment, None: LightningEnvironment}
    try:
        if by_fabric_run:
            with after(PATIENCE, _say_for_whom_it_waits):
                fabric = Fabric() if isinstance(strategy, str) else Fabric(strategy=strategy)
        else:
            devices, num_nodes = launched or (config.devices, config.num_nodes)
            plugins = [environments[launcher()]()]  # as found: Fabric would take left-over variables for a launcher
            precision = config.precision
            if not isinstance(strategy, str) and precision.startswith("64"):  # shards know it, Fabric's list does not
                plugins, precision = [*plugins, DoublePrecision()], None
            fabric = Fabric(
                accelerator=config.accelerator,
                strategy=strategy,
                devices=devices,
                num_nodes=num_nodes,
                precision=precision,
                plugins=plugins,
            )
        _watch(fabric)
        if not by_fabric_run:
            with after(PATIENCE, _say_for_whom_it_waits), _naming_the_first_process():
                fabric.launch()
        if fabric.world_size > 1:
            _host_group()
    except (RuntimeError, ValueError, TypeError, MisconfigurationException) as error:
        raise _not_started(config, error) from None
    if fabric.world_size > 1:
        hosts, address = gathered(fabric, socket.gethostname()), from_first(fabric, heartbeat.open_store)
        _beating.append(heartbeat.Heartbeat(fabric.global_rank, hosts, address, _leaving, lambda: leave(1)))
        _beating[-1].start()
    return fabric


def _say_how_gradients_are_averaged(config: Config) -> None:
    """Fabric's strategies by the names of `--strategy`, with our arguments, whoever of the launchers names them.

    Buffers stay a rank's own: ranks may evaluate different numbers of micro-batches, and `evaluate` averages them.
    """
    arguments = {
        "timeout": timedelta(minutes=config.timeout_minutes),
        "gradient_as_bucket_view": True,  # else every gradient lies in memory twice
        "broadcast_buffers": False,
    }
    STRATEGY_REGISTRY.register("ddp", DDPStrategy, override=True, **arguments)
    arguments["find_unused_parameters"] = True
    STRATEGY_REGISTRY.register("ddp_find_unused_parameters_true", DDPStrategy, override=True, **arguments)


def _not_started(config: Config, error: Exception) -> UsageError | RunError:
    """What keeps Fabric from starting, and what to do."""
    reason = " ".join(str(error).split()).rstrip("!.")
    if isinstance(error, dist.DistError) or "gloo" in reason.lower():
        return RunError(
            "the processes do not reach each other: set GLOO_SOCKET_IFNAME (on GPUs NCCL_SOCKET_IFNAME, too) to the "
            f"network interface that connects the machines; `ip addr` lists them ({reason})"
        )
    remedy = "choose what this machine has, or --accelerator=cpu"
    if launcher() == "srun":
        remedy += "; every task must see all GPUs of its node: give --gpus-per-node, not --gpus-per-task"
    return UsageError(f"--accelerator={config.accelerator} --devices={config.devices}: {remedy} ({reason})")


def naming_long_work(fabric: Fabric, what: str) -> contextlib.AbstractContextManager:
    """Where what is inside takes long, the first rank says what it is."""
    first = fabric.is_global_zero
    return after(LONG, lambda: say(f"{what} …")) if first else contextlib.nullcontext()


@contextlib.contextmanager
def _naming_the_first_process() -> Iterator[None]:
    """To the processes that are started inside; others that this one starts later are none of them."""
    if started_by_the_first_process():
        yield
        return
    os.environ[FIRST_PROCESS] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[FIRST_PROCESS]


def _say_for_whom_it_waits() -> None:
    """One process on every machine."""
    env, rank = os.environ, rank_zero_only.rank
    names = ("SLURM_NTASKS", "SLURM_LOCALID") if launcher() == "srun" else ("WORLD_SIZE", "LOCAL_RANK")
    size, local_rank = int(env.get(names[0], 1)), int(env.get(names[1], 0))
    if size == 1 or local_rank:
        return
    whom = "rank 0" if rank else "rank 1" if size == 2 else f"ranks 1 to {size - 1}"
    address = f"{env.get('MASTER_ADDR', '?')}:{env.get('MASTER_PORT', '?')}"
    say(
        f"rank {rank} of {size} on {socket.gethostname()} waits for {whom} at {address}: "
        "have all processes been started, and can they reach this address?"
    )


def share_cores() -> None:
    """`fabric run` lets every process on a machine use all its cores; several such are many times slower than one."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes > 1 and torch.get_num_threads() * processes > cores:
        torch.set_num_threads(max(1, cores // processes))


def refuse_too_many_processes(config: Config) -> None:
    """More CPU processes than cores work, and serve tests; so many that the machine comes to a stop are a mistake."""
    most = 8 * (os.cpu_count() or 1)
    on_cpu = config.accelerator == "cpu" or (config.accelerator == "auto" and not torch.cuda.is_available())
    if on_cpu and isinstance(config.devices, int) and config.devices > most:
        raise UsageError(f"--devices={config.devices}: on the {os.cpu_count()} CPU cores here use at most {most}")


def strategy_name(fabric: Fabric) -> str:
    """As `--strategy` has it: what Fabric really uses."""
    if isinstance(fabric.strategy, ModelParallelStrategy):
        return "fsdp"
    if not isinstance(fabric.strategy, DDPStrategy):
        return "auto"
    finds_unused = fabric.strategy._ddp_kwargs.get("find_unused_parameters")
    return "ddp_find_unused_parameters_true" if finds_unused else "ddp"


def resolve(config: Config, fabric: Fabric, training_samples: int, defaults: dict[str, Any]) -> Config:
    """The options as they take effect: defaults that depend on the data, and the devices that Fabric really uses.

    Args:
        defaults: values that suit the data set better than the general ones, where the options say nothing.

    Raises:
        UsageError: the options do not fit the data or the devices.
    """
    world_size = fabric.world_size
    general = {"max_samples": 30 * training_samples}
    effective = {name: value for name, value in (general | defaults).items() if getattr(config, name) is None}
    if config.stagewise_ramp_up:
        sizes = config.global_batch_sizes
        effective["batch_size"] = sizes[0]
        length = effective.get("max_samples", config.max_samples)
        stages = config.samples_stages or [length // len(sizes)] * len(sizes)
        effective["samples_stages"] = [
            round(float(stage[:-1]) / 100 * length) if isinstance(stage, str) else stage for stage in stages
        ]
    unit = {"sample": "samples", "iter": "iters"}[config.lr_decay_type]
    if config.decay_lr and config.scheduler != "multistep" and getattr(config, f"lr_decay_{unit}") is None:
        effective[f"lr_decay_{unit}"] = effective.get(f"max_{unit}", getattr(config, f"max_{unit}"))
    if config.max_batch_size is None:
        effective["max_batch_size"] = max([training_samples, *config.global_batch_sizes])
    smallest = min(config.global_batch_sizes) if config.stagewise_ramp_up else config.batch_size
    if training_samples < world_size:
        raise UsageError(
            f"--dataset={config.dataset} has {training_samples} training samples for {world_size} devices: "
            "use fewer --devices"
        )
    if smallest < world_size:
        option = "global_batch_sizes" if config.stagewise_ramp_up else "batch_size"
        raise UsageError(
            f"--{option}: a batch of {smallest} cannot be shared by {world_size} devices: "
            "raise it or use fewer --devices"
        )
    return replace(
        config,
        **effective,
        accelerator="cpu" if fabric.device.type == "cpu" else "cuda",
        devices=world_size // getattr(fabric.strategy, "num_nodes", 1),
        num_nodes=getattr(fabric.strategy, "num_nodes", 1),
        strategy=strategy_name(fabric),
        precision=fabric._precision.precision,
    )


def refuse_single_samples(config: Config, world_size: int, least: int) -> None:
    """Where BatchNorm meets maps of one position, a micro-batch of one sample has nothing to normalise by.

    Args:
        least: samples that a training pass of the model needs.

    Raises:
        UsageError: a device would get fewer.
    """
    smallest = min(config.global_batch_sizes) if config.stagewise_ramp_up else config.batch_size
    if least > 1 and smallest // world_size < least:
        raise UsageError(
            f"--batch_size: {config.model} has BatchNorm on 1×1 maps of these images and needs at least {least} "
            f"samples a device: use {least * world_size} or more, or fewer --devices"
        )
    if least > 1 and config.max_micro_batch_size != "auto" and config.max_micro_batch_size < 3:
        raise UsageError(f"--max_micro_batch_size: {config.model} has BatchNorm on 1×1 maps and needs 3 or more")


def refuse_a_single_worker(config: Config, world_size: int) -> None:
    """
    Raises:
        UsageError: nothing to compare.
    """
    if config.test_gradients == "worker" and world_size * config.gradient_accumulation_steps < 2:
        raise UsageError(
            "--test_gradients=worker compares the gradients of workers, and here is one: take micro_batch, or "
            "--gradient_accumulation_steps=2 or more"
        )


def refuse_unequal_numbers(config: Config, module: torch.nn.Module) -> None:
    """SyncBatchNorm exchanges statistics in every micro-batch, shards are gathered: ranks need the same number of them.

    Raises:
        UsageError: micro-batches of one sample are as many as a rank has samples.
    """
    synchronised = any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in module.modules())
    if synchronised and config.max_micro_batch_size == 1:
        raise UsageError("--max_micro_batch_size=1: SyncBatchNorm needs as many micro-batches on every rank: raise it")
    if config.strategy == "fsdp" and config.max_micro_batch_size == 1:
        raise UsageError("--max_micro_batch_size=1: shards need as many micro-batches on every rank: raise it")


def set_up_devices(config: Config) -> None:
    """How exactly and how repeatably the devices calculate, and how they keep memory. Before the first use of a GPU."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & set(os.environ):
        # Batches of growing sizes leave gaps in memory that is kept in pieces of fixed size.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    exact = config.matmul_precision == "highest"
    torch.set_float32_matmul_precision(config.matmul_precision)
    torch.backends.cudnn.allow_tf32 = not exact
    if config.compile:
        # DDP's own cuts of the graph do not bear a forward pass that computes with the batch size.
        torch._dynamo.config.optimize_ddp = False
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def launched_size() -> tuple[int, int] | None:
    """Processes a node and nodes, where torchrun or srun has started this process; None where nothing has."""
    env = os.environ
    if launcher() == "torchrun":
        return int(env["LOCAL_WORLD_SIZE"]), int(env["WORLD_SIZE"]) // int(env["LOCAL_WORLD_SIZE"])
    if launcher() == "srun":
        tasks = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", 1))
        nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES", 1))
        env["SLURM_NTASKS"], env["SLURM_NTASKS_PER_NODE"] = str(tasks), str(tasks // nodes)  # Fabric insists on both
        return tasks // nodes, nodes
    return None


def together(fabric: Fabric, function: Callable):
    """Call on every rank; where one is refused or fails, all do, with the same words: none is left waiting."""
    result, problem = None, None
    try:
        result = function()
    except (UsageError, RunError) as error:
        problem = error
    for first in filter(None, gathered(fabric, problem)):
        first.on_all_ranks = True
        raise first
    return result


# What ranks exchange here goes from host to host: objects do not travel over devices, and no host waits for its device.


def gathered(fabric: Fabric, value: Any) -> list[Any]:
    """Every rank's value, on all ranks."""
    values = [value]
    if fabric.world_size > 1:
        values = [None] * fabric.world_size
        dist.all_gather_object(values, value, group=_host_group())
    return values


def from_first(fabric: Fabric, function: Callable) -> Any:
    """What the function gives on the first rank, where alone it is called, on all ranks."""
    values = [function() if fabric.global_rank == 0 else None]
    if fabric.world_size > 1:
        dist.broadcast_object_list(values, src=0, group=_host_group())
    return values[0]


def largest_over_ranks(fabric: Fabric, number: int) -> int:
    """The largest of the ranks' numbers."""
    if fabric.world_size == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_host_group())
    return int(largest)


class Agreement:
    """The largest of the ranks' numbers one call later: no rank waits for the others."""

    def __init__(self, fabric: Fabric):
        self.fabric, self.largest, self.work = fabric, torch.tensor(0), None

    def exchange(self, number: int) -> int:
        """Hand in a number; gives the largest of the last call's (of a single process: this one), 0 at first."""
        if self.fabric.world_size == 1:
            return number
        agreed, self.largest = self.last(), torch.tensor(number)
        self.work = dist.all_reduce(self.largest, dist.ReduceOp.MAX, group=_host_group(), async_op=True)
        return agreed

    def last(self) -> int:
        """The largest of what was handed in last."""
        if self.work:
            self.work.wait()
        return int(self.largest)


@lru_cache(maxsize=1)
def _host_group() -> dist.ProcessGroup | None:
    """Made at the start: where the machines do not reach each other this way, it is said before anything is done."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


# Where one process fails, all must end. torchrun (also inside `fabric run`) and srun see to their processes; those that
# Fabric starts itself watch each other. A launcher that is killed cannot see to anything: its processes watch it.

_children: list[subprocess.Popen] = []
_leaving = threading.Event()
_beating: list[heartbeat.Heartbeat] = []


def _is_child() -> bool:
    """Started by the first process of this machine, which Fabric made a copy of (and whose exit status counts)."""
    return not launcher() and started_by_the_first_process()


def _by_torchrun() -> bool:
    """`fabric run` is torchrun inside."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _watch(fabric: Fabric) -> None:
    launcher = getattr(fabric.strategy, "launcher", None)
    if _is_child() or _by_torchrun():
        threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    elif hasattr(launcher, "procs"):
        threading.Thread(target=_watch_children, args=(launcher,), daemon=True).start()


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


def report(error: Exception) -> None:
    """Say in one line why the run ends; where nobody has foreseen it, the traceback is kept."""
    rank = rank_zero_only.rank
    if _is_lost_worker(error):
        error = RunError(
            "--num_workers: where memory or shared memory (/dev/shm) ran out, take fewer --num_workers or a smaller "
            f"--batch_ahead ({_first_line(error)})"
        )
    several = dist.is_initialized() and dist.get_world_size() > 1
    where = f"rank {rank} on {socket.gethostname()}: " if several else ""
    if several and _is_lost_contact(error):
        time.sleep(GRACE)  # for the launcher, which knows which process died, to say so
        _leaving.set()
        reason = _first_line(error)
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
        say_error(f"{where}{_traceback_kept(error)}{type(error).__name__}: {_first_line(error)}")


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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". This is typically")[0]


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
    if _by_torchrun():
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().rstrip("\0").split("\0")
        if sys.orig_argv[-1] in words:  # else it has died, and this is the process that inherits orphans
            return words
    return ["srun", *sys.orig_argv] if launcher() == "srun" else sys.orig_argv


def device_name(device: torch.device) -> str:
    """What one process computes on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = torch.get_num_threads()
    return f"{cores} CPU core{'s' if cores > 1 else ''}"
