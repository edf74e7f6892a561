"""Every kind of module and use of a parameter (kinds.py), against the loop over samples on the module itself."""

import copy
import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from adadagrad import gradients
from adadagrad.gradients import ghost_rules
from adadagrad.gradients.samples import chunks, converted
from checks import kinds, oracle
from checks.conftest import ROOT
from checks.kinds import CLASSES, KINDS, STATISTICS, Kind, relative

PAGE = (ROOT / "docs" / "module_kinds.md").read_text()


def ids(kind: Kind) -> str:
    return f"{kind.group}: {kind.name}"


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_exact_or_refused_as_the_page_says(kind):
    cells = kinds.cells(kind)
    assert not any("off by" in cell for cell in cells)
    assert kinds.row(kind, cells) in PAGE, "run: python -m checks.kinds > docs/module_kinds.md"


def test_every_layer_of_torch_is_listed():
    assert kinds.layers_with_parameters() <= set(kinds.LAYERS)


def test_the_page_has_no_line_too_many():
    assert PAGE.count("\n| ") == len(KINDS) + 1


def everything_of(model: nn.Module) -> list:
    """What no pass of an estimator may change."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    attributes = [{k: v for k, v in m.__dict__.items() if k not in ("_buffers", "_parameters")} for m in modules]
    values = [(name, id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()]
    grads = [parameter.grad for parameter in model.parameters()]
    hooks = [[len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)] for m in modules]
    return [
        [copy.copy(own) for own in attributes],
        [m.training for m in model.modules()],
        values,
        grads,
        hooks,
        torch.get_rng_state().tolist(),
        random.getstate(),
        [part.tolist() if isinstance(part, numpy.ndarray) else part for part in numpy.random.get_state()],
    ]


def assert_same(before: list, after: list, hooks: bool = True) -> None:
    """
    Args:
        hooks: they are the same, too: while a pass is observed, there is one more.
    """
    for ours, theirs in zip(before[0], after[0]):
        assert list(ours) == list(theirs) and all(ours[name] is theirs[name] for name in ours if name != "training")
    for (name, identity, value), (_, own_identity, own_value) in zip(before[2], after[2]):
        assert identity == own_identity and torch.equal(value, own_value), name
    assert all(ours is theirs for ours, theirs in zip(before[3], after[3]))
    assert before[1] == after[1] and before[5:] == after[5:]
    assert before[4] == after[4] or not hooks


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_training_pass_in_pieces(kind):
    """Where it can be the test's own pass: cut into micro-batches, the loss scaled. What is no training is not seen."""
    model, inputs, targets = kind.build()
    expected = oracle.statistics(oracle.gradient_vectors(model, kind.loss, inputs, targets))
    before = everything_of(model)
    estimator, _ = gradients.build("auto", model, kind.loss, True, 4, (inputs, targets), in_training_pass=True)
    assert_same(before, everything_of(model))
    in_training_pass, scale = getattr(estimator, "in_training_pass", False), 0.25
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for x, y in chunks(4, inputs, targets):
        with torch.no_grad():  # the oracle's passes all begin with these
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        before = everything_of(model)
        with estimator.observe(x, y, scale, whole=False):
            assert_same(before, everything_of(model), hooks=False)
            if in_training_pass:
                (scale * (1 if kind.adds_up else len(y)) * kind.loss(model(x), y)).backward()
        assert before[4] == everything_of(model)[4]
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= scale * len(targets)
    before = everything_of(model)
    moments = estimator.moments()
    assert_same(before, everything_of(model))
    for name in STATISTICS:
        assert relative(getattr(moments, name), expected[name]) < 1e-9, name


@pytest.mark.parametrize("kind", KINDS[::3], ids=ids)
def test_single_precision(kind):
    model, inputs, targets = kind.build()
    expected = oracle.statistics(oracle.gradient_vectors(model, kind.loss, inputs, targets))
    model._apply(lambda t: t.float() if t.is_floating_point() else t.to(torch.complex64) if t.is_complex() else t)
    moments = gradients.moments(model, kind.loss, converted(inputs, torch.float32), targets)
    for name in STATISTICS:
        assert relative(getattr(moments, name), expected[name]) < 5e-4, name


