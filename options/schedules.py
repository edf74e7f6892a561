"""Which rule the batch size follows: the one choice that several options make together."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from adadagrad.control import RULES, Rule
from adadagrad.tests import TESTS
from options.names import import_object


def rule_class(options: Mapping[str, Any]) -> type[Rule]:
    """What `test`, `ramp_up_type` and the ramps without a test choose.

    Raises:
        UsageError: an import path leads nowhere, or to something else.
    """
    for name in ("stagewise", "linear", "seesaw"):
        if options[f"{name}_ramp_up"]:
            return RULES[name]
    name = options["ramp_up_type"] if options["test"] else "constant"
    return RULES[name] if name in RULES else import_object("ramp_up_type", name)


def test_parameters(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The options that are parameters of the test that the options name."""
    return tuple(entry.name for entry in fields(TESTS[options["test_type"]]))
