"""The held-out comparison: its arithmetic by hand, its data, and all of it in small."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from benchmarks import comparison, held_out, held_out_problems, held_out_tables
from benchmarks.held_out import Course, Method, Problem
from checks.conftest import ROOT, forks


def test_arrival_between_two_evaluations_by_hand():
    """Means of three are 2, 3, 5 at samples 30, 40, 50: 4 is passed halfway between the last two."""
    values = [1.0, 2.0, 3.0, 4.0, 8.0]
    rows = [[i, 10.0 * i, value, i / 2, 4.0 * i] for i, value in enumerate(values, start=1)]
    course = Course(rows, larger_is_better=True, end=5.0)
    assert course.means() == [2, 3, 5]
    assert course.arrival(4.0)[:2] == [4.5, 45.0]
    assert course.arrival(1.5) == rows[2] and course.arrival(6.0) is None
    assert course.cost(4.0, knee=100) == pytest.approx(45 + 100 * 4.5 + 0.3 * (18 + 100 * 2.25))
    falling = Course([[i, 10.0 * i, -value, 0, 0] for i, value in enumerate(values, start=1)], False, -5.0)
    assert falling.arrival(-4.0)[:2] == [4.5, 45.0] and falling.order(-6.0) == (math.inf, -5.0)
    assert Course(rows, True, None).cost(1.5, 30) == math.inf


def test_the_least_of_some_by_counting():
    values = [5.0, 1.0, 3.0, 9.0]
    for k in (1, 2, 3, 4):
        expected = np.mean([min(chosen) for chosen in itertools.combinations(values, k)])
        assert held_out_tables.best_of(values, k) == pytest.approx(expected)
    assert held_out_tables.best_of(values, 9) == 1.0


def test_an_interval_has_the_choice_of_the_constant_in_it():
    """By a bootstrap written out."""
    generator = np.random.default_rng(0)
    names = ("16, constant rate, rate 0.1", "32, constant rate, rate 0.1", "steady")
    of_line = {name: np.exp(generator.normal(0, 0.3, 8)) for name in names}
    seeds = held_out_tables.draws("teacher")[:50]
    found = held_out_tables.log_ratios(of_line, "steady", seeds)
    for row, value in zip(seeds, found):
        means = {name: np.mean([math.log(own[seed]) for seed in row]) for name, own in of_line.items()}
        assert value == pytest.approx(means["steady"] - min(means[name] for name in names[:2]))
    assert list(seeds[0]) == list(range(8)) and not np.array_equal(seeds[1], seeds[2])


def test_data_sets_keep_the_test_set_apart(tmp_path, monkeypatch):
    """Of a training set the last samples are evaluated on; of `test` none is in either part."""
    monkeypatch.setattr(held_out_problems, "CACHE", tmp_path / "made")
    monkeypatch.setattr(held_out_problems, "HELD_OUT", 20)
    images = np.random.default_rng(0).integers(256, size=(90, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(90) % 10
    np.savez(tmp_path / "cifar10.npz", x_train=images[:60], y_train=labels[:60], x_test=images[60:], y_test=labels[60:])
    for name in ("small_cifar", "teacher", "torch_sources"):
        make = getattr(held_out_problems, name)
        usual, test = make(tmp_path), make(tmp_path, test=True)
        assert len(usual.train) == len(test.train) and torch.equal(usual.train[5][0], test.train[5][0])
        seen = {own[0].numpy().tobytes() for own in (usual.val[i] for i in range(20))}
        last = {own[0].numpy().tobytes() for own in (test.val[i] for i in range(20))}
        assert not seen & last and len(usual.val) in (20, 1024)
    assert (tmp_path / "made" / "cifar.pt").exists()
    small = held_out_problems.small_cifar(tmp_path)
    corner = images[0, :2, :2].astype(float).mean((0, 1))
    assert np.allclose(small.train[0][0][:, 0, 0], corner.round(), atol=1)


@pytest.mark.long
def test_words_of_packages():
    found = held_out_problems.packages(None)
    words, label = found.train[0]
    assert words.shape == (48,) and 0 <= label < 20 and len(found.val) == 2500


@pytest.fixture
def in_small(tmp_path, monkeypatch):
    shared = {"dataset": "benchmarks.held_out_problems:teacher", "model": "benchmarks.held_out_problems:student"}
    shared |= {"optimizer": "sgd", "momentum": 0.9, "max_samples": 4000, "eval_samples": 200, "log_interval": 50}
    problem = Problem({**shared, "max_micro_batch_size": 256}, 32, 0.02)
    for module in (held_out, held_out_tables):
        monkeypatch.setattr(module, "PROBLEMS", {"small": problem})
        monkeypatch.setattr(module, "KNEES", (30,))
        monkeypatch.setattr(module, "SEEDS", range(1, 3))
        monkeypatch.setattr(module, "KEPT", tmp_path / "results")
    monkeypatch.setattr(held_out, "DOUBLINGS", 2)
    monkeypatch.setattr(held_out, "TRIALS", (1.0,))
    monkeypatch.setattr(held_out, "FINALISTS", 1)
    monkeypatch.setattr(
        held_out, "STYLES", {name: held_out.STYLES[name] for name in ("constant rate", "averaged so far")}
    )
    monkeypatch.setattr(comparison, "_forks", forks)
    held_out_tables.record.cache_clear()
    yield tmp_path
    held_out_tables.record.cache_clear()


@pytest.mark.long
def test_the_protocol_in_small(in_small, capsys):
    words = ["small", "-j", "2", f"--out_dir={in_small / 'out'}", f"--results={in_small / 'results'}"]
    held_out.main(words)
    kept = json.loads((in_small / "results" / "small.json").read_text())
    assert str(in_small) not in (in_small / "results" / "small.json").read_text()
    assert kept["targets"][0] > kept["targets"][1] > held_out_problems.NOISE**2
    by_rate: dict[tuple, dict] = {}
    for entry in kept["sweep"]:
        if not entry["knee"]:
            by_rate.setdefault((entry["size"], entry["style"]), {})[entry["rate"]] = entry["costs"][1][0]
    assert {size for size, _ in by_rate} == {32, 64} and ("averaged so far" in {style for _, style in by_rate})
    for rates in by_rate.values():  # both neighbours of the best were tried
        best = min(rates, key=lambda rate: rates[rate] or math.inf)
        assert rates[best] is None or {best / 2, best * 2} <= set(rates)
    steady = [entry for entry in kept["final"] if entry["knee"]]
    assert [entry["seed"] for entry in steady] == [1, 2] and all(entry["rows"][-1][3] > 0 for entry in steady)
    assert all(0.2 < entry["test"] < 1.5 for entry in kept["final"])
    found = sorted(path.name for path in (in_small / "out").rglob("summary.json"))
    held_out.main([*words, "--rule=mine", "--max_growth=2"])
    again = json.loads((in_small / "results" / "small.json").read_text())
    assert len(again["final"]) == len(kept["final"]) + 2
    assert len(list((in_small / "out").rglob("summary.json"))) == len(found) + 2
    table = held_out_tables.leaderboard()
    assert "| `mine`" in table and "| `steady`" in table
    line = next(line for line in held_out_tables.ratios().splitlines() if line.startswith("| small"))
    assert "–" in line and "rate 0." in line
    assert "`mine`" in held_out_tables.over_steady() and "small" in held_out_tables.over_steady()
    assert "| 30" in held_out_tables.equal_tuning() and "`steady`, P = 30" in held_out_tables.tests_read_once()
    held_out_tables.draw(in_small / "profile.png")
    assert (in_small / "profile.png").stat().st_size > 10_000


def test_the_page_has_the_tables_of_what_is_kept():
    """`python -m benchmarks.held_out_tables` would change nothing; its table of problems is the program's."""
    held_out_tables.record.cache_clear()
    for name in held_out_tables.PAGES:
        page = (ROOT / name).read_text()
        assert held_out_tables.filled(page, held_out_tables.KINDS) == page, "run: python -m benchmarks.held_out_tables"
    assert set(held_out_tables.DESCRIBED) == set(held_out.PROBLEMS)
    for name, problem in held_out.PROBLEMS.items():
        line = next(line for line in page.split("## Problems")[1].splitlines() if line.startswith(f"| `{name}`"))
        assert f"{problem.samples:,}" in line and line.endswith(f"| {problem.smallest} |")


