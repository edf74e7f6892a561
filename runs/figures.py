"""Figures: the curves of one run, and several configurations beside each other."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runs.results import Group, Run, in_words, is_share, read_metrics, target_in_words


def panels(columns: Iterable[str]) -> list[tuple[str, dict[str, str]]]:
    """The panels of curves.png, title and {label: column}: loss, first metric, batch size, learning rate."""
    columns = list(columns)
    found = [("loss", {"train": "train_loss", "validation": "val_loss"})]
    if name := next((name for name in columns if name.startswith("val_") and name != "val_loss"), None):
        lines = {"train": name.replace("val_", "train_", 1), "validation": name}
        found.append(
            (name[4:].replace("_", " "), {line: column for line, column in lines.items() if column in columns})
        )
    sizes = {"batch size": "batch_size"} | ({"noise scale": "noise_scale"} if "noise_scale" in columns else {})
    return [*found, ("batch size", sizes), ("learning rate", {"learning rate": "lr"})]


COLORS = {"train": "tab:blue", "validation": "tab:orange", "batch size": "tab:green", "learning rate": "tab:purple"}
COLORS |= {"noise scale": "0.45"}
POINTS = 400
"""Training curves with more points are averaged down to this many."""

AXES = {"step": "steps", "samples": "samples", "seconds": "training time [s]"}
FILES = {"step": "against_steps", "samples": "against_samples", "seconds": "against_time"}
COMPARED_POINTS = 100
"""The same where many curves share a panel."""
MOST_CONFIGURATIONS = 20
"""Most curves in a panel that can be distinguished."""
PRINT = {"font.size": 8, "legend.fontsize": 7.5, "axes.linewidth": 0.6, "pdf.fonttype": 42, "lines.markersize": 3.5}
"""Matplotlib settings for figures in page width, 7 inches."""


def curves(folder: Path) -> None:
    """Draw `curves.png` in a run's folder: loss, metric, batch size (beside the noise scale, where that was measured,
    with its interval) and learning rate against samples and steps."""
    from matplotlib.figure import Figure

    metrics = read_metrics(folder)
    if not metrics:
        return
    figure = Figure(figsize=(15, 6.6), layout="constrained")
    figure.suptitle(folder.name)
    shown = panels([name for name, values in metrics.items() if any(value is not None for value in values)])
    rows = figure.subplots(2, len(shown), sharey="col")
    for row, (column, label) in zip(rows, (("samples", "samples"), ("step", "steps"))):
        for axes, (title, lines) in zip(row, shown):
            for name, values in lines.items():
                _draw(axes, name, [(x, y) for x, y in zip(metrics[column], metrics[values]) if y is not None])
            _finish(axes, label, title, legend=len(lines) > 1)
            if "noise scale" in lines:
                _band(axes, metrics, column)
    figure.savefig(folder / "curves.png", dpi=110)


def _draw(axes, name: str, points: list[tuple[float, float]]) -> None:
    style = {"color": COLORS[name], "label": name, "linewidth": 1.6}
    if name == "train":
        points, style["linewidth"] = _thinned(points), 0.9
    elif name == "batch size":
        style["drawstyle"] = "steps-pre"  # a row tells of the step that ends there
    if len(points) == 1 or (name == "validation" and len(points) <= 40):
        style |= {"marker": "o", "markersize": 3}
    axes.plot(*zip(*points) if points else ((), ()), **style)


def _band(axes, metrics: dict[str, list[float | None]], column: str) -> None:
    """The interval of the noise scale; the axis goes by batch sizes and by the scale, not by what was hardly known."""
    found = zip(metrics[column], *(metrics.get(f"noise_scale_{end}", []) for end in ("low", "high")))
    ends = [(x, low, math.inf if high is None else high) for x, low, high in found if low is not None]
    scales = sorted(value for value in metrics["noise_scale"] if value)
    middle = scales[len(scales) // 20 : len(scales) - len(scales) // 20]
    shown = [*middle, *metrics["batch_size"]]
    low, top = min(shown) / 1.5, max(shown) * 1.5
    if ends:
        x, lows, highs = zip(*ends)
        axes.fill_between(x, lows, [min(high, 2 * top) for high in highs], color="0.45", alpha=0.2, linewidth=0)
    axes.set_ylim(low, top)


def _thinned(points: list[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means over groups of equally many consecutive ones."""
    size = -(-len(points) // most)
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


def style(index: int) -> dict:
    """Colour, dashes and marker of configuration i; distinguishable in grey, too.

    A colour is repeated with another marker, since points have no dashes.
    """
    from matplotlib import color_sequences

    colors, dashes, markers = color_sequences["petroff10"], ("-", "--", "-.", ":"), "os^DvPX<>*"
    return {
        "color": colors[index % len(colors)],
        "linestyle": dashes[index % len(dashes)],
        "marker": markers[(index + index // len(colors)) % len(markers)],
    }


def draw(groups: Sequence[Group], folder: Path, target: float | None, objective: str) -> list[Path]:
    """Write `FILES`, `noise_scale` where it was measured and, with a target, `pareto` and `trade_off`, as PNG and PDF;
    returns the files' paths."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with rc_context(PRINT):
        figures = {name: compare(groups, axis, objective) for axis, name in FILES.items()}
        if measured := [entry for entry in groups if any(any(run.metrics["noise_scale"]) for run in entry.finished)]:
            figures["noise_scale"] = noise_scale(measured)
        if target is not None:
            figures["pareto"] = pareto(groups, target, objective)
            figures["trade_off"] = trade_off(groups, target, objective)
        for name, figure in figures.items():
            for suffix in ("png", "pdf"):
                files.append(folder / f"{name}.{suffix}")
                figure.savefig(files[-1], dpi=200)
    return files


class Curve(NamedTuple):
    """Mean, smallest and largest value over seeds at each x."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def points(run: Run, axis: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a run's finite values; training losses are averaged down to `COMPARED_POINTS`."""
    pairs = [
        (x, y) for x, y in zip(run.metrics[axis], run.metrics[column]) if y is not None and math.isfinite(y) and x > 0
    ]
    if column == "train_loss":
        pairs = _thinned(pairs, COMPARED_POINTS)
    return tuple(np.array(pairs).reshape(-1, 2).T)


def over_seeds(runs: Sequence[Run], axis: str, column: str, log: bool) -> Curve | None:
    """The range in which every seed has values: from the latest start to the earliest end."""
    curves = [points(run, axis, column) for run in runs]
    if not curves or not all(len(x) for x, _ in curves):
        return None
    start, stop = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if start > stop:
        return None
    if len(curves) == 1:
        grid = curves[0][0]
    else:
        grid = (np.geomspace if log else np.linspace)(start, stop, 2 * COMPARED_POINTS if stop > start else 1)
    if column == "batch_size":  # a row tells of the step that ends there
        values = [y[np.searchsorted(x, np.minimum(grid, x[-1]))] for x, y in curves]
    else:
        values = [np.interp(grid, x, y) for x, y in curves]
    return Curve(grid, np.mean(values, axis=0), np.min(values, axis=0), np.max(values, axis=0))


def compared(objective: str) -> dict[str, str]:
    """Columns of the comparison figures, and their axis labels."""
    columns = {"train_loss": "training loss", "val_loss": "validation loss", objective: in_words(objective)}
    return columns | {"batch_size": "batch size [samples]"}


def compare(groups: Sequence[Group], axis: str, objective: str):
    """Losses, objective and batch size of each configuration against `axis`: mean over seeds with a band from
    minimum to maximum. Unfinished runs are thin lines that end in a cross."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.4 + 0.16 * math.ceil(len(groups) / 2)), layout="constrained")
    ends = [run.metrics[axis][-1] for entry in groups for run in entry.finished]
    log = axis != "samples" and bool(ends) and max(ends) > 10 * min(ends) > 0  # else the short ones cannot be seen
    panels, columns = figure.subplots(2, 2, sharex=True).flat, compared(objective)
    for axes in panels[len(columns) :]:  # where the validation loss is the objective
        axes.remove()
    for axes, (column, label) in zip(panels, columns.items()):
        ends = []
        for i, entry in enumerate(groups):
            if curve := over_seeds(entry.finished, axis, column, log):
                marks = 0.25 if len(curve.x) > 12 else 1
                axes.plot(curve.x, curve.mean, label=entry.name, linewidth=1.2, markevery=marks, **style(i))
                if len(entry.finished) > 1:
                    axes.fill_between(curve.x, curve.low, curve.high, color=style(i)["color"], alpha=0.18, linewidth=0)
                ends.append(curve.mean[-1])
            for run in entry.others:
                x, y = points(run, axis, column)
                axes.plot(x, y, linewidth=0.6, color=style(i)["color"])
                axes.plot(x[-1:], y[-1:], "x", color=style(i)["color"], markersize=6)
        axes.set_ylabel(label)
        _scales(axes, log, column, ends)
    for axes in figure.axes[2:]:
        axes.set_xlabel(AXES[axis])
    figure.align_ylabels()
    _legend(figure, groups)
    return figure


def _scales(axes, log: bool, column: str, ends: Sequence[float]) -> None:
    from matplotlib.ticker import PercentFormatter

    if log:
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, axes.get_xlim())
    axes.xaxis.set_major_formatter(_short)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if is_share(column):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        if ends:  # the ends decide; the first evaluations would flatten them
            lowest = min(ends) - max(0.04, 1.5 * (max(ends) - min(ends)))
            axes.set_ylim(max(axes.get_ylim()[0], lowest), min(axes.get_ylim()[1], 1))
    else:
        axes.set_yscale("log")
    if column == "batch_size":
        axes.yaxis.set_major_formatter(_short)


def _short(value: float, _) -> str:
    """1500000 as 1.5M, 0.5 as 0.5."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")(value) if abs(value) >= 1000 else f"{value:g}"


def _legend(figure, groups: Sequence[Group], markers: bool = True) -> None:
    from matplotlib.lines import Line2D

    looks = [style(i) if markers else {"color": style(i)["color"]} for i in range(len(groups))]
    handles = [Line2D([], [], linewidth=1.2, label=entry.name, **look) for entry, look in zip(groups, looks)]
    if markers and any(entry.others for entry in groups):
        handles.append(Line2D([], [], color="0.3", linewidth=0.6, marker="x", markersize=6, label="did not finish"))
    columns = 2 if max(len(entry.name) for entry in groups) <= 65 else 1
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5)


def pareto(groups: Sequence[Group], target: float, objective: str):
    """Steps and seconds to the target, and the front of the best trade-offs."""
    figure, axes, places = _to_the_target(groups, target, objective, "seconds", "training time to {} [s]")
    front = [p for p in sorted(places) if not any(q[0] <= p[0] and q[1] < p[1] for q in places)]
    if front:
        axes.plot(*zip(*[p[:2] for p in front]), color="0.6", linewidth=1, zorder=0, drawstyle="steps-post")
    return figure


def trade_off(groups: Sequence[Group], target: float, objective: str):
    """Steps and samples to the target; the constant batches are joined by a line."""
    figure, axes, places = _to_the_target(groups, target, objective, "samples", "samples to {}")
    constants = sorted(place for place in places if place[2].startswith("constant"))
    if len(constants) > 1:
        axes.plot(*zip(*[place[:2] for place in constants]), color="0.6", linewidth=1, zorder=0)
    return figure


def noise_scale(groups: Sequence[Group]):
    """Noise scale (thick) and batch size (thin) of each configuration against samples: its first finished run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6 + 0.16 * math.ceil(len(groups) / 2)), layout="constrained")
    axes = figure.subplots()
    for i, entry in enumerate(groups):
        run, look = entry.finished[0], {"color": style(i)["color"]}
        for column, width in (("noise_scale", 1.4), ("batch_size", 0.6)):
            axes.plot(*points(run, "samples", column), linewidth=width, **look)
    axes.set(yscale="log", xlabel="samples", ylabel="noise scale (thick) and batch size [samples]")
    axes.xaxis.set_major_formatter(_short)
    axes.yaxis.set_major_formatter(_short)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, groups, markers=False)
    return figure


def _to_the_target(groups: Sequence[Group], target: float, objective: str, quantity: str, label: str):
    """Steps and another quantity to the target, mean and range over seeds: figure, axes, and (x, y, name) of each.

    Configurations of which some run does not reach the target are listed below the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    goal = target_in_words(target, objective)
    axes.set_xlabel(f"steps to {goal} {in_words(objective)}")
    axes.set_ylabel(label.format(goal))
    places, missing = [], []
    for i, entry in enumerate(groups):
        reached = [run.reached(target) for run in entry.finished]
        if None in reached:
            missing.append(f"{entry.name} ({len(reached) - reached.count(None)} of {len(reached)})")
        if not reached or None in reached:
            continue
        (x, x_range), (y, y_range) = (_mean_and_range([r[name] for r in reached]) for name in ("step", quantity))
        axes.errorbar(x, y, y_range, x_range, **style(i) | {"linestyle": "none", "markersize": 6}, elinewidth=0.8)
        places.append((x, y, entry.name))
    if places:
        _decorate_pareto(axes)
        _name_points(axes, places)
    if missing:
        words = f"Not at {goal} in every run: {'; '.join(missing)}"
        figure.supxlabel(textwrap.fill(words, 130), fontsize=7, x=0.01, ha="left")
    return figure, axes, places


def _mean_and_range(values: Sequence[float]) -> tuple[float, list[list[float]]]:
    """The mean, and the distances to the smallest and largest value as `errorbar` takes them."""
    mean = sum(values) / len(values)
    return mean, [[mean - min(values)], [max(values) - mean]]


def _log_ticks(side, limits: tuple[float, float]) -> None:
    """Labels at 1, 2 and 5 of each decade; where there are more than two decades, at 1."""
    from matplotlib.ticker import LogLocator, NullFormatter

    side.set_major_locator(LogLocator(subs=(1, 2, 5) if limits[1] < 100 * limits[0] else (1,)))
    side.set_major_formatter(_short)
    side.set_minor_formatter(NullFormatter())


def _decorate_pareto(axes) -> None:
    (left, right), (bottom, top) = axes.dataLim.intervalx, axes.dataLim.intervaly
    axes.set(xscale="log", yscale="log", xlim=(left / 1.3, right * 1.3), ylim=(bottom / 1.3, top * 1.3))
    _log_ticks(axes.xaxis, axes.get_xlim())
    _log_ticks(axes.yaxis, axes.get_ylim())
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _name_points(axes, places: Sequence[tuple[float, float, str]]) -> None:
    """Labels in a column right of the axes, sorted by the points' heights, so that they do not overlap."""
    top, heights = -math.inf, []
    low, high = (math.log(limit) for limit in axes.get_ylim())
    places = sorted((y, x, textwrap.fill(name, 40)) for x, y, name in places)
    for y, _, name in places:
        room = 0.012 + 0.023 * (name.count("\n") + 1)  # half of it
        heights.append(max((math.log(y) - low) / (high - low), top + room))
        top = heights[-1] + room
    above = max(heights[-1] - 1, 0)
    for height, (y, x, name) in zip(heights, places):
        axes.annotate(
            name,
            (x, y),
            (1.03, height - above),
            textcoords="axes fraction",
            va="center",
            fontsize=7.5,
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.5, "shrinkB": 4, "relpos": (0, 0.5)},
        )


