"""Sharded models: two processes that share out parameters, gradients and optimizer states decide as others do."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn

from checks.conftest import Started, column, run, train
from checks.fault_drill import differences, rows_written
from checks.test_text import write_tokens
from launch.fsdp import blocks, refuse_what_needs_whole_tensors
from options.errors import UsageError

STEPS = ["--training_type=iter", "--precision=64-true", "--batch_size=5", "--max_batch_size=61", "--log_interval=1"]
TESTS = {
    "norm": ["--test_type=norm", "--eta=0.4"],
    "ip+orth": ["--test_type=ip+orth", "--theta=0.3", "--nu=0.3"],
    "worker": ["--test_type=norm", "--eta=0.4", "--test_gradients=worker", "--max_micro_batch_size=31"],
}

IN_PARTS = [*STEPS, *TESTS["norm"], "--checkpoint_interval=4", "--keep_checkpoints=9", "--decay_lr=False"]


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels)

    def forward(self, x):
        return x + torch.relu(self.norm(self.convolution(x)))


def residual_net(image_shape, num_classes) -> nn.Module:
    """A GroupNorm ResNet in small; its bias of five numbers leaves a rank next to nothing."""
    channels, *_ = image_shape
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5), nn.Tanh(), nn.Linear(5, num_classes))
    return nn.Sequential(nn.Conv2d(channels, 6, 3), Residual(6), Residual(6), head)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text of 60 symbols in which the next one mostly follows from the last."""
    folder = tmp_path_factory.mktemp("words")
    rng = np.random.default_rng(0)
    train_tokens, val_tokens = ((np.cumsum(rng.integers(0, 3, n)) % 60).tolist() for n in (6000, 330))
    write_tokens(folder, train_tokens, val_tokens, vocab_size=60)
    return folder


def options_of(model: str, words) -> list[str]:
    if model == "gpt":
        gpt = [f"--model_args.{name}" for name in ("layers=2", "heads=2", "width=8", "tied=True")]
        return ["--model=gpt", "--dataset=tokens", f"--data_dir={words}", "--dataset_args.sequence_length=8", *gpt]
    return ["--model=checks.test_fsdp:residual_net"]


@pytest.mark.parametrize(
    "model, test_type", [("gpt", name) for name in TESTS] + [("resnet", name) for name in ("ip+orth", "worker")]
)
def test_as_ddp(tmp_path, words, model, test_type):
    """The same batch sizes over 12 steps, losses and weights equal to rounding, in pieces and whole."""
    options = [*options_of(model, words), *STEPS, "--max_iters=12", "--max_micro_batch_size=16", *TESTS[test_type]]
    options += ["--grad_clip=1.0", "--eval_interval=6", "--monitor_interval=1", "--weight_average=0.1"]
    ddp, fsdp = (
        train(tmp_path, *options, f"--strategy={name}", processes=2, name=name) for name in ("ddp", "fsdp")
    )  # fmt: skip
    assert column(fsdp, "batch_size") == column(ddp, "batch_size") and column(ddp, "batch_size")[-1] > 32
    assert len(column(ddp, "variance")) == 12
    for name in ("train_loss", "val_loss", "variance", "grad_norm_sq", "variance_inner_product"):
        if column(ddp, name):
            assert column(fsdp, name) == pytest.approx(column(ddp, name), rel=1e-9), name
    for file in ("model.pt", "model_average.pt"):
        one, other = (torch.load(run.folder / file, weights_only=True) for run in (ddp, fsdp))
        assert list(one) == list(other)
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_state_follows_on_shards(tmp_path, words, optimizer):
    """As under ddp, to rounding, through changes of the batch size; and a run goes on bit for bit."""
    options = [*options_of("gpt", words), *STEPS, f"--optimizer={optimizer}", "--beta2=0.999", "--weight_decay=0.1"]
    options += ["--test=False", "--stagewise_ramp_up=True", "--global_batch_sizes=[5,20,60]"]
    options += ["--samples_stages=[20,80,900]", "--lr_scaling=critical", "--coupling=full", "--monitor_interval=1"]
    options += ["--max_micro_batch_size=31", "--checkpoint_interval=6", "--keep_checkpoints=9"]
    ddp, fsdp = (
        train(tmp_path, *options, "--max_iters=12", f"--strategy={name}", processes=2, name=name)
        for name in ("ddp", "fsdp")
    )
    sizes = column(fsdp, "batch_size")
    assert sizes == column(ddp, "batch_size") and {5, 20, 60} == set(sizes)
    assert column(fsdp, "lr_factor")[-1] > 1
    one, other = (torch.load(run.folder / "model.pt", weights_only=True) for run in (ddp, fsdp))
    rounding = {"rtol": 1e-7, "atol": 1e-10} if optimizer == "adamw" else {"rtol": 0.0, "atol": 5e-4}  # in bfloat16
    for name in one:
        torch.testing.assert_close(other[name], one[name], **rounding)
    checkpoint = fsdp.folder / "checkpoints" / "step-00000006.pt"
    again = train(tmp_path, *options, "--max_iters=12", "--strategy=fsdp", f"--resume={checkpoint}", processes=2,
                  name="again")  # fmt: skip
    resumed = torch.load(again.folder / "model.pt", weights_only=True)
    assert all(torch.equal(resumed[name], other[name]) for name in other)


