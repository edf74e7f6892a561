"""Every classifier of torchvision: one tested training step with vmap, with auto and with micro_batch.

    python -m benchmarks.torchvision_models                    # all; writes benchmarks/results/models.md and .json
    python -m benchmarks.torchvision_models --names='[resnet18,vit_b_16]' --out=/tmp
    python -m benchmarks.torchvision_models --check_only=True       # only what `auto` takes; checked.md and .json

Each model at its own image size, in a process of its own, on noise images, with all statistics (ip+orth); batches of 4,
of 2 where the model (50 million parameters) or its images (300×300 pixels) are large. Shown is the
largest relative difference of `auto` to `vmap` over V, V_ip, V_orth and ‖ḡ‖². Where that is above 1e-4 in float32, the
comparison is made again in float64, and the error that float32 makes in the reference itself is shown beside it.
With --check_only no step is taken: it is the check at the start of a run, which compares every parameter's norms with
those of single samples (three images of 64×64 pixels; of the model's own size where it does not take these, or takes
them by another estimator).
Goes on where it was interrupted: delete models.json (checked.json) to start anew.
"""

import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision
from jsonargparse import auto_cli
from torch import nn
from torch.nn.functional import cross_entropy

import models
from adadagrad import gradients
from adadagrad.gradients.choice import COUPLED
from benchmarks.cases import RESULTS, for_comparison, provenance
from options.errors import UsageError

NAMES = torchvision.models.list_models(module=torchvision.models)
CLASSES = 10
SMALL = 64
"""Pixels."""
KINDS = {
    gradients.GhostNorms: "ghost",
    gradients.PerSampleGradients: "vmap",
    gradients.SingleGradients: "loop",
    gradients.MicroBatchGradients: "micro_batch",
}
TOLERANCE = 1e-4
STATISTICS = ("variance", "variance_inner_product", "variance_orthogonality", "grad_norm_sq")


def image_size(name: str) -> int:
    """The smallest size for which torchvision has weights of this model [pixels]."""
    sizes = [weights.transforms().crop_size for weights in torchvision.models.get_model_weights(name)]
    return min(size[0] for size in sizes)


def tested_step(model: nn.Module, test_gradients: str, inputs, targets) -> tuple[dict, str, float]:
    """One training step, its statistics, the estimator that was taken, and the seconds it took."""
    torch.manual_seed(0)
    probe, chunk = (inputs, targets), len(inputs) // 2
    estimator, _ = gradients.build(
        test_gradients, model, cross_entropy, True, chunk, probe, in_training_pass=True, num_groups=2
    )
    started = time.perf_counter()
    model.zero_grad(set_to_none=True)
    scale = 1 / len(inputs)
    for x, y in zip(inputs.split(chunk), targets.split(chunk)):
        with estimator.observe(x, y, scale, whole=False):
            (cross_entropy(model(x), y, reduction="sum") * scale).backward()
    moments = estimator.moments()
    with torch.no_grad():  # the step itself must be possible; so small that all three see the same weights
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-30 * parameter.grad
    kind = KINDS[type(estimator)]
    statistics = {name: getattr(moments, name) for name in STATISTICS}
    return statistics, kind, time.perf_counter() - started


def difference(one: dict, other: dict) -> float:
    """The largest relative one."""
    return max(abs(one[name] / other[name] - 1) for name in STATISTICS)


def examine(name: str, batch_size: int | None = None, size: int | None = None) -> Iterator[dict]:
    """The three ways on one model; by default 4 samples, 2 where the model or its images are large, at its own size.

    Gives the result, and where the difference is large once more, with the comparison in float64.
    """
    size = size or image_size(name)
    torch.manual_seed(0)
    model = for_comparison(models.build(name, (3, size, size), CLASSES))
    if batch_size is None:
        batch_size = 2 if size > 300 or sum(parameter.numel() for parameter in model.parameters()) > 50e6 else 4
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(batch_size, 3, size, size, generator=generator)
    targets = torch.arange(batch_size) % CLASSES
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": size,
        "batch_size": batch_size,
    }
    steps = {kind: tested_step(model, kind, inputs, targets) for kind in ("vmap", "auto", "micro_batch")}
    result["taken"] = steps["auto"][1]
    result["seconds"] = {kind: seconds for kind, (_, _, seconds) in steps.items()}
    result["finite"] = all(math.isfinite(v) for statistics, *_ in steps.values() for v in statistics.values())
    result["difference"] = difference(steps["auto"][0], steps["vmap"][0])
    yield result
    if not result["difference"] < TOLERANCE:
        model, inputs = model.double(), inputs.double()
        auto, exact = (tested_step(model, kind, inputs, targets)[0] for kind in ("auto", "vmap"))
        result["difference_float64"] = difference(auto, exact)
        yield result | {"error_of_vmap": difference(steps["vmap"][0], exact)}


