"""The noise scale without hooks against the exact one: `NoiseScale.from_micro_batches` and `NoiseScale.from_adam`.

    python -m benchmarks.without_hooks --data_dir=data       # writes noise_scale.md, .json, .png in benchmarks/results

A cnn on MNIST and a small GPT on the standard library's text train with Adam. At some steps the per-sample gradients of
a thousand samples give V and ‖G‖², and so the noise scale B. Beside it: `from_micro_batches` of four micro-batches to a
step, averaged with a half-life of 32 steps; what comes out of Adam's m and v at that step alone; and whether
`from_adam` gives it or answers None.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from jsonargparse import auto_cli
from torch import Tensor

import data
import models
from adadagrad import NoiseScale, gradients
from adadagrad.control import Smoothing
from adadagrad.noise_scale import _by_adam
from benchmarks.cases import RESULTS, provenance
from text.gpt import GPT

STEPS = (10, 40, 160, 640, 1280)
PIECES, HALF_LIFE = 4, 32
RUNS = [
    (name, b, beta2, rate, last)
    for name, small, large in (("mnist cnn", 16, 256), ("stdlib gpt", 8, 64))
    for b, beta2, rate, last in (
        (small, 0.95, 1e-3, 640),
        (small, 0.95, 1e-4, 640),
        (small, 0.999, 1e-4, 1280),
        (large, 0.95, 1e-4, 40),
    )
]
"""Model, batch size, β₂, learning rate, steps."""


class Case:
    """A model, and batches of its data at random.

    Args:
        name: mnist cnn or stdlib gpt.
        data_dir: where MNIST is.
        exact: samples that the exact value is of.
    """

    def __init__(self, name: str, data_dir: Path, exact: int):
        torch.manual_seed(0)
        if name == "mnist cnn":
            data_set = data.load("mnist", data_dir)
            images, self.targets = data_set.train.tensors
            self.inputs = images.float().div(255).sub(0.13).div(0.31)
            self.model = models.build("cnn", (1, 28, 28), 10)
        else:
            data_set = data.load("stdlib", data_dir, sequence_length=32)
            rows = [data_set.train[i] for i in torch.randperm(len(data_set.train))[: 4 * exact].tolist()]
            self.inputs, self.targets = (torch.stack(part).long() for part in zip(*rows))
            self.model = GPT((32,), 256, layers=2, width=64)
        self.loss, self.exact = data_set.loss, exact

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.inputs), (size,))
        return self.inputs[chosen], self.targets[chosen]

    def noise_scale(self) -> float:
        """V/‖G‖² by per-sample gradients."""
        found = gradients.moments(self.model, self.mean_loss, *self.batch(self.exact), inner_products=False)
        return found.statistics(unbiased=True).noise_scale or float("nan")

    def mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets).mean()


def step(case: Case, optimizer: torch.optim.Optimizer, batch_size: int) -> NoiseScale:
    """One step of Adam's, in equal micro-batches."""
    parameters, norms_sq = list(case.model.parameters()), []
    optimizer.zero_grad()
    for x, y in zip(*(part.chunk(PIECES) for part in case.batch(batch_size))):
        own = torch.autograd.grad(case.mean_loss(case.model(x), y), parameters)
        norms_sq.append(norm_sq(own))
        for parameter, gradient in zip(parameters, own):
            parameter.grad = gradient / PIECES if parameter.grad is None else parameter.grad + gradient / PIECES
    whole = norm_sq(parameter.grad for parameter in parameters)
    optimizer.step()
    return NoiseScale.from_micro_batches(sum(norms_sq) / PIECES, batch_size // PIECES, whole, batch_size)


def norm_sq(tensors) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors)


def compared(case: Case, batch_size: int, beta2: float, rate: float, last: int) -> Iterator[dict]:
    optimizer = torch.optim.Adam(case.model.parameters(), lr=rate, betas=(0.9, beta2))
    smoothing = Smoothing(HALF_LIFE * batch_size, unbiased=True)
    for number in range(1, last + 1):
        averaged = smoothing.add(step(case, optimizer, batch_size).moments, batch_size)
        if number in STEPS:
            noise, signal, _ = _by_adam(optimizer)
            given = NoiseScale.from_adam(optimizer, batch_size)
            yield {
                "step": number,
                "exact": case.noise_scale(),
                "micro_batches": averaged.noise_scale,
                "adam": noise * batch_size / signal if signal > 0 else None,
                "given": given and given.value,
            }


def table(found: list[dict]) -> Iterator[str]:
    yield "| model | b | β₂ | learning rate | step | exact B | from_micro_batches | from m and v | from_adam |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in found:
        numbers = (f"{row[name]:.3g}" if row[name] else "–" for name in ("exact", "micro_batches", "adam"))
        given = f"{row['given']:.3g} ({row['given'] / row['exact']:.2f} of it)" if row["given"] else "None"
        run = (row["model"], row["b"], row["beta2"], f"{row['rate']:g}", row["step"])
        yield "| " + " | ".join(map(str, (*run, *numbers, given))) + " |"


def draw(found: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, (name, label) in zip(axes, (("micro_batches", "from_micro_batches"), ("adam", "from Adam's m and v"))):
        for model, colour in (("mnist cnn", "tab:blue"), ("stdlib gpt", "tab:orange")):
            rows = [row for row in found if row["model"] == model and row[name]]
            given = [row for row in rows if name != "adam" or row["given"]]
            kept = [row for row in rows if row not in given]
            points = {"s": 18, "color": colour}
            axis.scatter([r["exact"] for r in given], [r[name] for r in given], label=model, **points)
            axis.scatter([r["exact"] for r in kept], [r[name] for r in kept], marker="x", alpha=0.5, **points)
        ends = [min(r["exact"] for r in found), max(r["exact"] for r in found)]
        axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="exact noise scale [samples]", title=label)
    axes[1].scatter([], [], marker="x", color="grey", label="answered None")
    axes[1].legend()
    axes[0].set_ylabel("estimate [samples]")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(data_dir: Path = Path("data"), exact: int = 1024, threads: int = 1) -> None:
    """
    Args:
        data_dir: where MNIST is.
        exact: samples for the exact value.
        threads: of PyTorch.
    """
    torch.set_num_threads(threads)
    found = []
    for name, batch_size, beta2, rate, last in RUNS:
        for row in compared(Case(name, data_dir, exact), batch_size, beta2, rate, last):
            found.append({"model": name, "b": batch_size, "beta2": beta2, "rate": rate, **row})
            print(found[-1], flush=True)
    (RESULTS / "noise_scale.json").write_text(json.dumps({"provenance": provenance(), "rows": found}, indent=1) + "\n")
    (RESULTS / "noise_scale.md").write_text("\n".join([*table(found), "", provenance()]) + "\n")
    draw(found, RESULTS / "noise_scale.png")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
