"""Optimizers by name, AdaGrad-Norm against a hand-written loop, schedules against written-out values."""

import copy
import dataclasses
import math
from collections import OrderedDict

import pytest
import torch

import data
import models
import optim
from adadagrad.control import Transition, carry_over
from checks.conftest import column, train
from options.errors import UsageError
from options.schema import Config


def parameters(n: int = 2) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, i + 1, generator=generator)) for i in range(n)]


def set_gradients(params, step: int) -> None:
    for i, p in enumerate(params):
        p.grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype) + step + i).view_as(p)


def test_adagrad_norm_equals_the_formula():
    params = parameters()
    groups = [{"params": [params[0]], "lr": 0.1}, {"params": [params[1]], "lr": 0.3, "weight_decay": 0.01}]
    optimizer = optim.AdaGradNorm(groups, initial_accumulator_value=0.5)
    by_hand, b_sq = [p.detach().clone().double() for p in params], 0.5
    for step in range(5):
        set_gradients(params, step)
        g = [params[0].grad.double(), params[1].grad.double() + 0.01 * by_hand[1]]
        b_sq += sum(float(x.square().sum()) for x in g)
        by_hand = [w - lr * x / math.sqrt(b_sq) for w, x, lr in zip(by_hand, g, (0.1, 0.3))]
        optimizer.step()
    for p, expected in zip(params, by_hand):
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_adagrad_norm_state_survives():
    params = parameters()
    optimizer = optim.AdaGradNorm(params, lr=0.1)
    set_gradients(params, 0)
    optimizer.step()
    other_params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = optim.AdaGradNorm(other_params, lr=0.7)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in (1, 2):
        for ps, o in ((params, optimizer), (other_params, other)):
            set_gradients(ps, step)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(params, other_params))


@pytest.mark.parametrize("name", ["adagrad", "adagradnorm", "adam", "adamw", "sgd", "sgdm", "RMSprop", "NAdam"])
def test_every_name_makes_a_step(name):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = optim.build(params, Config(optimizer=name, learning_rate=0.1))
    set_gradients(params, 0)
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, params))


class Adamlike(torch.optim.Adam):
    def __init__(self, *args, **more):
        super().__init__(*args, **more)


def test_arguments_that_are_handed_on():
    group = optim.build(parameters(), Config(optimizer="checks.test_optim:Adamlike", beta2=0.9)).param_groups[0]
    assert group["betas"] == (0.9, 0.9)
    with pytest.raises(UsageError, match="did you mean 'eps'"):
        optim.build(parameters(), Config(optimizer="checks.test_optim:Adamlike", optimizer_args={"epsilon": 1}))


def test_arguments():
    group = optim.build(parameters(), Config(optimizer="sgdm", learning_rate=0.1)).param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["lr"]) == (0.9, 5e-4, 0.1)
    options = Config(
        optimizer="sgdm", momentum=0.5, weight_decay=0.0, optimizer_args={"nesterov": True, "dampening": 0}
    )
    group = optim.build(parameters(), options).param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.5, 0.0, True)
    assert optim.build(parameters(), Config(optimizer="adam", beta2=0.9)).param_groups[0]["betas"] == (0.9, 0.9)
    own = optim.build(parameters(), Config(optimizer="torch.optim:Adamax"))
    assert isinstance(own, torch.optim.Adamax)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"optimizer": "adagradd"}, "did you mean 'adagrad'"),
        ({"optimizer": "adam", "momentum": 0.9}, "--momentum: adam takes no"),
        ({"optimizer": "adam", "optimizer_args": {"epsilon": 1}}, "did you mean 'eps'"),
        ({"optimizer": "adam", "optimizer_args": {"eps": -1}}, "--optimizer=adam"),
        ({"optimizer": "nowhere:Adam"}, "cannot import nowhere"),
        ({"optimizer": "torch.optim:lr_scheduler"}, "is not a torch.optim.Optimizer class"),
        ({"optimizer": "LBFGS"}, "closure"),
        ({"optimizer": "adam", "optimizer_args": {"capturable": True}}, "capturable=True"),
        ({"optimizer": "SparseAdam"}, "does not support dense gradients"),
        ({"optimizer": "lbfgs"}, "did you mean 'LBFGS'"),
    ],
)
def test_refused(options, words):
    with pytest.raises(UsageError, match=words):
        optim.build(parameters(), Config(**options))


