"""The library by itself: what it imports, and loops that are not this program's, in which it decides as main.py does on
the same samples.
"""

import contextlib
import copy
import json
import math
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import data
import models
import tests
from adadagrad import (
    BatchScaler,
    Clipping,
    Controller,
    Goodput,
    InnerProductTest,
    LearningRateScaling,
    Limits,
    Linear,
    NormTest,
    gradients,
    steady,
)
from adadagrad.control import Family
from adadagrad.order import SampleOrder
from batches.augment import Normalise
from checks.conftest import ROOT, column, forks, train
from checks.fake_gpu import DEVICE, fake_gpu
from checks.test_fake_gpu import unchecked
from checks.test_readme import BLOCKS
from options import command_line

STEPS, B0, SEED, RATE = 30, 16, 7, 0.05
ETA_OF_GROUPS = 0.6


def example(marker: str) -> str:
    """The one of README and docs/ that has this in it."""
    return next(block for block in BLOCKS if marker in block)


def test_the_decision_needs_no_torch_and_the_rest_torch_alone():
    """The first half in a Python without PyTorch, the second in one that has neither torchvision nor NumPy."""
    first = (
        "import sys; sys.modules['torch'] = None\n"
        "import adadagrad.tests, adadagrad.control\nfrom adadagrad import NormTest, Controller, Moments, steady\n"
        "print(Controller(16, NormTest(1.0)).update(Moments(16, 16, 1.0, 1000.0)).batch_size)\n"
    )
    second = (
        "import sys; sys.modules |= {'torchvision': None, 'numpy': None}\n"
        "import torch, adadagrad\nfrom adadagrad import *\n"
        "model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Dropout())\n"
        "x, y = torch.randn(8, 5), torch.arange(8) % 3\n"
        "for way in ('auto', 'vmap', 'loop'):\n"
        "    print(moments(model, torch.nn.functional.cross_entropy, x, y, test_gradients=way).batch_size)\n"
        "assert not any(name.startswith('lightning') for name in sys.modules)\n"
    )
    for program, said in ((first, "66"), (second, "8 8 8")):
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.split() == said.split(), done.stderr


# The digits, in the order in which a run sees them, and its decisions on them


def new_controller() -> Controller:
    return Controller(
        B0,
        NormTest(eta=1.0),
        limits=Limits(1437, max_growth=2.0),
        unbiased=True,
        smoothing=300,
        scaling=LearningRateScaling("adascale", B0),
    )


OPTIONS = [
    "--precision=64-true", "--training_type=iter", f"--max_iters={STEPS}", f"--seed={SEED}", "--model=logistic",
    "--optimizer=sgd", f"--learning_rate={RATE}", "--decay_lr=False", "--eta=1", "--statistics=unbiased",
    "--smoothing=300", "--lr_scaling=adascale", "--max_growth=2", "--max_micro_batch_size=256",
]  # fmt: skip


@pytest.fixture(scope="module")
def of_main(tmp_path_factory) -> list[tuple[float, float]]:
    """Batch size and learning rate of every step of main.py."""
    ours = train(tmp_path_factory.mktemp("main"), *OPTIONS)
    decisions = list(zip(column(ours, "batch_size"), column(ours, "lr")))
    assert len(decisions) == STEPS and decisions[-1][0] >= 3 * B0 and max(rate for _, rate in decisions) > 1.5 * RATE
    return decisions


class Samples:
    """The digits in the order in which a run with this seed sees them, normalised, in double precision."""

    def __init__(self):
        data_set = data.digits(Path())
        self.images, self.labels = data_set.train.tensors
        self.order = SampleOrder(len(self.images), SEED, True)
        self.normalise = Normalise(data_set, torch.device("cpu"), torch.float64)

    def __call__(self, positions: range) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = self.order.samples(positions)
        return self.normalise(self.images[chosen]), self.labels[chosen]


def seeded_model() -> torch.nn.Module:
    torch.manual_seed(SEED)
    return models.build("logistic", (1, 8, 8), 10)


