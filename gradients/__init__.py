"""Where the moments come from: per-sample gradients, reduced to the few numbers that a test needs.

    moments = gradients.moments(model, loss, inputs, targets)

An estimator watches the micro-batches of a step on every rank and then gives the moments of the global batch:

    with estimator.observe(inputs, targets):
        …forward and backward of the training step…
    moments = estimator.moments()

The numbers do not depend on how the batch was cut into ranks and micro-batches: scalars are summed in float64, the mean
gradient is averaged once over the ranks.
"""

import contextlib
from collections.abc import Callable

from torch import Tensor, nn

from gradients.estimator import Estimator, Loss, is_out_of_memory, listed, sum_over_ranks
from gradients.ghost_norms import GhostNorms
from gradients.micro_batch import MicroBatchGradients
from gradients.per_sample import PerSampleGradients
from gradients.per_sample_copy import couples_samples
from tests import Moments

__all__ = [
    "Estimator",
    "GhostNorms",
    "Loss",
    "MicroBatchGradients",
    "PerSampleGradients",
    "build",
    "couples_samples",
    "is_out_of_memory",
    "listed",
    "moments",
    "sum_over_ranks",
]


COUPLED = (
    "the model has BatchNorm, which couples the samples of a batch: "
    "--test_gradients=micro_batch is the accurate choice (docs/statistics.md, BatchNorm)"
)


def moments(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    inner_products: bool = True,
    test_gradients: str = "auto",
    max_micro_batch_size: int = 256,
) -> Moments:
    """The moments of one batch at the model's present weights; in a plain PyTorch program or on every rank of one.

    Args:
        model: any module; its parameters' `.grad` are left alone.
        loss: of outputs and targets, for example `torch.nn.functional.cross_entropy`.
        inputs: (n, …), this rank's samples.
        targets: (n, …).
        inner_products: measure Σ p_i and Σ p_i², too (all tests but the norm test need them).
        test_gradients: vmap, ghost, or auto (ghost where it covers the model).
        max_micro_batch_size: samples in a pass.
    """
    estimator, _ = build(test_gradients, model, loss, inner_products, max_micro_batch_size, (inputs[:3], targets[:3]))
    with estimator.observe(inputs, targets):
        pass
    return estimator.moments()


def build(
    test_gradients: str,
    model: nn.Module,
    loss: Loss,
    inner_products: bool,
    max_micro_batch_size: int,
    probe: tuple[Tensor, Tensor],
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    in_training_pass: bool = False,
    num_groups: int = 8,
    notify: Callable[[str], None] = lambda line: None,
) -> tuple["Estimator", list[str]]:
    """The estimator by its name on the command line, and what the user should be told of it.

    Args:
        test_gradients: vmap, ghost, micro_batch, or auto: ghost where every parameter is covered, else vmap.
        probe: inputs and targets of a few samples, on which `ghost` is compared with single-sample gradients.
        in_training_pass: the training pass itself runs inside `observe`, on `model` and uncompiled.
        num_groups: bounds the gradient copies that micro_batch keeps: at most twice as many.
        notify: called with a line where something turns out later.
        (The others: see `PerSampleGradients`.)
    """
    arguments = (model, loss, inner_products, max_micro_batch_size, autocast)
    if test_gradients == "micro_batch":
        return MicroBatchGradients(*arguments, num_groups=num_groups), []
    told = [COUPLED] if couples_samples(model) else []
    if test_gradients == "vmap":
        return PerSampleGradients(*arguments, notify=notify), told
    ghost = GhostNorms(*arguments, in_training_pass=in_training_pass and not couples_samples(model), notify=notify)
    problem = ghost.check(*probe)
    if not problem:
        return ghost, told
    if test_gradients == "auto":
        return PerSampleGradients(*arguments, notify=notify), [f"test_gradients=auto takes vmap: {problem}", *told]
    return ghost, [f"test_gradients=ghost takes per-sample gradients in part: {problem}", *told]
