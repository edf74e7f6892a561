"""The examples of README.md, taken from there word for word."""

import json
import re

import numpy as np
import torch
from PIL import Image

import gradients
import main
import tests
from checks.conftest import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


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
    options = re.search(r"python main.py (.*)", example)[1].replace("FOLDER", str(tmp_path)).split()
    assert main.main([*options, "--accelerator=cpu", "--devices=1", f"--out_dir={tmp_path}", "--run_name=run"]) == 0
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
    options = re.search(r"python main.py (.*)", example)[1].replace("FOLDER", str(tmp_path)).split()
    options += ["--model=logistic", "--max_samples=300", f"--out_dir={tmp_path}", "--run_name=run"]
    assert main.main([*options, "--accelerator=cpu", "--devices=1"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["val_accuracy"] == 1.0


def test_plain_loop():
    lines = next(block for block in BLOCKS if "gradients.moments" in block)
    torch.manual_seed(0)
    names = {"model": torch.nn.Linear(5, 3), "inputs": torch.randn(12, 5), "targets": torch.arange(12) % 3}
    names |= {"torch": torch, "gradients": gradients, "tests": tests}
    exec(lines, names)
    assert names["batch_size"] == names["decision"].next_batch_size > 12
