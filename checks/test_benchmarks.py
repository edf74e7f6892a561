"""The benchmarks run and say the truth; the calibration of docs/statistics.md in small."""

import csv
import json

import numpy as np
import pytest
import torch
from scipy.stats import ttest_ind

import report
from benchmarks import calibration, cases, comparison, speed, tables, torchvision_models
from checks.conftest import ROOT, forks
from options import command_line
from runs import results


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration")
    calibration.main("digits", steps=[0, 5], batch_sizes=[128], batches=24, looks=3, out=out)
    return out


@pytest.mark.long
def test_calibration_in_small(digits):
    """Digits, b = 128: per-sample estimates are right without BatchNorm alone, micro_batch is right with both."""
    rows = json.loads((digits / "calibration.json").read_text())["rows"]
    assert len(rows) == 14
    for row in rows:
        if row["network"] == "GroupNorm" or row["estimator"].startswith("micro_batch"):
            assert row["ratio"] == pytest.approx(1, abs=max(0.15, 4 * row["standard_error"])), row
            assert row["noise_scale_ratio"] == pytest.approx(1, abs=max(0.15, 4 * row["noise_scale_error"])), row
        else:
            assert abs(row["ratio"] - 1) > 0.25, row
    assert "| BatchNorm | `micro_batch` | 128 |" in (digits / "calibration.md").read_text()
    assert (digits / "calibration.png").stat().st_size > 10_000


def test_truth_by_hand():
    """From the gradients of seven batches by themselves; of a mean, the jackknife gives its standard error."""
    model = torch.nn.Linear(2, 2, bias=False)
    batches = [(torch.randn(4, 2), torch.randint(2, (4,))) for _ in range(7)]
    vectors = torch.stack([calibration.gradient(model, batch) for batch in batches])
    cut = [calibration.gradient(model, batch, pieces=2) for batch in batches]
    assert torch.allclose(torch.stack(cut), vectors)
    found, variance = calibration.truth(model, batches), float(vectors.var(0).sum())
    assert found["variance"][0] == pytest.approx(variance, rel=1e-5)
    signal = float(vectors.mean(0).square().sum()) - variance / 7
    assert found["quotient"][0] == pytest.approx(variance / signal, rel=1e-4)
    numbers = torch.randn(9, dtype=torch.float64)
    mean, error = calibration.jackknife(lambda weights: weights @ numbers / weights.sum(-1), 9)
    assert (mean, error) == pytest.approx((float(numbers.mean()), float(numbers.std() / 3)))


