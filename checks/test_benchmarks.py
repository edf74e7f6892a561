"""The benchmarks run and say the truth; the calibration of docs/statistics.md in small."""

import json

import pytest
import torch

from benchmarks import calibration, cases, comparison, speed, torchvision_models
from launch import options as config


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration")
    calibration.main("digits", steps=[0, 5], batch_sizes=[128], batches=40, looks=4, out=out)
    return out


def test_calibration_in_small(digits):
    """Digits, b = 128: per-sample estimates are right without BatchNorm alone, micro_batch is right with both."""
    rows = json.loads((digits / "calibration.json").read_text())["rows"]
    assert len(rows) == 14
    for row in rows:
        if row["network"] == "GroupNorm" or row["estimator"].startswith("micro_batch"):
            assert row["ratio"] == pytest.approx(1, abs=max(0.15, 4 * row["standard_error"])), row
        else:
            assert abs(row["ratio"] - 1) > 0.25, row
    assert "| BatchNorm | `micro_batch` | 128 |" in (digits / "calibration.md").read_text()
    assert (digits / "calibration.png").stat().st_size > 10_000


def test_true_variance_by_hand():
    """A linear model of one weight: the gradient of Σ over a batch is known."""
    model = torch.nn.Linear(2, 2, bias=False)
    batches = [(torch.randn(4, 2), torch.randint(2, (4,))) for _ in range(7)]
    vectors = torch.stack([calibration.gradient(model, batch) for batch in batches])
    cut = [calibration.gradient(model, batch, pieces=2) for batch in batches]
    assert torch.allclose(torch.stack(cut), vectors)
    assert calibration.true_variance(model, batches)[0] == pytest.approx(float(vectors.var(0).sum()), rel=1e-5)


def test_speed_measures_each_method():
    case = speed.CASES["cnn_256"]
    results = {
        f"cnn_256 {method} norm": speed.measure(case, method, "norm", 0.0)
        for method in ("plain", "ghost", "micro_batch")
    }
    assert all(len(times) == 3 for r in results.values() for times in r["times"].values())
    lines = speed.table(results).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["plain step", "ghost", "micro_batch"]
    assert "of the cut step" in lines[-1]


def test_peers_meet_models_without_in_place_operations():
    """The block that Opacus can hook computes what torchvision's does."""
    torch.manual_seed(0)
    model, x = cases.resnet18_group_norm((3, 32, 32), 10), torch.randn(2, 3, 32, 32)
    expected = model(x)
    assert torch.equal(cases.without_in_place(model)(x), expected)


def test_every_model_table():
    *_, result = torchvision_models.examine("squeezenet1_1", batch_size=2)
    assert result["finite"] and result["taken"] == "ghost" and result["difference"] < 1e-4
    assert "| squeezenet1_1 | 0.7 M | 224 | 2 | yes | ghost |" in torchvision_models.table({"squeezenet1_1": result})
    assert len(torchvision_models.NAMES) == 80


def test_comparison_takes_the_best_learning_rate(tmp_path, monkeypatch, capsys):
    """Two learning rates, one of them useless; a second command finds all done, a run that was cut off starts anew."""
    shared = {"dataset": "digits", "model": "logistic", "optimizer": "adagrad", "max_samples": 2000, "eta": 0.5}
    part = comparison.Part(shared, {"norm": {"test_type": "norm"}}, learning_rates=(1e-7, 0.01))
    monkeypatch.setattr(comparison, "PARTS", {"small": part})
    monkeypatch.setattr(comparison, "SEEDS", (1,))
    (tmp_path / "out" / "small" / "final" / "norm_seed1").mkdir(parents=True)  # main.py would refuse it
    words = ["small", "-j", "2", f"--out_dir={tmp_path / 'out'}", f"--results={tmp_path / 'results'}"]
    comparison.main([*words, "--batch_size=8"])
    record = json.loads((tmp_path / "results" / "small" / "learning_rates.json").read_text())["norm"]
    assert record["chosen"] == 0.01 and record["accuracy"]["1e-07"] < 0.2 < record["accuracy"]["0.01"]
    summary = json.loads((tmp_path / "results" / "small" / "norm_seed1.json").read_text())
    assert summary["status"] == "finished" and {"--learning_rate=0.01", "--seed=1", "--batch_size=8"} <= set(
        summary["command"]
    )
    assert str(tmp_path) not in json.dumps(summary)
    monkeypatch.setattr(comparison.subprocess, "run", None)  # nothing is left to run
    comparison.main(words)
    assert capsys.readouterr().out.count("finished") == 6


def test_comparison_methods_are_accepted_by_the_program():
    for name, part in comparison.PARTS.items():
        for method, options in part.methods.items():
            words = [f"--{key}={value}" for key, value in {**part.shared, **options}.items()]
            parsed = config.parse(words)
            assert parsed.seed == 42 and parsed.max_samples == part.shared["max_samples"], (name, method)
