"""Batches of any form: a tensor, or tuples, lists and dicts of tensors, whose first dimension is the samples."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

Batch = Any
"""A tree of tensors (n, …); what else is in it belongs to every sample."""


def leaves(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def count(batch: Batch) -> int:
    """n, the number of samples."""
    return len(next(leaf for leaf in leaves(batch) if leaf.dim()))


def some(batch: Batch, chunk: slice) -> Batch:
    """These samples of the batch."""
    return tree_map(lambda leaf: leaf[chunk] if isinstance(leaf, Tensor) and leaf.dim() else leaf, batch)


def chunks(size: int, *batches: Batch) -> Iterator[tuple[Batch, ...]]:
    """At most `size` samples at a time, of all of them."""
    for start in range(0, count(batches[0]), size):
        yield tuple(some(batch, slice(start, start + size)) for batch in batches)


def converted(batch: Batch, dtype: torch.dtype) -> Batch:
    """Its floating-point numbers in this precision."""
    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, batch
    )


def taken_apart(*batches: Batch) -> tuple[list[Tensor], Callable[..., tuple[Batch, ...]]]:
    """The tensors (n, …) of these batches, and what makes of a single row of each the batches of that one sample."""
    flat, form = tree_flatten(batches)
    mapped = [isinstance(leaf, Tensor) and leaf.dim() > 0 for leaf in flat]

    def of_one(*rows: Tensor) -> tuple[Batch, ...]:
        rest = iter(rows)
        return tree_unflatten(
            [next(rest).unsqueeze(0) if is_mapped else leaf for leaf, is_mapped in zip(flat, mapped)], form
        )

    return [leaf for leaf, is_mapped in zip(flat, mapped) if is_mapped], of_one


def per_sample(function: Callable[..., Tensor], *batches: Batch) -> Tensor:
    """`function` of every sample by itself, as a batch of one: scalars → (n,), by vmap, or one by one where it must."""
    tensors, of_one = taken_apart(*batches)
    try:
        return vmap(lambda *rows: function(*of_one(*rows)).reshape(()))(*tensors)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):  # a step that depends on values, say
        return torch.stack([function(*one).reshape(()) for one in chunks(1, *batches)])
