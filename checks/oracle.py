"""The slow, independent reference: the model itself, one sample at a time, plain autograd, explicit vectors."""

import copy
from collections.abc import Sequence

import torch
from torch.utils._pytree import tree_map


def gradient_vectors(model, loss, inputs, targets) -> torch.Tensor:
    """Every sample's gradient over all parameters as one vector, complex numbers as pairs: (n, P).

    Each pass begins with the buffers that the model has now.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads, buffers = [p.grad for p in parameters], list(getattr(model, "buffers", list)())
    before, leaves = copy.deepcopy(buffers), torch.utils._pytree.tree_leaves(inputs)
    rows = []
    for i in range(len(leaves[0])):
        x, y = (tree_map(lambda leaf: leaf[i : i + 1], batch) for batch in (inputs, targets))  # noqa: B023
        for p in parameters:
            p.grad = None
        loss(model(x), y).backward()
        rows.append(torch.cat([_vector(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]))
        with torch.no_grad():
            for buffer, value in zip(buffers, before):
                buffer.copy_(value)
    for p, grad in zip(parameters, grads):
        p.grad = grad
    return torch.stack(rows)


def _vector(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return (torch.view_as_real(gradient) if gradient.is_complex() else gradient).flatten()


def statistics(vectors: torch.Tensor, sizes: Sequence[int] | None = None) -> dict[str, float]:
    """V, V_ip, V_orth and ‖ḡ‖² by their definitions, without any shortcut.

    Args:
        vectors: gradients of single samples, or mean gradients of groups (K, P).
        sizes: of the groups; default: 1 each.
    """
    m = torch.tensor(sizes or [1] * len(vectors), dtype=vectors.dtype)[:, None]
    mean = (m * vectors).sum(0) / m.sum()
    degrees = len(vectors) - 1
    inner = (vectors @ mean)[:, None]
    along = inner * mean / mean.dot(mean)
    return {
        "variance": float((m * (vectors - mean).square()).sum() / degrees),
        "variance_inner_product": float((m * (inner - (m * inner).sum() / m.sum()).square()).sum() / degrees),
        "variance_orthogonality": float((m * (vectors - along).square()).sum() / degrees),
        "grad_norm_sq": float(mean.dot(mean)),
    }
