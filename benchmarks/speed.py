"""The price of a test: tested training steps against plain ones, side by side; time and memory, ours and peers.

    python -m benchmarks.speed                                     # all; writes benchmarks/results/speed.md and .json
    python -m benchmarks.speed --cases='[cnn_256]' --methods='[plain,ghost]' --out=/tmp

Every line of the table is measured in a process of its own, in which tested and plain steps alternate: the figure is
the median of the ratios of neighbours. Memory is the largest that the process has held (on a GPU: allocated there).
Peers need `pip install -r requirements-benchmarks.txt`; one that cannot run a case is shown with its error. Lines that
an earlier command has left in the same folder are kept until they are measured anew.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision
from jsonargparse import auto_cli
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.cases import RESULTS, provenance, without_in_place
from runs.log import peak_memory_bytes


@dataclass(frozen=True)
class Case:
    title: str
    model: str
    dataset: str
    batch_size: int
    model_args: dict[str, int] = field(default_factory=dict)


CASES = {
    "cnn_256": Case("`cnn`, MNIST shapes, b = 256", "cnn", "random_mnist", 256),
    "cnn_2048": Case("`cnn`, MNIST shapes, b = 2048", "cnn", "random_mnist", 2048),
    "resnet18_gn_32": Case("ResNet-18 GroupNorm, 32×32, b = 32", "resnet18_group_norm", "random_cifar", 32),
    "resnet18_gn_128": Case("ResNet-18 GroupNorm, 32×32, b = 128", "resnet18_group_norm", "random_cifar", 128),
    "resnet18_bn_32": Case("ResNet-18 BatchNorm, 32×32, b = 32", "resnet18_batch_norm", "random_cifar", 32),
    "resnet18_bn_128": Case("ResNet-18 BatchNorm, 32×32, b = 128", "resnet18_batch_norm", "random_cifar", 128),
    "vit_b_16_8": Case("ViT-B/16, 224×224, b = 8", "vit_b_16", "random_imagenet", 8),
    "resnet18_224": Case("ResNet-18 BatchNorm, 224×224, b = 256", "resnet18", "random_imagenet", 256),
    "resnet50_224": Case("ResNet-50 BatchNorm, 224×224, b = 128", "resnet50", "random_imagenet", 128),
    "vit_b_16_64": Case("ViT-B/16, 224×224, b = 64", "vit_b_16", "random_imagenet", 64),
    "gpt_124m": Case("GPT 12 × 768, 256 bytes, b = 64", "gpt", "stdlib", 64, {"layers": 12, "heads": 12, "width": 768}),
    "gpt_8": Case("GPT 4 × 256, 256 bytes, b = 8", "gpt", "stdlib", 8, {"layers": 4, "heads": 4, "width": 256}),
}
OURS = ("vmap", "ghost", "micro_batch")
METHODS = ("plain", *OURS, "opacus", "backpack")
TESTS = ("norm", "ip+orth")
ON_A_GPU = ("resnet18_224", "resnet50_224", "vit_b_16_64", "gpt_124m")
"""Cases that are too large for a CPU."""


def trainer_of(case: Case, test_gradients: str | None, test_type: str, precision: str, out_dir: str):
    """main.py's own trainer; its `train_step` is what is measured."""
    import main
    from launch.processes import start_fabric
    from launch.signals import Interrupts
    from options.schema import Config

    own = not hasattr(torchvision.models, case.model) and case.model not in ("cnn", "gpt")
    config = Config(
        model=f"benchmarks.cases:{case.model}" if own else case.model,
        model_args=case.model_args,
        dataset=case.dataset if case.dataset == "stdlib" else f"benchmarks.cases:{case.dataset}",
        batch_size=case.batch_size,
        max_batch_size=case.batch_size + 1,
        max_micro_batch_size=case.batch_size,  # both kinds of steps are to be cut alike, whatever is quickest here
        max_samples=10**9,
        test=test_gradients is not None,
        test_gradients=test_gradients or "auto",
        test_type=test_type,
        devices=1,
        precision=precision,
        out_dir=Path(out_dir),
        run_name="run",
    )
    return main.Trainer(start_fabric(config), config, Interrupts())


def seconds(step: Callable[[], object]) -> float:
    """Of one call; on a GPU between events of the device."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        step()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def alternate(steps: dict[str, Callable[[], object]], budget: float) -> dict[str, list[float]]:
    """Seconds of each kind of step, taken in turn; after some that do not count, for about `budget` seconds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        if seconds(step) < 1:
            step()
    started = time.perf_counter()
    while len(times["plain"]) < 3 or (time.perf_counter() - started < budget and len(times["plain"]) < 100):
        for name, step in steps.items():
            times[name].append(seconds(step))
    return times


def measure(case: Case, method: str, test_type: str, precision: str, budget: float) -> dict:
    """Times of plain and tested steps, and peak memory, of this process."""
    with tempfile.TemporaryDirectory() as out_dir:
        trainer = trainer_of(case, method if method in OURS else None, test_type, precision, out_dir)

        def step(measured: bool, cut: bool) -> None:
            moments = trainer.train_step(trainer.parts.plan(trainer.controller, measured=cut), measured)
            if moments:
                trainer.controller.rule.test(moments)

        steps = {"plain": lambda: step(measured=False, cut=False)}
        if method in OURS:
            steps["tested"] = lambda: step(measured=True, cut=True)
        if method == "micro_batch":
            steps["cut"] = lambda: step(measured=False, cut=True)
        if method == "opacus":
            steps["tested"] = opacus_step(trainer)
        if method == "backpack":
            steps["tested"] = backpack_step(trainer)
        return {"times": alternate(steps, budget), "peak_memory_bytes": peak_memory_bytes()}


