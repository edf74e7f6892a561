"""What adaptive batches are worth: time to a target, against constant batches that were tuned in two dimensions.

    python -m benchmarks.comparison mnist_logistic -j 2 --data_dir=data
    python -m benchmarks.tables                                     # what is kept, into docs/results.md
    python report.py benchmarks/results/comparison/mnist_logistic --target=0.92 --knee=30,300,3000

The protocol (docs/results.md has it in words). Each method of a part is tuned over the learning rate alone, by factors
of about 3 from the part's rates on: four at least, and more where the best is at the edge (seed 0). The best is the
quickest to the part's second target: by samples without a test, by seconds with one; where no rate reaches the
target, the most accurate. The recipe is not tuned: it takes the rate of the small constant batch that it starts
from. Then three runs (seeds 1, 2, 3) at that rate, seed by seed over all methods, so that methods share the
machine's slow and quick hours. A run is one process on one core, `-j` of them at a time. Runs that have ended are
skipped, so that the command can be given again after an interruption. Kept in benchmarks/results/comparison/PART/:
tuning.json, and of every final run what report.py reads, with the rows of its evaluations. Further options are handed
on to main.py.
"""

import argparse
import csv
import fnmatch
import functools
import json
import math
import multiprocessing
import os
import queue
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from benchmarks.cases import RESULTS
from options.recipes import RECIPES
from runs.results import Run, read_run

ROOT = Path(__file__).parent.parent
Options = dict[str, object]

SWEEP_SEED = 0
SEEDS = (1, 2, 3)
KNEES = (30, 300, 3000)
RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""All that a sweep may come to, each about three times the one before."""
FEWEST = 4
"""Rates that every method tries."""
LARGEST = 4096

CONSTANT: Options = {"test": False}
STEADY: Options = {"recipe": "steady"}
UNBIASED: Options = {**STEADY, "ramp_up_type": "test", "test_type": "norm"}
BATCHES = [16, 256, LARGEST]
STAGES: Options = {**CONSTANT, "stagewise_ramp_up": True, "global_batch_sizes": BATCHES}  # a third of the samples each
LINEAR: Options = {"linear_ramp_up": True, "max_batch_size": LARGEST}
METHODS: dict[str, Options] = {
    **{f"constant_{size}": {**CONSTANT, "batch_size": size} for size in (16, 64, 256, 1024, LARGEST)},
    "stagewise_early": {**STAGES, "samples_stages": ["20%", "20%", "60%"]},
    "stagewise_late": {**STAGES, "samples_stages": ["60%", "20%", "20%"]},
    "seesaw": {**CONSTANT, "seesaw_ramp_up": True, "decay_lr": True, "max_batch_size": LARGEST},
    **{f"norm_eta{eta:g}": {"test_type": "norm", "eta": eta} for eta in (0.1, 0.5, 1.0)},
    "ip": {"test_type": "ip", "theta": 0.5},
    "ip_orth": {"test_type": "ip+orth", "theta": 0.5, "nu": 1.0},
    **{f"unbiased_eta{eta:g}": {**UNBIASED, "eta": eta} for eta in (1.0, 2.0, 3.0)},
    "steady": STEADY,
    **{f"steady_knee{knee}": {**STEADY, "knee": knee} for knee in KNEES},
}
AT_THE_SMALL_BATCHS_RATE = ("steady", *(f"steady_knee{knee}" for knee in KNEES))
"""The recipe's rate is chosen once, for the small batch that it starts from, and follows from there."""
UNCOUPLED: dict[str, Options] = {
    "unbiased_eta2_uncoupled": {**METHODS["unbiased_eta2"], "lr_scaling": "none"},
    "steady_uncoupled": {**STEADY, "lr_scaling": "none"},
}
SMALL_OR_LARGE: dict[str, Options] = {
    "steady_from_2": {**STEADY, "batch_size": 2},
    "steady_from_256": {**STEADY, "batch_size": 256},
}


