"""critical.py: branches of a run, what is carried over to them, how they are compared, and what follows from it."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import batches
import critical
import data
import main
from adadagrad.control import Controller, Family, LearningRateScaling
from adadagrad.tests import Statistics
from benchmarks import critical_sizes
from checks.conftest import ROOT, launch
from options.errors import RunError
from runs import branches, figures
from runs.branches import Branch, Known, Start
from runs.results import read_metrics, read_run

TINY = ["--model=logistic", "--accelerator=cpu", "--devices=1", "--max_micro_batch_size=256", "--test=False"]


@pytest.fixture(scope="module")
def pilot(tmp_path_factory):
    """A run of a constant batch of 16, watched, with a checkpoint of every tenth step; AdamW, its rate decaying."""
    out_dir = tmp_path_factory.mktemp("out")
    words = ["--optimizer=adamw", "--weight_decay=0.1", "--max_samples=960", "--monitor_interval=2", "--smoothing=500"]
    words += ["--statistics=unbiased", "--checkpoint_interval=10", "--keep_checkpoints=9", "--eval_interval=10"]
    assert main.main([*TINY, *words, f"--out_dir={out_dir}", "--run_name=pilot"]) == 0
    return out_dir / "pilot"


@pytest.fixture(scope="module", autouse=True)
def without_curves():
    """Each run's own figure takes longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "curves", lambda folder: None)
        yield


def in_this_process(words, log):
    return main.main(words)


def measured(pilot, *words, launched=in_this_process):
    return critical.measure_all(critical.parse([str(pilot), *words]), launched)


def checkpoint(pilot, step):
    return pilot / "checkpoints" / f"step-{step:08}.pt"


def test_branches_of_a_run(pilot, capsys):
    """Same samples, all of the same length; what has finished is not run again; table, figure, JSON."""
    started = []

    def counted(words, log):
        started.append(words)
        return main.main(words)

    words = [checkpoint(pilot, 20), "--factors=1,4", "--samples=256", "--repeats=2"]
    found = measured(*words, "--gains=1", launched=counted)
    assert len(started) == 4
    again = measured(*words, "--gains=1", launched=counted)
    assert len(started) == 4 and again == found == json.loads((pilot / "critical" / "critical.json").read_text())
    both = measured(*words, "--gains=1,0", launched=counted)  # the smallest one has no gain
    assert len(started) == 6
    losses = {gain: np.mean([last_loss(pilot, 4, r, gain) for r in (0, 1)]) for gain in (0, 1)}
    best = both[0]["factors"][1]
    assert best["loss"] == pytest.approx(min(losses.values())) and losses[best["gain"]] == min(losses.values())
    out = capsys.readouterr().out
    assert "C by the fit" in out and "within 1 %" in out
    assert (pilot / "critical" / "critical.png").stat().st_size > 20_000
    (of,) = found
    assert (of["step"], of["samples"], of["batch_size"], of["branch_samples"]) == (20, 320, 16, 256)
    assert of["noise_scale"] == pytest.approx(
        next(float(x) for x, s in zip(*columns(pilot, "noise_scale", "step")) if s == 19), rel=1e-9
    )
    assert [one["batch_size"] for one in of["factors"]] == [16, 64]
    four = of["factors"][1]
    losses = {f: [last_loss(pilot, f, r) for r in (0, 1)] for f in (1, 4)}
    excess = [(b - a) / a for a, b in zip(losses[1], losses[4])]
    assert four["excess_mean"] == pytest.approx(np.mean(excess)) and four["loss"] == pytest.approx(np.mean(losses[4]))
    assert four["excess_standard_error"] == pytest.approx(np.std(excess, ddof=1) / math.sqrt(2))


def columns(folder, *names):
    metrics = read_metrics(folder)
    kept = [i for i, value in enumerate(metrics[names[0]]) if value is not None]
    return [[metrics[name][i] for i in kept] for name in names]


def last_loss(pilot, factor, repeat, gain=1):
    folder = pilot / "critical" / "step-00000020" / f"x{factor}_gain{gain}_samples256_repeat{repeat}"
    samples, loss = columns(folder, "val_loss", "samples")[::-1]
    assert samples[-1] == 320 + 256
    return loss[-1]