@pytest.mark.parametrize(
    "shape, position, expected",
    [
        (optim.cosine, 0, 0.0),
        (optim.cosine, 50, 0.5),
        (optim.cosine, 100, 1.0),
        (optim.cosine, 200, 0.2 + 0.75 * 0.8),
        (optim.cosine, 250, 0.6),
        (optim.cosine, 400, 0.2),
        (optim.cosine, 9999, 0.2),
        (optim.linear, 175, 0.8),
        (optim.linear, 250, 0.6),
        (optim.linear, 325, 0.4),
        (optim.linear, 400, 0.2),
    ],
)
def test_warmup_then_decay(shape, position, expected):
    """Peak 1, warm-up to 100, end at 400, floor 0.2."""
    assert optim.warmup_decay(position, 1.0, 100, 400, 0.2, shape) == pytest.approx(expected)


def test_learning_rate_follows_the_options():
    constant = optim.LearningRate(Config(decay_lr=False, learning_rate=0.5, max_lr=0.05), 100)
    assert [constant(s, s) for s in (0, 50, 10**6)] == [0.05] * 3  # capped from the first step on
    by_steps = Config(lr_decay_type="iter", lr_decay_iters=10, scheduler="linear", learning_rate=1.0)
    assert optim.LearningRate(by_steps, 100)(samples=10**6, steps=5) == 0.5
    steps = Config(
        scheduler="multistep", milestones=[10, 20], gamma=0.1, learning_rate=1.0, min_lr=0.05, warmup_samples=4
    )
    positions = (0, 2, 4, 9, 10, 19, 20, 99)
    small = dataclasses.replace(steps, batch_size=2)  # the first rung: 2 of 4 samples
    values = [optim.LearningRate(small, 100)(samples, 0) for samples in positions]
    assert values == pytest.approx([0.5, 0.5, 1, 1, 0.1, 0.1, 0.05, 0.05])
    to_the_end = optim.LearningRate(Config(scheduler="linear", learning_rate=1.0), max_samples=200)
    assert to_the_end(100, 1) == 0.5


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "multistep"])
@pytest.mark.parametrize("unit, first", [("sample", 8 / 32), ("iter", 1 / 32)])
def test_first_rung_of_a_warmup(scheduler, unit, first):
    """Peak 0.5, batches of 8: the first step has what the second one has (as published it has 0, and is wasted)."""
    warmup = {"warmup_samples": 32} if unit == "sample" else {"warmup_iters": 32, "lr_decay_iters": 100}
    milestones = {"milestones": [50]} if scheduler == "multistep" else {}
    options = {"lr_decay_type": unit, "scheduler": scheduler, "learning_rate": 0.5, "batch_size": 8}
    rate = optim.LearningRate(Config(**options, **warmup, **milestones), 1000)
    assert rate(0, 0) == rate(8, 1) == 0.5 * first
    assert rate(16, 2) == 2 * rate(8, 1)
    assert optim.rising(0, 0.5, warmup=4, first=8) == 0.5  # a warm-up shorter than the first batch