def with_linear(max_samples: int, methods: dict[str, Options] = METHODS) -> dict[str, Options]:
    """The methods, and a linear ramp that has its largest batch by about the middle of the run."""
    return {**methods, "linear": {**CONSTANT, **LINEAR, "linear_ramp_up_increment": LARGEST**2 // max_samples}}


@dataclass(frozen=True)
class Part:
    """One problem: what all runs share, the methods, and an easy and a demanding target, fixed before the runs."""

    shared: Options
    methods: dict[str, Options]
    targets: tuple[float, float]
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1)

    def rate_from(self, method: str) -> str:
        """The method whose sweep gives this one its rate: the method itself; for the recipe the constant batch that it
        starts from."""
        small = f"constant_{self.methods[method].get('batch_size', self.shared.get('batch_size'))}"
        takes = method in AT_THE_SMALL_BATCHS_RATE or method in COUPLINGS
        return small if takes and not method.startswith("constant") and small in self.methods else method


# On a CPU, pieces of one or two hundred take half the time of whole batches of some thousands.
SGD: Options = {"optimizer": "sgd", "momentum": 0.9, "decay_lr": False, "batch_size": 16, "max_micro_batch_size": 256}
MNIST: Options = {**SGD, "dataset": "mnist", "eval_samples": 3000}
CIFAR10: Options = {**SGD, "dataset": "benchmarks.cases:cifar10_npz", "eval_samples": 5000}
CNN: Options = {"model": "cnn", "validation_samples": 5000}  # all 10,000 would take longer than the training
AVERAGED: Options = {"weight_average": RECIPES["steady"]["weight_average"]}
"""What `steady` has beside its batches, for a constant one."""
# Where the state follows the batch, and where it does not: for `--coupling` (docs/transition.md).
COUPLINGS: dict[str, Options] = {
    **{f"constant_{size}": METHODS[f"constant_{size}"] for size in (16, 64, 256, 1024)},
    **{f"constant_{size}_averaged": {**METHODS[f"constant_{size}"], **AVERAGED} for size in (16, 64, 256, 1024)},
    **{
        f"steady_knee{knee}_{coupling}": {**STEADY, "knee": knee, "coupling": coupling}
        for knee in KNEES
        for coupling in ("full", "rate", "none")
    },
}
OPTIMIZERS: dict[str, tuple[Options, tuple[float, ...]]] = {
    "sgd": ({"optimizer": "sgd", "momentum": 0.9}, (0.01, 0.03, 0.1)),
    "adam": ({"optimizer": "adam", "beta2": 0.95}, (0.0003, 0.001, 0.003)),
    "adam999": ({"optimizer": "adam", "beta2": 0.999}, (0.0003, 0.001, 0.003)),
    "adamw": ({"optimizer": "adamw", "weight_decay": 0.1}, (0.0003, 0.001, 0.003)),
    "adagrad": ({"optimizer": "adagrad"}, (0.01, 0.03, 0.1)),
    "muon": ({"optimizer": "benchmarks.cases:Float32Muon"}, (0.001, 0.003, 0.01)),
}
GPT: Options = {
    **{"dataset": "benchmarks.cases:stdlib_short", "model": "gpt", "model_args": {"layers": 2, "width": 96}},
    **{"optimizer": "adamw", "decay_lr": False, "batch_size": 4, "max_micro_batch_size": 64, "eval_samples": 1024},
}
FEW = {name: METHODS[name] for name in METHODS if name.startswith(("constant", "steady", "norm_eta1", "unbiased_eta2"))}
SMALLER = {"constant_4": {**CONSTANT, "batch_size": 4}} | {name: FEW[name] for name in FEW if name != "constant_4096"}
# The published settings of logistic regression on MNIST (expt.sh logistic), each at its one learning rate.
PUBLISHED: Options = {
    **{"optimizer": "adagrad", "decay_lr": False, "max_batch_size": 60_000, "max_samples": 6_000_000},
    **{"max_micro_batch_size": 256, "log_interval": 100, "eval_samples": 60_000},
}
AS_PUBLISHED: dict[str, Options] = {
    **{f"norm_eta0.1_from_{size}": {**METHODS["norm_eta0.1"], "batch_size": size} for size in (2, 16)},
    **{f"constant_{size}": {**CONSTANT, "batch_size": size} for size in BATCHES},
    "stagewise": STAGES,
    "linear": {**CONSTANT, **LINEAR, "batch_size": 16, "linear_ramp_up_increment": 3},
}
# The published ResNet-18 on CIFAR-10 (expt.sh resnet18), for a GPU.
RESNET18: Options = {
    **{"dataset": "cifar10", "model": "resnet18", "optimizer": "adagrad", "max_samples": 10_000_000},
    **{"warmup_samples": 1_000_000, "lr_decay_samples": 9_000_000, "max_batch_size": 50_000},
}
ON_A_GPU: dict[str, Options] = {
    **{f"constant_{size}": {**CONSTANT, "batch_size": size} for size in (128, 512, 2048)},
    "norm_eta0.5": {**METHODS["norm_eta0.5"], "batch_size": 8},
    "steady": {**STEADY, "batch_size": 128, "test_gradients": "micro_batch"},
}
PARTS = {
    "mnist_logistic": Part(
        {**MNIST, "model": "logistic", "max_samples": 300_000},
        {**with_linear(300_000), **UNCOUPLED, **SMALL_OR_LARGE},
        (0.91, 0.92),
    ),
    "mnist_mlp": Part(
        {**MNIST, "model": "benchmarks.cases:mlp", "max_samples": 300_000},
        {**with_linear(300_000), **UNCOUPLED, **SMALL_OR_LARGE},
        (0.96, 0.975),
    ),
    "mnist_cnn": Part({**MNIST, **CNN, "max_samples": 120_000}, with_linear(120_000), (0.97, 0.98)),
    "cifar10_cnn": Part({**CIFAR10, **CNN, "max_samples": 100_000}, FEW, (0.45, 0.55)),
    "stdlib_gpt": Part({**GPT, "max_samples": 12_288}, SMALLER, (3.0, 2.7), (0.001, 0.003, 0.01)),
    **{
        f"mlp_{optimizer}": Part(
            {name: value for name, value in MNIST.items() if name != "momentum"}
            | {"model": "benchmarks.cases:mlp", "max_samples": 180_000, "validation_samples": 5000}
            | {"log_interval": 100, **options},
            COUPLINGS,
            (0.96, 0.975),
            rates,
        )
        for optimizer, (options, rates) in OPTIMIZERS.items()
    },
    "mnist_published": Part(
        {**PUBLISHED, "dataset": "mnist", "model": "logistic"}, AS_PUBLISHED, (0.91, 0.92), learning_rates=(0.008,)
    ),
    "cifar10_resnet18": Part(RESNET18, ON_A_GPU, (0.90, 0.93), (0.01, 0.03, 0.1)),
}


@dataclass
class Tuning:
    """What a method tried: learning rate → score (less is better) and what it cost."""

    scores: dict[float, tuple[float, float]] = field(default_factory=dict)  # to the target; then by the objective
    early: dict[float, tuple[float, float]] = field(default_factory=dict)  # likewise, to the easy target
    samples: int = 0
    seconds: float = 0.0

    @property
    def chosen(self) -> float:
        return min(self.scores, key=lambda rate: (self.scores[rate], rate))

    @property
    def chosen_early(self) -> float:
        """For a run whose batch grows: its small batch is to be quick, and never comes to the end of the run."""
        early = self.early or self.scores
        return min(early, key=lambda rate: (early[rate], rate))

    def next_rate(self) -> float | None:
        """The neighbour of the best rate, where that is at the edge of what was tried; and at least four in all."""
        at = [RATES.index(rate) for rate in sorted(self.scores)]
        best = RATES.index(self.chosen)
        if best == at[0] and best > 0:
            return RATES[best - 1]
        if (best == at[-1] or len(at) < FEWEST) and at[-1] + 1 < len(RATES):
            return RATES[at[-1] + 1]
        return None


def run(folder: Path, options: Options, further: Sequence[str]) -> Run:
    """Train in this folder, unless a run has ended there. A run that was cut off starts anew.

    Raises:
        subprocess.CalledProcessError: the options were refused, or the program broke.
    """
    summary = folder / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] == "interrupted":
        shutil.rmtree(folder, ignore_errors=True)
        words = [f"--{name}={_word(value)}" for name, value in options.items()]
        command = ["--accelerator=cpu", "--devices=1", *words, *further]
        command += [f"--out_dir={folder.parent}", f"--run_name={folder.name}", "--checkpoint_interval=1000000000"]
        process = _forks().Process(target=_train, args=(command, _affinity()))
        process.start()
        process.join()
        if not summary.exists():  # a run that diverged has one
            raise subprocess.CalledProcessError(process.exitcode, ["main.py", *command])
    result = read_run(folder)
    value = result.summary[result.objective]
    print(f"{folder}: {result.status}, {value or 0:.4f}, {result.summary['wall_time']:.0f} s", flush=True)
    return result


