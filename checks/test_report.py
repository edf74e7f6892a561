"""Reports over runs: what is grouped, averaged, shown and skipped; the table's formats; the figures."""

import csv
import dataclasses
import io
import json
import os
import time

import numpy as np
import pytest
import yaml

import main
import report
from options.schema import Config
from runs import figures, results
from runs.results import Group

ROWS = ("step", "samples", "epoch", "train_loss", "val_loss", "val_accuracy", "batch_size", "step_time")
DEFAULTS = dataclasses.asdict(Config()) | {"data_dir": "data", "out_dir": "out"}
TINY = ["--model=logistic", "--max_samples=1600", "--eval_interval=5", "--eta=0.5", "--accelerator=cpu", "--devices=1"]


def write_run(folder, status="finished", steps=20, accuracy=0.9, measured=(), **options):
    """A run's folder as main.py leaves it; batch 10, a loss of 1/step, accuracy rising to `accuracy` by the third
    evaluation before the end."""
    folder.mkdir(parents=True)
    options = DEFAULTS | options
    (folder / "config.yaml").write_text(yaml.dump(options, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(ROWS)
        for step in range(1, steps + 1):
            validation = (0.1, accuracy * min(step / max(steps - 10, 5), 1)) if step % 5 == 0 else ("", "")
            writer.writerow([step, step * 10, step / 10, 1 / step, *validation, 10, 0.5])
    if status != "unfinished":
        summary = {
            "status": status,
            "steps": steps,
            "samples": 10 * steps,
            "mean_batch_size": 10.0,
            "final_batch_size": 10,
            "wall_time": 1.0,
            "measured_options": measured,
        }
        summary |= {"val_accuracy": accuracy, "val_loss": 0.1, "train_loss": 0.2, "samples_per_second": 20.0}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def mixed(tmp_path):
    """Two configurations, one of three seeds, one of one; and a run of each way to end badly."""
    for seed, accuracy in ((1, 0.96), (2, 0.97), (3, 0.98)):
        write_run(
            tmp_path / f"norm{seed}", seed=seed, eta=0.1, accuracy=accuracy, steps=20 * seed, run_name=f"norm{seed}"
        )
    write_run(tmp_path / "constant", seed=1, test=False, batch_size=64, eta=0.7, accuracy=0.5)
    write_run(tmp_path / "nested" / "diverged", status="diverged", seed=4, eta=0.1, accuracy=0.1, steps=7)
    write_run(tmp_path / "interrupted", status="interrupted", seed=5, eta=0.1, accuracy=0.2, steps=8)
    write_run(tmp_path / "killed", status="unfinished", seed=6, eta=0.1)
    return tmp_path


def report_on(capsys, *arguments):
    assert report.main([str(word) for word in arguments]) == 0
    return capsys.readouterr()


def test_seeds_are_averaged_and_only_finished_runs(mixed, capsys):
    table = list(csv.DictReader(io.StringIO(report_on(capsys, mixed, "--format=csv").out)))
    rows = {(row["configuration"], row["status"]): row for row in table}
    assert list(rows) == [
        ("constant 64", "finished"),
        *(("norm test, η = 0.1", status) for status in ("finished", "interrupted", "unfinished", "diverged")),
    ]
    norm = rows["norm test, η = 0.1", "finished"]
    assert (norm["n"], norm["seeds"]) == ("3", "1 2 3")
    assert float(norm["val accuracy [%]"]) == pytest.approx(97) and float(
        norm["val accuracy [%] std"]
    ) == pytest.approx(1)
    assert float(norm["steps"]) == 40 and float(norm["steps std"]) == 20
    assert float(rows["norm test, η = 0.1", "diverged"]["val accuracy [%]"]) == 10
    assert rows["constant 64", "finished"]["steps std"] == ""


def test_the_table_in_each_format(mixed, capsys):
    table = report_on(capsys, mixed).out
    assert table.startswith("7 runs in 2 configurations; all: model cnn, dataset digits")
    assert "97.00 ± 1.00" in table and "diverged (seed 4)" in table and "interrupted (seed 5)" in table
    markdown = report_on(capsys, mixed, "--format=markdown").out
    assert "| norm test, η = 0.1 | 3 " in markdown and "|---" in markdown.replace(":", "-").replace(" ", "")
    latex = report_on(capsys, mixed, "--format=latex").out
    assert latex.startswith("\\begin{tabular}{llrrrrrrrr}") and latex.endswith("\\end{tabular}\n")
    assert "norm test, $\\eta$ = 0.1" in latex and "97.00 $\\pm$ 1.00" in latex and "accuracy [\\%]" in latex


def test_steps_and_seconds_to_a_target(mixed, capsys):
    rows = list(csv.DictReader(io.StringIO(report_on(capsys, mixed, "--format=csv", "--target=0.97").out)))
    norm = next(row for row in rows if row["status"] == "finished" and "norm" in row["configuration"])
    assert norm["steps to 97 % n"] == "2"  # seed 1 comes to 0.96
    assert float(norm["steps to 97 %"]) == 50 and float(norm["seconds to 97 %"]) == 25  # at steps 40 and 60
    assert float(norm["samples to 97 %"]) == 500  # of 10 a step
    assert "50 ± 14 (2 of 3)" in report_on(capsys, mixed, "--target=0.97").out


def test_a_target_is_reached_by_the_mean_of_three_evaluations(tmp_path):
    """0.5, 0.9, 0.8, 1.0, 1.0: one alone passes 0.85 at the second, the mean of three at the fourth."""
    rows = {"val_accuracy": [0.5, None, 0.9, 0.8, 1.0, 1.0], "step": range(6), "samples": range(6), "seconds": range(6)}
    run = results.Run(tmp_path, {}, {"objective": "val_accuracy"})
    run.__dict__["metrics"] = rows
    assert run.reached(0.85)["step"] == 4 and run.reached(0.95) is None
    assert run.reached(0.5)["step"] == 0 and run.reached(0.7)["step"] == 2  # of fewer, where there are not three


def test_modelled_time_for_a_knee(mixed, capsys):
    """samples + P · steps, to the target where there is one, else to the end: by hand from 10 samples a step."""
    rows = list(csv.DictReader(io.StringIO(report_on(capsys, mixed, "--format=csv", "--knee=30,100").out)))
    norm = next(row for row in rows if row["status"] == "finished" and "norm" in row["configuration"])
    assert float(norm["samples + 30·steps"]) == 40 * (10 + 30) and float(norm["samples + 100·steps"]) == 40 * 110
    rows = list(csv.DictReader(io.StringIO(report_on(capsys, mixed, "--format=csv", "--knee=30", "--target=0.97").out)))
    norm = next(row for row in rows if row["status"] == "finished" and "norm" in row["configuration"])
    assert float(norm["samples + 30·steps to 97 %"]) == 50 * (10 + 30)
    with pytest.raises(SystemExit):
        report.main([str(mixed), "--knee=0"])
    assert "positive numbers of samples" in capsys.readouterr().err


def test_choosing_by_option(mixed, capsys):
    assert "7 runs" in report_on(capsys, mixed, "--where", "model=cnn").out
    assert "6 runs in 1 configurations" in report_on(capsys, mixed, "--where=test=True", "--where=eta=1e-1").out
    assert "1 runs" in report_on(capsys, mixed / "norm1", mixed / "norm1").out  # given twice, counted once


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--where=mdel=cnn"], "did you mean 'model'"),
        (["--where=model"], "OPTION=VALUE"),
        (["--where=model=resnet18"], "no run is left"),
        (["--target=98"], "between 0 and 1"),
        (["--figures=x", "--where=seed=9"], "no run is left"),
        (["nowhere"], "nowhere is not a folder"),
    ],
)
def test_refused_in_one_line(mixed, capsys, arguments, words):
    assert report.main([str(mixed), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_a_folder_without_runs(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2 and "has no run in it" in capsys.readouterr().err


def test_damaged_folders_are_named_and_passed_over(mixed, capsys):
    damaged = {name: write_run(mixed / name, seed=20 + i, eta=0.1) for i, name in enumerate("abcdef")}
    (damaged["a"] / "summary.json").write_text('{"status": "fini')
    (damaged["b"] / "config.yaml").write_text("eta: [")
    (damaged["c"] / "config.yaml").write_text("")
    (damaged["d"] / "metrics.csv").unlink()
    (damaged["e"] / "config.yaml").unlink()
    metrics = damaged["f"] / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("0.5\n", "x\n"))
    told = report_on(capsys, mixed, "--format=csv", "--target=0.9")
    assert all(f"skipped: {folder}" in told.err for folder in damaged.values())
    assert len(told.err.splitlines()) == len(damaged) and ",1 2 3," in told.out  # and no seed of theirs
    for name in list(damaged):
        assert f" {20 + 'abcdef'.index(name)}," not in told.out


def test_a_row_cut_short_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.csv", "a") as file:
        file.write("21,210,2.1,0.0")
    assert results.read_metrics(folder)["step"] == list(range(1, 21))


def test_the_newest_of_two_runs_with_one_seed(tmp_path, capsys):
    for name, age, accuracy in (("new", 0, 0.9), ("old", 100, 0.1)):
        folder = write_run(tmp_path / name, seed=1, accuracy=accuracy)
        os.utime(folder / "summary.json", times=(time.time() - age,) * 2)
    told = report_on(capsys, tmp_path)
    assert "90.00" in told.out and f"skipped: {tmp_path / 'old'}" in told.err


def test_names_tell_what_differs_and_no_more(tmp_path):
    same = {"eta": 0.1, "max_samples": 5000}
    stages = {"test": False, "stagewise_ramp_up": True, "global_batch_sizes": [16, 64]}
    ramp = {"test": False, "linear_ramp_up": True, "linear_ramp_up_increment": 3, "max_batch_size": 64}
    for name, options in {
        "a": {**same, "test_gradients": "micro_batch"},
        "b": {**same, "test_gradients": "ghost"},
        "c": {**same, "test_gradients": "ghost", "test_type": "ip+orth", "theta": 0.5, "nu": 2.0},
        "d": {**same, **stages},
        "e": {**same, **ramp, "learning_rate": 0.5},
        "f": {**same, "test": False, "batch_size": 128},
        "g": {**same, "test": False, "batch_size": 128, "eta": 9.0, "seed": 7},  # η is read by nobody
    }.items():
        write_run(tmp_path / name, **options)
    groups, _ = results.group(results.find([tmp_path])[0])
    assert [entry.name for entry in groups] == [
        "augmented inner product test, θ = 0.5, ν = 2, learning rate 0.01, test gradients ghost",
        "constant 128, learning rate 0.01",
        "linear to 64, 3 a step, learning rate 0.5",
        "norm test, η = 0.1, learning rate 0.01, test gradients ghost",
        "norm test, η = 0.1, learning rate 0.01, test gradients micro_batch",
        "stagewise 16, 64, learning rate 0.01",
    ]
    assert len(groups[1].finished) == 2


def test_what_a_run_measured_itself_tells_no_configurations_apart(tmp_path):
    """`auto` took 512 in one run and 1024 in the other; a third was told its size."""
    for seed, size in ((1, 512), (2, 1024)):
        folder = tmp_path / f"seed{seed}"
        write_run(folder, seed=seed, max_micro_batch_size=size, measured=["max_micro_batch_size"])
    write_run(tmp_path / "told", seed=3, max_micro_batch_size=512)
    groups, left_out = results.group(results.find([tmp_path])[0])
    assert {(entry.name, len(entry.finished)) for entry in groups} == {
        ("norm test, η = 1, max micro batch size auto", 2),
        ("norm test, η = 1, max micro batch size 512", 1),
    }
    assert not left_out


def test_an_option_that_came_later_has_its_default(tmp_path):
    old, new = (write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("old", "new")))
    options = yaml.safe_load((old / "config.yaml").read_text())
    del options["test_groups"], options["grad_clip"]
    (old / "config.yaml").write_text(yaml.safe_dump(options))
    groups, _ = results.group(results.find([tmp_path])[0])
    assert [len(entry.finished) for entry in groups] == [2]


def test_mean_and_band_over_seeds(tmp_path):
    """Loss 1/step and batch sizes that double at step 3 in one seed, at step 5 in the other."""
    read = []
    for seed, doubled in ((1, 3), (2, 5)):
        run = results.read_run(write_run(tmp_path / str(seed), seed=seed, steps=10))
        run.metrics["batch_size"] = [20.0 if step >= doubled else 10.0 for step in run.metrics["step"]]
        run.metrics["train_loss"] = [seed * loss for loss in run.metrics["train_loss"]]
        read.append(run)
    loss = figures.over_seeds(read, "step", "train_loss", log=False)
    assert (loss.x[0], loss.x[-1]) == (1, 10)
    np.testing.assert_allclose([loss.low[-1], loss.mean[-1], loss.high[-1]], [0.1, 0.15, 0.2])
    batch = figures.over_seeds(read, "step", "batch_size", log=True)
    between = (batch.x > 2.01) & (batch.x < 3.99)
    assert set(batch.mean[between]) == {15.0} and batch.mean[0] == 10 and batch.mean[-1] == 20
    assert read[0].metrics["seconds"] == [0.5 * step for step in range(1, 11)]  # step_time is 0.5 s
    assert figures.over_seeds([], "step", "train_loss", log=False) is None


def test_figures_show_every_configuration(mixed):
    found, _ = results.find([mixed])
    groups, _ = results.group(found)
    figure = figures.compare(groups, "seconds", "val_accuracy")
    loss, val_loss, accuracy, batch = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == list(figures.compared("val_accuracy").values())
    assert batch.get_xlabel() == accuracy.get_xlabel() == "training time [s]"
    names = [entry.name for entry in groups]
    assert [line.get_label() for line in accuracy.get_lines() if not line.get_label().startswith("_")] == names
    assert len(accuracy.collections) == 1  # the band of the configuration of three seeds
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*names, "did not finish"]
    crosses = [line for line in loss.get_lines() if line.get_marker() == "x"]
    assert len(crosses) == 3
    one, three = (line for line in accuracy.get_lines() if line.get_label() in names)
    assert one.get_ydata()[-1] == 0.5 and three.get_xdata()[-1] == 10  # the shortest of three ends after 20 · 0.5 s
    assert one.get_color() != three.get_color() and one.get_linestyle() != three.get_linestyle()
    styles = [figures.style(i) for i in range(figures.MOST_CONFIGURATIONS)]
    assert len({tuple(look.values()) for look in styles}) == len(styles)
    assert len({(look["color"], look["marker"]) for look in styles}) == len(styles)  # points have no dashes


