"""Where two options meet: a covering array, in whose runs every pair of values of two options occurs.

Every run is a dozen steps on 120 digits. `FACTORS` says what is combined, `REFUSED` what the program refuses to combine
(and a test that it does). What is held to what, for which of the runs, say the tests; where a property cannot hold,
a comment there has the reason. ADADAGRAD_PAIRS=1, 2, … draws other arrays.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import random
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, TensorDataset

import batches
import data
import main
from adadagrad.order import SampleOrder
from checks import fault_drill, oracle
from checks.conftest import _as_of_torchrun, forks
from launch import ending
from runs import checkpoint, figures

HERE = "checks.test_pairs"
SAMPLES, LARGEST, SEED = 120, 40, 42
FREE_START = 22
"""An eighth of the knee that `steady` is told, where the run has no number of samples; else that has no room for it."""
ARRAY = int(os.environ.get("ADADAGRAD_PAIRS", 0))
Row = dict[str, str]
"""Factor → its value, by name."""

FACTORS: dict[str, dict[str, str]] = {
    "rule": {
        "norm": "--test_type=norm --eta=0.6",
        "ip": "--test_type=ip --theta=0.2",
        "ip+orth": "--test_type=ip+orth --theta=0.3 --nu=0.7",
        "goodput": "--ramp_up_type=goodput --knee=60",
        "steady": "--recipe=steady --knee=180",
        "stagewise": "--test=False --stagewise_ramp_up=True --global_batch_sizes=[8,29,12] --samples_stages=[40,90,70]",
        "linear": "--test=False --linear_ramp_up=True --linear_ramp_up_increment=5",
        "seesaw": "--test=False --seesaw_ramp_up=True",
        "constant": "--test=False",
    },
    "statistics": {name: f"--statistics={name}" for name in ("batch", "unbiased")},
    "smoothing": {name: f"--smoothing={name}" for name in ("0", "60")},
    "lr_scaling": {name: f"--lr_scaling={name}" for name in ("none", "linear", "adascale", "critical")},
    "coupling": {name: f"--coupling={name}" for name in ("rate", "full", "none")},
    "may_shrink": {"no": "", "yes": "--may_shrink=True"},
    "limits": {"none": "", "growth": "--max_growth=1.6", "multiple": "--batch_size_multiple=3"},
    "test_interval": {name: f"--test_interval={name}" for name in ("1", "2", "3", "auto")},
    "monitor_interval": {name: f"--monitor_interval={name}" for name in ("0", "1", "3", "4")},
    "monitor_modules": {"no": "", "yes": "--monitor_modules=True"},
    "monitor_metrics": {"no": "", "yes": "--monitor_metrics=[optimizer,l1,curvature]"},
    "log_interval": {name: f"--log_interval={name}" for name in ("1", "3", "4")},
    "evaluation": {"3 steps": "--eval_interval=3", "4 steps": "--eval_interval=4", "50 samples": "--eval_samples=50"},
    "training_type": {"sample": "--max_samples=190", "iter": "--training_type=iter --max_iters=10"},
    "test_gradients": {n: f"--test_gradients={n}" for n in ("auto", "ghost", "vmap", "micro_batch", "worker")},
    "strategy": {name: f"--strategy={name}" for name in ("auto", "ddp", "fsdp")},
    "ranks": {"1": "--devices=1", "2": "--devices=2"},
    "cut": {
        "whole": "--max_micro_batch_size=64",
        "pieces": "--max_micro_batch_size=5",
        "steps": "--max_micro_batch_size=64 --gradient_accumulation_steps=2",
    },
    "precision": {name: f"--precision={name}" for name in ("32-true", "64-true", "bf16-mixed", "16-mixed")},
    "network": {name: f"--model={HERE}:{name}" for name in ("plain", "batch_norm", "dropout")},
    "data": {"in memory": f"--dataset={HERE}:digits", "read": f"--dataset={HERE}:read_digits"},
    "optimizer": {name: f"--optimizer={name}" for name in ("sgdm", "adamw", "adagrad")},
    "schedule": {"cosine": "", "constant": "--decay_lr=False", "clipped": "--grad_clip=0.5"},
}
COMMON = f"--accelerator=cpu --batch_size=8 --max_batch_size={LARGEST} --learning_rate=0.02"
COMMON += " --test_groups=4 --max_test_micro_batch_size=7 --checkpoint_interval=3 --keep_checkpoints=99"


def is_tested(row: Row) -> bool:
    """Statistics decide on the batch size."""
    return row["rule"] in ("norm", "ip", "ip+orth", "goodput", "steady")


def is_measured(row: Row) -> bool:
    return is_tested(row) or row["monitor_interval"] != "0"


def in_groups(row: Row) -> bool:
    """Statistics are of micro-batches. BatchNorm has no others, unless the published rule takes its own."""
    published = row["rule"] in ("norm", "ip", "ip+orth") and row["statistics"] == "batch"
    published = published and not scales_by_statistics(row)
    by_itself = row["network"] == "batch_norm" and row["test_gradients"] == "auto" and not published
    return row["test_gradients"] in ("micro_batch", "worker") or by_itself


def scales_by_statistics(row: Row) -> bool:
    return row["lr_scaling"] in ("adascale", "critical")


REFUSED: dict[str, Callable[[Row], bool]] = {
    "--statistics acts only with": lambda row: row["statistics"] == "unbiased" and not is_measured(row),
    "--smoothing acts only with": lambda row: row["smoothing"] != "0" and not is_measured(row),
    "--monitor_modules acts only with": lambda row: row["monitor_modules"] == "yes" and not is_measured(row),
    "--monitor_metrics acts only with": lambda row: row["monitor_metrics"] == "yes" and not is_measured(row),
    "--monitor_metrics needs gradients of single samples": lambda row: (
        row["monitor_metrics"] == "yes" and (row["strategy"] == "fsdp" or row["network"] == "batch_norm")
    ),
    "--monitor_metrics: SGD does not divide": lambda row: (
        row["monitor_metrics"] == "yes" and row["optimizer"] == "sgdm"
    ),
    "needs the statistics: add": lambda row: scales_by_statistics(row) and not is_measured(row),
    "--coupling=": lambda row: row["coupling"] != "rate" and not scales_by_statistics(row),
    "--may_shrink acts only with": lambda row: row["may_shrink"] == "yes" and row["rule"] in ("norm", "ip", "ip+orth"),
    "--seesaw_ramp_up needs a learning rate that falls": lambda row: (
        row["rule"] == "seesaw" and row["schedule"] == "constant"
    ),
    "--seesaw_ramp_up scales by sqrt": lambda row: row["rule"] == "seesaw" and row["lr_scaling"] != "none",
    "--test_gradients=worker compares": lambda row: (
        row["test_gradients"] == "worker" and row["ranks"] == "1" and row["cut"] != "steps"
    ),
    "does not tell parameters apart": lambda row: (
        row["monitor_modules"] == "yes"
        and is_measured(row)
        and not in_groups(row)
        and (row["test_gradients"] == "vmap" or row["network"] == "batch_norm")
    ),
    "the model has BatchNorm, whose statistics": lambda row: (
        row["strategy"] == "fsdp" and row["network"] == "batch_norm"
    ),
    "--precision=16-mixed scales the loss": lambda row: row["strategy"] == "fsdp" and row["precision"] == "16-mixed",
    "need whole tensors here": lambda row: (
        row["strategy"] == "fsdp"
        and is_measured(row)
        and (row["test_gradients"] == "vmap" or (in_groups(row) and row["rule"] in ("ip", "ip+orth")))
    ),
}
"""Words of the refusal → what it refuses. A KeyError says that it does not yet follow from the factors known."""


def is_refused(row: Row) -> str:
    """The words of a refusal of what is known of a row; "" where there is none."""
    for words, applies in REFUSED.items():
        with contextlib.suppress(KeyError):
            if applies(row):
                return words
    return ""


def words_of(row: Row) -> list[str]:
    words = f"{COMMON} {' '.join(FACTORS[factor][value] for factor, value in row.items())}".split()
    if row["rule"] == "seesaw" and row["training_type"] == "iter" and row["schedule"] != "constant":
        words += ["--lr_decay_type=sample", "--lr_decay_samples=250"]
    return words


Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs_of(row: Row) -> set[Pair]:
    return set(itertools.combinations(row.items(), 2))


def all_pairs(factors: dict[str, Collection[str]]) -> set[Pair]:
    return {
        ((one, a), (other, b)) for one, other in itertools.combinations(factors, 2)
        for a in factors[one] for b in factors[other]
    }  # fmt: skip


def completed(known: Row, factors: dict[str, Collection[str]], missing: set[Pair], draw: random.Random) -> Row | None:
    """A row with what is known of it; each further value is one with the most missing pairs of those not refused."""
    row = dict(known)
    for factor in draw.sample(list(factors), len(factors)):
        if factor in row:
            continue
        allowed = [value for value in factors[factor] if not is_refused({**row, factor: value})]
        if not allowed:
            return None

        def brings(value: str) -> int:
            own = (factor, value)  # noqa: B023
            return sum((own, other) in missing or (other, own) in missing for other in row.items())

        row[factor] = max(draw.sample(allowed, len(allowed)), key=brings)
    return {factor: row[factor] for factor in factors}


def covering_array(
    factors: dict[str, Collection[str]], fixed: Row | None = None, tries: int = 4
) -> tuple[list[Row], set[Pair]]:
    """Greedily, as AETG does (Cohen, Dalal, Fredman, Patton, IEEE TSE 23, 1997): rows in which every pair of values of
    two factors occurs; and the pairs that are in none, as whatever goes with them is refused.

    Args:
        fixed: of every row.
    """
    factors = {factor: [fixed[factor]] if fixed and factor in fixed else list(factors[factor]) for factor in factors}
    draw, rows, never = random.Random(ARRAY), [], set()
    missing = {pair for pair in all_pairs(factors) if not is_refused({**(fixed or {}), **dict(pair)})}
    while missing:
        first, *others = draw.sample(sorted(missing), min(tries, len(missing)))
        attempts = (completed({**(fixed or {}), **dict(first)}, factors, missing, draw) for _ in range(60))
        found = [next(filter(None, attempts), None)]
        if found == [None]:
            missing.discard(first)
            never.add(first)
            continue
        found += [completed({**(fixed or {}), **dict(seed)}, factors, missing, draw) for seed in others]
        rows.append(max(filter(None, found), key=lambda row: len(pairs_of(row) & missing)))
        missing -= pairs_of(rows[-1])
    return rows, never


ROWS, NEVER = covering_array(FACTORS)
EXPLAINED: set[Pair] = {
    (("rule", "seesaw"), ("coupling", "full")),  # needs a scaling by statistics
    (("rule", "seesaw"), ("coupling", "none")),
    (("monitor_modules", "yes"), ("test_gradients", "vmap")),  # is refused measured, and not measured
    (("monitor_metrics", "yes"), ("network", "batch_norm")),
}
"""Pairs that are refused whatever goes with them."""
GIVEN = {"network": "plain", "precision": "64-true", "strategy": "auto", "ranks": "1", "cut": "whole"}
GIVEN |= {"test_gradients": "auto", "log_interval": "1", "monitor_modules": "no"}
FREE = {factor for factor in FACTORS if factor not in GIVEN}
EXACT, _ = covering_array(FACTORS, GIVEN)
"""Those in which another cut, or another number of ranks, changes nothing but rounding."""
# A third of these rows, as they take long; ADADAGRAD_ALL_PAIRS=1: all.
SOME = range(0, len(EXACT), 1 if os.environ.get("ADADAGRAD_ALL_PAIRS") else 3)


def plain(image_shape, num_classes) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, num_classes))


def dropout(image_shape, num_classes) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, num_classes))


def batch_norm(image_shape, num_classes) -> nn.Module:
    convolution = nn.Conv2d(1, 3, 3, stride=2, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, num_classes))


@functools.cache
def tensors() -> list[list[torch.Tensor]]:
    whole = data.digits(Path())
    return [[part[:n] for part in split.tensors] for split, n in ((whole.train, SAMPLES), (whole.val, 40))]


def digits(data_dir: Path) -> data.DataSet:
    """The first 120 and 40 of them."""
    return data.DataSet(*(TensorDataset(*split) for split in tensors()), num_classes=10)


class Read(Dataset):
    """The same, one after the other."""

    def __init__(self, split: list[torch.Tensor]):
        self.images, self.labels = split

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.images[index], self.labels[index]


def read_digits(data_dir: Path) -> data.DataSet:
    return data.DataSet(*map(Read, tensors()), num_classes=10)


def status_of(words: list[str]) -> tuple[int, str]:
    """Of the program on these words in this process, which is left as it was; and what it has said."""
    before, hook, said = dict(os.environ), threading.excepthook, io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            status = main.main(words)
    finally:
        threading.excepthook = hook
        os.environ.clear()
        os.environ.update(before)
    return status, said.getvalue()


def train_as(rank: int, pipe) -> None:
    """A process of two: trains on whatever words come, until there are none."""
    torch.set_num_threads(1)
    rank_zero_only.rank = rank
    ending.give_signs_of_life = lambda fabric: None  # else a process ends with its first run
    figures.curves = lambda folder: None
    while job := pipe.recv():
        words, environment = job
        os.environ.update(environment)
        pipe.send(status_of(words))


class Two:
    """Two processes that wait for work: to begin new ones takes longer than these runs."""

    def __init__(self):
        self.pipes, self.processes = [], []

    def start(self) -> None:
        for rank in range(2):
            ours, theirs = forks().Pipe()
            self.pipes.append(ours)
            self.processes.append(forks().Process(target=train_as, args=(rank, theirs)))
            self.processes[-1].start()
            theirs.close()

    def run(self, words: list[str]) -> tuple[int, str]:
        if not self.processes:
            self.start()
        for pipe, environment in zip(self.pipes, _as_of_torchrun(2)):
            pipe.send((words, environment))
        try:
            answers = [pipe.recv() if pipe.poll(60) else (-1, "no answer within a minute") for pipe in self.pipes]
        except EOFError:
            answers = [(-1, "a process has died")]
        worst = max(answers, key=lambda answer: answer[0] != 0)
        if worst[0] < 0:
            self.end()
        return worst

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    own = Two()
    yield own
    own.end()


@pytest.fixture(autouse=True)
def fewer_works(monkeypatch):
    monkeypatch.setattr(figures, "curves", lambda folder: None)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail(f"the program has ended by os._exit({status})"))


@pytest.fixture
def train(tmp_path, two):
    """Of a name, a row and further words: the run's folder and its rows."""

    def run(name: str, row: Row, *words: str) -> SimpleNamespace:
        command = [*words_of(row), *words, f"--out_dir={tmp_path}", f"--run_name={name}"]
        status, said = two.run(command) if row["ranks"] == "2" else status_of(command)
        assert status == 0, f"{' '.join(command)}: status {status}: {said}"
        return SimpleNamespace(folder=tmp_path / name, rows=fault_drill.rows_but_times(tmp_path / name), said=said)

    return run


