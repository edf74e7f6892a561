"""status.json: where a run stands, and what other numbers of devices would bring it, for whoever assigns devices."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adadagrad.control import quickest_batch
from options.schema import Config

FILE = "status.json"
SECONDS = 1.0
"""Between two writings: a small network takes a thousand steps meanwhile, and nobody assigns devices so often."""
DEVICES = tuple(2**k for k in range(11))


class Status:
    """Writes status.json, whole or not at all, at rows of the log.

    Args:
        folder: of the run.
        config: the options in effect.
    """

    def __init__(self, folder: Path, config: Config):
        self.path, self.config = folder / FILE, config
        self.noise: dict[str, float | None] = {}
        self.written = -math.inf

    def update(self, row: Mapping[str, Any], at_once: bool = False) -> None:
        """
        Args:
            row: of metrics.csv.
            at_once: also where it was written less than a second ago.

        Raises:
            OSError: the file cannot be written.
        """
        if row.get("noise_scale") is not None:
            self.noise = {name: row.get(name) for name in ("noise_scale", "noise_scale_low", "noise_scale_high")}
        now = time.monotonic()
        if not at_once and now - self.written < SECONDS:
            return
        self.written = now
        temporary = self.path.with_name(FILE + ".tmp")
        temporary.write_text(json.dumps(self._of(row), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def _of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        c, knee, noise_scale = self.config, self.config.knee, self.noise.get("noise_scale")
        by_samples = c.training_type == "sample"
        status = {
            "time": time.time(),
            "step": row["step"],
            "samples": row["samples"],
            "samples_left": max(c.max_samples - row["samples"], 0) if by_samples else None,
            "steps_left": None if by_samples else max(c.max_iters - row["step"], 0),
            "batch_size": row["next_batch_size"],
            "world_size": row["world_size"],
            "noise_scale": noise_scale,
            "noise_scale_low": self.noise.get("noise_scale_low"),
            "noise_scale_high": self.noise.get("noise_scale_high"),
            "knee": knee,
            "samples_per_second": row["samples_per_second"],
            "progress_per_second": None,
            "progress_per_second_by_devices": None,
        }
        if knee and noise_scale:
            b, time_of_step = row["batch_size"], row["step_time"]
            critical = c.critical * noise_scale
            status["progress_per_second"] = progress(b, critical) / time_of_step
            status["progress_per_second_by_devices"] = by_devices(
                time_of_step, b, knee, critical, row["world_size"], c.max_batch_size
            )
        return status


def progress(batch_size: float, critical: float) -> float:
    """What a step of b samples is worth, in samples of the smallest batches: b/(1 + b/C)."""
    return batch_size / (1 + batch_size / critical)


def by_devices(
    step_time: float, batch_size: int, knee: float, critical: float, world_size: int, max_batch_size: int
) -> dict[str, float]:
    """Progress a second with other numbers of devices, each at the batch that is the quickest there.

    A step of b samples takes α + β·b with the devices there are; with W times as many the samples take a W-th of the
    time, so that the knee α/β is W times as large. What the exchange of gradients costs is within α, as measured with
    the devices there are: from one device to several it is more, which nobody knows before it was tried.

    Args:
        step_time: of a step of `batch_size` samples [s].
        knee: α/β with the devices there are [samples].
        critical: critical batch size [samples].
        world_size: devices there are.

    Returns:
        Number of devices → samples of the smallest batches a second.
    """
    per_sample = step_time / (knee + batch_size)
    fixed = knee * per_sample
    found = {}
    for devices in sorted({*DEVICES, world_size}):
        of_each = per_sample * world_size / devices
        best = max(devices, min(quickest_batch(critical, (fixed, of_each)), max_batch_size))
        if best <= max_batch_size:
            found[str(devices)] = progress(best, critical) / (fixed + of_each * best)
    return found
