"""From a pilot run to a schedule: the stages in which the next run is to train, by the noise scale that this one has
measured, in the syntax of several programs.

A step of b samples takes P + b times as long as a sample, P the knee, and n samples by batches of b are worth
n/(1 + b/C) by small ones, C the critical batch size. Over a stage with the worth W = Σw and A = Σ w/C, batches of b
take W + b·A samples and the time (1 + P/b)(W + b·A): the least is at b = √(P·W/A), in the middle of the knee and the
mean critical size.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from adadagrad.control import FAMILIES, Family, LearningRateScaling, Transition
from adadagrad.control.transition import DECOUPLED
from adadagrad.tests import Statistics
from options.errors import UsageError
from options.schema import DEFAULTS
from runs.results import DamagedRun, Run, read_metrics

PIECES = 32
"""Of the pilot run, at whose ends a stage can begin."""

MEASUREMENTS = 64
"""Of the next run, at least, where it has as many steps: its rate follows them."""


@dataclass(frozen=True)
class Piece:
    """Of the pilot run.

    Args:
        worth: its samples, had they been used by small batches.
        noise_scale: V/‖G‖², of the averages over the piece [samples].
    """

    worth: float
    noise_scale: float


@dataclass(frozen=True)
class Stage:
    """Of the schedule.

    Args:
        batch_size: [samples].
        samples: its length.
        rate: factor on the pilot's learning rate, which is for its first batch.
        decay: likewise on a decoupled weight decay.
    """

    batch_size: int
    samples: int
    rate: float
    decay: float = 1.0


@dataclass(frozen=True)
class Plan:
    """A schedule.

    Args:
        gain: the modelled time of the best constant batch over that of the schedule.
        constant: that batch [samples].
    """

    stages: list[Stage]
    gain: float
    constant: int

    @property
    def samples(self) -> int:
        return sum(stage.samples for stage in self.stages)

    @property
    def begins(self) -> list[int]:
        """Samples before each stage."""
        return [sum(stage.samples for stage in self.stages[:i]) for i in range(len(self.stages))]


def pieces_of(run: Run, critical: float) -> list[Piece]:
    """
    Args:
        critical: critical batch size over noise scale.

    Raises:
        UsageError: it has not measured its gradients, or nothing of a signal in them.
    """
    try:
        columns = ("samples", "batch_size", "variance", "grad_norm_sq")
        rows = list(zip(*(read_metrics(run.folder, columns)[name] for name in columns)))
    except (OSError, ValueError, KeyError) as error:
        raise DamagedRun(f"{run.folder}: metrics.csv cannot be read ({error})") from None
    # ‖G‖²/V of a batch: unbiased, may be negative; its mean is well behaved where that of V/‖G‖² is not.
    found = [(s, b, (norm - v / b) / v) for s, b, v, norm in rows if v]
    if len(found) < 2:
        raise UsageError(f"{run.folder} has not measured its gradients: run it again with --monitor_interval=8")
    ends = [rows[-1][0] * (i + 1) / PIECES for i in range(PIECES)]
    pieces, before = [], 0.0
    for end in ends:
        own = [(b, signal) for s, b, signal in found if before < s <= end]
        signal = np.mean([signal for _, signal in own]) if own else -1.0
        if signal <= 0 and end != ends[-1]:  # nothing is known of it by itself: joined to what follows
            continue
        if signal <= 0:
            break
        batch = float(np.mean([b for b, _ in own]))
        pieces.append(Piece((end - before) / (1 + batch * signal / critical), 1 / float(signal)))
        before = end
    if not pieces:
        raise UsageError(f"{run.folder}: the gradient is too noisy in all that was measured: measure more often")
    return pieces


def rising(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours are joined until the noise scale does not fall from one to the next: batches are to grow only, and
    where it falls that is mostly by chance (isotonic regression, of 1/noise scale, by the worth)."""
    found: list[Piece] = []
    for piece in pieces:
        while found and found[-1].noise_scale >= piece.noise_scale:
            before = found.pop()
            worth = before.worth + piece.worth
            piece = Piece(worth, worth / (before.worth / before.noise_scale + piece.worth / piece.noise_scale))
        found.append(piece)
    return found


def nice(size: float, doubling: bool) -> int:
    """The nearest of 1, 2, 3, 4, 6, 8, 12, 16, …, as a ratio; with `doubling` the nearest power of two."""
    exponent = math.floor(math.log2(max(size, 1.0)))
    near = [2**exponent, 2 ** (exponent + 1)] + ([] if doubling else [3 * 2 ** (exponent - 1)] * (exponent > 0))
    return min(near, key=lambda one: abs(math.log(one / max(size, 1.0))))


