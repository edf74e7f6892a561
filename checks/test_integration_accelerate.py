"""accelerate: on two processes it decides as main.py does on the same samples, both have equal weights whatever the
batch has done, and where it does not change the steps are those of `accelerator.accumulate`.
"""

import itertools
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from adadagrad import BatchScaler, Constant, Controller
from checks.test_library import B0, RATE, example, same, seeded_model
from checks.trainers import PIECE, STEPS, controller, decisions_of_main, digits, same_on_both, two_processes, weights

pytestmark = pytest.mark.xdist_group("accelerate")  # what the fixtures have found serves several tests


@pytest.fixture(scope="module")
def of_main() -> list[tuple[float, float]]:
    return decisions_of_main()


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

    names = {"Accelerator": Accelerator, "adaptive_accumulate": adaptive_accumulate}
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
