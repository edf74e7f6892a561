"""Every option at its extremes: the program runs two steps, or refuses in one line with status 2; no third way.

Words for the command line come from the types of the options' dataclass, valid ones and others, and are given to
`main.main` in this process: each by itself, and 150 draws of several; ADADAGRAD_EXAMPLES=10000 draws more.
"""

import contextlib
import io
import os
import tempfile
import threading
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import main
from data import DataSet
from options.schema import Config

HERE = "checks.test_every_option"
EXAMPLES = int(os.environ.get("ADADAGRAD_EXAMPLES", 150))
OUTCOMES = {0: "ran", 2: "refused", 3: "ran"}  # 3: two steps were enough to diverge


def images(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return TensorDataset(pixels, torch.arange(count) % 3)


class Streamed(Dataset):
    def __init__(self, count: int):
        self.samples = images(count)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        return self.samples[index]


def tiny(data_dir: Path) -> DataSet:
    return DataSet(images(24), images(6), num_classes=3)


def streamed(data_dir: Path) -> DataSet:
    return DataSet(Streamed(24), Streamed(6), num_classes=3)


def with_batch_norm(image_shape, num_classes) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, num_classes))


NUMBERS = {
    int: [1, 2, 3, 25, 10**4, 2**31, 2**63, 10**30, 0, -1, "1.5", "many", ""],
    float: [1.0, 0.5, 0.999, 3, 1e-8, 1e-300, 1e300, 0, -1, "nan", "inf", "-inf", "many", ""],
    bool: [True, False, "maybe", 2],
}
OWN = {  # what a type does not tell
    "dataset": [f"{HERE}:tiny", f"{HERE}:streamed", "digits", "mnst", f"{HERE}:none", "no.such:thing", ":", ""],
    "model": ["logistic", f"{HERE}:with_batch_norm", "resnt18", f"{HERE}:tiny", "no.such:thing", ""],
    "model_args": ["{}", "{nonsense: 1}", "3"],
    "dataset_args": ["{}", "{nonsense: 1}", "3"],
    "lr_factors": ["{}", "{nonsense: 1}", "{weight: 2}", "3"],
    "monitor_metrics": ["[l1]", "[optimizer,curvature]", "[nonsense]", "[]", "l1"],
    "no_weight_decay": ["bias", "bias,norm,embedding", "nonsense", ""],
    "ramp_up_type": ["test", "factor", "goodput", "nonsense", ":", "no.such:thing", ""],
    "loss": ["torch.nn.functional:cross_entropy", f"{HERE}:tiny", "no.such:thing", ""],
    "optimizer": ["sgd", "sgdm", "adam", "adagrad", "adagradnorm", "RMSprop", "LBFGS", "Rprop", "torch.optim:SGD", ""],
    "optimizer_args": ["{}", "{eps: 1.0e-3}", "{nonsense: 1}", "{eps: many}", "3", "{lr: -1}"],
    "data_dir": ["data", "/dev/null/x", "$NOWHERE_AT_ALL/x", "~nobody_at_all/x", ""],
    "out_dir": ["/dev/null/x", "$NOWHERE_AT_ALL/x", "/proc/x"],
    "run_name": ["a", "ηθν", "a b", "..", "a/b", "", "$x", "x" * 300, "-"],
    "resume": ["auto", "nowhere", "/dev/null", "~nobody_at_all/x"],
    "devices": [1, "auto", 0, -1, 10**6, "many"],  # more than one would start processes
    "num_nodes": [1, 0, 2, 10**6, "many"],
    "num_workers": [0, 1, -1, "many"],
    "compile": [False, "maybe"],  # True takes a minute
}  # fmt: skip
CONTEXTS = [
    "", "--test=False", "--training_type=iter --max_iters=2", "--decay_lr=False", "--ramp_up_type=factor",
    "--test=False --stagewise_ramp_up=True --global_batch_sizes=[4,8]", "--test=False --linear_ramp_up=True",
    "--scheduler=multistep --milestones=[10,20]", "--lr_decay_type=iter --lr_decay_iters=9", "--test_type=ip+orth",
    "--test_gradients=micro_batch", "--test_gradients=vmap", f"--dataset={HERE}:streamed", "--warmup_samples=12",
    f"--model={HERE}:with_batch_norm", "--optimizer=adagradnorm", "--precision=64-true", "--strategy=ddp",
]  # fmt: skip
"""Options that others act only with."""
LISTS = ["[4,8]", "[8,8]", "[1]", "[]", "[0]", "[-3,4]", f"[{2**63}]", "[x]", "4"]


