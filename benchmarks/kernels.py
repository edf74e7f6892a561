"""Kernels and waits of a step on a GPU: plain, between two tests, tested.

    python -m benchmarks.kernels --out=steps.json

Counts, by the profiler of torch, what the host asks of the device in ten steps: kernels, copies, calls that wait.
On a CPU the counts are zero, and only the times mean something.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch.profiler import ProfilerActivity, profile

import main
from benchmarks.cases import RESULTS, provenance
from launch.processes import start_fabric
from launch.signals import Interrupts
from options.schema import Config

CALLS = {
    "kernels": ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC"),
    "copies": ("cudaMemcpyAsync", "cudaMemcpy"),
    "waits": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
}
STEPS = 10


def trainer(device: str, out_dir: str) -> main.Trainer:
    config = Config(
        model="cnn",
        dataset="benchmarks.cases:random_mnist",
        batch_size=64,
        max_batch_size=128,
        max_micro_batch_size=64,
        max_samples=10**9,
        test_type="norm",
        eta=1e9,
        accelerator=device,
        devices=1,
        out_dir=Path(out_dir),
        run_name="run",
    )
    return main.Trainer(start_fabric(config), config, Interrupts())


def counted(step: Callable[[], object], device: str) -> dict[str, float]:
    """Calls and milliseconds of a step, after some that do not count."""
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiled:
        for _ in range(STEPS):
            step()
    calls = {average.key: average.count for average in profiled.key_averages()}
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - started) / STEPS * 1e3
    per_step = {kind: sum(calls.get(name, 0) for name in names) / STEPS for kind, names in CALLS.items()}
    return {**per_step, "milliseconds": round(milliseconds, 3)}


def benchmark(device: str = "cuda", out: Path = RESULTS / "steps.json") -> None:
    """Kernels, copies and waits of plain and of tested steps.

    Args:
        device: cuda or cpu.
        out: file for the numbers.
    """
    with tempfile.TemporaryDirectory() as out_dir:
        run = trainer(device, out_dir)

        def step(measured: bool) -> None:
            moments = run.train_step(run.parts.plan(run.controller, measured), measured)
            if moments:
                run.controller.rule.test(moments)

        kinds = {"plain": False, "tested": True}
        found = {kind: counted(lambda measured=measured: step(measured), device) for kind, measured in kinds.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**found, "steps": STEPS, "machine": provenance()}, indent=2) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    auto_cli(benchmark, as_positional=False)
