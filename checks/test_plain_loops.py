"""Loops of plain PyTorch: with windows of their own and compiled they decide as main.py does on the same samples; the
noise scale where nothing is watched; batches whose size the world decides.
"""

import contextlib
import itertools
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from adadagrad import BatchScaler, Constant, Controller, Limits, Moments, NoiseScale, NormTest
from adadagrad.control import CRITICAL
from checks.test_library import RATE, example, same, seeded_model, taken
from checks.trainers import PIECE, STEPS, controller, decisions_of_main, digits, same_on_both, two_processes, weights

pytestmark = pytest.mark.xdist_group("plain_loops")  # what the fixtures have found serves several tests


@pytest.fixture(scope="module")
def of_main() -> list[tuple[float, float]]:
    return decisions_of_main()


def in_plain(rank: int, folder: Path) -> dict:
    found, names = {}, {"contextlib": contextlib, "torch": torch, "default_hooks": default_hooks, "loss": cross_entropy}
    names |= {"NoiseScale": NoiseScale}
    exec(example("def train_step("), names)
    model = DistributedDataParallel(seeded_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scaler = BatchScaler(model, cross_entropy, optimizer, controller=controller(), measure_interval=1)
    positions, rates = itertools.count(0, PIECE), []
    optimizer.register_step_pre_hook(lambda own, *_: rates.append((scaler.batch_size, own.param_groups[0]["lr"])))

    def next_micro_batch():
        first = next(positions)
        return tuple(rows[rank * PIECE // 2 :][: PIECE // 2] for rows in digits()(range(first, first + PIECE)))

    for _ in range(STEPS):
        names["train_step"](model, scaler, cross_entropy, next_micro_batch, PIECE // 2)
    found["decisions"], found["weights"] = rates, weights(model)

    model = seeded_model()
    names |= {"model": DistributedDataParallel(model)}
    names["inputs"], names["targets"] = next_micro_batch()
    exec(example("register_comm_hook"), names)
    found["noise"] = vars(names["noise"])
    own = torch.autograd.grad(cross_entropy(model(names["inputs"]), names["targets"]), list(model.parameters()))
    found["gradient"] = torch.cat([gradient.flatten() for gradient in own])

    sharded = fully_shard(seeded_model(), mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    of_all = {}
    for name, own_model in (("whole", seeded_model()), ("sharded", sharded)):
        optimizer = torch.optim.Adam(own_model.parameters(), lr=1e-5, betas=(0.9, 0.95))
        for step in range(20):
            x, y = digits()(range(8 * step, 8 * step + 8))
            cross_entropy(own_model(x), y).backward()  # on both ranks the same
            optimizer.step()
            optimizer.zero_grad()
        of_all[name] = vars(NoiseScale.from_adam(optimizer, 8))
    found["adam"] = of_all
    return found


@pytest.fixture(scope="module")
def of_plain(tmp_path_factory) -> list[dict]:
    return two_processes(in_plain, tmp_path_factory.mktemp("plain"))


def test_a_loop_with_windows_of_its_own_decides_as_main_does(of_main, of_plain):
    assert all(same(found["decisions"], of_main) for found in of_plain)
    same_on_both(of_plain, "weights")


def test_noise_scale_from_the_gradients_of_two_processes(of_plain):
    same_on_both(of_plain, "noise")
    own = torch.stack([found["gradient"] for found in of_plain])
    found, mean = NoiseScale(**of_plain[0]["noise"]), own.mean(0)
    expected = Moments(8, 2, float(mean.square().sum()), float(4 * own.square().sum()))
    assert found.variance == pytest.approx(expected.variance, rel=1e-9)
    assert found.value == pytest.approx(expected.statistics(unbiased=True).noise_scale, rel=1e-9)
    assert found.moments.grad_norm_sq == pytest.approx(expected.grad_norm_sq, rel=1e-9)
    assert found.moments.sum_norm_sq == pytest.approx(expected.sum_norm_sq, rel=1e-9)
    assert (found.moments.batch_size, found.moments.num_groups) == (8, 2)


def test_noise_scale_from_adam_on_shards(of_plain):
    for found in of_plain:
        assert found["adam"]["sharded"] == pytest.approx(found["adam"]["whole"], rel=1e-9)


def of_adam(steps: int, signal: float, beta2: float = 0.95, batch_size: int = 4):
    """`from_adam` after so many steps on gradients G + noise: ‖G‖² is `signal`, V is 4000, the steps are none."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (1000, 3000)]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, beta2))
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = (signal / 4000) ** 0.5 + torch.randn(len(parameter)) / batch_size**0.5
        optimizer.step()
    return NoiseScale.from_adam(optimizer, batch_size)


@pytest.mark.parametrize("steps", [20, 60, 300])
def test_noise_scale_from_adam(steps):
    found = of_adam(steps, signal=200.0)
    assert found.variance == pytest.approx(4000, rel=0.05) and found.grad_norm_sq == pytest.approx(200, rel=0.05)
    assert found.value == pytest.approx(20, rel=0.07)
    assert found.moments.statistics(unbiased=True).noise_scale == pytest.approx(found.value, rel=1e-9)


def test_noise_scale_from_adam_is_none_where_it_cannot_be_known():
    assert of_adam(18, signal=200.0) is None  # younger than v's window, 20 steps
    assert of_adam(100, signal=200.0, beta2=0.999) is None
    assert of_adam(60, signal=2000.0) is None  # V/b = 1000: the noise scale, 2, is below the batch size
    optimizer = torch.optim.Adam([parameter := torch.nn.Parameter(torch.zeros(3))], betas=(0.9, 0.95))
    assert NoiseScale.from_adam(optimizer, 4) is None
    for step in range(40):  # gradients that turn round at every step: the estimate of ‖G‖² is negative
        parameter.grad = torch.ones(3) * (-1) ** step
        optimizer.step()
    assert NoiseScale.from_adam(optimizer, 4) is None
    assert NoiseScale.from_adam(torch.optim.SGD([parameter]), 4) is None


def test_micro_batches_must_be_two():
    with pytest.raises(ValueError, match="two or more"):
        NoiseScale.from_micro_batches(1.0, 4, 1.0, 4)


def test_after_a_step_that_was_not_watched():
    names = {"NoiseScale": NoiseScale}
    exec(example("def after_step("), names)
    controller = Controller(8, NormTest(0.5), limits=Limits(64, multiple=8), unbiased=True)
    optimizer, numbers = types.SimpleNamespace(param_groups=[], state={}), []
    for noise in (None, NoiseScale(400.0, 40.0, 8, 8)):  # V/(η²‖G‖²) = 40
        with mock.patch.object(NoiseScale, "from_adam", lambda *_, noise=noise: noise):
            numbers.append([names["after_step"](controller, optimizer, 8) for _ in range(16)])
    assert numbers == [[1] * 16, [5] * 16]


def test_the_world_decides_on_the_batch():
    """Rate and state follow sizes up and down, as for a batch that was asked for."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    names = {"BatchScaler": BatchScaler, "Constant": Constant, "model": model, "loss": cross_entropy, "batches": []}
    names["optimizer"] = optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sizes = [64] * 10 + [256, 100, 7]
    rates, states = [], []
    optimizer.register_step_pre_hook(lambda own, *_: rates.append(own.param_groups[0]["lr"]))

    def batches():
        for size in sizes:
            x = torch.randn(size, 5)
            states.append(
                [optimizer.state[p]["exp_avg_sq"].clone() for p in model.parameters() if p in optimizer.state]
            )
            yield x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long()

    names["batches"] = batches()
    block = example("scaler.scaling(len(inputs))")
    block = block.replace(
        "    with scaler.observe", "    told.append((factor, known(), after()))\n    with scaler.observe", 1
    )
    told = []
    names |= {"told": told, "known": lambda: names["scaler"].controller.statistics}
    names["after"] = lambda: [optimizer.state[p]["exp_avg_sq"].clone() for p in model.parameters() if optimizer.state]
    exec(block.replace("    scaler.scaling(", "    factor = scaler.scaling(", 1), names)
    assert names["scaler"].samples == sum(sizes)
    for step in range(len(sizes)):
        factor, statistics, after = told[step]
        assert rates[step] == pytest.approx(0.01 * factor)
        if step >= 10:
            known, before, size = statistics.safe, sizes[step - 1], sizes[step]
            v, signal = known.variance, known.grad_norm_sq
            squares = (v / before + signal) / (v / size + signal)
            of_first, gain = ((k * v / 64 + signal) / (k * v / size + signal) for k in (1, CRITICAL))
            assert factor == pytest.approx(gain / of_first**0.5, rel=1e-6) != 1
            old_beta, beta = (0.999 ** (b / 64) for b in (before, size))
            unbiased = (1 - beta**step) / (1 - old_beta**step)  # of v with the new β₂
            for old, new in zip(states[step], after):
                assert torch.allclose(new, old * unbiased / squares, rtol=1e-5)
    assert told[0][0] == 1.0
    with pytest.raises(ValueError, match="cannot be shared"):
        names["scaler"].scaling(0)


def test_a_compiled_model_decides_as_main_does(of_main, in_double):
    """Compiled for real, but for the last stage, the generation of code."""
    model = seeded_model()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=RATE)
    scaler = BatchScaler(compiled, cross_entropy, optimizer, controller=controller(), measure_interval=1)
    assert same(taken(compiled, scaler, STEPS), of_main)
