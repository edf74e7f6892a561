"""Other people's trainers: on two processes each of them decides as main.py does on the same samples, both have equal
weights whatever the batch has done, and where it does not change the loss is the plain trainer's.
"""

import contextlib
import functools
import gc
import itertools
import os
import re
import sys
import sysconfig
import types
import venv
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from adadagrad import BatchScaler, Constant, Controller, LearningRateScaling, Limits, Moments, NoiseScale, NormTest
from adadagrad.control import CRITICAL
from checks.conftest import column, forks, launch, train, unused_port
from checks.test_library import (
    B0,
    OPTIONS,
    RATE,
    Samples,
    example,
    installed,  # noqa: F401  a fixture
    new_controller,
    same,
    seeded_model,
    taken,
)

pytestmark = pytest.mark.xdist_group("integrations")  # what the fixtures have found serves several tests
PIECE, STEPS, LARGEST = 8, 20, 1432
"""Samples of a micro-batch, over all processes; both numbers divide by it."""


digits = functools.cache(Samples)  # read once a process


def controller() -> Controller:
    new = new_controller()
    new.limits = Limits(LARGEST, max_growth=2.0, multiple=PIECE)
    return new


@pytest.fixture(scope="module")
def of_main(tmp_path_factory) -> list[tuple[float, float]]:
    """Batch size and learning rate of every step of main.py, of one process."""
    more = [f"--max_iters={STEPS}", f"--batch_size_multiple={PIECE}", f"--max_batch_size={LARGEST}"]
    ours = train(tmp_path_factory.mktemp("main"), *OPTIONS, *more)
    decisions = list(zip(column(ours, "batch_size"), column(ours, "lr")))
    assert len(decisions) == STEPS and decisions[-1][0] >= 3 * B0
    return decisions


@pytest.fixture
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def two_processes(function: Callable[[int, Path], dict], folder: Path) -> list[dict]:
    """What this function of the rank and a folder gives on each of two processes that have joined a group."""
    forks()
    mp.start_processes(_joined, (unused_port(), function, folder), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"found{rank}", weights_only=False) for rank in range(2)]


def _joined(rank: int, port: int, function: Callable[[int, Path], dict], folder: Path) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "checks"}
    os.environ.update({name: str(value) for name, value in own.items()})
    gc.freeze()  # trainers collect garbage often, among all that has been imported
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo")
    torch.save(function(rank, folder), folder / f"found{rank}")
    torch.distributed.barrier()
    os._exit(0)  # Lightning's trainer has the group still in use: Python's own end would wait for it


def weights(model: torch.nn.Module) -> list[float]:
    return torch.nn.utils.parameters_to_vector(model.parameters()).tolist()


def same_on_both(found: list[dict], *names) -> None:
    for name in names:
        assert found[0][name] == found[1][name], name


# transformers


