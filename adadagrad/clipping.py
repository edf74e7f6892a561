"""Clipping the gradient of a batch at a norm: a given one, or one that follows the run's own."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .control.carry_over import local

TIMES = 2.0
"""Of the mean norm, where the bound follows it."""
MEMORY = 16
"""Steps over which the mean is taken, about."""
FIRST = 4
"""Steps that are not clipped: before them there is no mean to speak of."""
ROW, MANY = 8, 0.6
"""Steps are as long as the curvature allows where this share of about the last eight was clipped."""
STATE = ("mean", "seen", "recent", "in_a_row")


class Clipping:
    """The norm of a batch's gradient, over all parameters, is made no larger than a bound.

    `auto`: twice the mean of the norms before, each as it was clipped, over about the last sixteen steps; not in the
    first four. Norms of one run differ little from step to step; what is twice as large is the start of an instability,
    as of a rate that is too high for the curvature, or a few bad samples. As the mean goes on with the clipped norms,
    the bound can double within a dozen steps where the norms really grow. All of it stays on the device.

    Args:
        bound: the largest norm, or `auto`.
        device: of the parameters; default: the CPU.

    Attributes:
        in_a_row: bool (), on the device: with `auto`, most of some eight successive steps have been clipped, once or
            more; steps are then as long as the curvature allows.

    Raises:
        ValueError: the bound is neither positive nor `auto`.
    """

    def __init__(self, bound: float | Literal["auto"], device: torch.device | str = "cpu"):
        if bound != "auto" and (isinstance(bound, str) or not bound > 0):
            raise ValueError(f"bound={bound!r}: a positive number, or 'auto'")
        self.fixed = None if bound == "auto" else bound
        self.mean, self.seen, self.recent = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
        self.in_a_row = torch.zeros((), dtype=torch.bool, device=device)

    @torch.no_grad()
    def __call__(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Clip what is in `.grad`; on all ranks, as shards make one norm together.

        A norm that is not finite is the gradient scaler's business (it skips the step), or shows in the next loss.

        Returns:
            Whether they were clipped, bool (), on the device.
        """
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not grads:
            return torch.zeros((), dtype=torch.bool, device=self.mean.device)
        norm = nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        bound = self.mean.new_full((), self.fixed) if self.fixed is not None else self._bound(norm.double())
        bound = bound.to(norm.dtype)
        factor = (bound / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_(list(map(local, grads)), factor)
        return norm > bound

    def _bound(self, norm: Tensor) -> Tensor:
        """For this step; it counts in the mean from here on."""
        bound = torch.where(self.seen < FIRST, torch.inf, TIMES * self.mean)
        finite = torch.isfinite(norm)
        self.seen += finite
        share = 1 / self.seen.clamp(1, MEMORY)
        self.mean += torch.where(finite, share * (torch.minimum(norm, bound) - self.mean), 0.0)
        self.recent += torch.where(finite, ((norm > bound).double() - self.recent) / ROW, 0.0)
        self.in_a_row |= self.recent > MANY
        return bound

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).item() for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            getattr(self, name).fill_(state.get(name, 0))  # earlier states have fewer
