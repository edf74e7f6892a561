"""The critical batch size of a run, measured: from a checkpoint the run goes on with several batch sizes, on the same
samples, and the losses are compared.

python critical.py RUN_FOLDER_OR_CHECKPOINT …                     with 1, 2, 4 and 8 times the batch of the checkpoint
python critical.py RUN_FOLDER --factors=1,4,16 --samples=200000 --repeats=5
python critical.py RUN_FOLDER --jobs=4 -- --devices=1             words after -- go to main.py
python critical.py RUN_FOLDER --launcher="torchrun --nproc_per_node=4"

Branches, critical.json and critical.png are in RUN_FOLDER/critical/. What has finished is not run again.
"""

import argparse
import itertools
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from launch.terminals import show_what_can_be_shown
from options.errors import RunError, UsageError
from options.names import expanded
from options.schema import DEFAULTS
from runs import branches, figures
from runs.branches import Branch, Start
from runs.checkpoint import steps_of
from runs.lock import refuse_another_writer

PROGRAM = Path(__file__).with_name("main.py")
ENDED = (0, 3)
"""Exit statuses of a branch that can be compared: it has finished, or diverged."""
STEPS = 32
"""Of the largest batch, in a branch whose length is not given."""


def words_of(branch: Branch, evaluations: int, more: Sequence[str]) -> list[str]:
    """What main.py is given to run a branch, or to go on with it where it was interrupted."""
    start, folder = branch.start, branch.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    options = start.options | {"seed": start.options["seed"] + branch.repeat, "branch": branch.factor}
    options["branch_gain"] = branch.gain
    options |= {
        "training_type": "sample",
        "max_iters": DEFAULTS.max_iters,
        "max_samples": start.samples + branch.samples,
    }
    options |= {"eval_interval": 0, "eval_samples": max(1, branch.samples // evaluations)}
    options["weight_average"] = 0.0  # an average over what went before would hide what the branches differ in
    options |= {"checkpoint_interval": 0, "keep_checkpoints": 1, "out_dir": str(folder.parent)}
    options |= {"run_name": folder.name, "resume": str(start.path.absolute())}
    if folder.exists():
        refuse_another_writer(folder)
        if branch.status == "interrupted" and steps_of(folder / "checkpoints"):
            options["resume"] = "auto"
        else:
            shutil.rmtree(folder)
    file = folder.with_name(f"{folder.name}.yaml")
    file.write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return [f"--config={file}", *more]


def start_process(words: Sequence[str], log: Path, launcher: Sequence[str]) -> int:
    """main.py in a process of its own, its lines in a file; gives the exit status.

    Raises:
        UsageError: there is no such launcher.
    """
    with open(log, "a", encoding="utf-8") as file:
        try:
            return subprocess.run([*launcher, str(PROGRAM), *words], stdout=file, stderr=subprocess.STDOUT).returncode
        except OSError as error:
            raise UsageError(f"--launcher: {launcher[0]}: {error.strerror}: name a program that is there") from None


def run(branch: Branch, evaluations: int, more: Sequence[str], start: Callable[[Sequence[str], Path], int]) -> None:
    """A branch to its end; nothing is done where it has ended before.

    Raises:
        RunError: it was refused, has failed or was interrupted.
    """
    if branch.status in ("finished", "diverged"):
        return
    words = words_of(branch, evaluations, more)
    log = branch.folder.with_name(f"{branch.folder.name}.log")
    status = start(words, log)
    if status not in ENDED:
        last = (
            next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "") if log.exists() else ""
        )
        raise RunError(f"{branch.folder} has ended with status {status} ({last}): see {log}, then start this again")
    for path in steps_of(branch.folder / "checkpoints").values():  # nobody goes on from here
        path.unlink()
    (branch.folder / "model.pt").unlink(missing_ok=True)


def length_of(start: Start, factors: Sequence[float], samples: int | None) -> int:
    """Samples of a branch: a multiple of all of its batch sizes, so that they all end at the same one; where that would
    be more than twice what was wanted, of the largest alone: then the others end within a batch of it."""
    sizes = [round(factor * start.batch_size) for factor in factors]
    wanted = samples or STEPS * max(sizes)
    multiple = math.lcm(*sizes)
    if multiple > 2 * wanted:
        multiple = max(sizes)
    return multiple * max(1, -(-wanted // multiple))


def measure(start: Start, options: argparse.Namespace, launch: Callable[[Sequence[str], Path], int]) -> dict[str, Any]:
    """Branches of one checkpoint, repeat by repeat, until the difference is known; gives what they show."""
    length = length_of(start, options.factors, options.samples)
    found: dict[str, Any] = {}
    for repeats in range(1, options.repeats + 1):
        tried = [(options.factors[0], 1.0), *itertools.product(options.factors[1:], options.gains)]
        all_of_them = [Branch(start, *one, length, r) for r in range(repeats) for one in tried]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda one: run(one, options.evaluations, options.more, launch), all_of_them))
        found = branches.compare(all_of_them, options.loss, options.tolerance)
        if repeats > 1 and found["is_known"]:
            break
    return found


def keep(found: dict[str, Any], folder: Path) -> None:
    """critical.json and critical.png with what a checkpoint's branches have shown, beside those of other checkpoints
    that were compared in the same way."""
    file = folder / "critical.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    others = [of for of in before if of["step"] != found["step"]]
    alike = [of for of in others if all(of[name] == found[name] for name in ("loss", "tolerance"))]
    together = sorted([*alike, found], key=lambda of: of["step"])
    file.write_text(json.dumps(together, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    figures.critical_sizes(together, folder / "critical.png")


def table(found: Sequence[dict[str, Any]]) -> str:
    """A line a checkpoint and factor, then a line a checkpoint with its critical size."""
    lines = [
        (of["step"], of["samples"], one["batch_size"], one["gain"], one["loss"], excess_text(one), one["repeats"])
        for of in found
        for one in of["factors"]
    ]
    header = (
        "step",
        "samples",
        "batch",
        "gain",
        found[0]["loss"].replace("_", " "),
        "excess of the loss [%]",
        "repeats",
    )
    sizes = [
        (
            *(of["step"], of["samples"], of["noise_scale"] and number(of["noise_scale"])),
            *(within_text(of), of["ratio_within"] and number(of["ratio_within"])),
            *(fit_text(of["fit"]), of["ratio"] and number(of["ratio"])),
        )
        for of in found
    ]
    words = f"within {100 * found[0]['tolerance']:g} %"
    of_sizes = ("step", "samples", "noise scale", words, "/ noise scale", "C by the fit (90 %)", "/ noise scale")
    style = {"intfmt": ",", "floatfmt": ".4g", "missingval": "-"}
    return f"{tabulate(lines, header, **style)}\n\n{tabulate(sizes, of_sizes, **style)}"


def excess_text(one: dict[str, Any]) -> str:
    if one["excess_mean"] is None:
        return "diverged"
    text = f"{100 * one['excess_mean']:.2f}"
    return text if one["excess_standard_error"] is None else f"{text} ± {100 * one['excess_standard_error']:.2f}"


def within_text(of: dict[str, Any]) -> str:
    """The largest batch within the tolerance, and what it may be."""
    within = of["within_tolerance"]
    more = " or more" if within["factor"] == of["largest_tried"] else ""
    return f"{within['factor']:,}{more} ({within['low']:,} … {within['high']:,})"


def fit_text(fit: dict[str, Any]) -> str:
    """C and its interval; the interval alone where it has no end: then C is what chance has made of it."""
    low, size, high = (number(fit[name]) for name in ("low", "critical", "high"))
    if fit["low"] is None:
        return size
    return f"{size} ({low} … {high})" if fit["high"] else f"({low} … {high})"


def number(value: float | None) -> str:
    """None: there is no such size, however large."""
    return "∞" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def numbers(text: str) -> list[float]:
    """K,K,…, at least two, each positive, rising."""
    values = sorted({float(part) for part in text.split(",")})
    if len(values) < 2 or not all(0 < value < math.inf for value in values):
        raise argparse.ArgumentTypeError(f"'{text}' needs two or more positive factors, such as 1,2,4,8")
    return values


def exponents(text: str) -> list[float]:
    """P,P,…, each from 0 to 1."""
    values = sorted({float(part) for part in text.split(",")}, reverse=True)
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"'{text}' needs numbers from 0 to 1, such as 1,0.5")
    return values


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="critical.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("places", nargs="+", type=Path, metavar="RUN_FOLDER_OR_CHECKPOINT",
                        help="checkpoints to branch off; of a run's folder, all that it has")  # fmt: skip
    parser.add_argument("--factors", type=numbers, default=[1, 2, 4, 8], metavar="K,K,…",
                        help="on the batch size of the checkpoint (default: 1,2,4,8)")  # fmt: skip
    parser.add_argument("--gains", type=exponents, default=[1.0], metavar="P,P,…",
                        help="a batch of k times the size takes steps that are to be k^P times as long; of several the "
                             "best counts (default: 1, which keeps the noise in the weights)")  # fmt: skip
    parser.add_argument("--samples", type=positive,
                        help="length of a branch, rounded up to whole batches of every size; default: 32 steps of the "
                             "largest one")  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=3,
                        help="at most so many orders of the samples; fewer where two or more tell the losses apart "
                             "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=0.01, metavar="SHARE",
                        help="the largest batch within it has a loss at most so much above that of the smallest, as a "
                             "share of it (default: %(default)s)")  # fmt: skip
    parser.add_argument("--loss", choices=("val_loss", "train_loss"), default="val_loss",
                        help="compare the last evaluation, or the training loss of the second half "
                             "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--evaluations", type=positive, default=8,
                        help="of a branch (default: %(default)s)")  # fmt: skip
    parser.add_argument("--jobs", type=positive, default=1, help="branches at a time (default: %(default)s)")
    parser.add_argument("--launcher", type=shlex.split, default=[sys.executable], metavar="COMMAND",
                        help="what starts main.py, such as 'srun python' or 'torchrun --nproc_per_node=4'; default: "
                             "this Python")  # fmt: skip
    words = list(sys.argv[1:] if arguments is None else arguments)
    at = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:at])
    options.more = words[at + 1 :]
    return options


