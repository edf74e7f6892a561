"""The tables and the figure of README.md and docs/held_out.md, made of what benchmarks.held_out has kept.

    python -m benchmarks.held_out_tables

A page has lines `<!-- table: KIND -->` … `<!-- end of table -->`; what is between them is written anew.
"""

import argparse
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import geometric_mean

import numpy as np

from benchmarks.comparison import ROOT
from benchmarks.held_out import KEPT, KNEES, PROBLEMS, SEEDS, STYLES, Course
from benchmarks.tables import filled, markdown
from runs import figures

PAGES = (Path("README.md"), Path("docs/held_out.md"))
FIGURE = Path("docs/held_out.png")
STEADY, FIRST_FORM, AVERAGED = "steady", "first_form", "averaged so far"
CHANGED_ON = ("teacher", "autoencoder", "packages")
"""By what its first form showed on these, `steady` was changed: they are held out for that form alone."""
MOST = 4.0
"""What a run that does not arrive counts, over the quickest run of that line; and where the profile ends."""
RESAMPLED = 10_000
NOT_MEASURED = "not measured"
DESCRIBED = {
    "resnet14": "CIFAR-10 at 16 × 16, ResNet-14, GroupNorm, AdamW",
    "batch_norm": "CIFAR-10 at 16 × 16, convolutions, BatchNorm, SGD",
    "torch_gpt": "PyTorch's sources, GPT, AdamW",
    "teacher": "regression on a random network's output, SGD",
    "autoencoder": "MNIST at 14 × 14, autoencoder, Adam",
    "packages": "words of a library, which package?, AdaGrad",
}

Costs = dict[str, np.ndarray]
"""Modelled time of every seed (8,) by method."""


@cache
def record(problem: str) -> dict | None:
    file = KEPT / f"{problem}.json"
    return json.loads(file.read_text()) if file.exists() else None


def measured() -> list[str]:
    return [problem for problem in PROBLEMS if record(problem)]


def label(entry: dict) -> str:
    """A rule's name, or size and style of a constant batch with its rate."""
    if entry["knee"]:
        return entry["rule"]
    return f"{entry['size']}, {entry['style']}, rate {entry['rate']:.2g}"


def costs(problem: str, target: int, knee: int) -> Costs:
    """Of the constants, and of all rules that were told this P; a run that did not arrive counts `MOST`."""
    kept = record(problem)
    found: dict[str, dict[int, float]] = {}
    for entry in kept["final"]:
        if entry["knee"] in (None, knee):
            course = Course(entry["rows"], entry["larger_is_better"], entry["end"])
            found.setdefault(label(entry), {})[entry["seed"]] = course.cost(kept["targets"][target], knee)
    whole = {name: np.array([own[seed] for seed in SEEDS]) for name, own in found.items()}
    late = MOST * min(own.min() for own in whole.values())
    return {name: np.minimum(own, late) for name, own in whole.items()}


def is_constant(name: str) -> bool:
    return ", rate " in name


def best_constant(of_line: Costs) -> str:
    return min(filter(is_constant, of_line), key=lambda name: geometric_mean(of_line[name]))


def log_ratios(of_line: Costs, rule: str, draws: np.ndarray) -> np.ndarray:
    """The logarithm of the ratio of geometric means, rule over the best constant, for each row of seeds (n, 8) → (n,).

    The best constant is chosen anew in every row, so that an interval has this choice in it.
    """
    constants = np.stack([np.log(own)[draws].mean(1) for name, own in of_line.items() if is_constant(name)])
    return np.log(of_line[rule])[draws].mean(1) - constants.min(0)


def draws(problem: str) -> np.ndarray:
    """Seeds drawn with replacement, the first row all of them once; for one problem always the same."""
    generator = np.random.default_rng(list(problem.encode()))
    return np.vstack([np.arange(len(SEEDS)), generator.integers(len(SEEDS), size=(RESAMPLED, len(SEEDS)))])


def in_words(logs: np.ndarray) -> str:
    """Of the first row, and the 95 % interval of all others (a percentile bootstrap)."""
    low, high = np.quantile(logs[1:], (0.025, 0.975))
    return f"{math.exp(logs[0]):.2f} ({math.exp(low):.2f}–{math.exp(high):.2f})"


def lines(problem: str, knee: int) -> list[Costs]:
    """Of both targets."""
    return [costs(problem, target, knee) for target in range(len(record(problem)["targets"]))]


def ratios() -> str:
    """Every problem and target: `steady` over the best constant, for every P."""
    body = []
    for problem in PROBLEMS:
        if problem not in measured():
            body.append([problem, "", *[NOT_MEASURED] * len(KNEES), ""])
            continue
        for target, value in enumerate(record(problem)["targets"]):
            of_knees = [costs(problem, target, knee) for knee in KNEES]
            cells = [in_words(log_ratios(of_line, STEADY, draws(problem))) for of_line in of_knees]
            best = "; ".join(best_constant(of_line) for of_line in of_knees)
            body.append([problem, f"{value:g}", *cells, best])
    return markdown(["problem", "target", *(f"P = {knee}" for knee in KNEES), "best constants, by P"], body)


