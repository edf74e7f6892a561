"""Processes and devices: Fabric under every launcher, and refusing something on all ranks at once."""

import contextlib
import os
import re
from collections.abc import Callable

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment

from config import Config, RankError, UsageError


def start_fabric(config: Config) -> Fabric:
    """Fabric on the devices of the launcher (`fabric run`, torchrun, srun) or, without one, on those of the options.

    Raises:
        UsageError: there are no such devices.
    """
    by_fabric_run = bool(os.environ.get("LT_CLI_USED"))  # then Fabric itself reads what the launcher set
    strategy = os.environ.get("LT_STRATEGY", "auto") if by_fabric_run else config.strategy
    if strategy not in ("auto", "ddp", "ddp_find_unused_parameters_true"):  # the launcher takes any
        raise UsageError(f"--strategy={strategy} is not supported: whole gradients are needed; choose auto or ddp")
    launched = launched_size()
    if not (by_fabric_run or launched):
        refuse_too_many_processes(config)
    try:
        if by_fabric_run:
            return Fabric()
        devices, num_nodes = launched or (config.devices, config.num_nodes)
        fabric = Fabric(
            accelerator=config.accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=num_nodes,
            precision=config.precision,
        )
        fabric.launch()
        return fabric
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--accelerator={config.accelerator} --devices={config.devices}: {reason}") from None


def refuse_too_many_processes(config: Config) -> None:
    """More CPU processes than cores work, and serve tests; so many that the machine comes to a stop are a mistake."""
    most = 8 * (os.cpu_count() or 1)
    on_cpu = config.accelerator == "cpu" or (config.accelerator == "auto" and not torch.cuda.is_available())
    if on_cpu and isinstance(config.devices, int) and config.devices > most:
        raise UsageError(f"--devices={config.devices}: on the {os.cpu_count()} CPU cores here use at most {most}")


def launched_size() -> tuple[int, int] | None:
    """Processes a node and nodes, where torchrun or srun has started this process; None where nothing has."""
    env = os.environ
    if "LOCAL_WORLD_SIZE" in env:
        return int(env["LOCAL_WORLD_SIZE"]), int(env["WORLD_SIZE"]) // int(env["LOCAL_WORLD_SIZE"])
    if SLURMEnvironment.detect():
        tasks = int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]))
        nodes = int(env.get("SLURM_STEP_NUM_NODES", env["SLURM_NNODES"]))
        env["SLURM_NTASKS"], env["SLURM_NTASKS_PER_NODE"] = str(tasks), str(tasks // nodes)  # Fabric insists on both
        return tasks // nodes, nodes
    return None


def together(fabric: Fabric, function: Callable):
    """Call on every rank; where one is refused, all are, with the same words, so that none is left waiting."""
    result, problem = None, ""
    try:
        result = function()
    except UsageError as error:
        problem = str(error)
    problems = [problem]
    if fabric.world_size > 1:
        problems = [None] * fabric.world_size
        dist.all_gather_object(problems, problem)
    for problem in filter(None, problems):
        raise UsageError(problem)
    return result


@contextlib.contextmanager
def ending_together(fabric: Fabric):
    """Where one rank ends in the middle of the run, those that wait for it end, too, and without a traceback.

    Raises:
        UsageError: this rank cannot read a sample, a process that reads for it was ended, or another rank has ended.
    """
    try:
        yield
        return
    except RankError as error:
        refusal = error
    except RuntimeError as error:
        if re.search("(closed|reset) by peer|remote process exited", str(error)):
            raise UsageError("another process of this run has ended; what it said tells why") from None
        if "DataLoader worker" not in str(error):
            raise
        remedy = "where memory or shared memory (/dev/shm) ran out, take fewer --num_workers or a smaller --batch_ahead"
        refusal = RankError(f"--num_workers: {' '.join(str(error).split())} ({remedy})")
    if dist.is_initialized() and "nccl" in dist.get_backend():  # the others would wait; gloo tells them
        for process in getattr(fabric.strategy.launcher, "procs", []):  # other launchers see to that themselves
            process.kill()
    raise refusal from None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
