"""From what a step has measured to the size of the next batch and the factor on its learning rate.

Pure arithmetic on Python's numbers: nothing here knows of devices, processes, options or files, so that it serves
anybody's training loop. `Controller` is the one object to hold.
"""

from .controller import Controller, Update
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
)
from .smoothing import Smoothing
from .step_time import StepTime

__all__ = [
    "CRITICAL",
    "RULES",
    "Adaptive",
    "AdaptiveByFactor",
    "Constant",
    "Controller",
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
    "Update",
    "free_batch_size",
]
