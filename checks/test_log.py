"""What a run writes as it goes: columns, plain lines without a terminal, strict JSON, TensorBoard's HParams."""

import csv
import json
import math

import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

import main
from checks.conftest import FIXED_CUT, draw_curves
from runs import figures, results, texts
from runs import log as runlog


def test_a_log_file_gets_lines_while_nothing_is_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runlog, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr("launch.processes.LONG", 60.0)  # whatever else the machine does
    options = ["--model=logistic", "--test_type=ip+orth", "--max_samples=96", "--batch_size=32", "--max_batch_size=32"]
    options += [FIXED_CUT]
    assert main.main([*options, f"--out_dir={tmp_path}", "--run_name=run", "--accelerator=cpu", "--devices=1"]) == 0
    output = capsys.readouterr()
    first, *lines = output.out.splitlines()
    assert "logistic (650 parameters) on digits (1,437 training samples)" in first and "θ = 1, ν = 1" in first
    progress = [line for line in lines if "samples/s" in line]
    assert len(progress) == 3 and progress[0].startswith("step      1  samples         32") and "left" in progress[0]
    assert output.err == ""
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    i = runlog.COLUMNS.index("METRICS")
    assert header == [*runlog.COLUMNS[:i], "train_accuracy", "val_loss", "val_accuracy", *runlog.COLUMNS[i + 1 :]]


def test_a_diverged_run_leaves_strict_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "curves", draw_curves)
    options = ["--optimizer=sgd", "--learning_rate=1e30", "--max_samples=200", f"--out_dir={tmp_path}"]
    assert main.main([*options, "--run_name=run", "--accelerator=cpu", "--devices=1"]) == 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=lambda word: 1 / 0)
    assert summary["status"] == "diverged" and "not finite at step" in capsys.readouterr().out
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000


def test_empty_cells_are_none(tmp_path):
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([["step", "val_loss"], [1, ""], [2, math.pi]])
    assert results.read_metrics(tmp_path) == {"step": [1.0, 2.0], "val_loss": [None, math.pi]}


def test_tensorboard_has_the_options_with_their_results(tmp_path):
    """The HParams view of TensorBoard's own reader: options and final metrics, in the run itself; and the card."""
    options = ["--model=logistic", "--max_samples=320", "--eta=0.25", f"--out_dir={tmp_path}", "--accelerator=cpu"]
    for seed in (1, 2):
        assert main.main([*options, "--devices=1", f"--seed={seed}", f"--run_name=run{seed}"]) == 0
    assert [path.name for path in sorted((tmp_path / "run1").iterdir()) if path.is_dir()] == ["checkpoints"]
    summary = json.loads((tmp_path / "run1" / "summary.json").read_text())
    rows = hparams_view(tmp_path)
    assert set(rows) == {"run1", "run2"}
    hparams, metrics = rows["run1"]
    assert hparams["eta"] == 0.25 and hparams["model"] == "logistic" and hparams["status"] == "finished"
    assert metrics["final/val_accuracy"] == pytest.approx(summary["val_accuracy"])
    assert metrics["final/steps"] == summary["steps"] and rows["run2"][0]["seed"] == 2
    events = EventAccumulator(str(tmp_path / "run1")).Reload()
    card = events.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    band = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"sample/noise_scale_low" in band and b"sample/noise_scale_high" in band  # a chart with a margin
    assert "| command |" in card and "| torch | `" in card and str(summary["git_commit"]) in card


