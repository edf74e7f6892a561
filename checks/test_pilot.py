"""From a pilot run to a schedule: the stages are the quickest of the model, and each program is told them in its own
words."""

import ast
import csv
import inspect
import itertools
import math
import re
import shlex
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import main
import report
from adadagrad.control import Family, Transition
from adadagrad.tests import Statistics
from options.errors import UsageError
from runs import pilot, results
from runs.pilot import Piece

KNEE, CRITICAL = 300.0, 2.0
PIECES = [Piece(1000.0, noise) for noise in (10, 11, 13, 40, 90, 100, 400, 420)]


def modelled(sizes, pieces=PIECES):
    """Time and samples by walking through the pieces a step at a time, whatever the formulas say."""
    time = samples = 0.0
    for size, piece in zip(sizes, pieces):
        worth_of_step = size / (1 + size / (CRITICAL * piece.noise_scale))
        steps = piece.worth / worth_of_step
        time += steps * (KNEE + size)
        samples += steps * size
    return time, samples


def sizes_of(made, pieces=PIECES):
    """The batch of every piece, by the stages' lengths in samples."""
    found, stages = [], list(made.stages)
    used = 0.0
    for piece in pieces:
        size = stages[0].batch_size
        found.append(size)
        used += piece.worth * (1 + size / (CRITICAL * piece.noise_scale))
        if round(used) >= stages[0].samples and len(stages) > 1:
            stages.pop(0)
            used = 0.0
    return found


def test_the_stages_are_the_quickest():
    made = pilot.plan(PIECES, KNEE, 3, CRITICAL, 16, Family.GRADIENT)
    sizes = sizes_of(made)
    time, samples = modelled(sizes)
    best_constant = min(modelled([b] * len(PIECES))[0] for b in range(1, 3000))
    assert made.gain == pytest.approx(best_constant / time, rel=1e-3) and made.gain > 1.05
    assert made.samples == pytest.approx(samples, abs=3)
    nice = sorted({pilot.nice(2.0**k, False) for k in range(12)} | {3 * 2**k for k in range(10)})
    least = math.inf
    for i, j in itertools.combinations(range(1, len(PIECES)), 2):
        for three in itertools.product([b for b in nice if 16 <= b <= 1024], repeat=3):
            if three[0] <= three[1] <= three[2]:
                ends = np.repeat(three, (i, j - i, len(PIECES) - j))
                least = min(least, modelled(ends)[0])
    assert time <= 1.01 * least  # sizes are rounded after the cuts are chosen


def test_rates_are_those_of_the_recipe():
    (one,) = pilot.plan([Piece(1000.0, 50.0)], KNEE, 4, CRITICAL, 16, Family.GRADIENT).stages
    assert one.batch_size == pilot.nice(math.sqrt(KNEE * 100), False) == 192
    assert one.rate == (1 + 192 / 16) / 2  # along the gradient by a critical size of the batch at least
    gain = (1 + 100 / 16) / (1 + 100 / 192)
    squares = (1 + 50 / 16) / (1 + 50 / 192)
    for family, rate in ((Family.AVERAGE, gain / math.sqrt(squares)), (Family.SUM, 1), (None, math.sqrt(gain))):
        made = pilot.plan([Piece(1000.0, 50.0)], KNEE, 4, CRITICAL, 16, family)
        assert made.stages[0].rate == pytest.approx(rate)
    assert pilot.family_of("sgdm") is Family.GRADIENT and pilot.family_of("AdamW") is Family.AVERAGE
    assert pilot.family_of("torch.optim:Adagrad") is Family.SUM and pilot.family_of("LBFGS") is None


def test_batches_grow_only():
    noisy = [Piece(100.0, noise) for noise in (10, 40, 20, 80, 70)]
    risen = pilot.rising(noisy)
    assert [round(piece.worth) for piece in risen] == [100, 200, 200]
    assert risen[1].noise_scale == pytest.approx(2 / (1 / 40 + 1 / 20))  # as averaging numerator and denominator
    made = pilot.plan(risen, KNEE, 4, CRITICAL, 16, None)
    assert [s.batch_size for s in made.stages] == sorted(s.batch_size for s in made.stages)


