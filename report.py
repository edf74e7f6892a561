"""Figures of finished runs."""

import csv
from pathlib import Path

PANELS = (
    ("loss", {"train": "train_loss", "validation": "val_loss"}),
    ("accuracy", {"train": "train_accuracy", "validation": "val_accuracy"}),
    ("batch size", {"batch size": "batch_size"}),
    ("learning rate", {"learning rate": "lr"}),
)
COLORS = {"train": "tab:blue", "validation": "tab:orange", "batch size": "tab:green", "learning rate": "tab:purple"}
POINTS = 400
"""A training curve of more points is drawn as means over so many stretches; the eye sees no more."""


def read_metrics(folder: Path) -> dict[str, list[float | None]]:
    """The columns of a run's metrics.csv; empty cells are None."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = rows[0] if rows else []
    return {name: [float(row[name]) if row[name] else None for row in rows] for name in names}


def curves(folder: Path) -> None:
    """Draw `curves.png` in a run's folder: loss, accuracy, batch size and learning rate against samples and steps."""
    from matplotlib.figure import Figure

    metrics = read_metrics(folder)
    if not metrics:
        return
    figure = Figure(figsize=(15, 6.6), layout="constrained")
    figure.suptitle(folder.name)
    rows = figure.subplots(2, len(PANELS), sharey="col")
    for row, (column, label) in zip(rows, (("samples", "samples"), ("step", "steps"))):
        for axes, (title, lines) in zip(row, PANELS):
            for name, values in lines.items():
                _draw(axes, name, [(x, y) for x, y in zip(metrics[column], metrics[values]) if y is not None])
            _finish(axes, label, title, legend=len(lines) > 1)
    figure.savefig(folder / "curves.png", dpi=110)


def _draw(axes, name: str, points: list[tuple[float, float]]) -> None:
    style = {"color": COLORS[name], "label": name, "linewidth": 1.6}
    if name == "train":
        points, style["linewidth"] = _thinned(points), 0.9
    elif name == "batch size":
        style["drawstyle"] = "steps-pre"  # a row tells of the step that ends there
    elif name == "validation" and len(points) <= 40:
        style |= {"marker": "o", "markersize": 3}
    axes.plot(*zip(*points) if points else ((), ()), **style)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over stretches of equal numbers of points, where there are more than `POINTS`."""
    size = -(-len(points) // POINTS)
    stretches = (points[i : i + size] for i in range(0, len(points), size)) if points else ()
    return [tuple(sum(values) / len(stretch) for values in zip(*stretch)) for stretch in stretches]


def _finish(axes, label: str, title: str, legend: bool) -> None:
    from matplotlib.ticker import EngFormatter, NullFormatter

    axes.set_xlabel(label)
    axes.set_ylabel(title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.locator_params(axis="x", nbins=6)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if title == "loss":
        axes.set_yscale("log")
    if title == "batch size":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if legend:
        axes.legend(frameon=False)