@functools.cache
def _forks() -> multiprocessing.context.BaseContext:
    """Makes processes that have imported the program already: a short run would spend a third of its time on that."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main", "matplotlib.pyplot"])
    return context


def _train(arguments: Sequence[str], cores: set[int]) -> None:
    """What `python main.py` does; the process says nothing but its errors."""
    if cores:
        os.sched_setaffinity(0, cores)
    os.chdir(ROOT)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["main.py", *arguments]
    sys.orig_argv = [sys.executable, *sys.argv]
    runpy.run_path("main.py", run_name="__main__")


def _affinity() -> set[int]:
    """Of this thread; empty where there is no such thing."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _word(value: object) -> object:
    if isinstance(value, dict):
        return json.dumps(value)
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else value


def score(result: Run, target: float) -> tuple[float, float]:
    """How soon a run came to the target, and how good it was in the end; less is better."""
    last = result.summary[result.objective]
    if last is None or result.status != "finished":
        return math.inf, math.inf
    reached = result.reached(target)
    in_the_end = -last if result.larger_is_better else last
    if reached is None:
        return math.inf, in_the_end
    return reached["seconds" if result.options["test"] else "samples"], in_the_end


def tune(part: Part, method: str, folder: Path, further: Sequence[str]) -> Tuning:
    """The sweep of one method over the learning rate, widened until the best is not at the edge."""
    tuning, rates = Tuning(), list(part.learning_rates)
    if len(rates) == 1:  # given, not to be found
        return Tuning({rates[0]: (math.inf, math.inf)})
    while rates:
        rate = rates.pop(0)
        options = {**part.shared, **part.methods[method], "learning_rate": rate, "seed": SWEEP_SEED}
        result = run(folder / f"{method}_lr{rate:g}", options, further)
        tuning.scores[rate] = score(result, part.targets[1])
        tuning.early[rate] = score(result, part.targets[0])
        tuning.samples += result.summary["samples"]
        tuning.seconds += result.summary["wall_time"]
        if not rates and (wider := tuning.next_rate()):
            rates.append(wider)
    return tuning


