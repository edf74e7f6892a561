"""What a run writes as it goes: columns, plain lines without a terminal, strict JSON, curves of long runs."""

import csv
import json
import math

import main
import report
import runlog

COLUMNS = (
    "step,samples,epoch,train_loss,train_accuracy,val_loss,val_accuracy,lr,batch_size,micro_batch_size,"
    "gradient_accumulation_steps,variance,variance_inner_product,variance_orthogonality,grad_norm_sq,noise_scale,"
    "next_batch_size,step_time,test_time,samples_per_second"
)


def test_a_log_file_gets_lines_while_nothing_is_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runlog, "QUIET_SECONDS", 0.0)
    options = ["--model=logistic", "--test_type=ip+orth", "--max_samples=96", "--batch_size=32", "--max_batch_size=32"]
    assert main.main([*options, f"--out_dir={tmp_path}", "--run_name=run", "--accelerator=cpu", "--devices=1"]) == 0
    output = capsys.readouterr()
    first, *lines = output.out.splitlines()
    assert "logistic (650 parameters) on digits (1,437 training samples)" in first and "θ = 1, ν = 1" in first
    progress = [line for line in lines if "samples/s" in line]
    assert len(progress) == 3 and progress[0].startswith("step      1  samples         32") and "left" in progress[0]
    assert output.err == ""
    assert (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0] == COLUMNS


def test_a_diverged_run_leaves_strict_json(tmp_path, capsys):
    options = ["--optimizer=sgd", "--learning_rate=1e30", "--max_samples=200", f"--out_dir={tmp_path}"]
    assert main.main([*options, "--run_name=run", "--accelerator=cpu", "--devices=1"]) == 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=lambda word: 1 / 0)
    assert summary["status"] == "diverged" and "not finite at step" in capsys.readouterr().out
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000


def test_long_training_curves_are_thinned_to_means():
    points = [(float(i), float(i % 2)) for i in range(10 * report.POINTS)]
    thinned = report._thinned(points)
    assert len(thinned) == report.POINTS
    assert all(y == 0.5 for _, y in thinned) and thinned[0][0] == 4.5
    assert report._thinned(points[: report.POINTS]) == points[: report.POINTS] and report._thinned([]) == []


def test_empty_cells_are_none(tmp_path):
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([["step", "val_loss"], [1, ""], [2, math.pi]])
    assert report.read_metrics(tmp_path) == {"step": [1.0, 2.0], "val_loss": [None, math.pi]}