@pytest.mark.parametrize("doubling, sizes", [(False, [1, 2, 3, 4, 6, 8, 96, 128]), (True, [1, 2, 4, 64, 128])])
def test_sizes_for_hardware(doubling, sizes):
    assert [pilot.nice(size, doubling) for size in sizes] == sizes
    assert pilot.nice(0.3, doubling) == 1 and pilot.nice(100.0, doubling) == (128 if doubling else 96)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A pilot run: constant batches of 8, watched."""
    out_dir = tmp_path_factory.mktemp("out")
    words = "--model=logistic --accelerator=cpu --devices=1 --max_micro_batch_size=512 --test=False --batch_size=8"
    words += " --optimizer=adamw --beta2=0.99 --max_samples=1600 --monitor_interval=2 --smoothing=500"
    words += f" --statistics=unbiased --eval_interval=100 --out_dir={out_dir} --run_name=pilot"
    assert main.main(words.split()) == 0
    return out_dir / "pilot"


def printed(capsys, run, program, *more):
    assert report.main([str(run), f"--schedule={program}", "--knee=300", *more]) == 0
    return capsys.readouterr().out


def test_pieces_are_averages_of_numerator_and_denominator(run):
    found = pilot.pieces_of(results.read_run(run), CRITICAL)
    with open(run / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["variance"]]
    for n in range(1, 9):  # what has no signal by itself is joined to what follows
        first = [row for row in rows if float(row["samples"]) <= n * 1600 / pilot.PIECES]
        inverse = [(float(r["grad_norm_sq"]) - float(r["variance"]) / 8) / float(r["variance"]) for r in first]
        if np.mean(inverse) > 0:
            break
    assert found[0].noise_scale == pytest.approx(1 / np.mean(inverse))
    assert found[0].worth == pytest.approx(n * 50 / (1 + 8 / (CRITICAL * found[0].noise_scale)))


@dataclass
class Duration:
    """As OLMo-core has it."""

    value: int

    @classmethod
    def tokens(cls, value):
        return cls(value)


def test_each_program_in_its_own_words(run, capsys):
    made = pilot.plan(pilot.rising(pilot.pieces_of(results.read_run(run), 8.0)), 300.0, 4, 8.0, 8, Family.AVERAGE)
    assert len(made.stages) > 1
    megatron = printed(capsys, run, "megatron")
    words = shlex.split(megatron.splitlines()[-1])
    assert words[0] == "--step-batch-size-schedule" and words[2:] == ["--train-samples", str(made.samples)]
    steps = [tuple(map(int, word.split(":"))) for word in words[1].split()]
    assert steps == [(begin, stage.batch_size) for begin, stage in zip(made.begins, made.stages)] and steps[0][0] == 0

    seen = {}
    names = {"BatchSizeSchedulerCallback": lambda **given: seen.update(given), "Duration": Duration}
    eval(printed(capsys, run, "olmo").splitlines()[-1], names)
    sizes = seen["batch_sizes"]
    assert all(after % before == 0 and after > before for before, after in itertools.pairwise(sizes))
    assert len(sizes) == len(seen["schedule"]) and seen["schedule"][0].value == 0

    flag, ramp = printed(capsys, run, "nanochat").splitlines()[-2:]
    ramp = ast.literal_eval(ramp.partition(" = ")[2])
    assert flag == f"--total-batch-size={ramp[-1][1]}" and ramp[-1][0] == ramp[-1][2] == 1
    assert [size for _, size, _ in ramp] == [stage.batch_size for stage in made.stages]


def test_the_printed_line_trains_by_its_stages(run, capsys):
    text = printed(capsys, run, "adadagrad")
    gain = float(re.search(r"Modelled: ([\d.]+) times", text)[1])
    words = shlex.split(text[text.index("python main.py") :].replace("\\\n", " "))[2:]
    assert main.main(words) == 0
    stages = [map(int, part.split(",")) for part in re.findall(r"(?:sizes|stages)=\[([\d,]+)\]", text)]
    stages = list(zip(*stages))
    with open(run.with_name("pilot_stages") / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    ends = list(itertools.accumulate(length for _, length in stages))
    for row in rows:
        before = float(row["samples"]) - float(row["batch_size"])
        stage = sum(before >= end for end in ends[:-1])
        assert int(row["batch_size"]) == stages[stage][0]
    assert float(rows[-1]["samples"]) >= ends[-1] > float(rows[-1]["samples"]) - stages[-1][0]
    rates = re.findall(r"batch +([\d,]+)   peak learning rate ([\d.]+)", text)
    first = float(rows[0]["lr"]) / float(rows[0]["lr_factor"])
    assert first == pytest.approx(float(rates[0][1]), rel=1e-3)
    assert gain > 1 and max(float(row["lr_factor"]) for row in rows) > 1.2  # the rate has followed


GPT = "--model=gpt --model_args.layers=2 --model_args.width=32 --model_args.heads=2 --optimizer=adamw --devices=1"
GPT += (
    " --accelerator=cpu --dataset=benchmarks.cases:stdlib_short --validation_samples=256 --decay_lr=False --test=False"
)
GPT += " --test=False --max_micro_batch_size=128 --eval_samples=256"


def modelled_time(folder, loss):
    """Samples and `KNEE` a step, until the mean of three evaluations has come to this loss; inf: it has not."""
    with open(folder / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["val_loss"]]
    for last in range(2, len(rows)):
        if np.mean([float(row["val_loss"]) for row in rows[last - 2 : last + 1]]) <= loss:
            return float(rows[last]["samples"]) + KNEE * float(rows[last]["step"])
    return math.inf


@pytest.mark.long
def test_on_a_gpt_the_printed_line_is_faster_than_the_constant_it_names(tmp_path, capsys):
    """To two losses, in modelled time, the constant at the best of three rates."""
    words = [*GPT.split(), f"--out_dir={tmp_path}"]
    watched = ["--batch_size=4", "--learning_rate=0.003", "--monitor_interval=8", "--smoothing=400"]
    assert main.main([*words, *watched, "--statistics=unbiased", "--max_samples=2048", "--run_name=pilot"]) == 0
    text = printed(capsys, tmp_path / "pilot", "adadagrad")
    line = shlex.split(text[text.index("python main.py") :].replace("\\\n", " "))[2:]
    assert main.main(line) == 0
    size = int(re.search(r"best constant batch, ([\d,]+)", text)[1].replace(",", ""))
    samples = next(word for word in line if word.startswith("--max_samples="))
    for rate in (0.003, 0.006, 0.012):
        own = [f"--batch_size={size}", f"--learning_rate={rate}", samples, f"--run_name={rate}"]
        assert main.main([*words, *own]) == 0
    for loss in (2.8, 2.65):
        best = min(modelled_time(tmp_path / str(rate), loss) for rate in (0.003, 0.006, 0.012))
        assert modelled_time(tmp_path / "pilot_stages", loss) < best < math.inf


def test_what_the_first_stage_changes_beside_the_rate():
    """β₂ or alpha, and a decoupled decay, torch's own where none is given: as the transition has them."""
    pieces = [Piece(1000.0, 50.0)]
    made = pilot.plan(pieces, 3000.0, 1, 8.0, 8, Family.AVERAGE)
    stage = made.stages[0]
    change = Transition.of(Statistics(8, 8, 1.0, 50.0), 8, stage.batch_size, 8, 8.0)
    assert stage.rate == pytest.approx(change.rate(Family.AVERAGE)) and stage.decay > 1.5
    assert stage.decay == pytest.approx(change.decay(Family.AVERAGE))
    options = {"batch_size": 8, "beta2": 0.9999, "weight_decay": None, "optimizer_args": {}}
    said = {
        name: pilot._of_the_first_stage(stage, {**options, "optimizer": name})
        for name in ("adam", "adamw", "muon", "rmsprop", "sgd")
    }
    kappa = stage.batch_size / 8
    beta = f"--beta2={max(0.95, 0.9999**kappa):.6g}"
    assert said["adam"] == [beta] and said["sgd"] == []
    assert said["rmsprop"] == [f"--optimizer_args.alpha={max(0.95, 0.99**kappa):.6g}"]
    for name, kind in (("adamw", torch.optim.AdamW), ("muon", torch.optim.Muon)):
        assert inspect.signature(kind).parameters["weight_decay"].default == pilot.OWN_DECAY[name]
        assert said[name] == [beta, f"--weight_decay={pilot.OWN_DECAY[name] * stage.decay:.6g}"]
    assert inspect.signature(torch.optim.RMSprop).parameters["alpha"].default == pilot.OWN_ALPHA
    given = pilot._of_the_first_stage(stage, {**options, "optimizer": "torch.optim:AdamW", "weight_decay": 0.3})
    assert given[1] == f"--weight_decay={0.3 * stage.decay:.6g}"