class Classifier(torch.nn.Module):
    """The model of main.py, called as the Trainer calls one."""

    def __init__(self):
        super().__init__()
        self.model = seeded_model()

    def forward(self, x, labels=None):
        logits = self.model(x)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def arguments(folder: Path, **more):
    from transformers import TrainingArguments

    defaults = {"per_device_train_batch_size": PIECE // int(os.environ.get("WORLD_SIZE", 1)), "use_cpu": True}
    defaults |= {"learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none"}
    defaults |= {
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
    }
    defaults |= {"optim": "sgd", "log_level": "error"}
    return TrainingArguments(str(folder), **defaults | more)


def rows(number: int) -> list[dict]:
    x, labels = digits()(range(number))
    return [{"x": own, "labels": int(label)} for own, label in zip(x, labels)]


def logged(trainer, *names: str) -> list[tuple]:
    """Of every step."""
    return [tuple(row[name] for name in names) for row in trainer.state.log_history if "loss" in row]


def in_transformers(rank: int, folder: Path, samples: int) -> dict:
    from transformers import Trainer

    from adadagrad.integrations.transformers import AdaptiveBatchTrainer, NoiseScaleCallback

    found, data = {}, rows(samples + 64)
    scaling = {"controller": controller(), "measure_interval": 1}
    trainer = AdaptiveBatchTrainer(
        Classifier(), arguments(folder, max_steps=samples // B0), train_dataset=data, scaling=scaling
    )
    trainer.train()
    found["decisions"] = logged(trainer, "batch_size", "learning_rate")
    found["weights"], found["epoch"] = weights(trainer.model), trainer.state.epoch

    def constant(data, model, **more):
        how = arguments(folder, max_steps=5, **more)
        scaling = {"controller": Controller(B0, rule=Constant())}
        return AdaptiveBatchTrainer(model(), how, train_dataset=data, scaling=scaling)

    def plain(data, model, **more):
        how = arguments(folder, gradient_accumulation_steps=B0 // PIECE, **{"max_steps": 5} | more)
        return Trainer(model(), how, train_dataset=data)

    def watched(data, model, **more):
        trainer = plain(data, model, **more)
        exec(example("trainer.add_callback("), {"trainer": trainer, "NoiseScaleCallback": NoiseScaleCallback})
        return trainer

    for name, data, model, more in (
        ("images", rows(96), Classifier, {}),
        ("text", sequences(96), language_model, {"max_grad_norm": 1e-3, "lr_scheduler_type": "linear"}),
    ):
        for way in (constant, plain, watched):
            trainer = way(data, model, **more)
            trainer.train()
            found[name, way.__name__] = (logged(trainer, "loss", "grad_norm", "learning_rate"), weights(trainer.model))

    for model, test_gradients in ((language_model, "auto"), (gpt2, "loop")):
        how = arguments(folder, max_steps=1, learning_rate=0.0, max_grad_norm=1e-3)
        scaling = {"batch_size": B0, "test_gradients": test_gradients}
        trainer = AdaptiveBatchTrainer(model(), how, train_dataset=sequences(B0), scaling=scaling)
        trainer.train()
        found["moments", model.__name__] = vars(trainer.scaler.moments)
    trainer = watched(sequences(B0), language_model, learning_rate=0.0, max_grad_norm=1e-3, max_steps=1)
    callback = trainer.callback_handler.callbacks[-1]
    trainer.train()
    found["moments", "callback"] = vars(callback.scaler.moments)

    def resumed(data, **how):
        own = {"max_steps": 45, "save_strategy": "steps", "save_steps": 7, "train_sampling_strategy": "random"}
        new = arguments(folder / "resumed", **own, lr_scheduler_type="linear", **how)
        trainer = AdaptiveBatchTrainer(
            Classifier(),
            new,
            train_dataset=data,
            scaling={"controller": controller(), "measure_interval": 2},
        )
        return trainer

    whole = resumed(rows(104))
    whole.train()
    again = resumed(rows(104))
    again.train(resume_from_checkpoint=str(folder / "resumed" / "checkpoint-7"))
    names = ("batch_size", "learning_rate", "epoch", "loss")
    found["whole"], found["again"] = (logged(trainer, *names) for trainer in (whole, again))
    found["weights of both"] = weights(whole.model), weights(again.model)
    return found


def language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, num_key_value_heads=2, max_position_embeddings=12, **size))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=12, n_embd=8, n_layer=1, n_head=2, **none))


def sequences(number: int) -> list[dict]:
    """Of different lengths, padded; half of them begin with a prompt that is not learned."""
    draw = torch.Generator().manual_seed(1)
    samples = []
    for i in range(number):
        tokens = torch.randint(1, 11, (12,), generator=draw)
        is_text = torch.arange(12) < 4 + i % 9
        labels = torch.where(is_text & (torch.arange(12) >= (i % 2) * 2), tokens, -100)
        samples.append({"input_ids": tokens * is_text, "attention_mask": is_text.long(), "labels": labels})
    return samples


