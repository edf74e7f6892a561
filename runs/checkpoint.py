"""Checkpoints: what a run is saved to and resumed from.

A checkpoint is one file, `RUN_FOLDER/checkpoints/step-00000120.pt`, written by Fabric's `save` and read, weights only,
by its `load`. It holds the model, the optimizer, the gradient scaler, the progress and, for every rank, the random
states, the buffers (BatchNorm's running statistics differ between ranks until they are averaged) and the totals since
the last row of metrics.csv. Which sample comes next follows from the progress alone (adadagrad/order.py).
"""

import contextlib
import copy
import os
import pickle
import re
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.strategies import ModelParallelStrategy

from launch.collectives import all_gather_object, broadcast_object, on_all_ranks
from launch.ending import errors_go_to
from options.errors import RunError, UsageError, in_one_line
from options.schedules import rule_class
from options.schema import Config
from runs.lock import refuse_another_writer

# What may differ between a run and its continuation: where things are, how often something is written, and how a batch
# is cut over devices and passes. All else changes the mathematics.
FREE = """
    data_dir num_workers compile gradient_accumulation_steps
    launcher max_micro_batch_size max_test_micro_batch_size
    knee recheck accelerator strategy shard_modules devices num_nodes timeout_minutes deterministic recipe
    out_dir run_name log_interval eval_interval eval_samples checkpoint_interval checkpoint_minutes keep_checkpoints
    resume
""".split()  # noqa: SIM905
GROWING = ("max_samples", "max_iters")
"""May differ, but only upwards."""
OF_A_BRANCH = ("branch", "branch_gain", "seed", "training_type", "validation_samples", "weight_average", *GROWING)
"""May differ where the run branches off."""
FROM_THE_LENGTH = ("lr_decay_samples", "lr_decay_iters", "samples_stages")
"""Defaults that follow from the length of the run: a longer continuation keeps the values of the run."""


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Write a file whole or not at all: under a temporary name, onto the disk, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name
    finally:
        os.close(folder)


class DurableIO(TorchCheckpointIO):
    """Fabric's reader, and a writer that replaces a file as a whole.

    Fabric has one rank write while the others wait; a problem is therefore kept for `Checkpoints.save` to raise on all.
    """

    problem: Exception | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        self.problem = None
        try:
            with replacing(Path(path)) as file:
                torch.save(plain(checkpoint), file)
        except Exception as error:  # of a user's objects; or torch's writer stumbles over what the file's error leaves
            self.problem = error.__context__ if isinstance(error.__context__, OSError) else error


def plain(value: Any) -> Any:
    """The same with Python's numbers in the place of NumPy's, which are not read; containers are copied."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        copied = copy.copy(value)  # with what torch has attached to it
        copied.update((name, plain(part)) for name, part in value.items())
        return copied
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


class Checkpoints:
    """The checkpoints of a run's folder: when one is due, writing it, removing old ones. On all ranks.

    Args:
        fabric: of the run.
        config: its options.
        folder: the run's folder on the first rank, None on the others.
    """

    def __init__(self, fabric: Fabric, config: Config, folder: Path | None):
        self.fabric, self.config = fabric, config
        self.folder = Path(broadcast_object(fabric, lambda: str(folder.absolute()))) / "checkpoints"
        errors_go_to(self.folder.parent)
        self.io = DurableIO()
        self.sharded = isinstance(fabric.strategy, ModelParallelStrategy)
        if not self.sharded:
            fabric.strategy.checkpoint_io = self.io
        self.saved_at = time.monotonic()
        self.saved_step: int | None = None

    def due(self, step: int) -> bool:
        """By the number of steps."""
        return bool(self.config.checkpoint_interval) and step % self.config.checkpoint_interval == 0

    def due_by_clock(self) -> bool:
        """By this rank's clock: ranks have to agree."""
        minutes = (time.monotonic() - self.saved_at) / 60
        return 0 < self.config.checkpoint_minutes <= minutes

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}.pt"

    def save(self, step: int, best_step: int | None, state: dict[str, Any], own: dict[str, Any]) -> None:
        """Write a checkpoint and remove those that are no longer kept; to be called on all ranks.

        Args:
            step: the steps done.
            best_step: the checkpoint with the best validation accuracy, which is kept.
            state: the same on all ranks: objects with a `state_dict`, and plain values.
            own: what is this rank's own, plain values.

        Raises:
            RunError: it cannot be written. The ones before it stand.
            UsageError: it is the first one, and cannot be read.
        """
        ranks = all_gather_object(self.fabric, own)
        more = {"ranks": ranks, "options": plain_options(self.config), "hardware": list(hardware(self.fabric))}
        state = {**state, **more}
        if not self.sharded:
            try:
                self.fabric.save(self.path(step), state)
            except Exception as error:  # of state_dict(), on all ranks alike
                self.io.problem = error
        elif self.fabric.is_global_zero:
            self.io.save_checkpoint(state, self.path(step))
        on_all_ranks(self.fabric, lambda: self._conclude(step, best_step))
        self.saved_at, self.saved_step = time.monotonic(), step

    def _conclude(self, step: int, best_step: int | None) -> None:
        problem, self.io.problem = self.io.problem, None
        if isinstance(problem, (OSError, RuntimeError)):
            raise unwritable(self.path(step), problem)
        if problem:
            raise self._unreadable(f"what is to be saved cannot be written ({in_one_line(problem)})")
        if self.fabric.is_global_zero:
            if self.saved_step is None:
                self._refuse_unreadable(self.path(step))
            steps = sorted(steps_of(self.folder))
            for old in set(steps[: -self.config.keep_checkpoints]) - {best_step}:
                self.path(old).unlink(missing_ok=True)

    def _refuse_unreadable(self, path: Path) -> None:
        """Rather now than when the run is to go on: what models and optimizers keep is a user's own."""
        if problem := problem_of(path):
            path.unlink()
            raise self._unreadable(f"what was saved cannot be read again (it {problem})")

    def _unreadable(self, problem: str) -> UsageError:
        return UsageError(
            f"{problem}: state_dict() and get_extra_state() of --model={self.config.model} and "
            f"--optimizer={self.config.optimizer} may hold tensors, numbers, words, lists and dicts of them"
        )