def check(name: str, size: int = SMALL) -> Iterator[dict]:
    """What `auto` takes, and what it says of it: on small images, and on its own where these would not do."""
    with contextlib.suppress(UsageError, ValueError, RuntimeError):  # a transformer may have a size of its own
        result = check_at(name, size)
        yield result
        if result["taken"] == "ghost":
            return
    yield check_at(name, image_size(name))


def check_at(name: str, size: int) -> dict:
    torch.manual_seed(0)
    model = for_comparison(models.build(name, (3, size, size), CLASSES)).train()
    probe = torch.randn(3, 3, size, size), torch.arange(3) % CLASSES
    started = time.perf_counter()
    estimator, told = gradients.build("auto", model, cross_entropy, True, 2, probe, in_training_pass=True)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": size,
        "taken": KINDS[type(estimator)],
        "told": told,
        "seconds": round(time.perf_counter() - started, 1),
    }


def checked_table(results: dict[str, dict]) -> str:
    lines = ["| model | parameters | image | auto takes | and says |", "|---" * 5 + "|"]
    for name, r in sorted(results.items()):
        if "error" in r:
            lines.append(f"| {name} | | | | *{r['error']}* |")
        else:
            told = "; ".join("has BatchNorm" if line == COUPLED else line for line in r["told"]) or "–"
            lines.append(f"| {name} | {r['parameters'] / 1e6:.1f} M | {r['image_size']} | {r['taken']} | {told} |")
    return "\n".join(lines)


def table(results: dict[str, dict]) -> str:
    lines = ["| model | parameters | image | batch | finite | auto takes | largest difference |", "|---" * 7 + "|"]
    for name, r in sorted(results.items()):
        if "error" in r:
            lines.append(f"| {name} | | | | | | *{r['error']}* |")
            continue
        difference = f"{r['difference']:.0e}"
        if not r["difference"] < TOLERANCE and "difference_float64" not in r:
            difference += " (float64: out of memory)"
        elif "difference_float64" in r:
            difference += f" (float64: {r['difference_float64']:.0e}; vmap's own rounding: {r['error_of_vmap']:.0e})"
        lines.append(
            f"| {name} | {r['parameters'] / 1e6:.1f} M | {r['image_size']} | {r['batch_size']} | "
            f"{'yes' if r['finite'] else '**no**'} | {r['taken']} | {difference} |"
        )
    return "\n".join(lines)


def examine_all(
    names: list[str] = NAMES,
    out: Path = RESULTS,
    size: int | None = None,
    check_only: bool = False,
    worker: str | None = None,
) -> None:
    """One tested training step of each of torchvision's classifiers.

    Args:
        names: models.
        out: folder for models.md and models.json.
        size: of the images [pixels]; default: each model's own, or 64 with check_only. Small ones take minutes in the
            place of an hour.
        check_only: only which estimator `auto` takes.
        worker: the model of a process of its own (used by the program itself).
    """
    if worker:
        for result in check(worker, size or SMALL) if check_only else examine(worker, size=size):
            print(json.dumps(result), flush=True)
        return
    out.mkdir(parents=True, exist_ok=True)
    path = out / ("checked.json" if check_only else "models.json")
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    for name in names:
        if name in results:
            continue
        command = [sys.executable, "-m", "benchmarks.torchvision_models", f"--worker={name}"]
        command += [f"--size={size}"] if size else []
        command += ["--check_only=True"] if check_only else []
        done = subprocess.run(command, capture_output=True, text=True)
        given, lines = done.stdout.strip().splitlines(), done.stderr.strip().splitlines()
        if given and done.returncode <= 0:  # a signal may have ended the comparison in float64
            results[name] = json.loads(given[-1])
        else:
            results[name] = {"error": lines[-1] if done.returncode > 0 and lines else "killed: out of memory"}
        print(name, results[name], file=sys.stderr, flush=True)
        path.write_text(json.dumps({"machine": provenance(), "results": results}, indent=1) + "\n")
        rows, option = (checked_table, " --check_only=True") if check_only else (table, "")
        text = f"{rows(results)}\n\n`python -m benchmarks.torchvision_models{option}` on {provenance()}.\n"
        path.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    auto_cli(examine_all, as_positional=False)