def batch(n: int = 7, features: int = 6):
    return torch.randn(n, features, generator=torch.Generator().manual_seed(n)).double(), torch.arange(n) % CLASSES


def exact(model: nn.Module, loss, inputs, targets, moments) -> bool:
    expected = oracle.statistics(oracle.gradient_vectors(model, loss, inputs, targets))
    return all(relative(getattr(moments, name), expected[name]) < 1e-9 for name in STATISTICS)


def info_nce(outputs, targets):
    z = normalize(outputs, dim=1)
    return cross_entropy(z @ z.detach().roll(1, 0).T / 0.1, torch.arange(len(z)))


def padded_tokens(outputs, targets):
    """A mean over the tokens of the batch, some of which do not count."""
    targets = torch.where(torch.arange(4) < targets.unsqueeze(1) + 2, targets.unsqueeze(1), -100)
    return cross_entropy(outputs.view(-1, 1, CLASSES).expand(-1, 4, -1).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("test_gradients", ["auto", "ghost", "vmap", "loop"])
@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 20.0])), padded_tokens, info_nce],
    ids=["class weights", "ignore_index", "contrastive"],
)
def test_a_loss_that_is_no_mean_over_samples_is_refused(loss, test_gradients):
    inputs, targets = batch()
    model = nn.Sequential(nn.Linear(6, CLASSES)).double()
    loss = loss.double() if isinstance(loss, nn.Module) else loss
    with pytest.raises(ValueError, match="neither the mean nor the sum .* test_gradients=micro_batch"):
        gradients.moments(model, loss, inputs, targets, test_gradients=test_gradients)


def test_refusals_say_what_to_choose():
    kind = next(kind for kind in KINDS if kind.name == "LSTM")
    model, inputs, targets = kind.build()
    with pytest.raises(ValueError, match="choose test_gradients=auto or loop") as refused:
        gradients.moments(model, kind.loss, inputs, targets, test_gradients="vmap")
    assert "\n" not in str(refused.value)

    class NeedsTwo(nn.Linear):
        def forward(self, x):
            assert len(x) > 1, "two samples, please"
            return super().forward(x)

    inputs, targets = batch()
    with pytest.raises(ValueError, match="two samples, please.*only test_gradients=micro_batch is left"):
        gradients.moments(NeedsTwo(6, CLASSES).double(), cross_entropy, inputs, targets)


def test_a_model_that_couples_samples_is_named():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - 0.5 * x.mean(0))

    inputs, targets = batch()
    model = Centred(6, CLASSES).double()
    estimator, told = gradients.build("auto", model, cross_entropy, True, 8, (inputs, targets), in_training_pass=True)
    assert any("couples the samples" in line for line in told)
    with estimator.observe(inputs, targets):
        pass
    assert exact(model, cross_entropy, inputs, targets, estimator.moments())


class Branches(nn.Module):
    """A branch that only some batches take: its parameters have no rule there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.act, self.head = nn.Linear(6, 5), nn.PReLU(5), nn.Linear(5, CLASSES)
        self.open = False

    def forward(self, x):
        x = self.layer(x)
        return self.head(self.act(x) if self.open else x.tanh())


@pytest.mark.parametrize("in_training_pass", [False, True])
def test_a_branch_that_the_check_has_not_taken(in_training_pass):
    inputs, targets = batch()
    model, lines = Branches().double(), []
    arguments = ("auto", model, cross_entropy, True, 8, (inputs, targets))
    estimator, told = gradients.build(*arguments, in_training_pass=in_training_pass, notify=lines.append)
    assert isinstance(estimator, gradients.GhostNorms) and not told
    for model.open in (False, True, False):
        model.zero_grad()
        with estimator.observe(inputs, targets, 1 / len(inputs)):
            if in_training_pass:
                cross_entropy(model(inputs), targets).backward()
        assert exact(model, cross_entropy, inputs, targets, estimator.moments())
    assert not lines


def test_a_branch_beyond_all_estimators_decides_nothing():
    inputs, targets = batch()
    model, lines = Branches().double(), []
    arguments = ("auto", model, cross_entropy, False, 8, (inputs, targets))
    estimator, _ = gradients.build(*arguments, in_training_pass=True, notify=lines.append)
    model.open = True

    class NeedsTwo(nn.PReLU):
        def forward(self, x):
            if len(x) < 2:
                raise RuntimeError("two samples, please")
            return super().forward(x)

    model.act.__class__ = NeedsTwo
    with estimator.observe(inputs, targets, 1 / len(inputs)):
        cross_entropy(model(inputs), targets).backward()
    assert estimator.moments().variance != estimator.moments().variance  # NaN
    assert lines == ["batch size unchanged where act.weight take part: no per-sample gradients of them "
                     "(two samples, please)"]  # fmt: skip


@pytest.mark.parametrize("test_gradients", ["auto", "vmap", "loop"])
def test_modes_stay_as_they_are(test_gradients):
    """Dropout and BatchNorm layers set to eval one by one stay so, in the estimators' passes and after them."""
    inputs, targets = batch()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).double().train()
    model[1].eval(), model[2].eval()
    model[1].running_mean.normal_()
    moments = gradients.moments(model, cross_entropy, inputs, targets, test_gradients=test_gradients)
    assert [module.training for module in model.modules()] == [True, True, False, False, True]
    assert exact(model, cross_entropy, inputs, targets, moments)


