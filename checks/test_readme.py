"""README.md and docs/: commands, examples and links. What can be run in seconds is run, word for word but for the
options that shorten it; what cannot is listed here with the reason, and its words are read as the program reads them.
"""

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

RUN = "run here, on these options as well:"
SHORT = f"{RUN} --dataset=digits --max_samples=64 --accelerator=cpu"
DEVICES = "needs the launcher: checks/test_runs.py has all of them, on small runs"
SLURM = "needs Slurm: checks/test_slurm.py, where there is one"
LONG = "takes long: checks/test_expt.py runs expt.sh, and its words are read below"
MEASURES = "measures for hours: checks/test_benchmarks.py runs the parts on small cases"
TEXT = "needs a text: test_text_is_prepared_and_learned_from"
SHARDS = "takes minutes: checks/test_fsdp.py, on a small text and two processes"
COMMANDS = {
    "make quickstart": "sets up the environment; checks/test_runs.py runs what it runs, `python main.py`",
    "make test": "is what runs this",
    "make install-imagenet": "needs the network",
    "pip install .": "changes the environment: checks/test_library.py installs the wheel into a folder",
    "source .venv/bin/activate": "changes the shell that it is typed in; `make` has made it",
    "apt-get install pkg-config libopencv-dev libturbojpeg0-dev": "needs root and the network",
    "python -m imagenet.convert IMAGE_FOLDER OUT_DIR": "needs ffcv: checks/test_imagenet.py, where it is installed",
    "python -m checks.fault_drill --rounds=50": "takes long: checks/test_survival.py runs a few rounds",
    "python -m benchmarks.torchvision_models": MEASURES,
    "python -m benchmarks.torchvision_models --check_only=True": MEASURES,
    "python -m benchmarks.speed --budget=10": MEASURES,
    "python -m benchmarks.speed --cases='[gpt_8]' --methods='[plain,ghost,vmap]' --budget=25"
    " --out=benchmarks/results/gpt": MEASURES,
    "python -m benchmarks.calibration --dataset=benchmarks.cases:cifar10_npz": MEASURES,
    "python -m benchmarks.stream": MEASURES,
    "python -m benchmarks.sharding": MEASURES,
    "python -m benchmarks.comparison mnist_logistic -j 2 --data_dir=data": MEASURES,
    "python -m benchmarks.comparison mnist_mlp -j 2 --data_dir=data": MEASURES,
    "python -m benchmarks.comparison mnist_cnn -j 2 --data_dir=data": MEASURES,
    "python -m benchmarks.comparison cifar10_cnn -j 2 --data_dir=data": MEASURES,
    "python -m benchmarks.comparison stdlib_gpt -j 2"
    " --methods='constant_?,constant_??,constant_256,norm_eta1,steady,steady_knee*'": MEASURES,
    "python -m benchmarks.comparison mnist_published -j 2 --data_dir=data": MEASURES,
    "python -m benchmarks.comparison cifar10_resnet18 -j 1 --data_dir=data --accelerator=gpu": MEASURES,
    "python -m benchmarks.tables": "writes the pages: checks/test_benchmarks.py says that they would stay as they are",
    "python report.py benchmarks/results/comparison/mnist_logistic --target=0.92 --knee=30,300,3000": RUN,
    "python main.py --model=cnn --dataset=mnist": SHORT,
    "python main.py --dataset=mnist --model=cnn --optimizer=adagrad --test_type=ip --theta=0.5"
    " --max_samples=90000": SHORT,
    "python main.py --model=cnn --dataset=mnist --batch_size=16 --optimizer=adagrad --learning_rate=8e-3"
    " --decay_lr=False --eta=0.1 --max_samples=180000 --eval_interval=20 --max_micro_batch_size=256": SHORT,
    "python main.py --run_name=long --resume=auto": SHORT,
    "python main.py --devices=2 --accelerator=cpu": DEVICES,
    "fabric run main.py --devices=4 --model=resnet18 --dataset=cifar10 --eta=0.5": DEVICES,
    "torchrun --nproc_per_node=4 main.py --model=resnet18 --dataset=cifar10": DEVICES,
    "torchrun --nproc_per_node=2 main.py --test_type=ip+orth --config='{nu: 0.5}'": DEVICES,
    "fabric run main.py --devices=4 --model=gpt --dataset=stdlib --strategy=ddp": SHARDS,
    "fabric run main.py --devices=4 --model=gpt --dataset=stdlib --strategy=fsdp": SHARDS,
    "fabric run main.py --model=gpt --dataset=stdlib --devices=4 --strategy=fsdp --precision=bf16-mixed": SHARDS,
    "python main.py --model=gpt --dataset=stdlib --devices=2 --accelerator=cpu --strategy=fsdp": SHARDS,
    "torchrun --nnodes=1:4 --nproc_per_node=2 --max-restarts=100 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 main.py"
    " --run_name=long --resume=auto --checkpoint_minutes=2": "needs machines: checks/test_elastic.py has two agents",
    "python main.py --dataset=stdlib --model=gpt": "takes minutes: checks/test_text.py, on a small text",
    "python -m text.prepare book.txt more.txt --out_dir=data/books": TEXT,
    "python main.py --dataset=tokens --data_dir=data/books --model=gpt --dataset_args.sequence_length=128"
    " --model_args.layers=2": TEXT,
    "fabric run main.py --num-nodes=2 --node-rank=0 --main-address=HOST --devices=4 …": "needs two machines",
    "fabric run main.py --devices=4 --num_workers=12 --precision=bf16-mixed --optimizer=sgdm"
    " --data_dir=/data/imagenet-ffcv --batch_size=256 --max_test_micro_batch_size=64 --max_micro_batch_size=512"
    " --max_batch_size=111360 --max_samples=256233400 --warmup_samples=6405835 --lr_decay_samples=249827565"
    " --learning_rate=2.5e0 --min_lr=2.5e-1 --weight_decay=1e-4 --model=resnet101 --dataset=imagenet"
    " --test_type=norm --eta=1e-1": "needs ImageNet and GPUs",
    "srun python main.py --model=resnet50 --dataset=cifar100": SLURM,
    "srun --kill-on-bad-exit=1 python main.py … --resume=auto": SLURM,
    "./expt.sh": RUN,
    "./expt.sh cnn --devices=1": LONG,
    "./expt.sh resnet18": LONG,
    "./expt.sh cnn --eta=0.25": LONG,
    "./expt.sh cnn_large": LONG,
    "./expt.sh sweep cnn --eta=0.05,0.1,0.25 --seed=1,2,3": LONG,
    "./expt.sh sweep cnn --eta=0.05,0.1,0.25 --seed=1,2,3 --dry-run": RUN,
    "sbatch expt.sh cnn": SLURM,
    "sbatch --array=0-8 expt.sh sweep cnn --eta=0.05,0.1,0.25 --seed=1,2,3": SLURM,
    "sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 expt.sh resnet18 --out_dir=/shared/out": SLURM,
    "sbatch --array=1-5 --gpus=1 expt.sh resnet18": SLURM,
    "python report.py out/": RUN,
    "python report.py out/ --where model=cnn --where eta=0.1": RUN,
    "python report.py out/ --format=latex > table.tex": RUN,
    "python report.py out/ --target=0.98 --figures=figures/": RUN,
    "python report.py out/ --target=0.98 --knee=100,3000": RUN,
}
"""Every command of the pages: how it is run here, or why not."""
EXAMPLES = (
    "flowers:load",
    "photos:load",
    "houses:load",
    "llama:small",
    "BatchScaler(model, cross_entropy, optimizer, batch_size=16, max_batch_size",
    "BatchScaler(model, cross_entropy, optimizer, max_batch_size",
    "fully_shard(model)",
    "tests.NormTest(eta=0.1)(moments)",
    "class AdaptiveBatches(",
)
"""What tells the Python examples from each other; each is run below, or by test_library.py."""