def in_short() -> str:
    """README's table, a line a problem: `steady` over the best constant to the demanding target, and the means of all
    lines of both targets, apart for those by which it was changed."""
    body = []
    for problem in measured():
        demanding = [lines(problem, knee)[-1] for knee in KNEES]
        cells = [in_words(log_ratios(of_line, STEADY, draws(problem))) for of_line in demanding]
        body.append([DESCRIBED.get(problem, problem), *cells])
    if lacking := len(PROBLEMS) - len(body):
        body.append([f"the other {lacking}", *[NOT_MEASURED] * len(KNEES)])
    means = [
        ("held out, geometric mean, both targets", STEADY, held_out()),
        ("the three by which it was changed", STEADY, CHANGED_ON),
        ("these, in its first form, held out", FIRST_FORM, CHANGED_ON),
    ]
    for words, rule, of in means:
        logs = [of_rule(rule, knee, of) for knee in KNEES]
        cells = [in_words(np.mean(own, axis=0)) if own else NOT_MEASURED for own in logs]
        body.append([f"**{cell}**" for cell in (words, *cells)])
    return markdown(["problem", *(f"P = {knee}" for knee in KNEES)], body)


def held_out() -> list[str]:
    """The problems that had no part in `steady` as it is."""
    return [problem for problem in PROBLEMS if problem not in CHANGED_ON]


def of_rule(rule: str, knee: int, problems: Sequence[str] | None = None) -> list[np.ndarray]:
    """Logarithms of the ratios, as `log_ratios`, of all lines of these problems (default: all) that were measured with
    this rule."""
    return [
        log_ratios(of_line, rule, draws(problem))
        for problem in measured()
        if problems is None or problem in problems
        for of_line in lines(problem, knee)
        if rule in of_line
    ]


def leaderboard() -> str:
    """All rules: geometric mean of the ratios over all problems that were measured, the worst, and the interval; of
    `steady` also over those alone that are held out."""
    header = [words for knee in KNEES for words in (f"P = {knee}", "worst")]
    rows = [(f"`{rule}`", rule, problems_of(rule)) for rule in rules()]
    rows.append((f"`{STEADY}`, held out", STEADY, [problem for problem in held_out() if problem in measured()]))
    body = []
    for words, rule, problems in rows:
        logs_of = [of_rule(rule, knee, problems) for knee in KNEES if problems]
        cells = [[in_words(np.mean(logs, axis=0)), f"{math.exp(max(own[0] for own in logs)):.2f}"] for logs in logs_of]
        if cells:
            body.append([words, str(len(problems)), *(cell for of_knee in cells for cell in of_knee)])
    return markdown(["rule", "problems", *header], body or [["`steady`", "0", *[NOT_MEASURED] * len(header)]])


def rules() -> list[str]:
    return sorted({label(entry) for problem in measured() for entry in record(problem)["final"] if entry["knee"]})


def problems_of(rule: str) -> list[str]:
    """Those that were measured with this rule."""
    return [problem for problem in measured() if any(e["knee"] and e["rule"] == rule for e in record(problem)["final"])]


def over_steady() -> str:
    """The other rules, `steady` without one of its parts among them: geometric mean of their times over `steady`'s; of
    what its first form was without a part, over that form's."""
    body = []
    for rule in rules():
        base = FIRST_FORM if rule.startswith(f"{FIRST_FORM}_") else STEADY
        if rule == STEADY:
            continue
        row = [f"`{rule}`", f"`{base}`", ", ".join(problems_of(rule))]
        for knee in KNEES:
            logs = [
                (np.log(of_line[rule]) - np.log(of_line[base]))[draws(problem)].mean(1)
                for problem in problems_of(rule)
                for of_line in lines(problem, knee)
            ]
            row.append(in_words(np.mean(logs, axis=0)))
        body.append(row)
    header = ["rule", "over", "problems", *(f"P = {knee}" for knee in KNEES)]
    return markdown(header, body or [["", "", "", *[NOT_MEASURED] * len(KNEES)]])


def tests_read_once() -> str:
    """At the end of the runs: the test set's objective of `steady` (its first form, too) and of the constants that were
    best, the median of the seeds, and the least and the most."""
    body = []
    for problem in measured():
        found: dict[str, list[float]] = {}
        for entry in record(problem)["final"]:
            if entry["knee"] and entry["rule"] not in (STEADY, FIRST_FORM):
                continue
            name = f"`{label(entry)}`, P = {entry['knee']}" if entry["knee"] else label(entry)
            found.setdefault(name, []).append(entry["test"])
        for name, values in found.items():
            known = [value for value in values if value is not None]
            body.append([problem, name, f"{np.median(known):.4g} ({min(known):.4g}–{max(known):.4g})"])
    return markdown(["problem", "method", "test set"], body or [["", "", NOT_MEASURED]])