def plan(
    pieces: Sequence[Piece],
    knee: float,
    stages: int,
    critical: float,
    initial: int,
    family: Family | None,
    doubling: bool = False,
) -> Plan:
    """The schedule of at most so many stages that takes the least time, as it is modelled.

    Args:
        knee: P [samples].
        critical: critical batch size over noise scale.
        initial: b₀, of the pilot's learning rate [samples].
        family: of the optimizer.
        doubling: sizes are to be powers of two.
    """
    worth = np.array([piece.worth for piece in pieces])
    share = worth / (critical * np.array([piece.noise_scale for piece in pieces]))
    cuts = _cuts(worth, share, stages)
    found: list[tuple[int, float, float]] = []  # batch size, W, A
    for start, end in pairwise(cuts):
        w, a = float(worth[start:end].sum()), float(share[start:end].sum())
        size = nice(math.sqrt(knee * w / a), doubling)
        if found and found[-1][0] == size:
            w, a = w + found[-1][1], a + found.pop()[2]
        found.append((size, w, a))
    w, a = float(worth.sum()), float(share.sum())
    constant = max(1, round(math.sqrt(knee * w / a)))
    time = sum(_time(b, w, a, knee) for b, w, a in found)
    whole = [Stage(b, round(w + b * a), *_factors(w / a / critical, critical, initial, b, family)) for b, w, a in found]
    return Plan(whole, _time(constant, w, a, knee) / time, constant)


def _time(size: int, worth: float, share: float, knee: float) -> float:
    return (1 + knee / size) * (worth + size * share)


def _cuts(worth: np.ndarray, share: np.ndarray, stages: int) -> list[int]:
    """Where stages begin and end, for the least Σ √(W·A): all else of the least times is the same for all cuts."""
    n = len(worth)
    sums = [np.concatenate([[0.0], part.cumsum()]) for part in (worth, share)]

    def cost(i: int, j: int) -> float:
        return math.sqrt((sums[0][j] - sums[0][i]) * (sums[1][j] - sums[1][i]))

    best = {j: (cost(0, j), [0, j]) for j in range(1, n + 1)}
    found = [best[n]]
    for _ in range(stages - 1):
        best = {
            j: min((best[i][0] + cost(i, j), [*best[i][1], j]) for i in range(1, j) if i in best)
            for j in range(2, n + 1)
            if any(i in best for i in range(1, j))
        }
        if n in best:
            found.append(best[n])
    return min(found)[1]


def _factors(
    noise_scale: float, critical: float, initial: int, size: int, family: Family | None
) -> tuple[float, float]:
    """On rate and decay, as --lr_scaling=critical has them, with --coupling=full where the family is known."""
    scaling = LearningRateScaling("critical", initial, adaptive_optimizer=True, family=family, critical=critical)
    statistics = Statistics(size, size, 1.0, noise_scale)
    return scaling(size, statistics), scaling.decay(size, statistics)


def class_of(optimizer: str) -> str:
    """The name of torch's class, in small letters, by the word of --optimizer."""
    name = optimizer.rpartition(":")[2].lower()
    return {"sgdm": "sgd"}.get(name, name)


def family_of(optimizer: str) -> Family | None:
    families = {known.lower(): family for known, family in FAMILIES.items()}
    return families.get(class_of(optimizer))


OWN_DECAY = {"adamw": 0.01, "muon": 0.1}
"""torch's, where --weight_decay says nothing."""
OWN_ALPHA = 0.99
"""RMSprop's."""
WITHOUT_BETAS = {"rmsprop", "adafactor"}


