"""What the training loop costs: steps of main.py beside those of a bare PyTorch loop, on networks that cost little.

    python -m benchmarks.loop                        # writes benchmarks/results/loop.md

Noise in MNIST's form in memory, batches of 16, SGD with momentum. The bare loop takes its samples from a permutation,
normalises them, and reads the loss at every 50th step; main.py besides logs a row then, with the loss and the accuracy
over all 50. Plain steps are those of `--test=False`; those between two tests have everything for the next one ready.
All loops take turns in one process, 50 steps at a time. Of the repeats the least is shown; ratios are medians over
those of neighbours.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import auto_cli
from tabulate import tabulate
from torch.nn.functional import cross_entropy

import main
import models
from benchmarks import cases
from benchmarks.cases import RESULTS, provenance
from launch.processes import start_fabric
from launch.signals import Interrupts
from options.schema import Config

NETWORKS = {"logistic": models.logistic, "benchmarks.cases:mlp": cases.mlp}
STEPS = 50
"""In a turn; one of them is logged."""
PLAIN = {"test": False}
BETWEEN = {"test": True, "test_type": "norm", "ramp_up_type": "test", "eta": 1e9, "test_interval": 10**9}


class Turns(main.Trainer):
    """main.py's own loop, a turn at a time, without an evaluation at the end of each."""

    end = 0

    def finished(self) -> bool:
        return self.controller.steps >= self.end

    def evaluation_is_due(self, batch_size: int) -> bool:
        return super().evaluation_is_due(batch_size) and False

    def turn(self) -> None:
        self.end += STEPS
        self.state.checkpoints.saved_step = self.end  # none is written
        self.fit()


def of_the_program(network: str, device: str, out_dir: str, options: dict) -> Callable[[], None]:
    """A turn of main.py."""
    config = Config(
        model=network,
        dataset="benchmarks.cases:random_mnist",
        batch_size=16,
        max_batch_size=64,
        max_micro_batch_size=64,
        max_samples=10**9,
        optimizer="sgd",
        momentum=0.9,
        learning_rate=0.01,
        decay_lr=False,
        log_interval=STEPS,
        checkpoint_minutes=0,
        devices=1,
        accelerator=device,
        out_dir=Path(out_dir),
        run_name=f"{network.rpartition(':')[2]} {options['test']}",
        **options,
    )
    return Turns(start_fabric(config), config, Interrupts()).turn


def bare(network: str, device: str) -> Callable[[], None]:
    """A turn of a loop as one writes it."""
    device = torch.device(device)
    model = NETWORKS[network]((1, 28, 28), 10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    samples = cases.random_mnist(Path()).train
    images, labels = (tensor.to(device) for tensor in samples.tensors)

    def turn() -> None:
        order = torch.randperm(len(images), device=device)
        for step in range(STEPS):
            chosen = order[16 * step : 16 * (step + 1)]
            inputs = images[chosen].float().div_(255).sub_(0.1307).div_(0.3081)
            loss = cross_entropy(model(inputs), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()

    return turn


def microseconds(turn: Callable[[], None]) -> float:
    """Of a step."""
    started = time.perf_counter()
    turn()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / STEPS * 1e6


def benchmark(repeats: int = 200, device: str = "cpu", threads: int = 1, out: Path = RESULTS) -> None:
    """Steps of main.py beside those of a bare loop.

    Args:
        repeats: turns of every loop; as many again as a tenth of them, before, do not count.
        device: cpu or cuda.
        threads: of the CPU.
        out: folder for loop.md.
    """
    torch.set_num_threads(threads)
    rows = []
    for network in NETWORKS:
        with tempfile.TemporaryDirectory() as out_dir:
            loops = [bare(network, device)]
            loops += [of_the_program(network, device, out_dir, options) for options in (PLAIN, BETWEEN)]
            turns = [[microseconds(turn) for turn in loops] for _ in range(repeats + repeats // 10)][repeats // 10 :]
        least = [min(own) for own in zip(*turns)]
        ratios = [statistics.median(turn[i] / turn[0] for turn in turns) for i in (1, 2)]
        rows.append([f"`{network.rpartition(':')[2]}`", least[0], least[1], ratios[0], least[2], ratios[1]])
    columns = ["network", "bare [µs]", "plain [µs]", "over bare", "between tests [µs]", "over bare"]
    table = tabulate(rows, columns, "github", floatfmt=("", ".0f", ".0f", ".2f", ".0f", ".2f"))
    text = f"{table}\n\n`python -m benchmarks.loop --repeats={repeats} --device={device}` on {provenance()}.\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "loop.md").write_text(text)
    print(text)


if __name__ == "__main__":
    auto_cli(benchmark, as_positional=False)