def taken(model, scaler: BatchScaler, steps: int = STEPS, micro_batch_size: int = 4096) -> list[tuple[float, float]]:
    """Plain PyTorch: batch size and learning rate of every step; the optimizer says at which rate it really stepped."""
    samples, decisions, rates = Samples(), [], []
    hook = scaler.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    for _ in range(steps):
        decisions.append(scaler.batch_size)
        for x, y in zip(*(part.split(micro_batch_size) for part in samples(scaler.positions))):
            with scaler.observe(x, y):
                scaler.scale(cross_entropy(model(x), y)).backward()
        scaler.step()
    hook.remove()
    return list(zip(decisions, rates))


def new_scaler(model, **arguments) -> BatchScaler:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    return BatchScaler(model, cross_entropy, optimizer, controller=new_controller(), measure_interval=1, **arguments)


def same(decisions: list[tuple[float, float]], others: list[tuple[float, float]]) -> bool:
    return [b for b, _ in decisions] == [b for b, _ in others] and [rate for _, rate in decisions] == pytest.approx(
        [rate for _, rate in others], rel=1e-9
    )


@pytest.mark.parametrize("micro_batch_size", [4096, 7])
def test_a_plain_loop_decides_as_main_does(of_main, in_double, micro_batch_size):
    model = seeded_model()
    assert same(taken(model, new_scaler(model), micro_batch_size=micro_batch_size), of_main)


def test_a_loop_with_all_of_steady_ends_at_mains_weights(in_double, tmp_path):
    """The one of docs/library.md: averaged weights and clipping, a batch that grows."""
    own = ("--eta", "--statistics", "--smoothing", "--lr_scaling", "--max_growth")
    words = [word for word in OPTIONS if not word.startswith(own)]
    words += ["--recipe=steady", "--knee=3000", "--free_start=False", "--learning_rate=5", "--max_iters=60"]
    ours = train(tmp_path, *words)
    names: dict = {}
    exec(example("Clipping, WeightAverage"), names)
    model, controller = seeded_model(), steady(B0, 1437, family=Family.GRADIENT)
    controller.rule = replace(controller.rule, knee=3000)  # no clock in it
    scaler = BatchScaler(model, cross_entropy, torch.optim.SGD(model.parameters(), lr=5.0), controller=controller)
    average = names["train"](model, scaler, Samples(), samples := column(ours, "samples")[-1])
    assert scaler.samples == samples and scaler.batch_size > B0 and max(column(ours, "clipped")) > 0

    def is_saved_in(file: str) -> bool:
        saved = torch.load(ours.folder / file)
        return all(torch.allclose(own, saved[name], rtol=1e-7, atol=0) for name, own in model.named_parameters())

    assert is_saved_in("model.pt") and not is_saved_in("model_average.pt")
    with average.in_place():
        assert is_saved_in("model_average.pt")


