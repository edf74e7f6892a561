"""The tables and figures of docs/results.md, made of the summaries that benchmarks.comparison has kept.

    python -m benchmarks.tables

A page has lines `<!-- table: KIND PROBLEM TARGET -->` … `<!-- end of table -->`; what is between them is written anew.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from scipy.stats import t as student_t
from tabulate import tabulate

from benchmarks.cases import RESULTS
from benchmarks.comparison import KNEES, PARTS, RATES, ROOT, SEEDS
from runs import figures
from runs.results import Group, Run, is_share, read_run

PAGES = (Path("docs/results.md"),)
KEPT = RESULTS / "comparison"
PRESENT = RESULTS / "present"
"""`steady` with P given as it is now (benchmarks.comparison … --rates_of=… --results=benchmarks/results/present)."""
PROBLEMS = {
    "mnist_logistic": "MNIST, logistic regression",
    "mnist_mlp": "MNIST, perceptron",
    "mnist_cnn": "MNIST, `cnn`",
    "cifar10_cnn": "CIFAR-10, `cnn`",
    "stdlib_gpt": "Python's sources, GPT",
}
LABELS = {
    "stagewise": "stagewise 16, 256, 4096 (thirds)",
    "stagewise_early": "stagewise 16, 256, 4096 (20 %, 20 %, 60 %)",
    "stagewise_late": "stagewise 16, 256, 4096 (60 %, 20 %, 20 %)",
    "seesaw": "seesaw (cosine)",
    "linear": "linear to 4096",
    **{f"norm_eta{eta}": f"norm test, η = {eta}" for eta in ("0.1", "0.5", "1")},
    "ip": "inner product test, θ = 0.5",
    "ip_orth": "augmented, θ = 0.5, ν = 1",
    **{f"unbiased_eta{eta}": f"norm test, η = {eta}, as steady" for eta in (1, 2, 3)},
    "unbiased_eta2_uncoupled": "the same, η = 2, learning rate not scaled",
    "steady": "**steady**",
    **{f"steady_knee{knee}": f"steady, P = {knee} given" for knee in KNEES},
    "steady_uncoupled": "steady, learning rate not scaled",
    **{f"norm_eta0.1_from_{size}": f"norm test, η = 0.1, from {size}" for size in (2, 16)},
}
IN_FIGURE = ("norm_eta1", "ip", "unbiased_eta2", "steady", *(f"steady_knee{knee}" for knee in KNEES))
"""Beside the constants."""


def label(method: str) -> str:
    return LABELS.get(method, method.replace("_", " "))


@cache
def tuning(problem: str) -> dict[str, dict]:
    return json.loads((KEPT / problem / "tuning.json").read_text())


@cache
def final_runs(problem: str, method: str, kept: Path | None = None) -> tuple[Run, ...]:
    """Of every seed that is kept (default: in `KEPT`)."""
    folders = [(kept or KEPT) / problem / f"{method}_seed{seed}" for seed in SEEDS]
    return tuple(read_run(folder) for folder in folders if folder.exists())


def methods(problem: str) -> list[str]:
    """Those of which something is kept, in the order of the comparison."""
    return [method for method in PARTS[problem].methods if final_runs(problem, method)]


def rate_of(problem: str, method: str) -> float:
    """The learning rate of the final runs."""
    return final_runs(problem, method)[0].options["learning_rate"]


def in_words(problem: str, target: float) -> str:
    objective = final_runs(problem, methods(problem)[0])[0].objective
    return f"{100 * target:g} %" if is_share(objective) else f"{target:g} {objective[4:].replace('_', ' ')}"


def mean(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):{form}}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return tabulate(body, header, "github", disable_numparse=True)


def at_the_end(run: Run) -> float:
    return run.summary[run.objective] * (100 if is_share(run.objective) else 1)


def times(problem: str, target: str) -> str:
    """A line for each method: what it took to the target, mean ± standard deviation over the final seeds."""
    body = []
    for method in methods(problem):
        runs = final_runs(problem, method)
        reached = [run.reached(float(target)) for run in runs]
        row = [label(method), f"{rate_of(problem, method):g}"]
        if None in reached:
            row += [f"{len(runs) - reached.count(None)} of {len(runs)} runs", *["–"] * (3 + len(KNEES))]
        else:
            samples, steps, seconds = ([entry[n] for entry in reached] for n in ("samples", "step", "seconds"))
            row += [mean(samples, ",.0f"), mean(steps, ",.0f"), mean(seconds, ".2f"), f"{max(seconds):.2f}"]
            row += [mean([(s + knee * k) / 1000 for s, k in zip(samples, steps)], ",.0f") for knee in KNEES]
        body.append([*row, mean([at_the_end(run) for run in runs], ".2f")])
    objective = final_runs(problem, methods(problem)[0])[0].objective
    end = "at the end [%]" if is_share(objective) else "at the end"
    knees = (f"P = {knee}" for knee in KNEES)
    return markdown(["method", "rate", "samples", "steps", "seconds", "worst seed", *knees, end], body)


def costs(problem: str, method: str, target: float, knee: float | None, kept: Path | None = None) -> list[float] | None:
    """Seconds to the target of every seed, or the modelled time with this knee; None where a run does not get there."""
    reached = [run.reached(target) for run in final_runs(problem, method, kept)]
    if None in reached:
        return None
    return [entry["seconds"] if knee is None else entry["samples"] + knee * entry["step"] for entry in reached]


def best_constant(problem: str, target: float, knee: float | None) -> tuple[list[float], str] | None:
    """The constant batch with the least geometric mean: its costs, and its name; None where no one always arrives."""
    found = [(costs(problem, name, target, knee), name) for name in methods(problem) if name.startswith("constant")]
    arrived = [pair for pair in found if pair[0]]
    return min(arrived, key=lambda pair: statistics.geometric_mean(pair[0])) if arrived else None


def ratio(these: Sequence[float], those: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The ratio of the geometric means, and its confidence interval: Welch's t interval of the mean logarithms, which
    supposes neither equal variances nor pairs."""
    logs = [[math.log(value) for value in values] for values in (these, those)]
    difference = statistics.mean(logs[0]) - statistics.mean(logs[1])
    variances = [statistics.variance(values) / len(values) for values in logs]
    if not any(variances):
        return math.exp(difference), math.nan, math.nan
    freedom = sum(variances) ** 2 / sum(v**2 / (len(values) - 1) for v, values in zip(variances, logs))
    half = student_t.ppf((1 + confidence) / 2, freedom) * math.sqrt(sum(variances))
    return math.exp(difference), math.exp(difference - half), math.exp(difference + half)