def test_a_branch_of_the_same_size_is_the_run(pilot):
    """Bit for bit: what differs between branches is their size alone."""
    measured(checkpoint(pilot, 30), "--factors=1,2", "--samples=160", "--repeats=1", "--gains=1")
    branch = pilot / "critical" / "step-00000030" / "x1_gain1_samples160_repeat0"
    run, own = (columns(folder, "train_loss", "step", "lr") for folder in (pilot, branch))
    assert own[1][-1] == 40 and own == [column[:40] for column in run]


def test_a_larger_branch_is_the_same_run_by_hand(pilot):
    """×4 by a plain loop from the checkpoint's own tensors: AdamW with squares, momentum, ε, β₂, rate, decay."""
    measured(checkpoint(pilot, 30), "--factors=1,4", "--samples=256", "--repeats=1", "--gains=1")
    branch = pilot / "critical" / "step-00000030" / "x4_gain1_samples256_repeat0"
    expected = columns(branch, "train_loss", "step", "lr")
    saved = torch.load(checkpoint(pilot, 30), weights_only=True)
    known = Statistics(**(saved["controller"]["statistics"] or saved["controller"]["reported"]))
    signal, noise = known.grad_norm_sq, known.variance
    squares = (noise / 16 + signal) / (noise / 64 + signal)
    assert 1 < squares < 3.9
    group = saved["optimizer"]["param_groups"][0]
    start = LoopStart(saved, squares, group)
    at = 480
    for loss, step, lr in list(zip(*expected))[30:]:
        schedule = 0.01 * 0.5 * (1 + math.cos(math.pi * at / 960))
        assert lr == pytest.approx(schedule * 2, rel=1e-9), step  # 4/√ρ is above √4
        assert start.step(range(at, at + 64), lr) == pytest.approx(loss, rel=1e-5)
        at += 64
    assert at == 480 + 256


class LoopStart:
    """The checkpoint's state with what follows from a batch of four times the size, and AdamW in its textbook form."""

    def __init__(self, saved, squares, group):
        options = (saved["options"]["seed"], True, torch.device("cpu"), torch.float32, 0)
        self.stream = batches.build(data.load("digits", None), *options, torch.contiguous_format, None)
        state = saved["optimizer"]["state"]
        self.weights = [value.clone().requires_grad_() for value in saved["model"].values()]
        beta2, new = group["betas"][1], max(group["betas"][1] ** 4, 0.95)
        steps = int(state[0]["step"])
        self.m = [state[i]["exp_avg"] / (4 * squares) ** 0.25 for i in range(2)]
        unbias = (1 - new**steps) / (1 - beta2**steps)
        self.v = [state[i]["exp_avg_sq"] / squares * unbias for i in range(2)]
        self.beta1, self.beta2, self.steps = group["betas"][0], new, steps
        self.eps, self.decay = group["eps"] / math.sqrt(squares), 0.1 * math.sqrt(squares)

    def step(self, positions, rate):
        x, y = self.stream.read(positions)
        weight, bias = self.weights
        loss = nn.functional.cross_entropy(x.flatten(1) @ weight.T + bias, y)
        gradients = torch.autograd.grad(loss, self.weights)
        self.steps += 1
        with torch.no_grad():
            for w, g, m, v in zip(self.weights, gradients, self.m, self.v):
                w.mul_(1 - rate * self.decay)
                m.mul_(self.beta1).add_(g, alpha=1 - self.beta1)
                v.mul_(self.beta2).add_(g * g, alpha=1 - self.beta2)
                m_hat, v_hat = m / (1 - self.beta1**self.steps), v / (1 - self.beta2**self.steps)
                w.sub_(rate * m_hat / (v_hat.sqrt() + self.eps))
        return loss.item()


