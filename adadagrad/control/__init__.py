"""From what a step has measured to the size of the next batch and the factor on its learning rate.

Pure arithmetic on Python's numbers, but for carry_over.py, which applies a `Transition` to an optimizer: nothing here
knows of devices, processes, options or files, so that it serves anybody's training loop. `Controller` is the one object
to hold.
"""

from .controller import STEADY, Controller, Update, steady
from .learning_rate import CRITICAL, LearningRateScaling
from .limits import Limits
from .rules import (
    RULES,
    Adaptive,
    AdaptiveByFactor,
    Constant,
    Goodput,
    Linear,
    Observation,
    Rule,
    Seesaw,
    Stagewise,
    free_batch_size,
    quickest_batch,
)
from .smoothing import Smoothing
from .step_time import StepTime
from .transition import FAMILIES, Family, Transition

__all__ = [
    "CRITICAL",
    "FAMILIES",
    "RULES",
    "STEADY",
    "Adaptive",
    "AdaptiveByFactor",
    "Constant",
    "Controller",
    "Family",
    "Goodput",
    "LearningRateScaling",
    "Limits",
    "Linear",
    "Observation",
    "Rule",
    "Seesaw",
    "Smoothing",
    "Stagewise",
    "StepTime",
    "Transition",
    "Update",
    "free_batch_size",
    "quickest_batch",
    "steady",
]