def _batches(trainer):
    """The batches that the plain steps see."""
    while True:
        plan = trainer.parts.plan(trainer.controller, measured=False)
        yield from trainer.parts.stream.take(plan.micro_batches(0))


def opacus_step(trainer) -> Callable[[], object]:
    """Ghost clipping's first pass, which gives gradients and per-sample norms; no clipping, no second pass."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    module = GradSampleModuleFastGradientClipping(
        without_in_place(trainer.parts.module), max_grad_norm=1.0, use_ghost_clipping=True, strict=True
    )
    optimizer, batches = type(trainer.parts.optimizer)(module.parameters()), _batches(trainer)

    def step() -> None:
        inputs, targets = next(batches)
        optimizer.zero_grad(set_to_none=True)
        module.enable_hooks()
        cross_entropy(module(inputs), targets).backward()
        module.get_norm_sample().double().square().sum().item()
        module.disable_hooks()
        optimizer.step()

    return step


def backpack_step(trainer) -> Callable[[], object]:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model, loss = extend(without_in_place(trainer.parts.module), use_converter=True), extend(nn.CrossEntropyLoss())
    optimizer, batches = type(trainer.parts.optimizer)(model.parameters()), _batches(trainer)

    def step() -> None:
        inputs, targets = next(batches)
        optimizer.zero_grad(set_to_none=True)
        with backpack(BatchL2Grad()):
            loss(model(inputs), targets).backward()
        without = [type(m).__name__ for m in model.modules() for p in m.parameters(False) if not hasattr(p, "batch_l2")]
        if without:
            raise NotImplementedError(f"no BatchL2Grad for the parameters of {', '.join(sorted(set(without)))}")
        sum(parameter.batch_l2.double().sum() for parameter in model.parameters()).item()
        optimizer.step()

    return step


def in_own_process(name: str, method: str, test_type: str, precision: str, budget: float) -> dict:
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed",
        f"--worker=[{name},{method},{test_type}]",
        f"--budget={budget}",
        f"--precision={precision}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return {"error": lines[-1][:160] if done.returncode > 0 and lines else f"ended by signal {-done.returncode}"}


def ratio(result: dict, over: str = "plain") -> float:
    times = result["times"]
    return statistics.median(t / p for t, p in zip(times["tested"], times[over]))


def table(results: dict[str, dict]) -> str:
    """Markdown: a line for each case and method."""
    lines = ["| case | method | norm test | `ip+orth` | peak memory |", "|---|---|---|---|---|"]
    for name, case in CASES.items():
        plain = results.get(f"{name} plain norm")
        if not plain or "error" in plain:
            continue
        step = statistics.median(plain["times"]["plain"])
        megabytes = plain["peak_memory_bytes"] / 2**20
        lines.append(f"| {case.title} | plain step | {1000 * step:,.0f} ms | | {megabytes:,.0f} MiB |")
        for method in METHODS[1:]:
            both = [results.get(f"{name} {method} {test}") for test in TESTS]
            if any(both):
                lines.append(f"| | {method} | {' | '.join(map(_price, both))} | {_memory(both, plain)} |")
    return "\n".join(lines)


def _price(result: dict | None) -> str:
    if result is None:
        return "–"
    if "error" in result:
        return f"*{result['error'].replace('|', '/')}*"
    beyond = f" ({ratio(result, 'cut'):.2f} of the cut step)" if "cut" in result["times"] else ""
    return f"{ratio(result):.2f}{beyond}"


def _memory(results: list[dict | None], plain: dict) -> str:
    peaks = [result["peak_memory_bytes"] for result in results if result and "error" not in result]
    return " / ".join(f"{peak / plain['peak_memory_bytes']:.2f}" for peak in peaks) or "–"


def benchmark(
    cases: list[str] = [name for name in CASES if name not in ON_A_GPU],  # noqa: B006 (never changed)
    methods: list[str] = list(METHODS),  # noqa: B006
    tests: list[str] = list(TESTS),  # noqa: B006
    precision: str = "32-true",
    budget: float = 20.0,
    out: Path = RESULTS,
    worker: list[str] | None = None,
) -> None:
    """Tested training steps against plain ones, side by side.

    Args:
        cases: which networks and batch sizes.
        methods: which ways to the statistics.
        tests: norm, ip+orth; of peers the norm test alone.
        precision: as of main.py.
        budget: about how long to measure each line of the table [seconds].
        out: folder for speed.md and speed.json.
        worker: case, method and test of a process of its own (used by the program itself).
    """
    if worker:
        name, method, test_type = worker
        print(json.dumps(measure(CASES[name], method, test_type, precision, budget)))
        return
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "speed.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in cases:
        for method in methods:
            for test_type in tests if method in OURS else TESTS[:1]:
                key = f"{name} {method} {test_type}"
                ours = in_own_process(name, method, test_type, precision, budget)
                results[key] = ours | {
                    "command": f"python -m benchmarks.speed --budget={budget:g}",
                    "machine": provenance(),
                }
                said = ours.get("error") or (f"{ratio(ours):.2f}" if "tested" in ours["times"] else "")
                print(f"{key:<40} {said}", file=sys.stderr, flush=True)
                kept.write_text(json.dumps(results) + "\n")
    sources = sorted({f"`{result['command']}` on {result['machine']}." for result in results.values()})
    text = "\n\n".join([table(results), *sources]) + "\n"
    (out / "speed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    auto_cli(benchmark, as_positional=False)