def test_a_frozen_batch_norm_needs_no_pass_of_its_own():
    inputs, targets = batch()
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)).double()
    for mode, expected in ((True, False), (False, True)):
        model[1].train(mode)
        estimator, told = gradients.build(
            "auto", model, cross_entropy, True, 8, (inputs, targets), in_training_pass=True
        )
        assert estimator.in_training_pass == expected and bool(told) != expected


def test_a_wrong_rule_is_found_however_small_its_share(monkeypatch):
    """A bias whose gradient is a millionth of the whole is compared by itself."""

    inputs, targets = batch()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    model[0].bias = nn.Parameter(torch.tensor(0.0).double().expand(8).clone())

    class Faint(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight) + 1e-6 * self.bias

    model[2].__class__ = Faint
    assert isinstance(
        gradients.build("auto", model, cross_entropy, True, 8, (inputs, targets))[0], gradients.GhostNorms
    )
    wrong = ghost_rules._arithmetic(lambda B, source, other, is_first: 2 * B)
    for function in [function for function, rule in ghost_rules.RULES.items() if rule is ghost_rules._add]:
        monkeypatch.setitem(ghost_rules.RULES, function, wrong)
    _, told = gradients.build("auto", model, cross_entropy, True, 8, (inputs, targets))
    assert "its gradients of 2.bias are 100.0% off those of single samples" in told[0]


def test_checks_of_random_models_see_the_same_draws():
    inputs, targets = batch()
    torch.manual_seed(0)

    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            x = self.layer(x)
            x = x + 0.1 * torch.randn_like(x) * torch.rand(len(x), 1, dtype=x.dtype)
            x = nn.functional.dropout(x, 0.3) * torch.empty_like(x).exponential_()
            if random.random() < 0.5:
                x = x.tanh()
            return self.head(x) * numpy.random.rand() * torch.bernoulli(torch.full_like(x[:, :1], 0.7))

    for kind in ("auto", "vmap"):
        estimator, told = gradients.build(kind, Draws().double(), cross_entropy, True, 8, (inputs, targets))
        assert not told and isinstance(
            estimator, gradients.GhostNorms if kind == "auto" else gradients.PerSampleGradients
        )


def test_float16_is_not_used_without_a_scaler():
    """Own passes under 16-bit mixed precision: small gradients are not lost."""
    inputs, targets = batch(5)
    inputs, model = inputs.float(), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def loss(outputs, targets):
        return 1e-7 * cross_entropy(outputs.float(), targets)

    def autocast():
        return torch.autocast("cpu", torch.float16)

    expected = oracle.statistics(oracle.gradient_vectors(model.double(), loss, inputs.double(), targets))
    model.float()
    for kind in ("vmap", "ghost", "loop"):
        estimator, _ = gradients.build(kind, model, loss, True, 8, (inputs, targets), autocast)
        with estimator.observe(inputs, targets):
            pass
        assert estimator.moments().variance == pytest.approx(expected["variance"], rel=0.05), kind