def test_the_sentence_to_take_away():
    """README's words are those of what is kept: means over all lines, and after two trials each."""
    held_out_tables.record.cache_clear()
    words = " ".join((ROOT / "README.md").read_text().partition("**To take away:**")[2].split())
    tables = held_out_tables
    for problems, of in ((tables.held_out(), "on the {} of three held-out"), (tables.CHANGED_ON, "on those by which")):
        known = [problem for problem in problems if problem in tables.measured()]
        means = [math.exp(np.mean([own[0] for own in tables.of_rule("steady", P, known)])) for P in held_out.KNEES]
        assert "{:.2f}, {:.2f} and {:.2f} times".format(*means) in words
        assert of.format(("none", "one", "two", "all")[len(known)]) in words
    tuned = [line.split("|")[3].strip() for line in tables.equal_tuning().splitlines()[2:]]
    assert "it takes {}, {} and {} times.".format(*tuned) in words


def test_every_run_is_one_that_the_program_takes():
    from options import command_line

    for problem in held_out.PROBLEMS.values():
        methods = [Method(64, style) for style in held_out.STYLES] + [problem.steady(300)]
        for method in methods:
            options = method.options(problem)
            parsed = command_line.parse([f"--{name}={comparison._word(value)}" for name, value in options.items()])
            assert parsed.batch_size == method.size and (parsed.recipe == "steady") == bool(method.knee)
