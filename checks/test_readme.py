"""README.md and docs/: commands, examples and links. What can be run in seconds is run, word for word but for the
options that shorten it; of what cannot, the words are read as the program reads them.
"""

import csv
import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import main
import tests
from adadagrad import gradients
from checks.conftest import ROOT, launch
from options import command_line

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
FENCES = [fence for text in PAGES.values() for fence in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)]
BLOCKS = [block for language, block in FENCES if language == "python"]

SHORT = "--dataset=digits --max_samples=64 --accelerator=cpu --devices=1"
"""Makes any training command one of seconds."""
EXAMPLES = (
    "flowers:load",
    "photos:load",
    "houses:load",
    "llama:small",
    "my_rules:Doubling",
    "BatchScaler(model, cross_entropy, optimizer, batch_size=16, max_batch_size",
    "BatchScaler(model, cross_entropy, optimizer, max_batch_size",
    "Clipping, WeightAverage",
    "fully_shard(model)",
    "tests.NormTest(eta=0.1)(moments)",
    "AdaptiveBatchTrainer(model, args, train_dataset=data, scaling={",
    "trainer = AdaptiveBatchTrainer(model, args",
    "trainer.add_callback(",
    "with adaptive_accumulate(",
    "AdaptiveBatchSize(cross_entropy",
    "def train_step(",
    "def after_step(",
    "scaler.scaling(len(inputs))",
    "register_comm_hook",
    "class Loader:",
    "# policy.py",
)
"""What tells the Python examples from each other; each is run below, or by test_library.py, test_wheel.py,
test_integration_*.py, test_plain_loops.py, test_clusters.py or test_status.py."""


def commands() -> set[str]:
    """Every command in the pages' blocks of bash, without its comment, on one line."""
    lines = "\n".join(block for language, block in FENCES if language == "bash").replace("\\\n", " ").splitlines()
    return {" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in lines} - {""}


def started(program: str, word: str = "") -> list[str]:
    """The commands that begin so and have this word."""
    return [command for command in sorted(commands()) if command.startswith(program) and word in command]


def test_every_command_can_be_typed():
    """Its program exists and takes its words; what trains on one process or reports is run below, too."""
    for command in commands():
        program, *words = shlex.split(command)
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M), command
        elif "main.py" in words:
            command_line.parse(of_the_program(words[words.index("main.py") + 1 :]))
        elif program == "python" and words[0] == "-m":
            assert importlib.util.find_spec(words[1]), command
        elif program == "python":
            assert (ROOT / words[0]).is_file(), command
        elif "expt.sh" not in command:  # that is run below
            assert program in ("source", "apt-get", "pip"), command
    assert {language for language, _ in FENCES} <= {"bash", "python", "bibtex", "text"}


def test_every_example_is_known():
    found = [[marker for marker in EXAMPLES if marker in block] for block in BLOCKS]
    assert sorted(found) == sorted([marker] for marker in EXAMPLES)


