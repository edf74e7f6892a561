"""How long the program takes to answer: words that need no training, and the way to the first training step.

    python -m benchmarks.startup                     # writes benchmarks/results/startup.md

Each command runs in a process of its own; repeats of all commands are interleaved, and the figure is the median. The
way to the first step ends when the first row of metrics.csv is there; what it is compared with is the bare import of
the libraries that training needs.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jsonargparse import auto_cli
from tabulate import tabulate

from benchmarks.cases import RESULTS, provenance

ROOT = Path(__file__).parent.parent
BARE = "import torch, torchvision, lightning.fabric"
COMMANDS = {
    "python main.py --help": [sys.executable, "main.py", "--help"],
    "python main.py --print_config": [sys.executable, "main.py", "--print_config"],
    "python main.py --etta=1 (refused)": [sys.executable, "main.py", "--etta=1"],
    "python main.py --batch_size=0 (refused)": [sys.executable, "main.py", "--batch_size=0"],
    "python report.py --help": [sys.executable, "report.py", "--help"],
    "./expt.sh": ["./expt.sh"],
    f'python -c "{BARE}"': [sys.executable, "-c", BARE],
}
FIRST_STEP = "python main.py, to the first row of metrics.csv"


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def seconds_to_first_step() -> float:
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, "main.py", f"--out_dir={out_dir}", "--run_name=run", "--accelerator=cpu"]
        rows, started = Path(out_dir, "run", "metrics.csv"), time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (rows.exists() and rows.read_bytes().count(b"\n") > 1):
            time.sleep(0.005)
        passed = time.perf_counter() - started
        process.kill()
        process.wait()
        return passed


def benchmark(repeats: int = 5, out: Path = RESULTS) -> None:
    """Seconds until the program answers.

    Args:
        repeats: of every command; one before them, which fills the caches, does not count.
        out: folder for startup.md.
    """
    ways = {name: lambda command=command: seconds(command) for name, command in COMMANDS.items()}
    ways[FIRST_STEP] = seconds_to_first_step
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            passed = way()
            if repeat:
                times[name].append(passed)
    rows = [[f"`{name}`", statistics.median(own), min(own), max(own)] for name, own in times.items()]
    bare, first = list(times)[-2:]
    ratio = statistics.median(b / a for a, b in zip(times[bare], times[first]))
    text = tabulate(rows, ["command", "median [s]", "least", "most"], "github", floatfmt=".2f") + (
        f"\n\nTo the first step over the bare imports, median of neighbours: {ratio:.2f}.\n\n"
        f"`python -m benchmarks.startup --repeats={repeats}` on {provenance()}, {os.cpu_count()} cores.\n"
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "startup.md").write_text(text)
    print(text)


if __name__ == "__main__":
    auto_cli(benchmark, as_positional=False)
