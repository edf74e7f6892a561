"""expt.sh: the experiments, overriding, sweeps. Where only its words to `fabric` matter, one that notes them runs."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from checks.conftest import ROOT, launch
from options import command_line

PUBLISHED = ["logistic", "cnn", "resnet18", "resnet50", "resnet50_cifar100", "resnet50_cifar100_ip", "resnet101"]
BASELINES = ("small", "large", "stagewise", "linear")
NOTE = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$NOTES"
for word; do case $word in --out_dir=*) out=${word#*=} ;; --run_name=*) name=${word#*=} ;; esac; done
[[ $* != *"$FAILS"* || -z $FAILS ]] || exit 3
mkdir -p "$out/$name" && echo '  "status": "finished",' >"$out/$name/summary.json"
"""


@pytest.fixture
def program(tmp_path):
    """A folder with expt.sh in it and a `fabric` that notes its words; gives a function that runs expt.sh there."""
    (tmp_path / "expt.sh").write_text((ROOT / "expt.sh").read_text())
    (tmp_path / "main.py").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "fabric").write_text(NOTE)
    (tmp_path / "bin" / "fabric").chmod(0o755)
    notes = tmp_path / "notes"

    def run(*words, fails="", **environment):
        notes.write_text("")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = launch("bash", str(tmp_path / "expt.sh"), *words, cwd=tmp_path, PATH=path, NOTES=str(notes), FAILS=fails,
                      **environment)  # fmt: skip
        done.calls = notes.read_text().splitlines()
        return done

    return run


def options_of(call):
    """The words after `fabric run main.py`, as main.py reads them (`--main-port` is the launcher's)."""
    assert call.startswith("run main.py ")
    words = re.split("(?<!:) ", call)[2:]  # "--config=nu: 1" is one
    return command_line.parse([word for word in words if not word.startswith("--main-port")])


def test_every_published_experiment_has_a_line_and_four_baselines(program):
    lines = [line.split(maxsplit=1) for line in program().stdout.splitlines() if line.startswith("  ")]
    about = dict(lines)
    assert about["resnet18"] == "ResNet-18 on CIFAR-10, norm test, η = 0.5"
    expected = [name for name in PUBLISHED] + [
        f"{name}_{baseline}" for name in PUBLISHED if name != "resnet50_cifar100_ip" for baseline in BASELINES
    ]
    assert sorted(about) == sorted(expected)


def test_published_numbers(program):
    options = {name: options_of(program(name).calls[0]) for name in PUBLISHED}
    get = {name: vars(value) for name, value in options.items()}
    published = {
        "logistic": {"devices": 1, "batch_size": 2, "learning_rate": 8e-3, "eta": 0.1, "max_samples": 6_000_000},
        "cnn": {"devices": 4, "batch_size": 8, "max_test_micro_batch_size": 15_000, "optimizer": "adagrad"},
        "resnet18": {"batch_size": 8, "eta": 0.5, "warmup_samples": 1_000_000, "min_lr": 5e-3, "dataset": "cifar10"},
        "resnet50": {"batch_size": 256, "eta": 0.25, "optimizer": "sgdm", "max_micro_batch_size": 100},
        "resnet50_cifar100": {"dataset": "cifar100", "eta": 0.25, "max_batch_size": 50_000},
        "resnet50_cifar100_ip": {"dataset": "cifar100", "test_type": "ip+orth", "theta": 0.5, "nu": 1.0},
        "resnet101": {"dataset": "imagenet", "max_batch_size": 111_360, "max_samples": 256_233_400, "eta": 0.1,
                      "weight_decay": 1e-4, "precision": "bf16-mixed", "num_workers": 12},
    }  # fmt: skip
    for name, values in published.items():
        assert {option: get[name][option] for option in values} == values, name
        assert options[name].test


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "resnet50_cifar100_ip"])
def test_baselines_differ_in_the_batch_size_alone(program, name):
    base = vars(options_of(program(name).calls[0]))
    batch = {"test", "batch_size", "max_batch_size", "stagewise_ramp_up", "global_batch_sizes", "linear_ramp_up",
             "linear_ramp_up_increment"}  # fmt: skip
    sizes = {}
    for baseline in BASELINES:
        options = vars(options_of(program(f"{name}_{baseline}").calls[0]))
        assert {key for key in base if base[key] != options[key]} <= batch and not options["test"]
        sizes[baseline] = options
    small, large = sizes["small"]["batch_size"], sizes["large"]["batch_size"]
    assert small < large
    assert [sizes["stagewise"]["global_batch_sizes"][i] for i in (0, -1)] == [small, large]
    linear = sizes["linear"]
    assert (linear["batch_size"], linear["max_batch_size"]) == (small, large)
    until_large = (large**2 - small**2) / (2 * linear["linear_ramp_up_increment"])  # samples on the ramp
    assert 0.1 < until_large / base["max_samples"] < 0.6