def numbers(run: SimpleNamespace, column: str) -> list[float]:
    return [float(row[column]) for row in run.rows if row[column]]


def id_of(row: Row) -> str:
    return ",".join(row[factor] for factor in ("rule", "test_gradients", "network", "precision", "strategy", "ranks"))


def first_size(row: Row) -> int:
    return FREE_START if row["rule"] == "steady" and row["training_type"] == "iter" else 8


def measured_steps(row: Row, run: SimpleNamespace) -> set[int]:
    """Steps that decide (as far as it is not `auto` that chooses them) and steps that are watched, from the options."""
    interval = row["test_interval"] if is_tested(row) else row["monitor_interval"]
    watched = int(row["monitor_interval"])
    follows, sizes = scales_by_statistics(row) and row["coupling"] != "none", rows_by_step(run)
    size = first_size(row)
    found = set()
    for step in range(1, max(sizes) + 1):
        decides = follows or (is_tested(row) and (row["may_shrink"] == "yes" or size < LARGEST))
        if decides and interval not in ("auto", "0") and (step - 1) % int(interval) == 0:
            found.add(step)
        if watched and (step - 1) % watched == 0:
            found.add(step)
        if step in sizes:  # a test changes sizes in measured steps alone, which have rows
            size = int(sizes[step]["next_batch_size"])
    return found