def on_ranks(rank: int, port: int, queue) -> None:
    """What a rank of two decides, by the way in which they train together."""
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    on_cpu = partial(fully_shard, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    found, images_and_labels = {}, Samples()(range(1000))

    model = DistributedDataParallel(seeded_model())
    found["DDP"] = taken(model, new_scaler(model), micro_batch_size=13)

    names: dict = {"contextlib": contextlib, "torch": torch, "BatchScaler": BatchScaler, "gradients": gradients}
    names |= {"cross_entropy": cross_entropy, "fully_shard": on_cpu, "model": seeded_model()}
    exec(example("optimizer, max_batch_size"), names)  # of docs/library.md, as the next one
    exec(example("fully_shard(model)"), names | {"probe": Samples()(range(7))}, sharded := {})
    found["FSDP2, exact"] = taken(names["model"], new_scaler(names["model"], test_gradients=sharded["estimator"]))

    model = on_cpu(seeded_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scaler = BatchScaler(model, cross_entropy, optimizer, B0, 1437, NormTest(ETA_OF_GROUPS))
    found["FSDP2, by groups"] = taken(model, scaler, steps=12)

    model = DistributedDataParallel(seeded_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scaler = names["train"](model, optimizer, *images_and_labels, 2000, 8, batch_size=B0, test=NormTest(1.0))
    found["example"] = [scaler.samples, scaler.batch_size]

    model = DistributedDataParallel(seeded_model())
    scaler = BatchScaler(model, cross_entropy, torch.optim.SGD(model.parameters(), lr=RATE), B0)
    taken(model, scaler, steps=3)
    found["times"] = scaler.controller.step_time.state_dict()

    for arguments in ({"test": InnerProductTest(1.0)}, {"test_gradients": "vmap"}):
        model = on_cpu(seeded_model())
        scaler = BatchScaler(model, cross_entropy, torch.optim.SGD(model.parameters(), lr=RATE), B0, **arguments)
        with pytest.raises(ValueError, match="before fully_shard"):
            taken(model, scaler, steps=1)
    model = DistributedDataParallel(seeded_model())
    scaler = new_scaler(model)
    scaler.world_size = 1  # each rank brings a whole batch
    with pytest.raises(ValueError, match="32 samples, not the 16"):
        taken(model, scaler, steps=1)
    queue.put((rank, found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks() -> list[dict]:
    """What each of two processes has found."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    queue = forks().SimpleQueue()
    mp.start_processes(on_ranks, (port, queue), nprocs=2, start_method="forkserver")  # where one fails, it says so
    found = dict(queue.get() for _ in range(2))
    return [found[0], found[1]]


@pytest.mark.parametrize("way", ["DDP", "FSDP2, exact"])
def test_two_processes_decide_as_main_does(of_main, of_ranks, way):
    assert all(same(found[way], of_main) for found in of_ranks)


def test_groups_of_two_processes_decide_as_a_plain_loop_over_them(of_ranks, in_double):
    model, samples, b, start, sizes = seeded_model(), Samples(), B0, 0, []
    for _ in range(12):
        groups, (x, y), rank = [], samples(range(start, start + b)), torch.arange(start, start + b) % 2
        for own in (rank == 0, rank == 1):
            parts = torch.autograd.grad(cross_entropy(model(x[own]), y[own]), list(model.parameters()))
            groups.append((int(own.sum()), torch.cat([gradient.flatten() for gradient in parts])))
        mean = sum(m * gradient for m, gradient in groups) / b
        variance = float(
            sum(m * gradient.square().sum() for m, gradient in groups) - b * mean.square().sum()
        )  # / (2 − 1)
        with torch.no_grad():
            weights = torch.nn.utils.parameters_to_vector(model.parameters())
            torch.nn.utils.vector_to_parameters(weights - RATE * mean, model.parameters())
        sizes.append(b)
        needed = variance / (ETA_OF_GROUPS**2 * float(mean.square().sum()))
        start, b = start + b, min(max(b, math.ceil(needed)), 1437)
    assert sizes[0] < sizes[5] < 1437 and sizes[-1] > 3 * B0
    assert all(found["FSDP2, by groups"] == [(size, RATE) for size in sizes] for found in of_ranks)


def test_example_for_several_processes(of_ranks):
    assert of_ranks[0]["example"] == of_ranks[1]["example"]
    samples, batch_size = of_ranks[0]["example"]
    assert samples >= 2000 and batch_size > B0


def test_the_slowest_process_counts_for_all(of_ranks):
    assert of_ranks[0]["times"] == of_ranks[1]["times"]
    ((_, timed),) = of_ranks[0]["times"]["bins"]
    assert len(timed) == 2 and min(seconds for _, seconds in timed) > 0


# What there is beside the decisions


def test_defaults_are_those_of_the_program():
    """`steady` and the published rule, by the command lines that ask for them; the two are written down apart."""
    for words, test in (([], None), (["--eta=0.1"], NormTest(0.1))):
        config = command_line.parse([*words, "--batch_size=16", "--max_batch_size=500"])
        for optimizer, family in ((torch.optim.SGD, Family.GRADIENT), (torch.optim.Adagrad, Family.SUM)):
            ours = tests.controller(config, lambda samples: 1.0, optimizer is torch.optim.Adagrad, family)
            model = torch.nn.Linear(5, 3)
            scaler = BatchScaler(model, cross_entropy, optimizer(model.parameters()), 16, 500, test)
            for name in ("rule", "limits", "decided_by", "of_noise"):
                assert getattr(scaler.controller, name) == getattr(ours, name)
            assert scaler.controller.scaling.rule == ours.scaling.rule
            assert test or scaler.controller.scaling == ours.scaling
            assert scaler.measure_interval == (None if config.test_interval == "auto" else config.test_interval)


def small(**arguments):
    """A model, an optimizer of two groups, what makes a batch, and their BatchScaler."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters(), "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)

    def batch(positions):
        x = torch.randn(len(positions), 5, generator=torch.Generator().manual_seed(positions.start))
        return x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long()

    return model, optimizer, batch, BatchScaler(model, cross_entropy, optimizer, **arguments)


def steps(model, batch, scaler, number: int) -> list:
    updates = []
    for _ in range(number):
        x, y = batch(scaler.positions)
        with scaler.observe(x, y):
            scaler.scale(cross_entropy(model(x), y)).backward()
        updates.append(scaler.step())
    return updates


def test_a_checkpoint_goes_on_bit_for_bit():
    def new():
        controller = steady(16, 500)
        controller.rule = Goodput(knee=300)  # no clock in it
        return small(controller=controller, measure_interval=3)

    model, _, batch, scaler = new()
    whole = steps(model, batch, scaler, 50)
    first, optimizer, batch, scaler = new()
    steps(first, batch, scaler, 25)  # between two measurements
    saved = json.loads(json.dumps(scaler.state_dict()))
    weights, state = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())
    second, optimizer, batch, scaler = new()
    second.load_state_dict(weights)
    optimizer.load_state_dict(state)
    scaler.load_state_dict(saved)
    assert steps(second, batch, scaler, 25) == whole[25:]
    assert whole[-1].batch_size > whole[24].batch_size > 16 and whole[-1].lr_factor > 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters()))


def test_a_state_of_other_hardware_has_no_times_and_looks_go_on_counting():
    model, _, batch, scaler = small(batch_size=16, max_batch_size=500, measure_interval=1)
    steps(model, batch, scaler, 4)
    state = json.loads(json.dumps(scaler.state_dict()))
    assert state["hardware"] == ["cpu", 1] and state["estimator"]["measured"] == 4 and state["step_time"]["bins"]
    for hardware, times in (["cpu", 1], scaler.controller.step_time.bins), (["cpu", 2], {}):
        model, _, batch, other = small(batch_size=16, max_batch_size=500, measure_interval=1)
        other.load_state_dict(state | {"hardware": hardware})
        assert other.controller.step_time.bins == times and other.state_dict()["estimator"]["measured"] == 4
        steps(model, batch, other, 1)
        assert other.estimator.measured == 5


def test_groups_keep_their_proportions_and_a_scheduler_goes_on():
    controller = Controller(16, rule=Linear(16), scaling=LearningRateScaling("linear", 16))
    model, optimizer, batch, scaler = small(controller=controller)
    schedule, seen = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5), []
    optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append([g["lr"] for g in optimizer.param_groups]))
    for _ in range(4):
        steps(model, batch, scaler, 1)
        schedule.step()
    factors = [1, 2, 3 * 0.5, 4 * 0.5]
    assert seen == [pytest.approx([0.2 * factor, 0.05 * factor]) for factor in factors]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.0125])
    assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    assert scaler.estimator is None  # nobody asks for statistics


