"""Averages of the weights along the training: what a batch that stays small needs in the place of a falling rate."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class WeightAverage:
    """Exponential average of the parameters, whose half-life is in samples, whatever the batches are.

    A step on b samples counts 1 − 2^(−b/h); at the start, when there are fewer samples than that takes, b of all: then
    it is their plain mean, and nothing is left of the weights before the first step. (torch's own
    `swa_utils.AveragedModel` has a copy of the network, which shards, wrappers and compiled graphs do not know of.)

    Args:
        parameters: of the network; they are averaged in float32 at least.
        half_life: h [samples].
    """

    def __init__(self, parameters: Iterable[Tensor], half_life: float):
        self.parameters, self.half_life, self.samples = list(parameters), half_life, 0
        wide = (torch.promote_types(own.dtype, torch.float32) for own in self.parameters)
        self.averages = [own.detach().to(dtype, copy=True) for own, dtype in zip(self.parameters, wide)]

    @torch.no_grad()
    def update(self, batch_size: int) -> None:
        """After the optimizer's step on a batch of this size."""
        self.samples += batch_size
        share = max(1 - 2 ** (-batch_size / self.half_life), batch_size / self.samples)
        now = [own.detach().to(average.dtype) for own, average in zip(self.parameters, self.averages)]
        torch._foreach_lerp_(self.averages, now, share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the network has the averages for its weights; afterwards its own, bit for bit."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            if self.samples:
                torch._foreach_copy_(self.parameters, self.averages)
            try:
                yield
            finally:
                torch._foreach_copy_(self.parameters, own)

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages, "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for average, saved in zip(self.averages, state["averages"], strict=True):
                average.copy_(saved)
        self.samples = state["samples"]
