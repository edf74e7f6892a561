"""What each rank saves of itself, and what it is restored to: random states, buffers, totals since the last row."""

from collections.abc import Sequence
from typing import Any

import torch

from adadagrad.gradients.isolation import random_states, set_random_states
from training.metrics import Totals


def state_of_rank(module: torch.nn.Module, totals: Totals, device: torch.device) -> dict[str, Any]:
    """What differs between ranks, as plain values: random states, buffers, totals since the last row."""
    return {
        "random": random_states(device),
        "buffers": {name: buffer.cpu() for name, buffer in module.named_buffers()},
        "totals": totals.state_dict(),
    }


def restore_rank(
    ranks: Sequence[dict[str, Any]],
    rank: int,
    world_size: int,
    module: torch.nn.Module,
    totals: Totals,
    device: torch.device,
    new_seed: int,
) -> None:
    """Bring a rank to what `state_of_rank` gave: its own, or on another number of ranks what follows for all of them.

    Args:
        ranks: what each of the ranks saved.
        new_seed: on another number of ranks, from which random numbers are drawn that no rank has drawn before.
    """
    if len(ranks) == world_size:
        own = ranks[rank]
        set_random_states(own["random"], device)
    else:
        own = pooled(ranks, rank)
        torch.manual_seed(new_seed)
    buffers = dict(module.named_buffers())
    for name, value in own["buffers"].items():
        buffers[name].copy_(value)
    totals.load_state_dict(own["totals"])


def pooled(ranks: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
    """A rank's own part for a continuation on another number of ranks: mean buffers; the first rank counts for all."""
    buffers = {
        name: torch.stack([other["buffers"][name] for other in ranks]).mean(0) if value.is_floating_point() else value
        for name, value in ranks[0]["buffers"].items()
    }
    totals, all_totals = ranks[0]["totals"], [other["totals"] for other in ranks]
    sums = sum(other["sums"] for other in all_totals) * (rank == 0)
    not_finite_at = torch.stack([other["not_finite_at"] for other in all_totals]).min()
    return {"buffers": buffers, "totals": {**totals, "sums": sums, "not_finite_at": not_finite_at}}
