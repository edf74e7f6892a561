"""The batch size and the learning rate as a whole run has them: rules, monitor, resuming in the middle."""

import contextlib
import csv
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import main
import tests
from adadagrad import control
from adadagrad.gradients.ghost_norms import GhostNorms
from options import command_line
from training import tuner

TINY = ["--model=logistic", "--accelerator=cpu", "--devices=1", "--max_micro_batch_size=256", "--eval_interval=1000"]
TIMES = {"step_time", "test_time", "samples_per_second"}


def run(out_dir: Path, name: str, *options: str) -> list[dict[str, str]]:
    """The rows of a run, without times."""
    assert main.main([*TINY, f"--out_dir={out_dir}", f"--run_name={name}", *options]) == 0
    with open(out_dir / name / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def weights(out_dir: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(out_dir / name / "model.pt", weights_only=True)


def numbers(rows: list[dict[str, str]], column: str) -> list[float]:
    return [float(row[column]) for row in rows]


SMOOTHED = ["--eta=0.5", "--statistics=unbiased", "--smoothing=300", "--lr_scaling=adascale", "--max_growth=2"]
SMOOTHED += ["--batch_size_multiple=4", "--optimizer=sgd", "--decay_lr=False"]


def test_resumed_in_the_middle_of_smoothing_and_patience(tmp_path):
    """Bit for bit the run that was never stopped: rows and weights."""
    options = [*SMOOTHED, "--training_type=iter", "--checkpoint_interval=7", "--keep_checkpoints=9"]
    whole = run(tmp_path, "whole", *options, "--max_iters=24")
    first = tmp_path / "whole" / "checkpoints" / "step-00000007.pt"
    again = run(tmp_path, "again", *options, "--max_iters=24", f"--resume={first}")
    assert again == whole and len(whole) == 24
    sizes = numbers(whole, "batch_size")
    assert sizes[-1] > sizes[7] and all(size % 4 == 0 for size in sizes)
    assert max(numbers(whole, "lr_factor")) > 1 and any(row["noise_scale"] for row in whole)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(tmp_path, "whole").values(), weights(tmp_path, "again").values())
    )


def test_resumed_under_ddp_on_one_device(tmp_path):
    """The first step of a continuation finds its gradients where the others do, and adds up inner products so."""
    options = ["--strategy=ddp", "--model=checks.test_pairs:plain", "--test_type=ip", "--test_gradients=micro_batch"]
    options += ["--training_type=iter", "--max_iters=12", "--checkpoint_interval=2", "--keep_checkpoints=9"]
    whole = run(tmp_path, "whole", *options)
    for step in (4, 8, 10):
        checkpoint = tmp_path / "whole" / "checkpoints" / f"step-{step:08}.pt"
        assert run(tmp_path, f"from-{step}", *options, f"--resume={checkpoint}") == whole


def test_resumed_after_the_estimator_has_given_way(tmp_path, monkeypatch):
    """At the second measured step ghost is found to be wrong; a continuation does not begin with it again."""
    right = GhostNorms._norms_again
    monkeypatch.setattr(GhostNorms, "_norms_again", lambda self, *a: right(self, *a) * (1 if self.uncovered else 4))
    options = ["--test_type=norm", "--training_type=iter", "--max_iters=9", "--checkpoint_interval=4"]
    whole = run(tmp_path, "whole", *options, "--keep_checkpoints=9")
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000004.pt"
    again = run(tmp_path, "again", *options, "--keep_checkpoints=9", f"--resume={checkpoint}")
    assert again == whole and [i for i, row in enumerate(whole) if row["variance"] == "nan"] == [1]


@pytest.mark.parametrize("extra", [[], ["--monitor_interval=2"]], ids=["plain", "monitored"])
def test_monitor_leaves_no_trace(tmp_path, extra):
    """The same statistics in runs without a test; the weights are bit for bit those without it."""
    common = ["--test=False", "--batch_size=32", "--max_samples=640"]
    plain = run(tmp_path, "plain", *common)
    watched = run(tmp_path, "watched", *common, *extra)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(tmp_path, "plain").values(), weights(tmp_path, "watched").values())
    )
    assert [bool(row["variance"]) for row in watched] == [bool(extra) and i % 2 == 0 for i in range(20)]
    assert numbers(plain, "train_loss") == numbers(watched, "train_loss")


