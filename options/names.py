"""What the words of options name: models, data sets and optimizers, a user's own objects, paths.

The names are known without importing torch: a wrong one is refused at once.
"""

import difflib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from adadagrad.control import RULES
from options.errors import UsageError, in_one_line

MODELS = ("logistic", "cnn", "gpt")
RAMP_UP_TYPES = tuple(name for name, rule in RULES.items() if rule.chosen_by.startswith("--ramp_up_type"))
DATA_SETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagenet", "tokens", "stdlib")
OPTIMIZERS = ("adagrad", "adagradnorm", "adam", "adamw", "muon", "sgd", "sgdm")


def nearest(name: str, known: Sequence[str]) -> str:
    """ "; did you mean 'resnet18'?", or nothing where no known name is close."""
    lower = {entry.lower(): entry for entry in reversed(known)}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"; did you mean '{lower[close[0]]}'?" if close else ""


def unknown(option: str, name: str) -> str:
    """Why a name cannot be meant, in one line; "" where it can, or is an import path."""
    if ":" in name:
        return ""
    if option == "model":
        known, listed = [*MODELS, *torchvision_models()], "logistic, cnn, gpt or a torchvision classifier"
    elif option == "ramp_up_type":
        known, listed = list(RAMP_UP_TYPES), f"known: {', '.join(RAMP_UP_TYPES)}"
    elif option == "dataset":
        known, listed = list(DATA_SETS), f"known: {', '.join(DATA_SETS)}"
    else:
        known = [*OPTIMIZERS, *torch_optimizers()]
        listed = f"known: {', '.join(known)}"
    return "" if name in known else f"--{option}={name} is unknown{nearest(name, known)} ({listed})"


def import_object(option: str, path: str) -> Any:
    """What `package.module:name` names; modules beside main.py and in the current folder are found.

    Raises:
        UsageError: there is no such module or name.
    """
    module_name, _, name = path.partition(":")
    if not (module_name and name):
        raise UsageError(f"--{option}={path}: write package.module:name")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module runs into
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f", {where.filename}:{where.lineno}" if not isinstance(error, (ImportError, SyntaxError)) else ""
        raise UsageError(f"--{option}={path}: cannot import {module_name} ({in_one_line(error)}{place})") from None
    if not hasattr(module, name):
        raise UsageError(f"--{option}={path}: {module_name} has no '{name}'{nearest(name, dir(module))}")
    return getattr(module, name)


def expanded(option: str, path: str | Path) -> Path:
    """A path as a shell would have it: `~`, `~name`, `$NAME` and `${NAME}` mean what they mean there.

    Every option that takes a path comes through here: a shell leaves them alone behind `=` and in a file.

    Raises:
        UsageError: there is no such variable or user.
    """
    words = os.path.expandvars(path)
    if unset := re.search(r"\$(\w+|\{\w+\})", words):
        raise UsageError(f"--{option}={path}: {unset[0]} is not set: set it, or write the path itself")
    if words.startswith("~") and os.path.expanduser(words) == words:
        raise UsageError(f"--{option}={path}: there is no user {words[1:].split('/')[0]}: write the path itself")
    return Path(os.path.expanduser(words))


@cache
def torchvision_models() -> tuple[str, ...]:
    """The classifiers that torchvision registers, from its sources."""
    decorated = re.compile(r"@register_model\(\)\n(?:@[^\n]*\n|\)\n|    [^\n]*\n)*def (\w+)\(")
    return tuple(sorted(name for text in _sources("torchvision", "models/*.py") for name in decorated.findall(text)))


@cache
def torch_optimizers() -> tuple[str, ...]:
    """The optimizer classes of torch.optim, from its sources."""
    imported = re.compile(r"^from torch\.optim\S* import ([A-Z]\w+) as \1$", re.M)
    found = {name for text in _sources("torch", "optim/__init__.py") for name in imported.findall(text)}
    return tuple(sorted(found - {"Optimizer"}))


def _sources(package: str, pattern: str) -> Iterable[str]:
    """The texts of files of a package that is installed, not imported."""
    spec = importlib.util.find_spec(package)
    folder = Path(spec.origin).parent
    return (path.read_text(encoding="utf-8") for path in sorted(folder.glob(pattern)))
