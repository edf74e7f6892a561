"""examples/reference.py, the algorithm in a hundred lines: the batch sizes of main.py on the same samples."""

import ast
import csv
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import data
import main
import models
from adadagrad.order import SampleOrder
from batches.augment import Normalise
from checks.conftest import FIXED_CUT, ROOT
from examples import reference

SEED, MAX_SAMPLES = 3, 4000


def order(n: int) -> Iterator[int]:
    """The samples of a run with this seed, one after the other."""
    samples = SampleOrder(n, SEED, shuffle=True)
    for start in count(0, n):
        yield from samples.samples(range(start, start + n)).tolist()


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sizes_of_main(out_dir: Path, *words: str) -> list[int]:
    words = (*words, "--test_type=norm", "--precision=64-true", "--decay_lr=False", FIXED_CUT, f"--seed={SEED}")
    words += (f"--max_samples={MAX_SAMPLES}", "--accelerator=cpu", "--devices=1", f"--out_dir={out_dir}")
    assert main.main([*words, "--run_name=run"]) == 0
    with open(out_dir / "run" / "metrics.csv", newline="") as file:
        return [int(row["batch_size"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("model, optimizer, rate, eta", [("logistic", "sgd", 0.05, 1.0), ("cnn", "adagrad", 0.01, 0.5)])
def test_batch_sizes_are_those_of_main(tmp_path, double_precision, model, optimizer, rate, eta):
    expected = sizes_of_main(
        tmp_path, f"--model={model}", f"--optimizer={optimizer}", f"--learning_rate={rate}", f"--eta={eta}"
    )
    digits = data.digits(tmp_path)
    images, labels = digits.train.tensors
    inputs = Normalise(digits, torch.device("cpu"), torch.float64)(images)
    torch.manual_seed(SEED)
    network = models.build(model, (1, 8, 8), 10)
    kind = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[optimizer]
    sizes = reference.train(
        network, cross_entropy, kind(network.parameters(), lr=rate), (inputs, labels), order(len(labels)), 16, eta,
        MAX_SAMPLES,
    )  # fmt: skip
    assert sizes == expected
    assert len(set(sizes)) >= 4  # it grew, in steps


def test_it_stands_by_itself():
    source = (ROOT / "examples" / "reference.py").read_text()
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported - sys.stdlib_module_names == {"torch", "sklearn"}
    assert len(source.splitlines()) <= 100