def test_monitor_of_a_network_with_batch_norm(tmp_path, capsys):
    """It watches the training pass in pieces, and says so; a measured batch has at least `test_groups` of them."""
    options = ["--model=checks.fault_drill:Net", "--test=False", "--batch_size=32", "--max_samples=128"]
    rows = run(tmp_path, "norm", *options, "--monitor_interval=2", "--test_groups=4")
    assert [row["gradient_accumulation_steps"] for row in rows] == ["4", "1", "4", "1"]
    assert [bool(row["variance"]) for row in rows] == [True, False, True, False]
    assert "its statistics come from test_gradients=micro_batch" in capsys.readouterr().out


@pytest.mark.parametrize("test_gradients", ["ghost", "micro_batch"])
@pytest.mark.parametrize("test_type", ["norm", "ip"])
def test_modules_add_up_to_the_whole(tmp_path, test_gradients, test_type):
    """modules.csv has every module in every measured step; sums over modules are the row's; a resumed run goes on."""
    options = [f"--test_gradients={test_gradients}", f"--test_type={test_type}", "--monitor_modules=True"]
    options += ["--model=cnn", "--batch_size=24", "--test_interval=2", "--training_type=iter"]
    options += ["--max_iters=6", "--checkpoint_interval=3", "--keep_checkpoints=9", "--max_batch_size=64"]
    rows = run(tmp_path, "whole", *options)
    with open(tmp_path / "whole" / "modules.csv", newline="") as file:
        modules = list(csv.DictReader(file))
    for row in rows:
        own = [entry for entry in modules if entry["step"] == row["step"]]
        assert len({entry["module"] for entry in own}) == len(own) == (3 if row["variance"] else 0)
        for column in ("variance", "grad_norm_sq") if own else ():
            assert sum(numbers(own, column)) == pytest.approx(float(row[column]), rel=1e-4)
    first = tmp_path / "whole" / "checkpoints" / "step-00000003.pt"
    run(tmp_path, "again", *options, f"--resume={first}")
    assert (tmp_path / "again" / "modules.csv").read_bytes() == (tmp_path / "whole" / "modules.csv").read_bytes()


def test_seesaw_and_its_learning_rate(tmp_path):
    """b = b₀ · peak/rate of the schedule, and the rate times √(b/b₀), never above max_lr."""
    rows = run(
        tmp_path, "seesaw", "--test=False", "--seesaw_ramp_up=True", "--scheduler=linear", "--max_samples=4000",
        "--learning_rate=0.1", "--batch_size=16", "--max_batch_size=256", "--max_lr=0.09",
    )  # fmt: skip
    sizes, samples, rates = (numbers(rows, name) for name in ("batch_size", "samples", "lr"))
    assert sizes[0] == 16 and sizes[-1] == 256
    before = 0.0
    for size, at, rate in zip(sizes, samples, rates):
        left = 1 - before / 4000
        assert abs(size - min(max(16 / left, 16), 256)) <= 1 if left > 0 else True
        assert rate == pytest.approx(min(0.1 * left * (size / 16) ** 0.5, 0.09), rel=1e-9)
        before = at


def test_stages_at_shares_of_the_run(tmp_path):
    rows = run(
        tmp_path, "late", "--test=False", "--stagewise_ramp_up=True", "--global_batch_sizes=[10,20,40]",
        "--samples_stages=[60%,20%,20%]", "--max_samples=1000", "--lr_scaling=linear",
    )  # fmt: skip
    assert [row["batch_size"] for row in rows] == ["10"] * 60 + ["20"] * 10 + ["40"] * 5
    assert numbers(rows, "lr_factor") == [1.0] * 60 + [2.0] * 10 + [4.0] * 5


