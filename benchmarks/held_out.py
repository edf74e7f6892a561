"""`steady` on problems that nothing was tuned on, against constant batches at their best (docs/held_out.md).

    python -m benchmarks.held_out teacher -j 2 --data_dir=data      # goes on where an interruption has left it
    python -m benchmarks.held_out_tables                            # what is kept, into docs/held_out.md

For each problem, in this order: the sweep of the smallest constant batch, whose best run gives the two targets; the
sweeps of all constant batches, at a constant rate, with weights averaged in two ways, and with cosines over half of the
run, all of it, and twice as much; the trials of `steady`; eight seeds each of `steady` and of the constants that were
best in the sweep; and the test set, read once. Kept in benchmarks/results/held_out/PROBLEM.json.
"""

import argparse
import json
import math
import queue
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

import data
import models
from batches.augment import Normalise
from benchmarks.cases import RESULTS, provenance
from benchmarks.comparison import CONSTANT, STEADY, Options, _affinity, _take_a_core, run
from options.recipes import RECIPES
from runs.results import ARRIVAL, Run, read_metrics

KEPT = RESULTS / "held_out"
SWEEP_SEED = 0
SEEDS = range(1, 9)
KNEES = (30, 300, 3000)
DOUBLINGS = 8
"""Sizes of a problem: the smallest, and seven times twice the one before."""
EVALUATIONS = 50
"""In the samples of a run."""
TARGETS_AT = (0.3, 0.6)
"""Where in the run of the smallest batch, at its best rate, the two targets stand."""
FINALISTS = 2
"""Constants a knee and target that run with all seeds: the best by the sweep."""
TRIALS = (0.5, 1.0, 2.0, 4.0)
"""Rates of `steady` in its own sweep, over that of the smallest batch; it tells what other rates cost."""
MEASURED_STEP = 0.3
"""What a measured step costs beyond a plain one, in plain steps (README, "What the test costs")."""
MOST_RATES = 8
"""Doublings or halvings of a rate, at most, from where a sweep begins."""

