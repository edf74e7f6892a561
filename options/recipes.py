"""What a recipe sets of the options that are not given, and which one a command line gets."""

from collections.abc import Collection
from typing import Any

from adadagrad.control import STEADY
from adadagrad.control.learning_rate import MEASURED
from options.schedules import PARAMETERS_OF_TESTS, options_of_other_rules

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "steady": {
        "statistics": "unbiased",
        "ramp_up_type": "goodput",
        "lr_scaling": "critical",
        "coupling": "full",
        "test_interval": "auto",
        "free_start": True,
        "weight_average": 0.05,
        "grad_clip": "auto",
        **STEADY,
    },
}
EARLIER = {
    "max_growth": 2.0,
    "test_interval": 8,
    "max_waste": None,
    "free_start": False,
    "coupling": "rate",
    "weight_average": 0.0,
    "grad_clip": 0.0,
}
"""What options of `steady` were in runs of November 2026, which are read again under its name."""
PUBLISHED = {"test_type", "ramp_up_type", *PARAMETERS_OF_TESTS}
"""Whoever gives one of these asks for the published rule."""


def with_recipe(values: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The options with what the recipe sets of those that are not given."""
    recipe = values["recipe"] or ("steady" if values["test"] and not PUBLISHED & set(given) else "paper")
    by_recipe = {name: value for name, value in RECIPES[recipe].items() if values["test"] and name not in given}
    both = values | by_recipe
    unread = options_of_other_rules(both) | ({"coupling"} if both["lr_scaling"] not in MEASURED else set())
    return values | {name: value for name, value in by_recipe.items() if name not in unread} | {"recipe": recipe}
