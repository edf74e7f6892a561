"""Processes: Fabric on the devices of every launcher."""

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.plugins.precision import DoublePrecision
from lightning.fabric.strategies import STRATEGY_REGISTRY, DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only

from launch import ending, fsdp
from launch.collectives import host_group
from launch.environments import FIRST_PROCESS, launcher, started_by_the_first_process
from launch.terminals import after
from options.errors import RunError, UsageError, in_one_line, say
from options.schema import Config

PATIENCE = 10.0
"""Seconds after which a start that waits for other processes says so."""
LONG = 5.0
"""Seconds after which whatever goes on says what it is."""


def quieten_libraries() -> None:
    """What they say of themselves is not for this program's users."""
    for name in ("lightning.fabric", "lightning.fabric.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*torch.jit.script")  # of torch's own forward-mode formulas


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
        fsdp.refuse_scaled_losses(
            os.environ.get("LT_PRECISION", config.precision) if by_fabric_run else config.precision
        )
        os.environ.pop("LT_STRATEGY", None)
        strategy = fsdp.Sharded(config.shard_modules, timedelta(minutes=config.timeout_minutes))
    share_cores()
    launched = launched_size()
    if not launched:
        refuse_too_many_processes(config)
        if config.num_nodes > 1 and not {"MASTER_ADDR", "NODE_RANK"} <= os.environ.keys():
            raise UsageError(
                f"--num_nodes={config.num_nodes}: start one `fabric run` or torchrun on every node, or use srun "
                "(docs/running.md, Launching)"
            )
    # Fabric would take a Mac's GPU, which has no float64.
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if by_fabric_run and os.environ.get("LT_ACCELERATOR", "auto") == "auto":
        os.environ["LT_ACCELERATOR"] = found
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
                accelerator={"auto": found, "gpu": "cuda"}.get(config.accelerator, config.accelerator),
                strategy=strategy,
                devices=devices,
                num_nodes=num_nodes,
                precision=precision,
                plugins=plugins,
            )
        ending.watch(fabric)
        if not by_fabric_run:
            with after(PATIENCE, _say_for_whom_it_waits), _naming_the_first_process():
                fabric.launch()
        if fabric.world_size > 1:
            host_group()
    except (RuntimeError, ValueError, TypeError, MisconfigurationException) as error:
        raise _not_started(config, error) from None
    ending.give_signs_of_life(fabric)
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
    reason = in_one_line(error)
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


@contextlib.contextmanager
def default_dtype(fabric: Fabric) -> Iterator[None]:
    """With `--precision=64-true` it is float64 inside: else Fabric hands the model's outputs back in float32."""
    before = torch.get_default_dtype()
    if fabric._precision.precision == "64-true":
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def device_name(device: torch.device) -> str:
    """What one process computes on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = torch.get_num_threads()
    return f"{cores} CPU core{'s' if cores > 1 else ''}"
