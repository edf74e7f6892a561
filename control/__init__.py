"""From what a step has measured to the size of the next batch and the factor on its learning rate.

Pure arithmetic on Python's numbers: nothing here knows of devices, processes, options or files, so that it serves
anybody's training loop. `Controller` is the one object to hold.
"""

from control.controller import Controller, Next, Rule
from control.coupling import LearningRateScaling
from control.sizes import Adaptive, Constant, Goodput, Growth, Linear, Seesaw, Stagewise
from control.smoothing import Smoothing
from control.timing import StepTime

__all__ = [
    "Adaptive",
    "Constant",
    "Controller",
    "Goodput",
    "Growth",
    "LearningRateScaling",
    "Linear",
    "Next",
    "Rule",
    "Seesaw",
    "Smoothing",
    "Stagewise",
    "StepTime",
]
