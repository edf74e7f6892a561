"""What a watched step costs in the Trainer of transformers, against a plain one.

    python -m benchmarks.integrations                 # writes integrations.md in benchmarks/results

A GPT-2 of 4 layers × 256 without dropout trains on random bytes, watched by `NoiseScaleCallback` at every second step,
so that watched and plain steps take turns. Shown are the medians, and the quartiles of the ratio of neighbours.
"""

import statistics
import tempfile
import time

import torch
from jsonargparse import auto_cli
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from adadagrad.integrations.transformers import NoiseScaleCallback
from benchmarks.cases import RESULTS, provenance


class Clock(TrainerCallback):
    """Seconds of every step, from its begin to the optimizer's step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(time.perf_counter() - self.begin)


def timed(batch_size: int, length: int, steps: int) -> list[float]:
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=length, n_embd=256, n_layer=4, n_head=4, **none))
    data = [{"input_ids": row, "labels": row} for row in torch.randint(256, (batch_size * steps, length))]
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        how = TrainingArguments(folder, per_device_train_batch_size=batch_size, max_steps=steps, use_cpu=True, **quiet)
        trainer = Trainer(model, how, train_dataset=data, callbacks=[clock := Clock()])
        trainer.add_callback(NoiseScaleCallback(trainer, measure_interval=2))
        trainer.train()
    return clock.seconds


def main(batch_size: int = 8, length: int = 128, steps: int = 60, threads: int = 1) -> None:
    """
    Args:
        batch_size: sequences of a step.
        length: tokens of a sequence.
        steps: taken; the first four do not count.
        threads: of PyTorch.
    """
    torch.set_num_threads(threads)
    seconds = timed(batch_size, length, steps)[4:]
    watched, plain = seconds[::2], seconds[1::2]
    quartiles = statistics.quantiles([a / b for a, b in zip(watched, plain)], n=4)
    medians = statistics.median(watched), statistics.median(plain)
    lines = [
        "| sequences × tokens | plain step | watched step | ratio | quartiles of the ratio |",
        "|---|---|---|---|---|",
        f"| {batch_size} × {length} | {medians[1]:.3f} s | {medians[0]:.3f} s | {medians[0] / medians[1]:.2f} | "
        f"{quartiles[0]:.2f} … {quartiles[2]:.2f} |",
        "",
        provenance(),
    ]
    print("\n".join(lines))
    (RESULTS / "integrations.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
