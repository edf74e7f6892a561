"""The benchmarks run and say the truth; the calibration of the README in small."""

import json

import pytest
import torch

from benchmarks import calibration, cases, speed, torchvision_models


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration")
    calibration.main("digits", steps=[0, 5], batch_sizes=[128], batches=40, looks=4, out=out)
    return out


def test_calibration_in_small(digits):
    """Digits, b = 128: per-sample estimates are right without BatchNorm alone, micro_batch is right with both."""
    rows = json.loads((digits / "calibration.json").read_text())["rows"]
    assert len(rows) == 12
    for row in rows:
        if row["network"] == "GroupNorm" or row["estimator"] == "micro_batch":
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
    result = torchvision_models.examine("squeezenet1_1", batch_size=2)
    assert result["finite"] and result["taken"] == "ghost" and result["difference"] < 1e-4
    assert "| squeezenet1_1 | 0.7 M | 224 | 2 | yes | ghost |" in torchvision_models.table({"squeezenet1_1": result})
    assert len(torchvision_models.NAMES) == 80
