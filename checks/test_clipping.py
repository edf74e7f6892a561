"""--grad_clip: against torch's own, and what auto makes of the norms before, written out."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from adadagrad import Clipping
from checks.conftest import column, train

CPU = torch.device("cpu")
OPTIONS = ("--model=cnn", "--optimizer=sgd", "--decay_lr=False", "--test=False", "--max_samples=2640")


def with_gradient(norm: float) -> list[nn.Parameter]:
    """Two parameters whose gradient is this long; a third one without any."""
    parameters = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (3, 2, 1)]
    direction = torch.tensor([1.0, -2.0, 0.5, 0.3, 4.0], dtype=torch.float64)
    gradient = direction * (norm / direction.norm())
    parameters[0].grad, parameters[1].grad = gradient[:3].clone(), gradient[3:].clone()
    return parameters


def norm_of(parameters: list[nn.Parameter]) -> float:
    return torch.cat([own.grad for own in parameters if own.grad is not None]).norm().item()


@pytest.mark.parametrize("norm", [0.5, 2.0, 30.0])
def test_a_given_bound_is_torchs_clipping_bit_for_bit(norm):
    ours, theirs = with_gradient(norm), with_gradient(norm)
    clipped = Clipping(2.0, CPU)(ours)
    total = nn.utils.clip_grad_norm_(theirs, 2.0)
    assert clipped.item() == (total.item() > 2.0)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:2], theirs))


def test_auto_clips_at_twice_the_mean_of_clipped_norms():
    """A leap, norms that are not finite, which count nothing, and some that grow faster than the bound."""
    norms = [1.0, 3.0, 2.0, 50.0, 1.0, 100.0, math.inf, math.nan, *(50.0 * 2**k for k in range(9)), *[40.0] * 30]
    clipping, mean, seen, recent, in_a_row = Clipping("auto", CPU), 0.0, 0, 0.0, False
    for norm in norms:
        parameters = with_gradient(norm if math.isfinite(norm) else 1.0)
        if not math.isfinite(norm):
            parameters[0].grad[0] = norm
        clipped = clipping(parameters).item()
        if not math.isfinite(norm):
            continue
        bound = 2 * mean if seen >= 4 else math.inf
        seen += 1
        mean += (min(norm, bound) - mean) / min(seen, 16)
        assert clipped == (norm > bound)
        recent += (clipped - recent) / 8
        in_a_row |= recent > 0.6
        assert clipping.in_a_row == in_a_row and clipping.recent == pytest.approx(recent, rel=1e-12)
        assert norm_of(parameters) == pytest.approx(min(norm, bound), rel=1e-5)
    assert mean > 20 and not clipped  # it has followed
    assert in_a_row and recent < 0.6
    again = Clipping("auto", CPU)
    again.load_state_dict(clipping.state_dict())
    assert again.state_dict() == clipping.state_dict() and again.in_a_row
    again.load_state_dict({"mean": 1.0, "seen": 9.0})  # of before there was the rest
    assert not again.in_a_row


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, "Auto"])
def test_a_bound_is_positive(bound):
    with pytest.raises(ValueError, match="bound"):
        Clipping(bound, CPU)


def test_nothing_to_clip():
    assert not Clipping("auto", CPU)([nn.Parameter(torch.ones(2))])


def test_a_given_bound_says_nothing_of_the_curvature():
    clipping = Clipping(0.1, CPU)
    assert all(clipping(with_gradient(1.0)) for _ in range(30)) and not clipping.in_a_row


def test_a_step_too_long_does_not_throw_off_the_next():
    """f = ½(1 − uv)² with momentum, its rate made thirty times as large for one step: clipped, it comes back."""
    ends = []
    for clipping in (Clipping("auto", CPU), None):
        u, v = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (0.2, 0.1))
        optimizer = torch.optim.SGD([u, v], lr=0.1, momentum=0.9)
        for step in range(80):
            optimizer.param_groups[0]["lr"] = 3.0 if step == 6 else 0.1
            optimizer.zero_grad()
            (0.5 * (1 - u * v) ** 2).sum().backward()
            if clipping:
                clipping([u, v])
            optimizer.step()
        ends.append((0.5 * (1 - u * v) ** 2).item())
    assert ends[0] < 0.01 and not ends[1] < 1  # it is not a number


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_in_runs(tmp_path, strategy):
    """After a leap of the rate: resumed it is the same bit for bit, on two processes, of shards, too, to rounding."""
    options = [*OPTIONS, "--precision=64-true", "--learning_rate=0.02", "--momentum=0.9", "--lr_scaling=linear"]
    options += ["--stagewise_ramp_up=True", "--global_batch_sizes=[4,128]", "--samples_stages=[80,5000]"]
    options += ["--max_micro_batch_size=128", "--grad_clip=auto", "--checkpoint_interval=24", "--keep_checkpoints=9"]
    whole = train(tmp_path, *options, name="whole")
    losses, clipped = column(whole, "train_loss"), column(whole, "clipped")
    assert not any(clipped[:4]) and 0 < sum(clipped[24:]) < 8
    on_two = train(tmp_path, *options, f"--strategy={strategy}", processes=2, name="two")
    assert column(on_two, "train_loss") == pytest.approx(losses, rel=1e-6)
    checkpoint = whole.folder / "checkpoints" / "step-00000024.pt"
    again = train(tmp_path, *options, f"--resume={checkpoint}", name="again")
    one, other = (torch.load(run.folder / "model.pt") for run in (whole, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_steps_at_the_edge_end_the_floor_of_the_rate(tmp_path):
    """It is in the checkpoints; a run that is resumed before or after that is the same bit for bit."""
    options = ["--optimizer=sgd", "--momentum=0.9", "--learning_rate=0.02", "--decay_lr=False", "--knee=3000"]
    options += ["--max_samples=6000", "--checkpoint_interval=12", "--keep_checkpoints=9"]
    whole = train(tmp_path, *options, name="whole")

    def floors(folder: Path) -> list[bool]:
        files = sorted((folder / "checkpoints").glob("*.pt"))
        return [torch.load(file, weights_only=False)["controller"]["floor"] for file in files]

    assert sum(column(whole, "clipped")) > 8 and [*dict.fromkeys(floors(whole.folder))] == [True, False]
    for step in (24, 60):
        checkpoint = whole.folder / "checkpoints" / f"step-{step:08d}.pt"
        again = train(tmp_path, *options, f"--resume={checkpoint}", name=f"again{step}")
        one, other = (torch.load(run.folder / "model.pt") for run in (whole, again))
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert all(floors(train(tmp_path, *options, "--grad_clip=0.1", name="bounded").folder))
