"""Truth, not only agreement: each estimate of V and of the noise scale against those of the real training gradient.

    python -m benchmarks.calibration --data_dir=data       # writes calibration.md, .json and .png in benchmarks/results

A small ResNet with BatchNorm and its twin with GroupNorm train on CIFAR-10. At some steps, training stops and the
gradient of the training loss (training mode, so BatchNorm sees its batch) is taken on many independent batches of b
samples: b times its variance over them is the V that a batch of b really has, and the squared norm of their mean, less
what is left of the variance in it, the ‖G‖². Each estimator then looks at some of these batches; shown is the mean of
its V over the true one, and V/‖G‖² of its means (each by itself, as smoothing has them, ‖G‖² without bias) over the
true noise scale, ± the standard error of that ratio (jackknife). 1 is right.
"""

import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import data
from adadagrad import gradients
from adadagrad.gradients import couples_samples
from benchmarks import cases
from benchmarks.cases import RESULTS, provenance

ESTIMATORS = ("vmap", "ghost", "micro_batch")
GROUPS = 8
CUT = "micro_batch, cut"
Batch = tuple[Tensor, Tensor]


def gradient(model: nn.Module, batch: Batch, pieces: int = 1) -> Tensor:
    """Of the training loss, as one vector; accumulated over so many micro-batches of equal size."""
    loss = sum(cross_entropy(model(x), y) for x, y in zip(*(part.chunk(pieces) for part in batch))) / pieces
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


Measured = tuple[float, float]
"""A mean, or a quotient of means, and its standard error."""


def jackknife(of: Callable[[Tensor], Tensor], count: int) -> Measured:
    """What `of` gives for all batches, and its standard error from what it gives without each one of them.

    Args:
        of: weights of the batches, float64 (…, count), each 0 or 1 → numbers (…).
    """
    everything = torch.ones(count, dtype=torch.float64)
    without_one = of(everything - torch.eye(count, dtype=torch.float64))
    error = ((count - 1) * (without_one - without_one.mean()).square().mean()).sqrt()
    return float(of(everything)), float(error)


def truth(model: nn.Module, batches: Iterable[Batch], pieces: int = 1) -> dict[str, Measured]:
    """`variance` of the batch gradient over independent batches, and `quotient`, this over ‖G‖², both without bias."""
    vectors = torch.stack([gradient(model, batch, pieces) for batch in batches]).double()
    products = vectors @ vectors.T

    def variance(weights: Tensor) -> Tensor:
        n = weights.sum(-1)
        return (weights @ products.diagonal() - _norm_sq_of_sum(weights) / n) / (n - 1)

    def _norm_sq_of_sum(weights: Tensor) -> Tensor:
        return ((weights @ products) * weights).sum(-1)

    def quotient(weights: Tensor) -> Tensor:
        n, own = weights.sum(-1), variance(weights)
        return own / (_norm_sq_of_sum(weights) / n**2 - own / n)

    return {name: jackknife(of, len(vectors)) for name, of in (("variance", variance), ("quotient", quotient))}


def estimate(model: nn.Module, test_gradients: str, batches: Iterable[Batch]) -> dict[str, Measured]:
    """An estimator's `variance`, the mean over the batches, and `quotient`, this over its mean, unbiased ‖G‖²."""
    found, estimator = [], None
    for inputs, targets in batches:
        if estimator is None:
            probe = (inputs[: gradients.PROBE], targets[: gradients.PROBE])
            how = (test_gradients, model, cross_entropy, False, 256, probe)
            estimator, _ = gradients.build(*how, num_groups=GROUPS)
        model.zero_grad(set_to_none=True)
        pieces, scale = GROUPS if test_gradients == "micro_batch" else 1, 1 / len(inputs)
        for x, y in zip(inputs.chunk(pieces), targets.chunk(pieces)):
            with estimator.observe(x, y, scale):
                if pieces > 1:
                    (cross_entropy(model(x), y, reduction="sum") * scale).backward()
        statistics = estimator.moments().statistics(unbiased=True)
        found.append((statistics.variance, statistics.grad_norm_sq))
    variances, signals = torch.tensor(found, dtype=torch.float64).T
    return {
        "variance": jackknife(lambda weights: weights @ variances / weights.sum(-1), len(found)),
        "quotient": jackknife(lambda weights: (weights @ variances) / (weights @ signals), len(found)),
    }


