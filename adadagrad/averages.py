"""Averages of the weights along the training: they take out the noise of the steps, as a falling rate would."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .control.carry_over import local


class WeightAverage:
    """Exponential average of the parameters, whose half-life is in samples, whatever the batches are.

    A step on b samples counts 1 − 2^(−b/h); at the start, when there are fewer samples than that takes, b of all: then
    it is their plain mean, and nothing is left of the weights before the first step. With a half-life that is a share
    of the samples so far the average is at every moment one over the same part of the run: early on it does not lag
    behind, later it takes out more of the noise (Karras et al., arXiv:2312.02696, section 3.1). Floating-point buffers
    (BatchNorm's running statistics) are averaged likewise: they belong to the weights of their steps. (torch's own
    `swa_utils.AveragedModel` has a copy of the network, which shards, wrappers and compiled graphs do not know of.)

    Args:
        module: whose parameters are averaged, in float32 at least; of shards, those of this rank.
        half_life: h [samples]; below 1: in samples so far.

    Attributes:
        buffers: the averages of the module's buffers, of this rank's.

    Raises:
        ValueError: the half-life is not positive.
    """

    def __init__(self, module: nn.Module, half_life: float):
        if not half_life > 0:
            raise ValueError(f"half_life={half_life}: a number of samples, or below 1 a share of those so far")
        self.half_life, self.samples = half_life, 0
        self.parameters = list(module.parameters())
        self.of_buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self.averages, self.buffers = map(_wide_copies, (self.parameters, self.of_buffers))

    @torch.no_grad()
    def update(self, batch_size: int) -> None:
        """After the optimizer's step on a batch of this size."""
        self.samples += batch_size
        half_life = self.half_life if self.half_life >= 1 else self.half_life * self.samples
        share = max(1 - 2 ** (-batch_size / half_life), batch_size / self.samples)
        averages = list(map(local, self._averages))
        now = [local(own.detach()).to(average.dtype) for own, average in zip(self._values, averages)]
        torch._foreach_lerp_(averages, now, share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the network has the averages for its weights; afterwards its own, bit for bit."""
        values = [local(value.detach()) for value in self._values]
        own = [value.clone() for value in values]
        with torch.no_grad():
            if self.samples:
                torch._foreach_copy_(values, list(map(local, self._averages)))
            try:
                yield
            finally:
                torch._foreach_copy_(values, own)

    @property
    def _values(self) -> list[Tensor]:
        return [*self.parameters, *self.of_buffers]

    @property
    def _averages(self) -> list[Tensor]:
        return [*self.averages, *self.buffers]

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors: to be called on all ranks. The buffers' averages are those of this rank."""
        whole = [own.full_tensor().cpu() if isinstance(own, DTensor) else own for own in self.averages]
        return {"averages": whole, "buffers": self.buffers, "samples": self.samples}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own, saved in zip(self.averages, state["averages"], strict=True):
            if isinstance(own, DTensor):
                saved = distribute_tensor(saved.to(own.device), own.device_mesh, own.placements)
            own.copy_(saved)
        for own, saved in zip(self.buffers, state.get("buffers", self.buffers), strict=True):  # earlier states: none
            own.copy_(saved)
        self.samples = state["samples"]


def _wide_copies(tensors: list[Tensor]) -> list[Tensor]:
    return [own.detach().to(torch.promote_types(own.dtype, torch.float32), copy=True) for own in tensors]
