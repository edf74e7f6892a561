"""What each rank saves of itself, and what it is restored to: random states, buffers, totals since the last row."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from training.metrics import Totals


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of all random number generators of this process, as plain values."""
    version, words, gauss = random.getstate()
    name, key, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, list(words), gauss],
        "numpy": [name, key.tolist(), *rest],
    }


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    version, words, gauss = states["python"]
    name, key, *rest = states["numpy"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((name, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)


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
