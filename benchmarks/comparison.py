"""The suite's own results: adaptive batches against constant sizes and ramp-ups, each at its own best learning rate.

    python -m benchmarks.comparison mnist_cnn -j 2 --data_dir=data
    python report.py out/comparison/mnist_cnn/final --target=0.98 --figures=out/figures/mnist_cnn

For each method of a part, one run at each of the part's learning rates (seed 0), of the whole length or of a share of
it; the best final validation accuracy chooses; then three runs (seeds 1, 2, 3) at that learning rate. A run is one
process on one core, `-j` of them at a time. Runs that have ended are skipped, so that the command can be given again
after an interruption. The sweep and the summary of each final run are kept in benchmarks/results/comparison/PART/.
Further options are handed on to main.py.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import RESULTS

ROOT = Path(__file__).parent.parent
Options = dict[str, object]

SWEEP_SEED = 0
SEEDS = (1, 2, 3)
CONSTANT: Options = {"test": False}
LARGEST = 4096
METHODS: dict[str, Options] = {
    "norm_eta0.1": {"test_type": "norm", "eta": 0.1},
    "norm_eta0.5": {"test_type": "norm", "eta": 0.5},
    "norm_eta1": {"test_type": "norm", "eta": 1.0},
    "ip": {"test_type": "ip", "theta": 0.5},
    "ip_orth": {"test_type": "ip+orth", "theta": 0.5, "nu": 1.0},
    "small": CONSTANT,
    "middle": {**CONSTANT, "batch_size": 256},
    "large": {**CONSTANT, "batch_size": LARGEST},
    "stagewise": {**CONSTANT, "stagewise_ramp_up": True, "global_batch_sizes": [16, 256, LARGEST]},
}


def with_linear(max_samples: int) -> dict[str, Options]:
    """The methods, and a linear ramp that has its largest batch by about the middle of the run."""
    linear = {"linear_ramp_up": True, "linear_ramp_up_increment": LARGEST**2 // max_samples, "max_batch_size": LARGEST}
    return {**METHODS, "linear": {**CONSTANT, **linear}}


@dataclass(frozen=True)
class Part:
    """What all runs share, the methods that are compared, and the learning rates that each of them may try.

    A run of the sweep has the `sweep_divisor`-th part of the samples, with schedules as much shorter.
    """

    shared: Options
    methods: dict[str, Options]
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    sweep_divisor: int = 1


MNIST: Options = {"dataset": "mnist", "optimizer": "adagrad", "decay_lr": False, "batch_size": 16}
# On a CPU, pieces of one or two hundred take half the time of whole batches of some thousands.
MNIST_CNN: Options = {**MNIST, "model": "cnn", "max_samples": 90_000, "max_micro_batch_size": 256}
CIFAR10: Options = {"dataset": "benchmarks.cases:cifar10_npz", "batch_size": 16, "max_micro_batch_size": 128}
CIFAR10_CNN = {**CIFAR10, "model": "cnn", "optimizer": "adagrad", "max_samples": 1_000_000, "warmup_samples": 100_000}
SMALL_RESNET = {
    **CIFAR10,
    "model": "benchmarks.cases:small_resnet_batch_norm",
    "optimizer": "sgdm",
    "batch_size": 64,
    "max_samples": 25_000,
    "warmup_samples": 2_500,
    "test_type": "norm",
    "eta": 1.0,
}
PARTS = {
    "mnist_logistic": Part(
        {**MNIST, "model": "logistic", "max_samples": 600_000}, with_linear(600_000), learning_rates=(0.01, 0.03, 0.1)
    ),
    "mnist_cnn": Part(MNIST_CNN, with_linear(90_000), learning_rates=(0.003, 0.01)),
    "cifar10_cnn": Part(CIFAR10_CNN, with_linear(1_000_000), sweep_divisor=10),
    "cifar10_batch_norm": Part(
        SMALL_RESNET,
        {name: {"test_gradients": name} for name in ("vmap", "micro_batch")},
        learning_rates=(0.03, 0.1),
        sweep_divisor=2,
    ),
}


def shortened(options: Options, divisor: int) -> Options:
    """The same with fewer samples: warm-up and linear ramp end at the same share of the run."""
    factors = {"max_samples": 1 / divisor, "warmup_samples": 1 / divisor, "linear_ramp_up_increment": divisor}
    return {name: round(value * factors[name]) if name in factors else value for name, value in options.items()}


def run(folder: Path, options: Options, further: Sequence[str]) -> dict:
    """Train in this folder, unless a run has ended there; gives the summary. A run that was cut off starts anew.

    Raises:
        subprocess.CalledProcessError: the options were refused, or the program broke.
    """
    summary = folder / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] == "interrupted":
        shutil.rmtree(folder, ignore_errors=True)
        words = [f"--{name}={value}" for name, value in options.items()]
        command = [sys.executable, "main.py", "--accelerator=cpu", "--devices=1", *words, *further]
        command += [f"--out_dir={folder.parent}", f"--run_name={folder.name}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if not summary.exists():  # a run that diverged has one
            print(done.stderr, file=sys.stderr)
            done.check_returncode()
    result = json.loads(summary.read_text())
    print(
        f"{folder}: {result['status']}, accuracy {result['val_accuracy'] or 0:.2%}, {result['wall_time']:.0f} s",
        flush=True,
    )
    return result


def sweep(part: Part, folder: Path, pool: ThreadPoolExecutor, further: Sequence[str]) -> dict[str, dict[float, float]]:
    """Final validation accuracy of each method at each learning rate; 0 where the run diverged."""
    runs = {
        (method, rate): pool.submit(
            run,
            folder / f"{method}_lr{rate:g}",
            {
                **shortened({**part.shared, **options}, part.sweep_divisor),
                "learning_rate": rate,
                "seed": SWEEP_SEED,
            },
            further,
        )
        for method, options in part.methods.items()
        for rate in part.learning_rates
    }
    return {
        method: {rate: _accuracy(runs[method, rate].result()) for rate in part.learning_rates}
        for method in part.methods
    }


def _accuracy(summary: dict) -> float:
    return (summary["val_accuracy"] or 0.0) if summary["status"] == "finished" else 0.0


def compare(part: Part, folder: Path, jobs: int, further: Sequence[str]) -> tuple[dict, dict[str, dict]]:
    """The sweep with its choices, and the summaries of the final runs by name."""
    with ThreadPoolExecutor(jobs) as pool:
        accuracies = sweep(part, folder / "sweep", pool, further)
        chosen = {method: max(tried, key=lambda rate: (tried[rate], -rate)) for method, tried in accuracies.items()}
        runs = {
            f"{method}_seed{seed}": pool.submit(
                run,
                folder / "final" / f"{method}_seed{seed}",
                {**part.shared, **options, "learning_rate": chosen[method], "seed": seed},
                further,
            )
            for method, options in part.methods.items()
            for seed in SEEDS
        }
        summaries = {name: future.result() for name, future in runs.items()}
    record = {
        method: {"chosen": chosen[method], "accuracy": {f"{rate:g}": value for rate, value in tried.items()}}
        for method, tried in accuracies.items()
    }
    return record, summaries


def keep(name: str, record: dict, summaries: dict[str, dict], results: Path) -> None:
    """Write the sweep and the summaries; where this machine keeps its files is nobody's business."""
    folder = results / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "learning_rates.json").write_text(json.dumps(record, indent=2) + "\n")
    for run_name, summary in summaries.items():
        command = [word for word in summary["command"] if not word.startswith(("--data_dir=", "--out_dir="))]
        (folder / f"{run_name}.json").write_text(json.dumps({**summary, "command": command}, indent=2) + "\n")


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("-j", "--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--out_dir", type=Path, default=Path("out/comparison"), help="folder that takes the runs")
    parser.add_argument("--results", type=Path, default=RESULTS / "comparison", help="folder that takes the summaries")
    options, further = parser.parse_known_args(arguments)
    folder = options.out_dir.resolve() / options.part
    keep(options.part, *compare(PARTS[options.part], folder, options.jobs, further), options.results)


if __name__ == "__main__":
    main()