def unwritable(path: Path, error: Exception) -> RunError:
    """A full disk, mostly."""
    saved = steps_of(path.parent) or steps_of(path.parent / "checkpoints")
    rest = "the checkpoints written before are intact" if saved else "nothing was saved yet"
    return RunError(
        f"{path} could not be written ({in_one_line(error)}): {rest}; make room, then go on with --resume=auto"
    )


def plain_options(config: Config) -> dict[str, Any]:
    """All options as plain values, as checkpoints and config.yaml have them."""
    values = asdict(config) | {"resume": None}  # how a run was started again is no property of the run
    names = (entry.name for topic in Config.__bases__ for entry in fields(topic))  # in the order of --help
    return {name: str(values[name]) if isinstance(values[name], Path) else values[name] for name in names}


def steps_of(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by their steps."""
    paths = {path.stem.removeprefix("step-"): path for path in folder.glob("step-*.pt")}
    return {int(step): path for step, path in paths.items() if step.isdigit()}


def problem_of(path: Path) -> str:
    """Why a file is no checkpoint to go on from, "" where it is one. Reads all of it: a changed byte is found.

    Raises:
        UsageError: it cannot be read; whether it is whole remains open.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                return f"is no intact checkpoint ({damaged} in it is damaged)"
        options_of(path)
    except (OSError, MemoryError) as error:
        raise UsageError(f"--resume: {path} cannot be read ({in_one_line(error)}): try again when it can be") from None
    except pickle.UnpicklingError as error:  # its words advise to load it all the same
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        return f"holds more than weights and plain values{f' ({found[1]})' if found else ''}: not loaded"
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        return f"is no intact checkpoint ({in_one_line(error)})"
    except Exception:  # a foreign file raises whatever its readers run into
        return "is no checkpoint of this program"
    return ""


def options_of(path: Path) -> dict[str, Any]:
    """The options of the run that wrote this checkpoint."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["options"]


def find(resume: str | None, folder: Path | None) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, None for a fresh start, and warnings about those that are skipped.

    Args:
        resume: the option.
        folder: OUT_DIR/RUN_NAME, None where the run has no name.

    Raises:
        UsageError: there is none where one is named, there are some but none is intact, one cannot be read, or the
            run's folder is not known.
    """
    if resume is None:
        return None, []
    if resume == "auto" and folder is None:
        raise UsageError("--resume=auto needs --run_name=NAME, the folder in --out_dir to go on in")
    place = folder / "checkpoints" if resume == "auto" else Path(resume)
    if place.is_file():
        if problem := problem_of(place):
            raise UsageError(f"--resume={resume} {problem}: name another one")
        return place, []
    place = place / "checkpoints" if (place / "checkpoints").is_dir() else place
    problems = {}
    for _, path in sorted(steps_of(place).items(), reverse=True):
        problem = problem_of(path)
        if not problem:
            return path, [f"warning: {name} {words}: taking the one before it" for name, words in problems.items()]
        problems[path] = problem
    if problems:
        listed = "; ".join(f"{path} {problem}" for path, problem in problems.items())
        raise UsageError(f"--resume={resume}: {listed}: put an intact one there, or choose another --run_name")
    if resume != "auto":
        raise UsageError(f"--resume={resume} has no checkpoint: give a run's folder, or one of its checkpoints")
    return None, []


def resumption(fabric: Fabric, config: Config) -> tuple[Config, Path | None]:
    """The options with what follows from the checkpoint to go on from, and that checkpoint, if any. On all ranks.

    Raises:
        UsageError: see `find` and `continued`; or another process writes into the folder that is to go on.
    """
    folder = config.out_dir / config.run_name if config.run_name else None

    def found_by_rank_0() -> tuple[Path | None, list[str]]:
        if config.resume:
            refuse_another_writer(folder or run_folder_of(Path(config.resume)))
        return find(config.resume, folder)

    found = on_all_ranks(fabric, lambda: fabric.is_global_zero and found_by_rank_0())
    path, warnings = broadcast_object(fabric, lambda: found)
    if fabric.is_global_zero and warnings:
        print(*warnings, sep="\n", file=sys.stderr, flush=True)
    if not path and config.branch:
        raise UsageError(
            f"--branch={config.branch}: --resume={config.resume} has no checkpoint to branch off: name one"
        )
    return (on_all_ranks(fabric, lambda: continued(config, path, hardware(fabric))), path) if path else (config, None)


def hardware(fabric: Fabric) -> tuple[str, int]:
    """What steps take their time on: a GPU's name, or cpu; and the number of processes."""
    device = fabric.device
    return (torch.cuda.get_device_name(device) if device.type == "cuda" else device.type), fabric.world_size


def continued(config: Config, path: Path, hardware: tuple[str, int]) -> Config:
    """The options of a continuation: what the run's length has decided stays, and what was measured on this hardware;
    without a name, it is the same folder.

    Args:
        hardware: that it goes on with.

    Raises:
        UsageError: the file is not there (ranks of several machines must see the same folder).
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UsageError(f"--resume: {path}: {error.strerror}: all machines must see the run's folder") from None
    old = saved["options"]
    kept = {name: old[name] for name in FROM_THE_LENGTH if not getattr(config, name) and old[name]}
    if config.max_micro_batch_size == "auto":  # measured already
        kept["max_micro_batch_size"] = old["max_micro_batch_size"]
    reads_knee = "knee" in rule_class(vars(config)).options and config.knee is None
    if reads_knee and list(hardware) == saved.get("hardware"):
        kept["knee"] = old["knee"]  # on other hardware it is another one
    if config.run_name is None and path.parent.name == "checkpoints":
        run_folder = run_folder_of(path.absolute())
        kept |= {"out_dir": run_folder.parent, "run_name": run_folder.name}
    return replace(config, **kept)


def run_folder_of(place: Path) -> Path:
    """The run's folder, of a checkpoint in it, of its folder of checkpoints, or of itself."""
    place = place.parent if place.is_file() else place
    return place.parent if place.name == "checkpoints" else place


def branches_off(config: Config, path: Path) -> bool:
    """The run is a branch that begins at this checkpoint, not one that goes on."""
    return config.branch is not None and options_of(path).get("branch") != config.branch


def refuse_differences(config: Config, path: Path) -> None:
    """Refuse to go on with other mathematics, but for what the size of a branch's batches makes of them.

    Raises:
        UsageError: lists every such option with its old and new value.
    """
    old, new = options_of(path), plain_options(config)
    free = {*FREE, *(OF_A_BRANCH if branches_off(config, path) else ())}
    differing = [
        f"--{name}={new[name]} was {old[name]}"
        for name in new
        if name in old and name not in free and new[name] != old[name]
        if not (name in GROWING and new[name] > old[name])
    ]
    if differing:
        raise UsageError(f"--resume: options differ from those of {path}: {'; '.join(differing)}: give the old values")


def remove_left_overs(folder: Path, resumed: Path | None) -> None:
    """Removes what a killed run was writing, and the checkpoints of a future that is now taken back.

    Those that are damaged are set aside: somebody may know how to mend them.
    """
    last = resumed.name if resumed and resumed.parent.samefile(folder) else ""
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)
    for path in steps_of(folder).values():
        if path.name > last and problem_of(path):
            path.replace(path.with_name(path.name + ".damaged"))
        elif path.name > last:
            path.unlink(missing_ok=True)
