"""Passes that can be compared: all of them draw the same random numbers, whatever the number of their samples."""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tolerance(lowest: torch.dtype) -> float:
    """By how much passes may differ whose least precise numbers are these."""
    return {torch.float64: 1e-6, torch.float32: 1e-2}.get(lowest, 0.2)


NOTHING_LEFT_OUT = 0.999
"""Single numbers mostly decide whether a layer is left out: none is, so that all are compared."""


ATTENTION = "aten::_scaled_dot_product"
"""Kernels that are said to draw, though none does without dropout of its own; another pass may take another kernel,
whose operations are not said so."""


class SameDraws(TorchDispatchMode):
    """Inside, what is drawn at random depends on the number of the draw and the place along the last dimension alone.

    So a batch draws for each of its samples what a batch of one draws. Where it goes in several passes, each of them is
    to begin with `new_pass`.

    Attributes:
        sizes: of all dimensions of all tensors computed.
        lowest: the least precise floating-point type among them.
    """

    innermost: ClassVar["SameDraws | None"] = None

    def __init__(self):
        super().__init__()
        self.draws, self.sizes, self.lowest = 0, set(), torch.float64

    def __enter__(self) -> "SameDraws":
        self.around, SameDraws.innermost = SameDraws.innermost, self
        return super().__enter__()

    def __exit__(self, *error) -> None:
        SameDraws.innermost = self.around
        super().__exit__(*error)

    @classmethod
    def new_pass(cls) -> None:
        """What follows draws what the pass before it has drawn."""
        if cls.innermost:
            cls.innermost.draws = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.sizes.update(tensor.shape)
                if tensor.is_floating_point() and torch.finfo(tensor.dtype).eps > torch.finfo(self.lowest).eps:
                    self.lowest = tensor.dtype
        if torch.Tag.nondeterministic_seeded in function.tags and not function._schema.name.startswith(ATTENTION):
            self.draws += 1
            return self._redrawn(function, result, args, kwargs)
        return result

    def _redrawn(self, function, result, args: tuple, kwargs: dict):
        name, rest = function._schema.name.removeprefix("aten::").rstrip("_"), args[1:]
        if not isinstance(result, Tensor) or not result.numel():
            if name == "native_dropout" and args[2]:
                keep = self._uniform(args[0]) >= args[1]
                return args[0] * keep / max(1 - args[1], 1e-12), keep
            return result
        uniform = self._uniform(result)
        if name == "bernoulli":
            given = args[0] if function._overloadname == "default" else 0.5
            probability = rest[0] if rest else kwargs.get("p", given)
            drawn = 1 - uniform < probability
        elif name in ("rand", "rand_like"):
            drawn = uniform
        elif name == "uniform":
            low, high = (*rest, 0.0, 1.0)[:2] if len(rest) != 1 else (rest[0], 1.0)
            drawn = low + (high - low) * uniform
        elif name in ("randn", "randn_like", "normal"):
            mean, std = (*rest, 0.0, 1.0)[:2] if name == "normal" and len(rest) != 1 else (0.0, 1.0)
            drawn = mean + std * math.sqrt(2) * torch.erfinv(1.998 * uniform - 0.999)
        elif name == "exponential":
            drawn = -torch.log1p(-uniform) / (rest[0] if rest else kwargs.get("lambd", 1.0))
        else:
            return result
        return result.copy_(drawn) if function._schema.is_mutable else drawn.to(result.dtype).expand_as(result).clone()

    def _uniform(self, like: Tensor) -> Tensor:
        if like.dim() < 2 or like.shape[-1] == 1:  # of the whole pass, or of each sample
            return torch.full_like(like, NOTHING_LEFT_OUT, dtype=torch.float64)
        generator = torch.Generator().manual_seed(self.draws)
        last = torch.rand(like.shape[-1], generator=generator, dtype=torch.float64)
        return last.to(like.device).expand(like.shape)
