"""From a user's words to the options: the command line, YAML files, `--help`, and what is said to a word that is wrong.

`parse` reads the command line and YAML files (`--config run.yaml`; `--print_config` writes one); `--help` shows the
topics of schema.py as groups.
"""

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields
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
        words = (self._get_type_str(action) or action.dest).split(" | ")[0]
        return {"<class 'Path'>": "PATH", "dict[str, Any]": "DICT"}.get(words, words.upper())


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
        description="Train a network with a batch size that grows when the gradient's statistics ask for it.",
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
            raise UsageError(f"{word} has letters that the encoding {encoding} has not: set PYTHONUTF8=1")
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
    """One line with the nearest valid name, from the parser's message."""
    names = [entry.name for entry in fields(Config)] + ["config", "help", "print_config"]
    if unknown := re.match(r"unrecognized arguments: (?P<dashes>-*)(?P<name>[^\s=.]+)", message):
        if not unknown["dashes"]:
            return f"unexpected argument '{unknown['name']}': options are written --NAME=VALUE (--help lists all)"
        return f"unknown option --{unknown['name']}{nearest(unknown['name'], names)} (--help lists all)"
    if unknown := re.search(r"[Kk]ey '(\w+)' is not expected|Option '(\w+)' is not accepted", message):
        name = unknown[1] or unknown[2]
        return f"unknown option {name} in the --config file{nearest(name, names)} (--help lists all)"
    if missing := re.match(r"argument (--\w+): expected", message):
        return f"{missing[1]} needs a value: write {missing[1]}=VALUE"
    if bad := re.match(r'Parser key "(?P<name>[\w.]+)":.*?[vV]alue: (?P<value>[^\n]*)\Z', message, re.S):
        value, types = bad["value"].strip(), re.findall(r"Expected (?:an? )?(.+?)(?=\.?\n|\. Got|\Z)", message, re.S)
        choices = re.findall(r"'([^']+)'", " ".join(kind for kind in types if "Literal" in kind))
        return f"--{bad['name']} must be {_in_words(types)}, not '{value}'{nearest(value, choices)}"
    message = " ".join(re.sub(r'Parser key "config":|Problems parsing config:|Unexpected config:', "", message).split())
    return f"--config: {message}: give a YAML file with lines OPTION: VALUE"


def _in_words(types: Sequence[str]) -> str:
    known = {
        "bool": "True or False",
        "int": "a whole number",
        "float": "a number",
        "dict": "of the form NAME=VALUE",
        "list": "a list, [N,N,…]",
    }
    words = []
    for kind in types:
        if choices := re.match(r"typing\.Literal\[(.*)\]", kind):
            words.append("one of " * ("," in choices[1]) + choices[1].replace("'", ""))
        elif plain := re.fullmatch(r"<class '(\w+)'>", kind):
            words += [known.get(plain[1], plain[1])] * (plain[1] != "NoneType")
        else:
            words.append(kind.replace("typing.", ""))
    return " or ".join(words) or "something else"


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


def _values(kind: Any) -> str:
    """A type in words: its choices, its alternatives, or its name."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " or ".join(_values(one) for one in arguments if one is not NoneType)
    if origin is list:
        return f"list of {_values(arguments[0])}"
    return str(kind).replace("typing.", "") if origin else kind.__name__


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # a file of the project, whatever the terminal is
    print(page(), end="")
