"""Which estimator: by name, or the first that agrees with single samples on this model."""

import contextlib
from collections.abc import Callable

from torch import nn

from ..tests import Moments
from .estimator import Estimator, Loss, first_line, listed
from .ghost_norms import GhostNorms
from .hooks import after_accumulation, changing
from .isolation import couples_samples, is_compiled
from .micro_batch import CutGradients, MicroBatchGradients
from .per_sample import BySample, OwnPass, PerSampleGradients, SingleGradients
from .samples import Batch, some
from .verification import PROBE, Check, agreed

COUPLED = (
    "the model has BatchNorm, which couples the samples of a batch: "
    "--test_gradients=micro_batch is the accurate choice (docs/statistics.md, BatchNorm)"
)
COUPLED_BY_ITSELF = (
    "the model couples the samples of a batch (what it gives for one depends on the others): the test takes each as a "
    "batch of one, and --test_gradients=micro_batch is the accurate choice (docs/statistics.md, BatchNorm)"
)
BY_SAMPLE: dict[str, type[BySample]] = {"vmap": PerSampleGradients, "loop": SingleGradients}


def moments(
    model: nn.Module,
    loss: Loss,
    inputs: Batch,
    targets: Batch,
    inner_products: bool = True,
    test_gradients: str = "auto",
    max_micro_batch_size: int = 256,
) -> Moments:
    """The moments of one batch at the model's present weights; in a plain PyTorch program or on every rank of one.

    The model is left as it was: modes, buffers, gradients, random states.

    Args:
        model: any module, called as `model(inputs)`.
        loss: of outputs and targets, for example `torch.nn.functional.cross_entropy`: the mean or the sum over the
            samples of any function of one sample's output and target.
        inputs: (n, …), this rank's samples; a tensor, or tuples, lists and dicts of tensors.
        targets: (n, …), likewise.
        inner_products: measure Σ p_i and Σ p_i², too (all tests but the norm test need them).
        test_gradients: auto, ghost, vmap or loop (see `build`).
        max_micro_batch_size: samples in a pass.

    Raises:
        ValueError: the loss is no mean or sum over samples; or no way (or not the one named) gives this model's
            per-sample gradients. It says what to choose instead.
    """
    probe = tuple(some(batch, slice(0, PROBE)) for batch in (inputs, targets))
    estimator, _ = build(test_gradients, model, loss, inner_products, max_micro_batch_size, probe)
    with estimator.observe(inputs, targets):
        pass
    return estimator.moments()