def compare(
    part: Part, methods: Sequence[str], folder: Path, jobs: int, further: Sequence[str], kept: dict[str, Tuning]
) -> tuple[dict[str, Tuning], dict[str, Run]]:
    """The sweeps of these methods and of those whose rate they take, and the final runs by name.

    `steady` has a sweep that chooses nothing: it tells what another rate costs.

    Args:
        kept: sweeps that are not made again.
    """
    swept = dict.fromkeys([part.rate_from(method) for method in methods] + ["steady"] * ("steady" in methods))
    cores: queue.Queue[int] = queue.Queue()
    for core in sorted(_affinity())[:jobs]:
        cores.put(core)
    with ThreadPoolExecutor(jobs, initializer=_take_a_core, initargs=(cores,)) as pool:
        sweeps = {name: pool.submit(tune, part, name, folder / "sweep", further) for name in swept if name not in kept}
        tuned = {name: future.result() for name, future in sweeps.items()}
        rates = kept | tuned
        runs = {}
        for seed in SEEDS:
            for name in methods:
                tuning, grows = rates[part.rate_from(name)], "recipe" in part.methods[name]
                rate = tuning.chosen_early if part.methods is COUPLINGS and grows else tuning.chosen
                words = {**part.shared, **part.methods[name], "learning_rate": rate, "seed": seed}
                runs[f"{name}_seed{seed}"] = pool.submit(run, folder / "final" / f"{name}_seed{seed}", words, further)
        return tuned, {name: future.result() for name, future in runs.items()}


def _take_a_core(cores: queue.Queue) -> None:
    """For this thread, and so for the processes that it starts."""
    if not cores.empty():
        os.sched_setaffinity(0, {cores.get()})


