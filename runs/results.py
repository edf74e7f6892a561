"""Runs on disk: found, read, chosen by option, grouped into configurations whose runs differ only in the seed."""

import csv
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

import tests
from adadagrad.control.learning_rate import MEASURED
from options.errors import UsageError
from options.names import nearest
from options.recipes import EARLIER, RECIPES
from options.schedules import PARAMETERS_OF_TESTS
from options.schema import CheckpointOptions, Config

FILES = ("config.yaml", "metrics.csv", "summary.json")
NOT_COMPARED = {"seed", "run_name", "recipe", "out_dir", "data_dir", "num_workers"}
NOT_COMPARED |= {entry.name for entry in fields(CheckpointOptions)}
"""Options in which the runs of one configuration may differ."""
ARRIVAL = 3
"""Evaluations whose mean has to pass a target."""

UNSAID = (None, False, "none")
IN_A_RECIPE = {name for recipe in RECIPES.values() for name in recipe}
"""Defaults that a configuration's name leaves out: these values, and those of these options."""
MEASURING = {"smoothing", "test_gradients", "max_test_micro_batch_size"}
"""Options of the statistics that are read where something is decided by them."""


def written(column: str, value: float | None, digits: int = 2) -> str:
    """A measured value for people: an accuracy in percent, all else as a number; of a column such as val_accuracy."""
    if value is None:
        return "-"
    return f"{value:.{digits}%}" if is_share(column) else f"{value:.4f}"


def is_share(column: str) -> bool:
    """Between 0 and 1, and shown in percent."""
    return column.endswith("accuracy")


def in_words(column: str) -> str:
    """val_bits_per_byte as "validation bits per byte"."""
    return column.replace("val_", "validation ", 1).replace("_", " ")


class DamagedRun(Exception):
    """A run's folder that cannot be read; says what is wrong with it."""


def read_metrics(
    folder: Path, columns: Sequence[str] | None = None, optional: Sequence[str] = ()
) -> dict[str, list[float | None]]:
    """The columns (default: all) of a run's metrics.csv; empty cells are None, and so are those of optional columns
    that are not there.

    Raises:
        ValueError, KeyError: a cell is no number; there is no such column.
        OSError: there is no such file.
    """
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        names = next(rows, [])
        table = dict(zip(names, zip(*(row for row in rows if len(row) == len(names)))))
    if not table:
        return {}
    wanted = [*(columns or table), *optional]
    table |= {name: ("",) * len(next(iter(table.values()))) for name in optional if name not in table}
    return {name: [float(cell) if cell else None for cell in table[name]] for name in wanted}


def seconds(metrics: dict[str, list[float | None]]) -> list[float]:
    """Time since the start at each row: steps with their tests, without evaluation. Needs `step` and `step_time`."""
    total, step, at = 0.0, 0.0, []
    for row_step, step_time in zip(metrics["step"], metrics["step_time"]):
        total += (row_step - step) * step_time
        step = row_step
        at.append(total)
    return at


def last_epoch_loss(metrics: dict[str, list[float | None]]) -> float | None:
    """Mean training loss over the samples of the last epoch (of the whole run, where that is shorter)."""
    if not metrics:
        return None
    start, total, count = max(metrics["epoch"][-1] - 1, 0.0), 0.0, 0.0
    previous = [(0.0, 0.0), *zip(metrics["epoch"], metrics["samples"])]
    for (_, before), epoch, samples, loss in zip(previous, metrics["epoch"], metrics["samples"], metrics["train_loss"]):
        if epoch > start:
            total += loss * (samples - before)
            count += samples - before
    return total / count