@pytest.fixture(scope="module")
def of_transformers(of_main, tmp_path_factory) -> list[dict]:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    samples = int(sum(size for size, _ in of_main))
    return two_processes(functools.partial(in_transformers, samples=samples), tmp_path_factory.mktemp("transformers"))


def test_transformers_decides_as_main_does(of_main, of_transformers):
    assert all(same(found["decisions"], of_main) for found in of_transformers)
    same_on_both(of_transformers, "weights", "epoch")


@pytest.mark.parametrize("data", ["images", "text"])
def test_transformers_without_a_change_trains_as_the_plain_trainer(of_transformers, data):
    same_on_both(of_transformers, *((data, way) for way in ("constant", "plain", "watched")))
    found = of_transformers[0]
    assert found[data, "constant"] == found[data, "plain"] == found[data, "watched"]
    assert len(found[data, "plain"][0]) == 5


def test_transformers_goes_on_from_a_checkpoint_bit_for_bit(of_transformers):
    same_on_both(of_transformers, "whole", "again", "weights of both")
    found = of_transformers[0]
    assert found["again"] == found["whole"]  # the Trainer takes its log along
    assert found["weights of both"][0] == found["weights of both"][1]
    sizes, rates, epochs, _ = zip(*found["whole"])
    assert sizes[-1] > sizes[7] > B0 and epochs[6] % 1 and epochs[-1] > 2


@pytest.mark.parametrize("name", ["language_model", "gpt2", "callback"])
def test_statistics_of_text_are_those_of_its_sequences(of_transformers, in_double, name):
    """With padding, labels of −100 and clipped gradients: Σ_i s_i / T is the mean of b terms."""
    model, gradients, tokens = gpt2() if name == "gpt2" else language_model(), [], 0
    for sequence in sequences(B0):
        number = int((sequence["labels"][1:] != -100).sum())
        loss = model(**{key: row[None] for key, row in sequence.items()}).loss * number  # a mean over its tokens
        own = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in own]))
        tokens += int((sequence["labels"] != -100).sum()) if name == "gpt2" else number  # as the Trainer counts them
    of_samples = torch.stack(gradients) * B0 / tokens
    same_on_both(of_transformers, ("moments", name))
    found = of_transformers[0]["moments", name]
    assert found["batch_size"] == found["num_groups"] == B0
    assert found["grad_norm_sq"] == pytest.approx(float(of_samples.mean(0).square().sum()), rel=1e-5)
    assert found["sum_norm_sq"] == pytest.approx(float(of_samples.square().sum()), rel=1e-5)


# accelerate


