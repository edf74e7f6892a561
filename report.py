"""Tables and figures of runs, of which those that differ only in the seed count as one configuration.

python report.py out/                                            the table
python report.py out/ --where model=cnn --where eta=0.1          of some runs
python report.py out/ --format=latex > table.tex                 or markdown, csv
python report.py out/ --target=0.98 --figures=figures/           also samples, steps, seconds to 98 %; and the figures
python report.py out/ --target=0.98 --knee=100,3000              also the modelled time on hardware with these knees
python report.py out/RUN --schedule=adadagrad --knee=3000        stages, by the noise scale that this run has measured
"""

import argparse
import csv
import io
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from launch.terminals import show_what_can_be_shown
from options.errors import UsageError
from options.names import expanded
from runs import figures, pilot, results
from runs.results import DamagedRun, Group, Run


@dataclass(frozen=True)
class Column:
    """One quantity of the table: its heading, how it is written, and where a run has it (None: it has not)."""

    name: str
    form: str
    value: Callable[[Run], float | None]
    percent: bool = False


def of_summary(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.summary.get(name)


def of_target(target: float, name: str) -> Callable[[Run], float | None]:
    return lambda run: (run.reached(target) or {}).get(name)


def modelled(knee: float, target: float | None) -> Callable[[Run], float | None]:
    """samples + knee · steps, to the target or to the end: the time on hardware with that knee, in samples of a device
    that is busy throughout (a step of b samples takes as long as knee + b of them)."""

    def value(run: Run) -> float | None:
        if target is not None:
            end = run.reached(target) or {}
            steps, samples = end.get("step"), end.get("samples")
        else:
            steps, samples = run.summary.get("steps"), run.summary.get("samples")
        return None if steps is None or samples is None else samples + knee * steps

    return value


COLUMNS = (
    Column("steps", ",.0f", of_summary("steps")),
    Column("mean batch", ",.0f", of_summary("mean_batch_size")),
    Column("final batch", ",.0f", of_summary("final_batch_size")),
    Column("train loss", ".4f", of_summary("train_loss")),
    Column("val loss", ".4f", of_summary("val_loss")),
)
SPEED = (
    Column("wall time [s]", ",.1f", of_summary("wall_time")),
    Column("samples/s", ",.0f", of_summary("samples_per_second")),
)


def of_objective(name: str) -> Column:
    percent = results.is_share(name)
    words = name.replace("_", " ") + " [%]" * percent
    return Column(words, ".2f" if percent else ".4f", of_summary(name), percent)


def columns(groups: Sequence[Group], target: float | None, knees: Sequence[float] = ()) -> tuple[Column, ...]:
    objectives = dict.fromkeys(run.objective for entry in groups for run in (*entry.finished, *entry.others))
    shown = (*COLUMNS, *(of_objective(name) for name in objectives if name != "val_loss"), *SPEED)
    if target is None:
        return (*shown, *(Column(f"samples + {knee:g}·steps", ",.0f", modelled(knee, None)) for knee in knees))
    to = f"to {results.target_in_words(target, next(iter(objectives)))}"
    return (
        *shown,
        Column(f"samples {to}", ",.0f", of_target(target, "samples")),
        Column(f"steps {to}", ",.0f", of_target(target, "step")),
        Column(f"seconds {to}", ",.1f", of_target(target, "seconds")),
        *(Column(f"samples + {knee:g}·steps {to}", ",.0f", modelled(knee, target)) for knee in knees),
    )


@dataclass(frozen=True)
class Row:
    """Runs that are shown together: the finished ones of a configuration, or one that did not finish."""

    configuration: str
    status: str
    members: list[Run]

    def values(self, column: Column) -> list[float]:
        values = (column.value(run) for run in self.members)
        return [value * 100 if column.percent else value for value in values if value is not None]

    @property
    def seeds(self) -> str:
        return " ".join(str(run.seed) for run in self.members)


def rows(groups: Sequence[Group]) -> list[Row]:
    table = []
    for entry in groups:
        if entry.finished:
            table.append(Row(entry.name, "finished", entry.finished))
        table += [Row(entry.name, run.status, [run]) for run in entry.others]
    return table


def cell(row: Row, column: Column) -> str:
    """Mean ± standard deviation over seeds; how many have a value, where not all do."""
    values = row.values(column)
    if not values:
        return "-"
    text = format(statistics.mean(values), column.form)
    if len(set(values)) > 1:  # a constant batch takes the same steps in every run
        text += f" ± {statistics.stdev(values):{column.form}}"
    return text if len(values) == len(row.members) else f"{text} ({len(values)} of {len(row.members)})"


def table(groups: Sequence[Group], style: str, target: float | None, knees: Sequence[float] = ()) -> str:
    shown = columns(groups, target, knees)
    if style == "csv":
        return csv_table(rows(groups), shown)
    header = ["configuration", "n", *(column.name for column in shown)]
    body = [[row.configuration, number_of_runs(row), *(cell(row, column) for column in shown)] for row in rows(groups)]
    if style == "table":  # narrow enough for a terminal
        header = [name.replace(" ", "\n", 1) for name in header]
        body = [[textwrap.fill(first, 36), *others] for first, *others in body]
    formats = {"table": "simple", "markdown": "github", "latex": "latex_booktabs"}
    align = ("left", "left", *["right"] * len(shown))
    text = tabulate(body, header, formats[style], disable_numparse=True, colalign=align if body else None)
    return mathematics(text) if style == "latex" else text


def number_of_runs(row: Row) -> str:
    return str(len(row.members)) if row.status == "finished" else f"{row.status} (seed {row.seeds})"


def mathematics(text: str) -> str:
    """Letters and signs that LaTeX sets in math mode."""
    for sign, command in {"η": "eta", "θ": "theta", "ν": "nu", "±": "pm"}.items():
        text = text.replace(sign, f"$\\{command}$")
    return text


def csv_table(table_rows: Sequence[Row], shown: Sequence[Column]) -> str:
    """One line a row, means and standard deviations in columns of their own, as exact as they are."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    header = [name for column in shown for name in (column.name, f"{column.name} std", f"{column.name} n")]
    writer.writerow(["configuration", "status", "n", "seeds", *header])
    for row in table_rows:
        cells = []
        for column in shown:
            values = row.values(column)
            cells += [statistics.mean(values) if values else "", statistics.stdev(values) if len(values) > 1 else ""]
            cells.append(len(values))
        writer.writerow([row.configuration, row.status, len(row.members), row.seeds, *cells])
    return file.getvalue().rstrip("\n")


def caption(chosen: Sequence[Run], groups: Sequence[Group]) -> str:
    shared = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in results.common(chosen).items())
    return f"{len(chosen)} runs in {len(groups)} configurations; all: {shared}"


def readable(chosen: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs whose metrics.csv can be read, and what is wrong with the others."""
    good, damaged = [], []
    for run in chosen:
        try:
            run.metrics  # noqa: B018 (read now, kept)
            good.append(run)
        except DamagedRun as problem:
            damaged.append(str(problem))
    return good, damaged


def knees(text: str) -> tuple[float, ...]:
    """P,P,…, each positive."""
    values = tuple(float(part) for part in text.split(","))
    if not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"'{text}' needs positive numbers of samples, such as 30,300")
    return values


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders that have run folders in them")
    parser.add_argument("--where", action="append", default=[], metavar="OPTION=VALUE",
                        help="only runs with this value of an option; may be given several times")  # fmt: skip
    parser.add_argument("--format", choices=("table", "markdown", "csv", "latex"), default="table",
                        help="how the table is written (default: %(default)s)")  # fmt: skip
    parser.add_argument("--target", type=float, metavar="VALUE",
                        help="also samples, steps and seconds until the mean of the last three evaluations has passed "
                             "this accuracy, between 0 and 1, or value of what the runs are compared by")  # fmt: skip
    parser.add_argument("--knee", type=knees, default=(), metavar="P[,P…]",
                        help="also the modelled time samples + P · steps, to the target if there is one, else to the "
                             "end, on hardware where a step costs as much as P samples beside its own")  # fmt: skip
    parser.add_argument("--schedule", choices=tuple(pilot.PROGRAMS),
                        help="print the stages in which to train next, in the syntax of this program, by the noise "
                             "scale that one run has measured (--monitor_interval); on hardware with the one --knee, "
                             "default: that of the run")  # fmt: skip
    parser.add_argument("--stages", type=int, default=4, choices=range(1, 17), metavar="N",
                        help="at most so many of --schedule (default: %(default)s)")  # fmt: skip
    parser.add_argument("--critical", type=float, metavar="C",
                        help="of --schedule: critical batch size over noise scale, as critical.py measures it; "
                             "default: as the run had it")  # fmt: skip
    parser.add_argument("--figures", type=Path, metavar="FOLDER",
                        help="write the figures as PNG and PDF into this folder")  # fmt: skip
    return parser.parse_args(arguments)


