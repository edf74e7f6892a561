"""The critical batch size of training runs, measured by critical.py, beside the noise scales that might predict it.

    python -m benchmarks.critical_sizes mnist_cnn_sgd mnist_cnn_adamw --data_dir=data
    python -m benchmarks.critical_sizes --write                  # what is kept, into docs/critical.md

A pilot run of a constant batch, its noise scales recorded; branches at 10, 30, 60 and 90 % of it, a tenth of the run
long. Runs and branches that have ended are not run again. Kept in benchmarks/results/critical/.
"""

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tabulate import tabulate

import critical
import main as program
from adadagrad.tests import OTHER_SCALES
from benchmarks.cases import RESULTS, provenance
from runs import figures
from runs.checkpoint import steps_of
from runs.results import read_metrics

KEPT = RESULTS / "critical"
PAGE = Path("docs/critical.md")
SHARES = (0.1, 0.3, 0.6, 0.9)
"""Of the run, at which it is branched."""
FACTORS = "1,4,16"
ADAMW, SGD = {"optimizer": "adamw"}, {"optimizer": "sgd"}
CNN = {"model": "cnn", "dataset": "mnist", "batch_size": 32, "max_samples": 51200, "validation_samples": 2000}
CNN |= {"words": "MNIST, `cnn`"}
RESNET = {"model": "benchmarks.cases:small_resnet_group_norm", "dataset": "benchmarks.cases:cifar10_npz"}
RESNET |= {"batch_size": 16, "max_samples": 12800, "validation_samples": 1000, "words": "CIFAR-10, ResNet-8, GroupNorm"}
GPT = {"model": "gpt", "dataset": "stdlib", "batch_size": 8, "max_samples": 12800, "validation_samples": 256}
GPT |= {"model_args": "{layers: 2, heads: 2, width: 64}", "dataset_args": "{sequence_length: 64}"}
GPT |= {"words": "Python's sources, GPT"}
LOGISTIC = {"model": "logistic", "dataset": "mnist", "batch_size": 16, "max_samples": 51200, "validation_samples": 2000}
LOGISTIC |= {"words": "MNIST, logistic regression", "factors": "1,4,16,64"}
CASES: dict[str, dict[str, Any]] = {
    "mnist_cnn_sgd": CNN | SGD | {"learning_rate": 0.1},
    "mnist_cnn_adamw": CNN | ADAMW | {"learning_rate": 0.002},
    "stdlib_gpt_adamw": GPT | ADAMW | {"learning_rate": 0.003},
    "stdlib_gpt_sgd": GPT | SGD | {"learning_rate": 0.5},
    "cifar10_resnet8_adamw": RESNET | ADAMW | {"learning_rate": 0.003},
    "cifar10_resnet8_sgd": RESNET | SGD | {"learning_rate": 0.1},
    "mnist_logistic_sgd": LOGISTIC | SGD | {"learning_rate": 0.3},
    "mnist_logistic_adamw": LOGISTIC | ADAMW | {"learning_rate": 0.003},
}
SCALES = {
    "noise_scale": "V/‖G‖²",
    "noise_scale_optimizer": "1/√v",
    "noise_scale_optimizer_squared": "1/v",
    "noise_scale_l1": "ℓ₁",
    "noise_scale_curvature": "curvature",
}
"""Columns of metrics.csv, and what they are called in the tables."""


def in_this_process(words: Sequence[str], log: Path) -> int:
    """A branch of seconds: another process would take longer to start."""
    return program.main(words)


