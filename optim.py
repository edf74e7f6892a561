"""Optimizers by name, AdaGrad-Norm, and learning-rate schedules."""

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from options.errors import UsageError
from options.names import import_object, nearest, unknown
from options.schema import Config

NAMES = {
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "sgdm": torch.optim.SGD,
}


class AdaGradNorm(torch.optim.Optimizer):
    """AdaGrad-Norm (Ward, Wu, Bottou, JMLR 21, 2020, algorithm 1): AdaGrad with one scalar for all parameters.

    b²_k = b²_{k−1} + ‖g_k‖² over all parameters of all groups, w_k = w_{k−1} − lr · g_k / b_k. The scalar is kept in
    float64 as `param_groups[0]["sum_of_squares"]`, so the state dict carries it.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        weight_decay: coefficient of the L2 penalty, added to the gradient.
        initial_accumulator_value: b²_0.
        eps: added to b_k.

    Raises:
        ValueError: a negative argument.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "eps": eps}
        for name, value in {**defaults, "initial_accumulator_value": initial_accumulator_value}.items():
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, not {value}")
        super().__init__(params, defaults)
        self.param_groups[0]["sum_of_squares"] = torch.tensor(initial_accumulator_value, dtype=torch.float64)

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [self._parameters_and_gradients(group) for group in self.param_groups]
        gradients = [gradient for _, group_gradients in groups for gradient in group_gradients]
        if not gradients:
            return loss
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(gradients)])
        total = self.param_groups[0]["sum_of_squares"].to(norms.device) + norms.square().sum()
        self.param_groups[0]["sum_of_squares"] = total
        for group, (parameters, group_gradients) in zip(self.param_groups, groups):
            # A tensor, not a number: reading it would make the host wait for the device.
            scale = -group["lr"] / (total.sqrt() + group["eps"])
            if parameters:
                torch._foreach_add_(parameters, torch._foreach_mul(group_gradients, scale))
        return loss

    @staticmethod
    def _parameters_and_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters]
        if group["weight_decay"] and parameters:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        return parameters, gradients


NAMES["adagradnorm"] = AdaGradNorm


def build(parameters: Iterable[Tensor], config: Config) -> torch.optim.Optimizer:
    """The optimizer that the options name.

    Raises:
        UsageError: an unknown name, or an argument that the optimizer does not take.
    """
    optimizer_class = _find_class(config.optimizer)
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
        raise UsageError(f"--optimizer={config.optimizer} is not a torch.optim.Optimizer class")
    accepted = inspect.signature(optimizer_class).parameters
    arguments: dict[str, Any] = {"lr": config.learning_rate}
    if config.optimizer == "sgdm":
        arguments |= {"momentum": 0.9, "weight_decay": 5e-4}
    if "betas" in accepted:
        arguments["betas"] = (config.beta1, config.beta2)
    for name in ("momentum", "weight_decay"):
        if getattr(config, name) is not None:
            arguments[name] = getattr(config, name)
    arguments |= config.optimizer_args
    for name in arguments:
        if name not in accepted:
            option = name if hasattr(config, name) else f"optimizer_args.{name}"
            raise UsageError(f"--{option}: {config.optimizer} takes no '{name}'{nearest(name, list(accepted))}")
    try:
        _try_out(lambda toy: optimizer_class(toy, **arguments))
        return optimizer_class(parameters, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(
            f"--optimizer={config.optimizer} cannot be used with {arguments}: choose other values or another one "
            f"({reason})"
        ) from None


def bytes_of_state_to_come(optimizer: torch.optim.Optimizer, config: Config) -> int:
    """What the optimizer will keep beside each parameter from its first step on [bytes].

    As many times a parameter's size as a step of such an optimizer keeps for a small one.
    """
    kept = [
        value for value in _try_out(lambda toy: build(toy, config)).values() if torch.is_tensor(value) and value.dim()
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)]
    own = (parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in parameters)
    return len(kept) * sum(part.numel() * part.element_size() for part in own)


def is_adaptive(optimizer: torch.optim.Optimizer) -> bool:
    """It divides by the gradient's size, as Adam and AdaGrad do: all but SGD and its average."""
    return not isinstance(optimizer, (torch.optim.SGD, torch.optim.ASGD))