def rows_by_step(run: SimpleNamespace) -> dict[int, dict[str, str]]:
    return {int(row["step"]): row for row in run.rows}


def assert_rows(row: Row, run: SimpleNamespace) -> None:
    """Every measured step has its row, and every one that is due otherwise; sizes keep to their bounds."""
    summary = json.loads((run.folder / "summary.json").read_text())
    steps = [int(r["step"]) for r in run.rows]
    with_statistics = {int(r["step"]) for r in run.rows if r["variance"]}
    measured = measured_steps(row, run)
    by_itself = is_tested(row) and row["test_interval"] == "auto"
    assert measured <= with_statistics if by_itself else measured == with_statistics
    every = int(row["log_interval"])
    due = {step for step in range(1, summary["steps"] + 1) if step % every == 0}
    evaluated = {int(r["step"]) for r in run.rows if r["val_loss"]}
    assert set(steps) == due | with_statistics | evaluated and steps == sorted(steps)
    if "steps" in row["evaluation"]:
        k = int(row["evaluation"][0])
        assert evaluated == {step for step in range(1, summary["steps"] + 1) if step % k == 0} | {summary["steps"]}
    assert 1 not in steps or int(run.rows[0]["batch_size"]) == first_size(row)
    factor, multiple = (1.6 if row["limits"] == "growth" else 1e9), (3 if row["limits"] == "multiple" else 1)
    shrinks = row["rule"] == "stagewise" or (is_tested(row) and row["may_shrink"] == "yes")
    for r in run.rows:
        size, following = int(r["batch_size"]), int(r["next_batch_size"])
        assert all(
            2 <= b <= LARGEST and (b % multiple == 0 or b in (8, FREE_START, LARGEST)) for b in (size, following)
        ), r
        assert following <= size * factor, r
        assert following >= size or shrinks, r
    for before, after in itertools.pairwise(run.rows):
        if int(after["step"]) == int(before["step"]) + 1:
            assert int(after["batch_size"]) == int(before["next_batch_size"])
            assert int(after["samples"]) == int(before["samples"]) + int(after["batch_size"])
    assert (summary["steps"], summary["samples"]) == (steps[-1], int(run.rows[-1]["samples"]))
    assert summary["samples"] >= 190 if row["training_type"] == "sample" else summary["steps"] == 10


