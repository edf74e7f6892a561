"""The slow, independent reference: one sample at a time, plain autograd, float64, explicit vectors."""

import torch


def gradient_vectors(model, loss, inputs, targets) -> torch.Tensor:
    """Every sample's gradient over all parameters as one vector: (n, P)."""
    rows = []
    for x, y in zip(inputs, targets):
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss(model(x[None]), y[None]), parameters, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def statistics(vectors: torch.Tensor) -> dict[str, float]:
    """V, V_ip, V_orth and ‖ḡ‖² by their definitions, without any shortcut."""
    mean = vectors.mean(0)
    degrees = len(vectors) - 1
    inner = vectors @ mean
    along = inner[:, None] * mean / mean.dot(mean)
    return {
        "variance": float((vectors - mean).square().sum() / degrees),
        "variance_inner_product": float((inner - inner.mean()).square().sum() / degrees),
        "variance_orthogonality": float((vectors - along).square().sum() / degrees),
        "grad_norm_sq": float(mean.dot(mean)),
    }