def price(
    metrics: dict[str, list[float | None]], critical: float, initial: int, knee: float | None
) -> dict[str, float | None]:
    """What the choice of the batch sizes costs in samples and saves in time, as it is modelled: n samples by batches of
    b are worth n/(1 + b/C) by the smallest ones, and take n(1 + P/b) times as long as a sample, P the knee.

    Args:
        metrics: columns samples, batch_size, noise_scale, and the lower end of its interval; None where they are not
            known: the last one known counts, and the first one before it. Without any interval nothing is said: it is
            of single batches then.
        critical: critical batch size over noise scale.
        initial: b₀ [samples].
        knee: P [samples]; None: not known, and so is the time.

    Returns:
        `samples_over_least`: samples over the least possible for the same; `samples_over_initial`, `time_over_initial`:
        samples and time over those of batches of b₀ throughout. None where they are not known.
    """
    noise = metrics.get("noise_scale", [])
    known = next((value for value in noise if value), None)
    if known is None or not any(metrics.get("noise_scale_low", [])):
        return dict.fromkeys(("samples_over_least", "samples_over_initial", "time_over_initial"))
    least = by_initial = time = 0.0
    before = 0.0
    for samples, size, found in zip(metrics["samples"], metrics["batch_size"], noise):
        known, used, before = found or known, samples - before, samples
        worth = used / (1 + size / (critical * known))
        least += worth
        by_initial += worth * (1 + initial / (critical * known))
        time += used * (1 + (knee or 0.0) / size)
    time_by_initial = by_initial * (1 + (knee or 0.0) / initial)
    return {
        "samples_over_least": before / least,
        "samples_over_initial": before / by_initial,
        "time_over_initial": None if knee is None else time / time_by_initial,
    }


@dataclass(frozen=True)
class Run:
    """One run's folder, options and summary."""

    folder: Path
    options: dict[str, Any]
    summary: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.options["seed"]

    @cached_property
    def as_given(self) -> dict[str, Any]:
        """The options, with "auto" for those that this run has measured: another run may have measured otherwise."""
        return {**self.options, **dict.fromkeys(self.summary.get("measured_options", ()), "auto")}

    @property
    def status(self) -> str:
        """finished, interrupted, diverged; unfinished: killed, or still running."""
        return self.summary.get("status", "unfinished")

    @cached_property
    def objective(self) -> str:
        """The column of metrics.csv by which evaluations are compared: the summary's, or the first that measures."""
        if "objective" in self.summary:
            return self.summary["objective"]
        with open(self.folder / "metrics.csv", newline="") as file:
            columns = [name for name in next(csv.reader(file), []) if name.startswith("val_")]
        return next((name for name in columns if name != "val_loss"), "val_loss" if columns else "val_accuracy")

    @property
    def larger_is_better(self) -> bool:
        """Of the objective."""
        return self.summary.get("larger_is_better", is_share(self.objective))

    @cached_property
    def metrics(self) -> dict[str, list[float | None]]:
        """The columns that reports use, and `seconds`; read at the first use.

        Raises:
            DamagedRun: metrics.csv cannot be read.
        """
        columns = ("step", "samples", "train_loss", "val_loss", "batch_size", "step_time")
        try:
            metrics = read_metrics(self.folder, list({*columns, self.objective}), ("noise_scale", "batch_noise_scale"))
        except (OSError, ValueError, KeyError) as error:
            raise DamagedRun(f"{self.folder}: metrics.csv cannot be read ({_words(error)})") from None
        if not metrics:
            raise DamagedRun(f"{self.folder}: metrics.csv has no rows")
        if not any(metrics.pop("batch_noise_scale")):  # earlier runs meant that one by the name
            metrics["noise_scale"] = [None] * len(metrics["step"])
        return {**metrics, "seconds": seconds(metrics)}

    def reached(self, target: float) -> dict[str, float] | None:
        """Steps, samples and seconds when the mean of the last three evaluations (of all, where there are fewer) has
        passed this objective; None if it never has. One evaluation alone passes early by chance."""
        recent: deque[float] = deque(maxlen=ARRIVAL)
        for i, value in enumerate(self.metrics[self.objective]):
            if value is None:
                continue
            recent.append(value)
            if fmean(recent) >= target if self.larger_is_better else fmean(recent) <= target:
                return {name: self.metrics[name][i] for name in ("step", "samples", "seconds")}
        return None


