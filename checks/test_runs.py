"""Whole runs, as a user starts them: what they leave behind, how they are launched, how they end."""

import functools
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from checks.conftest import FIXED_CUT, ROOT, column, forks, launch, run, train
from checks.test_data import write_cifar10
from checks.test_options import PUBLISHED
from launch import processes
from launch.signals import Interrupts
from options.errors import UsageError
from options.schema import Config

BIN = Path(sys.executable).parent
TINY = ["--accelerator=cpu", "--max_samples=300", "--batch_size=32", "--run_name=run", FIXED_CUT]


def test_quickstart(tmp_path):
    """`python main.py`: 96 %, a batch that grows towards what is the quickest here, and a whole run folder."""
    done = launch(sys.executable, "main.py", f"--out_dir={tmp_path}", "--run_name=run")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["val_accuracy"] >= 0.96
    if summary["quickest_batch_size"] > 64:  # beside other work the measured knee may be a small one, and changes
        assert summary["final_batch_size"] >= 2 * 16
    expected = (
        "val_loss best_val_accuracy best_val_loss steps samples mean_batch_size peak_memory_bytes world_size versions"
    )
    assert set(expected.split()) <= set(summary)
    assert (folder / "curves.png").stat().st_size > 20_000
    assert summary["evaluated_weights"] == "model_average.pt" and (folder / "model_average.pt").exists()
    for words in ("validation accuracy", "mean", "final", "model_average.pt, their average", str(folder)):
        assert words in done.stdout
    assert "\r" not in done.stdout + done.stderr  # plain lines in a log file
    events = EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "sample/train/loss",
        "step/train/loss",
        "sample/val/accuracy",
        "step/batch_size",
        "sample/var_one_norm",
    } <= tags
    assert len(events.Scalars("step/train/loss")) == summary["steps"]
    again = run(f"--config={folder / 'config.yaml'}", f"--out_dir={tmp_path}")
    assert again.returncode == 2 and "exists already" in again.stderr  # the file is a whole set of options


FABRIC_OPTIONS = ["--devices=2", "--precision=bf16-mixed"]
NU = ["--test_type=ip+orth", "--config={nu: 0.5}"]
LAUNCHERS = {  # PORT: one of their own, as the tests run beside each other
    "python": [sys.executable, "main.py", "--devices=2", *TINY],
    "fabric": [BIN / "fabric", "run", "main.py", "--main-port=PORT", *FABRIC_OPTIONS, *NU, *TINY],
    "torchrun": [BIN / "torchrun", "--master_port=PORT", "--nproc_per_node=2", "main.py", *NU, *TINY],
}


