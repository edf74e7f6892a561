"""Optimizers by name and their groups, AdaGrad-Norm, and learning-rate schedules."""

import inspect
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.control import carry_over
from adadagrad.gradients.estimator import listed
from options.errors import UsageError, in_one_line
from options.names import import_object, nearest, unknown
from options.schema import Config

NAMES = {
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "muon": torch.optim.Muon,
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


class Joined(torch.optim.Optimizer):
    """Several optimizers for different parameters as one: one state dict, one list of groups, one step.

    Args:
        optimizers: at least one; their groups and states are shared from here on.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self.optimizers = list(optimizers)
        super().__init__([group for part in optimizers for group in part.param_groups], {})
        for part in optimizers:
            self.state.update(part.state)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What a loaded state dict or a copy comes through."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        first = 0
        for part in self.optimizers:
            last = first + len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[first:last]
            first = last

    @torch.no_grad()
    def step(self, closure=None):
        """One step of each; returns the closure's loss where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.optimizers:
            part.step()
        return loss


def build(model: nn.Module | Iterable[Tensor], config: Config) -> torch.optim.Optimizer:
    """The optimizer that the options name, over the model's parameters in the groups that they ask for.

    Args:
        model: or its parameters alone, which have numbers for names.

    Raises:
        UsageError: an unknown name, or an argument that the optimizer does not take; groups that the model has not.
    """
    chosen = _chosen(config)
    for kind, arguments in chosen:
        _refuse_arguments(kind, arguments, config)
    arguments = dict(chosen[0][1])
    module = model if isinstance(model, nn.Module) else nn.ParameterList(model)
    device = next((parameter.device for parameter in module.parameters()), None)
    try:
        for kind, own in chosen:
            _try_out(kind, own, device)
        shares = _split(module, config)
        optimizers = [kind(share, **own) for (kind, own), share in zip(chosen, shares, strict=True)]
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--optimizer={config.optimizer} cannot be used with {arguments}: choose other values or another one "
            f"({in_one_line(error)})"
        ) from None
    optimizer = optimizers[0] if len(optimizers) == 1 else Joined(optimizers)
    for group in optimizer.param_groups:
        group["lr_factor"] = float(group["lr"]) / config.learning_rate
    carry_over.prepare(optimizer)
    return optimizer


def _chosen(config: Config) -> list[tuple[type[torch.optim.Optimizer], dict[str, Any]]]:
    """The classes that make the optimizer, and what each is called with."""
    kind = _find_class(config.optimizer)
    if is_muon(config):
        # Updates of the size of AdamW's, so that one rate and one decay serve both (arXiv:2502.16982, section 2.2).
        shared = {
            "lr": config.learning_rate,
            "weight_decay": 0.1 if config.weight_decay is None else config.weight_decay,
        }
        momentum = {} if config.momentum is None else {"momentum": config.momentum}
        as_long_as_adamws = {"adjust_lr_fn": "match_rms_adamw"} if "adjust_lr_fn" in _accepted(kind) else {}
        muon = {**shared, **as_long_as_adamws, **momentum, **config.optimizer_args}
        return [(kind, muon), (torch.optim.AdamW, {**shared, "betas": (config.beta1, config.beta2)})]
    arguments: dict[str, Any] = {"lr": config.learning_rate}
    if config.optimizer == "sgdm":
        arguments |= {"momentum": 0.9, "weight_decay": 5e-4}
    if "betas" in _accepted(kind):
        arguments["betas"] = (config.beta1, config.beta2)
    for name in ("momentum", "weight_decay"):
        if getattr(config, name) is not None:
            arguments[name] = getattr(config, name)
    return [(kind, arguments | config.optimizer_args)]


def _accepted(kind: type[torch.optim.Optimizer]) -> list[str]:
    """Arguments that it takes; those of its bases, too, as far as it hands on what it does not name."""
    accepted: list[str] = []
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            accepted += [own.name for own in parameters if own.kind not in (own.VAR_KEYWORD, own.VAR_POSITIONAL)]
            if not any(own.kind == own.VAR_KEYWORD for own in parameters):
                break
    return [name for name in dict.fromkeys(accepted) if name != "self"]


def _refuse_arguments(kind: type[torch.optim.Optimizer], arguments: dict[str, Any], config: Config) -> None:
    accepted = _accepted(kind)
    for name in arguments:
        if name not in accepted:
            option = name if hasattr(config, name) else f"optimizer_args.{name}"
            raise UsageError(f"--{option}: {config.optimizer} takes no '{name}'{nearest(name, list(accepted))}")
    if config.no_weight_decay and "weight_decay" not in accepted:
        raise UsageError(f"--no_weight_decay: {config.optimizer} has no weight decay: leave --no_weight_decay out")


def _split(model: nn.Module, config: Config) -> list[list[Any]]:
    """What each of the classes gets: parameters, or groups of them where options ask for groups."""
    splits = is_muon(config)
    if not (splits or config.lr_factors or config.no_weight_decay):
        return [list(model.parameters())]
    matrices = _hidden_matrices(model) if splits else set()
    if splits and not matrices:
        raise UsageError(
            f"--optimizer={config.optimizer}: the model has no hidden layer with a matrix of weights: take adamw"
        )
    exempt, groups, matched = set(config.without_weight_decay), {}, set()
    for name, parameter, kinds in _named_with_kinds(model):
        factors = [pattern for pattern in config.lr_factors if _matches(name, pattern)]
        matched.update(factors)
        factor = math.prod(config.lr_factors[pattern] for pattern in factors)
        key = (parameter in matrices, factor, bool(exempt & kinds))
        groups.setdefault(key, []).append(parameter)
    for pattern in config.lr_factors:
        if pattern not in matched:
            names = [name for name, _ in model.named_children()]
            raise UsageError(f"--lr_factors: the model has no parameter '{pattern}'{nearest(pattern, names)}")
    shares: dict[bool, list[dict[str, Any]]] = {is_matrix: [] for is_matrix in ([True, False] if matrices else [False])}
    for (is_matrix, factor, is_exempt), parameters in groups.items():
        own = {"weight_decay": 0.0} if is_exempt else {}
        shares[is_matrix].append({"params": parameters, "lr": factor * config.learning_rate, **own})
    return list(shares.values())


