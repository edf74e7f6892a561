"""The Trainer of transformers: on two processes it decides as main.py does on the same samples, both have equal weights
whatever the batch has done, and where it does not change the loss is the plain Trainer's.
"""

import functools
import os
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from adadagrad import Constant, Controller
from checks.test_library import B0, RATE, example, same, seeded_model
from checks.trainers import PIECE, controller, decisions_of_main, digits, same_on_both, two_processes, weights

pytestmark = pytest.mark.xdist_group("transformers")  # what the fixtures have found serves several tests


@pytest.fixture(scope="module")
def of_main() -> list[tuple[float, float]]:
    return decisions_of_main()


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
    longer = watched(rows(480), Classifier, max_steps=120)
    longer.train()
    found["noise that was watched"] = [row.get("noise_scale") for row in longer.state.log_history if "loss" in row]
    found["moments", "callback"] = vars(callback.scaler.moments)

    def resumed(data, **how):
        own = {"max_steps": 45, "save_strategy": "steps", "save_steps": 7, "train_sampling_strategy": "random"}
        own |= {"eval_strategy": "steps", "eval_steps": 1000}
        new = arguments(folder / "resumed", **own, lr_scheduler_type="linear", **how)
        trainer = AdaptiveBatchTrainer(
            Classifier(),
            new,
            train_dataset=data,
            eval_dataset=data[:16],
            scaling={"controller": controller(), "measure_interval": 2},
        )
        return trainer

    whole = resumed(rows(104))
    whole.train()
    found["steps"], found["evaluated"] = whole.state.global_step, whole.state.log_history[-2]["step"]
    found["saved"] = (folder / "resumed" / f"checkpoint-{whole.state.global_step}").is_dir()
    again = resumed(rows(104))
    again.train(resume_from_checkpoint=str(folder / "resumed" / "checkpoint-7"))
    names = ("batch_size", "learning_rate", "epoch", "loss")
    found["whole"], found["again"] = (logged(trainer, *names) for trainer in (whole, again))
    found["noise scales"] = [row["noise_scale"] for row in whole.state.log_history if row.get("noise_scale")]
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
    before = [sum(sizes[:i]) for i in range(5)]  # the schedule counts samples; later the controller's factor comes in
    assert rates[:5] == pytest.approx([RATE * (1 - samples // B0 / 45) for samples in before])
    assert found["noise scales"] and all(scale > 0 for scale in found["noise scales"])


@pytest.mark.long
def test_transformers_evaluates_and_saves_at_its_end(of_transformers):
    """After fewer steps than `max_steps`."""
    for found in of_transformers:
        assert found["steps"] == len(found["whole"]) < 45 and found["steps"] % 7
        assert found["evaluated"] == found["steps"] and found["saved"]


def test_the_callback_logs_the_noise_scale(of_transformers):
    """As soon as it is known, and the same on both processes."""
    same_on_both(of_transformers, "noise that was watched")
    known = [scale for scale in of_transformers[0]["noise that was watched"] if scale is not None]
    assert known and all(0 < scale < 1e6 for scale in known)


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