KEPT_COLUMNS = ("step", "samples", "epoch", "train_loss", "lr", "batch_size", "noise_scale", "lr_factor", "step_time")
"""Of metrics.csv, beside what was evaluated."""


def kept_sweeps(file: Path) -> dict[str, Tuning]:
    """By method, of a tuning.json: no more than the rates that were chosen."""
    nothing = (0.0, 0.0)
    return {
        method: Tuning({own["chosen"]: nothing}, {own.get("chosen_early", own["chosen"]): nothing})
        for method, own in json.loads(file.read_text()).items()
    }


def keep(name: str, tuned: dict[str, Tuning], runs: dict[str, Run], results: Path) -> None:
    """Write the sweeps and what report.py needs of the runs, beside what is there of other methods.

    Where this machine keeps its files is nobody's business.
    """
    folder = results / name
    folder.mkdir(parents=True, exist_ok=True)
    record = json.loads((folder / "tuning.json").read_text()) if (folder / "tuning.json").exists() else {}
    record |= {
        method: {
            "chosen": tuning.chosen,
            "chosen_early": tuning.chosen_early,
            "tried": len(tuning.scores),
            "to_target": {f"{r:g}": s[0] if math.isfinite(s[0]) else None for r, s in sorted(tuning.scores.items())},
            "samples": tuning.samples,
            "seconds": round(tuning.seconds, 1),
        }
        for method, tuning in tuned.items()
    }
    (folder / "tuning.json").write_text(json.dumps(record, indent=2) + "\n")
    for run_name, result in runs.items():
        own = folder / run_name
        own.mkdir(exist_ok=True)
        options = {name: value for name, value in result.options.items() if name not in ("data_dir", "out_dir")}
        (own / "config.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
        command = [word for word in result.summary["command"] if not word.startswith(("--data_dir=", "--out_dir="))]
        (own / "summary.json").write_text(json.dumps({**result.summary, "command": command}, indent=2) + "\n")
        _keep_evaluations(result.folder / "metrics.csv", own / "metrics.csv")


def _keep_evaluations(source: Path, target: Path) -> None:
    """The rows of evaluations, with the mean time of the steps since the one before."""
    with open(source, newline="") as file, open(target, "w", newline="") as kept:
        reader = csv.DictReader(file)
        measured = [name for name in reader.fieldnames or () if name.startswith("val_")]
        columns = [*(name for name in KEPT_COLUMNS if name in (reader.fieldnames or ())), *measured]
        writer = csv.DictWriter(kept, columns, lineterminator="\n")
        writer.writeheader()
        seconds, last_step, last_kept = 0.0, 0, 0
        for row in reader:
            step = int(float(row["step"]))
            seconds += (step - last_step) * float(row["step_time"] or 0)
            last_step = step
            if any(row[name] for name in measured):
                row["step_time"] = seconds / (step - last_kept)
                writer.writerow({name: _short(row[name]) for name in columns})
                seconds, last_kept = 0.0, step


def _short(cell: str | float) -> str:
    return f"{float(cell):.6g}" if cell != "" else ""


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("-j", "--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--methods", help="only these, separated by commas; * is anything (default: all)")
    parser.add_argument("--rates_of", type=Path, help="folder of summaries: its rates are taken, nothing is tuned")
    parser.add_argument("--out_dir", type=Path, default=Path("out/comparison"), help="folder that takes the runs")
    parser.add_argument("--results", type=Path, default=RESULTS / "comparison", help="folder that takes the summaries")
    options, further = parser.parse_known_args(arguments)
    part = PARTS[options.part]
    methods = list(part.methods)
    if options.methods:
        found = {word: fnmatch.filter(part.methods, word) for word in options.methods.split(",")}
        if unknown := [word for word, names in found.items() if not names]:
            parser.error(f"--methods: no {', '.join(unknown)} there, but {', '.join(part.methods)}")
        methods = list(dict.fromkeys(name for names in found.values() for name in names))
    folder = options.out_dir.resolve() / options.part
    kept = kept_sweeps(options.rates_of / options.part / "tuning.json") if options.rates_of else {}
    keep(options.part, *compare(part, methods, folder, options.jobs, further, kept), options.results)


if __name__ == "__main__":
    main()
