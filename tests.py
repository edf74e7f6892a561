"""The statistical test and the controller that the options ask for.

The tests themselves, and all that they compute with, are the library's (adadagrad/tests.py); they can be imported from
here, too.
"""

from collections.abc import Callable, Mapping
from typing import Any

from adadagrad import control
from adadagrad.tests import (
    MEASURED,
    TESTS,
    AugmentedInnerProductTest,
    Decision,
    InnerProductTest,
    Moments,
    NormTest,
    Statistics,
    Test,
)
from options.schedules import options_of_other_rules, rule_class, test_parameters
from options.schema import Config

__all__ = [
    "MEASURED",
    "TESTS",
    "AugmentedInnerProductTest",
    "Decision",
    "InnerProductTest",
    "Moments",
    "NormTest",
    "Statistics",
    "Test",
    "controller",
    "options_of_other_rules",
    "reads_gradients",
    "rule",
    "rule_class",
    "test_parameters",
]


def rule(options: Mapping[str, Any], decay: Callable[[int], float] = lambda samples: 1.0) -> control.Rule:
    """What asks for the next batch size.

    Args:
        options: in effect, by name; also those of an earlier run.
        decay: samples → learning rate of the schedule over its peak.
    """
    test = TESTS[options["test_type"]](**{name: options[name] for name in test_parameters(options)})
    return rule_class(options).from_options(options, test, decay)


def reads_gradients(config: Config) -> bool:
    """Somebody needs the gradients' statistics: the rule, the learning rate, or the user."""
    scales = config.test and config.lr_scaling in control.learning_rate.MEASURED and config.coupling != "none"
    return rule_class(vars(config)).measures or scales or bool(config.monitor_interval)


def controller(
    config: Config,
    decay: Callable[[int], float],
    adaptive_optimizer: bool,
    family: control.Family | None = None,
    least: int = 2,
) -> control.Controller:
    """The controller that the options describe.

    Args:
        config: the options in effect.
        decay: as in `rule`.
        adaptive_optimizer: the optimizer divides by the gradient's size.
        family: of the optimizer, whose state can follow; None where it is not known.
        least: samples of the smallest batch that can be trained on and measured.
    """
    chosen = rule(vars(config), decay)
    first = config.batch_size
    if config.free_start and config.knee and "free_start" in chosen.options:  # a run's own config.yaml keeps it
        total = config.max_samples if config.training_type == "sample" else None
        first = max(first, min(control.free_batch_size(config.knee, total), config.max_batch_size))
    return control.Controller(
        first,
        rule=chosen,
        limits=control.Limits(
            config.max_batch_size,
            config.max_growth or float("inf"),
            multiple=config.batch_size_multiple,
            may_shrink=chosen.may_shrink,
            min_batch_size=least,
        ),
        unbiased=config.statistics == "unbiased",
        smoothing=config.smoothing,
        scaling=control.LearningRateScaling(
            config.lr_scaling if config.coupling != "none" else "none",
            config.batch_size,
            adaptive_optimizer,
            family if config.coupling == "full" else None,
            config.critical,
        ),
    )