def for_adadagrad(made: Plan, run: Run, critical: float, tokens: int | None) -> str:
    """A command line. Rate and β₂ of the first stage are given, as it is b₀ there; what goes with the others follows
    from what is measured."""
    options, total = run.options, made.samples
    steps = sum(-(-stage.samples // stage.batch_size) for stage in made.stages)
    sizes = ",".join(str(stage.batch_size) for stage in made.stages)
    words = [
        f"--config={shlex.quote(str(run.folder / 'config.yaml'))} --run_name={shlex.quote(run.folder.name)}_stages",
        f"--test=False --stagewise_ramp_up=True --global_batch_sizes=[{sizes}]",
        f"--samples_stages=[{','.join(str(stage.samples) for stage in made.stages)}]",
        f"--training_type=sample --max_samples={total}",
        f"--max_batch_size={max(options['max_batch_size'], *(stage.batch_size for stage in made.stages))}",
        f"--learning_rate={options['learning_rate'] * made.stages[0].rate:.6g}",
        "--linear_ramp_up=False --seesaw_ramp_up=False --lr_scaling=critical --coupling=full",
        f"--monitor_interval={min(max(steps // MEASUREMENTS, 1), 8)}",
        f"--critical={critical:g} --statistics=unbiased --smoothing={options['smoothing'] or 5000:g}",
    ]
    words += _of_the_first_stage(made.stages[0], options)
    largest = max((after.batch_size / before.batch_size for before, after in pairwise(made.stages)), default=1.0)
    if options["max_growth"] and largest > options["max_growth"]:
        words.append(f"--max_growth={math.ceil(largest)}")
    if options["linear_ramp_up_increment"] != DEFAULTS.linear_ramp_up_increment:
        words.append(f"--linear_ramp_up_increment={DEFAULTS.linear_ramp_up_increment}")
    if options["training_type"] == "iter":
        words.append(f"--max_iters={DEFAULTS.max_iters}")
    if options["decay_lr"] and options["scheduler"] != "multistep":
        length = {"sample": f"--lr_decay_samples={total}", "iter": f"--lr_decay_iters={steps}"}
        words.append(length[options["lr_decay_type"]])
    return " \\\n  ".join(["python main.py", *words])


def _of_the_first_stage(stage: Stage, options: dict[str, Any]) -> list[str]:
    """β₂ and a decoupled weight decay, which the pilot's are not for."""
    name, initial, words = class_of(options["optimizer"]), options["batch_size"], []
    change = Transition(initial, stage.batch_size, initial, 1.0, 1.0)
    if name == "rmsprop":
        alpha = float(options["optimizer_args"].get("alpha", OWN_ALPHA))
        words.append(f"--optimizer_args.alpha={change.second_beta(alpha):.6g}")
    elif name == "muon" or (family_of(name) is Family.AVERAGE and name not in WITHOUT_BETAS):
        words.append(f"--beta2={change.second_beta(options['beta2']):.6g}")
    decay = OWN_DECAY.get(name, 0.0) if options["weight_decay"] is None else options["weight_decay"]
    if decay and name in {own.lower() for own in DECOUPLED}:
        words.append(f"--weight_decay={decay * stage.decay:.6g}")
    return words


def for_megatron(made: Plan, run: Run, critical: float, tokens: int | None) -> str:
    """Thresholds are tokens where it has a --seq-length, else samples; batches are samples."""
    steps = " ".join(f"{begin * (tokens or 1)}:{s.batch_size}" for begin, s in zip(made.begins, made.stages))
    return f'--step-batch-size-schedule "{steps}" --train-samples {made.samples}'


def for_olmo(made: Plan, run: Run, critical: float, tokens: int | None) -> str:
    """Of OLMo-core. It multiplies the rate by √(b′/b) itself, whatever is measured."""
    each = tokens or 1
    sizes = ", ".join(str(stage.batch_size * each) for stage in made.stages)
    begins = ", ".join(f"Duration.tokens({begin * each})" for begin in made.begins)
    return f"BatchSizeSchedulerCallback(batch_sizes=[{sizes}], schedule=[{begins}])"


def for_nanochat(made: Plan, run: Run, critical: float, tokens: int | None) -> str:
    """A batch ramp: up to which share of the tokens, tokens a batch, factor on the learning rates of the last stage."""
    each, last = tokens or 1, made.stages[-1]
    ends = [*made.begins[1:], made.samples]
    ramp = ", ".join(
        f"({end / made.samples:.3f}, {stage.batch_size * each}, {stage.rate / last.rate:.3f})"
        for end, stage in zip(ends, made.stages)
    )
    return f"--total-batch-size={last.batch_size * each}\nbatch_ramp = [{ramp}]"


PROGRAMS = {"adadagrad": for_adadagrad, "megatron": for_megatron, "olmo": for_olmo, "nanochat": for_nanochat}


def tokens_of(options: dict[str, Any]) -> int | None:
    """Of a sample, where it is text."""
    if options["dataset"] not in ("tokens", "stdlib"):
        return None
    return int(options["dataset_args"].get("sequence_length", 256))


def schedule(run: Run, program: str, knee: float, stages: int, critical: float | None) -> str:
    """Stages and rates for a program, below lines that say what they are and what they gain.

    Args:
        critical: critical batch size over noise scale; None: as the run had it.

    Raises:
        UsageError: the run does not tell.
        DamagedRun: it cannot be read.
    """
    options = run.options
    critical = critical or options["critical"]
    pieces = rising(pieces_of(run, critical))
    family = family_of(options["optimizer"])
    made = plan(pieces, knee, stages, critical, options["batch_size"], family, doubling=program == "olmo")
    rate = options["learning_rate"]
    lines = [
        f"# Stages for a knee of {knee:g} samples, by a noise scale of {pieces[0].noise_scale:,.0f} at the start and "
        f"{pieces[-1].noise_scale:,.0f} at the end; the critical batch size is {critical:g} times that.",
        f"# Modelled: {made.gain:.2f} times as fast as the best constant batch, {made.constant:,}.",
        *(
            f"#   from sample {begin:>12,}   batch {stage.batch_size:>8,}   peak learning rate {rate * stage.rate:.4g}"
            for begin, stage in zip(made.begins, made.stages)
        ),
    ]
    return "\n".join([*lines, PROGRAMS[program](made, run, critical, tokens_of(options))])