def test_repeats_end_when_the_difference_is_known():
    """Paired differences; beyond that, nothing but arithmetic."""
    same_order = {1: [1.0, 2.0, 3.0], 2: [1.001, 2.002, 3.003], 4: [1.1, 2.22, 3.27], 8: [1.0, 2.0, math.inf]}
    found = branches.excesses(same_order)
    assert found[2].mean == pytest.approx(0.001) and found[2].standard_error == pytest.approx(0.0, abs=1e-12)
    spread = np.std([0.1, 0.11, 0.09], ddof=1) / math.sqrt(3)
    assert found[4].standard_error == pytest.approx(spread)
    assert found[4].high == pytest.approx(0.1 + 2.919986 * spread, rel=1e-6)  # Student's t, two degrees of freedom
    assert branches.largest_within(found, 0.01) == {"factor": 2, "low": 2, "high": 2}
    assert branches.largest_within(found, 0.5) == {"factor": 4, "low": 4, "high": 4}  # what diverged is never within
    assert branches.is_known(found, 0.01) and not branches.is_known(found, 0.1)
    once = branches.excesses({factor: values[:1] for factor, values in same_order.items()})
    assert not branches.is_known(once, 0.01) and branches.largest_within(once, 0.01)["high"] == 8


@pytest.mark.parametrize("critical_size", [20.0, 300.0, math.inf])
def test_the_fit_finds_the_critical_size(critical_size):
    """Losses that fall as of n/(1 + b/C) samples, with noise: the interval has C in nine of ten."""
    generator, hits = np.random.default_rng(3), 0
    for _ in range(20):
        repeats = []
        for _ in range(3):
            order = 0.003 * generator.standard_normal(8).cumsum()  # what the samples do to all sizes
            repeats.append({b: curve(b, critical_size, order, generator) for b in (16, 32, 64, 128)})
        fit = branches.critical_size(repeats)
        if math.isinf(critical_size):
            hits += fit["high"] is None
        else:
            hits += (fit["low"] or math.inf) <= critical_size <= (fit["high"] or math.inf)
            assert 0.6 < (fit["critical"] or math.inf) / critical_size < 1.7
    assert hits >= 16


def curve(size, critical_size, order, generator):
    samples = np.arange(1, 9) * 512
    worth = samples / (1 + size / critical_size)
    loss = 0.4 + 1.5 * np.exp(-worth / 2500) + order + 0.003 * generator.standard_normal(8)
    return list(zip(samples, loss))


def test_the_fit_leaves_out_what_has_no_curve():
    one = {16: curve(16, 50.0, np.zeros(8), np.random.default_rng(0))}
    exploded = [(samples, 100 * loss) for samples, loss in curve(64, 50.0, np.zeros(8), np.random.default_rng(2))]
    assert branches.critical_size([one | {32: [], 64: exploded}]) == {"critical": None, "low": None, "high": None}
    alone = branches.critical_size([one | {32: curve(32, 50.0, np.zeros(8), np.random.default_rng(1))}])
    assert alone["critical"] and alone["low"] is alone["high"] is None  # one repeat has no scatter


def test_training_loss_of_the_second_half():
    points = [(100, 4.0), (200, 3.0), (300, 2.0), (400, 1.0)]
    assert branches.final_loss(points, "val_loss") == 1.0
    assert branches.final_loss(points, "train_loss") == 1.5
    assert branches.final_loss([], "train_loss") == math.inf


def test_a_branch_of_the_controller():
    """From whatever there was; r = κ. Held through a checkpoint, and nothing is measured for the batch any more."""
    known = Statistics(16, 16, grad_norm_sq=1.0, variance=64.0)
    for scaling, family, expected in (
        (LearningRateScaling("none", 16), None, 4.0),
        (LearningRateScaling("none", 16), Family.AVERAGE, 2.0),  # 4 / √(5/2) is above √4
        (LearningRateScaling("sqrt", 4), Family.GRADIENT, 2 * 4),
        (LearningRateScaling("critical", 16, True, Family.SUM), Family.SUM, 1.0),
    ):
        controller = Controller(16, scaling=scaling)
        controller.statistics = known
        transition = controller.branch(4, family, adaptive_optimizer=False)
        assert (transition.gain, transition.squares, transition.growth) == (4, 5 / 2, 4)
        assert controller.batch_size == 64 and controller.lr_factor == pytest.approx(expected)
        assert not controller.needs_moments
        again = Controller(16, scaling=scaling)
        again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
        assert again.lr_factor == controller.lr_factor and again.decay_factor == controller.decay_factor
        assert controller.update().batch_size == 64 and controller.lr_factor == pytest.approx(expected)
    unknown = Controller(16)
    assert unknown.branch(4, None, adaptive_optimizer=True).squares == 4 and unknown.lr_factor == 2
    shorter = Controller(16)
    assert shorter.branch(4, Family.GRADIENT, False, exponent=0.5).gain == shorter.lr_factor == 2