TRIALS = (1, 2, 4, 8, 16)


def equal_tuning() -> str:
    """After k trials (seed 0): modelled time of the best of k rates of `steady`, over that of the best of k constants,
    drawn without replacement from the sweep of those with the same average of the weights (where the problem has a
    schedule of its own: from the sweep with that); geometric mean over all lines."""
    body = []
    for knee_at, knee in enumerate(KNEES):
        row = [str(knee)]
        for k in TRIALS:
            logs = []
            for problem in measured():
                for target in range(len(record(problem)["targets"])):
                    constants, own = (cells(problem, target, knee_at, of_steady) for of_steady in (False, True))
                    logs.append(math.log(best_of(own, k) / best_of(constants, k)))
            row.append(f"{math.exp(np.mean(logs)):.2f}" if logs else NOT_MEASURED)
        body.append(row)
    return markdown(["P", *(f"k = {k}" for k in TRIALS)], body)


def cells(problem: str, target: int, knee_at: int, of_steady: bool) -> list[float]:
    """Costs of the sweep's runs (what does not arrive counts `MOST`), of constants or of `steady` told this P."""
    kept, style = record(problem), PROBLEMS[problem].style
    style = AVERAGED if style == "constant rate" else style
    all_costs, chosen = [], []
    for entry in kept["sweep"]:
        if entry["knee"] in (None, KNEES[knee_at]):
            all_costs.append(cost := entry["costs"][target][knee_at])
            if entry["knee"] if of_steady else not entry["knee"] and entry["style"] == style:
                chosen.append(cost)
    late = MOST * min(filter(None, all_costs))
    return [min(cost or late, late) for cost in chosen]


def best_of(values: Sequence[float], k: int) -> float:
    """The expected least of k of them, drawn without replacement; of all, where there are fewer."""
    ordered, n = sorted(values), len(values)
    k = min(k, n)
    return sum(value * math.comb(n - 1 - i, k - 1) for i, value in enumerate(ordered[: n - k + 1])) / math.comb(n, k)


def profile() -> dict[str, np.ndarray]:
    """For each way of training: over all lines (problem, target, P), its time over the best of all ways, sorted.

    The constants of every style are those of the sweep (seed 0), tuned over size and rate; `steady` has the rate of the
    small batch.
    """
    found: dict[str, list[float]] = {}
    for problem in measured():
        kept = record(problem)
        smallest = [e for e in kept["final"] if e["knee"]][0]["rate"]
        for target in range(len(kept["targets"])):
            for at, knee in enumerate(KNEES):
                ways = {style: math.inf for style in STYLES} | {STEADY: math.inf}
                for entry in kept["sweep"]:
                    way = STEADY if entry["knee"] else entry["style"]
                    if entry["knee"] in (None, knee) and (way != STEADY or entry["rate"] == smallest):
                        ways[way] = min(ways[way], entry["costs"][target][at] or math.inf)
                least = min(ways.values())
                for way, cost in ways.items():
                    found.setdefault(way, []).append(cost / least)
    return {way: np.sort(values) for way, values in found.items()}


def draw(file: Path) -> None:
    """The share of lines on which a way of training takes at most τ times the best way's time, τ to 4."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(figures.PRINT):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for way, values in profile().items():
            shares = np.arange(1, len(values) + 1) / len(values)
            x, y = np.append(values, np.inf), np.append(shares, shares[-1])
            kept = x <= MOST
            ends = shares[kept[:-1]][-1] if kept.any() else 0.0
            axes.step([*x[kept], MOST], [*y[kept], ends], where="post", label=way, lw=2.5 if way == STEADY else 1.3)
        axes.set(
            xlabel="τ: time over that of the quickest way", ylabel="share of lines", xlim=(1, MOST), ylim=(0, 1.02)
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 1.25, 1.5, 2, 3, 4], ["1", "1.25", "1.5", "2", "3", "4"])
        axes.legend()
        figure.savefig(file, dpi=160)


KINDS = {
    "in_short": in_short,
    "ratios": ratios,
    "leaderboard": leaderboard,
    "over_steady": over_steady,
    "equal_tuning": equal_tuning,
    "tests_read_once": tests_read_once,
}


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    ).parse_args(arguments)
    for page in PAGES:
        (ROOT / page).write_text(filled((ROOT / page).read_text(), KINDS))
        print(ROOT / page)
    if measured():
        draw(ROOT / FIGURE)
        print(ROOT / FIGURE)


if __name__ == "__main__":
    main()
