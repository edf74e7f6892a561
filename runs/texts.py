"""What a run says of itself on the terminal: the line at its start, an evaluation, the screen at its end."""

import math
from pathlib import Path
from typing import Any

from options.schema import Config
from runs import results

PLAIN, AVERAGE = "model.pt", "model_average.pt"
"""The files of weights in a run's folder."""
PRICES = ("samples_over_least", "samples_over_initial", "time_over_initial")
"""Of summary.json: `results.price`."""


def introduction(c: Config, parameters: int, training_samples: int, world_size: int, device: str) -> str:
    """The run in one line."""
    schedule, _ = results.schedule(vars(c))
    growth = f"batch size {c.batch_size:,} to at most {c.max_batch_size:,} ({schedule})"
    if schedule.startswith("constant"):
        growth = f"batch size {c.batch_size:,}"
    return (
        f"{c.model} ({parameters:,} parameters) on {c.dataset} ({training_samples:,} training samples), {growth}, "
        f"{c.optimizer}, {world_size} × {device}, {c.precision}"
    )


def evaluation_text(row: dict[str, Any]) -> str:
    """An evaluation in one line."""
    at = f"step {row['step']:>6,}  samples {row['samples']:>10,}  batch {row['batch_size']:>7,}"
    losses = f"train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}"
    others = (name for name in row if name.startswith("val_") and name not in ("val_loss", "val_top5_accuracy"))
    return "  ".join([at, losses, *(f"{name.replace('_', ' ')} {results.written(name, row[name])}" for name in others)])


def summary_text(summary: dict[str, Any], folder: Path) -> str:
    """One screen at the end of a run."""
    name = summary["objective"]
    last, best = (results.written(name, summary[key]) for key in (name, f"best_{name}"))
    rows = {
        results.in_words(name): "-" if summary[name] is None else f"{last} (best {best})",
        "steps": f"{summary['steps']:,}",
        "samples": f"{summary['samples']:,}",
        "batch size": f"mean {summary['mean_batch_size']:,.1f}, final {summary['final_batch_size']:,}",
        "quickest batch": quickest_text(summary),
        "cost of the sizes": price_text(summary),
        "wall time": f"{summary['wall_time']:.1f} s on {summary['world_size']} × {summary['device']}",
        "evaluated weights": weights_text(summary),
        "run folder": str(folder),
    }
    rows = {name: value for name, value in rows.items() if value}
    return "\n".join([f"\n{summary['status']}", *(f"  {name:<20} {value}" for name, value in rows.items())])


def weights_text(summary: dict[str, Any]) -> str:
    """Where those are that the figures above are of; "" where they are those of the last step."""
    averaged = summary.get("evaluated_weights") == AVERAGE
    return f"{AVERAGE}, their average; {PLAIN} has those of the last step" if averaged else ""


def quickest_text(summary: dict[str, Any]) -> str:
    """Whether larger batches save time on this hardware; "" where it is not known."""
    noise_scale, knee, best = (summary[name] for name in ("noise_scale", "knee", "quickest_batch_size"))
    if best is None:
        return ""
    # (best = √(critical · knee), quickest_batch in adadagrad/control/rules.py)
    noise, critical = _in_samples(noise_scale), best**2 / knee if knee else math.inf
    if knee > 100 * critical:
        return f"{max(1, round(10 * critical)):,} or more: noise scale {noise}, samples cost next to nothing"
    return f"about {best:,}: noise scale {noise}, knee {_in_samples(knee)}; above that batches do not save time here"


def price_text(summary: dict[str, Any]) -> str:
    """What the sizes have cost in samples and saved in time, as it is modelled; "" where nothing is known, or they were
    --batch_size throughout."""
    least, samples, time = (summary[name] for name in PRICES)
    if least is None or abs(samples - 1) < 0.005:
        return ""
    in_time = "" if time is None else f", in {time:.2f} of its time"
    others = f"{samples:.2f} times those of --batch_size throughout{in_time} (modelled)"
    return f"{least:.2f} times the samples that the smallest batches would need; {others}"


def _in_samples(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 or not number else f"{number:.2g}"