@pytest.mark.parametrize(
    "words, says",
    [
        (["--branch=2"], "--branch acts only with --resume"),
        (["--branch_gain=0.5"], "--branch_gain acts only with --branch"),
        (["--branch=2", "--resume=auto", "--run_name=new"], "has no checkpoint to branch off"),
        (["--branch=0.01", "--resume={checkpoint}", "--run_name=new"], "batches of 16 become 1"),
        (["--branch=500", "--resume={checkpoint}", "--run_name=new"], "1437 samples can be had"),
        (["--branch=2", "--resume=x", "--lr_decay_type=iter", "--lr_decay_iters=9"], "--lr_decay_type=sample"),
        (["--branch=2", "--resume={checkpoint}", "--run_name=new", "--learning_rate=1"], "options differ"),
    ],
)
def test_what_main_refuses(pilot, tmp_path, capfd, words, says):
    config = [] if "iter" in str(words) else [f"--config={pilot / 'config.yaml'}"]
    words = [word.format(checkpoint=checkpoint(pilot, 20)) for word in words]
    assert main.main([*config, f"--out_dir={tmp_path}", *words]) == 2
    assert says in capfd.readouterr().err


def test_what_is_refused(pilot, tmp_path, capsys):
    assert critical.main([str(tmp_path)]) == 2 and "has no checkpoint" in capsys.readouterr().err
    assert critical.main([str(checkpoint(pilot, 60)), "--samples=64"]) == 2
    assert "beyond the end of its learning-rate schedule, at 960" in capsys.readouterr().err
    for words in (["--factors=1"], ["--factors=0,1"], ["--repeats=0"], ["--gains=1,2"]):
        with pytest.raises(SystemExit):
            critical.parse([str(pilot), *words])
    with pytest.raises(RunError, match="ended with status 2"):
        measured(checkpoint(pilot, 20), "--factors=1,2", "--samples=32", "--repeats=1", "--", "--eta=many")


def test_an_interrupted_branch_goes_on(pilot):
    """With its own checkpoint, or from its start where it has none; it ends as if nothing had happened."""
    branch = Branch(Start.read(checkpoint(pilot, 40)), 2, 0.5, 128, 0)
    critical.run(branch, 4, [], in_this_process)
    expected = columns(branch.folder, "train_loss", "step", "lr")
    shutil.rmtree(branch.folder)
    words = critical.words_of(branch, 4, ["--checkpoint_interval=1", "--keep_checkpoints=9"])
    assert main.main(words) == 0
    for path in sorted((branch.folder / "checkpoints").glob("*.pt"))[2:]:
        path.unlink()
    (branch.folder / "summary.json").write_text('{"status": "interrupted"}')
    assert branch.status == "interrupted"
    critical.run(branch, 4, [], in_this_process)
    assert branch.status == "finished" and columns(branch.folder, "train_loss", "step", "lr") == expected
    (branch.folder / "summary.json").unlink()  # it was killed
    assert branch.status == "unfinished"
    critical.run(branch, 4, [], in_this_process)
    assert branch.status == "finished" and columns(branch.folder, "train_loss", "step", "lr") == expected


def test_branches_are_compared_without_an_average_of_the_weights(pilot):
    """It would be one over what went before, which the branches have in common."""
    options = ["--max_samples=640", "--weight_average=5000", "--run_name=averaged", "--checkpoint_interval=20"]
    assert main.main([*TINY, *options, f"--out_dir={pilot.parent}"]) == 0
    branch = Branch(Start.read(checkpoint(pilot.parent / "averaged", 20)), 2, 1.0, 128, 0)
    critical.run(branch, 2, [], in_this_process)
    assert read_run(branch.folder).options["weight_average"] == 0
    assert not (branch.folder / "model_average.pt").exists()


