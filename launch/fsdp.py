"""`--strategy=fsdp`: parameters, gradients and optimizer states are sharded over the processes (PyTorch's FSDP2).

Every process keeps its shard of each parameter; a block of layers is gathered when it is needed. Torch and Fabric do
all of it; here is which blocks are gathered together, and what a run saves: whole tensors, so that a checkpoint depends
neither on the strategy nor on the number of processes.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from options.errors import UsageError

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Sharded(ModelParallelStrategy):
    """Fabric's strategy, over all processes and nothing else.

    Args:
        shard_modules: names of the classes whose modules are gathered one at a time; none: see `blocks`.
        timeout: of an exchange.
    """

    def __init__(self, shard_modules: Sequence[str] = (), timeout: timedelta = timedelta(minutes=10)):
        super().__init__(partial(shard, shard_modules=shard_modules), tensor_parallel_size=1, timeout=timeout)

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size = self.world_size  # known only now; "auto" would be the number of machines


def shard(module: nn.Module, device_mesh: Any, shard_modules: Sequence[str] = ()) -> nn.Module:
    """Share out the module's parameters, in place."""
    mesh = device_mesh["data_parallel"]
    for block in blocks(module, shard_modules):
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def blocks(module: nn.Module, names: Sequence[str] = ()) -> list[nn.Module]:
    """What is gathered at a time: the modules of these classes; of no names, the outermost that a module repeats.

    Raises:
        UsageError: there is no module of a class.
    """
    if names:
        found = [part for part in module.modules() if type(part).__name__ in names]
        if missing := set(names) - {type(part).__name__ for part in found}:
            known = sorted({type(part).__name__ for part in module.modules()} - {type(module).__name__})
            raise UsageError(
                f"--shard_modules: the model has no {', '.join(sorted(missing))}: it has {', '.join(known)}"
            )
        return [part for part in found if part is not module]
    counts, found = Counter(type(child) for child in module.children()), []
    for child in module.children():
        is_block = (
            counts[type(child)] > 1 and any(True for _ in child.children()) and any(True for _ in child.parameters())
        )
        found += [child] if is_block else blocks(child)
    return found


def is_sharded(module: nn.Module) -> bool:
    """Its parameters are shards."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@contextlib.contextmanager
def forward_only(module: nn.Module) -> Iterator[None]:
    """Forward passes that no backward pass follows: they leave the outermost block whole, this puts it away."""
    try:
        yield
    finally:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def refuse_scaled_losses(precision: str) -> None:
    """Before Fabric is asked, which does not say whose fault it is.

    Raises:
        UsageError: the options do not go with shards.
    """
    if precision == "16-mixed":
        raise UsageError("--strategy=fsdp: --precision=16-mixed scales the loss: take bf16-mixed, or --strategy=ddp")


def refuse_what_needs_whole_tensors(module: nn.Module, compiled: bool) -> None:
    """
    Raises:
        UsageError: the options do not go with shards.
    """
    reason = ""
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules()):
        reason = "the model has BatchNorm, whose statistics need a pass of the test's own: take --strategy=ddp"
    elif compiled:
        reason = "leave --compile out, or take --strategy=ddp"
    if reason:
        raise UsageError(f"--strategy=fsdp: {reason}")


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's state with whole tensors: on the first rank; others may get nothing. On all ranks."""
    return get_model_state_dict(module, options=WHOLE) if is_sharded(module) else module.state_dict()


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Model and optimizer as one process without shards would save them; whole on the first rank. On all ranks."""
    by_name = get_optimizer_state_dict(module, optimizer, options=WHOLE)
    groups = by_name.get("param_groups", [])  # the other ranks get nothing
    numbers = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "model": get_model_state_dict(module, options=WHOLE),
        "optimizer": {
            "state": {numbers[name]: state for name, state in by_name.get("state", {}).items()},
            "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
        },
    }


def load_whole_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The other way round, from what every rank has read."""
    name_of = {parameter: name for name, parameter in module.named_parameters()}
    names = [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    saved = state["optimizer"]
    by_name = {
        "state": {names[number]: own for number, own in saved["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in saved["param_groups"]
        ],
    }
    for parameter in [parameter for parameter, own in optimizer.state.items() if not own]:
        del optimizer.state[parameter]  # of an optimizer that has only looked; torch takes it to be initialised
    set_model_state_dict(module, state["model"], options=WHOLE)
    set_optimizer_state_dict(module, optimizer, by_name, options=WHOLE)