@pytest.mark.parametrize("limit, allowed", [(None, None), (4.0, "--max_growth=10"), (16.0, None)])
def test_a_stage_may_be_larger_than_the_pilots_growth_allows(run, limit, allowed):
    made = pilot.Plan([pilot.Stage(8, 80, 1.0), pilot.Stage(80, 160, 2.0)], 1.0, 12)
    one = results.read_run(run)
    one.options["max_growth"] = limit
    words = shlex.split(pilot.for_adadagrad(made, one, 2.0, None).replace("\\\n", " "))
    assert [word for word in words if word.startswith("--max_growth")] == ([allowed] if allowed else [])


def test_text_is_counted_in_tokens(run):
    made = pilot.Plan([pilot.Stage(8, 80, 1.0), pilot.Stage(16, 160, 2.0)], 1.0, 12)
    one = results.read_run(run)
    assert '"0:8 40960:16"' in pilot.for_megatron(made, one, 2.0, 512)
    assert "[4096, 8192]" in pilot.for_olmo(made, one, 2.0, 512) and "tokens(40960)" in pilot.for_olmo(
        made, one, 2.0, 512
    )
    assert "(0.333, 4096, 0.500)" in pilot.for_nanochat(made, one, 2.0, 512)
    assert pilot.tokens_of({"dataset": "tokens", "dataset_args": {}}) == 256
    assert pilot.tokens_of({"dataset": "stdlib", "dataset_args": {"sequence_length": "64"}}) == 64
    assert pilot.tokens_of({"dataset": "digits"}) is None


