"""Validation metrics against plain arithmetic."""

import math

import pytest
import torch
import torchmetrics

import data
from options.errors import UsageError
from training.metrics import Validation


def validation_of(num_classes: int) -> Validation:
    """As of a data set of images."""
    samples = torch.utils.data.TensorDataset(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2).long())
    data_set = data.DataSet(samples, samples, num_classes)
    return Validation(data_set.loss, data_set.metrics, torch.device("cpu"))


@pytest.mark.parametrize("num_classes", [99, 100])
def test_top5_accuracy_from_100_classes_on(num_classes):
    torch.manual_seed(0)
    validation, hits = validation_of(num_classes), []
    for size in (30, 7):
        logits, targets = torch.randn(size, num_classes), torch.randint(num_classes, (size,))
        logits[torch.arange(size), targets] += 1.5
        validation.update(logits, targets)
        hits += (logits.topk(5).indices == targets[:, None]).any(1).tolist()
    evaluation = validation.compute()
    assert 0 < evaluation["val_accuracy"] < 1
    if num_classes < 100:
        assert "val_top5_accuracy" not in evaluation
    else:
        assert evaluation["val_top5_accuracy"] == pytest.approx(sum(hits) / 37) and 0 < sum(hits) < 37
    assert validation.results().get("val_top5_accuracy") == evaluation.get("val_top5_accuracy")


def test_a_loss_that_is_not_a_number_shows():
    """The mean over all samples; a NaN makes it NaN, and is no best loss."""
    validation, logits = validation_of(3), torch.randn(5, 3)
    validation.update(logits, torch.zeros(5, dtype=torch.int64))
    finite = validation.compute()["val_loss"]
    validation.update(logits, torch.zeros(5, dtype=torch.int64))
    validation.update(torch.full((1, 3), torch.nan), torch.zeros(1, dtype=torch.int64))
    assert math.isnan(validation.compute()["val_loss"])
    assert validation.results()["best_val_loss"] == finite


def test_a_metric_of_several_numbers_is_refused():
    metric = torchmetrics.classification.MulticlassAccuracy(3, average="none")
    validation = Validation(torch.nn.functional.cross_entropy, {"accuracy": metric}, torch.device("cpu"))
    validation.update(torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0]))
    with pytest.raises(UsageError, match=r"accuracy gives a tensor of shape \(3,\): give one number"):
        validation.compute()


class Unsure(torchmetrics.MeanMetric):
    """Says nothing of which way is better."""

    higher_is_better = None

    def update(self, outputs, targets):
        super().update(outputs)


@pytest.mark.parametrize("direction, best_of", [(None, min), (False, min), (True, max)])
def test_the_best_evaluation_by_what_the_metric_says(direction, best_of):
    """One that says nothing is an error; an evaluation that is no number is never the best, and blocks none."""
    kind = type("Judging", (Unsure,), {"higher_is_better": direction})
    metric = kind(nan_strategy="disable")
    loss = torch.nn.functional.mse_loss
    validation, values, best = Validation(loss, {"error": metric}, torch.device("cpu")), [], []
    for value in (math.nan, 3.0, 2.0, 4.0, 1.0):
        validation.update(torch.full((2,), value), torch.zeros(2))
        validation.compute()
        values.append(value)
        best.append(validation.is_best())
    finite = values[1:]
    assert best == [False] + [value == best_of(finite[: i + 1]) for i, value in enumerate(finite)]
    assert validation.results()["best_val_error"] == best_of(finite)