def test_an_average_may_begin_with_a_branch(pilot, tmp_path):
    words = [f"--config={pilot / 'config.yaml'}", f"--resume={checkpoint(pilot, 30)}", f"--out_dir={tmp_path}"]
    words += ["--run_name=new", "--branch=2", "--weight_average=0.5", "--max_samples=640", "--lr_decay_samples=960"]
    assert main.main(words) == 0
    average = torch.load(sorted((tmp_path / "new" / "checkpoints").glob("*.pt"))[-1], weights_only=True)["average"]
    assert average["samples"] == 160


def test_a_smaller_branch_is_not_clipped_by_the_norms_of_a_larger_batch(pilot):
    """Their mean is as large as is to be expected of its size; the norm of a step moves it by a sixteenth at most."""
    options = ["--max_samples=960", "--grad_clip=auto", "--run_name=clipped", "--checkpoint_interval=20"]
    options += ["--batch_size=32", "--monitor_interval=2", "--smoothing=500", "--statistics=unbiased"]
    assert main.main([*TINY, *options, f"--out_dir={pilot.parent}"]) == 0
    before = checkpoint(pilot.parent / "clipped", 20)
    branch = Branch(Start.read(before), 0.125, 1.0, 128, 0)
    assert main.main(critical.words_of(branch, 2, ["--checkpoint_interval=1", "--keep_checkpoints=99"])) == 0
    saved, after = (torch.load(path, weights_only=True) for path in (before, checkpoint(branch.folder, 21)))
    known = Statistics(**(saved["controller"]["statistics"] or saved["controller"]["reported"]))
    squares = [known.variance / size + known.grad_norm_sq for size in (32, 4)]
    expected = saved["clipping"]["mean"] * math.sqrt(squares[1] / squares[0])
    assert expected > 1.3 * saved["clipping"]["mean"]
    assert 15 / 16 <= after["clipping"]["mean"] / expected < 17 / 16


def test_the_length_of_branches():
    """They end at the same sample where that costs no more than twice the samples."""
    start = SimpleNamespace(batch_size=16)
    assert critical.length_of(start, [1, 2, 4], None) == 32 * 64
    assert critical.length_of(start, [1, 3], 1000) == 1008
    odd = critical.length_of(SimpleNamespace(batch_size=271), [1, 1.5, 2], None)
    assert odd == 32 * 542


def test_the_page_has_what_is_kept():
    page = (ROOT / critical_sizes.PAGE).read_text()
    assert critical_sizes.filled(page) == page, "run: python -m benchmarks.critical_sizes --write"


@pytest.mark.long
def test_as_a_program(pilot):
    """Branches in processes of their own, two at a time; words for main.py behind --."""
    words = [str(checkpoint(pilot, 40)), "--factors=1,2", "--samples=64", "--repeats=1", "--jobs=2"]
    words += ["--", "--log_interval=2"]
    done = launch(sys.executable, "critical.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "C by the fit" in done.stdout and (pilot / "critical" / "step-00000040").is_dir()


@pytest.mark.long
def test_by_a_launcher(pilot):
    """Branches on two processes are those of one, on the same samples."""
    start = Start.read(checkpoint(pilot, 40))
    words = [str(checkpoint(pilot, 40)), "--factors=1,4", "--samples=192", "--repeats=1", "--jobs=1"]
    refused = launch(sys.executable, "critical.py", *words, "--launcher=no_such_launcher")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--launcher: no_such" in refused.stderr
    command = f"--launcher={sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
    done = launch(sys.executable, "critical.py", *words, command)
    assert done.returncode == 0 and "C by the fit" in done.stdout, done.stdout + done.stderr
    for factor in (1, 4):
        ours = Branch(start, factor, 1.0, 192, 0)
        assert ours.status == "finished" and read_run(ours.folder).summary["world_size"] == 2
        on_two = columns(ours.folder, "train_loss", "samples")
        shutil.rmtree(ours.folder)
        critical.run(ours, 4, [], in_this_process)
        assert columns(ours.folder, "train_loss", "samples") == [pytest.approx(row, rel=1e-4) for row in on_two]
        shutil.rmtree(ours.folder)


def test_a_known_mean():
    assert Known.of([1.0, 2.0, 3.0]).mean == 2 and Known.of([1.0]).high == math.inf
