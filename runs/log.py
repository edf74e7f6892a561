"""What a run leaves behind and shows: its folder, metrics.csv, TensorBoard events, progress, summary.json."""

import contextlib
import csv
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils._pytree import tree_map
from tqdm import tqdm

import tests
from launch.ending import errors_go_to
from launch.environments import resume_command
from options.errors import RunError, UsageError, in_one_line
from options.recipes import RECIPES
from options.schedules import PARAMETERS_OF_TESTS
from options.schema import Config
from runs import figures, results, texts
from runs.checkpoint import plain, plain_options, remove_left_overs, replacing, unwritable
from runs.lock import locked
from runs.status import Status

COLUMNS = (
    *("step", "samples", "epoch", "train_loss", "METRICS", "lr"),
    *("batch_size", "micro_batch_size", "gradient_accumulation_steps"),
    *tests.MEASURED,
    *("noise_scale", "noise_scale_low", "noise_scale_high", "lr_factor", "clipped", "next_batch_size"),
    *("world_size", "step_time", "test_time", "samples_per_second"),
)
"""Of metrics.csv; in the place of METRICS stand those of the data set, train_… and val_…."""

OTHER_SCALE = "noise_scale_{}"
"""Column of a noise scale that --monitor_metrics names; after noise_scale_high."""

# Column → the tag that the paper's code used for it, under sample/ (against samples) and step/ (against steps). What a
# data set measures, train_NAME and val_NAME, is train/NAME and val/NAME.
TAGS = {
    "lr": "lr",
    "batch_size": "batch_size",
    "micro_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "variance": "var_one_norm",
    "variance_inner_product": "var_inner_prod",
    "variance_orthogonality": "var_orth",
    "grad_norm_sq": "grad_norm_sq",
    "batch_noise_scale": "noise_scale",
    "noise_scale": "noise_scale_unbiased",
    "noise_scale_low": "noise_scale_low",
    "noise_scale_high": "noise_scale_high",
    "lr_factor": "lr_factor",
    "clipped": "clipped",
    "step_time": "time",
}


NOISE_SCALE_BAND = {
    "noise scale": {
        f"against {axis}s": ["Margin", [f"{axis}/noise_scale_{which}" for which in ("unbiased", "low", "high")]]
        for axis in ("sample", "step")
    }
}
"""A chart of TensorBoard's: the line between the ends of its interval."""


def default_name(config: Config) -> str:
    """Model, data set, how the batch grows, seed, time."""
    words, _ = results.schedule(vars(config))
    schedule = words if words in RECIPES else tests.rule(vars(config)).label(config.batch_size)
    names = (name.replace(":", ".") for name in (config.model, config.dataset))
    return "_".join([*names, schedule, f"seed{config.seed}", time.strftime("%Y%m%d-%H%M%S")])


MODULES = "modules.csv"
EVENTS = "events.out.tfevents.*"
"""TensorBoard's files; every start of a run makes a new one."""
QUIET_SECONDS = 60.0
"""Without a progress bar, a line of progress follows after so long without any."""


MODULE_COLUMNS = ("step", "samples", "module", "variance", "grad_norm_sq", "batch_noise_scale", "noise_scale")
"""Of modules.csv: a row for each module that has parameters of its own, in every measured row of metrics.csv. The last
is (V / (‖ḡ‖² − V/b)) of this batch alone, empty where that is not positive."""