@pytest.mark.parametrize(
    "launcher", ["fabric", *(pytest.param(own, marks=pytest.mark.long) for own in ("python", "torchrun"))]
)
def test_launchers(tmp_path, launcher, free_port):
    """The options as Fabric really used them, whoever read them; --nu, which launchers refuse, in YAML."""
    command = [str(word).replace("PORT", str(free_port)) for word in LAUNCHERS[launcher]] + [f"--out_dir={tmp_path}"]
    done = launch(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    options = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert options["devices"] == summary["world_size"] == 2 and options["accelerator"] == "cpu"
    assert options["strategy"] == "ddp" and options["nu"] == (1 if launcher == "python" else 0.5)
    assert options["precision"] == ("bf16-mixed" if launcher == "fabric" else "32-true")
    assert done.stdout.count("\nfinished") == 1


@pytest.mark.long
def test_fabric_run_shares_the_cores(tmp_path, free_port, monkeypatch):
    """The launcher itself gives each process as many threads as there are cores; a user's own choice stays."""
    (tmp_path / "counted.py").write_text(
        "import models, os, pathlib, torch\n"
        "def Net(*of):\n"
        "    file = pathlib.Path(__file__).with_name('threads' + os.environ['LOCAL_RANK'])\n"
        "    file.write_text(str(torch.get_num_threads()))\n"
        "    return models.build('logistic', *of)\n"
    )
    cores = len(os.sched_getaffinity(0))
    command = [BIN / "fabric", "run", "main.py", f"--main-port={free_port}", "--devices=2", *TINY]
    command += ["--model=counted:Net", f"--out_dir={tmp_path}"]
    done = launch(*command, OMP_NUM_THREADS=str(cores), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(tmp_path / f"threads{rank}").read_text() for rank in (0, 1)] == [str(max(1, cores // 2))] * 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    processes.share_cores()
    assert torch.get_num_threads() == 1  # chosen in conftest.py


class WithUnused(torch.nn.Linear):
    def __init__(self, image_shape, num_classes):
        super().__init__(math.prod(image_shape), num_classes)
        self.unused = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return super().forward(x.flatten(1))


def test_unused_parameters(tmp_path):
    options = ["--model=checks.test_runs:WithUnused", "--max_samples=100", "--test_type=ip+orth"]
    train(tmp_path, *options, "--strategy=ddp_find_unused_parameters_true", processes=2)
    train(tmp_path, *options, name="alone")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--batch_size=1", "--test=False"], "cannot be shared by 2 devices"),
        (["--dataset=mnist", "--data_dir=/nowhere/at/all"], "no usable copy of mnist"),
        (["--model=checks.test_runs:WithUnused"], "add --strategy=ddp_find_unused_parameters_true"),
    ],
)
def test_refused_once_on_two_ranks(tmp_path, options, words):
    done = run(f"--out_dir={tmp_path}", *options, processes=2)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and words in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, words",
    [
        (["--model=alexnet"], "does not work on images"),
        (["--accelerator=gpu"], "--accelerator=gpu"),
        (["--out_dir=/proc/nowhere"], "--out_dir=/proc/nowhere cannot be written"),
        (
            [
                *("--test=False", "--stagewise_ramp_up=True", "--global_batch_sizes=[8,16]"),
                *("--samples_stages=[50%,50%]", "--training_type=iter"),
            ],
            "--samples_stages: shares such as 25% are of max_samples, and --training_type=iter ends by steps",
        ),
        (["--validation_samples=9999"], "samples for validation: lower it, or leave it out to take all"),
    ],
)
def test_refused_in_one_line(tmp_path, options, words):
    done = run(f"--out_dir={tmp_path}", *options, clocks={"launch.processes.LONG": 60.0})
    assert done.returncode == 2 and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_more_devices_than_a_task_sees(monkeypatch):
    """As under `srun --gpus-per-task=1`: Fabric's own error is none of the usual kinds."""
    monkeypatch.setattr("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: 1)
    monkeypatch.setattr("lightning.fabric.utilities.device_parser._get_all_available_gpus", lambda **_: [0])
    for variable in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(variable, "2")
    monkeypatch.setattr(processes, "launcher", lambda: "srun")
    config = Config(accelerator="cuda")
    with pytest.raises(UsageError, match="--gpus-per-node, not --gpus-per-task .*machine only has"):
        processes.start_fabric(config)


def test_an_evaluation_takes_as_many_samples_as_it_is_told(tmp_path):
    part = [*TINY, "--devices=1", f"--out_dir={tmp_path}", "--model=logistic", "--validation_samples=53"]
    assert main.main(part) == 0
    right = 53 * json.loads((tmp_path / "run" / "summary.json").read_text())["val_accuracy"]
    assert right == pytest.approx(round(right), abs=1e-4) and round(right) > 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["validation_samples"] == 53


def test_divergence(tmp_path):
    options = ["--optimizer=sgd", "--learning_rate=1e30", "--decay_lr=False", "--test=False", "--log_interval=7"]
    options += [FIXED_CUT]
    done = run(f"--out_dir={tmp_path}", "--run_name=run", *options)
    assert done.returncode == 3 and "not finite at step" in done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"


def test_divergence_with_clipping(tmp_path, capsys):
    """A gradient that is not finite shows in the next loss; clipping it is no error of its own."""
    options = ["--optimizer=sgd", "--learning_rate=1e38", "--decay_lr=False", "--grad_clip=1e30", "--test=False"]
    assert main.main([*TINY, "--devices=1", f"--out_dir={tmp_path}", *options]) == 3
    assert "not finite at step" in capsys.readouterr().out


def test_half_precision_with_clipping(tmp_path):
    """The scaler begins with a factor that is too large, as it does by design: the step is skipped, the next is not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-50)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    config = Config(model="logistic", optimizer="sgd", grad_clip=1.0, test=False, out_dir=tmp_path, run_name="run")
    trainer = main.Trainer(fabric, config, Interrupts())
    weights = [next(trainer.parts.module.parameters()).clone()]
    for _ in range(2):
        trainer.step()
        weights.append(next(trainer.parts.module.parameters()).clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def in_half_precision(folder: Path, scale: float) -> main.Trainer:
    """Eight steps of Adam, its state following batches of 16, then 64, by a scaler that begins with this factor."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-50, growth_interval=10**6)
    plugins = MixedPrecision("16-mixed", "cpu", scaler) if scale else None
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins or ())
    stages = {"stagewise_ramp_up": True, "global_batch_sizes": [16, 64], "samples_stages": [16, 984]}
    follows = {"test": False, "lr_scaling": "critical", "coupling": "full", "monitor_interval": 1, "beta2": 0.99}
    config = Config(
        model="cnn",
        max_micro_batch_size=64,
        learning_rate=1e-6,
        decay_lr=False,
        **stages,
        **follows,
        out_dir=folder,
        run_name=f"{scale}",
    )
    trainer = main.Trainer(fabric, config, Interrupts())
    for _ in range(8):
        trainer.step()
    return trainer


def test_half_precision_where_the_optimizer_follows_the_batch(tmp_path):
    """Adam's squares are of gradients without the scaler's factor; a step that it skips first hurts none."""
    plain, scaled, skipped = (in_half_precision(tmp_path, scale) for scale in (0, 2.0**10, 2.0**60))
    groups = [trainer.parts.optimizer.param_groups[0] for trainer in (plain, scaled, skipped)]
    assert all(group["betas"] == (0.9, 0.99**4) for group in groups)
    assert [group["eps"] for group in groups] == [5e-9, 5e-9, 1e-8]  # of a skipped step nothing is known
    for own, other in zip(scaled.parts.parameters, plain.parts.parameters):
        ours, theirs = scaled.parts.optimizer.state[own], plain.parts.optimizer.state[other]
        for name in ("exp_avg", "exp_avg_sq"):
            assert (ours[name] - theirs[name]).norm() < 0.05 * theirs[name].norm(), name
    for own in skipped.parts.parameters:
        state = skipped.parts.optimizer.state[own]
        assert 0 < state["step"] < 8 and torch.isfinite(state["exp_avg_sq"]).all() and torch.isfinite(own).all()


def test_ramp_ups_accumulation_and_clipping(tmp_path):
    common = ["--test=False", "--max_samples=400", "--decay_lr=False", "--optimizer=sgd"]
    stages = ["--stagewise_ramp_up=True", "--global_batch_sizes=[20,40,80]"]
    staged = train(tmp_path, *common, *stages, "--max_micro_batch_size=30", name="staged")
    assert column(staged, "batch_size") == [20.0] * 7 + [40.0] * 4 + [80.0] * 2
    assert set(column(staged, "micro_batch_size")) == {20.0, 30.0}  # 20, 30 + 10, 30 + 30 + 20
    linear = train(tmp_path, *common, "--linear_ramp_up=True", "--linear_ramp_up_increment=50", "--grad_clip=1e-9",
                   name="linear")  # fmt: skip
    assert column(linear, "batch_size") == [16.0, 66.0, 116.0, 166.0, 216.0]
    assert column(linear, "val_loss")[0] == pytest.approx(2.3, abs=0.2)  # clipped to nothing: nothing is learnt


@pytest.mark.long
def test_batch_norm_network_on_tiny_images(tmp_path):
    """1×1 maps: micro_batch cuts the batch no smaller than BatchNorm can bear; a batch too small is refused."""
    options = ["--model=resnet18", "--test_gradients=micro_batch", "--batch_size=10", "--max_samples=30"]
    result = train(tmp_path, *options, "--test_type=ip", "--max_batch_size=12", processes=2)
    assert column(result, "gradient_accumulation_steps")[0] == 2 and column(result, "variance_inner_product")[0] > 0
    done = run(f"--out_dir={tmp_path}", "--model=resnet18", "--batch_size=2", processes=2)
    assert done.returncode == 2 and "BatchNorm on 1×1 maps" in done.stderr


@pytest.mark.long
def test_published_cifar_command(tmp_path, monkeypatch, capsys):
    """ResNet-18 on CIFAR-10 as published, on one process, twenty samples in the official files."""
    write_cifar10(tmp_path / "data", monkeypatch)
    options = f"{PUBLISHED['resnet18']} --max_samples=20 --accelerator=cpu --devices=1 --run_name=run"
    status = main.main([*options.split(), f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}"])
    told = capsys.readouterr().out
    assert status == 0 and "micro_batch is the accurate choice" in told
    assert "variance" in (tmp_path / "out" / "run" / "metrics.csv").read_text()


def test_experiments():
    listing = launch("bash", str(ROOT / "expt.sh")).stdout
    assert "ResNet-18 on CIFAR-10, norm test, η = 0.5" in listing
    unknown = launch("bash", str(ROOT / "expt.sh"), "nothing")
    assert unknown.returncode == 2 and "no experiment 'nothing'" in unknown.stderr


@pytest.mark.parametrize("model", ["logistic", "cnn"])
@pytest.mark.parametrize("test_type", ["norm", "ip", "ip+orth"])
def test_mnist(mnist_dir, tmp_path, model, test_type):
    options = ["--dataset=mnist", f"--data_dir={mnist_dir}", f"--model={model}", f"--test_type={test_type}"]
    options += ["--max_samples=60000", "--learning_rate=0.003", "--eta=1", "--theta=1", "--nu=1.5", "--batch_size=32"]
    result = train(tmp_path, *options, processes=2)
    accuracy = result.summary["val_accuracy"]
    assert accuracy > (0.88 if model == "logistic" else 0.95)
    assert result.summary["world_size"] == 2 and result.summary["samples"] >= 60_000


def compiled_run(tmp_path, *options) -> int:
    """Graphs that a run with some fifty different batch sizes compiles."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    common = ["--accelerator=cpu", "--devices=1", "--compile=True", "--test=False", "--linear_ramp_up=True"]
    ramp = ["--batch_size=2", "--linear_ramp_up_increment=1", "--max_samples=1400", "--max_micro_batch_size=40"]
    assert main.main([*common, *ramp, f"--out_dir={tmp_path}", "--run_name=run", *options]) == 0
    torch._dynamo.reset()
    assert not counters["recompile_limit"] and not counters["unimplemented"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.long
def test_compiled_with_changing_batch_sizes(tmp_path):
    """At most a graph for the first size and one for all others, in training and in evaluation."""
    assert 1 <= compiled_run(tmp_path, "--model=logistic") <= 4


def test_graphs_of_a_cnn_with_changing_batch_sizes(tmp_path, monkeypatch):
    """The same of convolutions; graphs are captured, but run as they are (compiling them takes a minute)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert 1 <= compiled_run(tmp_path, "--model=cnn") <= 4


class KnowsItsBatchSize(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(700, 700) for _ in range(4))

    def forward(self, x):
        n = x.shape[0]
        for layer in self.layers:
            x = layer(x).view(n, 7, 100).transpose(1, 2).reshape(n, 700) * (n / (n + 1))
        return x


def compiled_over_several_buckets(rank: int, port: int) -> None:
    processes.set_up_devices(Config(compile=True))
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=1)
    compiled = torch.compile(KnowsItsBatchSize(), backend="aot_eager")
    model = torch.nn.parallel.DistributedDataParallel(compiled, bucket_cap_mb=1)
    for n in (4, 6, 9):
        model(torch.randn(n, 700)).sum().backward()
    torch.distributed.destroy_process_group()


def test_compiled_over_several_buckets(free_port):
    """Where DDP cuts the graph by its buckets, a forward pass that computes with the batch size ends in a traceback."""
    forks()
    torch.multiprocessing.start_processes(
        compiled_over_several_buckets, (free_port,), nprocs=1, start_method="forkserver"
    )
