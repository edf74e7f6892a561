"""On a GPU: what the rest of the suite can only imitate.

Without one, what does not ask CUDA itself runs on the CPU: so that a first run on a card does not fail of its age.
"""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import main
from adadagrad import gradients
from benchmarks.cases import resnet18_group_norm
from checks.conftest import launch, process_of_rank
from checks.test_gradients import assert_matches
from checks.test_survival import ENDLESS, begin, processes_of, wait_for_rows
from launch import processes
from launch.signals import Interrupts
from options.schema import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACCELERATOR = "--accelerator=cuda"
needs_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
OPTIMIZERS = ("adagrad", "adagradnorm", "adam", "adamw", "sgd", "sgdm")


def trainer(out_dir: Path, **options) -> main.Trainer:
    defaults = {"accelerator": DEVICE, "devices": 1, "out_dir": out_dir, "run_name": "run", "max_batch_size": 64}
    config = Config(**{**defaults, "max_micro_batch_size": 64, **options})
    processes.set_up_devices(config)
    return main.Trainer(processes.start_fabric(config), config, Interrupts())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_steps(tmp_path, optimizer):
    run = trainer(tmp_path, optimizer=optimizer)
    before = next(run.parts.module.parameters()).clone()
    run.step()
    assert not torch.equal(before, next(run.parts.module.parameters()))


@needs_a_gpu
def test_memory_grows_without_gaps(tmp_path):
    trainer(tmp_path)
    assert {segment["is_expandable"] for segment in torch.cuda.memory_snapshot()} == {True}


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_half_precision_with_clipping(tmp_path, precision):
    run = trainer(tmp_path, precision=precision, grad_clip=1.0)
    for _ in range(30):
        run.log_step(run.step(), {})
    run.reporter.write()
    assert not run.reporter.diverged and all(parameter.isfinite().all() for parameter in run.parts.module.parameters())


@pytest.mark.long
def test_ghost_equals_vmap_in_double_precision():
    torch.manual_seed(0)
    model = resnet18_group_norm((3, 32, 32), 10).double().to(DEVICE)
    inputs, targets = torch.randn(6, 3, 32, 32).double().to(DEVICE), torch.randint(10, (6,)).to(DEVICE)
    ghost, vmap = (
        gradients.moments(model, cross_entropy, inputs, targets, test_gradients=n) for n in ("ghost", "vmap")
    )
    names = ("grad_norm_sq", "sum_norm_sq", "sum_inner_sq")
    assert_matches(ghost, {name: getattr(vmap, name) for name in names}, rel=1e-9)


@needs_a_gpu
@pytest.mark.parametrize("test_type, most", [("norm", 1.15), ("ip+orth", 1.3)])
def test_memory_of_a_tested_step(tmp_path, test_type, most):
    """ResNet-18 GroupNorm, 4 micro-batches of 32."""
    options = {"model": "benchmarks.cases:resnet18_group_norm", "dataset": "benchmarks.cases:random_cifar"}
    options |= {"batch_size": 128, "max_batch_size": 129, "max_micro_batch_size": 32, "test_type": test_type}
    run, peaks = trainer(tmp_path, **options), {}
    for measured in (False, False, True):
        torch.cuda.reset_peak_memory_stats()
        run.train_step(run.parts.plan(run.controller, measured), measured)
        peaks[measured] = torch.cuda.max_memory_allocated()
    assert peaks[True] <= most * peaks[False]


@needs_a_gpu
def test_a_plain_step_waits_for_nothing(tmp_path):
    run = trainer(tmp_path, test=False)
    run.log_step(run.step(), {})
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Exhausts(torch.nn.Linear):
    """On rank 1, in some pass of the training, the memory does not suffice."""

    passes = 0

    def forward(self, x):
        self.passes += self.training
        if self.passes > 12 and os.environ.get("LOCAL_RANK") == "1":
            torch.empty(2**46, device=x.device)
        return super().forward(x.flatten(1))


def exhausts(image_shape, num_classes) -> torch.nn.Module:
    return Exhausts(64, num_classes)


@needs_two
def test_a_rank_that_dies_ends_the_run(tmp_path):
    process = begin("python", 0, *ENDLESS, ACCELERATOR, f"--out_dir={tmp_path}")
    wait_for_rows(tmp_path / "run", 3)
    os.kill(process_of_rank(1, tmp_path), signal.SIGKILL)
    told, _ = process.communicate(timeout=90)
    assert process.returncode == 1 and "rank 1" in told and not processes_of(tmp_path)


@needs_two
def test_a_rank_without_memory_ends_the_run(tmp_path):
    model = "--model=checks.test_cuda:exhausts"
    told, _ = (process := begin("python", 0, *ENDLESS, ACCELERATOR, model, f"--out_dir={tmp_path}")).communicate(
        timeout=150
    )
    assert process.returncode == 1 and "Traceback" not in told and not processes_of(tmp_path)
    assert re.search(r"error: rank 1 on \S+: out of memory on the device in a micro-batch: lower", told), told


@needs_a_gpu
def test_a_continuation_is_the_same_bit_for_bit(tmp_path):
    command = [sys.executable, "main.py", "--accelerator=cuda", "--devices=1", "--deterministic=True", "--model=cnn"]
    command += [f"--out_dir={tmp_path}", "--max_micro_batch_size=64", "--lr_decay_samples=3000", "--test_type=ip+orth"]
    for name, samples in (("whole", 2000), ("run", 900), ("run", 2000)):
        done = launch(*command, f"--run_name={name}", f"--max_samples={samples}", "--resume=auto")
        assert done.returncode == 0, done.stderr
    weights = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "run")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
