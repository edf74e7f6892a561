"""Names of models, data sets and optimizers, known without importing torch: a wrong one is refused at once."""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

MODELS = ("logistic", "cnn", "gpt")
DATA_SETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagenet", "tokens", "stdlib")
OPTIMIZERS = ("adagrad", "adagradnorm", "adam", "adamw", "sgd", "sgdm")


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
    elif option == "dataset":
        known, listed = list(DATA_SETS), f"known: {', '.join(DATA_SETS)}"
    else:
        known = [*OPTIMIZERS, *torch_optimizers()]
        listed = f"known: {', '.join(known)}"
    return "" if name in known else f"--{option}={name} is unknown{nearest(name, known)} ({listed})"


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