def test_state_lies_in_memory_as_the_parameters():
    """A checkpoint's order may be another one; fused optimizers read both as one stretch of numbers."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        saved["state"][0][name] = saved["state"][0][name].contiguous()
    optimizer.load_state_dict(saved)
    optim.lay_as_parameters(optimizer)
    assert all(
        torch.equal(optimizer.state[weight][name], saved["state"][0][name]) for name in ("exp_avg", "exp_avg_sq")
    )
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()


@pytest.mark.parametrize(
    "words", [{"optimizer": name} for name in optim.NAMES if name != "muon"] + [{"optimizer": "sgd", "momentum": 0.0}]
)
def test_bytes_of_state_to_come(words):
    """What the first step adds is told before it; Adagrad has made its state already."""
    model = torch.nn.Linear(7, 5).double()
    optimizer = optim.build(model.parameters(), Config(**words))
    kept = lambda: sum(  # noqa: E731
        t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.dim()
    )
    before, told = kept(), optim.bytes_of_state_to_come(optimizer, Config(**words))
    model(torch.ones(2, 7, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert kept() - before == told
    assert optim.bytes_of_state_to_come(optimizer, Config(**words)) == 0


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 6)
    return torch.nn.Sequential(
        OrderedDict(zip(("words", "first", "norm", "second"), layers), head=torch.nn.Linear(6, 3))
    )


def group_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict:
    return next(group for group in optimizer.param_groups if any(parameter is own for own in group["params"]))


def train_on(optimizer: torch.optim.Optimizer, model: torch.nn.Module, steps: int = 3) -> None:
    for step in range(steps):
        model(torch.arange(step, step + 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_groups_keep_their_proportions():
    """Every group's own rate and decay, as torch's optimizer makes steps with them by itself."""
    model, by_hand = network(), network()
    options = {"no_weight_decay": "bias, norm", "lr_factors": {"head": 10, "*.bias": 0.5}, "weight_decay": 0.1}
    optimizer = optim.build(model, Config(optimizer="sgd", learning_rate=0.2, **options))
    expected = {
        "words.weight": (1, 0.1), "first.weight": (1, 0.1), "first.bias": (0.5, 0), "norm.weight": (1, 0),
        "norm.bias": (0.5, 0), "second.weight": (1, 0.1), "second.bias": (0.5, 0), "head.weight": (10, 0.1),
        "head.bias": (5, 0),
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        group, (factor, decay) = group_of(optimizer, parameter), expected[name]
        assert (group["lr"], group["weight_decay"]) == pytest.approx((0.2 * factor, decay)), name
    optim.set_learning_rate(optimizer, 0.05)
    own = [
        {"params": [p], "lr": 0.05 * expected[n][0], "weight_decay": expected[n][1]}
        for n, p in by_hand.named_parameters()
    ]
    train_on(optimizer, model)
    train_on(torch.optim.SGD(own), by_hand)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_layers_named_by_numbers():
    """YAML reads them as numbers."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = optim.build(model, Config(optimizer="sgd", learning_rate=0.2, lr_factors={1: 0.5}))
    assert group_of(optimizer, model[0].weight)["lr"] == 0.2 and group_of(optimizer, model[1].weight)["lr"] == 0.1


class Discriminative(torch.optim.SGD):
    """Vectors at a tenth of the rate."""

    def __init__(self, params, lr=0.1):
        params = list(params)
        groups = [p for p in params if p.dim() > 1], [p for p in params if p.dim() <= 1]
        super().__init__([{"params": groups[0]}, {"params": groups[1], "lr": lr / 10}], lr=lr)


def test_groups_of_an_optimizers_own():
    config = Config(optimizer="checks.test_optim:Discriminative", learning_rate=0.5)
    optimizer = optim.build(network(), config)
    optim.set_learning_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.01])
    resumed = optim.build(network(), config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # saved with a rate that has fallen
    optim.set_learning_rate(resumed, 0.3)
    assert [group["lr"] for group in resumed.param_groups] == pytest.approx([0.3, 0.03])


class OwnMuon(torch.optim.Muon):
    """A kind of it is known by its class."""


class HandsOn(torch.optim.Muon):
    def __init__(self, params, **more):
        super().__init__(params, **more)


class OfItsOwnLength(torch.optim.Muon):
    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum)


KINDS_OF_MUON = ["muon", "Muon", "torch.optim:Muon", *map("checks.test_optim:{}".format, ("OwnMuon", "HandsOn"))]


@pytest.mark.parametrize("name", [*KINDS_OF_MUON, "checks.test_optim:OfItsOwnLength"])
def test_muon_has_the_hidden_matrices_and_adamw_the_rest(name):
    model = network()
    optimizer = optim.build(model, Config(optimizer=name, learning_rate=0.01))
    muon, adamw = optimizer.optimizers
    of_muon = [name for name, p in model.named_parameters() if any(p is own for own in muon.param_groups[0]["params"])]
    assert of_muon == ["first.weight", "second.weight"]
    assert len(adamw.param_groups[0]["params"]) == len(list(model.parameters())) - 2
    as_long_as_adamws = None if name.endswith("OfItsOwnLength") else "match_rms_adamw"
    assert muon.param_groups[0]["adjust_lr_fn"] == as_long_as_adamws
    tied = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9, bias=False))
    tied[2].weight = tied[0].weight
    assert optim.build(tied, Config(optimizer="muon")).optimizers[0].param_groups[0]["params"] == [tied[1].weight]


