"""Memory of a process with whole and with shared-out parameters: a GPT on two processes, `ddp` beside `fsdp`.

    python -m benchmarks.sharding                     # writes benchmarks/results/sharding.md

Of each process of a run of its own: what is resident after a step (parameters, gradients, optimizer states) and the
peak within the steps, over what was resident when the libraries had been imported. The start of the run is left out:
every process builds the whole model first, and the check of the test works on a copy.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from tabulate import tabulate

import main
from benchmarks.cases import RESULTS, provenance

ROOT = Path(__file__).parent.parent
MIB = 2**20
OPTIONS = """
    --model=gpt --dataset=tokens --dataset_args.sequence_length=32 --accelerator=cpu --devices=2
    --max_micro_batch_size=2
    --training_type=iter --max_iters=4 --batch_size=4 --max_batch_size=8 --eval_interval=0
""".split()  # noqa: SIM905
KINDS = {
    "plain step": ["--test=False"],
    "norm test, `ghost`": ["--test_gradients=ghost", "--eta=1e9"],
    "norm test, `worker`": ["--test_gradients=worker", "--eta=1e9"],
    "inner product test": ["--test_type=ip", "--theta=1e9"],
}
CHILD = "MEASURED"


def resident(name: str) -> int:
    """VmRSS or VmHWM, the peak since `forget_peak` [bytes]."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measured_run(options: list[str]) -> int:
    """A run of main.py in this process, which prints what its steps after the first two need."""
    before, step = resident("VmRSS"), main.Trainer.step

    def measured(trainer):
        if trainer.controller.steps == 2:
            forget_peak()
        row = step(trainer)
        if trainer.controller.steps == 4:
            parameters = sum(p.numel() for p in trainer.parts.module.parameters())
            print(CHILD, parameters, resident("VmRSS") - before, resident("VmHWM") - before, flush=True)
        return row

    main.Trainer.step = measured
    return main.main(options)


def memory(options: list[str]) -> tuple[int, float, float]:
    """Parameters; resident and peak [MiB], the larger one of the two processes."""
    with tempfile.TemporaryDirectory() as out_dir:
        for split in ("train", "val"):
            (np.arange(33 * 64, dtype=np.uint16) % 256).tofile(Path(out_dir, f"{split}.bin"))
        folders = [f"--out_dir={out_dir}", f"--data_dir={out_dir}", "--dataset_args.vocab_size=256"]
        command = [sys.executable, "-m", "benchmarks.sharding", CHILD, *OPTIONS, *folders]
        # What is freed goes back to the system, so that what is resident is what is held.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, env=environment)
    found = [[int(word) for word in words] for words in re.findall(rf"{CHILD} (\d+) (-?\d+) (-?\d+)", done.stdout)]
    if done.returncode or len(found) != 2:
        raise SystemExit(done.stdout + done.stderr)
    return found[0][0], *(max(own[i] for own in found) / MIB for i in (1, 2))


def benchmark(width: int = 768, layers: int = 8, out: Path = RESULTS) -> None:
    """Memory of a process, whole and sharded.

    Args:
        width: of the GPT.
        layers: of the GPT.
        out: folder for sharding.md.
    """
    model = [f"--model_args.{name}" for name in (f"width={width}", f"layers={layers}", "heads=4")]
    rows = []
    for kind, options in KINDS.items():
        (parameters, *ddp), (_, *fsdp) = (memory([*model, *options, f"--strategy={name}"]) for name in ("ddp", "fsdp"))
        rows.append([kind, ddp[0], fsdp[0], fsdp[0] / ddp[0], ddp[1], fsdp[1], fsdp[1] / ddp[1]])
        print(rows[-1], flush=True)
    names = ["step", "resident, ddp [MiB]", "fsdp", "ratio", "peak, ddp [MiB]", "fsdp", "ratio"]
    text = tabulate(rows, names, "github", floatfmt=["", ".0f", ".0f", ".2f", ".0f", ".0f", ".2f"]) + (
        f"\n\nA GPT of {parameters:,} parameters ({parameters * 4 / MIB:.0f} MiB) with adam, two processes, batches of "
        f"4 × 32 tokens.\n\n"
        f"`python -m benchmarks.sharding --width={width} --layers={layers}` on {provenance()}.\n"
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "sharding.md").write_text(text)
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        sys.exit(measured_run(sys.argv[2:]))
    auto_cli(benchmark)