def measure(name: str, out: Path, options: argparse.Namespace) -> None:
    """Pilot run and branches of a case; keeps what they show."""
    case = {option: value for option, value in CASES[name].items() if option not in ("words", "factors")}
    steps = case["max_samples"] // case["batch_size"]
    case |= {"test": False, "monitor_interval": 8, "statistics": "unbiased", "smoothing": case["max_samples"] / 20}
    names = OTHER_SCALES if case["optimizer"] != "sgd" else ("l1", "curvature")
    case |= {"monitor_metrics": f"[{','.join(names)}]", "checkpoint_interval": steps // 10, "keep_checkpoints": 20}
    case |= {"eval_samples": case["max_samples"] // 10, "max_micro_batch_size": 256, "seed": 1}
    case |= {"accelerator": "cpu", "devices": 1, "out_dir": out, "run_name": name, "data_dir": options.data_dir}
    words = [f"--{option}={value}" for option, value in case.items()]
    if not (out / name / "summary.json").exists() and program.main([*words, "--resume=auto"]):
        raise SystemExit(f"{name}: the pilot run has failed")
    checkpoints = steps_of(out / name / "checkpoints")
    chosen = [str(checkpoints[round(share * steps)]) for share in options.shares]
    arguments = [*chosen, f"--samples={case['max_samples'] // 10}", f"--factors={CASES[name].get('factors', FACTORS)}"]
    found = critical.measure_all(critical.parse([*arguments, f"--repeats={options.repeats}"]), in_this_process)
    metrics = read_metrics(out / name)
    for of in found:
        of["scales"] = {column: at(metrics, column, of["step"]) for column in SCALES if column in metrics}
    KEPT.mkdir(parents=True, exist_ok=True)
    kept = {"case": {key: str(value) for key, value in case.items() if key not in ("out_dir", "data_dir")}}
    kept |= {"run": provenance(), "validation": [x for x in metrics["val_loss"] if x is not None], "found": found}
    (KEPT / f"{name}.json").write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n")
    shutil.copyfile(out / name / "critical" / "critical.png", KEPT / f"{name}.png")


def at(metrics: dict[str, list[float | None]], column: str, step: int) -> float | None:
    """The last value up to this step, of its last fifth; the curvature may be negative for long."""
    known = [v for at, v in zip(metrics["step"], metrics[column]) if 0.8 * step < at <= step and v is not None]
    return known[-1] if known else None


def kept() -> dict[str, list[dict[str, Any]]]:
    files = {name: KEPT / f"{name}.json" for name in CASES}
    return {name: json.loads(file.read_text())["found"] for name, file in files.items() if file.exists()}


def table_of_sizes() -> str:
    """A line a checkpoint: what was measured, and every candidate."""
    header = ["problem", "samples", "batch", "within 1 %", "C by the fit (90 %)", *SCALES.values()]
    rows = []
    for name, found in kept().items():
        words = f"{CASES[name]['words']}, {CASES[name]['optimizer']}"
        for of in found:
            scales = [critical.number(scale) if (scale := scale_of(of, column)) else "–" for column in SCALES]
            sizes = [critical.within_text(of), critical.fit_text(of["fit"])]
            rows.append([words, f"{of['samples']:,}", of["batch_size"], *sizes, *scales])
    return tabulate(rows, header, "github", disable_numparse=True)


def scale_of(of: dict[str, Any], column: str) -> float | None:
    """None where it is not known, or negative, as a sum over directions of negative curvature can be."""
    scale = of["scales"].get(column)
    return scale if scale and scale > 0 else None


def size_of(of: dict[str, Any]) -> float | None:
    """Between the largest batch within the tolerance and the next one that was tried [samples]; None: beyond all."""
    within = of["within_tolerance"]["factor"]
    beyond = [one["batch_size"] for one in of["factors"] if one["batch_size"] > within]
    return math.sqrt(within * beyond[0]) if beyond else None


def table_of_predictors() -> str:
    """For each candidate, over the checkpoints where it is known and a batch beyond the critical size was tried: the
    typical size over it, and how far this ratio is from always being the same."""
    rows = []
    together = [of for found in kept().values() for of in found]
    for column, words in SCALES.items():
        logs = [math.log(size_of(of) / scale) for of in together if size_of(of) and (scale := scale_of(of, column))]
        if len(logs) > 2:
            ends = f"{math.exp(min(logs)):.2g} … {math.exp(max(logs)):.2g}"
            rows.append([words, len(logs), f"{math.exp(fmean(logs)):.2g}", ends, f"{math.exp(stdev(logs)):.2g}"])
    header = ["scale", "n", "critical size / scale, geometric mean", "range", "spread (factor)"]
    return tabulate(rows, header, "github", disable_numparse=True)


TABLES = {"sizes": table_of_sizes, "predictors": table_of_predictors}
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with its tables written anew from what is kept."""
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--out_dir", type=Path, default=Path("out") / "critical", help="of the runs and branches")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shares", type=lambda text: list(map(float, text.split(","))), default=SHARES,
                        help="of the run, at which it is branched (default: 0.1,0.3,0.6,0.9)")  # fmt: skip
    parser.add_argument("--write", action="store_true", help=f"write the tables of {PAGE}")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown: {', '.join(unknown)}")
    figures.curves = lambda folder: None  # each takes longer than a branch
    for name in options.cases:
        measure(name, options.out_dir, options)
    if options.write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
