"""Whole training steps on a fake accelerator: tensors are where they belong, and the host seldom waits."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import TensorDataset

import main
from adadagrad import gradients
from checks.fake_gpu import DEVICE, fake_gpu
from data import DataSet, next_token_loss
from launch.signals import Interrupts
from options.schema import Config


def _split(count: int, *shape: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    return TensorDataset(images, torch.randint(10, (count,), generator=generator))


# Real numbers: made before anything is fake
DIGITS, PHOTOS, LARGE_PHOTOS = (
    DataSet(_split(300, *shape), _split(100, *shape), num_classes=10)
    for shape in ((1, 8, 8), (3, 32, 32), (3, 224, 224))
)


def digits(data_dir: Path) -> DataSet:
    return DIGITS


def photos(data_dir: Path) -> DataSet:
    return PHOTOS


def cropped_photos(data_dir: Path) -> DataSet:
    return replace(PHOTOS, crop_and_flip=True)


def large_photos(data_dir: Path) -> DataSet:
    return LARGE_PHOTOS


class Gathered(torch.utils.data.Dataset):
    """Tokens that the host gathers."""

    def __len__(self) -> int:
        return 300

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)

    def gather(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert indices.device.type == "cpu"
        return (torch.zeros(len(indices), 8, dtype=torch.int64),) * 2


TEXT = DataSet(Gathered(), Gathered(), loss=next_token_loss, num_outputs=50)


def text(data_dir: Path) -> DataSet:
    return TEXT


def resnet18_group_norm(image_shape, num_classes) -> nn.Module:
    return torchvision.models.resnet18(num_classes=num_classes, norm_layer=partial(nn.GroupNorm, 32))


def vit_b_16(image_shape, num_classes) -> nn.Module:
    """Two of its twelve blocks."""
    sizes = {"image_size": 224, "patch_size": 16, "hidden_dim": 768, "mlp_dim": 3072, "num_heads": 12}
    return torchvision.models.VisionTransformer(num_layers=2, num_classes=num_classes, **sizes)


def unchecked(name, *arguments, probe, autocast, in_training_pass, num_groups=8, notify, recheck=False, cuts=False):
    """As `gradients.build`, without the check at the start: it compares numbers, and there are none."""
    arguments = (*arguments, autocast)
    if name == "micro_batch":
        return gradients.MicroBatchGradients(*arguments, num_groups=num_groups), []
    if name == "vmap":
        return gradients.PerSampleGradients(*arguments, notify=notify), []
    return gradients.GhostNorms(*arguments, in_training_pass=in_training_pass, notify=notify), []


def trainer(fabric, out_dir: Path, **options) -> main.Trainer:
    defaults = {
        "dataset": "checks.test_fake_gpu:digits",
        "model": "cnn",
        "max_batch_size": 200,
        "max_micro_batch_size": 200,
        "out_dir": out_dir,
        "run_name": "run",
    }
    with mock.patch.object(gradients, "build", unchecked):
        return main.Trainer(fabric, Config(**{**defaults, **options}), Interrupts())


OPTIMIZERS = ("adagrad", "adagradnorm", "adam", "adamw", "sgd", "sgdm")
ESTIMATORS = [(name, test_type) for name in ("vmap", "ghost", "micro_batch") for test_type in ("norm", "ip+orth")]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_steps_on_the_device(tmp_path, optimizer):
    """Its state is where the parameters are, also where it is made before the first step, and after a resume."""
    with fake_gpu() as (fabric, _):
        run = trainer(fabric, tmp_path, optimizer=optimizer, test=False, grad_clip=1.0)
        for _ in range(2):
            run.step()
        run.state.save()
        run.state.restore(run.state.checkpoints.path(2))
        run.step()


@pytest.mark.parametrize("test_gradients, test_type", ESTIMATORS)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_waits_of_a_step(tmp_path, test_gradients, test_type, micro_batches):
    """The host's waits for the device, by line. May only fall."""
    options = {"test_gradients": test_gradients, "test_type": test_type, "grad_clip": "auto", "weight_average": 0.05}
    with fake_gpu() as (fabric, watch):
        run = trainer(fabric, tmp_path, gradient_accumulation_steps=micro_batches, batch_size=24, **options)
        run.step()
        watch.forget()
        run.step()
        waits = watch.waits + watch.trailing
        assert waits.total() <= 1, waits
        watch.forget()
        run.train_step(run.parts.plan(run.controller, measured=False), measured=False)
        assert not watch.waits


@pytest.mark.parametrize(
    "dataset, model, test_gradients, test_type, most",
    [
        ("photos", "resnet18_group_norm", "ghost", "norm", 3),
        ("large_photos", "vit_b_16", "ghost", "norm", 2),
        pytest.param("photos", "resnet18_group_norm", "micro_batch", "ip+orth", 1.15, marks=pytest.mark.long),
    ],
)
def test_kernels_of_a_step(tmp_path, dataset, model, test_gradients, test_type, most):
    """Of a tested step over a plain one; every small kernel costs a GPU the same. May only fall."""
    options = {"dataset": f"checks.test_fake_gpu:{dataset}", "model": f"checks.test_fake_gpu:{model}"}
    options |= {"test_gradients": test_gradients, "test_type": test_type, "ramp_up_type": "test", "batch_size": 16}
    if test_gradients == "micro_batch":
        options["gradient_accumulation_steps"] = 8
    with fake_gpu() as (fabric, watch):
        run = trainer(fabric, tmp_path, **options)
        run.step()
        counts = []
        for measured in (False, True):
            watch.forget()
            with mock.patch.object(
                run.parts.optimizer, "step"
            ):  # on CUDA a few kernels for all parameters, here for each
                run.train_step(run.parts.plan(run.controller, measured), measured)
            counts.append(watch.kernels.total())
        assert counts[1] <= most * counts[0], (counts, watch.kernels.most_common(20))


