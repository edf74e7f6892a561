"""Which values and combinations of options are refused, without looking at data, model or devices.

What is refused because of those: effective.py. Every refusal names the option and the remedy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from adadagrad.control import CRITICAL, RULES
from adadagrad.control.learning_rate import MEASURED
from options.errors import UsageError
from options.names import unknown
from options.schedules import PARAMETERS_OF_TESTS, rule_class

if TYPE_CHECKING:
    from options.schema import Config

POSITIVE = (
    "batch_size max_batch_size max_micro_batch_size max_test_micro_batch_size "
    "gradient_accumulation_steps test_interval test_groups learning_rate max_lr gamma "
    "max_samples max_iters devices num_nodes log_interval linear_ramp_up_increment lr_decay_samples "
    "lr_decay_iters keep_checkpoints timeout_minutes batch_size_multiple max_waste "
    "knee critical branch eval_samples validation_samples"
)
NOT_NEGATIVE = (
    "num_workers weight_decay grad_clip min_lr warmup_samples warmup_iters eval_interval momentum seed "
    "checkpoint_interval checkpoint_minutes smoothing monitor_interval branch_gain weight_average"
)
ACT_ONLY_WITH = (
    ("eval_samples", "eval_interval", 0),
    ("shard_modules", "strategy", "fsdp"),
    ("warmup_samples warmup_iters min_lr scheduler lr_decay_samples lr_decay_iters", "decay_lr", True),
    ("warmup_iters lr_decay_iters", "lr_decay_type", "iter"),
    ("warmup_samples lr_decay_samples", "lr_decay_type", "sample"),
    ("milestones gamma", "scheduler", "multistep"),
    ("max_iters", "training_type", "iter"),
)
"""Options, the one that they act with, its value."""
KINDS = ("bias", "norm", "embedding")
"""Kinds of parameters, for no_weight_decay."""
GENERAL = {"batch_size", "max_batch_size", "test_type"}
"""Options that are no single rule's."""


def check(c: Config, defaults: SimpleNamespace) -> None:
    """
    Args:
        defaults: what the options are where nobody says anything.

    Raises:
        UsageError: a value is out of range or options contradict each other.
    """
    _names(c)
    _ranges(c)
    _options_without_effect(c, defaults)
    if not c.branch:
        _options_of_other_rules(c, defaults)
    _unread_statistics(c, defaults)
    _batch_sizes(c)
    _ramps(c)
    if c.seesaw_ramp_up:
        _seesaw(c)
    if c.decay_lr:
        _decay(c)
    _branch(c, defaults)


def _names(c: Config) -> None:
    for option in ("model", "dataset", "optimizer", "ramp_up_type"):
        if problem := unknown(option, getattr(c, option)):
            raise UsageError(problem)
    for kind in c.without_weight_decay:
        if kind not in KINDS:
            raise UsageError(f"--no_weight_decay={c.no_weight_decay}: '{kind}' is none of {', '.join(KINDS)}")
    if c.run_name is not None and (c.run_name in ("", ".", "..") or set(c.run_name) & set("/\\$\0")):
        raise UsageError(f"--run_name='{c.run_name}' must be the name of a folder: one word without '/' or '$'")


def _ranges(c: Config) -> None:
    for name in POSITIVE.split():
        _require(name, getattr(c, name), "positive", lambda value: value > 0)
    for name in NOT_NEGATIVE.split():
        _require(name, getattr(c, name), "zero or positive", lambda value: value >= 0)
    for name in ("beta1", "beta2"):
        _require(name, getattr(c, name), "in [0, 1)", lambda value: 0 <= value < 1)
    for value in c.lr_factors.values():
        _require("lr_factors", value, "factors, zero or positive", lambda value: value >= 0)
    for name in ("global_batch_sizes", "samples_stages", "milestones"):
        for value in getattr(c, name):
            _require(name, value, "a list of positive numbers", lambda value: value > 0)
    for name in PARAMETERS_OF_TESTS:  # their squares are needed
        _require(name, getattr(c, name), "positive", lambda value: value > 0)
        _require(name, getattr(c, name), "from 1e-100 to 1e100", lambda value: 1e-100 <= value <= 1e100)
    sizes = [("global_batch_sizes", size) for size in c.global_batch_sizes]
    sizes += [(name, getattr(c, name)) for name in ("batch_size", "max_batch_size", "linear_ramp_up_increment")]
    for name, size in sizes:
        _require(name, size, "below 2^31", lambda value: value < 2**31)
    for value in c.samples_stages:
        if isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?%", value):
            raise UsageError(f"--samples_stages: '{value}' is neither a number of samples nor a share such as 25%")
    _require("seed", c.seed, "below 2^32", lambda value: value < 2**32)
    for name in ("smoothing", "critical", "knee", "max_waste"):  # their products are needed
        _require(name, getattr(c, name), "at most 1e15", lambda value: value <= 1e15)
    _require("timeout_minutes", c.timeout_minutes, "at most a year", lambda value: value <= 365 * 24 * 60)
    for name in ("ramp_up_factor", "max_growth"):
        _require(name, getattr(c, name), "larger than 1", lambda value: value > 1)


