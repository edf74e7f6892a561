"""The controller in loops that are not this program's: the same decisions as main.py on the same samples."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import data
import models
from adadagrad import control, gradients
from batches.augment import Normalise
from batches.order import SampleOrder
from checks.conftest import column, forks, train
from tests import NormTest

STEPS, B0, SEED, RATE = 30, 16, 7, 0.05


def new_controller() -> control.Controller:
    return control.Controller(
        B0,
        NormTest(eta=1.0),
        limits=control.Limits(1437, max_growth=2.0),
        unbiased=True,
        smoothing=300,
        scaling=control.LearningRateScaling("adascale", B0),
    )


OPTIONS = [
    "--precision=64-true", "--training_type=iter", f"--max_iters={STEPS}", f"--seed={SEED}", "--model=logistic",
    "--optimizer=sgd", f"--learning_rate={RATE}", "--decay_lr=False", "--eta=1", "--statistics=unbiased",
    "--smoothing=300", "--lr_scaling=adascale", "--max_growth=2", "--max_micro_batch_size=256",
]  # fmt: skip


class Samples:
    """The digits in the order in which a run with this seed sees them, normalised, in double precision."""

    def __init__(self):
        data_set = data.digits(Path())
        self.images, self.labels = data_set.train.tensors
        self.order = SampleOrder(len(self.images), SEED, True)
        self.normalise = Normalise(data_set, torch.device("cpu"), torch.float64)

    def __call__(self, positions: range) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = self.order.samples(positions)
        return self.normalise(self.images[chosen]), self.labels[chosen]


def seeded_model() -> torch.nn.Module:
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # weights are drawn in it
    try:
        return models.build("logistic", (1, 8, 8), 10)
    finally:
        torch.set_default_dtype(before)


def ddp_loop(rank: int, world_size: int, port: int, queue) -> None:
    """Plain PyTorch: DistributedDataParallel, torch's SGD, no Fabric."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    samples, model, controller = Samples(), seeded_model(), new_controller()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    probe = samples(range(gradients.PROBE))
    estimator, _ = gradients.build("auto", model, cross_entropy, False, 256, probe, in_training_pass=True)
    start, said = 0, []
    for _ in range(STEPS):
        b = controller.batch_size
        for group in optimizer.param_groups:
            group["lr"] = RATE * controller.lr_factor
        inputs, targets = samples(range(start + (rank - start) % world_size, start + b, world_size))
        optimizer.zero_grad()
        with estimator.observe(inputs, targets, world_size / b):
            (cross_entropy(wrapped(inputs), targets, reduction="sum") * world_size / b).backward()
        moments = estimator.moments()
        said.append((b, optimizer.param_groups[0]["lr"]))
        optimizer.step()
        controller.update(moments)
        start += b
    queue.put((rank, said))
    torch.distributed.destroy_process_group()


def test_a_plain_ddp_loop_decides_as_main_does(tmp_path, free_port):
    ours = train(tmp_path, *OPTIONS)
    sizes, rates = column(ours, "batch_size"), column(ours, "lr")
    assert len(sizes) == STEPS and sizes[-1] >= 4 * B0 and max(rates) > 1.5 * RATE
    context = forks()
    queue = context.Queue()
    ranks = [context.Process(target=ddp_loop, args=(rank, 2, free_port, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    for _, said in [queue.get(timeout=120) for _ in ranks]:
        assert [b for b, _ in said] == sizes
        assert [rate for _, rate in said] == pytest.approx(rates, rel=1e-9)
    for process in ranks:
        process.join(60)


def test_a_callback_of_lightnings_trainer_decides_as_main_does(tmp_path):
    """By gradient accumulation: every batch is a number of equal micro-batches, which the trainer adds up."""
    import lightning.pytorch as pl

    from checks.test_readme import BLOCKS  # the callback is the one of docs/extending.md

    names: dict = {}
    exec(next(block for block in BLOCKS if "class AdaptiveBatches" in block), names)
    piece = 8
    samples, model = Samples(), seeded_model()
    micro_batches = [samples(range(start, start + piece)) for start in range(0, 1437 - piece, piece)]

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=RATE)

    controller = new_controller()
    controller.limits = control.Limits(1437, max_growth=2.0, multiple=piece)
    callback = names["AdaptiveBatches"](controller, piece, cross_entropy)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, precision="64-true", callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(micro_batches, batch_size=None))
    *whole, _ = callback.history  # the last batch ends with the epoch
    taken = [size for size, _ in whole]
    options = [*OPTIONS, f"--batch_size_multiple={piece}", f"--max_iters={len(taken)}"]
    ours = train(tmp_path, *options)
    assert len(taken) > 8 and taken[-1] > B0
    assert taken == column(ours, "batch_size")
    assert [rate for _, rate in whole] == pytest.approx(column(ours, "lr"), rel=1e-9)
    assert not any(math.isnan(float(p.sum())) for p in model.parameters())
