"""Other tasks than classifying images: a data set's own loss and metrics, nested samples, columns, reports."""

import csv
import json
import math

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset, TensorDataset
from torchmetrics import MeanSquaredError

import batches
import data
import main
import report
from checks.conftest import train
from data import DataSet
from options.errors import UsageError
from runs import figures, results


def squared_errors(outputs, targets):
    return (outputs - targets).square().squeeze(1)


def as_numbers(images: TensorDataset) -> TensorDataset:
    return TensorDataset(images.tensors[0], images.tensors[1][:, None] / 10)


def digits_as_numbers(data_dir) -> DataSet:
    """Regression: the digit's value, a tenth of it, by mean squared error."""
    digits = data.digits(data_dir)
    return DataSet(
        as_numbers(digits.train),
        as_numbers(digits.val),
        loss=squared_errors,
        metrics={"mse": MeanSquaredError(), "rmse": math.sqrt},
        train_metrics={"error": lambda outputs, targets: (outputs - targets).abs()},
        num_outputs=1,
    )


class Halves(Dataset):
    """A nested input, the left and the right half of a digit, and a target of two, its value and its parity."""

    def __init__(self, digits: TensorDataset):
        self.digits = digits

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, i):
        image, label = self.digits[i]
        pixels = image[0].double() / 16
        return {"left": pixels[:, :4], "both": (pixels[:, 4:], int(label % 3))}, (label / 10, label % 2)


class Two(torch.nn.Module):
    """Takes what `Halves` gives, gives a nested output."""

    def __init__(self, input_shape, num_outputs):
        super().__init__()
        assert input_shape == {"left": (8, 4), "both": ((8, 4), ())}
        self.left, self.right = torch.nn.Linear(32, 8), torch.nn.Linear(32, 8)
        self.kind, self.out = torch.nn.Embedding(3, 8), torch.nn.Linear(8, num_outputs)

    def forward(self, inputs):
        right, kind = inputs["both"]
        x = torch.tanh(self.left(inputs["left"].flatten(1)) + self.right(right.flatten(1)) + self.kind(kind))
        value, odd = self.out(x).unbind(1)
        return {"value": value, "odd": odd}


def value_and_parity(outputs, targets):
    value, odd = targets
    parity = torch.nn.functional.binary_cross_entropy_with_logits(outputs["odd"], odd.to(outputs["odd"]))
    return mse_loss(outputs["value"], value) + parity


def halves(data_dir) -> DataSet:
    digits = data.digits(data_dir)
    return DataSet(Halves(digits.train), Halves(digits.val), loss=value_and_parity, num_outputs=2)


REGRESSION = [
    "--dataset=checks.test_tasks:digits_as_numbers",
    "--test_type=norm",
    "--model=cnn",
    "--learning_rate=0.003",
    "--accelerator=cpu",
]


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("tasks")
    options = ["--devices=1", "--max_samples=6000", "--eval_interval=40", "--max_batch_size=32", f"--out_dir={out_dir}"]
    assert main.main([*REGRESSION, *options, "--run_name=run"]) == 0
    return out_dir / "run"


def test_regression_learns_and_is_judged_by_its_metric(regression):
    summary = json.loads((regression / "summary.json").read_text())
    assert summary["objective"] == "val_mse" and summary["larger_is_better"] is False
    assert summary["val_mse"] < 0.03 < 0.08  # the variance of the targets is 0.083
    evaluations = [(int(row["step"]), float(row["val_mse"])) for row in rows_of(regression) if row["val_mse"]]
    assert summary["best_val_mse"] == min(value for _, value in evaluations)
    step, _ = min(evaluations, key=lambda entry: entry[1])
    assert summary["best_checkpoint"] == f"step-{step:08d}.pt"
    last = rows_of(regression)[-1]
    assert float(last["val_mse"]) == pytest.approx(float(last["val_loss"]), rel=1e-5)
    assert float(last["val_rmse"]) == pytest.approx(math.sqrt(float(last["val_loss"])))
    assert list(last)[3:9] == ["train_loss", "train_error", "val_loss", "val_mse", "val_rmse", "lr"]
    assert "val_accuracy" not in last and 0 < float(last["train_error"]) < 0.5
    assert int(last["batch_size"]) > 16  # the test has its say here, too