def values(option: str, kind: type) -> list:
    """What is tried for an option: by its own list, or by its type."""
    if option in OWN:
        return OWN[option]
    if get_origin(kind) is Literal:
        return [*get_args(kind), "nonsense", ""]
    if get_origin(kind) is list:
        return LISTS
    if kind in NUMBERS:
        return NUMBERS[kind]
    return [value for one in get_args(kind) if one is not NoneType for value in values("", one)]


OPTIONS = {entry.name: values(entry.name, entry.type) for entry in fields(Config)}
WORDS = st.sampled_from(list(OPTIONS)).flatmap(
    lambda option: st.sampled_from(OPTIONS[option]).map(lambda value: f"--{option}={value}")
)


@pytest.fixture(scope="module", autouse=True)
def two_steps():
    """Runs end after two steps."""
    leave, here = os._exit, os.getpid()

    def no_abrupt_end(status: int):
        if os.getpid() != here:  # a loader's worker, forked: it ends so, and would go on as a second pytest
            leave(status)
        pytest.fail(f"the program has ended by os._exit({status})")

    with pytest.MonkeyPatch.context() as patch:
        finished = main.Trainer.finished
        patch.setattr(main.Trainer, "finished", lambda trainer: trainer.controller.steps >= 2 or finished(trainer))
        patch.setattr(os, "_exit", no_abrupt_end)
        yield


def outcome(words: list[str]) -> tuple[int, str, bool]:
    """Status, standard error, and whether a run folder has been left behind, of the program on these words."""
    before, hook, said = dict(os.environ), threading.excepthook, io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        base = [
            f"--dataset={HERE}:tiny",
            "--model=logistic",
            "--accelerator=cpu",
            "--batch_size=4",
            f"--out_dir={folder}",
        ]
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                status = main.main([*base, *words])
        finally:
            torch.set_default_dtype(torch.float32)
            threading.excepthook = hook
            os.environ.clear()
            os.environ.update(before)
        return status, said.getvalue(), any(Path(folder).iterdir())


def assert_no_third_way(words: list[str]) -> str:
    """ "ran" or "refused"."""
    status, said, left = outcome(words)
    assert status in OUTCOMES, f"{' '.join(words)}: status {status}: {said}"
    if status == 2:
        lines = said.splitlines()
        assert len(lines) == 1 and lines[0].startswith("main.py: error: "), f"{' '.join(words)}: {said}"
        assert not left, f"{' '.join(words)}: refused, and something was left behind"
    return OUTCOMES[status]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.long) for first in (1, 2))])
def test_no_third_way_for_any_value(option, first):
    """A third of its values at a time."""
    for value in OPTIONS[option][first::3]:
        assert_no_third_way([f"--{option}={value}"])


@pytest.mark.long
def test_no_third_way():
    seen = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize="ADADAGRAD_EXAMPLES" not in os.environ, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.sampled_from(CONTEXTS), st.lists(WORDS, min_size=1, max_size=3))
    def check(context, words):
        seen[assert_no_third_way([*context.split(), *words])] += 1

    check()
    assert min(seen["ran"], seen["refused"]) > EXAMPLES / 6, seen


def test_what_it_is_made_of():
    """The words reach every option, some are taken and some refused, and a failure would be seen."""
    assert set(OPTIONS) == {entry.name for entry in fields(Config)}
    assert outcome([])[0] == 0 and outcome(["--learning_rate=1e30", "--optimizer=sgd"])[0] in (0, 3)
    assert outcome(["--eta=0"])[0] == 2
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="status 1"):
        patch.setattr(main.Trainer, "step", lambda trainer: 1 / 0)
        assert_no_third_way([])
