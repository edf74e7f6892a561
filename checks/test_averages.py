"""--weight_average, and the share of clipped steps: against sums written out."""

import csv
import math

import pytest
import torch

from checks.conftest import column, train
from training.averages import WeightAverage

SGD = ("--model=logistic", "--optimizer=sgd", "--learning_rate=0.5", "--decay_lr=False", "--precision=64-true")
SHORT = (*SGD, "--test=False", "--batch_size=16", "--max_samples=320")


def test_the_average_is_by_samples_not_by_steps():
    """Weights 1, 2, 3 … after batches of different sizes; each sample counts half as much as those of 8 later."""
    parameter, sizes = torch.zeros((), dtype=torch.float64), [4, 4, 16, 2, 8, 8]
    average = WeightAverage([parameter], half_life=8.0)
    expected, samples = 0.0, 0
    for value, b in enumerate(sizes, start=1):
        parameter.fill_(value)
        average.update(b)
        samples += b
        share = max(1 - 0.5 ** (b / 8), b / samples)
        expected += share * (value - expected)
    assert average.averages[0].item() == pytest.approx(expected, rel=1e-12)
    split, whole = (WeightAverage([parameter], half_life=8.0) for _ in range(2))
    for part, sizes in ((split, [40, 6, 10]), (whole, [40, 16])):
        for value, b in zip((5.0, 7.0, 7.0), sizes):
            parameter.fill_(value)
            part.update(b)
    assert split.averages[0].item() == pytest.approx(whole.averages[0].item(), rel=1e-12)


def test_narrow_weights_are_averaged_in_float32_and_left_alone():
    parameter = torch.full((), 1.0, dtype=torch.bfloat16)
    average = WeightAverage([parameter], half_life=1e6)
    for _ in range(100):
        parameter.fill_(1.0)
        average.update(1)
        parameter.fill_(1.01)
        average.update(1)
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


@pytest.mark.long
def test_resumed_with_its_average(tmp_path):
    for name, lengths in (("whole", [320]), ("cut", [160, 320])):
        for samples in lengths:
            run = train(
                tmp_path, *SHORT[:-1], f"--max_samples={samples}", "--weight_average=100", "--resume=auto", name=name
            )
    ours, theirs = (torch.load(tmp_path / name / "model_average.pt") for name in ("whole", "cut"))
    assert run.summary["samples"] == 320 and all(torch.equal(value, theirs[name]) for name, value in ours.items())


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
