"""The statistical test and the controller that the options ask for. The tests themselves are the library's
(adadagrad/tests.py) and can be imported from here, too.
"""

from collections.abc import Callable

from adadagrad import control
from adadagrad.tests import (
    AugmentedInnerProductTest,
    Decision,
    InnerProductTest,
    Moments,
    NormTest,
    Statistics,
    Test,
    build,
)
from options.schema import Config

__all__ = [
    "AugmentedInnerProductTest",
    "Decision",
    "InnerProductTest",
    "Moments",
    "NormTest",
    "Statistics",
    "Test",
    "build",
    "controller",
    "rule",
    "test",
]


def test(config: Config) -> Test | None:
    """The test that the options name; None where none decides."""
    if not config.test or config.ramp_up_type == "goodput":
        return None
    return build(config.test_type, config.eta, config.theta, config.nu)


def controller(config: Config, decay: Callable[[int], float], adaptive_optimizer: bool) -> control.Controller:
    """The controller that the options describe.

    Args:
        config: the options in effect.
        decay: samples → learning rate of the schedule over its peak; what `seesaw_ramp_up` follows.
        adaptive_optimizer: the optimizer divides by the gradient's size.
    """
    return control.Controller(
        config.batch_size,
        test(config),
        rule(config, decay),
        control.Limits(
            None if config.stagewise_ramp_up else config.max_batch_size,
            config.max_growth or float("inf"),
            config.growth_interval,
            config.patience,
            config.batch_size_multiple,
            may_shrink=config.may_shrink or config.stagewise_ramp_up,
        ),
        unbiased=config.statistics == "unbiased",
        smoothing=config.smoothing,
        scaling=control.LearningRateScaling(config.lr_scaling, config.batch_size, adaptive_optimizer),
    )


def rule(config: Config, decay: Callable[[int], float]) -> control.Rule:
    """What asks for the next size."""
    if config.test and config.ramp_up_type == "goodput":
        return control.Goodput(config.knee, may_shrink=config.may_shrink)
    if config.test:
        return control.Adaptive(config.ramp_up_factor if config.ramp_up_type == "factor" else None)
    if config.stagewise_ramp_up:
        return control.Stagewise(config.global_batch_sizes, config.samples_stages)
    if config.linear_ramp_up:
        return control.Linear(config.linear_ramp_up_increment)
    if config.seesaw_ramp_up:
        return control.Seesaw(config.batch_size, decay)
    return control.Constant()
