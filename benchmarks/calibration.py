"""Truth, not only agreement: each estimate of V against the variance of the real training gradient.

    python -m benchmarks.calibration --data_dir=data       # writes calibration.md, .json and .png in benchmarks/results

A small ResNet with BatchNorm and its twin with GroupNorm train on CIFAR-10. At some steps, training stops and the
gradient of the training loss (training mode, so BatchNorm sees its batch) is taken on many independent batches of b
samples: b times its variance over them is the V that a batch of b really has. Each estimator then looks at some of
these batches; shown is the mean of its V over the true one, ± the standard error of that ratio. 1 is right.
"""

import json
import math
from collections.abc import Iterable, Iterator
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
"""A mean and its standard error."""


def mean_and_error(values: Tensor) -> Measured:
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def true_variance(model: nn.Module, batches: Iterable[Batch], pieces: int = 1) -> Measured:
    """The sample variance of the batch gradient over independent batches."""
    vectors = torch.stack([gradient(model, batch, pieces) for batch in batches]).double()
    deviations = (vectors - vectors.mean(0)).square().sum(1) * len(vectors) / (len(vectors) - 1)
    return mean_and_error(deviations)


def estimated_variance(model: nn.Module, test_gradients: str, batches: Iterable[Batch]) -> Measured:
    """An estimator's V over the batches."""
    found = []
    for inputs, targets in batches:
        estimator, _ = gradients.build(
            test_gradients,
            model,
            cross_entropy,
            False,
            256,
            (inputs[: gradients.PROBE], targets[: gradients.PROBE]),
            num_groups=GROUPS,
        )
        model.zero_grad(set_to_none=True)
        pieces, scale = GROUPS if test_gradients == "micro_batch" else 1, 1 / len(inputs)
        for x, y in zip(inputs.chunk(pieces), targets.chunk(pieces)):
            with estimator.observe(x, y, scale):
                if pieces > 1:
                    (cross_entropy(model(x), y, reduction="sum") * scale).backward()
        found.append(estimator.moments().variance)
    return mean_and_error(torch.tensor(found, dtype=torch.float64))


def calibrate(
    model: nn.Module, images: Tensor, labels: Tensor, steps: list[int], batch_sizes: list[int], batches: int, looks: int
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
                for name in ESTIMATORS:
                    count = batches if name == "micro_batch" else looks
                    estimates[name] = estimated_variance(model, name, drawn(batch_size, count, 2 + step))
                if couples_samples(model):  # else a cut changes nothing
                    estimates[CUT] = estimates["micro_batch"]
                pieces = {name: GROUPS if name == CUT else 1 for name in estimates}
                truths = {n: true_variance(model, drawn(batch_size, batches, 2 + step), n) for n in {*pieces.values()}}
                for name, (estimate, error) in estimates.items():
                    truth, truth_error = truths[pieces[name]]
                    ratio, relative = estimate / truth / batch_size, math.hypot(error / estimate, truth_error / truth)
                    numbers = {"ratio": ratio, "standard_error": ratio * relative}
                    yield {"step": step, "batch_size": batch_size, "estimator": name, **numbers}
            for name, buffer in model.named_buffers():  # looking must not change the training
                buffer.copy_(buffers[name])
        if step < max(steps):
            inputs, targets = next(training)
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()


def table(rows: list[dict]) -> str:
    steps = sorted({row["step"] for row in rows})
    lines = [
        f"| network | estimator | b | {' | '.join(f'step {step}' for step in steps)} |",
        "|---" * (3 + len(steps)) + "|",
    ]
    for key in dict.fromkeys((row["network"], row["estimator"], row["batch_size"]) for row in rows):
        own = {r["step"]: r for r in rows if (r["network"], r["estimator"], r["batch_size"]) == key}
        cells = (f"{own[step]['ratio']:.2f} ± {own[step]['standard_error']:.2f}" for step in steps)
        lines.append(f"| {key[0]} | `{key[1]}` | {key[2]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    colors = dict(zip(ESTIMATORS, ("tab:orange", "tab:blue", "tab:green")))  # CUT is 1 by construction
    networks, steps = (sorted({row[name] for row in rows}) for name in ("network", "step"))
    sizes = sorted({row["batch_size"] for row in rows})
    drawing = Figure(figsize=(10, 4), layout="constrained")
    for axes, network in zip(drawing.subplots(1, len(networks), sharey=True), networks):
        for name in ESTIMATORS:
            for size, (line, marker) in zip(sizes, ((":", "^"), ("--", "s"), ("-", "o"))):
                own = [r for r in rows if (r["network"], r["estimator"], r["batch_size"]) == (network, name, size)]
                places = [steps.index(row["step"]) for row in own]
                width, alpha = (4, 0.35) if name == "vmap" else (1.5, 1)  # ghost lies on it
                axes.plot(places, [row["ratio"] for row in own], line, marker=marker, markersize=5, linewidth=width,
                          alpha=alpha, color=colors[name], label=f"{name}, b = {size}")  # fmt: skip
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(steps)), steps)
        axes.set_xlabel("training step")
        axes.set_title(network)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    drawing.axes[0].set_ylabel("estimated V / true V")
    drawing.axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    drawing.savefig(path, dpi=120)


def main(
    dataset: str = "cifar10",
    data_dir: Path = Path("data"),
    steps: list[int] = [0, 20, 200, 1000],  # noqa: B006 (never changed)
    batch_sizes: list[int] = [32, 128, 512],  # noqa: B006
    batches: int = 100,
    looks: int = 4,
    out: Path = RESULTS,
) -> None:
    """Compare estimates of V with the variance of the real training gradient.

    Args:
        dataset: as main.py takes it.
        data_dir: as main.py takes it.
        steps: training steps at which to compare.
        batch_sizes: batch sizes at which to compare [samples].
        batches: independent batches behind each true variance.
        looks: on how many of them vmap and ghost look; micro_batch, which varies more, looks at all.
        out: folder for the table, the numbers and the figure.
    """
    train_set = data.load(dataset, data_dir).train
    images, labels = train_set.tensors
    images = images.float().div(255)
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    rows = []
    for network, build in (("BatchNorm", cases.small_resnet_batch_norm), ("GroupNorm", cases.small_resnet_group_norm)):
        torch.manual_seed(0)
        model = build(images.shape[1:], int(labels.max()) + 1)
        for row in calibrate(model, images, labels, steps, batch_sizes, batches, looks):
            rows.append({"network": network, **row})
            print(rows[-1], flush=True)
            out.mkdir(parents=True, exist_ok=True)
            (out / "calibration.json").write_text(json.dumps({"machine": provenance(), "rows": rows}, indent=1) + "\n")
    text = f"{table(rows)}\n\n`python -m benchmarks.calibration` on {provenance()}.\n"
    (out / "calibration.md").write_text(text)
    figure(rows, out / "calibration.png")
    print(text)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
