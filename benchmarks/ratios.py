"""The published and the unbiased ratio of noise to signal against the truth, for known gradients.

    python -m benchmarks.ratios                     # writes benchmarks/results/ratios.png and ratios.md

Per-sample gradients come from a normal distribution of known mean G and covariance; the moments go through tests.py
as those of a network would.
"""

import math
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from tabulate import tabulate

from adadagrad import control
from benchmarks.cases import RESULTS
from tests import Moments

DIMENSION = 200
NOISE_SCALE = 500.0
"""V/‖G‖² [samples]."""


def moments_of_batch(rng: np.random.Generator, b: int) -> Moments:
    """Of b gradients with ‖G‖ = 1 and V = NOISE_SCALE, spread evenly: by their distribution, not one by one."""
    mean = np.zeros(DIMENSION)
    mean[0] = 1.0
    batch_mean = mean + math.sqrt(NOISE_SCALE / b / DIMENSION) * rng.standard_normal(DIMENSION)
    degrees = DIMENSION * (b - 1)
    variance = NOISE_SCALE * rng.chisquare(degrees) / degrees
    grad_norm_sq = float(batch_mean @ batch_mean)
    return Moments(b, b, grad_norm_sq, (b - 1) * variance + b * grad_norm_sq)


def ratios(b: int, repeats: int, half_life: float, seed: int = 0) -> dict[str, float]:
    """Median over batches of V/‖ḡ‖² of one batch, and of the smoothed unbiased V/‖G‖² (after four half-lives)."""
    rng, smoothing = np.random.default_rng(seed), control.Smoothing(half_life, unbiased=True)
    published, unbiased, undefined, samples = [], [], 0, 0
    for _ in range(repeats + math.ceil(4 * half_life / b)):
        moments = moments_of_batch(rng, b)
        statistics, samples = smoothing.observe(moments, b), samples + b
        if samples > 4 * half_life:
            published.append(moments.batch_noise_scale)
            undefined += statistics.noise_scale is None
            unbiased.append(statistics.noise_scale if statistics.noise_scale is not None else math.inf)
    return {
        "published": float(np.median(published)),
        "unbiased": float(np.median(unbiased)),
        "low": float(np.quantile(unbiased, 0.1)),
        "high": float(np.quantile(unbiased, 0.9)),
        "undefined": undefined / len(unbiased),
    }


def figure(rows: dict[int, dict[str, float]], half_life: float):
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 3.6), layout="constrained")
    axes, sizes = drawn.subplots(), list(rows)
    axes.axhline(NOISE_SCALE, color="0.4", linewidth=1, linestyle="--", label="truth, V/‖G‖²")
    axes.plot(
        sizes, [row["published"] for row in rows.values()], "o-", color="tab:red", label="published, V/‖ḡ‖² of a batch"
    )
    axes.plot(sizes, [row["unbiased"] for row in rows.values()], "s-", color="tab:blue",
              label=f"unbiased, averaged with a half-life of {half_life:,.0f} samples")  # fmt: skip
    top = 20 * NOISE_SCALE
    low, high = ([min(row[name], top) for row in rows.values()] for name in ("low", "high"))
    axes.fill_between(sizes, low, high, color="tab:blue", alpha=0.15, linewidth=0, label="its middle 80 %")
    axes.set(xscale="log", yscale="log", xlabel="batch size b [samples]", ylabel="noise over signal [samples]")
    axes.set_ylim(4, top)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return drawn


def benchmark(repeats: int = 2000, half_life: float = 5000.0, out: Path = RESULTS) -> None:
    """The published and the unbiased ratio against the truth.

    Args:
        repeats: batches of every size.
        half_life: of the averages [samples].
        out: folder for ratios.png and ratios.md.
    """
    rows = {2**k: ratios(2**k, repeats, half_life) for k in range(2, 15)}
    out.mkdir(parents=True, exist_ok=True)
    figure(rows, half_life).savefig(out / "ratios.png", dpi=150)
    table = [[b, *(row[n] for n in ("published", "unbiased", "low", "high", "undefined"))] for b, row in rows.items()]
    header = ["b", "published", "unbiased", "10 %", "90 %", "share undefined"]
    text = f"Truth: {NOISE_SCALE:g}.\n\n{tabulate(table, header, 'github', floatfmt=',.3g')}\n\n"
    text += f"`python -m benchmarks.ratios --repeats={repeats} --half_life={half_life:g}`\n"
    (out / "ratios.md").write_text(text)
    print(text)


if __name__ == "__main__":
    auto_cli(benchmark, as_positional=False)
