"""Where the moments come from: per-sample gradients, reduced to the few numbers that a test needs.

    moments = gradients.moments(model, loss, inputs, targets)

An estimator watches the micro-batches of a step on every rank and then gives the moments of the global batch:

    with estimator.observe(inputs, targets):
        …forward and backward of the training step…
    moments = estimator.moments()

The numbers do not depend on how the batch was cut into ranks and micro-batches: scalars are summed in float64, the mean
gradient is averaged once over the ranks.
"""

from .choice import build, moments
from .estimator import Estimator, Loss, by_module, is_out_of_memory, listed, sum_over_ranks
from .ghost_norms import GhostNorms
from .isolation import couples_samples, drawing_from, preserving_attributes, preserving_state, random_states
from .micro_batch import MicroBatchGradients
from .per_sample import PerSampleGradients, SingleGradients
from .verification import PROBE

__all__ = [
    "PROBE",
    "Estimator",
    "GhostNorms",
    "Loss",
    "MicroBatchGradients",
    "PerSampleGradients",
    "SingleGradients",
    "build",
    "by_module",
    "couples_samples",
    "drawing_from",
    "is_out_of_memory",
    "listed",
    "moments",
    "preserving_attributes",
    "preserving_state",
    "random_states",
    "sum_over_ranks",
]