def test_clipping_and_a_gradient_scaler_change_no_statistics():
    model, _, batch, scaler = small(batch_size=16, test=NormTest(0.5))
    steps(model, batch, scaler, 1)
    plain = scaler.moments
    model, optimizer, batch, scaler = small(batch_size=16, test=NormTest(0.5))
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = batch(scaler.positions)
    with scaler.observe(x, y):
        grad_scaler.scale(scaler.scale(cross_entropy(model(x), y, reduction="none"))).backward()
    scaler.measure(grad_scaler)
    grad_scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    scaler.step(grad_scaler)
    moved = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert scaler.moments.sum_norm_sq == pytest.approx(plain.sum_norm_sq, rel=1e-5)
    assert scaler.moments.grad_norm_sq == pytest.approx(plain.grad_norm_sq, rel=1e-5)
    assert 0 < float(moved.norm()) <= 0.2e-3 * 1.001
    model, optimizer, batch, scaler = small(batch_size=16, test=NormTest(0.5))
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with scaler.observe(x, y):
        grad_scaler.scale(scaler.scale(cross_entropy(model(x), y, reduction="none"))).backward()
    scaler.step(grad_scaler, Clipping(1e-3))
    again = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert scaler.moments.sum_norm_sq == pytest.approx(plain.sum_norm_sq, rel=1e-5)
    assert torch.allclose(again, moved, rtol=1e-4, atol=1e-9)