def assert_checkpoints(run: SimpleNamespace) -> list[Path]:
    """All of them load; gives them in order."""
    paths = sorted((run.folder / "checkpoints").glob("step-*.pt"))
    for path in paths:
        saved = torch.load(path, weights_only=True)
        assert not checkpoint.problem_of(path) and saved["controller"]["steps"] == int(path.stem[5:])
    steps = [int(path.stem[5:]) for path in paths]
    assert set(range(3, steps[-1] + 1, 3)) <= set(steps) and steps[-1] == int(run.rows[-1]["step"])
    return paths


PRECISION = {"64-true": 1e-9, "32-true": 2e-4, "bf16-mixed": 0.06, "16-mixed": 0.06}


def assert_statistics(row: Row, run: SimpleNamespace) -> None:
    """Of the first measured step, the first of all: from single samples (or micro-batches), one by one."""
    (first, *_) = (r for r in run.rows if r["variance"])
    assert first["step"] == "1"
    b, ranks = int(first["batch_size"]), int(row["ranks"])
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.float64 if row["precision"] == "64-true" else torch.float32)
    try:
        model = globals()[row["network"]]((1, 8, 8), 10).double()
    finally:
        torch.set_default_dtype(torch.float32)
    images, labels = tensors()[0]
    order = SampleOrder(SAMPLES, SEED, True).samples(range(b))
    inputs, targets = images[order].double() / 255, labels[order]
    if in_groups(row):
        steps = int(first["gradient_accumulation_steps"])
        least = 2 if row["cut"] == "steps" else 1
        largest = 5 if row["cut"] == "pieces" else 64
        if row["test_gradients"] != "worker":
            least = max(least, -(-4 // ranks))
        even = row["network"] == "batch_norm" or row["strategy"] == "fsdp"
        plan = batches.cut(0, b, ranks, largest, least, 1, even=even)
        assert plan.steps == steps
        groups = [list(positions) for rank in range(ranks) for positions in plan.micro_batches(rank)]
        vectors = []
        for group in groups:
            model.zero_grad()
            cross_entropy(model(inputs[group]), targets[group]).backward()
            vectors.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        expected = oracle.statistics(torch.stack(vectors), [len(group) for group in groups])
    else:
        expected = oracle.statistics(oracle.gradient_vectors(model, cross_entropy, inputs, targets))
    names = ["variance", "grad_norm_sq"]
    if row["rule"] in ("ip", "ip+orth"):
        names += ["variance_inner_product", "variance_orthogonality"]
    for name in names:
        found, right = float(first[name]), expected[name]
        assert found == pytest.approx(right, rel=PRECISION[row["precision"]]), (name, found, right)


def assert_close(one: SimpleNamespace, other: SimpleNamespace, tolerance: float, columns: tuple[str, ...]) -> None:
    """The same batch sizes, numbers and weights but for rounding, in the rows that both have."""
    theirs = {r["step"]: r for r in other.rows}
    for r in one.rows:
        if r["step"] in theirs:
            for name in ("samples", "batch_size", "next_batch_size"):
                assert theirs[r["step"]][name] == r[name], (name, r, theirs[r["step"]])
            for name in columns:
                a, b = r.get(name), theirs[r["step"]].get(name)
                assert bool(a) == bool(b), (name, r["step"], a, b)
                right = pytest.approx(float(a or 0), rel=tolerance, abs=0.0, nan_ok=True)
                assert float(b or 0) == right, (name, r["step"], a, b)
    assert one.rows[-1]["step"] == other.rows[-1]["step"]
    ours, their = (torch.load(run.folder / "model.pt", weights_only=True) for run in (one, other))
    for name in ours:
        torch.testing.assert_close(their[name], ours[name], rtol=tolerance, atol=tolerance / 10)


EXACTLY = 0.0


def refusals(row: Row) -> list[str]:
    return [words for words, applies in REFUSED.items() if applies(row)]


def test_every_pair_is_there():
    """In some row, or refused, as a pair or with all that could go with it."""
    for rows, factors in ((ROWS, FACTORS), (EXACT, FREE)):
        found = set().union(*map(pairs_of, rows))
        left_out = all_pairs(FACTORS) - found
        refused = {pair for pair in left_out if is_refused(dict(pair))}
        if rows is ROWS:
            assert left_out - refused == NEVER == EXPLAINED
        else:
            of_free = {pair for pair in left_out - refused if all(f in factors for f, _ in pair)}
            assert of_free <= NEVER
    assert not any(map(refusals, ROWS + EXACT))


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_left_out_is_refused(tmp_path, words):
    """In one line, and for this reason alone: a row with one or two values changed."""
    changes = [dict(pair) for pair in sorted(all_pairs(FACTORS))]
    rows = ({**row, "ranks": "1", **change} for row in ROWS for change in changes)
    row = next(row for row in rows if refusals(row) == [words] and row["ranks"] == "1")
    status, said = status_of([*words_of(row), f"--out_dir={tmp_path}"])
    assert status == 2 and len(said.splitlines()) == 1 and words in said, f"{words_of(row)}: {status}: {said}"
    assert said.startswith("main.py: error: --") and not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(ROWS)), ids=[id_of(row) for row in ROWS])
