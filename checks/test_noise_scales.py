"""--monitor_metrics: other noise scales, against per-sample gradients and the full Hessian of a small net."""

import csv
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import main
from adadagrad import gradients
from adadagrad.gradients.noise_scales import NoiseScales
from adadagrad.tests import OTHER_SCALES
from checks.conftest import train
from checks.test_every_option import HERE

N, NAMES = 12, tuple(OTHER_SCALES)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, generator=generator).double(), torch.arange(N) % 3


def vector(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def by_hand(model: nn.Module, root: torch.Tensor) -> tuple[dict[str, tuple[float, float]], Callable]:
    """Variance and squared mean gradient of each scale: one backward pass a sample, and the Hessian entry by entry; and
    zᵀPHPz of these signs (k, N), a number for each row."""
    x, y = samples()
    parameters = list(model.parameters())
    own = torch.stack(
        [vector(torch.autograd.grad(cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)) for i in range(N)]
    )
    mean, covariance = own.mean(0), torch.cov(own.T)
    sizes = [p.numel() for p in parameters]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = [part.view_as(p) for part, p in zip(flat.split(sizes), parameters)]
        return cross_entropy((x @ pieces[0].T + pieces[1]).tanh() @ pieces[2].T + pieces[3], y)

    hessian = torch.autograd.functional.hessian(loss, vector(parameters).detach())
    variance, weighted = covariance.diagonal(), hessian / root / root[:, None]
    numbers = {
        "optimizer": ((variance / root).sum(), (mean**2 / root).sum()),
        "optimizer_squared": ((variance / root**2).sum(), (mean**2 / root**2).sum()),
        "curvature": ((weighted @ covariance).trace(), mean @ weighted @ mean),
    }
    found = {name: (float(noise), float(signal - noise / N)) for name, (noise, signal) in numbers.items()}
    found["l1"] = float(variance.sqrt().sum() ** 2), float(mean.abs().sum() ** 2)

    def along(signs: torch.Tensor) -> torch.Tensor:
        directions = signs @ (own - mean) / math.sqrt(N - 1)
        return ((directions @ weighted) * directions).sum(1)

    return found, along


def stepped(model: nn.Module, kind: type, **options) -> torch.optim.Optimizer:
    """An optimizer that has taken three steps on other samples, and the weights of before."""
    optimizer, before = kind(model.parameters(), lr=0.01, **options), [p.detach().clone() for p in model.parameters()]
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        optimizer.zero_grad()
        inputs, targets = torch.randn(8, 3, generator=generator).double(), torch.randint(3, (8,), generator=generator)
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before):
            parameter.copy_(value)
    return optimizer


def roots(optimizer: torch.optim.Optimizer, kind: str) -> torch.Tensor:
    states = optimizer.state.values()
    if kind == "Adam":
        return vector((s["exp_avg_sq"] / (1 - 0.99**3)).sqrt() + 1e-8 for s in states)
    if kind == "Adagrad":
        return vector((s["sum"] / 3).sqrt() + 1e-10 for s in states)
    return vector(s["square_avg"].sqrt() + 1e-8 for s in states)


def scales_of(model, optimizer, names=NAMES, mean_loss=cross_entropy) -> NoiseScales:
    estimator, _ = gradients.build("vmap", model, mean_loss, False, 5, probe=samples())
    return NoiseScales(names, estimator, optimizer, half_life=0.0)


def seen(scales: NoiseScales, cuts=(7, 5)) -> NoiseScales:
    x, y = samples()
    for some in torch.arange(N).split(list(cuts)):
        scales.add(lambda some=some: x[some], y[some])
    return scales


@pytest.mark.parametrize(
    "kind, options", [("Adam", {"betas": (0.9, 0.99)}), ("Adagrad", {}), ("RMSprop", {})], ids=lambda v: str(v)[:8]
)
def test_scales_against_the_full_hessian(kind, options):
    model = net()
    optimizer = stepped(model, getattr(torch.optim, kind), **options)
    expected, along = by_hand(model, roots(optimizer, kind))
    found = seen(scales_of(model, optimizer))._of_batch(torch.Generator().manual_seed(0))
    for name in ("optimizer", "optimizer_squared", "l1"):
        assert (found[name].variance, found[name].signal) == pytest.approx(expected[name], rel=1e-9), name
    noise, signal = expected["curvature"]
    drawn, generator = found["curvature"], torch.Generator().manual_seed(0)
    signs = torch.cat([2.0 * torch.randint(2, (n,), generator=generator) - 1 for n in (5, 2, 5)])  # at most 5 at a time
    assert drawn.variance == pytest.approx(float(along(signs.double()[None])), rel=1e-9)
    assert drawn.signal + drawn.variance / N == pytest.approx(signal + noise / N, rel=1e-9)
    many = along(2.0 * torch.randint(2, (10**6, N), generator=generator).double() - 1)  # right in the mean
    assert float(many.mean()) == pytest.approx(noise, abs=4 * float(many.std()) / 1000)