def steady_for(knee: float | None) -> str:
    """The recipe that measures the knee of this machine, or that is told this one."""
    return f"steady_knee{knee}" if knee else "steady"


def with_interval(these: Sequence[float], those: Sequence[float]) -> str:
    middle, low, high = ratio(these, those)
    return f"{middle:.2f}" if math.isnan(low) else f"{middle:.2f} ({low:.2f}–{high:.2f})"


def against_constants() -> str:
    """Every problem and target: `steady` over the best constant, in seconds and in modelled time."""
    body = []
    for problem, name in PROBLEMS.items():
        for target in PARTS[problem].targets:
            best, constant = best_constant(problem, target, None)
            own = costs(problem, "steady", target, None)
            row = [f"{name}, to {in_words(problem, target)}"]
            row += [f"{statistics.geometric_mean(best):.2f} ({constant.removeprefix('constant_')})"]
            row += [f"{statistics.geometric_mean(own):.2f}" if own else "never"]
            for knee in (None, *KNEES):
                own = costs(problem, steady_for(knee), target, knee)
                words = with_interval(own, best_constant(problem, target, knee)[0]) if own else "never"
                row.append(words if knee else f"**{words}**")
            body.append(row)
    knees = (f"ratio, P = {knee}" for knee in KNEES)
    return markdown(["problem", "best constant [s]", "`steady` [s]", "ratio in seconds", *knees], body)


def present() -> str:
    """Every problem and target: `steady` as it is now, over the best constant, in modelled time."""
    body = []
    for problem, name in PROBLEMS.items():
        for target in PARTS[problem].targets:
            row = [f"{name}, to {in_words(problem, target)}"]
            for knee in KNEES:
                constant = best_constant(problem, target, knee)[0]
                own = costs(problem, steady_for(knee), target, knee, PRESENT)
                reached = [run.reached(target) for run in final_runs(problem, steady_for(knee), PRESENT)]
                arrived = len(reached) - reached.count(None)
                words = f"{arrived} of {len(reached)} runs" if reached else "not measured"
                row.append(with_interval(own, constant) if own else words)
            body.append(row)
    return markdown(["problem", *(f"P = {knee}" for knee in KNEES)], body)


def against_norm_test() -> str:
    """The published norm test with η = 1 over `steady`, in seconds and in modelled time."""
    body = []
    for problem, name in PROBLEMS.items():
        for target in PARTS[problem].targets:
            row = [f"{name}, to {in_words(problem, target)}"]
            for knee in (None, *KNEES):
                pair = [costs(problem, method, target, knee) for method in ("norm_eta1", steady_for(knee))]
                late = [who for who, found in zip(("norm test", "`steady`"), pair) if not found]
                row.append(f"never: {', '.join(late)}" if late else with_interval(*pair))
            body.append(row)
    return markdown(["problem", "ratio in seconds", *(f"ratio, P = {knee}" for knee in KNEES)], body)


def price_of_tuning() -> str:
    """Runs, samples and seconds of the sweeps: of all constant batches, and what `steady` has its rate from."""
    body = []
    for problem, name in PROBLEMS.items():
        constants = [entry for method, entry in tuning(problem).items() if method.startswith("constant")]
        own = tuning(problem)[PARTS[problem].rate_from("steady")]
        for who, entries in (("constants", constants), ("`steady`", [own])):
            tried, samples, seconds = (sum(entry[key] for entry in entries) for key in ("tried", "samples", "seconds"))
            body.append([name, who, tried, f"{samples / 1e6:.2f}", f"{seconds:,.0f}"])
    return markdown(["problem", "tuned", "runs", "million samples", "seconds"], body)