def test_tables_of_what_to_type():
    """ "you want, you type": the program knows every option in the second column, and its value."""
    tables = re.findall(r"^\| you want \| you type \|\n\|[-|]+\n((?:\|.*\n)+)", "\n".join(PAGES.values()), re.M)
    cells = [cell for table in tables for cell in re.findall(r"^\|.*?\| (.*) \|$", table, re.M)]
    typed = [words for cell in cells for words in re.findall(r"`([^`]+)`", cell) if "--" in words]
    assert len(tables) == 2 and len(typed) > 15
    for words in typed:
        if "report.py" not in words:
            command_line.parse(of_the_program(words.removeprefix("python main.py").replace("…", "").split()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)", target.read_text(), re.M)), link
    for name in re.findall(r"`(?:python )?([\w./-]+\.(?:py|sh))\b", PAGES[page]):
        within = [ROOT, *(path for path in ROOT.iterdir() if path.is_dir()), *(ROOT / "adadagrad").iterdir()]
        assert name in ("flowers.py", "photos.py", "houses.py", "llama.py", "my_rules.py") or any(
            (folder / name).exists() for folder in within
        ), name
    for module in re.findall(r"python -m\s+([\w.]+)", PAGES[page]):
        assert importlib.util.find_spec(module), module


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_front_door_is_short():
    assert len(PAGES[ROOT / "README.md"].splitlines()) <= 220


def of_the_program(words: list[str]) -> list[str]:
    """The words that main.py reads: not those of `fabric run`, which have hyphens, and not what stands for more."""
    return [word for word in words if word != "…" and not re.match(r"--\w+-", word)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to type the commands in, with a `fabric` that notes its words; gives a function that runs a command."""
    monkeypatch.chdir(tmp_path)
    for name in ("report.py", "expt.sh"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "fabric").write_text('#!/bin/sh\necho "$*" >>"$NOTES"\n')
    (tmp_path / "bin" / "fabric").chmod(0o755)
    notes = tmp_path / "notes"

    def run(command: str) -> SimpleNamespace:
        notes.write_text("")
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = launch("bash", "-c", command, cwd=tmp_path, PATH=path, NOTES=str(notes))
        assert done.returncode == 0, command + done.stdout + done.stderr
        return SimpleNamespace(stdout=done.stdout, stderr=done.stderr, calls=notes.read_text().splitlines())

    return run


def train(command: str, more: str) -> None:
    assert main.main(shlex.split(command)[2:] + shlex.split(more)) == 0, command


def test_experiments(folder):
    """All that expt.sh is asked for; what it would start is accepted by the program. Under Slurm it is the same."""
    points = {}
    for command in started("./expt.sh") + started("sbatch"):
        done = folder(re.sub(r"^sbatch .*?expt.sh", "./expt.sh", command))
        points[command] = [command_line.parse(of_the_program(call.split()[2:])) for call in done.calls]
        assert done.stdout if command == "./expt.sh" or "--dry-run" in command else done.calls, command
    grids = [grid for command, grid in points.items() if " sweep " in command and "--dry-run" not in command]
    assert grids and all(len(grid) == 9 for grid in grids)
    assert "cnn_eta0.1_seed2" in {config.run_name for grid in grids for config in grid}
    assert folder("./expt.sh").stdout.count("\n") > 30


def test_training_and_its_reports(folder, tmp_path):
    for number, command in enumerate(started("python main.py")):
        if "gpt" in command or "--devices" in command or "tokens" in command:
            continue  # a text: below; several processes: checks/test_runs.py
        train(command, SHORT + ("" if "--run_name" in command else f" --run_name={number}"))
        if "--resume" in command:  # "always the same command", also for a run that is to be longer now
            train(command, f"{SHORT} --max_samples=96")
            assert json.loads((tmp_path / "out" / "long" / "summary.json").read_text())["samples"] >= 96
    for command in started("python report.py out/"):
        assert "cnn" in folder(command).stdout or ">" in command
        if figures := re.search(r"--figures=(\S+)", command):
            assert (tmp_path / figures[1] / "against_steps.pdf").exists()
        if table := re.search(r"latex > (\S+)", command):
            assert "tabular" in (tmp_path / table[1]).read_text()


@pytest.mark.parametrize("command", started("python report.py benchmarks"))
def test_report_of_what_is_kept(command):
    told = launch("bash", "-c", re.sub("^python", sys.executable, command), cwd=ROOT).stdout
    assert "steady" in told


def used_by(example: str, data_dir: Path) -> list[str]:
    """The words of the command in an example's first line."""
    return re.search(r"python main.py (.*)", example)[1].replace("FOLDER", str(data_dir)).split()


def test_own_model_data_set_and_optimizer(tmp_path, monkeypatch):
    example = next(block for block in BLOCKS if "flowers:load" in block)
    (tmp_path / "flowers.py").write_text(example)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    images = rng.integers(0, 60, (90, 3, 12, 12), dtype=np.uint8)
    images[np.arange(90), labels] += 150  # the class is the brightest channel
    arrays = {"x_train": images[:60], "y_train": labels[:60], "x_val": images[60:], "y_val": labels[60:]}
    np.savez(tmp_path / "flowers.npz", **arrays)
    monkeypatch.chdir(tmp_path)
    words = used_by(example, tmp_path)
    assert main.main([*words, "--accelerator=cpu", "--devices=1", f"--out_dir={tmp_path}", "--run_name=run"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["val_accuracy"] == 1.0


def test_own_rule(tmp_path, monkeypatch):
    example = next(block for block in BLOCKS if "my_rules:Doubling" in block)
    (tmp_path / "my_rules.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    words = [*used_by(example, tmp_path), "--model=logistic", "--max_samples=21000", "--eval_samples=21000"]
    assert main.main([*words, "--accelerator=cpu", "--devices=1", f"--out_dir={tmp_path}", "--run_name=run"]) == 0
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert {row["batch_size"] for row in rows} == {"16", "32", "64"} and any(row["variance"] for row in rows)


def test_own_data_set_too_large_for_memory(tmp_path, monkeypatch):
    example = next(block for block in BLOCKS if "photos:load" in block)
    (tmp_path / "photos.py").write_text(example)
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 5)):
        for label, name in enumerate(("blue", "green")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (24, 20, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    words = used_by(example, tmp_path)
    words += ["--model=logistic", "--max_samples=300", f"--out_dir={tmp_path}", "--run_name=run"]
    assert main.main([*words, "--accelerator=cpu", "--devices=1"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["val_accuracy"] == 1.0


def test_regression_of_ones_own(tmp_path, monkeypatch):
    example = next(block for block in BLOCKS if "houses:load" in block)
    (tmp_path / "houses.py").write_text(example)
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 300), ("val", 60)):
        features = rng.normal(size=(n, 4))
        arrays |= {f"x_{split}": features, f"y_{split}": features[:, :1] - 2 * features[:, 1:2]}
    np.savez(tmp_path / "houses.npz", **arrays)
    monkeypatch.chdir(tmp_path)
    words = [*used_by(example, tmp_path), "--test_type=norm", f"--out_dir={tmp_path}", "--run_name=run"]
    assert main.main([*words, "--accelerator=cpu", "--devices=1", "--max_samples=6000"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["val_error"] < 0.5  # 1.8 of the mean


def test_text_is_prepared_and_learned_from(folder, tmp_path, monkeypatch):
    """The commands of docs/text.md, and the model of one's own on the same tokens."""
    for name in ("book.txt", "more.txt"):
        (tmp_path / name).write_text("a few words and a few more of them. " * 400)
    (tmp_path / "text").symlink_to(ROOT / "text")
    for name in ("launch", "options", "adadagrad"):
        (tmp_path / name).symlink_to(ROOT / name)
    folder(*started("python -m text.prepare"))
    short = "--max_samples=32 --accelerator=cpu --devices=1 --test_type=norm"
    train(*started("python main.py", "--dataset=tokens"), f"{short} --run_name=gpt")
    assert json.loads((tmp_path / "out" / "gpt" / "summary.json").read_text())["val_bits_per_byte"] < 9
    pytest.importorskip("transformers")
    example = next(block for block in BLOCKS if "llama:small" in block)
    (tmp_path / "llama.py").write_text(example)
    words = [
        *used_by(example, tmp_path / "data" / "books"),
        *short.split(),
        "--dataset_args.sequence_length=16",
        "--run_name=llama",
    ]
    assert main.main(words) == 0


def test_plain_loop():
    lines = next(block for block in BLOCKS if "tests.NormTest(eta=0.1)(moments)" in block)
    torch.manual_seed(0)
    names = {"model": torch.nn.Linear(5, 3), "inputs": torch.randn(12, 5), "targets": torch.arange(12) % 3}
    names |= {"torch": torch, "gradients": gradients, "tests": tests}
    exec(lines, names)
    assert names["batch_size"] == names["decision"].next_batch_size > 12