def in_accelerate(rank: int, folder: Path) -> dict:
    from accelerate import Accelerator

    from adadagrad.integrations.accelerate import adaptive_accumulate

    found = {}

    def trained(new_scaler, steps: int, adaptive: bool = True) -> tuple[list, list[float]]:
        """Batch size and learning rate of every step, and the weights; a loader of 136 samples, again and again."""
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=B0 // PIECE)
        model = seeded_model()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
        scaler = new_scaler(model, optimizer.optimizer)
        scaler.rates_in_step()
        seen = []
        step = lambda own, *_: seen.append((scaler.batch_size, own.param_groups[0]["lr"]))  # noqa: E731
        optimizer.optimizer.register_step_pre_hook(step)
        own = PIECE // accelerator.num_processes
        for start in itertools.count(0, PIECE):
            x, y = (rows[accelerator.process_index * own :][:own] for rows in digits()(range(start, start + PIECE)))
            around = (
                adaptive_accumulate(accelerator, scaler, model, x, y) if adaptive else accelerator.accumulate(model)
            )
            with around:
                accelerator.backward(cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 100.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and len(seen) == steps:
                return seen, weights(model)

    def by(controller: Controller):
        return lambda model, optimizer: BatchScaler(
            model, cross_entropy, optimizer, controller=controller, measure_interval=1
        )

    found["decisions"], found["weights"] = trained(by(controller()), STEPS)
    found["constant"] = trained(by(Controller(B0, rule=Constant())), 5)
    found["plain"] = trained(by(Controller(B0, rule=Constant())), 5, adaptive=False)
    with pytest.raises(ValueError, match="multiples of that"):
        trained(by(Controller(B0 + 1, rule=Constant())), 1)

    names = {"Accelerator": functools.partial(Accelerator, cpu=True), "adaptive_accumulate": adaptive_accumulate}
    names |= {"BatchScaler": BatchScaler, "cross_entropy": cross_entropy, "torch": torch, "model": seeded_model()}
    names["loader"] = DataLoader(TensorDataset(*digits()(range(600))), batch_size=4, shuffle=True, drop_last=True)
    exec(example("with adaptive_accumulate("), names)
    found["example"] = names["scaler"].samples, names["scaler"].batch_size, weights(names["model"])
    return found


@pytest.fixture(scope="module")
def of_accelerate(tmp_path_factory) -> list[dict]:
    pytest.importorskip("accelerate")
    return two_processes(in_accelerate, tmp_path_factory.mktemp("accelerate"))


def test_accelerate_decides_as_main_does(of_main, of_accelerate):
    assert all(same(found["decisions"], of_main) for found in of_accelerate)
    same_on_both(of_accelerate, "weights", "constant", "plain")
    assert of_accelerate[0]["constant"] == of_accelerate[0]["plain"]


def test_accelerates_example(of_accelerate):
    same_on_both(of_accelerate, "example")
    samples, batch_size, _ = of_accelerate[0]["example"]
    assert samples >= 4_000 and batch_size > 16


# Lightning


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


# Plain PyTorch, and loops that are not watched


def in_plain(rank: int, folder: Path) -> dict:
    found, names = {}, {"contextlib": contextlib, "torch": torch, "default_hooks": default_hooks, "loss": cross_entropy}
    names |= {"NoiseScale": NoiseScale}
    exec(example("def train_step("), names)
    model = DistributedDataParallel(seeded_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scaler = BatchScaler(model, cross_entropy, optimizer, controller=controller(), measure_interval=1)
    positions, rates = itertools.count(0, PIECE), []
    optimizer.register_step_pre_hook(lambda own, *_: rates.append((scaler.batch_size, own.param_groups[0]["lr"])))

    def next_micro_batch():
        first = next(positions)
        return tuple(rows[rank * PIECE // 2 :][: PIECE // 2] for rows in digits()(range(first, first + PIECE)))

    for _ in range(STEPS):
        names["train_step"](model, scaler, cross_entropy, next_micro_batch, PIECE // 2)
    found["decisions"], found["weights"] = rates, weights(model)

    model = seeded_model()
    names |= {"model": DistributedDataParallel(model)}
    names["inputs"], names["targets"] = next_micro_batch()
    exec(example("register_comm_hook"), names)
    found["noise"] = vars(names["noise"])
    own = torch.autograd.grad(cross_entropy(model(names["inputs"]), names["targets"]), list(model.parameters()))
    found["gradient"] = torch.cat([gradient.flatten() for gradient in own])

    sharded = fully_shard(seeded_model(), mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    of_all = {}
    for name, own_model in (("whole", seeded_model()), ("sharded", sharded)):
        optimizer = torch.optim.Adam(own_model.parameters(), lr=1e-5, betas=(0.9, 0.95))
        for step in range(20):
            x, y = digits()(range(8 * step, 8 * step + 8))
            cross_entropy(own_model(x), y).backward()  # on both ranks the same
            optimizer.step()
            optimizer.zero_grad()
        of_all[name] = vars(NoiseScale.from_adam(optimizer, 8))
    found["adam"] = of_all
    return found


@pytest.fixture(scope="module")
def of_plain(tmp_path_factory) -> list[dict]:
    return two_processes(in_plain, tmp_path_factory.mktemp("plain"))


def test_a_loop_with_windows_of_its_own_decides_as_main_does(of_main, of_plain):
    assert all(same(found["decisions"], of_main) for found in of_plain)
    same_on_both(of_plain, "weights")


def test_noise_scale_from_the_gradients_of_two_processes(of_plain):
    same_on_both(of_plain, "noise")
    own = torch.stack([found["gradient"] for found in of_plain])
    found, mean = NoiseScale(**of_plain[0]["noise"]), own.mean(0)
    expected = Moments(8, 2, float(mean.square().sum()), float(4 * own.square().sum()))
    assert found.variance == pytest.approx(expected.variance, rel=1e-9)
    assert found.value == pytest.approx(expected.statistics(unbiased=True).noise_scale, rel=1e-9)
    assert found.moments.grad_norm_sq == pytest.approx(expected.grad_norm_sq, rel=1e-9)
    assert found.moments.sum_norm_sq == pytest.approx(expected.sum_norm_sq, rel=1e-9)
    assert (found.moments.batch_size, found.moments.num_groups) == (8, 2)


def test_noise_scale_from_adam_on_shards(of_plain):
    for found in of_plain:
        assert found["adam"]["sharded"] == pytest.approx(found["adam"]["whole"], rel=1e-9)


def of_adam(steps: int, signal: float, beta2: float = 0.95, batch_size: int = 4):
    """`from_adam` after so many steps on gradients G + noise: ‖G‖² is `signal`, V is 4000, the steps are none."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (1000, 3000)]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, beta2))
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = (signal / 4000) ** 0.5 + torch.randn(len(parameter)) / batch_size**0.5
        optimizer.step()
    return NoiseScale.from_adam(optimizer, batch_size)


@pytest.mark.parametrize("steps", [20, 60, 300])
def test_noise_scale_from_adam(steps):
    found = of_adam(steps, signal=200.0)
    assert found.variance == pytest.approx(4000, rel=0.05) and found.grad_norm_sq == pytest.approx(200, rel=0.05)
    assert found.value == pytest.approx(20, rel=0.07)
    assert found.moments.statistics(unbiased=True).noise_scale == pytest.approx(found.value, rel=1e-9)


def test_noise_scale_from_adam_is_none_where_it_cannot_be_known():
    assert of_adam(18, signal=200.0) is None  # younger than v's window, 20 steps
    assert of_adam(100, signal=200.0, beta2=0.999) is None
    assert of_adam(60, signal=2000.0) is None  # V/b = 1000: the noise scale, 2, is below the batch size
    optimizer = torch.optim.Adam([parameter := torch.nn.Parameter(torch.zeros(3))], betas=(0.9, 0.95))
    assert NoiseScale.from_adam(optimizer, 4) is None
    for step in range(40):  # gradients that turn round at every step: the estimate of ‖G‖² is negative
        parameter.grad = torch.ones(3) * (-1) ** step
        optimizer.step()
    assert NoiseScale.from_adam(optimizer, 4) is None
    assert NoiseScale.from_adam(torch.optim.SGD([parameter]), 4) is None


def test_micro_batches_must_be_two():
    with pytest.raises(ValueError, match="two or more"):
        NoiseScale.from_micro_batches(1.0, 4, 1.0, 4)


def test_after_a_step_that_was_not_watched():
    names = {"NoiseScale": NoiseScale}
    exec(example("def after_step("), names)
    controller = Controller(8, NormTest(0.5), limits=Limits(64, multiple=8), unbiased=True)
    optimizer, numbers = types.SimpleNamespace(param_groups=[], state={}), []
    for noise in (None, NoiseScale(400.0, 40.0, 8, 8)):  # V/(η²‖G‖²) = 40
        with mock.patch.object(NoiseScale, "from_adam", lambda *_, noise=noise: noise):
            numbers.append([names["after_step"](controller, optimizer, 8) for _ in range(16)])
    assert numbers == [[1] * 16, [5] * 16]


def test_the_world_decides_on_the_batch():
    """Rate and state follow sizes up and down, as for a batch that was asked for."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    names = {"BatchScaler": BatchScaler, "Constant": Constant, "model": model, "loss": cross_entropy, "batches": []}
    names["optimizer"] = optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sizes = [64] * 10 + [256, 100, 7]
    rates, states = [], []
    optimizer.register_step_pre_hook(lambda own, *_: rates.append(own.param_groups[0]["lr"]))

    def batches():
        for size in sizes:
            x = torch.randn(size, 5)
            states.append(
                [optimizer.state[p]["exp_avg_sq"].clone() for p in model.parameters() if p in optimizer.state]
            )
            yield x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long()

    names["batches"] = batches()
    block = example("scaler.scaling(len(inputs))")
    block = block.replace(
        "    with scaler.observe", "    told.append((factor, known(), after()))\n    with scaler.observe", 1
    )
    told = []
    names |= {"told": told, "known": lambda: names["scaler"].controller.statistics}
    names["after"] = lambda: [optimizer.state[p]["exp_avg_sq"].clone() for p in model.parameters() if optimizer.state]
    exec(block.replace("    scaler.scaling(", "    factor = scaler.scaling(", 1), names)
    assert names["scaler"].samples == sum(sizes)
    for step in range(len(sizes)):
        factor, statistics, after = told[step]
        assert rates[step] == pytest.approx(0.01 * factor)
        if step >= 10:
            known, before, size = statistics.safe, sizes[step - 1], sizes[step]
            v, signal = known.variance, known.grad_norm_sq
            squares = (v / before + signal) / (v / size + signal)
            of_first, gain = ((k * v / 64 + signal) / (k * v / size + signal) for k in (1, CRITICAL))
            assert factor == pytest.approx(gain / of_first**0.5, rel=1e-6) != 1
            old_beta, beta = (0.999 ** (b / 64) for b in (before, size))
            unbiased = (1 - beta**step) / (1 - old_beta**step)  # of v with the new β₂
            for old, new in zip(states[step], after):
                assert torch.allclose(new, old * unbiased / squares, rtol=1e-5)
    assert told[0][0] == 1.0
    with pytest.raises(ValueError, match="cannot be shared"):
        names["scaler"].scaling(0)


def test_a_compiled_model_decides_as_main_does(of_main, in_double):
    """Compiled for real, but for the last stage, the generation of code."""
    model = seeded_model()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=RATE)
    scaler = BatchScaler(compiled, cross_entropy, optimizer, controller=controller(), measure_interval=1)
    assert same(taken(compiled, scaler, STEPS), of_main)


# The page's own program, where nothing else of this folder is


@pytest.fixture(scope="module")
def fresh(request, tmp_path_factory) -> str:
    """Python of an environment of its own, for which pip has installed adadagrad[transformers] from the wheel; all else
    that this needs is the suite's."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder)
    python = str(folder / "bin" / "python")
    own = launch(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(own, "suite.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = request.getfixturevalue("installed").parent.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
    done = launch(*pip, f"{wheel}[transformers]", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Path(own, "adadagrad").is_dir()
    return python


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_small_llama_on_the_standard_librarys_text(tmp_path, processes, request):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    python = request.getfixturevalue("fresh")
    program = example("AdaptiveBatchTrainer(model, args")
    program += "import adadagrad\n"
    program += "print('END', trainer.scaler.samples, trainer.scaler.batch_size, adadagrad.__file__)\n"
    shorter = "max_steps=60, logging_steps=1, save_strategy='no', report_to='none'"
    (tmp_path / "llama.py").write_text(program.replace("max_steps=200", shorter))
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={unused_port()}"]
    done = launch(python, *(torchrun if processes > 1 else []), "llama.py", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    ends = [line.split() for line in done.stdout.splitlines() if line.startswith("END")]
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", done.stdout)]
    assert len(ends) == processes and len({tuple(end) for end in ends}) == 1
    _, samples, batch_size, file = ends[0]
    assert int(samples) >= 480 and int(batch_size) > 8
    assert Path(file).is_relative_to(Path(python).parents[1])
    assert losses[0] > 5 > 3.7 > losses[-1]