def _try_out(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> dict[str, Any]:
    """One step on a toy: some optimizers take no dense gradients, or want a closure that recomputes the loss.

    Gives what the optimizer keeps beside the toy's parameter.
    """
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    optimizer = make([parameter])
    optimizer.step()
    return optimizer.state[parameter]


def _find_class(name: str) -> type[torch.optim.Optimizer]:
    if ":" in name:
        return import_object("optimizer", name)
    available = NAMES | {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and key != "Optimizer"
    }
    if name not in available:
        raise UsageError(unknown("optimizer", name))
    return available[name]


def cosine(progress: float) -> float:
    """Falls from 1 to 0 along half a cosine as `progress` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """Falls from 1 to 0 along a line as `progress` goes from 0 to 1."""
    return 1 - progress


def multistep(position: int, learning_rate: float, milestones: list[int], gamma: float, min_lr: float = 0.0) -> float:
    """`learning_rate` times `gamma` for every milestone reached, but not below `min_lr`."""
    return max(min_lr, learning_rate * gamma ** bisect_right(milestones, position))


def rising(position: int, learning_rate: float, warmup: int, first: int = 0) -> float:
    """`learning_rate` · min(1, max(`position`, `first`) / `warmup`): a ladder from 0 to `learning_rate` at `warmup`.

    As published, `first` is 0, and the first step, at position 0, changes nothing: its batch is wasted. With the size
    of the first batch (1, where steps are counted) the first step has the first rung, as the second one has it.
    """
    return learning_rate * min(1.0, max(position, first) / warmup)


def warmup_decay(position: int, learning_rate: float, warmup: int, end: int, min_lr: float, shape=cosine) -> float:
    """Rises linearly from 0 to `learning_rate` at `warmup`, falls along `shape` to `min_lr` at `end`, stays there."""
    if position < warmup:
        return rising(position, learning_rate, warmup)
    if position >= end:
        return min_lr
    return min_lr + shape((position - warmup) / (end - warmup)) * (learning_rate - min_lr)


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of a step, a pure function of the samples and the steps done before it."""

    config: Config
    max_samples: int

    def zero_from(self) -> int | None:
        """Where the decay ends at 0 [samples or steps, as `lr_decay_type` says]; None where it does not."""
        c = self.config
        if not c.decay_lr or c.scheduler == "multistep" or c.min_lr > 0:
            return None
        return (
            (c.lr_decay_samples or self.max_samples) if c.lr_decay_type == "sample" else c.lr_decay_iters or c.max_iters
        )

    def idle_end(self) -> str:
        """A longer continuation keeps the schedule, which may come to 0 before its end: a warning, or nothing."""
        c, end = self.config, self.zero_from()
        length = c.max_samples if c.training_type == "sample" else c.max_iters
        if end is None or c.lr_decay_type != c.training_type or end >= length:
            return ""
        unit = {"sample": "sample", "iter": "step"}[c.lr_decay_type]
        return (
            f"the learning rate is 0 from {unit} {end:,} on: a continuation keeps the schedule; "
            "for a longer one start a new run"
        )

    def decay(self, samples: int) -> float:
        """The schedule's rate over its peak, 1 before the decay begins; where the schedule counts samples."""
        return self.schedule(samples, 0) / self.config.learning_rate if samples > self.config.warmup_samples else 1.0

    def __call__(self, samples: int, steps: int, factor: float = 1.0) -> float:
        """The schedule times `factor`, which follows the batch size; never above `max_lr`."""
        rate = self.schedule(samples, steps) * factor
        return rate if self.config.max_lr is None else min(rate, self.config.max_lr)

    def schedule(self, samples: int, steps: int) -> float:
        """As if the batch size did not change."""
        c = self.config
        if not c.decay_lr:
            return c.learning_rate
        if c.lr_decay_type == "sample":
            position, warmup, end, batch = (
                samples,
                c.warmup_samples,
                c.lr_decay_samples or self.max_samples,
                c.batch_size,
            )
        else:
            position, warmup, end, batch = steps, c.warmup_iters, c.lr_decay_iters or c.max_iters, 1
        if position < warmup:
            return rising(position, c.learning_rate, warmup, first=batch)
        if c.scheduler == "multistep":
            return multistep(position, c.learning_rate, c.milestones, c.gamma, c.min_lr)
        return warmup_decay(
            position, c.learning_rate, warmup, end, c.min_lr, {"cosine": cosine, "linear": linear}[c.scheduler]
        )


def lay_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """What it keeps of a parameter, in the parameter's order in memory: a checkpoint may have another one."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