def objective(runs: Sequence[Run]) -> str:
    """What all of these runs are compared by.

    Raises:
        UsageError: not all by the same.
    """
    found = sorted({run.objective for run in runs})
    if len(found) != 1:
        raise UsageError(f"runs are compared by {' and '.join(found)}: choose some by --where, such as dataset=NAME")
    return found[0]


def target_in_words(target: float, column: str) -> str:
    return f"{100 * target:g} %" if is_share(column) else f"{target:g}"


def read_run(folder: Path) -> Run:
    """
    Raises:
        DamagedRun: a file is missing, cut short or not what a run writes.
    """
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        options = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        summary_file = folder / "summary.json"
        summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.exists() else {}
        if not (isinstance(options, dict) and {"seed", "model", "dataset", "test"} <= set(options)):
            raise DamagedRun(f"{folder}: config.yaml does not hold the options of a run")
        if not isinstance(summary, dict) or (summary_file.exists() and "status" not in summary):
            raise DamagedRun(f"{folder}: summary.json does not hold a status")
        if not (folder / "metrics.csv").is_file():
            raise DamagedRun(f"{folder}: there is no metrics.csv")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DamagedRun(f"{folder}: {_words(error)}") from None
    return Run(folder, {**_defaults(), **options}, summary)


@cache
def _defaults() -> dict[str, Any]:
    """What an option that came later was in earlier runs."""
    return asdict(Config())


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def find(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs in these folders, however deep, sorted by path; and what is wrong with those that cannot be read.

    Raises:
        UsageError: a folder does not exist or has no run in it.
    """
    found, damaged = [], []
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder: give run folders or folders of them")
        before = len(found) + len(damaged)
        for path, subfolders, files in os.walk(folder):
            subfolders.sort()
            if any(name in files for name in FILES):
                subfolders.clear()
                try:
                    found.append(read_run(Path(path)))
                except DamagedRun as problem:
                    damaged.append(str(problem))
        if len(found) + len(damaged) == before:
            raise UsageError(f"{folder} has no run in it: a run's folder holds {', '.join(FILES)}")
    return list({run.folder.resolve(): run for run in found}.values()), damaged


def choose(runs: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
    """The runs whose options are as the conditions `OPTION=VALUE` say.

    Raises:
        UsageError: a condition is malformed or names an option that no run has, or no run is left.
    """
    for condition in conditions:
        name, equals, value = condition.partition("=")
        known = {option for run in runs for option in run.options}
        if not equals or name not in known:
            raise UsageError(f"--where={condition}: write OPTION=VALUE{nearest(name, sorted(known))}")
        runs = [run for run in runs if _equal(run.options[name], value)]
        if not runs:
            raise UsageError(f"--where={condition}: no run is left; choose another value")
    return list(runs)


def _equal(option: Any, value: str) -> bool:
    if isinstance(option, (int, float)) and not isinstance(option, bool):
        try:
            return float(value) == option
        except ValueError:
            return False
    return value == str(option)


def without_effect(options: dict[str, Any]) -> set[str]:
    """Options that the run did not read, given the others: they tell no two configurations apart."""
    rule = tests.rule_class(options)
    read = set(rule.options)
    if "test_type" in read:
        read |= set(tests.test_parameters(options))
    unused = ({*PARAMETERS_OF_TESTS} - read) | tests.options_of_other_rules(options)
    if rule.name == "stagewise":
        unused |= {"batch_size", "max_batch_size"}
    else:
        unused -= {"batch_size"} | (set() if rule.name == "constant" else {"max_batch_size"})
    scales = options["lr_scaling"] in MEASURED
    if not rule.measures and not (options["test"] and scales):
        unused |= {"test_interval", "ramp_up_type", "statistics", "test_groups"} | (set() if scales else MEASURING)
    if rule.measures or not scales:  # then a monitor changes nothing
        unused |= {"monitor_interval"}
    if options["test_gradients"] not in ("micro_batch", "worker"):
        unused.add("test_groups")
    if rule.name != "goodput" and options["lr_scaling"] != "critical":
        unused |= {"critical"}
    return unused | {
        "monitor_modules",
        "monitor_metrics",
        "test",
        "stagewise_ramp_up",
        "linear_ramp_up",
        "seesaw_ramp_up",
        "recipe",
    }


def schedule(options: dict[str, Any]) -> tuple[str, set[str]]:
    """How the batch grows, in words ("norm test, η = 0.1"), and the options that these words tell of."""
    rule, steady = tests.rule(options), RECIPES["steady"]
    words, said = rule.describe(options["batch_size"], options["max_batch_size"]), {*rule.described, "ramp_up_type"}
    if rule.test:
        said |= set(tests.test_parameters(options))
    if rule.measures:
        otherwise = {name for name, value in steady.items() if options[name] != value} - without_effect(options)
        if options["recipe"] == "steady":
            otherwise -= {name for name, value in EARLIER.items() if options[name] == value}
        if not otherwise:
            return "steady", said | set(steady)
        if otherwise == {"ramp_up_type"}:  # a test in the recipe's place of goodput
            return f"{words}, as steady", said | set(steady)
    return words, said


@dataclass
class Group:
    """The runs of one configuration: `finished` differ only in the seed, `others` did not come to their end."""

    name: str
    finished: list[Run]
    others: list[Run]


def group(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Groups in the natural order of their names; and a line for each finished run left out for a newer twin.

    A name tells of the batch-size schedule and of whatever else differs between the groups.
    """
    configurations: dict[str, list[Run]] = {}
    for run in runs:
        configurations.setdefault(json.dumps(_compared(run.as_given), sort_keys=True, default=str), []).append(run)
    differing = _differing([members[0].as_given for members in configurations.values()])
    groups, left_out = [], []
    for members in configurations.values():
        finished, twins = _newest_of_each_seed([run for run in members if run.status == "finished"])
        left_out += twins
        others = [run for run in members if run.status != "finished"]
        groups.append(Group(_name(members[0].as_given, differing), finished, others))
    return sorted(groups, key=lambda entry: natural(entry.name)), left_out


def _compared(options: dict[str, Any]) -> dict[str, Any]:
    skipped = NOT_COMPARED | without_effect(options)
    return {name: value for name, value in options.items() if name in _defaults() and name not in skipped}


def _differing(configurations: Sequence[dict[str, Any]]) -> set[str]:
    """The options that do not have one value wherever they have an effect and no schedule's name tells of them."""
    values: dict[str, set[str]] = {}
    for options in configurations:
        told = schedule(options)[1]
        for name, value in _compared(options).items():
            if name not in told:
                values.setdefault(name, set()).add(repr(value))
    return {name for name in values if len(values[name]) > 1}


def _name(options: dict[str, Any], differing: set[str]) -> str:
    words, told = schedule(options)
    before, after = [], []
    for name, value in _compared(options).items():
        if name in differing - told and not (value == _defaults()[name] and (value in UNSAID or name in IN_A_RECIPE)):
            value = f"{value:g}" if isinstance(value, float) else str(value)
            speaks_for_itself = name in ("model", "dataset", "optimizer", "precision")
            (before if name in ("model", "dataset") else after).append(
                value if speaks_for_itself else f"{name.replace('_', ' ')} {value}"
            )
    return ", ".join([*before, words, *after])


def common(runs: Sequence[Run]) -> dict[str, Any]:
    """What every run shares of the options that say what was trained."""
    names = ("model", "dataset", "optimizer", "learning_rate", "max_samples", "precision")
    return {
        name: runs[0].options[name]
        for name in names
        if name in runs[0].options and len({str(run.options.get(name)) for run in runs}) == 1
    }


def _newest_of_each_seed(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    newest, left_out = {}, []
    for run in sorted(runs, key=lambda run: (run.folder / "summary.json").stat().st_mtime):
        if run.seed in newest:
            left_out.append(f"{newest[run.seed].folder}: {run.folder} is newer and has the same options and seed")
        newest[run.seed] = run
    return [newest[seed] for seed in sorted(newest)], left_out


def natural(text: str) -> list[tuple[bool, float, str]]:
    """A key that sorts "16" before "128"."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", text)
    return [(True, float(part), "") if i % 2 else (False, 0.0, part) for i, part in enumerate(parts)]