def _named_with_kinds(model: nn.Module) -> Iterator[tuple[str, Tensor, set[str]]]:
    """Every parameter once, in the model's order: its name, and of bias, norm and embedding what it is."""
    seen = set()
    for path, owner in model.named_modules():
        kinds = {"norm"} if "norm" in type(owner).__name__.lower() else set()
        kinds |= {"embedding"} if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) else set()
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield f"{path}.{name}".lstrip("."), parameter, kinds | ({"bias"} if "bias" in name else set())


def _hidden_matrices(model: nn.Module) -> set[Tensor]:
    """Weights of layers with rows and columns, of all but the embeddings and the output layer, which is the last of
    them. (A table of positions, say, is a parameter without a layer.)"""
    found = [
        (parameter, "embedding" in kinds)
        for name, parameter, kinds in _named_with_kinds(model)
        if parameter.dim() == 2 and "." in name and name.endswith("weight")
    ]
    tied = any(
        isinstance(owner, nn.Linear) and any(owner.weight is parameter for parameter, embeds in found if embeds)
        for owner in model.modules()
    )
    matrices = [parameter for parameter, embeds in found if not embeds]
    return set(matrices if tied else matrices[:-1])  # a tied output layer is among the embeddings


def is_muon(config: Config) -> bool:
    """Or a kind of it: for the matrices of hidden layers alone."""
    return issubclass(_find_class(config.optimizer), torch.optim.Muon)


def of_muon(model: nn.Module) -> str:
    """Which matrices it takes, in a line for the user."""
    own = _hidden_matrices(model)
    named = [(name, parameter) for name, parameter, _ in _named_with_kinds(model) if parameter.dim() == 2]
    taken = [name for name, parameter in named if parameter in own]
    others = [name for name, parameter in named if parameter not in own]
    return f"muon takes {len(taken)} matrices ({listed(taken)}); AdamW takes all else, {listed(others)} among it"


def _matches(name: str, pattern: str) -> bool:
    """A parameter's name, or that of a module around it, is of the pattern (`*`, `?` as in file names)."""
    paths = accumulate(name.split("."), "{}.{}".format)
    return any(fnmatchcase(path, pattern) for path in paths)


def set_training(optimizer: torch.optim.Optimizer, training: bool) -> None:
    """With the model's train() and eval(): schedule-free optimizers keep other weights for training than for use."""
    for part in carry_over.parts(optimizer):
        if mode := getattr(part, "train" if training else "eval", None):
            mode()


def averages_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """It keeps other weights for use than for training: schedule-free ones do."""
    return any(hasattr(part, "eval") for part in carry_over.parts(optimizer))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, decay: float = 1.0) -> None:
    """For the next step. Groups keep the proportions that they were built with.

    Args:
        rate: of a group whose rate was the optimizer's own.
        decay: factor on decoupled weight decay, which follows the batch size (`control.Controller.decay_factor`).
    """
    for group in optimizer.param_groups:
        value = rate * group.setdefault("lr_factor", 1.0)
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
    if not any(group.get("weight_decay") for group in optimizer.param_groups):
        return
    for group in carry_over.decays_apart(optimizer):
        group["weight_decay"] = decay * group.setdefault("initial_weight_decay", group["weight_decay"])


def bytes_of_state_to_come(optimizer: torch.optim.Optimizer, config: Config) -> int:
    """What the optimizer will keep beside each parameter from its first step on [bytes].

    As many times a parameter's size as a step of such an optimizer keeps for a small one.
    """
    total = 0
    for part, (kind, arguments) in zip(carry_over.parts(optimizer), _chosen(config), strict=True):
        state = _try_out(kind, arguments)
        kept = [value for value in state.values() if torch.is_tensor(value) and value.dim()]
        parameters = [p for group in part.param_groups for p in group["params"] if not optimizer.state.get(p)]
        own = (carry_over.local(parameter) for parameter in parameters)
        total += len(kept) * sum(share.numel() * share.element_size() for share in own)
    return total


def is_adaptive(optimizer: torch.optim.Optimizer) -> bool:
    """It divides by the gradient's size, as Adam and AdaGrad do: all but SGD and its average."""
    return not isinstance(optimizer, (torch.optim.SGD, torch.optim.ASGD))


def _try_out(
    kind: type[torch.optim.Optimizer], arguments: dict[str, Any], device: torch.device | None = None
) -> dict[str, Any]:
    """One step on a toy: some optimizers take no dense gradients, or want a closure that recomputes the loss.

    Gives what the optimizer keeps beside the toy's parameter.

    Args:
        device: of the toy; some arguments (capturable) are for GPUs alone.
    """
    device = device if device and device.type == "cuda" else None
    parameter = nn.Parameter(torch.ones(2, 2, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = kind([parameter], **arguments)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure and closure.default is inspect.Parameter.empty:
        raise ValueError("it wants a closure that computes the loss again, and a step here computes it once")
    set_training(optimizer, True)
    optimizer.step()
    return optimizer.state[parameter]


def _find_class(name: str) -> type[torch.optim.Optimizer]:
    if ":" in name:
        kind = import_object("optimizer", name)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise UsageError(f"--optimizer={name} is not a torch.optim.Optimizer class")
        return kind
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