@pytest.mark.long
def test_figures_and_reports_follow_the_metric(regression, tmp_path, capsys):
    assert [title for title, _ in figures.panels(rows_of(regression)[0])] == [
        "loss", "mse", "batch size", "learning rate"
    ]  # fmt: skip
    run = results.read_run(regression)
    steps, values = zip(*((step, v) for step, v in zip(run.metrics["step"], run.metrics["val_mse"]) if v is not None))
    target = sorted(values)[len(values) // 2]
    means = [sum(values[max(i - 2, 0) : i + 1]) / min(i + 1, 3) for i in range(len(values))]
    expected = next(step for step, mean in zip(steps, means) if mean <= target)
    assert run.reached(target)["step"] == expected and run.reached(min(values) / 2) is None
    words = [str(regression), f"--target={target}", f"--figures={tmp_path}"]
    assert report.main(words) == 0
    table = capsys.readouterr().out
    assert "val mse" in table.replace("\n", " ") or "mse" in table
    assert f"to {target:g}" in table and "accuracy" not in table and (tmp_path / "against_steps.png").exists()
    only_loss = figures.compare(results.group([run])[0], "step", "val_loss")
    assert [axes.get_ylabel() for axes in only_loss.axes] == list(figures.compared("val_loss").values())


def test_runs_of_different_metrics_are_not_drawn_together(regression, tmp_path, capsys):
    options = ["--model=logistic", "--max_samples=64", "--accelerator=cpu", "--devices=1", f"--out_dir={tmp_path}"]
    assert main.main([*options, "--run_name=digits"]) == 0
    both = [str(regression), str(tmp_path / "digits")]
    assert report.main(both) == 0
    told = capsys.readouterr().out
    assert "mse" in told and "accuracy" in told
    assert report.main([*both, f"--figures={tmp_path / 'figures'}"]) == 2
    assert "choose some by --where" in capsys.readouterr().err


def test_two_processes_and_another_number_on_resuming_see_the_same_batches(tmp_path):
    """Nested samples in double precision, the loss a mean over the batch."""
    options = ["--dataset=checks.test_tasks:halves", "--model=checks.test_tasks:Two", "--precision=64-true"]
    options += ["--test=False", "--batch_size=24", "--eval_interval=10"]
    one = train(tmp_path, *options, "--max_samples=480", name="one")
    train(tmp_path, *options, "--max_samples=240", processes=2, name="two")
    two = train(tmp_path, *options, "--max_samples=480", "--resume=auto", name="two")
    assert [row["world_size"] for row in two.rows] == ["2"] * 10 + ["1"] * 10
    for a, b in zip(one.rows[:10], two.rows[:10]):
        assert float(a["train_loss"]) > 0 and a["batch_size"] == b["batch_size"] == "24"
    assert one.summary["objective"] == "val_loss" and one.summary["val_loss"] < float(one.rows[0]["train_loss"])


def test_nested_samples_are_cut_exactly():
    """By one reader or two ranks' readers: position by position the same, nested as the data set has them."""
    streams = [batches.build(halves(None), 3, True, torch.device("cpu"), torch.float64) for _ in range(2)]
    (whole, targets), *_ = streams[0].take([range(5, 45)])
    assert isinstance(targets, tuple) and isinstance(whole["both"], tuple) and whole["both"][1].dtype == torch.int64
    assert targets[0].dtype == torch.float64 and targets[1].dtype == torch.int64
    for rank in range(2):
        own = range(5 + rank, 45, 2)
        first, second = streams[1].take([own[:7], own[7:]])
        for cut, (inputs, of_cut) in ((slice(0, 7), first), (slice(7, None), second)):
            assert torch.equal(inputs["left"], whole["left"][rank::2][cut])
            assert torch.equal(inputs["both"][0], whole["both"][0][rank::2][cut])
            assert torch.equal(of_cut[1], targets[1][rank::2][cut])


def test_a_mean_and_the_losses_one_by_one_are_the_same_training(tmp_path):
    """`--loss` overrides the data set's; the mean over the samples stands for the losses of all."""
    runs = []
    for name, options in (("own", []), ("mean", ["--loss=checks.test_tasks:mean_squared_error"])):
        options += ["--devices=1", "--max_samples=400", "--max_micro_batch_size=7", "--precision=64-true"]
        assert main.main([*REGRESSION, *options, f"--out_dir={tmp_path}", f"--run_name={name}"]) == 0
        runs.append(rows_of(tmp_path / name))
    assert [row["batch_size"] for row in runs[0]] == [row["batch_size"] for row in runs[1]]
    for a, b in zip(*runs):
        for column in ("train_loss", "variance", "grad_norm_sq"):
            assert float(a[column] or 0) == pytest.approx(float(b[column] or 0), rel=1e-9)
    assert float(runs[0][-1]["val_loss"]) == pytest.approx(float(runs[1][-1]["val_loss"]), rel=1e-9)


def mean_squared_error(outputs, targets):
    return mse_loss(outputs, targets)


def three_numbers(outputs, targets):
    return outputs.new_zeros(3)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--loss=checks.test_tasks:three_numbers"], "gives (3,) for 2 samples"),
        (["--loss=torch:bmm"], "does not work on what cnn gives"),
        (["--loss=checks.test_tasks:squared"], "did you mean 'squared_errors'"),
        (["--model=gpt"], "--model=gpt is for text"),
        (["--dataset_args.sequence_length=8"], "takes no 'sequence_length'"),
        (["--model_args.depth=3"], "--model_args.depth=3 does not work on images"),
    ],
)
def test_refused(options, words, tmp_path, capsys):
    assert main.main([*REGRESSION, "--devices=1", *options, f"--out_dir={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_data_set_needs_a_loss_or_classes():
    samples = TensorDataset(torch.zeros(3, 2), torch.zeros(3))
    for arguments, words in (({}, "num_classes"), ({"loss": squared_errors, "crop_and_flip": True}, "needs images")):
        with pytest.raises(ValueError, match=words):
            DataSet(samples, samples, **arguments)
    with pytest.raises(ValueError, match="two tensors"):
        DataSet(TensorDataset(torch.zeros(3, 2)), samples, loss=squared_errors)


def test_samples_of_different_shapes_are_named():
    class Growing(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return torch.zeros(i + 1), 0.0

    stream = batches.build(
        DataSet(Growing(), Growing(), loss=squared_errors), 0, False, torch.device("cpu"), torch.float32
    )
    with pytest.raises(Exception, match="do not go into one batch"):
        stream.read(range(2))
    with pytest.raises(UsageError):
        data.load("checks.test_tasks:value_and_parity", None)