def _require(name: str, value: Any, words: str, holds: Callable[[Any], bool]) -> None:
    if value is None or isinstance(value, str):
        return
    if not (math.isfinite(value) and holds(value)):
        raise UsageError(f"--{name} must be {words}, not {value}")


def _options_without_effect(c: Config, defaults: SimpleNamespace) -> None:
    """Nothing would read them: whoever sets them expects something else of the run."""
    for names, other, value in ACT_ONLY_WITH:
        for name in names.split():
            if getattr(c, name) != getattr(defaults, name) and getattr(c, other) != value:
                raise UsageError(f"--{name} acts only with --{other}={value}: add that, or leave --{name} out")


def _options_of_other_rules(c: Config, defaults: SimpleNamespace) -> None:
    """(A run's config.yaml makes its baseline by --test=False: what a test reads may then be left over.)"""
    chosen = rule_class(vars(c))
    for rule in RULES.values():
        for name in set(rule.options) - set(chosen.options) - GENERAL:
            left_over = rule.measures and not chosen.measures
            if getattr(c, name) != getattr(defaults, name) and not left_over:
                raise UsageError(f"--{name} acts only with {rule.chosen_by}: add that, or leave --{name} out")
    if chosen.measures and "test_type" not in chosen.options:
        for name in ("test_type", *PARAMETERS_OF_TESTS):
            if getattr(c, name) != getattr(defaults, name):
                raise UsageError(
                    f"--{name}: {chosen.chosen_by} makes no test: leave --{name} out, or choose another --ramp_up_type"
                )


def _unread_statistics(c: Config, defaults: SimpleNamespace) -> None:
    """What is made of statistics needs some to be measured, and somebody who reads it."""
    reads_critical = not c.test or c.lr_scaling == "critical" or rule_class(vars(c)).name == "goodput"
    if c.critical != CRITICAL and not reads_critical:
        raise UsageError("--critical acts only with --ramp_up_type=goodput or --lr_scaling=critical: add one")
    if c.coupling != defaults.coupling and c.lr_scaling not in MEASURED:
        raise UsageError(f"--coupling={c.coupling} acts only with --lr_scaling=adascale or critical: add one")
    if c.test or c.monitor_interval:
        return
    for name in ("statistics", "smoothing", "monitor_modules", "monitor_metrics"):
        if getattr(c, name) != getattr(defaults, name):
            raise UsageError(f"--{name} acts only with --test=True or --monitor_interval: add one, or leave it out")
    if c.lr_scaling in MEASURED:
        raise UsageError(f"--lr_scaling={c.lr_scaling} needs the statistics: add --test=True or --monitor_interval=N")


