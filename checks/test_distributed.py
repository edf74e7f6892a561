"""The pooled numbers do not depend on how a batch is cut into ranks and micro-batches."""

import contextlib

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from torch.nn.functional import cross_entropy

import batches
from adadagrad import gradients
from checks import oracle
from checks.conftest import column, forks, train
from checks.test_gradients import assert_matches, batch, small_net
from checks.test_tests import moments_of

SAMPLES = 23


def observe(rank: int, world_size: int, steps: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    inputs, targets = batch(SAMPLES)
    estimator = gradients.PerSampleGradients(small_net(), cross_entropy, True, 5)
    for positions in batches.cut(0, SAMPLES, world_size, 100, steps).micro_batches(rank):
        with estimator.observe(inputs[list(positions)], targets[list(positions)]):
            pass
    queue.put(estimator.moments())
    if world_size > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
def test_moments_of_any_split_equal_the_oracle(world_size, steps, free_port):
    inputs, targets = batch(SAMPLES)
    expected = oracle.statistics(oracle.gradient_vectors(small_net(), cross_entropy, inputs, targets))
    context = forks()
    queue = context.Queue()
    ranks = [context.Process(target=observe, args=(r, world_size, steps, free_port, queue)) for r in range(world_size)]
    for process in ranks:
        process.start()
    for moments in [queue.get(timeout=120) for _ in ranks]:
        assert_matches(moments, expected, rel=1e-9)
        assert moments.variance == pytest.approx(
            moments.variance_orthogonality + moments.variance_inner_product / moments.grad_norm_sq, rel=1e-9
        )
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0


@pytest.mark.parametrize(
    "test_type, thresholds",
    [("norm", ["--eta=0.8"]), ("ip+orth", ["--theta=0.15", "--nu=0.8"])],
)
def test_runs_do_not_depend_on_the_split(tmp_path, test_type, thresholds):
    """One process, two processes and three accumulation steps: the same batch sizes, losses equal to rounding."""
    options = ["--precision=64-true", "--training_type=iter", "--max_iters=25", "--lr_decay_type=iter", "--seed=1"]
    options += ["--learning_rate=0.003", f"--test_type={test_type}", *thresholds]
    one = train(tmp_path, *options, name="one")
    two = train(tmp_path, *options, processes=2, name="two")
    three = train(tmp_path, *options, "--gradient_accumulation_steps=3", "--max_test_micro_batch_size=7", name="three")
    sizes = column(one, "batch_size")
    assert len(sizes) == 25 and sizes[-1] > 4 * sizes[0]
    for other in (two, three):
        assert column(other, "batch_size") == sizes
        assert column(other, "train_loss") == pytest.approx(column(one, "train_loss"), rel=1e-9)
        assert column(other, "val_loss") == pytest.approx(column(one, "val_loss"), rel=1e-9)
    assert max(column(three, "gradient_accumulation_steps")) == 3


def observe_training_pass(rank: int, world_size: int, steps: int, port: int, queue) -> None:
    """ghost and micro_batch inside a DDP training step, uneven splits, a scaled loss."""
    torch.set_num_threads(1)
    if world_size > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    inputs, targets = batch(SAMPLES)
    answers = {}
    for name in ("ghost", "micro_batch"):
        module = small_net()
        model = torch.nn.parallel.DistributedDataParallel(module) if world_size > 1 else module
        probe = (inputs[:3], targets[:3])
        estimator, _ = gradients.build(name, module, cross_entropy, True, 5, probe, in_training_pass=True)
        micro_batches = batches.cut(0, SAMPLES, world_size, 100, steps).micro_batches(rank)
        scale = 16.0 * world_size / SAMPLES  # 16: a gradient scaler's factor
        for i, positions in enumerate(micro_batches, start=1):
            x, y = inputs[list(positions)], targets[list(positions)]
            last = i == len(micro_batches) or world_size == 1
            with contextlib.nullcontext() if last else model.no_sync(), estimator.observe(x, y, scale / 16.0):
                (scale * cross_entropy(model(x), y, reduction="sum")).backward()
        answers[name] = estimator.moments(grad_scale=16.0)
    queue.put(answers)
    if world_size > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size, steps", [(1, 3), (2, 1), (2, 3)])
def test_training_pass_moments_of_any_split(world_size, steps, free_port):
    inputs, targets = batch(SAMPLES)
    vectors = oracle.gradient_vectors(small_net(), cross_entropy, inputs, targets)
    plan = batches.cut(0, SAMPLES, world_size, 100, steps)
    groups = [list(positions) for rank in range(world_size) for positions in plan.micro_batches(rank)]
    sizes = [len(group) for group in groups]
    by_groups = moments_of(torch.stack([vectors[group].mean(0) for group in groups]), sizes)
    context = forks()
    queue = context.Queue()
    arguments = (world_size, steps, free_port, queue)
    ranks = [context.Process(target=observe_training_pass, args=(r, *arguments)) for r in range(world_size)]
    for process in ranks:
        process.start()
    for answers in [queue.get(timeout=120) for _ in ranks]:
        assert_matches(answers["ghost"], oracle.statistics(vectors), rel=1e-9)
        names = ("batch_size", "num_groups", "grad_norm_sq", "sum_norm_sq", "sum_inner_sq", "sum_inner")
        assert_matches(answers["micro_batch"], {name: getattr(by_groups, name) for name in names}, rel=1e-9)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0


def test_the_measured_size_leaves_no_trace(tmp_path):
    """auto against the size that it has found, float64: the same batch sizes, losses equal to rounding; a continuation
    keeps it. (With another one it would be another network: BatchNorm, dropout.)"""
    options = ["--precision=64-true", "--eta=0.8", "--learning_rate=0.003", "--lr_decay_samples=3000", "--seed=1"]
    options += ["--model=checks.fault_drill:Net", "--test_gradients=vmap"]  # dropout, running statistics
    train(tmp_path, *options, "--max_samples=700", "--max_micro_batch_size=auto", name="auto")
    auto = train(tmp_path, *options, "--max_samples=1500", "--max_micro_batch_size=auto", "--resume=auto", name="auto")
    assert "max_micro_batch_size=auto" not in auto.stdout
    recorded = yaml.safe_load((auto.folder / "config.yaml").read_text())
    assert type(recorded["max_micro_batch_size"]) is int
    assert auto.summary["measured_options"] == ["max_micro_batch_size"]
    size = f"--max_micro_batch_size={recorded['max_micro_batch_size']}"
    fixed = train(tmp_path, *options, "--max_samples=1500", size, name="fixed")
    assert column(auto, "val_loss")[-1] == pytest.approx(column(fixed, "val_loss")[-1], rel=1e-9)
    assert column(auto, "batch_size") == column(fixed, "batch_size") and column(fixed, "batch_size")[-1] > 16
    assert column(auto, "train_loss") == pytest.approx(column(fixed, "train_loss"), rel=1e-9)


class OtherOnOneRank(torch.nn.Module):
    """On rank 1 a batch gives each sample what is another one's: there `ghost` is wrong."""

    def __init__(self, rank: int):
        super().__init__()
        torch.manual_seed(0)
        self.rank, self.layer = rank, torch.nn.Linear(6, 3)

    def forward(self, x):
        x = self.layer(x)
        return x.prelu(x.new_ones(3)) if self.rank == 0 or len(x) == 1 else x.flip(0) * 1.5


def take_an_estimator(rank: int, world_size: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).double()
    targets = torch.arange(5) % 3
    model = OtherOnOneRank(rank).double()
    answers = []
    for name in ("auto", "ghost"):
        try:
            estimator, told = gradients.build(name, model, cross_entropy, True, 5, (inputs, targets))
            answers.append(f"{type(estimator).__name__}: {told}")
        except ValueError as error:
            answers.append(str(error))
    queue.put((rank, answers))
    torch.distributed.destroy_process_group()


def test_all_ranks_take_the_same_estimator(free_port):
    """What one rank's check refuses is refused on all, with words there, too."""
    context = forks()
    queue = context.Queue()
    mp.start_processes(take_an_estimator, (2, free_port, queue), nprocs=2, start_method="forkserver")
    (_, ours), (_, theirs) = sorted(queue.get(timeout=60) for _ in range(2))
    assert ours[0].startswith("PerSampleGradients") and "it fails on another process" in ours[0]
    assert theirs[0].startswith("PerSampleGradients") and "off those of single samples" in theirs[0]
    assert all("choose test_gradients=auto or loop" in answers[1] for answers in (ours, theirs))