def test_trade_off_joins_the_constants(tmp_path):
    """Steps against samples to the target, a point a configuration; constant batches in the order of their steps."""
    for i, (batch_size, steps) in enumerate(((64, 40), (16, 60), (256, 20))):
        write_run(tmp_path / str(i), seed=1, test=False, batch_size=batch_size, steps=steps, accuracy=0.9)
    write_run(tmp_path / "norm", seed=1, eta=0.1, steps=30, accuracy=0.9)
    groups, _ = results.group(results.find([tmp_path])[0])
    (axes,) = figures.trade_off(groups, 0.9, "val_accuracy").axes
    (line,) = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert list(line.get_xdata()) == [20, 40, 60] and list(line.get_ydata()) == [200, 400, 600]
    assert axes.get_xlabel().startswith("steps to 90 %") and axes.get_ylabel() == "samples to 90 %"


def test_noise_scale_of_earlier_runs_is_not_drawn(mixed):
    """Their column of that name had V/‖ḡ‖² of one batch."""
    (run, *_), _ = results.find([mixed / "norm1"])
    assert set(run.metrics["noise_scale"]) == {None}


def test_pareto_picture(mixed):
    groups, _ = results.group(results.find([mixed])[0])
    figure = figures.pareto(groups, 0.96, "val_accuracy")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "steps to 96 % validation accuracy" and axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["norm test, η = 0.1"]
    assert axes.texts[0].xy == (40, 20)  # the last evaluations of 20, 40 and 60 steps
    assert "constant 64 (0 of 1)" in figure.get_supxlabel()
    figures.pareto([Group("none", [], [])], 0.5, "val_accuracy")  # nothing to draw, and no error


