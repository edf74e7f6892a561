"""What a recipe sets of the options that are not given, and which one a command line gets."""

from collections.abc import Collection
from dataclasses import fields
from typing import Any

from adadagrad.tests import TESTS

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "steady": {
        "statistics": "unbiased",
        "smoothing": 5_000.0,
        "ramp_up_type": "goodput",
        "lr_scaling": "critical",
        "max_growth": 2.0,
        "growth_interval": 16,
        "test_interval": 8,
    },
}
PUBLISHED = {"test_type", "ramp_up_type", *(entry.name for test in TESTS.values() for entry in fields(test))}
"""Whoever gives one of these asks for the published rule."""


def with_recipe(values: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The options with what the recipe sets of those that are not given."""
    recipe = values["recipe"] or ("steady" if values["test"] and not PUBLISHED & set(given) else "paper")
    set_by_recipe = RECIPES[recipe] if values["test"] else {}
    return values | {name: value for name, value in set_by_recipe.items() if name not in given} | {"recipe": recipe}