def test_what_is_refused(run, tmp_path, capsys):
    twin = tmp_path / "twin"
    twin.mkdir()
    for name in ("config.yaml", "summary.json"):
        (twin / name).write_text((run / name).read_text())
    rows = (run / "metrics.csv").read_text().splitlines()
    head = rows[0].split(",")
    without = [",".join("" if name == "variance" else cell for name, cell in zip(head, row.split(","))) for row in rows]
    (twin / "metrics.csv").write_text("\n".join([rows[0], *without[1:]]) + "\n")
    for words, says in (
        ([run], "needs one --knee=P"),
        ([run, "--knee=3,4"], "one --knee"),
        ([run, twin, "--knee=3"], "made from one run, and these are 2"),
        ([twin, "--knee=3"], "has not measured its gradients: run it again with --monitor_interval"),
        ([run, "--knee=3", "--critical=-1"], "--critical=-1.0 must be a positive number"),
    ):
        assert report.main([*map(str, words), "--schedule=megatron"]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(UsageError, match="the gradient is too noisy"):
        weak = [re.sub("^", "", row) for row in rows]
        at = head.index("grad_norm_sq")
        weak = [rows[0], *(",".join(c if i != at else c and "0" for i, c in enumerate(r.split(","))) for r in rows[1:])]
        (twin / "metrics.csv").write_text("\n".join(weak) + "\n")
        pilot.pieces_of(results.read_run(twin), 2.0)