@pytest.mark.long
def test_figures_of_real_runs(tmp_path, capsys):
    for name, *options in (("1", "--seed=1"), ("2", "--seed=2"), ("constant", "--test=False", "--batch_size=64")):
        assert main.main([*TINY, *options, f"--out_dir={tmp_path / 'out'}", f"--run_name={name}"]) == 0
    capsys.readouterr()
    told = report_on(capsys, tmp_path / "out", f"--figures={tmp_path / 'figures'}", "--target=0.3")
    expected = {
        f"{name}.{suffix}"
        for name in (*figures.FILES.values(), "pareto", "trade_off", "noise_scale")
        for suffix in ("png", "pdf")
    }
    files = {file.name: file for file in (tmp_path / "figures").iterdir()}
    assert set(files) == expected and len(told.err.splitlines()) == len(expected)
    assert all(file.stat().st_size > 5_000 for file in files.values())
    assert files["pareto.pdf"].read_bytes().startswith(b"%PDF")
    assert "constant 64" in told.out and "norm test, η = 0.5" in told.out


def test_more_configurations_than_a_figure_can_show(tmp_path, capsys):
    for i in range(figures.MOST_CONFIGURATIONS + 1):
        write_run(tmp_path / f"run{i}", eta=0.1 + i)
    assert report.main([str(tmp_path), f"--figures={tmp_path / 'figures'}"]) == 2
    told = capsys.readouterr()
    assert "choose at most 20 by --where" in told.err and "η = 20.1" in told.out  # the table is there
    assert not (tmp_path / "figures").exists()


def test_five_hundred_runs(tmp_path, capsys):
    for i in range(500):
        write_run(tmp_path / f"run{i}", eta=0.1 * (1 + i % 10), seed=i)
    assert "500 runs in 10 configurations" in report_on(capsys, tmp_path).out


def test_last_epoch_loss():
    """Rows of 10 samples in epochs of 20: the last epoch is the last two rows; a short run is all of it."""
    metrics = {"epoch": [0.5, 1.0, 1.5], "samples": [10.0, 20.0, 30.0], "train_loss": [9.0, 4.0, 2.0]}
    assert results.last_epoch_loss(metrics) == 3
    assert results.last_epoch_loss({name: values[:1] for name, values in metrics.items()}) == 9
    assert results.last_epoch_loss({}) is None


def test_long_training_curves_are_thinned_to_means():
    points = [(float(i), float(i % 2)) for i in range(10 * figures.POINTS)]
    thinned = figures._thinned(points)
    assert len(thinned) == figures.POINTS
    assert all(y == 0.5 for _, y in thinned) and thinned[0][0] == 4.5
    assert figures._thinned(points[: figures.POINTS]) == points[: figures.POINTS] and figures._thinned([]) == []