def test_times_of_steps_are_those_between_measurements(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("adadagrad.scaler.time.perf_counter", lambda: clock[0])
    model, _, batch, scaler = small(batch_size=16, max_batch_size=500, measure_interval=8)
    for step in range(100):
        clock[0] += 100.0 if step == 0 else 0.5 + 0.125 * scaler.batch_size  # the first one is no measure
        steps(model, batch, scaler, 1)
        if step == 4:
            with scaler.pause():
                clock[0] += 1000.0
    timed = [pair for pairs in scaler.controller.step_time.bins.values() for pair in pairs]
    assert len(dict(timed)) > 1 and all(seconds == 0.5 + 0.125 * size for size, seconds in timed)
    assert scaler.controller.step_time.fit() == pytest.approx((0.5, 0.125))


def test_the_host_does_not_wait_in_a_plain_step():
    torch.manual_seed(0)
    with fake_gpu() as (_, watch), mock.patch("adadagrad.scaler.build", partial(unchecked, num_groups=8)):
        model = torch.nn.Linear(5, 3).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = BatchScaler(model, cross_entropy, optimizer, batch_size=4, max_batch_size=4, measure_interval=8)
        x, y = torch.randn(4, 5, device=DEVICE), torch.zeros(4, dtype=torch.long, device=DEVICE)
        waits = []
        for _ in range(9):
            watch.forget()
            with scaler.observe(x, y):
                scaler.scale(cross_entropy(model(x), y)).backward()
            scaler.step()
            waits.append((watch.waits + watch.trailing).total())
        assert waits[1:8] == [0] * 7 and waits[8] == 1, waits


def test_what_is_refused_says_what_to_do():
    model, optimizer, batch, scaler = small(batch_size=16)
    with pytest.raises(ValueError, match="with scaler.observe"):
        scaler.step()
    x, y = batch(range(10))
    with scaler.observe(x, y):
        scaler.scale(cross_entropy(model(x), y)).backward()
    with pytest.raises(ValueError, match="10 samples, not the 16"):
        scaler.step()
    with pytest.raises(ValueError, match="either batch_size"):
        BatchScaler(model, cross_entropy, optimizer)
    model, _, batch, scaler = small(batch_size=3, test_gradients="micro_batch")
    with pytest.warns(UserWarning, match="cut it into two or more"):
        steps(model, batch, scaler, 1)


def test_an_optimizer_that_is_not_known_is_named():
    model = torch.nn.Linear(5, 3)
    with pytest.warns(UserWarning, match="Adadelta is not a known optimizer"):
        BatchScaler(model, cross_entropy, torch.optim.Adadelta(model.parameters()), batch_size=16)


def test_a_compiled_model_gets_a_pass_of_its_own():
    """The estimator's rules see what a module does only where it is not compiled. (Nothing is compiled here.)"""
    for compile in (torch.compile, lambda model: model.compile(backend="eager") or model):
        plain, _, batch, of_plain = small(batch_size=16, test=NormTest(0.5))
        model = compile(copy.deepcopy(plain))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = BatchScaler(model, cross_entropy, optimizer, 16, test=NormTest(0.5))
        x, y = batch(scaler.positions)
        with torch.compiler.set_stance("force_eager"):
            steps(model, batch, scaler, 1)
        steps(plain, batch, of_plain, 1)
        assert of_plain.estimator.in_training_pass and not scaler.estimator.in_training_pass
        assert scaler.moments.sum_norm_sq == pytest.approx(of_plain.moments.sum_norm_sq, rel=1e-5)