def build(
    test_gradients: str,
    model: nn.Module,
    loss: Loss,
    inner_products: bool,
    max_micro_batch_size: int,
    probe: tuple[Batch, Batch],
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    in_training_pass: bool = False,
    num_groups: int = 8,
    notify: Callable[[str], None] = lambda line: None,
    recheck: bool = True,
    cuts: bool = False,
) -> tuple["Estimator", list[str]]:
    """The estimator by its name on the command line, and what the user should be notices of it.

    Args:
        test_gradients: ghost, vmap, loop, micro_batch (worker: the same), or auto: the first of ghost (where it covers
            every parameter), vmap and loop that agrees with single samples (verification.py).
        probe: inputs and targets of up to `PROBE` samples, on which estimators are checked.
        in_training_pass: the training pass itself runs inside `observe`, on `model` and uncompiled.
        num_groups: bounds the gradient copies that micro_batch keeps: at most twice as many.
        notify: called with a line where something turns out later.
        cuts: micro_batch cuts a batch that comes in one piece, of one process, in passes of its own.
        recheck: compare a handful of samples again at the 2nd, 20th, 200th, … measured step, on what the step is.
        (The others: see `Estimator`.)

    Raises:
        ValueError: as `moments`. On several ranks the verdict is the same on all.
    """
    arguments = (model, loss, inner_products, max_micro_batch_size, autocast)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if test_gradients in ("micro_batch", "worker"):
        if late := after_accumulation(trained):
            raise ValueError(
                f"test_gradients={test_gradients} compares gradients before the hooks of "
                f"register_post_accumulate_grad_hook ({listed(sorted(late))}) with what these leave: use "
                "register_hook, or take test_gradients=auto"
            )
        kind = CutGradients if cuts else MicroBatchGradients
        return kind(*arguments, num_groups=num_groups), []
    check = _checked(model, loss, *probe)
    by_layers = couples_samples(model)
    coupled = by_layers or bool(agreed("coupled" * check.couples, next(model.parameters()).device))
    notices = [COUPLED if by_layers else COUPLED_BY_ITSELF] * coupled
    hooks, others = changing(trained)
    if others:
        notices.append(BEFORE_HOOKS.format(listed(sorted(others))))
    in_training_pass = in_training_pass and not (coupled or is_compiled(model) or others)
    failures: dict[str, str] = {}
    for name in ("ghost", "vmap", "loop") if test_gradients == "auto" else (test_gradients,):
        estimator, problem = _candidate(name, check, arguments, in_training_pass, notify)
        estimator.adds_up, estimator.recheck = check.adds_up, recheck and name != "loop"
        estimator.couples_samples = coupled
        for own in (estimator, *getattr(estimator, "references", ())):
            own.hooks = hooks
        covers = isinstance(estimator, SingleGradients) or not getattr(estimator, "uncovered", None)
        if not problem and not covers:
            lacking = f"no rule for {listed(sorted(estimator.uncovered))}"
            if test_gradients == "auto":
                problem = lacking
            else:
                notices.insert(0, f"test_gradients=ghost takes per-sample gradients in part: {lacking}")
        if not problem:
            break
        failures[name] = problem
    else:
        choice = "loop" if test_gradients != "loop" else "micro_batch"
        raise ValueError(
            f"test_gradients={test_gradients} does not give this model's per-sample gradients ({problem}): "
            f"choose test_gradients=auto or {choice}"
        )
    if failures:
        reasons = "; ".join(f"{other}: {words}" for other, words in failures.items())
        notices.insert(0, f"using {name} for the statistics (test_gradients=auto); not usable: {reasons}")
    if name == "loop":
        notices.insert(1, LOOP.format(check.price, check.n))
    if check.precision != "float64":
        words = f"was made in {check.precision}, in which small errors cannot be seen"
        notices.append(f"the check of test_gradients={name} {words}")
    return estimator, notices


BEFORE_HOOKS = (
    "hooks change the gradients of {} in a way that is not linear, or after their accumulation: the statistics are of "
    "the gradients before them"
)
LOOP = (
    "test_gradients=loop takes one backward pass a sample: here about {:.1f} times a plain step's time for {} samples"
)


def _checked(model: nn.Module, loss: Loss, inputs: Batch, targets: Batch) -> Check:
    """Raises: ValueError on all ranks where it fails on one."""
    device = next(model.parameters()).device
    try:
        check, problem = Check(model, loss, inputs, targets), ""
    except ValueError as error:
        check, problem = None, str(error)
    if problem := agreed(problem, device):
        raise ValueError(problem)
    return check


def _candidate(
    name: str, check: Check, arguments: tuple, in_training_pass: bool, notify: Callable[[str], None]
) -> tuple[OwnPass, str]:
    """An estimator, and what the check says against it (on any rank)."""
    if name == "ghost":
        estimator: OwnPass = GhostNorms(*arguments, in_training_pass=in_training_pass, notify=notify)
    else:
        estimator = BY_SAMPLE[name](*arguments, notify=notify)
    problem = ""  # of `loop` there is none: it is what the others are compared with
    try:
        if isinstance(estimator, GhostNorms):
            problem = check.of_ghost(estimator)
        elif isinstance(estimator, PerSampleGradients):
            problem = check.of_vmap(estimator)
    except Exception as error:  # a model raises what it likes
        problem = first_line(error)
    estimator.moving = check.moving
    return estimator, agreed(problem, estimator.device)
