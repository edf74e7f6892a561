"""--weight_average, and the share of clipped steps: against sums written out."""

import csv
import math

import pytest
import torch
from torch import nn

import data
from adadagrad import WeightAverage
from checks.conftest import column, train

SGD = ("--model=logistic", "--optimizer=sgd", "--learning_rate=0.5", "--decay_lr=False", "--precision=64-true")
SHORT = (*SGD, "--test=False", "--batch_size=16", "--max_samples=320")


class Number(nn.Module):
    """A parameter of one number, and a buffer that is twice as large."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=dtype))
        self.register_buffer("twice", torch.zeros((), dtype=dtype))

    def is_now(self, value: float, average: WeightAverage, batch_size: int) -> None:
        """After a step on a batch of this size."""
        with torch.no_grad():
            self.weight.fill_(value)
            self.twice.fill_(2 * value)
        average.update(batch_size)


def test_the_average_is_by_samples_not_by_steps():
    """Weights 1, 2, 3 … after batches of different sizes; each sample counts half as much as those of 8 later."""
    number, sizes = Number(), [4, 4, 16, 2, 8, 8]
    average = WeightAverage(number, half_life=8.0)
    expected, samples = 0.0, 0
    for value, b in enumerate(sizes, start=1):
        number.is_now(value, average, b)
        samples += b
        share = max(1 - 0.5 ** (b / 8), b / samples)
        expected += share * (value - expected)
    assert average.averages[0].item() == pytest.approx(expected, rel=1e-12)
    with average.in_place():
        assert (number.weight.item(), number.twice.item()) == pytest.approx((expected, 2 * expected), rel=1e-12)
    assert (number.weight.item(), number.twice.item()) == (6.0, 12.0)
    split, whole = (WeightAverage(number, half_life=8.0) for _ in range(2))
    for part, sizes in ((split, [40, 6, 10]), (whole, [40, 16])):
        for value, b in zip((5.0, 7.0, 7.0), sizes):
            number.is_now(value, part, b)
    assert split.averages[0].item() == pytest.approx(whole.averages[0].item(), rel=1e-12)


def test_a_share_of_the_samples_so_far():
    """Half of the weight is on the last tenth of the samples, or less, at every moment: it lags by 0.13 of them."""
    number = Number()
    average = WeightAverage(number, half_life=0.1)
    for step in range(1, 2001):
        number.is_now(step, average, 5)
        if step in (10, 100, 2000):
            # A sample's weight is about t^(ln 2 / 0.1 − 1): over these, the mean of t is 6.93/7.93 of the last.
            assert average.averages[0].item() == pytest.approx(step * 0.8739, rel=0.08 if step == 10 else 0.01)
    steps = torch.arange(1, 2001, dtype=torch.float64)
    shares = 1 - 2 ** (-10 / steps)
    left = torch.cat([(1 - shares).flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    assert average.averages[0].item() == pytest.approx((shares * left * steps).sum().item(), rel=1e-12)


def test_narrow_weights_are_averaged_in_float32_and_left_alone():
    number = Number(torch.bfloat16)
    parameter, average = number.weight, WeightAverage(number, half_life=1e6)
    for _ in range(100):
        number.is_now(1.0, average, 1)
        number.is_now(1.01, average, 1)
    assert average.averages[0].item() == pytest.approx((1 + 1.0078125) / 2, rel=1e-5)
    with average.in_place():
        assert parameter.item() == 1.0 or parameter.item() == 1.0078125
    assert parameter.item() == torch.tensor(1.01, dtype=torch.bfloat16).item()


def test_evaluated_and_saved_beside_the_weights(tmp_path):
    """The plain weights are those of the run without it; the average is the mean over all steps' while few."""
    plain = train(tmp_path, *SHORT, "--checkpoint_interval=1", "--keep_checkpoints=100", name="plain")
    averaged = train(tmp_path, *SHORT, "--weight_average=1000000", name="averaged")
    weights, same = (torch.load(run.folder / "model.pt") for run in (plain, averaged))
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    steps = sorted((plain.folder / "checkpoints").glob("step-*.pt"))
    of_steps = [torch.load(path, weights_only=True)["model"] for path in steps]
    assert len(of_steps) == 20
    average = torch.load(averaged.folder / "model_average.pt")
    for name, value in average.items():
        mean = torch.stack([own[name] for own in of_steps]).mean(0)
        torch.testing.assert_close(value, mean, rtol=1e-9, atol=1e-12)
    assert averaged.summary["val_loss"] != plain.summary["val_loss"]
    assert column(plain, "train_loss") == column(averaged, "train_loss")
    assert not (plain.folder / "model_average.pt").exists()