def hparams_view(folder):
    """What TensorBoard's HParams plugin answers its own page: run → (options, metrics)."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider, logdir=str(folder)))
    experiment = get_experiment.Handler(RequestContext(), context, "", api_pb2.GetExperimentRequest()).run()
    names = [metric.name for metric in experiment.metric_infos]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=100,
        allowed_statuses=api_pb2.Status.values(),
        col_params=[api_pb2.ColParams(metric=name) for name in names],
    )
    answer = list_session_groups.Handler(RequestContext(), context, "", request).run()
    view = {}
    for group in answer.session_groups:
        options = {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()}
        view[group.sessions[0].name] = (options, {entry.name.tag: entry.value for entry in group.metric_values})
    return view


@pytest.mark.parametrize(
    "noise_scale, knee, best, words",
    [
        (None, None, None, ""),
        (0.47, 0.36, 1, "about 1: noise scale 0.47, knee 0.36; above that batches do not save time here"),
        (1834.2, 179.0, 573, "about 573: noise scale 1,834, knee 179; above that batches do not save time here"),
        (0.0, 37.0, 1, "1 or more: noise scale 0, samples cost next to nothing"),
        (12.0, 5000.0, 245, "120 or more: noise scale 12, samples cost next to nothing"),
    ],
)
def test_quickest_batch_in_words(noise_scale, knee, best, words):
    summary = {"noise_scale": noise_scale, "knee": knee, "quickest_batch_size": best}
    assert texts.quickest_text(summary) == words


def test_the_price_of_the_sizes(tmp_path):
    """Samples and time against the least possible and against b₀, by walking through a run a sample at a time."""
    metrics = {
        "samples": [80.0, 160.0, 480.0, 800.0],
        "batch_size": [8.0, 8.0, 32.0, 32.0],
        "noise_scale": [None, 10.0, None, 40.0],
        "noise_scale_low": [None, None, None, 30.0],
    }
    found = results.price(metrics, critical=2.0, initial=8, knee=30.0)
    worth = 160 / (1 + 8 / 20) + 320 / (1 + 32 / 20) + 320 / (1 + 32 / 80)
    by_eight = 160 + 320 / (1 + 32 / 20) * (1 + 8 / 20) + 320 / (1 + 32 / 80) * (1 + 8 / 80)
    steps = 20 + 640 / 32
    assert found == pytest.approx(
        {
            "samples_over_least": 800 / worth,
            "samples_over_initial": 800 / by_eight,
            "time_over_initial": (800 + 30 * steps) / (by_eight + 30 * by_eight / 8),
        }
    )
    assert texts.price_text(found) == (
        "1.72 times the samples that the smallest batches would need; "
        "1.37 times those of --batch_size throughout, in 0.72 of its time (modelled)"
    )
    without = results.price(metrics, 2.0, 8, None)
    assert without["time_over_initial"] is None and texts.price_text(without).endswith("throughout (modelled)")
    for name in ("noise_scale", "noise_scale_low"):
        nothing = results.price(metrics | {name: [None] * 4}, 2.0, 8, 30.0)
        assert set(nothing.values()) == {None} and texts.price_text(nothing) == ""
    same = results.price(metrics | {"batch_size": [8.0] * 4}, 2.0, 8, 30.0)
    assert same["samples_over_initial"] == pytest.approx(1) and texts.price_text(same) == ""


def test_the_noise_scale_has_a_band():
    """In the figure, as far as it is known; its axis is not stretched by an end that hardly is."""
    axes = Figure().subplots()
    metrics = {"samples": [1.0, 2.0, 3.0], "batch_size": [8.0, 8.0, 16.0], "noise_scale": [10.0, None, 20.0]}
    metrics |= {"noise_scale_low": [5.0, None, 15.0], "noise_scale_high": [None, None, 30.0]}
    figures._band(axes, metrics, "samples")
    (band,) = axes.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices}
    assert {(1.0, 5.0), (3.0, 15.0), (3.0, 30.0), (1.0, 2 * 30.0)} <= corners
    assert axes.get_ylim() == (8 / 1.5, 30.0)
    shown = dict(figures.panels(["train_loss", "val_loss", "lr", "batch_size", "noise_scale"]))
    assert shown["batch size"] == {"batch size": "batch_size", "noise scale": "noise_scale"}
    assert dict(figures.panels(["batch_size"]))["batch size"] == {"batch size": "batch_size"}