def test_muon_takes_weights_of_layers_alone():
    """A table of positions is a matrix, too; the user is told what goes where."""

    class Positioned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = torch.nn.Parameter(torch.zeros(9, 4))
            self.body, self.attention = torch.nn.Linear(4, 4), torch.nn.MultiheadAttention(4, 2)
            self.head = torch.nn.Linear(4, 3)

    model = Positioned()
    taken = optim.build(model, Config(optimizer="muon")).optimizers[0].param_groups[0]["params"]
    own = [model.body.weight, model.attention.in_proj_weight, model.attention.out_proj.weight]
    assert {id(one) for one in taken} == {id(one) for one in own}
    said = optim.of_muon(model)
    assert "3 matrices (body.weight, " in said and "positions, head.weight among it" in said


def test_joined_optimizers_are_one():
    """The steps of the two by themselves; one state dict; copied, restored and coupled as one."""
    model, by_hand = network(), network()
    config = Config(optimizer="muon", learning_rate=0.01, beta2=0.99)
    optimizer = optim.build(model, config)
    told = optim.bytes_of_state_to_come(optimizer, config)
    matrices = [by_hand.first.weight, by_hand.second.weight]
    rest = [p for p in by_hand.parameters() if all(p is not matrix for matrix in matrices)]
    two = (
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99)),
    )
    train_on(optimizer, model)
    for step in range(3):
        by_hand(torch.arange(step, step + 6)).square().mean().backward()
        for one in two:
            one.step()
            one.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))
    kept = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    assert sum(value.numel() * value.element_size() for value in kept) == told
    other = network()
    other.load_state_dict(model.state_dict())
    resumed = optim.build(other, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, net in ((optimizer, model), (resumed, other)):
        carry_over.apply(Transition(16, 64, 16, gain=3.0, squares=2.0), one)
        optim.set_learning_rate(one, 0.02, decay=1.4)
        train_on(one, net)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.99**4)
    assert [group["weight_decay"] for group in resumed.param_groups] == pytest.approx([0.14, 0.14])


class ScheduleFree(torch.optim.SGD):
    """As schedulefree's classes: a step outside of train mode is an error."""

    mode = None

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"

    def step(self, closure=None):
        if self.mode != "train":
            raise RuntimeError("call train() before a step")
        return super().step(closure)


def test_schedule_free_optimizers_have_modes():
    model = network()
    optimizer = optim.build(model, Config(optimizer="checks.test_optim:ScheduleFree"))
    optim.set_training(optimizer, True)
    train_on(optimizer, model)
    optim.set_training(optimizer, False)
    assert optimizer.mode == "eval"
    optim.set_training(optim.build(model, Config(optimizer="adam")), False)  # has none: nothing happens


def test_schedulefree_is_evaluated_and_saved_at_its_averages(tmp_path):
    """The package's own class: what model.pt has, gives the validation loss of the last row."""
    pytest.importorskip("schedulefree")
    options = [
        "--model=logistic",
        "--optimizer=schedulefree:AdamWScheduleFree",
        "--decay_lr=False",
        "--max_samples=900",
    ]
    found = train(tmp_path, *options, "--recipe=steady", "--knee=50", "--batch_size=16")
    images, labels = data.load("digits", tmp_path).val.tensors
    model = models.build("logistic", (1, 8, 8), 10)
    model.load_state_dict(torch.load(found.folder / "model.pt", weights_only=True))
    loss = torch.nn.functional.cross_entropy(model(images.float() / 255), labels)
    assert found.summary["val_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert column(found, "batch_size")[-1] > 16
    assert "AdamWScheduleFree averages by itself" in found.stdout
    assert not (found.folder / "model_average.pt").exists()


class WithoutClosure(torch.optim.SGD):
    def step(self):
        return super().step()


def test_a_step_that_takes_no_closure():
    model = network()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train_on(optim.build(model, Config(optimizer="checks.test_optim:WithoutClosure")), model)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


class SharpnessAware(torch.optim.SGD):
    def step(self, closure=None):
        assert closure is not None, "sharpness-aware minimization requires a closure"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"optimizer": "checks.test_optim:SharpnessAware"}, "requires a closure"),
        ({"optimizer": "LBFGS"}, "computes the loss again"),
        ({"optimizer": "adagradnorm", "lr_factors": {"hed": 2.0}}, "no parameter 'hed'; did you mean 'head'"),
        ({"optimizer": "Rprop", "no_weight_decay": "bias"}, "has no weight decay"),
    ],
)
def test_groups_refused(options, words):
    with pytest.raises(UsageError, match=words):
        optim.build(network(), Config(**options))
    with pytest.raises(UsageError, match="no hidden layer"):
        optim.build(torch.nn.Linear(2, 2), Config(optimizer="muon"))
