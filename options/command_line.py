"""From a user's words to the options: the command line, YAML files, `--help`, and what is said to a word that is wrong.

`parse` reads the command line and YAML files (`--config run.yaml`; `--print_config` writes one); `--help` shows the
topics of schema.py as groups.
"""

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from adadagrad.tests import TESTS
from options.errors import UsageError
from options.names import expanded, nearest
from options.recipes import with_recipe
from options.schedules import test_parameters
from options.schema import DEFAULTS, Config

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class HelpFormatter(DefaultHelpFormatter):
    """An option is shown as `--name TYPE`, its choices in braces, and its default once."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS) or "default:" in text:
            return text
        return f"{text} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        types = {entry.name: entry.type for entry in fields(Config)}
        return _metavar(types[action.dest]) if action.dest in types else action.dest.upper()


class ConfigFile(ActionConfigFile):
    """The option `--config`; its path is expanded as every other."""

    def __call__(self, parser, cfg, values, option_string=None):
        super().__call__(parser, cfg, str(expanded("config", values)), option_string)


class Parser(ArgumentParser):
    """Its `--print_config` writes what the recipe sets, too: in a file, every option counts as given."""

    given: Collection[str] = ()
    """The options that the command line and its files name."""

    def dump(self, cfg, *args, **kwargs) -> str:
        return super().dump(Namespace(with_recipe(vars(cfg), self.given)), *args, **kwargs)


def build_parser() -> Parser:
    parser = Parser(
        prog="main.py",
        usage="python main.py | fabric run main.py | torchrun main.py | srun python main.py  [--OPTION=VALUE …]",
        description="Train a network with a batch size that adapts to the noise of the gradient.",
        formatter_class=HelpFormatter,
        exit_on_error=False,
    )
    help_text = "YAML file with options, such as a run's config.yaml; later options override it"
    parser.add_argument("--config", action=ConfigFile, metavar="FILE", help=help_text)
    for topic in Config.__bases__:
        parser.add_class_arguments(topic)
    return parser


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The options from the command line (default: `sys.argv`).

    Raises:
        UsageError: an unknown option or value, or one that cannot be.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for word in arguments:
        if any("\udc80" <= letter <= "\udcff" for letter in word):  # how Python keeps bytes that are no letters
            encoding = sys.getfilesystemencoding()
            raise UsageError(f"{word} has characters that {encoding} cannot represent: set PYTHONUTF8=1")
    parser = build_parser()
    try:
        to_be_read = [word for word in arguments if not word.startswith("--print_config")]
        parser.given = vars(parser.parse_args(to_be_read, defaults=False))
        options = parser.parse_args(arguments)
    except (argparse.ArgumentError, UnicodeDecodeError) as error:
        raise UsageError(_explain(str(error))) from None
    values = {name: getattr(options, name) for name in (entry.name for entry in fields(Config))}
    config = Config(**with_recipe(values, parser.given))
    _refuse_parameters_of_another_test(config, parser.given)
    return config


def _refuse_parameters_of_another_test(config: Config, given: Collection[str]) -> None:
    """θ or ν without a word of the test would be read by none. (Where the test is named, they may be left over from a
    file or an experiment that the command line overrides.)"""
    if not config.test or "test_type" in given:
        return
    own = {test: test_parameters({"test_type": test}) for test in TESTS}
    readers = {name: [test for test in TESTS if name in own[test]] for names in own.values() for name in names}
    for name in sorted(readers, key=lambda name: len(readers[name])):
        unread = config.test_type not in readers[name]
        if unread and name in given and getattr(config, name) != getattr(DEFAULTS, name):
            choice = " or ".join(readers[name])
            raise UsageError(f"--{name} acts only with --test_type={choice}: add that, or leave --{name} out")


def _explain(message: str) -> str:
    """One line with the option, what it takes and the nearest valid word, from the parser's message."""
    found = re.search(r"(unrecognized arguments:|Option|[Kk]ey|argument) ['\"]?(-*)(\w+)", message)
    about, dashes, name = found.groups() if found else ("", "", "config")
    types = {entry.name: entry.type for entry in fields(Config)}
    if about == "unrecognized arguments:" and not dashes:
        return f"unexpected argument '{name}': options are written --NAME=VALUE (--help lists all)"
    if about in ("unrecognized arguments:", "Option") or "is not expected" in message:
        near = nearest(name, [*types, "config", "help", "print_config"])
        return f"unknown option {dashes}{name}{'' if dashes else ' in the --config file'}{near} (--help lists all)"
    if name not in types:
        return f"--config: {' '.join(message.partition(': ')[2].split())}: give a YAML file with lines OPTION: VALUE"
    if about == "argument":
        return f"--{name} needs a value: write --{name}=VALUE"
    valid, value = _values(types[name]), message.rpartition("alue: ")[2].strip()
    return f"--{name} must be {valid}, not '{value}'{nearest(value, re.split(', | or ', valid))}"


def page() -> str:
    """docs/options.md: every option with its type, default and meaning, a table a topic."""
    meanings = {action.dest: action for action in build_parser()._actions}
    lines = [
        "# Options",
        "",
        "Written by `python -m options.command_line > docs/options.md` from the program's own options. On the command",
        "line `--NAME=VALUE`; in a file for `--config FILE` a line `NAME: VALUE`. What stands on the command line",
        "after `--config` overrides the file.",
    ]
    for topic in Config.__bases__:
        lines += ["", f"## {topic.__doc__}", "", "| option | values | default | meaning |", "|---|---|---|---|"]
        for entry in fields(topic):
            default = getattr(DEFAULTS, entry.name)
            default = "" if default is None or default == {} or default == [] else f"`{default}`"
            meaning = " ".join(meanings[entry.name].help.split())
            lines.append(f"| `--{entry.name}` | {_values(entry.type)} | {default} | {meaning.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def _metavar(kind: Any) -> str:
    """A type in `--help`: INT, INT|auto, {paper,steady}."""
    origin, arguments = get_origin(kind), [one for one in get_args(kind) if one is not NoneType]
    if origin is Literal:
        return f"{{{','.join(arguments)}}}" if arguments[1:] else arguments[0]
    if origin in (Union, UnionType):
        return "|".join(map(_metavar, arguments))
    return (origin or kind).__name__.upper()


def _values(kind: Any) -> str:
    """What an option of this type takes: its choices, its alternatives, or what it is."""
    origin, arguments = get_origin(kind), [one for one in get_args(kind) if one is not NoneType]
    if origin in (Literal, Union, UnionType):
        words = [str(one) if origin is Literal else _values(one) for one in arguments]
        return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
    if origin is list:
        return f"a list [A,B,…], each {_values(arguments[0])}"
    plain = {bool: "True or False", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return plain.get(kind, "{NAME: VALUE}")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # a file of the project, whatever the terminal is
    print(page(), end="")