def normalised(image_shape, num_classes) -> nn.Module:
    """BatchNorm between two layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes))


def test_its_state_has_the_averages_of_buffers():
    number = Number()
    average = WeightAverage(number, half_life=8.0)
    for value in range(1, 5):
        number.is_now(value, average, 4)
    again = WeightAverage(Number(), half_life=8.0)
    again.load_state_dict(state := average.state_dict())
    assert again.averages == average.averages and again.buffers == average.buffers and average.buffers[0] > 2
    again.load_state_dict({name: state[name] for name in ("averages", "samples")})  # of before they were in it


@pytest.mark.parametrize("half_life", [0.0, -5.0, math.nan])
def test_a_half_life_is_positive(half_life):
    with pytest.raises(ValueError, match="half_life"):
        WeightAverage(Number(), half_life)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_resumed_with_its_average(tmp_path, processes):
    """Bit for bit, with the averages of BatchNorm's statistics, which every rank has for itself; evaluated by them."""
    options = [*SHORT[1:-1], "--model=checks.test_averages:normalised", "--weight_average=0.3", "--resume=auto"]
    options.append("--eval_interval=10")  # where the first part ends, too: then ranks average their statistics
    for name, lengths in (("whole", [320]), ("cut", [160, 320])):
        for samples in lengths:
            run = train(tmp_path, *options, f"--max_samples={samples}", name=name, processes=processes)
    ours, theirs = (torch.load(tmp_path / name / "model_average.pt") for name in ("whole", "cut"))
    assert run.summary["samples"] == 320 and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    plain = torch.load(tmp_path / "whole" / "model.pt")
    assert not torch.allclose(plain["2.running_mean"], ours["2.running_mean"], rtol=1e-3)
    model = normalised((1, 8, 8), 10).double().eval()
    model.load_state_dict(ours)
    images, labels = data.load("digits", tmp_path).val.tensors
    loss = nn.functional.cross_entropy(model(images.double() / 255), labels)
    assert run.summary["val_loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.long
def test_the_share_of_clipped_steps(tmp_path):
    """By the gradients' norms as they are measured; in windows of eight steps, over two processes, and resumed."""
    watched = train(tmp_path, *SHORT, "--monitor_interval=1", name="watched")
    bound = sorted(math.sqrt(norm) for norm in column(watched, "grad_norm_sq"))[10]
    options = (*SHORT, f"--grad_clip={bound}", "--learning_rate=1e-9")
    norms = [
        math.sqrt(n) for n in column(train(tmp_path, *options, "--monitor_interval=1", name="norms"), "grad_norm_sq")
    ]
    over = [norm > bound for norm in norms]
    run = train(tmp_path, *options, "--log_interval=8", name="run")
    expected = [sum(over[first:last]) / (last - first) for first, last in ((0, 8), (8, 16), (16, 20))]
    assert 0 < sum(over) < 20 and column(run, "clipped") == pytest.approx(expected)
    on_two = train(tmp_path, *options, "--log_interval=8", processes=2, name="two")
    assert column(on_two, "clipped") == pytest.approx(expected)
    with open(watched.folder / "metrics.csv", newline="") as file:
        assert not any(row["clipped"] for row in csv.DictReader(file))