def measure_all(options: argparse.Namespace, launch: Callable[[Sequence[str], Path], int]) -> list[dict[str, Any]]:
    """Every checkpoint; after each, what is known so far is written.

    Args:
        launch: runs main.py: (its words, the file for its lines) → exit status.

    Raises:
        UsageError: there is nothing to branch off.
        RunError: a branch has failed.
    """
    found = []
    starts = branches.starts([expanded("places", place) for place in options.places])
    for start in starts:
        length, end = length_of(start, options.factors, options.samples), start.options["lr_decay_samples"]
        if start.options["decay_lr"] and end and start.samples + length > end:
            print(
                f"skipped: {start.path}: {length:,} samples more go beyond the end of its learning-rate schedule, "
                f"at {end:,}: take fewer --samples",
                file=sys.stderr,
            )
            continue
        found.append(measure(start, options, launch))
        folder = start.folder.parent
        keep(found[-1], folder)
    if not found:
        raise UsageError("no checkpoint is left to branch off: see the lines above")
    print(table(found))
    print(folder / "critical.json", folder / "critical.png", sep="\n", file=sys.stderr)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the arguments (default: `sys.argv`) say; returns the exit status."""
    show_what_can_be_shown()
    options = parse(arguments)
    try:
        measure_all(options, lambda words, log: start_process(words, log, options.launcher))
    except (UsageError, RunError) as error:
        print(f"critical.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:  # branches have received it, too, and saved where they stand
        print("critical.py: interrupted: the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
