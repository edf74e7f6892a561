"""Batch sizes that adapt to the noise of the gradient (arXiv:2402.11215), for anybody's training loop.

`BatchScaler` is the one object for a loop of one's own. What it is made of: `moments` (gradients/), tests and their
decisions (tests.py), `Controller` with its rules (control/). `Clipping` and `WeightAverage` are the rest of the
recipe `steady`. What needs torch is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import control, tests
from .control import (
    Adaptive,
    Constant,
    Controller,
    Goodput,
    LearningRateScaling,
    Limits,
    Linear,
    Observation,
    Rule,
    Seesaw,
    Stagewise,
    Update,
    steady,
)
from .tests import AugmentedInnerProductTest, Decision, InnerProductTest, Moments, NormTest, Statistics, Test

if TYPE_CHECKING:
    from . import gradients, order
    from .averages import WeightAverage
    from .clipping import Clipping
    from .gradients import Estimator, moments
    from .noise_scale import NoiseScale
    from .scaler import BatchScaler

__version__ = "0.1.0"

__all__ = [
    "Adaptive",
    "AugmentedInnerProductTest",
    "BatchScaler",
    "Clipping",
    "Constant",
    "Controller",
    "Decision",
    "Estimator",
    "Goodput",
    "InnerProductTest",
    "LearningRateScaling",
    "Limits",
    "Linear",
    "Moments",
    "NoiseScale",
    "NormTest",
    "Observation",
    "Rule",
    "Seesaw",
    "Stagewise",
    "Statistics",
    "Test",
    "Update",
    "WeightAverage",
    "control",
    "gradients",
    "moments",
    "order",
    "steady",
    "tests",
]

NEED_TORCH = {
    "BatchScaler": "scaler",
    "Clipping": "clipping",
    "Estimator": "gradients",
    "NoiseScale": "noise_scale",
    "WeightAverage": "averages",
    "moments": "gradients",
}
"""Names that are imported when they are asked for, and the module of each."""


def __getattr__(name: str):
    if name in ("gradients", "order"):
        return import_module(f".{name}", __name__)
    if name in NEED_TORCH:
        return getattr(import_module(f".{NEED_TORCH[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