@pytest.mark.parametrize("test_type, most", [("norm", 1.15), pytest.param("ip+orth", 1.3, marks=pytest.mark.long)])
def test_memory_of_a_step(tmp_path, test_type, most):
    """The peak of a tested step of four micro-batches over that of a plain one; the bounds are the promise."""
    options = {"dataset": "checks.test_fake_gpu:photos", "model": "benchmarks.cases:resnet18_group_norm"}
    options |= {"batch_size": 128, "max_micro_batch_size": 32, "optimizer": "sgd", "test_type": test_type}
    with fake_gpu() as (fabric, watch):
        run = trainer(fabric, tmp_path, test_gradients="ghost", ramp_up_type="test", **options)
        run.step()
        peaks = []
        for measured in (False, True):
            watch.forget()
            run.train_step(run.parts.plan(run.controller, measured), measured)
            peaks.append(watch.most_bytes)
        assert peaks[1] <= most * peaks[0], peaks


def test_the_tuner_leaves_room_for_the_optimizer(tmp_path):
    """Adam's moments come with the first step: what fits in a pass of the tuner must fit beside them, too."""
    peaks = {}
    for optimizer in ("sgd", "adamw"):
        with fake_gpu() as (fabric, watch):
            run = trainer(fabric, tmp_path, optimizer=optimizer, test=False, run_name=optimizer)
            peaks[optimizer] = watch.most_bytes
            parameters = sum(p.numel() * p.element_size() for p in run.parts.module.parameters())
    assert peaks["adamw"] - peaks["sgd"] == pytest.approx(2 * parameters, rel=1e-3)


@pytest.mark.parametrize(
    "model, memory_format", [("cnn", torch.channels_last), ("checks.test_fake_gpu:resnet18_group_norm", None)]
)
def test_images_lie_in_memory_as_the_weights_do(tmp_path, model, memory_format):
    """In training, with crops and flips or without, and in evaluation."""
    expected = memory_format or torch.contiguous_format
    for dataset in ("photos", "cropped_photos"):
        with fake_gpu() as (fabric, _):
            options = {"model": model, "dataset": f"checks.test_fake_gpu:{dataset}", "run_name": dataset}
            run = trainer(fabric, tmp_path, test=False, **options)
            weights = [p for p in run.parts.module.parameters() if p.dim() == 4]
            images = [run.parts.stream.read(range(8))[0], next(run.parts.stream.validation(0, 1, 8))[0]]
            assert weights and all(t.is_contiguous(memory_format=expected) for t in (*weights, *images))
            run.step()
            assert all(
                state["exp_avg"].is_contiguous(memory_format=expected)
                for parameter, state in run.parts.optimizer.state.items()
                if parameter.dim() == 4
            )


def test_bytes_are_counted():
    with fake_gpu() as (_, watch):
        before = watch.bytes
        x = torch.ones(1000, device=DEVICE)
        y = x.view(10, 100) * 2
        assert watch.bytes == before + 8000
        del x
        assert watch.bytes == before + 4000 and watch.most_bytes == before + 8000
        del y
        assert watch.bytes == before


def test_waits_of_evaluation_and_row(tmp_path):
    """A row is written when the device is busy with the next step; an evaluation reads its results at its end."""
    with fake_gpu() as (fabric, watch):
        run = trainer(fabric, tmp_path, test=False, max_micro_batch_size=16)
        run.log_step(run.step(), {})
        watch.forget()
        row = run.step()
        assert not watch.waits and not watch.trailing
        run.log_step(row, {})
        assert not watch.waits and watch.trailing
        watch.forget()
        run.evaluate()
        assert watch.waits.total() <= 2, watch.waits


def test_text_does_not_wait(tmp_path):
    """Its tokens are gathered by the host, by numbers that the host knows."""
    with fake_gpu() as (fabric, watch):
        text = {"dataset": "checks.test_fake_gpu:text", "model": "gpt", "model_args": {"layers": 1, "width": 16}}
        run = trainer(fabric, tmp_path, test=False, batch_size=24, gradient_accumulation_steps=3, **text)
        run.step()
        watch.forget()
        run.step()
        assert not watch.waits and not watch.trailing


def test_a_tensor_left_on_the_host_is_found():
    with fake_gpu() as (_, watch), pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=DEVICE) + torch.ones(3)


def test_waits_are_seen():
    """What waits on CUDA, and what does not."""
    with fake_gpu() as (_, watch):
        x = torch.ones(3, device=DEVICE)
        waits = [x.sum().item, x.tolist, x.cpu, lambda: bool(x.any()), lambda: torch.tensor(1.0, device=DEVICE)]
        for i, wait in enumerate(waits, start=1):
            wait()
            assert watch.waits.total() == i
        torch.ones(3).to(DEVICE, non_blocking=True)
        x.to("cpu", non_blocking=True)
        x[x.long()] * 2
        assert watch.waits.total() == len(waits)
        for unknown_size in (x.nonzero, lambda: x[x > 0], lambda: x.repeat_interleave(x.long())):
            with pytest.raises(RuntimeError):
                unknown_size()