def critical_sizes(found: Sequence[dict], file: Path) -> None:
    """Draw what branches have shown (branches.compare): the excess of the loss against the batch size, a line a
    checkpoint; and the critical batch size against the samples of the run, beside the noise scale."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(PRINT):
        figure = Figure(figsize=(7, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        _excesses(left, found)
        _sizes_over_samples(right, found)
        figure.savefig(file, dpi=200)


def _excesses(axes, found: Sequence[dict]) -> None:
    for i, of in enumerate(found):
        known = [one for one in of["factors"] if one["excess_mean"] is not None]
        if not known:
            continue
        spread = [100 * (one["excess_standard_error"] or 0.0) for one in known]
        sizes, means = [one["batch_size"] for one in known], [100 * one["excess_mean"] for one in known]
        look = style(i) | {"markersize": 3.5, "linewidth": 1.1, "elinewidth": 0.7, "capsize": 1.5}
        axes.errorbar(sizes, means, spread, label=f"{_short(of['samples'], None)} samples", **look)
    axes.axhline(100 * found[0]["tolerance"], color="0.4", linewidth=0.8, linestyle=":", label="tolerance")
    axes.set(xlabel="batch size [samples]", ylabel=f"excess of the {in_words(found[0]['loss']).replace('_', ' ')} [%]")
    axes.set_xscale("log", base=2)
    tolerance = 100 * found[0]["tolerance"]
    axes.set_yscale("symlog", linthresh=max(2 * tolerance, 1e-3))
    axes.set_ylim(bottom=min(axes.dataLim.y0, 0) - tolerance / 2)
    sizes = sorted({one["batch_size"] for of in found for one in of["factors"]})
    axes.set_xticks(sizes if len(sizes) <= 7 else sizes[:: -(-len(sizes) // 7)])
    for side in (axes.xaxis, axes.yaxis):
        side.set_major_formatter(_short)
    axes.minorticks_off()
    axes.legend(frameon=False)
    _plain(axes)


def _sizes_over_samples(axes, found: Sequence[dict]) -> None:
    """Largest batch within the tolerance and C of the fit with their intervals; not where these have no end."""
    at = [of["samples"] for of in found]
    for i, (label, low, middle, high) in enumerate(
        (
            (
                f"within {100 * found[0]['tolerance']:g} %",
                *([of["within_tolerance"][name] for of in found] for name in ("low", "factor", "high")),
            ),
            ("C by the fit", *([of["fit"][name] for of in found] for name in ("low", "critical", "high"))),
        )
    ):
        look, shift = style(i), 1 + 0.02 * i
        points = [(x * shift, lo, y, hi) for x, lo, y, hi in zip(at, low, middle, high) if hi is not None]
        axes.plot([x for x, *_ in points], [y for _, _, y, _ in points], label=label, linewidth=1.1, **look)
        for x, lo, _, hi in points:
            axes.vlines(x, lo, hi, color=look["color"], linewidth=0.7)
    measured = [(of["samples"], of["noise_scale"]) for of in found if of["noise_scale"]]
    axes.plot(*zip(*measured) if measured else ((), ()), color="0.5", linestyle=":", marker=".", label="noise scale")
    ends = [(of["samples"], of["noise_scale_low"], of["noise_scale_high"]) for of in found if of["noise_scale_high"]]
    axes.fill_between(*zip(*ends) if ends else ((), ()), color="0.5", alpha=0.18, linewidth=0)
    axes.plot(at, [of["batch_size"] for of in found], color="0.7", linewidth=0.8, label="batch of the run")
    axes.set(xlabel="samples of the run", ylabel="size [samples]", yscale="log")
    _log_ticks(axes.yaxis, axes.get_ylim())
    axes.xaxis.set_major_formatter(_short)
    axes.legend(frameon=False)
    _plain(axes)


def _plain(axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