def robustness() -> str:
    """What a learning rate off by a factor of 3 costs (seed 0, so that no ratio has an interval): the measure of the
    sweep, over that at the rate of the final runs."""
    body = []
    for problem, name in PROBLEMS.items():
        best = best_constant(problem, PARTS[problem].targets[1], None)[1]
        for method in dict.fromkeys((PARTS[problem].rate_from("steady"), best, "norm_eta1", "steady")):
            entry, taken = tuning(problem)[method], rate_of(problem, method)
            chosen = RATES.index(taken)
            row = [name, label(method), f"{taken:g}"]
            for i in (chosen - 1, chosen + 1):
                rate = f"{RATES[i]:g}" if 0 <= i < len(RATES) else ""
                there, here = entry["to_target"].get(rate), entry["to_target"][f"{taken:g}"]
                ratio = f"{there / here:.2f}" if there and here else "never"
                row.append(ratio if rate in entry["to_target"] else "not tried")
            body.append(row)
    return markdown(["problem", "method", "rate", "a third of it", "three times it"], body)


OPTIMIZER_NAMES = {
    "sgd": "SGD, momentum 0.9",
    "adam": "Adam, β₂ = 0.95",
    "adam999": "Adam, β₂ = 0.999",
    "adamw": "AdamW, decay 0.1",
    "adagrad": "AdaGrad",
    "muon": "Muon with AdamW",
}
VARIANTS = ("full", "rate", "none")


def couplings() -> str:
    """The perceptron with every optimizer: `steady` with P given over the best constant, in modelled time, by what
    follows the batch: optimizer state, rate and decay; the rate; nothing."""
    body = []
    for optimizer, name in OPTIMIZER_NAMES.items():
        problem = f"mlp_{optimizer}"
        if not (KEPT / problem).exists():
            continue
        for knee in KNEES:
            for target in PARTS[problem].targets:
                best = best_constant(problem, target, knee)
                constant = best[1].removeprefix("constant_").replace("_", ", ") if best else "none"
                row = [name, str(knee), in_words(problem, target), constant]
                for variant in VARIANTS:
                    method = f"steady_knee{knee}_{variant}"
                    own = costs(problem, method, target, knee)
                    row.append(with_interval(own, best[0]) if own and best else arrived(problem, method, target))
                body.append(row)
    return markdown(["optimizer", "P", "to", "best constant", *VARIANTS], body)


def arrived(problem: str, method: str, target: float) -> str:
    """How many of the runs came to the target, in words."""
    reached = [run.reached(target) is not None for run in final_runs(problem, method)]
    return f"{sum(reached)} of {len(reached)} runs" if any(reached) else "never"


def published() -> str:
    """The published settings of logistic regression on MNIST."""
    body = []
    for method in methods("mnist_published"):
        runs = final_runs("mnist_published", method)
        columns = [("steps", 1, ",.0f"), ("mean_batch_size", 1, ",.0f"), ("final_batch_size", 1, ",.0f")]
        columns += [("val_accuracy", 100, ".2f"), ("best_val_accuracy", 100, ".2f"), ("training_time", 1, ",.0f")]
        row = (mean([scale * run.summary[name] for run in runs], form) for name, scale, form in columns)
        body.append([label(method), str(len(runs)), *row])
    header = ["method", "seeds", "steps", "mean batch", "final batch", "accuracy [%]", "best [%]", "seconds"]
    return markdown(header, body)


KINDS: dict[str, Callable[..., str]] = {
    "times": times,
    "against_constants": against_constants,
    "present": present,
    "against_norm_test": against_norm_test,
    "price_of_tuning": price_of_tuning,
    "robustness": robustness,
    "couplings": couplings,
    "published": published,
}
TABLE = re.compile(r"(<!-- table: ([^\n]*) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def filled(page: str, kinds: dict[str, Callable[..., str]] = KINDS) -> str:
    """The page with its tables made anew, each by its kind."""

    def table(found: re.Match) -> str:
        kind, *words = found[2].split()
        return f"{found[1]}\n{kinds[kind](*words)}\n\n{found[3]}"

    return TABLE.sub(table, page)


def draw(folder: Path) -> list[Path]:
    """For each problem: samples against steps to the demanding target, constants joined by a line, as PNG."""
    from matplotlib import rc_context

    files = []
    for problem, part in PARTS.items():
        if problem not in PROBLEMS:
            continue
        chosen = [name for name in methods(problem) if name in IN_FIGURE or name.startswith("constant")]
        groups = [Group(label(method).strip("*"), list(final_runs(problem, method)), []) for method in chosen]
        with rc_context(figures.PRINT):
            figure = figures.trade_off(groups, part.targets[1], groups[0].finished[0].objective)
            files.append(folder / f"trade_off_{problem}.png")
            figure.savefig(files[-1], dpi=160)
    return files


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    ).parse_args(arguments)
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text()))
        print(path)
    for file in draw(ROOT / "docs"):
        print(file)


if __name__ == "__main__":
    main()