def commands() -> set[str]:
    """Every command in the pages' blocks of bash, without its comment, on one line."""
    lines = "\n".join(block for language, block in FENCES if language == "bash").replace("\\\n", " ").splitlines()
    return {" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in lines} - {""}


def started(program: str, how: str = "") -> list[str]:
    return [command for command in COMMANDS if command.startswith(program) and COMMANDS[command].startswith(how)]


def test_every_command_is_run_or_listed():
    assert commands() == set(COMMANDS)
    run = started("python main.py", RUN) + started("python report.py", RUN) + started("./expt.sh", RUN)
    run += started("python -m benchmarks.comparison", RUN)
    assert sorted(run) == sorted(started("", RUN))
    assert {language for language, _ in FENCES} <= {
        "bash",
        "python",
        "bibtex",
        "text",
    }  # no command in a block that is not read


def test_every_example_is_run():
    found = [[marker for marker in EXAMPLES if marker in block] for block in BLOCKS]
    assert sorted(found) == sorted([marker] for marker in EXAMPLES)


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
        assert name in ("flowers.py", "photos.py", "houses.py", "llama.py") or any(
            (folder / name).exists() for folder in within
        ), name
    for module in re.findall(r"python -m\s+([\w.]+)", PAGES[page]):
        assert importlib.util.find_spec(module), module


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_make_knows_its_targets():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {command.split()[1] for command in started("make")} <= set(targets)


def test_tables_of_what_to_type():
    """ "You want … → you type …": the program knows every option in the second column, and its value."""
    cells = [
        re.findall(r"`([^`]+)`", cell)
        for page in PAGES.values()
        for table in re.findall(r"^\| you want \| you type \|\n\|[-|]+\n((?:\|.*\n)+)", page, re.M)
        for cell in re.findall(r"^\|.*?\| (.*) \|$", table, re.M)
    ]
    typed = [words for cell in cells for words in cell if "--" in words and "report.py" not in words]
    assert len(typed) > 15
    for words in typed:
        command_line.parse(of_the_program(words.removeprefix("python main.py").replace("…", "").split()))


def test_front_door_is_short():
    assert len(PAGES[ROOT / "README.md"].splitlines()) <= 220


def of_the_program(words: list[str]) -> list[str]:
    """The words that main.py reads: not those of `fabric run`, which have hyphens, and not what stands for more."""
    return [word for word in words if word != "…" and not re.match(r"--\w+-", word)]


def test_words_of_commands_that_are_not_run():
    for command in commands():
        if " main.py" in command and not command.startswith("python"):
            command_line.parse(of_the_program(shlex.split(command.partition(" main.py")[2])))


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
        if COMMANDS[command] == RUN:
            assert not done.calls and done.stdout
    assert all(
        len(grid) == 9 for command, grid in points.items() if " sweep " in command and "--dry-run" not in command
    )
    assert all(grid for command, grid in points.items() if COMMANDS[command] != RUN)
    assert folder("./expt.sh").stdout.count("\n") > 30
    names = {config.run_name for config in points["./expt.sh sweep cnn --eta=0.05,0.1,0.25 --seed=1,2,3"]}
    assert "cnn_eta0.1_seed2" in names


def test_training_and_its_reports(folder, tmp_path):
    for number, command in enumerate(started("python main.py", RUN)):
        more = COMMANDS[command].removeprefix(RUN) + ("" if "--run_name" in command else f" --run_name={number}")
        train(command, more)
        if "--resume" in command:  # "always the same command", also for a run that is to be longer now
            train(command, f"{more} --max_samples=96")
            assert json.loads((tmp_path / "out" / "long" / "summary.json").read_text())["samples"] >= 96
    for command in started("python report.py out/"):
        assert "cnn" in folder(command).stdout or ">" in command
    assert "tabular" in (tmp_path / "table.tex").read_text()
    assert (tmp_path / "figures" / "against_steps.pdf").exists()


def test_report_of_what_is_kept():
    (command,) = started("python report.py benchmarks", RUN)
    told = launch("bash", "-c", re.sub("^python", sys.executable, command), cwd=ROOT).stdout
    assert "steady" in told and "3000·steps" in told


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
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    folder(*started("python -m text.prepare"))
    short = "--max_samples=32 --accelerator=cpu --devices=1 --test_type=norm"
    train(*started("python main.py --dataset=tokens"), f"{short} --run_name=gpt")
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