def schedule(chosen: Sequence[Run], options: argparse.Namespace) -> str:
    """
    Raises:
        UsageError: there are several runs or knees, no knee is known, or the run does not tell.
    """
    if len(chosen) != 1:
        raise UsageError(f"--schedule is made from one run, and these are {len(chosen)}: give its folder")
    run = chosen[0]
    measured = run.summary.get("knee") or run.options["knee"]
    found = options.knee or ([measured] if measured else [])
    if len(found) != 1:
        raise UsageError("--schedule needs one --knee=P, which this run has not measured" if not found else
                         "--schedule is for one --knee: give one number")  # fmt: skip
    if options.critical is not None and not 0 < options.critical < float("inf"):
        raise UsageError(f"--critical={options.critical} must be a positive number, such as 2")
    try:
        return pilot.schedule(run, options.schedule, found[0], options.stages, options.critical)
    except DamagedRun as problem:
        raise UsageError(str(problem)) from None


def report(options: argparse.Namespace) -> None:
    """
    Raises:
        UsageError: there is nothing to report, or an option is not usable.
    """
    options.folders = [expanded("folders", folder) for folder in options.folders]
    options.figures = options.figures and expanded("figures", options.figures)
    found, problems = results.find(options.folders)
    chosen = results.choose(found, options.where)
    if options.schedule:
        print(schedule(chosen, options))
        return
    objective = None
    if options.figures or options.target is not None:
        chosen, damaged = readable(chosen)
        problems += damaged
        objective = results.objective(chosen) if chosen else None
    if options.target is not None and results.is_share(objective or "") and not 0 < options.target < 1:
        raise UsageError(f"--target={options.target} must be an accuracy between 0 and 1, such as 0.98")
    groups, twins = results.group(chosen)
    for line in problems + twins:
        print(f"skipped: {line}", file=sys.stderr)
    if not groups:
        raise UsageError("none of the runs can be read: see the lines above")
    if options.format in ("table", "markdown"):
        print(caption(chosen, groups), end="\n\n")
    print(table(groups, options.format, options.target, options.knee))
    if options.figures:
        if len(groups) > figures.MOST_CONFIGURATIONS:
            raise UsageError(
                f"--figures: {len(groups)} configurations cannot be told apart in one figure: "
                f"choose at most {figures.MOST_CONFIGURATIONS} by --where"
            )
        for file in figures.draw(groups, options.figures, options.target, objective):
            print(file, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Report as the arguments (default: `sys.argv`) say; returns the exit status."""
    show_what_can_be_shown()
    try:
        report(parse(arguments))
    except UsageError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
