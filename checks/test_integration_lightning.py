"""Lightning's Trainer: on two processes it decides as main.py does on the same samples, both have equal weights
whatever the batch has done, under FSDP2, too, and where it does not change the loss is the plain Trainer's.
"""

import functools
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from adadagrad import Constant, Controller, LearningRateScaling, Limits, NormTest
from checks.test_library import B0, RATE, example, same, seeded_model
from checks.trainers import PIECE, controller, decisions_of_main, digits, same_on_both, two_processes, weights

pytestmark = pytest.mark.xdist_group("lightning")  # what the fixtures have found serves several tests


@pytest.fixture(scope="module")
def of_main() -> list[tuple[float, float]]:
    return decisions_of_main()


def lightning_module():
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = seeded_model()

        def training_step(self, batch, _):
            loss = cross_entropy(self.model(batch[0]), batch[1])
            self.losses = [*getattr(self, "losses", []), float(loss)]
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=RATE)

    return Module()


def in_lightning(rank: int, folder: Path, samples: int) -> dict:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import ModelParallelStrategy

    from adadagrad.integrations.lightning import AdaptiveBatchSize

    own = PIECE // 2

    def loader(first: int, last: int):
        pieces = [digits()(range(start, start + PIECE)) for start in range(first, last, PIECE)]
        return DataLoader([tuple(rows[rank * own :][:own] for rows in piece) for piece in pieces], batch_size=None)

    class Steps(pl.Callback):
        """Batch size and learning rate of every step."""

        def on_train_start(self, trainer, module):
            self.seen, self.steps = [], trainer.global_step

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.rate = optimizer.param_groups[0]["lr"]

        def on_train_batch_end(self, trainer, module, *_):
            if "batch_size" in trainer.callback_metrics and trainer.global_step > self.steps:
                self.seen.append((float(trainer.callback_metrics["batch_size"]), self.rate))
                self.steps = trainer.global_step

    def fitted(module, data, callbacks, strategy="ddp", ckpt_path=None, **more):
        steps = Steps()
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy=strategy, callbacks=[*callbacks, steps],
            use_distributed_sampler=False, logger=False, enable_progress_bar=False, enable_model_summary=False,
            **{"precision": "64-true", "enable_checkpointing": False, "max_epochs": 1} | more,
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return trainer, steps.seen

    def adaptive(by: Controller, **more):
        return AdaptiveBatchSize(cross_entropy, controller=by, measure_interval=1, **more)

    found, module = {}, lightning_module()
    trainer, found["decisions"] = fitted(module, loader(0, samples), [adaptive(controller())])
    found["weights"], found["metrics"] = weights(module.model), dict(trainer.callback_metrics)
    for name, callbacks in (("constant", [adaptive(Controller(B0, rule=Constant()))]), ("plain", [])):
        module = lightning_module()
        fitted(module, loader(0, 5 * B0), callbacks, accumulate_grad_batches=B0 // PIECE, gradient_clip_val=0.5)
        found[name] = module.losses, weights(module.model)

    class Reloading(pl.LightningDataModule):
        """Other samples in every epoch, the last batch of which is a smaller one."""

        def train_dataloader(self):
            return loader(112 * self.trainer.current_epoch, 112 * self.trainer.current_epoch + 112)

    for name, epochs, begin in (("whole", 4, None), ("two", 2, None), ("again", 4, folder / "two.ckpt")):
        module = lightning_module()
        how = {"max_epochs": epochs, "reload_dataloaders_every_n_epochs": 1, "enable_checkpointing": True}
        how |= {"default_root_dir": folder / name, "ckpt_path": begin}
        trainer, found[name] = fitted(module, Reloading(), [adaptive(controller())], **how)
        found[f"weights of {name}"] = weights(module.model)
        if name == "two":
            trainer.save_checkpoint(folder / "two.ckpt")

    module, callback = lightning_module(), adaptive(Controller(32, NormTest(1.0), limits=Limits(32)))
    callback.scaling["controller"].scaling = LearningRateScaling("adascale", 32)  # so that it is measured
    _, found["short"] = fitted(module, loader(0, 48), [callback])
    found["weights after the short one"], found["moments"] = weights(module.model), vars(callback.scaler.moments)

    in_parts = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    for name, strategy in (("DDP", "ddp"), ("FSDP2", in_parts)):
        module = lightning_module().float()
        if name == "FSDP2":
            module.configure_model = lambda: fully_shard(module.model, mesh=module.device_mesh["data_parallel"])  # noqa: B023
        callback = adaptive(controller(), test_gradients="micro_batch")
        pieces = [(x.float(), labels) for x, labels in loader(0, 320).dataset]
        data = DataLoader(pieces, batch_size=None)
        found[name] = fitted(module, data, [callback], strategy, precision="32-true")[1]

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    names = {"Trainer": functools.partial(pl.Trainer, accelerator="cpu", devices=2, strategy="ddp", **quiet)}
    names |= {"AdaptiveBatchSize": AdaptiveBatchSize, "cross_entropy": cross_entropy, "DataLoader": DataLoader}
    names |= {"module": lightning_module(), "data": TensorDataset(*digits()(range(200)))}
    exec(example("AdaptiveBatchSize(cross_entropy"), names)
    scaler = names["callback"].scaler
    found["example"] = scaler.samples, scaler.batch_size, weights(names["module"].model)
    return found


@pytest.fixture(scope="module")
def of_lightning(of_main, tmp_path_factory) -> list[dict]:
    samples = int(sum(size for size, _ in of_main))
    return two_processes(functools.partial(in_lightning, samples=samples), tmp_path_factory.mktemp("lightning"))


def test_lightning_decides_as_main_does(of_main, of_lightning):
    assert all(same(found["decisions"], of_main) for found in of_lightning)
    same_on_both(of_lightning, "weights", "example")
    metrics = of_lightning[0]["metrics"]
    assert metrics["batch_size"] == of_main[-1][0] and metrics["lr_factor"] > 1.5 and metrics["noise_scale"] > 0


def test_lightnings_example(of_lightning):
    samples, batch_size, _ = of_lightning[0]["example"]
    assert samples == 10 * 192 and batch_size > 16


def test_lightning_goes_on_from_a_checkpoint(of_lightning):
    same_on_both(of_lightning, "whole", "two", "again", "weights of again")
    found = of_lightning[0]
    assert found["two"] + found["again"] == found["whole"] and found["weights of again"] == found["weights of whole"]
    assert found["whole"][-1][0] > B0


def test_lightnings_smaller_batch_at_the_end_of_an_epoch(of_lightning, in_double):
    """Its mean is over its own samples, and so are the statistics."""
    model, found = seeded_model(), of_lightning[0]
    for (size, rate), first in zip(found["short"], (0, 32)):
        x, y = digits()(range(first, first + int(size)))
        gradients = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients):
                parameter -= rate * gradient
    assert [size for size, _ in found["short"]] == [32, 16]
    assert found["weights after the short one"] == pytest.approx(weights(model), rel=1e-9, abs=1e-12)
    assert found["moments"]["batch_size"] == 16
    assert found["moments"]["grad_norm_sq"] == pytest.approx(sum(float(g.square().sum()) for g in gradients), rel=1e-9)


def test_lightning_under_fsdp2_decides_as_under_ddp(of_lightning):
    same_on_both(of_lightning, "DDP", "FSDP2")
    (sizes, rates), (of_ddp, rates_of_ddp) = (zip(*of_lightning[0][name]) for name in ("FSDP2", "DDP"))
    assert sizes == of_ddp and rates == pytest.approx(rates_of_ddp, rel=1e-4)  # in single precision
    assert max(sizes) > B0


def test_lightning_without_a_change_trains_as_the_plain_trainer(of_lightning):
    for found in of_lightning:
        for ours, plain in zip(found["constant"], found["plain"]):
            assert ours == pytest.approx(plain, rel=1e-12)