def test_the_measured_size_leaves_no_trace(tmp_path, words):
    """Gradients of passes before the first step do not come into it."""
    options = [*options_of("gpt", words), *STEPS, "--max_iters=3", "--strategy=fsdp", *TESTS["norm"]]
    fixed, auto = (
        train(tmp_path, *options, f"--max_micro_batch_size={size}", processes=2, name=size) for size in ("16", "auto")
    )
    for name in ("train_loss", "variance", "grad_norm_sq"):
        assert column(auto, name) == pytest.approx(column(fixed, name), rel=1e-9), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory, words):
    """The run of one process that is never interrupted."""
    options = [*options_of("gpt", words), *IN_PARTS, "--weight_average=0.2", "--max_iters=12"]
    return train(tmp_path_factory.mktemp("whole"), *options)


@pytest.mark.parametrize("path", [("fsdp", 2, "auto", 1), ("auto", 1, "fsdp", 2)], ids=str)
def test_a_checkpoint_does_not_know_the_strategy(tmp_path, words, whole, path):
    """Saved by one, resumed by another, on another number of processes: the run of one process goes on."""
    strategy, processes, then, processes_then = path
    options = [*options_of("gpt", words), *IN_PARTS, "--weight_average=0.2"]
    train(tmp_path, *options, f"--strategy={strategy}", "--max_iters=8", processes=processes)
    options += [f"--strategy={then}", "--max_iters=12", "--resume=auto"]
    parts = train(tmp_path, *options, processes=processes_then)
    assert column(parts, "batch_size") == column(whole, "batch_size")
    assert column(parts, "train_loss") == pytest.approx(column(whole, "train_loss"), rel=1e-9)
    ours, theirs = (torch.load(run.folder / "model_average.pt", weights_only=True) for run in (parts, whole))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-7, atol=1e-10)


@pytest.mark.long
def test_schedule_free_goes_on(tmp_path, words):
    """It has looked at its state before there is one."""
    pytest.importorskip("schedulefree")
    options = [*options_of("gpt", words), *IN_PARTS, "--strategy=fsdp", "--optimizer=schedulefree:AdamWScheduleFree"]
    options += ["--decay_lr=False", "--max_iters=12"]
    train(tmp_path, *options, name="whole", processes=2)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000008.pt"
    train(tmp_path, *options, f"--resume={checkpoint}", name="again", processes=2)
    ours, theirs = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "again"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_blocks_are_the_outermost_that_a_model_repeats():
    net = residual_net((1, 8, 8), 10)
    assert blocks(net) == [net[1], net[2]]
    assert blocks(net, ["Linear"]) == [net[3][2], net[3][4]]


def test_what_needs_whole_tensors_is_refused():
    net, normalised = residual_net((1, 8, 8), 10), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    refuse_what_needs_whole_tensors(net, compiled=False)
    for arguments in [(normalised, False), (net, True)]:
        with pytest.raises(UsageError, match="--strategy=fsdp: "):
            refuse_what_needs_whole_tensors(*arguments)
    with pytest.raises(UsageError, match="--shard_modules: the model has no Bloc: it has .*Residual"):
        blocks(net, ["Bloc"])


@pytest.mark.parametrize(
    "options, said",
    [
        (["--test_gradients=worker", "--test_type=ip"], "need whole tensors here"),
        (["--max_micro_batch_size=1"], "--max_micro_batch_size=1: shards need as many"),
        (["--optimizer=optim:AdaGradNorm", "--test=False"], "--optimizer=optim:AdaGradNorm needs the whole gradient's"),
    ],
)
def test_refusals_of_two_processes(tmp_path, options, said):
    done = run("--strategy=fsdp", f"--out_dir={tmp_path}", *options, processes=2)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("main.py: error:") == 1, done.stderr
    assert not any(tmp_path.iterdir())


def test_a_kill_changes_nothing(tmp_path, words):
    """Both processes at once, in the middle; what goes on from the last checkpoint equals the undisturbed run."""
    options = [*options_of("gpt", words), *STEPS, *TESTS["norm"], "--max_iters=20", "--checkpoint_interval=3"]
    options += ["--strategy=fsdp", "--model_args.dropout=0.1", "--max_micro_batch_size=16", "--resume=auto"]
    options += ["--weight_average=0.3"]
    whole = train(tmp_path, *options, processes=2, name="whole")
    folder = tmp_path / "killed"
    first = Started(f"--out_dir={tmp_path}", "--run_name=killed", *options, processes=2)
    while rows_written(folder) < 8 and first.ranks[0].is_alive():
        time.sleep(0.01)
    for process in first.ranks:
        process.kill()
    assert first.wait().returncode == -signal.SIGKILL and list((folder / "checkpoints").glob("*.pt"))
    train(tmp_path, *options, processes=2, name="killed")
    assert not differences(whole.folder, folder)


def test_a_signal_cuts_an_evaluation_off(tmp_path):
    """In the middle of forward passes only: the checkpoint is whole."""
    write_tokens(tmp_path, [i % 60 for i in range(2000)], [i % 60 for i in range(60_000)], vocab_size=60)
    options = [*options_of("gpt", tmp_path), "--model_args.layers=6", "--max_iters=3", "--training_type=iter"]
    options += ["--batch_size=4", "--max_micro_batch_size=2", "--log_interval=1", "--run_name=run"]
    options += [f"--out_dir={tmp_path}"]
    program = Started("--strategy=fsdp", *options, processes=2)
    while rows_written(tmp_path / "run") < 2 and program.ranks[0].is_alive():
        time.sleep(0.01)
    time.sleep(2)
    os.kill(program.ranks[0].pid, signal.SIGTERM)
    done = program.wait()
    assert done.returncode == 75 and "interrupted by SIGTERM" in done.stdout and "val loss" not in done.stdout, done
    assert list((tmp_path / "run" / "checkpoints").glob("*.pt"))