def test_speed_measures_each_method():
    case = speed.CASES["cnn_256"]
    results = {
        f"cnn_256 {method} norm": speed.measure(case, method, "norm", "32-true", 0.0)
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


def test_every_model_is_checked_where_it_takes_small_images_and_where_it_does_not():
    (small,) = torchvision_models.check("shufflenet_v2_x0_5")
    assert small["taken"] == "ghost" and small["image_size"] == 64
    line = torchvision_models.checked_table({"shufflenet_v2_x0_5": small}).splitlines()[-1]
    assert line == "| shufflenet_v2_x0_5 | 0.4 M | 64 | ghost | has BatchNorm |"
    (large,) = torchvision_models.check("squeezenet1_1", size=8)  # too small for its pooling
    assert large["taken"] == "ghost" and large["image_size"] == 224


def test_kept_check_has_every_model():
    kept = json.loads((cases.RESULTS / "checked.json").read_text())["results"]
    assert set(kept) == set(torchvision_models.NAMES)
    assert torchvision_models.checked_table(kept) in (cases.RESULTS / "checked.md").read_text()


def test_comparison_tunes_and_keeps_what_a_report_needs(tmp_path, monkeypatch, capsys):
    """The sweep is widened from its edge; a second command finds all done, a run that was cut off starts anew."""
    shared = {"dataset": "digits", "model": "logistic", "optimizer": "adagrad", "max_samples": 2000}
    shared |= {"eval_samples": 100, "decay_lr": False, "max_micro_batch_size": 64}
    methods = {
        "constant_8": {"test": False, "batch_size": 8},
        "steady": {"recipe": "steady", "batch_size": 8, "knee": 50},
    }
    part = comparison.Part(shared, methods, (0.3, 0.8), learning_rates=(0.01, 0.03))
    monkeypatch.setattr(comparison, "PARTS", {"small": part})
    monkeypatch.setattr(comparison, "SEEDS", (1,))
    monkeypatch.setattr(comparison, "_forks", forks)
    (tmp_path / "out" / "small" / "final" / "constant_8_seed1").mkdir(parents=True)  # main.py would refuse it
    words = ["small", "-j", "2", f"--out_dir={tmp_path / 'out'}", f"--results={tmp_path / 'results'}"]
    comparison.main([*words, "--validation_samples=200"])
    kept = tmp_path / "results" / "small"
    record = json.loads((kept / "tuning.json").read_text())
    for name in methods:
        tried = record[name]["to_target"]
        assert record[name]["tried"] == len(tried) >= 4 and record[name]["samples"] >= 2000 * len(tried)
        best, rates = f"{record[name]['chosen']:g}", list(tried)
        assert best in rates[1:-1] and tried[best] == min(value for value in tried.values() if value is not None)
    summary = json.loads((kept / "constant_8_seed1" / "summary.json").read_text())
    assert summary["status"] == "finished" and {"--seed=1", "--validation_samples=200"} <= set(summary["command"])
    assert not any(str(tmp_path) in file.read_text() for file in kept.rglob("*") if file.is_file())
    monkeypatch.setattr(comparison.subprocess, "run", None)  # nothing is left to run
    comparison.main(words)
    folders = tmp_path / "out" / "small" / "final" / "steady_seed1", kept / "steady_seed1"
    whole, short = (results.read_run(folder).reached(0.8) for folder in folders)
    assert short["samples"] == whole["samples"] and short["seconds"] == pytest.approx(whole["seconds"], rel=1e-3)
    again = [
        f"--rates_of={tmp_path / 'results'}",
        "--methods=steady",
        f"--out_dir={tmp_path / 'again'}",
    ]  # no sweep, the rate that is kept
    comparison.main([*words, *again, "--validation_samples=200"])
    assert [path.parent.name for path in (tmp_path / "again").rglob("summary.json")] == ["steady_seed1"]
    options = results.read_run(tmp_path / "again" / "small" / "final" / "steady_seed1").options
    assert options["learning_rate"] == record["constant_8"]["chosen"]
    assert json.loads((kept / "tuning.json").read_text()) == record
    monkeypatch.setattr(tables, "KEPT", tmp_path / "results")
    monkeypatch.setattr(tables, "PARTS", comparison.PARTS)
    monkeypatch.setattr(tables, "SEEDS", (1,))
    lines = tables.times("small", "0.8").splitlines()
    row = [cell.strip() for cell in next(line for line in lines if line.startswith("| **steady** ")).split("|")]
    taken = f"{record['constant_8']['chosen']:g}"  # the recipe's own sweep chooses nothing
    assert row[2:5] == [taken, f"{whole['samples']:,.0f}", f"{whole['step']:.0f}"]
    assert row[-3] == f"{(whole['samples'] + 3000 * whole['step']) / 1000:,.0f}"
    capsys.readouterr()
    assert report.main([str(kept), "--target=0.8", "--knee=50"]) == 0
    shown = capsys.readouterr().out
    assert "constant 8" in shown and "steady" in shown and "50·steps" in shown


@pytest.mark.parametrize(
    "part, method, source",
    [
        ("mnist_cnn", "steady", "constant_16"),
        ("mnist_cnn", "steady_knee300", "constant_16"),
        ("stdlib_gpt", "steady_knee30", "constant_4"),
        ("cifar10_resnet18", "steady", "constant_128"),
        ("mnist_logistic", "steady_from_256", "steady_from_256"),
        ("mnist_logistic", "norm_eta1", "norm_eta1"),
    ],
)
def test_the_recipe_takes_the_rate_of_the_batch_that_it_starts_from(part, method, source):
    assert comparison.PARTS[part].rate_from(method) == source


def test_pages_have_the_tables_of_what_is_kept(tmp_path):
    """`python -m benchmarks.tables` would change nothing; and the figures can be drawn."""
    kinds = set()
    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        assert tables.filled(text) == text, f"run: python -m benchmarks.tables ({page})"
        kinds |= {found[2].split()[0] for found in tables.TABLE.finditer(text)}
    assert kinds == set(tables.KINDS)
    drawn = tables.draw(tmp_path)
    assert len(drawn) == len(tables.PROBLEMS) and all(file.stat().st_size > 20_000 for file in drawn)
    assert all((ROOT / "docs" / file.name).exists() for file in drawn)


def test_the_sentence_to_take_away():
    """results.md's words about the ten ratios in seconds are those of the kept runs."""
    ratios = []
    for problem in tables.PROBLEMS:
        for target in comparison.PARTS[problem].targets:
            pair = tables.costs(problem, "steady", target, None), tables.best_constant(problem, target, None)[0]
            ratios.append((*tables.ratio(*pair), *tables.ratio(*pair, confidence=1 - 0.05 / 10)[1:]))
    middle = sorted(ratio for ratio, *_ in ratios)
    level = sum(low <= 1 <= high for _, low, high, *_ in ratios)
    assert all(low <= 1 <= high for *_, low, high in ratios)  # Bonferroni's correction
    results_page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    assert f"The ratios are {middle[0]:.2f} to {middle[-1]:.2f}, and the 95 % intervals of eight" in results_page
    assert level == 8 and "After a correction for ten comparisons neither is left" in results_page


def test_a_ratio_of_the_table_by_hand():
    """steady over the best constant to 92 % on MNIST logistic, from the kept rows alone, and Welch's interval by
    scipy."""
    folder, logs = ROOT / "benchmarks" / "results" / "comparison" / "mnist_logistic", {}
    for name in ("steady", *(f"constant_{size}" for size in (16, 64, 256, 1024, 4096))):
        logs[name] = []
        for seed in (1, 2, 3):
            with open(folder / f"{name}_seed{seed}" / "metrics.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            steps = np.array([int(row["step"]) for row in rows])
            spent = np.cumsum(np.diff(steps, prepend=0) * [float(row["step_time"]) for row in rows])
            means = np.convolve([float(row["val_accuracy"]) for row in rows], np.ones(3) / 3, "valid")
            logs[name].append(np.log(spent[2:][means >= 0.92][0]))
    own = logs.pop("steady")
    best = min(logs.values(), key=np.mean)
    interval = ttest_ind(own, best, equal_var=False).confidence_interval(0.95)
    numbers = np.exp([np.mean(own) - np.mean(best), interval.low, interval.high])
    line = next(line for line in tables.against_constants().splitlines() if "logistic" in line and "92 %" in line)
    assert "**{:.2f} ({:.2f}–{:.2f})**".format(*numbers) in line


def test_comparison_methods_are_accepted_by_the_program():
    for name, part in comparison.PARTS.items():
        assert len(part.learning_rates) == 1 or set(part.learning_rates) <= set(comparison.RATES)
        for method, options in part.methods.items():
            words = [f"--{key}={comparison._word(value)}" for key, value in {**part.shared, **options}.items()]
            parsed = command_line.parse(words)
            assert parsed.seed == 42 and parsed.max_samples == part.shared["max_samples"], (name, method)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_muon_in_float32_is_torchs_but_for_its_precision(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(4, *shape)
    ends = []
    for kind in (torch.optim.Muon, cases.Float32Muon):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach())
    assert not torch.equal(*ends)
    torch.testing.assert_close(*ends, rtol=0, atol=0.02 * float((ends[0] - start).abs().max()))