class RunLog:
    """The run's folder and its progress; made and used by global rank 0 alone.

    Args:
        config: the options in effect.
        world_size: number of processes.
        measured: columns of metrics.csv for what the data set measures, train_… and val_….
        resumed: the checkpoint that the run goes on from; None for a new run.
        marks: `mark` as it was at that checkpoint.

    Raises:
        UsageError: the folder exists already, cannot be made, or another process writes into it.
    """

    def __init__(
        self,
        config: Config,
        world_size: int,
        measured: Sequence[str],
        resumed: Path | None = None,
        marks: dict | None = None,
    ):
        self.config, self.measured = config, measured
        before = resumed and resumed.absolute().parent.parent
        self.folder = self._make_folder(before)
        self._lock = locked(self.folder)
        errors_go_to(self.folder)
        marks = marks or {"files": {}, "seconds": 0.0}
        _rewind(before or self.folder, self.folder, marks["files"])
        self._last_line = time.perf_counter()
        self.start = self._last_line - marks["seconds"]
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        remove_left_overs(self.folder / "checkpoints", resumed)
        self._write_config(world_size)
        self._csv = open(self.folder / "metrics.csv", "a+", newline="", encoding="utf-8")  # noqa: SIM115 (closed by `finish`)
        self._csv.seek(0)
        header = next(csv.reader(self._csv), None)  # a run that goes on keeps its columns
        self._csv.seek(0, os.SEEK_END)
        at = COLUMNS.index("METRICS")
        columns = header or [*COLUMNS[:at], *measured, *COLUMNS[at + 1 :]]
        if not header:
            after = columns.index("noise_scale_high") + 1
            columns[after:after] = [OTHER_SCALE.format(name) for name in config.monitor_metrics]
        self._writer = csv.DictWriter(self._csv, columns, restval="", extrasaction="ignore")
        if not header:
            self._writer.writeheader()
        self._status = Status(self.folder, config)
        self._modules = _ModuleTable(self.folder / MODULES) if config.monitor_modules else None
        threading.excepthook = _handed_on(threading.excepthook)
        self._tensorboard = TensorBoardLogger(config.out_dir, self.folder.name, version="")
        self._tensorboard.experiment.add_text("run", provenance_card())
        if tests.reads_gradients(config):
            self._tensorboard.experiment.add_custom_scalars(NOISE_SCALE_BAND)
        by_samples = config.training_type == "sample"
        self._bar = tqdm(
            total=config.max_samples if by_samples else config.max_iters,
            unit=" samples" if by_samples else " steps",
            unit_scale=by_samples,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            # The bar takes what room is left: in a narrow terminal the numbers matter more.
            bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]{postfix} {bar}",
        )

    def _make_folder(self, resumed: Path | None) -> Path:
        name = self.config.run_name or default_name(self.config)
        folder, count = self.config.out_dir / name, 1
        while not self.config.run_name and folder.exists():
            count += 1
            folder = self.config.out_dir / f"{name}-{count}"
        own = resumed is not None and folder.exists() and folder.samefile(resumed)
        try:
            folder.mkdir(parents=True, exist_ok=own or self.config.resume == "auto")
        except FileExistsError:
            raise UsageError(f"--run_name={name}: {folder} exists already: choose another name or remove it") from None
        except OSError as error:
            out_dir = self.config.out_dir
            raise UsageError(f"--out_dir={out_dir} cannot be written ({error.strerror}): choose another one") from None
        return folder

    def _write_config(self, world_size: int) -> None:
        with self._writing(), replacing(self.folder / "config.yaml", "w") as file:
            file.write(f"# The options as they were in effect, on {world_size} processes. Again: --config THIS_FILE\n")
            yaml.safe_dump(plain_options(self.config), file, sort_keys=False, allow_unicode=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises: RunError where the folder takes no more."""
        try:
            yield
        except OSError as error:
            raise unwritable(Path(os.fsdecode(error.filename or self.folder)), error) from None

    def mark(self) -> dict[str, Any]:
        """Where the run stands, for a checkpoint: the size of each file that grows [bytes], the time so far [s]."""
        sizes = {}
        with self._writing():
            self._csv.flush()
            self._tensorboard.experiment.flush()
            for path in _growing(self.folder):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                    sizes[path.name] = os.fstat(file.fileno()).st_size
        return {"files": sizes, "seconds": time.perf_counter() - self.start}

    def say(self, line: str) -> None:
        """A line on standard output that does not break the progress bar."""
        self._last_line = time.perf_counter()
        with tqdm.external_write_mode():
            print(line, flush=True)

    def write(self, row: dict[str, Any]) -> None:
        """One row of metrics.csv and of TensorBoard; keys are `COLUMNS`, what is missing stays empty."""
        with self._writing():
            self._writer.writerow({name: value for name, value in row.items() if value is not None})
            self._csv.flush()
            if self._modules:
                self._modules.write(row)
            self._write_events(row)
            self._status.update(row, at_once="val_loss" in row)
        self._progress = (
            f"step {row['step']:>6,}  samples {row['samples']:>10,}  batch {row['batch_size']:>7,}  "
            f"train loss {row['train_loss']:.4f}  {row['samples_per_second']:,.0f} samples/s"
        )
        of_training = [name for name in self.measured if name.startswith("train_")]
        words = (f"{name.removeprefix('train_')} {results.written(name, row[name], 1)}" for name in of_training)
        self._bar.set_postfix_str(
            ", ".join([f"batch {row['batch_size']}, loss {row['train_loss']:.4f}", *words]), refresh=False
        )

    def _write_events(self, row: dict[str, Any]) -> None:
        """One event an axis: an event for every number costs a small network a tenth of its step."""
        for axis, at in (("sample", row["samples"]), ("step", row["step"])):
            measured = {name: name.replace("_", "/", 1) for name in ("train_loss", *self.measured)}
            others = {name: name for name in map(OTHER_SCALE.format, self.config.monitor_metrics)}
            tags = {**measured, **TAGS, **others}
            metrics = {f"{axis}/{tag}": row[name] for name, tag in tags.items() if row.get(name) is not None}
            if axis == "sample":
                metrics["sample/step"] = row["step"]
                metrics |= {f"sample/{name}": getattr(self.config, name) for name in PARAMETERS_OF_TESTS}
            values = [Summary.Value(tag=tag, simple_value=number) for tag, number in metrics.items()]
            self._tensorboard.experiment.file_writer.add_summary(Summary(value=values), at)

    def advance(self, done: int) -> None:
        """Move the progress bar to `done` samples or steps; a log file gets a line now and then."""
        self._bar.update(min(done, self._bar.total) - self._bar.n)
        now = time.perf_counter()
        if self._bar.disable and now - self._last_line >= QUIET_SECONDS:
            left = max(self._bar.total / done - 1, 0) * (now - self.start)
            self.say(f"{self._progress}  {tqdm.format_interval(left)} left")

    def save_weights(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        """The plain weights, for `module.load_state_dict(torch.load("model.pt"))` on any device."""
        on_the_host = tree_map(lambda value: value.cpu() if isinstance(value, torch.Tensor) else value, dict(weights))
        with self._writing(), replacing(self.folder / name) as file:
            torch.save(plain(on_the_host), file)

    def _close(self) -> None:
        self._bar.close()
        with self._writing():
            self._csv.close()
            if self._modules:
                self._modules.file.close()

    def _summary(self, status: str, results: dict[str, Any]) -> dict[str, Any]:
        summary = {
            "status": status,
            **results,
            **self._training_results(results["knee"]),
            "wall_time": time.perf_counter() - self.start,
            "peak_memory_bytes": peak_memory_bytes(),
            "versions": versions(),
            "git_commit": git_commit(),
            "command": sys.argv,
        }
        return {  # JSON has no NaN
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in summary.items()
        }

    def _write_summary(self, summary: dict[str, Any]) -> None:
        with self._writing(), replacing(self.folder / "summary.json", "w") as file:
            file.write(json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def _finish_tensorboard(self, summary: dict[str, Any]) -> None:
        with self._writing():
            self._log_hyperparameters(summary)
            self._tensorboard.finalize(summary["status"])

    def _draw(self) -> None:
        with self._writing():
            figures.curves(self.folder)

    def conclude(
        self, status: str, results: dict[str, Any], weights: dict[str, dict[str, torch.Tensor]], stop_signal: int
    ) -> None:
        """The end of a run: weights by the names of their files, summary.json, TensorBoard's hyper-parameters,
        curves.png, and how to go on.

        Raises:
            RunError, UsageError: the first problem, after all that can be written was written.
        """
        problems: list[Exception] = []

        def attempt(write: Callable, *arguments: Any) -> None:
            try:
                write(*arguments)
            except Exception as error:
                problems.append(error)

        attempt(self._close)
        if status == "finished":
            for name, own in weights.items():
                attempt(self.save_weights, name, own)
        summary = self._summary(status, results)
        for write, *arguments in ((self._write_summary, summary), (self._finish_tensorboard, summary), (self._draw,)):
            attempt(write, *arguments)
        self.say(texts.summary_text(summary, self.folder))
        if status == "interrupted":
            command = resume_command(self.folder.parent, self.folder.name)
            self.say(f"interrupted by {signal.Signals(stop_signal).name}; go on with:\n  {command}")
        if problems:
            said = isinstance(problems[0], (RunError, UsageError))
            raise problems[0] if said else RunError(in_one_line(problems[0])) from problems[0]

    def _training_results(self, knee: float | None) -> dict[str, float | None]:
        """What the rows say of the training as a whole; a run of no steps says nothing."""
        metrics, c = results.read_metrics(self.folder), self.config
        prices = results.price(metrics, c.critical, c.batch_size, knee)
        if not metrics:
            return {"train_loss": None, "training_time": 0.0, "samples_per_second": None, **prices}
        training_time = results.seconds(metrics)[-1]
        return {
            **prices,
            "train_loss": results.last_epoch_loss(metrics),
            "training_time": training_time,
            "samples_per_second": metrics["samples"][-1] / training_time,
        }

    def _log_hyperparameters(self, summary: dict[str, Any]) -> None:
        """The options and what came of them, for TensorBoard's view HParams."""
        options = {name: value for name, value in plain_options(self.config).items() if value is not None}
        of_training = "train_loss steps samples mean_batch_size final_batch_size wall_time samples_per_second"
        names = [*(name for name in summary if name.startswith(("val_", "best_val_"))), *of_training.split()]
        results = {f"final/{name}": summary[name] for name in names if summary[name] is not None}
        self._tensorboard.log_hyperparams({**options, "status": summary["status"]}, results, summary["steps"])


def module_numbers(by_module: dict) -> dict[str, list[float | None]]:
    """The last four of `MODULE_COLUMNS` by module, from each one's moments."""
    return {
        name: [own.variance, own.grad_norm_sq, own.batch_noise_scale, own.statistics(unbiased=True).noise_scale]
        for name, own in by_module.items()
    }


class _ModuleTable:
    """modules.csv."""

    def __init__(self, path: Path):
        self.file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (closed by `finish`)
        self.writer = csv.writer(self.file)
        if not self.file.tell():
            self.writer.writerow(MODULE_COLUMNS)

    def write(self, row: dict[str, Any]) -> None:
        for module, numbers in row.get("modules", {}).items():
            self.writer.writerow([row["step"], row["samples"], module, *numbers])
        self.file.flush()


def _growing(folder: Path) -> list[Path]:
    """The files of a run that get longer."""
    return [path for name in ("metrics.csv", MODULES, EVENTS) for path in folder.glob(name)]


def _handed_on(report: Callable) -> Callable:
    """A hook for errors in threads: TensorBoard's writer hands its own on to the next write and need not print it."""
    return lambda error: None if type(error.thread).__name__ == "_AsyncWriterThread" else report(error)


def _rewind(source: Path, folder: Path, sizes: dict[str, int]) -> None:
    """Bring the growing files to what they were at a checkpoint: later rows and events are written anew.

    Args:
        source: the run's folder of then; where it is another one, its files are copied.
        folder: the run's folder.
        sizes: by file name [bytes].
    """
    for name in ("summary.json", texts.PLAIN, texts.AVERAGE):
        (folder / name).unlink(missing_ok=True)
    for path in _growing(folder):
        if path.name not in sizes:
            path.unlink(missing_ok=True)
    for name, size in sizes.items():
        path = folder / Path(name).name  # whatever a checkpoint says, nothing outside the folder is touched
        if not source.samefile(folder) and (source / path.name).is_file():
            shutil.copyfile(source / path.name, path)
        found = path.stat().st_size if path.is_file() else 0
        if found > size:
            os.truncate(path, size)
        elif found < size:
            print(f"warning: {path} is shorter than at the checkpoint: rows are missing", file=sys.stderr, flush=True)


def peak_memory_bytes() -> int:
    """The largest memory this process has held: on the GPU where there is one, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    import lightning
    import torchvision

    modules = {"torch": torch, "torchvision": torchvision, "lightning": lightning}
    return {"python": platform.python_version(), **{name: module.__version__ for name, module in modules.items()}}


def provenance_card() -> str:
    """Command, versions and git commit in Markdown."""
    facts = {"command": shlex.join(sys.argv), **versions(), "git commit": git_commit() or "-"}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | `{value}` |" for name, value in facts.items())])


def git_commit() -> str | None:
    """The commit of the program's own folder, None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent.parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
