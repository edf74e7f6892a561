"""Copies of a model in which each sample is treated by itself, as if it were a batch of one.

Layers that couple the samples of a batch, or draw one random number for all of them, are replaced.
"""

import copy

import torch
import torchvision
from torch import Tensor, nn


class PerSampleBatchNorm(nn.Module):
    """Batch normalisation of every sample by its own statistics over its positions (as the paper's code does).

    Works on a batch as on a single sample under vmap, and on 1×1 maps (the variance is then zero, the output the bias).

    Shape: (N, C, *) → (N, C, *).
    """

    def __init__(self, batch_norm: nn.modules.batchnorm._BatchNorm):
        super().__init__()
        self.weight, self.bias, self.eps = batch_norm.weight, batch_norm.bias, batch_norm.eps
        self.num_features = batch_norm.num_features

    def forward(self, x: Tensor) -> Tensor:
        # One group per channel is exactly this normalisation. (nn.functional's wrapper refuses single values.)
        return torch.group_norm(x, self.num_features, self.weight, self.bias, self.eps)


class PerSampleStochasticDepth(nn.Module):
    """Stochastic depth by samples that draws its noise out of place, as vmap needs. Shape: (N, *) → (N, *)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        survives = torch.rand_like(x[(slice(None), *[slice(0, 1)] * (x.dim() - 1))]) >= self.p
        return x * survives.to(x.dtype) / max(1 - self.p, 1e-12)


def couples_samples(model: nn.Module) -> bool:
    """True where a layer makes the gradient of one sample depend on the others of its batch (BatchNorm in training)."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def per_sample_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's structure in which no layer couples samples; parameters and buffers are on the meta device.

    Names of parameters and buffers are the model's, so `torch.func.functional_call` runs it with the model's own.
    """
    template = copy.deepcopy(model)
    for name, module in list(template.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            replacement: nn.Module = PerSampleBatchNorm(module)
        elif isinstance(module, torchvision.ops.StochasticDepth):
            replacement = PerSampleStochasticDepth(module.p)
        else:
            continue
        parent_name, _, child_name = name.rpartition(".")
        if not name:
            template = replacement
        else:
            setattr(template.get_submodule(parent_name), child_name, replacement)
    return template.train(model.training).to("meta")