def test_pairs(train, number):
    """Rows, sizes, checkpoints and statistics are right; watched = unwatched; resumed = undisturbed."""
    row = ROWS[number]
    whole = train("whole", row)
    assert_rows(row, whole)
    paths = assert_checkpoints(whole)
    if is_measured(row) and row["network"] != "dropout":
        assert_statistics(row, whole)
    chosen = paths[number % (len(paths) - 1)]
    again = train("again", row, f"--resume={chosen}")
    assert again.rows == whole.rows, chosen
    assert_close(whole, again, EXACTLY, ())
    watch = row["monitor_interval"] == "0"
    twin = {**row, "monitor_interval": "3" if watch else "0", "monitor_modules": "no", "monitor_metrics": "no"}
    if is_refused(twin) or (not is_tested(row) and scales_by_statistics(row)):
        return  # without a test, it is by the monitor that the learning rate follows
    cuts = in_groups(row) and row["test_gradients"] != "worker"
    if cuts and (row["network"] != "plain" or "16" in row["precision"]):
        return  # measured steps are cut into other micro-batches: by documented design another function, other draws
    other = train("watched" if watch else "unwatched", twin)
    tolerance = {"64-true": 1e-9, "32-true": 1e-4}[row["precision"]] if cuts else EXACTLY
    assert_close(whole, other, tolerance, ("val_loss", "lr"))


@pytest.mark.long
@pytest.mark.parametrize("number", SOME, ids=[id_of(EXACT[number]) for number in SOME])
def test_pairs_of_any_cut(train, number):
    """In pieces and on two processes, from the start or from the middle on: the same but for rounding."""
    row = EXACT[number]
    one = train("one", row)
    paths = assert_checkpoints(one)
    resumed = [f"--resume={paths[number // 2 % (len(paths) - 1)]}"] if number % 2 else []
    other = train("other", {**row, "ranks": "2", "cut": "pieces"}, *resumed)
    columns = ("train_loss", "val_loss", "lr", "lr_factor", "variance", "grad_norm_sq", "noise_scale")
    columns += ("variance_inner_product", "variance_orthogonality", "noise_scale_optimizer", "noise_scale_l1")
    assert_close(one, other, 1e-7, columns)
