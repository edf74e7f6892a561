"""Fault drill: kill a run at a random moment, go on, compare with the run that was never disturbed.

    python -m checks.fault_drill --rounds=50

Every other round the run is killed while it writes a checkpoint. What must be equal to the bit: the weights, every row
of metrics.csv but its times, and the points that TensorBoard shows. The runs have all that could differ: dropout,
BatchNorm, augmentation, each of the three tests.
"""

import argparse
import contextlib
import csv
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import Subset

import data
import main
from runs import figures

TIMES = {"step_time", "test_time", "samples_per_second"}
OPTIONS = """
    --accelerator=cpu --devices=1 --dataset=checks.fault_drill:augmented_digits --model=checks.fault_drill:Net
    --batch_size=24 --max_batch_size=120 --max_samples=1800 --eval_interval=13 --log_interval=2
    --checkpoint_interval=4 --keep_checkpoints=2 --resume=auto --max_micro_batch_size=4096
""".split()  # noqa: SIM905
TESTS = {
    "norm": ["--test_type=norm", "--eta=0.7"],
    "ip": ["--test_type=ip", "--theta=0.5", "--test_gradients=micro_batch"],
    "ip+orth": ["--test_type=ip+orth", "--theta=0.9", "--nu=0.8"],
}


def augmented_digits(data_dir: Path) -> data.DataSet:
    return replace(data.digits(data_dir), crop_and_flip=True)


def streamed_digits(data_dir: Path) -> data.DataSet:
    """The same, read through the loader as what does not fit in memory."""
    whole = augmented_digits(data_dir)
    return replace(whole, train=Subset(whole.train, range(len(whole.train))))


def Net(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    channels, height, width = image_shape
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(8 * height * width, num_classes),
    )


def rows_but_times(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: cell for name, cell in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def points_but_times(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: tag → (step, value), every point as often as it is there."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith(("time", "samples_per_second"))]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def differences(one: Path, other: Path) -> list[str]:
    """In what two runs differ that should be equal to the bit; empty where they do not."""
    found = []
    weights = [torch.load(folder / "model.pt", weights_only=True) for folder in (one, other)]
    for name, value in weights[0].items():
        if not torch.equal(value, weights[1][name]):
            found.append(f"weights {name}")
    rows = [rows_but_times(folder) for folder in (one, other)]
    if len(rows[0]) != len(rows[1]):
        found.append(f"{len(rows[0])} rows and {len(rows[1])}")
    found += [f"row {i}: {a} {b}" for i, (a, b) in enumerate(zip(*rows)) if a != b][:1]
    points = [points_but_times(folder) for folder in (one, other)]
    found += [f"TensorBoard {tag}" for tag in points[0] if points[0][tag] != points[1].get(tag)]
    return found


def start(*options: str) -> multiprocessing.Process:
    """A run in a process of its own (forked: everything is imported already)."""

    process = multiprocessing.get_context("fork").Process(target=_run, args=(options,))
    process.start()
    return process


def _run(options: Sequence[str]) -> None:
    figures.curves = lambda folder: None  # it takes longer than the run itself
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        sys.exit(main.main([*OPTIONS, *options]))


def rows_written(folder: Path) -> int:
    table = folder / "metrics.csv"
    return table.read_text().count("\n") if table.exists() else 0


def half_written(folder: Path) -> bool:
    return bool(list((folder / "checkpoints").glob("*.tmp")))


def kill(process: multiprocessing.Process, folder: Path, rows: int, while_saving: bool) -> str:
    """SIGKILL once metrics.csv has so many lines, or a checkpoint is half written after that; says what was hit."""
    while process.is_alive() and rows_written(folder) < rows:
        time.sleep(0.001)
    while while_saving and process.is_alive():
        if half_written(folder):
            # The write takes milliseconds and may be over before the kill arrives: stop it, and look again.
            os.kill(process.pid, signal.SIGSTOP)
            if half_written(folder):
                break
            os.kill(process.pid, signal.SIGCONT)
    alive = process.is_alive()
    process.kill()
    process.join()
    if not alive:
        return "after its end"
    if half_written(folder):
        return "while saving"
    return "with checkpoints" if list((folder / "checkpoints").glob("*.pt")) else "before a checkpoint"


def drill(rounds: int, seed: int, out_dir: Path) -> bool:
    """All rounds; True where every one ended as the undisturbed run did."""
    draw, hits, good = random.Random(seed), {}, 0
    for name, options in TESTS.items():
        process = start(*options, f"--out_dir={out_dir}", f"--run_name={name}")
        process.join()
        assert process.exitcode == 0, f"the undisturbed run ended with status {process.exitcode}"
    for number in range(rounds):
        name, run = list(TESTS)[number % len(TESTS)], f"round-{number}"
        options = [*TESTS[name], f"--out_dir={out_dir}", f"--run_name={run}"]
        first = start(*options)
        rows = draw.randint(1, max(1, int(0.6 * rows_written(out_dir / name))))
        hit = kill(first, out_dir / run, rows, while_saving=number % 2 == 1)
        second = start(*options)
        second.join()
        found = differences(out_dir / name, out_dir / run) if second.exitcode == 0 else [f"status {second.exitcode}"]
        good += not found
        hits[hit] = hits.get(hit, 0) + 1
        print(f"round {number + 1}: {name}, killed {hit}: {'; '.join(found) or 'equal'}", flush=True)
    print(f"{good} of {rounds} rounds equal to the undisturbed run; killed {hits}")
    return good == rounds


def command_line(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as out_dir:
        return 0 if drill(options.rounds, options.seed, Path(out_dir)) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(command_line())