STYLES: dict[str, Callable[[int], Options]] = {
    "constant rate": lambda samples: {"decay_lr": False},
    "averaged": lambda samples: {"decay_lr": False, "weight_average": samples // 10},
    "averaged so far": lambda samples: {"decay_lr": False, "weight_average": RECIPES["steady"]["weight_average"]},
    "cosine ½": lambda samples: {"max_samples": samples // 2},
    "cosine 1": lambda samples: {},
    "cosine 2": lambda samples: {"max_samples": 2 * samples},
}
"""What a constant batch may have beside its rate, by the samples of a run."""
LONG = 300
"""From this knee on `steady`, too, may take twice the samples of a run, as the longest cosine does."""


@dataclass(frozen=True)
class Problem:
    """
    Args:
        shared: options of all runs; max_samples among them.
        smallest: batch size from which `steady` starts and the sizes double.
        rate: with which the first sweep begins.
        style: of `steady`, and of the constant batches of which the first sweep is.
    """

    shared: Options
    smallest: int
    rate: float
    style: str = "constant rate"

    @property
    def samples(self) -> int:
        return self.shared["max_samples"]

    @property
    def sizes(self) -> list[int]:
        return [self.smallest * 2**k for k in range(DOUBLINGS)]

    def constant(self, size: int) -> "Method":
        return Method(size, self.style)

    def steady(self, knee: int, rule: str = "steady") -> "Method":
        return Method(self.smallest, self.style, knee, rule)


def _problem(data_set: str, model: str, smallest: int, rate: float, samples: int, **options: object) -> Problem:
    ours = "benchmarks.held_out_problems"
    model = model if model == "gpt" else f"{ours}:{model}"
    shared = {"dataset": f"{ours}:{data_set}", "model": model, "max_samples": samples, **options}
    shared |= {"max_micro_batch_size": 256, "eval_samples": samples // EVALUATIONS, "log_interval": 100}
    return Problem(shared, smallest, rate, "cosine 1" if "warmup_samples" in options else "constant rate")


PROBLEMS = {
    "resnet14": _problem(
        "small_cifar", "resnet14", 16, 0.002, 60_000, optimizer="adamw", weight_decay=0.05, warmup_samples=3000
    ),
    "batch_norm": _problem("small_cifar", "cnn_batch_norm", 16, 0.02, 80_000, optimizer="sgd", momentum=0.9),
    "torch_gpt": _problem(
        "torch_sources", "gpt", 4, 0.001, 16_000, optimizer="adamw", model_args={"layers": 3, "width": 48, "heads": 2}
    ),
    "teacher": _problem("teacher", "student", 16, 0.02, 200_000, optimizer="sgd", momentum=0.9),
    "autoencoder": _problem("small_digits", "autoencoder", 16, 0.001, 150_000, optimizer="adam"),
    "packages": _problem("packages", "BagOfWords", 16, 0.02, 150_000, optimizer="adagrad"),
}


@dataclass(frozen=True)
class Method:
    """A constant batch of so many samples in one of the styles, or a rule that is given P, by default `steady`."""

    size: int
    style: str
    knee: int | None = None
    rule: str = "steady"

    def options(self, problem: Problem) -> Options:
        rule = {**STEADY, "knee": self.knee} if self.knee else CONSTANT
        options = {**problem.shared, **rule, "batch_size": self.size, **STYLES[self.style](problem.samples)}
        if options.get("decay_lr") is False:
            options.pop("warmup_samples", None)
            if self.knee and self.knee >= LONG:
                options["max_samples"] = 2 * problem.samples
        return options

    @property
    def name(self) -> str:
        if self.knee:
            return f"{self.rule}_knee{self.knee}"
        return f"constant_{self.size}_{self.style.replace(' ', '_').replace('½', 'half')}"


@dataclass(frozen=True)
class Course:
    """What is kept of a run: its evaluations, how good it was in the end, and what that says of a target.

    Args:
        rows: of every evaluation [steps, samples, objective, measured steps, samples of measured steps], sums so far.
        end: mean of the last three evaluations; None where it diverged.
    """

    rows: list[list[float]]
    larger_is_better: bool
    end: float | None

    @classmethod
    def of(cls, found: Run) -> "Course":
        columns = ("step", "samples", "batch_size", found.objective)
        metrics = read_metrics(found.folder, columns, ("variance",))
        rows, steps, samples = [], 0, 0.0
        for step, seen, size, value, variance in zip(*metrics.values()):
            if variance is not None:
                steps, samples = steps + 1, samples + size
            if value is not None:
                rows.append([step, seen, value, steps, samples])
        finished = found.status == "finished" and all(math.isfinite(row[2]) for row in rows)
        return cls(rows, found.larger_is_better, fmean(row[2] for row in rows[-ARRIVAL:]) if finished else None)

    def means(self) -> list[float]:
        """Of every evaluation and the two before it; as many values as evaluations, less two."""
        values = [row[2] for row in self.rows]
        return [fmean(values[i : i + ARRIVAL]) for i in range(len(values) - ARRIVAL + 1)]

    def arrival(self, target: float) -> list[float] | None:
        """The row, between two evaluations, at which the mean of the last three passes the target."""
        if self.end is None:
            return None
        sign, before = 1 if self.larger_is_better else -1, None
        for row, mean in zip(self.rows[ARRIVAL - 1 :], self.means()):
            if sign * mean >= sign * target:
                share = 1.0 if before is None else (target - before[1]) / (mean - before[1])
                return [own + (1 - share) * (last - own) for own, last in zip(row, (before or (row,))[0])]
            before = row, mean
        return None

    def cost(self, target: float, knee: float) -> float:
        """Modelled time to the target, samples + P · steps and what the measured steps cost beyond; inf: never."""
        row = self.arrival(target)
        if row is None:
            return math.inf
        steps, samples, _, measured_steps, measured_samples = row
        return samples + knee * steps + MEASURED_STEP * (measured_samples + knee * measured_steps)

    def order(self, target: float | None) -> tuple[float, float]:
        """Less is better: samples to the target (None: not known yet), then how good it was in the end."""
        if self.end is None:
            return math.inf, math.inf
        end = -self.end if self.larger_is_better else self.end
        row = None if target is None else self.arrival(target)
        return (row[1] if row else math.inf), end


class Study:
    """All runs of one problem, `jobs` at a time; those that have ended are read."""

    def __init__(self, problem: Problem, folder: Path, pool: ThreadPoolExecutor, further: list[str]):
        self.problem, self.folder, self.pool, self.further = problem, folder, pool, further
        self.targets: list[float] = []
        self.sweep: dict[Method, dict[float, Course]] = {}

    def course(self, method: Method, rate: float, seed: int, where: str = "sweep") -> Course:
        options = {**method.options(self.problem), "learning_rate": rate, "seed": seed}
        return Course.of(run(self.folder / where / f"{method.name}_lr{rate:.4g}_seed{seed}", options, self.further))

    def tune(self, method: Method, start: float) -> float:
        """Rates by factors of two from `start` on, until both neighbours of the best were tried; gives the best."""
        tried = self.sweep.setdefault(method, {})
        for at in self._bracket(tried, start):
            tried[start * 2**at] = self.course(method, start * 2**at, SWEEP_SEED)
        return self.best(method)

    def _bracket(self, tried: dict[float, Course], start: float) -> Iterable[int]:
        yield 0
        while True:
            best = round(math.log2(min(tried, key=lambda rate: tried[rate].order(self._demanding)) / start))
            lacking = [at for at in (best + 1, best - 1) if start * 2**at not in tried and abs(at) <= MOST_RATES]
            if not lacking:
                return
            yield lacking[0]

    @property
    def _demanding(self) -> float | None:
        return self.targets[-1] if self.targets else None

    def best(self, method: Method) -> float:
        return min(self.sweep[method], key=lambda rate: self.sweep[method][rate].order(self._demanding))

    def rate_of_steady(self) -> float:
        """That with which the smallest batch is the first at the easy target: later, `steady` has a larger one."""
        tried = self.sweep[self.problem.constant(self.problem.smallest)]
        return min(tried, key=lambda rate: tried[rate].order(self.targets[0]))

    def set_targets(self) -> None:
        """By the smallest batch: what its best run had, by the mean of three evaluations, at so much of its samples."""
        smallest = self.problem.constant(self.problem.smallest)
        rate = self.tune(smallest, self.problem.rate)
        course = self.sweep[smallest][rate]
        means = dict(zip((row[1] for row in course.rows[ARRIVAL - 1 :]), course.means()))
        for share in TARGETS_AT:
            seen = min(means, key=lambda samples: abs(samples - share * self.problem.samples))
            self.targets.append(float(f"{means[seen]:.3g}"))

    def tune_constants(self) -> None:
        """Each size from the rate of the one before on (a line of its own, so one after the other), then the styles."""
        start = self.tune(self.problem.constant(self.problem.smallest), self.problem.rate)
        for size in self.problem.sizes[1:]:
            start = self.tune(self.problem.constant(size), start)
        styled = [
            (Method(size, style), self.best(self.problem.constant(size)))
            for size in self.promising()
            for style in STYLES
        ]
        list(self.pool.map(lambda pair: self.tune(*pair), styled))

    def promising(self) -> list[int]:
        """Sizes that in the problem's style take at most twice the time of the best for some knee and target."""
        found = set()
        for knee in KNEES:
            for target in self.targets:
                costs = {
                    size: self._best_cost(self.problem.constant(size), target, knee) for size in self.problem.sizes
                }
                found |= {size for size, cost in costs.items() if cost <= 2 * min(costs.values()) < math.inf}
        return sorted(found)

    def _best_cost(self, method: Method, target: float, knee: int) -> float:
        return min(course.cost(target, knee) for course in self.sweep[method].values())

    def finalists(self) -> dict[Method, list[float]]:
        """Constants, with the rates that were best for some knee and target."""
        chosen: dict[Method, list[float]] = {}
        for knee in KNEES:
            for target in self.targets:
                cells = [
                    (course.cost(target, knee), method.name, rate, method)
                    for method, tried in self.sweep.items()
                    for rate, course in tried.items()
                    if not method.knee
                ]
                for cost, _, rate, method in sorted(cells, key=lambda cell: cell[:3])[:FINALISTS]:
                    if cost < math.inf and rate not in chosen.setdefault(method, []):
                        chosen[method].append(rate)
        return chosen

    def try_steady(self) -> None:
        """At other rates, seed 0: the trials with which a random search is compared. They choose nothing."""
        own = self.rate_of_steady()
        for knee in KNEES:
            method = self.problem.steady(knee)
            rates = [own * factor for factor in TRIALS]
            courses = self.pool.map(partial(self.course, method, seed=SWEEP_SEED), rates)
            self.sweep[method] = dict(zip(rates, courses))

    def of_constants_and_steady(self) -> list[dict]:
        own = self.rate_of_steady()
        cells = [(method, rate) for method, rates in self.finalists().items() for rate in rates]
        return self.final(cells + [(self.problem.steady(knee), own) for knee in KNEES])

    def final(self, cells: list[tuple[Method, float]]) -> list[dict]:
        """Eight seeds each, seed by seed over all of them."""
        jobs = [(method, rate, seed) for seed in SEEDS for method, rate in cells]
        courses = self.pool.map(lambda job: self.course(*job, "final"), jobs)
        return [
            {**asdict(method), "rate": rate, "seed": seed, **asdict(course), "test": self.tested(method, rate, seed)}
            for (method, rate, seed), course in zip(jobs, courses)
        ]

    def tested(self, method: Method, rate: float, seed: int) -> float | None:
        """The objective on the test set, by the weights at the end of the run."""
        folder = self.folder / "final" / f"{method.name}_lr{rate:.4g}_seed{seed}"
        average = folder / "model_average.pt"
        weights = average if average.exists() else folder / "model.pt"
        data_dir = next((Path(w.partition("=")[2]) for w in self.further if w.startswith("--data_dir=")), Path("data"))
        return on_the_test_set(self.problem.shared, weights, data_dir) if weights.exists() else None

    def with_rule(self, kept: dict, rule: str) -> dict:
        """What is kept, and the runs of this rule at the rate at which `steady` ran, in the place of earlier ones."""
        rate = next(entry["rate"] for entry in kept["final"] if entry["knee"] and entry["rule"] == "steady")
        others = [entry for entry in kept["final"] if not entry["knee"] or entry["rule"] != rule]
        return kept | {"final": others + self.final([(self.problem.steady(knee, rule), rate) for knee in KNEES])}

    def whole(self) -> dict:
        """Everything, in the order of the protocol."""
        self.set_targets()
        print(f"targets {self.targets}", flush=True)
        self.tune_constants()
        self.try_steady()
        finals = self.of_constants_and_steady()
        sweep = [
            {**asdict(method), "rate": rate, "end": course.end, "costs": self._costs(course)}
            for method, tried in self.sweep.items()
            for rate, course in tried.items()
        ]
        return {"targets": self.targets, "made": provenance(), "sweep": sweep, "final": finals}

    def _costs(self, course: Course) -> list[list[float | None]]:
        """By target, then by knee."""
        costs = [[course.cost(target, knee) for knee in KNEES] for target in self.targets]
        return [[cost if cost < math.inf else None for cost in row] for row in costs]


@torch.no_grad()
def on_the_test_set(shared: Options, weights: Path, data_dir: Path) -> float:
    """The objective of these weights on all samples of the test set."""
    data_set = data.load(shared["dataset"], data_dir, test=True)
    example = None if data_set.num_classes else torch.as_tensor(data_set.example)
    arguments = shared.get("model_args", {})
    model = models.build(shared["model"], data_set.input_shape, data_set.num_outputs, arguments, example).eval()
    model.load_state_dict(torch.load(weights))
    normalise = Normalise(data_set, torch.device("cpu"), torch.float32)
    name, metric = next(iter(data_set.metrics.items()), ("loss", float))
    losses = []
    for inputs, targets in torch.utils.data.DataLoader(data_set.val, batch_size=500):
        outputs = model(normalise(inputs))
        losses.append(data_set.loss(outputs, targets))
        if isinstance(metric, torch.nn.Module):
            metric.update(outputs, targets)
    return metric.compute().item() if isinstance(metric, torch.nn.Module) else metric(torch.cat(losses).mean().item())


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("-j", "--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--out_dir", type=Path, default=Path("out/held_out"), help="folder that takes the runs")
    parser.add_argument("--results", type=Path, default=KEPT, help="folder that takes what is kept")
    parser.add_argument("--rule", help="a name: eight seeds of steady with the further options, beside what is kept")
    options, further = parser.parse_known_args(arguments)
    file = options.results / f"{options.problem}.json"
    cores: queue.Queue[int] = queue.Queue()
    for core in sorted(_affinity())[: options.jobs]:
        cores.put(core)
    with ThreadPoolExecutor(options.jobs, initializer=_take_a_core, initargs=(cores,)) as pool:
        study = Study(PROBLEMS[options.problem], options.out_dir.resolve() / options.problem, pool, further)
        record = study.with_rule(json.loads(file.read_text()), options.rule) if options.rule else study.whole()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