def test_further_options_override(program):
    (call,) = program("cnn", "--eta=0.3", "--data_dir=my data").calls
    assert call.endswith("--data_dir=my data") and "--eta=1e-1" in call and " --eta=0.3 " in call


def test_sweep_runs_the_grid_once(program):
    words = ["sweep", "cnn", "--eta=0.1,0.5", "--milestones=[4,6]", "--data_dir=/d/e f", "--seed=1,2", "--out_dir=o"]
    first = program(*words)
    assert first.returncode == 0, first.stderr
    points = [("0.1", "1"), ("0.1", "2"), ("0.5", "1"), ("0.5", "2")]
    assert len(first.calls) == 4
    for call, (eta, seed) in zip(first.calls, points):
        given = f" --eta={eta} --milestones=[4,6] --data_dir=/d/e f --seed={seed} --out_dir=o "
        assert call.endswith(f"{given}--run_name=cnn_eta{eta}_milestones[4,6]_seed{seed} --resume=auto")
    again = program(*words[:2], "--eta=0.1,0.5,0.7", *words[3:])
    assert again.returncode == 0 and len(again.calls) == 2 and all("--eta=0.7" in call for call in again.calls)
    assert again.stdout.count("finished") == 4


def test_sweep_goes_on_after_a_failure_and_lists_it(program, tmp_path):
    (tmp_path / "out" / "cnn_seed4").mkdir(parents=True)
    (tmp_path / "out" / "cnn_seed4" / "summary.json").write_text('{\n  "status": "diverged",\n}')
    done = program("sweep", "cnn", "--seed=1,2,3,4", fails="--seed=2")
    assert done.returncode == 1 and len(done.calls) == 3  # the diverged one would diverge again
    assert done.stderr.splitlines() == [
        "2 not finished:", "  out/cnn_seed2 (exit status 3)", "  out/cnn_seed4 (diverged)"
    ]  # fmt: skip


def test_slurm_array_tasks_take_a_point_each(program):
    words = ["sweep", "cnn", "--eta=0.1,0.5", "--seed=1,2"]
    (call,) = program(*words, SLURM_ARRAY_TASK_ID="2").calls
    assert call.endswith("--run_name=cnn_eta0.5_seed1 --resume=auto")
    beyond = program(*words, SLURM_ARRAY_TASK_ID="4")
    assert beyond.returncode == 2 and "no point 4" in beyond.stderr and not beyond.calls


def test_dry_run_lists_the_points(program, tmp_path):
    (tmp_path / "out" / "cnn_seed2").mkdir(parents=True)
    done = program("sweep", "cnn", "--seed=1,2", "--dry-run")
    assert not done.calls and done.returncode == 0
    assert done.stdout.splitlines() == ["  0  not started  out/cnn_seed1", "  1  unfinished   out/cnn_seed2"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["nothing"], "no experiment 'nothing'"),
        (["sweep"], "sweep needs the name of an experiment"),
        (["sweep", "nothing"], "not 'nothing'"),
        (["sweep", "cnn", "--seed", "1,2"], "'--seed': the options of a sweep are written --NAME=VALUE"),
        (["sweep", "cnn", "--run_name=x"], "--run_name"),
    ],
)
def test_refused(program, words, message):
    done = program(*words)
    assert done.returncode == 2 and message in done.stderr and not done.calls
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.long
def test_a_real_sweep(tmp_path, free_port):
    """Two points that train, one that is refused; the second time nothing is left to train."""
    words = [
        "sweep",
        "logistic",
        "--dataset=digits",
        "--max_batch_size=200",
        "--max_samples=200",
        "--batch_size=20,999",
    ]
    words += ["--accelerator=cpu", f"--main-port={free_port}", f"--out_dir={tmp_path}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = launch("bash", str(ROOT / "expt.sh"), *words, PATH=path)
    assert done.returncode == 1 and "--batch_size=999 is above --max_batch_size=200" in done.stderr
    (folder,) = tmp_path.iterdir()
    assert folder.name == "logistic_datasetdigits_max_batch_size200_max_samples200_batch_size20_acceleratorcpu"
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    again = launch("bash", str(ROOT / "expt.sh"), *words[:5], "--batch_size=20", *words[6:], PATH=path)
    assert again.returncode == 0 and "finished" in again.stdout and "step" not in again.stdout
