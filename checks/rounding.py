"""Products as a GPU's tensor cores make them: factors rounded to fewer bits, products exact, sums in single precision.

What the rounding of TF32, bfloat16 or float16 does to a check or a statistic can be seen so without the hardware. Only
float32 factors are rounded: double precision is multiplied as it is there, too.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MANTISSA_BITS = {"tf32": 10, "bf16": 7}
FACTORS = {
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::convolution": (0, 1),
    "aten::convolution_backward": (0, 1, 2),
}
"""Operation → which of its arguments are multiplied."""


def rounded(tensor: Tensor, form: str) -> Tensor:
    """The nearest numbers of `form` ("tf32", "bf16" or "fp16"), as float32; of two equally near ones the even one."""
    if form == "fp16":
        return tensor.half().float()
    bits = tensor.contiguous().view(torch.int32)
    dropped = 23 - MANTISSA_BITS[form]
    last_kept = (bits >> dropped) & 1
    return ((bits + (1 << (dropped - 1)) - 1 + last_kept) & -(1 << dropped)).view(torch.float32).view_as(tensor)


class Rounding(TorchDispatchMode):
    """Inside, products and convolutions of float32 numbers are rounded as named by `form`."""

    def __init__(self, form: str):
        super().__init__()
        self.form = form

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        factors = FACTORS.get(function._schema.name, ())
        args = [
            rounded(argument, self.form) if i in factors and argument.dtype == torch.float32 else argument
            for i, argument in enumerate(args)
        ]
        return function(*args, **(kwargs or {}))