def test_without_second_moments():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected, _ = by_hand(model, torch.ones(31, dtype=torch.float64))
    found = seen(scales_of(model, optimizer, ("l1", "curvature"))).measure(N, seed=3)
    assert found["l1"] == pytest.approx(expected["l1"][0] / expected["l1"][1])
    assert found["curvature"] is None or found["curvature"] > 0
    for other in (optimizer, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)):
        with pytest.raises(ValueError, match="SGD does not divide"):
            scales_of(model, other, ("optimizer",))
    untouched = torch.optim.Adam(model.parameters())  # no step was taken: there is no metric yet
    assert seen(scales_of(model, untouched)).measure(N, seed=3)["optimizer"] is None


def test_a_sum_of_losses_has_the_same_scales():
    model = net()
    optimizer = stepped(model, torch.optim.Adam)
    summed = scales_of(model, optimizer, mean_loss=lambda outputs, y: cross_entropy(outputs, y, reduction="sum"))
    both = (scales_of(model, optimizer), summed)
    one, other = (seen(scales)._of_batch(torch.Generator().manual_seed(5)) for scales in both)
    for name in NAMES:
        assert (one[name].variance, one[name].signal) == pytest.approx((other[name].variance, other[name].signal)), name


WORDS = (
    "--accelerator=cpu --devices=1 --model=logistic --test=False --monitor_interval=2 --max_samples=320 --smoothing=99"
)


def test_a_run_is_the_same_with_them(tmp_path):
    """Nothing of the training changes; columns, and a continuation whose averages go on."""
    rows = {}
    for name, more in {"plain": [], "all": [f"--monitor_metrics=[{','.join(NAMES)}]"]}.items():
        words = [*WORDS.split(), "--max_micro_batch_size=8", "--statistics=unbiased", "--checkpoint_interval=11"]
        words += [f"--out_dir={tmp_path}", f"--run_name={name}", *more]
        assert main.main(words) == 0
        rows[name] = list(csv.DictReader((tmp_path / name / "metrics.csv").open()))
    timed = ("step_time", "test_time", "samples_per_second")
    same = [{k: v for k, v in row.items() if k in rows["plain"][0] and k not in timed} for row in rows["all"]]
    assert same == [{k: v for k, v in row.items() if k not in timed} for row in rows["plain"]]
    measured = [row for row in rows["all"] if row["variance"]]
    assert all(float(row["noise_scale_l1"]) > 0 for row in measured)
    assert sum(bool(row["noise_scale_optimizer"]) for row in measured) > len(measured) / 2
    assert sum(bool(row["noise_scale_curvature"]) for row in measured) > len(measured) / 2
    again = [*words, f"--resume={tmp_path / 'all' / 'checkpoints' / 'step-00000011.pt'}", "--run_name=on"]
    assert main.main(again) == 0
    on = list(csv.DictReader((tmp_path / "on" / "metrics.csv").open()))
    names = [f"noise_scale_{name}" for name in NAMES]
    assert [[row[n] for n in names] for row in on] == [[row[n] for n in names] for row in rows["all"]]


@pytest.mark.parametrize(
    "more, says",
    [
        (["--monitor_interval=0"], "acts only with --test=True or --monitor_interval"),
        (["--optimizer=sgd"], "SGD does not divide each coordinate"),
        ([f"--dataset={HERE}:tiny", f"--model={HERE}:with_batch_norm"], "not to be had with BatchNorm"),
    ],
)
def test_what_is_refused(tmp_path, capfd, more, says):
    words = [*WORDS.split(), f"--out_dir={tmp_path}", "--monitor_metrics=[optimizer]", *more]
    assert main.main(words if "0" not in more[0][-1] else [w for w in words if "smoothing" not in w]) == 2
    assert says in capfd.readouterr().err


@pytest.mark.long
def test_on_two_processes(tmp_path):
    """The same sums, however the batch is cut, but for the signs of the random direction."""
    words = [*WORDS.split()[2:], "--monitor_metrics=[optimizer,l1]", "--max_samples=160"]
    one, two = (train(tmp_path, *words, processes=n, name=str(n)) for n in (1, 2))
    for name in ("noise_scale_optimizer", "noise_scale_l1"):
        own = [[float(row[name] or 0) for row in run.rows] for run in (one, two)]
        assert own[0] == pytest.approx(own[1], rel=1e-3), json.dumps(own)
