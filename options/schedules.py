"""Which rule the batch size follows: the one choice that several options make together."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from adadagrad.control import RULES, Rule
from adadagrad.tests import TESTS
from options.errors import UsageError
from options.names import import_object, unknown


def rule_class(options: Mapping[str, Any]) -> type[Rule]:
    """What `test`, `ramp_up_type` and the ramps without a test choose; a branch of a run is constant.

    Raises:
        UsageError: there is no such rule.
    """
    if options["branch"]:
        return RULES["constant"]
    for name in ("stagewise", "linear", "seesaw"):
        if options[f"{name}_ramp_up"]:
            return RULES[name]
    name = options["ramp_up_type"] if options["test"] else "constant"
    if problem := name not in RULES and unknown("ramp_up_type", name):
        raise UsageError(problem)
    return RULES[name] if name in RULES else import_object("ramp_up_type", name)


def options_of_other_rules(options: Mapping[str, Any]) -> set[str]:
    """What the chosen rule does not read of the options that are some rule's."""
    return {name for rule in RULES.values() for name in rule.options} - set(rule_class(options).options)


def test_parameters(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The options that are parameters of the test that the options name."""
    return tuple(entry.name for entry in fields(TESTS[options["test_type"]]))


PARAMETERS_OF_TESTS = sorted({entry.name for test in TESTS.values() for entry in fields(test)})