def _batch_sizes(c: Config) -> None:
    if c.max_batch_size is not None and c.batch_size > c.max_batch_size:
        raise UsageError(
            f"--batch_size={c.batch_size} is above --max_batch_size={c.max_batch_size} "
            "(default: the size of the training set): lower one or raise the other"
        )
    if c.test and c.batch_size == 1:
        raise UsageError("--batch_size=1 has no variance to test: start with 2 or more, or add --test=False")
    if c.max_growth and rule_class(vars(c)).name != "constant":
        first = -(-(c.batch_size + 1) // c.batch_size_multiple) * c.batch_size_multiple
        if first > c.batch_size * c.max_growth:
            raise UsageError(
                f"--max_growth={c.max_growth}: from --batch_size={c.batch_size} the next size is {first}, "
                "which is more: raise it, or lower --batch_size_multiple"
            )


def _ramps(c: Config) -> None:
    ramps = [name for name in ("stagewise_ramp_up", "linear_ramp_up", "seesaw_ramp_up") if getattr(c, name)]
    if c.test and ramps:
        raise UsageError(f"--{ramps[0]} contradicts --test=True: add --test=False to ramp up without a test")
    if len(ramps) > 1:
        raise UsageError(f"--{ramps[0]} and --{ramps[1]} contradict each other: choose one")
    if c.stagewise_ramp_up and not c.global_batch_sizes:
        raise UsageError("--stagewise_ramp_up needs --global_batch_sizes=[SIZE,SIZE,…]")
    if c.samples_stages and len(c.samples_stages) != len(c.global_batch_sizes):
        raise UsageError(
            f"--samples_stages has {len(c.samples_stages)} entries for the {len(c.global_batch_sizes)} of "
            "--global_batch_sizes: give as many"
        )
    if c.stagewise_ramp_up and c.training_type == "iter" and not c.samples_stages:
        raise UsageError("--stagewise_ramp_up with --training_type=iter needs --samples_stages=[SAMPLES,SAMPLES,…]")
    largest = max(c.global_batch_sizes, default=0)
    if c.max_batch_size is not None and largest > c.max_batch_size:
        raise UsageError(f"--global_batch_sizes has {largest}, above --max_batch_size={c.max_batch_size}")


def _seesaw(c: Config) -> None:
    if not c.decay_lr or c.scheduler == "multistep" or c.lr_decay_type != "sample":
        raise UsageError(
            "--seesaw_ramp_up needs a learning rate that falls with the samples: --decay_lr=True with "
            "--scheduler=cosine or linear and --lr_decay_type=sample"
        )
    if c.lr_scaling not in ("none", "sqrt"):
        raise UsageError(f"--lr_scaling={c.lr_scaling}: --seesaw_ramp_up scales by sqrt: leave it out")


def _decay(c: Config) -> None:
    if c.min_lr > c.learning_rate:
        raise UsageError(f"--min_lr={c.min_lr} is above the peak --learning_rate={c.learning_rate}")
    if c.scheduler == "multistep" and not c.milestones:
        raise UsageError("--scheduler=multistep needs --milestones=[N,N,…]")
    if sorted(c.milestones) != c.milestones:
        raise UsageError(f"--milestones={c.milestones} must rise: sort them")
    if c.scheduler != "multistep":
        if c.lr_decay_type == "iter" and c.lr_decay_iters is None and c.training_type == "sample":
            raise UsageError("--lr_decay_type=iter needs --lr_decay_iters (or --training_type=iter with --max_iters)")
        if c.lr_decay_type == "sample" and c.lr_decay_samples is None and c.training_type == "iter":
            raise UsageError("--lr_decay_type=sample needs --lr_decay_samples here (or take --lr_decay_type=iter)")
    unit = "samples" if c.lr_decay_type == "sample" else "iters"
    warmup = getattr(c, f"warmup_{unit}")
    ends = ((name, getattr(c, name)) for name in (f"lr_decay_{unit}", f"max_{unit}"))
    name, end = next((own for own in ends if own[1] is not None), ("", math.inf))
    if warmup >= end:
        raise UsageError(f"--warmup_{unit}={warmup} is not before --{name}={end}: shorten the warm-up")


def _branch(c: Config, defaults: SimpleNamespace) -> None:
    if c.branch_gain != defaults.branch_gain and not c.branch:
        raise UsageError("--branch_gain acts only with --branch: add that, or leave --branch_gain out")
    if c.branch and not c.resume:
        raise UsageError("--branch acts only with --resume=CHECKPOINT: add that, or leave --branch out")
    if c.branch and c.decay_lr and c.lr_decay_type == "iter":
        raise UsageError(
            "--branch: the learning rate follows the steps, of which a branch has other ones: take a run with "
            "--lr_decay_type=sample"
        )