def ratio(estimated: Measured, true: Measured) -> Measured:
    value = estimated[0] / true[0]
    return value, abs(value) * math.hypot(estimated[1] / estimated[0], true[1] / true[0])


def calibrate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: list[int],
    batch_sizes: list[int],
    batches: int,
    looks: int,
    estimators: Sequence[str] = ESTIMATORS,
) -> Iterator[dict]:
    """Train with Adam, batches of 128; at each of `steps` compare on `batches` independent batches of each size.

    Args:
        images: float (N, C, H, W), normalised.
        labels: (N,).
        looks: on how many of the batches vmap and ghost look; micro_batch, which varies more, looks at all.
    """

    def drawn(batch_size: int, count: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            index = torch.randint(len(images), (batch_size,), generator=generator)
            yield images[index], labels[index]

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    training = drawn(128, max(steps), seed=1)
    for step in range(max(steps) + 1):
        if step in steps:
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            for batch_size in batch_sizes:
                estimates = {}
                for name in estimators:
                    count = batches if name == "micro_batch" else looks
                    estimates[name] = estimate(model, name, drawn(batch_size, count, 2 + step))
                if couples_samples(model):  # else a cut changes nothing
                    estimates[CUT] = estimates["micro_batch"]
                pieces = {name: GROUPS if name == CUT else 1 for name in estimates}
                truths = {n: truth(model, drawn(batch_size, batches, 2 + step), n) for n in {*pieces.values()}}
                for name, estimated in estimates.items():
                    true = {key: tuple(batch_size * n for n in own) for key, own in truths[pieces[name]].items()}
                    (of_v, its_error), (of_scale, error) = (ratio(estimated[key], true[key]) for key in true)
                    numbers = {"ratio": of_v, "standard_error": its_error}
                    numbers |= {"noise_scale_ratio": of_scale, "noise_scale_error": error}
                    numbers |= {"true_noise_scale": true["quotient"][0], "its_error": true["quotient"][1]}
                    yield {"step": step, "batch_size": batch_size, "estimator": name, **numbers}
            for name, buffer in model.named_buffers():  # looking must not change the training
                buffer.copy_(buffers[name])
        if step < max(steps):
            inputs, targets = next(training)
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()


def table(rows: list[dict], value: str = "ratio", error: str = "standard_error", form: str = ".2f") -> str:
    steps = sorted({row["step"] for row in rows})
    lines = [
        f"| network | estimator | b | {' | '.join(f'step {step}' for step in steps)} |",
        "|---" * (3 + len(steps)) + "|",
    ]
    for key in dict.fromkeys((row["network"], row["estimator"], row["batch_size"]) for row in rows):
        own = {r["step"]: r for r in rows if (r["network"], r["estimator"], r["batch_size"]) == key}
        cells = (f"{own[step][value]:{form}} ± {own[step][error]:{form}}" for step in steps)
        lines.append(f"| {key[0]} | `{key[1]}` | {key[2]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(rows: list[dict]) -> str:
    """V, the noise scale, and the true noise scale [samples] of a batch in one piece."""
    whole = [{**row, "estimator": "truth"} for row in rows if row["estimator"] == "micro_batch"]
    return (
        f"Estimated ÷ true V:\n\n{table(rows)}\n\n"
        f"Estimated ÷ true noise scale:\n\n{table(rows, 'noise_scale_ratio', 'noise_scale_error')}\n\n"
        f"True noise scale [samples]:\n\n{table(whole, 'true_noise_scale', 'its_error', '.0f')}"
    )


def figure(rows: list[dict], path: Path) -> None:
    """Above V, below the noise scale."""
    from matplotlib.figure import Figure

    colors = dict(zip(ESTIMATORS, ("tab:orange", "tab:blue", "tab:green")))  # CUT is 1 by construction
    networks, steps = (list(dict.fromkeys(row[name] for row in rows)) for name in ("network", "step"))
    sizes = sorted({row["batch_size"] for row in rows})
    shown = [name for name in ESTIMATORS if any(row["estimator"] == name for row in rows)]
    drawing = Figure(figsize=(3.5 * len(networks) + 3, 7), layout="constrained")
    grid = drawing.subplots(2, len(networks), sharex=True, sharey="row", squeeze=False)
    for quantity, line_of_axes in zip(("ratio", "noise_scale_ratio"), grid):
        for axes, network in zip(line_of_axes, networks):
            for name in shown:
                for size, (line, marker) in zip(sizes, ((":", "^"), ("--", "s"), ("-", "o"))):
                    own = [r for r in rows if (r["network"], r["estimator"], r["batch_size"]) == (network, name, size)]
                    places = [steps.index(row["step"]) for row in own]
                    width, alpha = (4, 0.35) if name == "vmap" else (1.5, 1)  # ghost lies on it
                    numbers = [row[quantity] for row in own]
                    axes.plot(places, numbers, line, marker=marker, markersize=5, linewidth=width, alpha=alpha,
                              color=colors[name], label=f"{name}, b = {size}")  # fmt: skip
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_xticks(range(len(steps)), steps)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    for axes, network in zip(grid[0], networks):
        axes.set_title(network)
    for axes in grid[1]:
        axes.set_xlabel("training step")
        axes.set_yscale("log")
    grid[0, 0].set_ylabel("estimated V / true V")
    grid[1, 0].set_ylabel("estimated / true noise scale")
    grid[0, -1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    drawing.savefig(path, dpi=100)


NETWORKS = {
    "BatchNorm": cases.small_resnet_batch_norm,
    "GroupNorm": cases.small_resnet_group_norm,
    "BatchNorm-cnn": cases.small_cnn_batch_norm,
}


def main(
    dataset: str = "cifar10",
    data_dir: Path = Path("data"),
    networks: list[str] = ["BatchNorm", "GroupNorm"],  # noqa: B006 (never changed)
    estimators: list[str] = [*ESTIMATORS],  # noqa: B006
    steps: list[int] = [0, 20, 200, 1000],  # noqa: B006
    batch_sizes: list[int] = [32, 128, 512],  # noqa: B006
    batches: int = 100,
    looks: int = 4,
    out: Path = RESULTS,
) -> None:
    """Compare estimates of V and of the noise scale with those of the real training gradient.

    Args:
        dataset: as main.py takes it.
        data_dir: as main.py takes it.
        networks: of BatchNorm, GroupNorm (ResNet-8 each) and BatchNorm-cnn.
        estimators: of vmap, ghost and micro_batch.
        steps: training steps at which to compare.
        batch_sizes: batch sizes at which to compare [samples].
        batches: independent batches behind each truth.
        looks: on how many of them vmap and ghost look; micro_batch, which varies more, looks at all.
        out: folder for the table, the numbers and the figure.
    """
    train_set = data.load(dataset, data_dir).train
    images, labels = train_set.tensors
    images = images.float().div(255)
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    rows = []
    for network in networks:
        torch.manual_seed(0)
        model = NETWORKS[network](images.shape[1:], int(labels.max()) + 1)
        for row in calibrate(model, images, labels, steps, batch_sizes, batches, looks, estimators):
            rows.append({"network": network, **row})
            print(rows[-1], flush=True)
            out.mkdir(parents=True, exist_ok=True)
            (out / "calibration.json").write_text(json.dumps({"machine": provenance(), "rows": rows}, indent=1) + "\n")
    words = (word for word in sys.argv[1:] if not word.startswith("--data_dir"))
    command = shlex.join(["python", "-m", "benchmarks.calibration", *words])
    text = f"{tables(rows)}\n\n`{command}` on {provenance()}.\n"
    (out / "calibration.md").write_text(text)
    figure(rows, out / "calibration.png")
    print(text)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
