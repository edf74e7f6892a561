"""Pixels to network inputs: random crops and flips that depend on the position alone, normalisation on the device."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from adadagrad.order import position_hash
from data import DataSet


def crop_and_flip(images: Tensor, positions: Tensor, seed: int, padding: int = 4) -> Tensor:
    """Zero-pad, crop back at a random place, and flip half of the images; what is drawn depends on the position alone.

    Args:
        images: (N, C, H, W), any dtype.
        positions: (N,) int64, the images' positions in the run.
    """
    n, _, height, width = images.shape
    bits = position_hash(positions, seed)
    choices = 2 * padding + 1
    top, left, flip = bits % choices, bits // choices % choices, bits // choices**2 % 2
    rows = top[:, None] + torch.arange(height, device=images.device)  # n×h
    columns = torch.arange(width, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None] == 1, columns.flip(0), columns)  # n×w
    padded = torch.nn.functional.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    sample = torch.arange(n, device=images.device)
    return padded[sample[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Normalise:
    """uint8 pixels → (pixel/255 − mean)/std in the training's dtype, on the device; floating-point numbers in that
    dtype, too; all else as it is. Of tensors (n, …), or nested tuples, lists and dicts of them.

    Inputs of four dimensions lie in memory in the order of `memory_format`, whatever they come in.
    """

    def __init__(
        self,
        data_set: DataSet,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.dtype, self.memory_format = dtype, memory_format
        self.exact = torch.promote_types(dtype, torch.float32)  # 16 bits are few for neighbouring shades
        self.mean, self.std = (
            torch.tensor(values, dtype=self.exact, device=device).view(1, -1, 1, 1)
            for values in (data_set.mean, data_set.std)
        )

    def __call__(self, inputs: Any) -> Any:
        return self._one(inputs) if isinstance(inputs, Tensor) else tree_map(self._one, inputs)

    def _one(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8 and tensor.dim() == 4:
            pixels = tensor.to(self.exact, memory_format=self.memory_format)
            return pixels.div_(255).sub_(self.mean).div_(self.std).to(self.dtype)
        cast = self._cast(tensor)
        return cast.contiguous(memory_format=self.memory_format) if cast.dim() == 4 else cast

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def targets(self, targets: Any) -> Any:
        """Of targets no tensor is an image to be normalised."""
        return self._cast(targets) if isinstance(targets, Tensor) else tree_map(self._cast, targets)

    def batch(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        """Inputs and targets, each by its own rule."""
        inputs, targets = batch
        return self(inputs), self.targets(targets)


def smaller(one: Any, other: Any) -> bool:
    """The tensors of one tree take less memory than those of the other."""
    first, second = (sum(leaf.nbytes for leaf in tree_leaves(t) if isinstance(leaf, Tensor)) for t in (one, other))
    return first < second