def test_with_a_knee_goodput_is_reproducible(tmp_path):
    """Times decide nothing: twice the same rows. Evaluated by samples, whatever the batch size."""
    options = ["--recipe=steady", "--knee=100", "--max_samples=8000", "--eval_interval=0", "--eval_samples=2000"]
    first, second = (run(tmp_path, name, *options) for name in ("first", "second"))
    assert first == second and numbers(first, "batch_size")[-1] > 32
    evaluated = [float(row["samples"]) // 2000 for row in first if row["val_loss"]]
    assert evaluated == [1, 2, 3, 4]
    assert json.loads((tmp_path / "first" / "summary.json").read_text())["knee"] == 100


class Doubling(control.Rule):
    """Measures nothing itself (docs/extending.md)."""

    name = "doubling"

    def __call__(self, batch_size, samples, observation):
        return 16 * 2 ** (samples // 1000)


def test_a_rule_that_measures_nothing_beside_a_learning_rate_that_does(tmp_path):
    rule = "--ramp_up_type=checks.test_steering:Doubling"
    rows = run(tmp_path, "scaled", "--recipe=steady", rule, "--max_samples=4000", "--optimizer=sgd", "--batch_size=16")
    assert {16, 32, 64, 128} == set(numbers(rows, "batch_size"))
    assert any(row["noise_scale"] for row in rows) and numbers(rows, "lr_factor")[-1] > 2
    rows = run(tmp_path, "plain", rule, "--max_samples=2000", "--batch_size=16")
    assert not any(row["variance"] for row in rows) and set(numbers(rows, "lr_factor")) == {1}


def test_a_free_start(tmp_path):
    """The first batch is an eighth of the knee, at the learning rate of --batch_size; β₂ has its half-life in samples
    from the first step on, and as long as the batch stays."""
    options = ["--recipe=steady", "--knee=400", "--learning_rate=0.01", "--optimizer=adam", "--beta2=0.999"]
    options += ["--batch_size=8", "--max_batch_size=50", "--max_samples=25600"]
    rows = run(tmp_path, "free", *options, "--checkpoint_interval=20", "--keep_checkpoints=99", "--max_samples=25600")
    assert numbers(rows, "batch_size")[0] == 50 and set(numbers(rows, "batch_size")) == {50}
    assert numbers(rows, "lr_factor")[0] == 1 and numbers(rows, "lr")[0] == 0.01
    saved = torch.load(tmp_path / "free" / "checkpoints" / "step-00000020.pt", weights_only=False)
    [group] = saved["optimizer"]["param_groups"]
    assert group["betas"][1] == pytest.approx(0.999 ** (50 / 8)) and group["initial_beta2"] == 0.999
    rows = run(tmp_path, "not_free", *options, "--free_start=False", "--max_samples=200")
    assert numbers(rows, "batch_size")[0] == 8
    of_the_run, constant = [f"--config={tmp_path / 'free' / 'config.yaml'}"], ["--test=False", "--lr_scaling=none"]
    constant += ["--coupling=rate", "--statistics=batch", "--smoothing=0"]
    for words, first in (([], 50), (constant, 8)):
        config = command_line.parse([*of_the_run, *words])
        assert tests.controller(config, lambda samples: 1.0, True, None, 1).batch_size == first


def test_the_learning_rate_of_a_row_is_that_of_no_group(tmp_path):
    rows = run(tmp_path, "one", "--learning_rate=0.01", "--lr_factors={'1.weight': 0.1}", "--max_samples=64")
    assert numbers(rows, "lr")[0] == 0.01


def test_goodput_says_what_it_has_found(tmp_path, capsys):
    rows = run(tmp_path, "steady", "--batch_size=16", "--max_samples=20000", "--recipe=steady")
    sizes = numbers(rows, "batch_size")
    assert sizes[0] >= 16 and all(b <= 4 * a for a, b in zip(sizes, sizes[1:])) and sizes == sorted(sizes)
    summary = json.loads((tmp_path / "steady" / "summary.json").read_text())
    assert summary["noise_scale"] > 0 and summary["knee"] >= 0 and summary["quickest_batch_size"] >= 1
    assert "quickest batch" in capsys.readouterr().out


@pytest.mark.parametrize("log_interval, test_interval", [(2, 3), (4, 2), (3, 3)])
def test_a_measured_step_has_its_row(tmp_path, log_interval, test_interval):
    """Steps 1, 1 + interval, … are measured, whatever the steps are that have a row anyway."""
    options = ["--eta=1000", "--training_type=iter", "--max_iters=13", "--decay_lr=False"]
    rows = run(tmp_path, "run", *options, f"--log_interval={log_interval}", f"--test_interval={test_interval}")
    measured = [1 + i for i in range(0, 13, test_interval)]
    assert [int(row["step"]) for row in rows if row["variance"]] == measured
    assert {int(row["step"]) for row in rows} == {*measured, *range(log_interval, 14, log_interval), 13}


class TurnsRound(torch.nn.Module):
    """From its 11th pass on it takes positions for samples; there are eight of both, so that no shape tells.

    The number of passes is in the checkpoint.
    """

    def __init__(self, image_shape, num_classes):
        super().__init__()
        self.layer, self.head = torch.nn.Linear(8, 6), torch.nn.Linear(6, num_classes)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        x, turned = x[:, 0], bool(self.passes >= 10)
        if self.training:
            self.passes += 1
        x = self.layer(x.transpose(0, 1) if turned else x).tanh()
        return self.head((x.transpose(0, 1) if turned else x).mean(1))


def test_what_a_later_look_finds_is_kept_over_a_continuation(tmp_path, capsys):
    """The 20th measured step shows it; what goes on before that, or after it, is the run that was never stopped."""
    options = ["--model=checks.test_steering:TurnsRound", "--eta=1000", "--batch_size=8", "--precision=64-true"]
    options += ["--training_type=iter", "--max_iters=22", "--checkpoint_interval=4", "--keep_checkpoints=9"]
    whole = run(tmp_path, "whole", *options)
    assert "at a later step the statistics are not those of single samples" in capsys.readouterr().out
    undecided = [int(row["step"]) for row in whole if not row["variance"] or row["variance"] == "nan"]
    assert undecided == [20]
    for step in (12, 20):
        checkpoint = tmp_path / "whole" / "checkpoints" / f"step-{step:08}.pt"
        assert run(tmp_path, f"from {step}", *options, f"--resume={checkpoint}") == whole
    capsys.readouterr()
    unwatched = run(tmp_path, "unwatched", *options, "--recheck=False")
    assert "at a later step" not in capsys.readouterr().out
    by_loop = run(tmp_path, "loop", *options, "--test_gradients=loop")
    variances = {name: numbers(rows[20:], "variance") for name, rows in (("loop", by_loop), ("whole", whole))}
    assert variances["whole"] == pytest.approx(variances["loop"], rel=1e-9)
    assert numbers(unwatched[20:], "variance") != pytest.approx(variances["loop"], rel=1e-3)


class Centred(torch.nn.Module):
    """Couples samples without a layer of torch's that does."""

    def __init__(self, image_shape, num_classes):
        super().__init__()
        self.layer, self.head = torch.nn.Linear(64, 6), torch.nn.Linear(6, num_classes)

    def forward(self, x):
        x = self.layer(x.flatten(1))
        return self.head((x - x.mean(0)).tanh())


@pytest.mark.parametrize("model", ["checks.test_steering:Centred", "checks.fault_drill:Net"])
@pytest.mark.parametrize(
    "words, cut",
    [
        ("--recipe=steady --knee=8", 8),
        ("--recipe=paper", 1),
        ("--ramp_up_type=goodput --knee=8", 8),  # which decides by the noise scale, too
        ("--recipe=paper --lr_scaling=critical", 8),
    ],
)
def test_networks_that_couple_samples(tmp_path, capsys, model, words, cut):
    """A noise scale that is read is of the real micro-batches; the published rule keeps its own statistics."""
    rows = run(tmp_path, "run", f"--model={model}", "--batch_size=32", "--max_samples=32", *words.split())
    assert rows[0]["gradient_accumulation_steps"] == str(cut) and rows[0]["variance"]
    assert ("its statistics come from test_gradients=micro_batch" in capsys.readouterr().out) == (cut == 8)


class Counts(torch.nn.Linear):
    """Its passes, in an attribute, which no checkpoint has."""

    def __init__(self, image_shape, num_classes):
        super().__init__(64, num_classes)
        self.passes, self.sizes = 0, []
        made.append(self)

    def forward(self, x):
        if self.training:
            self.passes += 1
            self.sizes.append(len(x))
        return super().forward(x.flatten(1))


made: list[Counts] = []


def losses_of_samples(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("seed", range(8))
def test_the_knee_of_a_busy_machine(monkeypatch, seed):
    """Steps of 2 ms and 0.02 ms a sample, every third of them disturbed, to tenfold: 100, known to a fifth."""
    generator = random.Random(seed)

    def seconds(parts, work) -> float:
        disturbed = generator.choice([1.0, 1.0, generator.uniform(1, 10)])
        return (2 + 0.02 * work()) / 1000 * generator.uniform(1, 1.05) * disturbed

    monkeypatch.setattr(tuner, "_slowest", seconds)
    monkeypatch.setattr(tuner, "_whole_step", lambda parts, plan: plan.batch_size)
    for name in ("leaving_no_trace", "_without_learning"):
        monkeypatch.setattr(tuner, name, lambda parts: contextlib.nullcontext())
    monkeypatch.setattr(tuner, "ROUNDS", (4, 8))
    own = {"config": SimpleNamespace(max_batch_size=4096), "fabric": SimpleNamespace(world_size=1)}
    knee, lines = tuner._knee(SimpleNamespace(**own, min_micro_batch_size=1), micro_batch_size=256)
    assert 80 < knee < 120 and f"knee={knee:g}" in lines[0]


class InEvaluation(Counts):
    """Sizes of the passes in evaluation mode."""

    def forward(self, x):
        self.sizes += [len(x)] * (not self.training)
        return torch.nn.Linear.forward(self, x.flatten(1))


def test_a_loss_is_tried_without_a_trace(tmp_path):
    """On two samples, of which the model knows nothing afterwards."""
    loss = "--loss=checks.test_steering:losses_of_samples"
    run(tmp_path, "run", "--model=checks.test_steering:InEvaluation", loss, "--test=False", "--max_samples=64")
    sizes = made.pop().sizes
    assert sizes and 2 not in sizes


def test_an_optimizer_that_steps_at_a_rate_of_zero_has_its_weights_back(tmp_path):
    """Rprop steps by what it keeps: weights behind the measurement of the knee are those of a run that is told it."""
    words = ["--optimizer=Rprop", "--recipe=steady", "--max_samples=300", "--max_micro_batch_size=64"]
    measured = run(tmp_path, "measured", *words)
    knee = yaml.safe_load((tmp_path / "measured" / "config.yaml").read_text())["knee"]
    given = run(tmp_path, "given", *words, f"--knee={knee}")
    assert [row["train_loss"] for row in measured] == [row["train_loss"] for row in given]


def test_the_knee_that_is_measured_leaves_no_trace_in_the_clipping(tmp_path):
    """A run goes as one that is told its knee: norms of trial steps are none of its own."""
    words = ["--recipe=steady", "--max_samples=300", "--max_micro_batch_size=64", "--checkpoint_interval=1"]
    measured = run(tmp_path, "measured", *words, "--keep_checkpoints=99")
    knee = yaml.safe_load((tmp_path / "measured" / "config.yaml").read_text())["knee"]
    given = run(tmp_path, "given", *words, f"--knee={knee}")
    assert [row["train_loss"] for row in measured] == [row["train_loss"] for row in given]
    first = torch.load(tmp_path / "measured" / "checkpoints" / "step-00000001.pt", weights_only=False)
    assert first["clipping"]["seen"] == 1


def test_what_is_measured_before_the_first_step_leaves_a_models_own_books_alone(tmp_path):
    rows = run(tmp_path, "run", "--model=checks.test_steering:Counts", "--recipe=steady", "--max_samples=200",
               "--max_micro_batch_size=auto")  # fmt: skip
    model = made.pop()
    assert model.sizes == [int(row["batch_size"]) for row in rows] and model.passes == len(rows)
