"""A `Transition` applied to an optimizer of torch.optim's kind: its state in place, the values of its groups.

What was changed is part of the optimizer's own state dict, so that a run that goes on from a checkpoint is the same.
Shards are multiplied where they are; nothing is exchanged between processes.
"""

from typing import Any

import torch
from torch import Tensor

from .transition import DECOUPLED, FAMILIES, Family, Transition

NOT_KNOWN = "{} is not a known optimizer: its learning rate follows the batch size, its state does not"


def parts(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that it is made of, or itself."""
    return getattr(optimizer, "optimizers", [optimizer])


def family(optimizer: torch.optim.Optimizer) -> Family | None:
    """What an optimizer does with gradients; None where it is not known: then its rate alone can follow.

    Of several that are one (`optimizers`), the family that a rate for all of them follows: the first one's.
    """
    names = _names(parts(optimizer)[0])
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)


def decays_apart(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups whose weight decay is decoupled from the gradient (`Transition.decay`)."""
    return [
        group
        for part in parts(optimizer)
        for group in part.param_groups
        if group.get("decoupled_weight_decay") or DECOUPLED & set(_names(part))
    ]


def prepare(optimizer: torch.optim.Optimizer) -> None:
    """Every group keeps the values at b₀ from which those for other sizes are computed.

    `apply` does it, too; before a state dict is loaded into shards, torch wants the groups to have the same names.
    """
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group.setdefault("initial_weight_decay", group["weight_decay"])
        if "betas" in group or "alpha" in group:
            group.setdefault("initial_beta2", group["betas"][1] if "betas" in group else group["alpha"])


@torch.no_grad()
def apply(transition: Transition, optimizer: torch.optim.Optimizer) -> None:
    """The state as if the batch had had its new size before; ε and β₂ along. Rate and decay are set at every step.

    An optimizer of no known family is left as it is. On all ranks alike.
    """
    if transition.before == transition.after:  # a branch of the same size is the run itself
        return
    prepare(optimizer)
    for part in parts(optimizer):
        kind = family(part)
        if kind is None:
            continue
        factors = transition.states(kind)
        for group in part.param_groups:
            for parameter in group["params"]:
                _follow(part.state.get(parameter, {}), factors, transition.growth)
            if "sum_of_squares" in group:  # AdaGrad-Norm's, one for all parameters
                group["sum_of_squares"] = group["sum_of_squares"] * factors["sum"]
            if isinstance(group.get("eps"), float):
                group["eps"] *= transition.eps(kind)
            if kind is Family.AVERAGE:
                _change_second_beta(part, group, transition)


def _follow(state: dict[str, Any], factors: dict[str, float], growth: float) -> None:
    for name, value in state.items():
        if name == "square_avg" and "grad_avg" in state:  # centred: squares stay above the square of the mean
            mean, squares = local(state["grad_avg"]), local(value)
            squares.addcmul_(mean, mean, value=-1).div_(growth).addcmul_(mean, mean)
        elif name in factors and isinstance(value, Tensor):
            local(value).mul_(factors[name])


def _change_second_beta(optimizer: torch.optim.Optimizer, group: dict[str, Any], transition: Transition) -> None:
    """β₂ for the new size, and a second moment that has no bias with it."""
    if "betas" not in group:
        if "alpha" in group:  # RMSprop's, which corrects no bias
            group["alpha"] = transition.second_beta(group["initial_beta2"])
        return
    first, old = group["betas"]
    if isinstance(old, Tensor):
        return
    new = transition.second_beta(group["initial_beta2"])
    group["betas"] = (first, new)
    if new == old:
        return
    for parameter in group["params"]:
        state = optimizer.state.get(parameter, {})
        # The sum of the weights of all squares so far is 1 − β₂^step, and steps will go on to divide by that of the
        # new β₂. (A step that a gradient scaler left out is counted back to 0.)
        step = torch.as_tensor(local(state["step"])).double().clamp(min=1) if "step" in state else None
        for name in ("exp_avg_sq", "max_exp_avg_sq"):
            if name in state:
                local(state[name]).mul_((1 - new**step) / (1 - old**step))


def _names(optimizer: torch.optim.Optimizer) -> list[str]:
    return [kind.__name__ for kind in type(optimizer).__mro__]


def local(value: Any) -> Any:
    """A rank's own part of a sharded tensor."""
    return value.to_local() if hasattr(value, "to_local") else value
