"""From what a step has measured to the size of the next batch and the factor on its learning rate.

Pure arithmetic on Python's numbers: nothing here knows of devices, processes, options or files, so that it serves
anybody's training loop. `Controller` is the one object to hold.
"""

from .controller import Controller, Rule, Update, steady
from .learning_rate import LearningRateScaling
from .rules import Adaptive, Constant, Goodput, Limits, Linear, Seesaw, Stagewise
from .smoothing import Smoothing
from .step_time import StepTime

__all__ = [
    "Adaptive",
    "Constant",
    "Controller",
    "Goodput",
    "Limits",
    "LearningRateScaling",
    "Linear",
    "Update",
    "Rule",
    "Seesaw",
    "Smoothing",
    "Stagewise",
    "StepTime",
    "steady",
]
