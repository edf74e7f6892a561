"""The adaptive batch size of AdAdaGrad (https://arxiv.org/abs/2402.11215) in plain PyTorch, on handwritten digits.

    python examples/reference.py

A batch is large enough if its gradient ḡ is close to the gradient of the whole training set. How far apart they are is
not known, but the expected square of the distance is V/b, the variance of the per-sample gradients over the batch size.
The norm test (Byrd, Chin, Nocedal, Wu, 2012) compares it with ‖ḡ‖². The optimizer step is always taken; if the test
fails, the next batch has the size at which it would have passed.
"""

import copy
import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Loss = Callable[[Tensor, Tensor], Tensor]


def per_sample_gradients(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> Tensor:
    """g_1 … g_b over all P parameters, as the rows of a matrix (b, P)."""
    model = copy.deepcopy(model)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss_of_one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, parameters, x.unsqueeze(0)), y.unsqueeze(0))

    gradients = vmap(grad(loss_of_one), in_dims=(None, 0, 0))(parameters, inputs, targets)
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)


def norm_test(gradients: Tensor, eta: float) -> int:
    """The next batch size: b if V/b ≤ η²‖ḡ‖², otherwise ⌈V / (η²‖ḡ‖²)⌉, which is larger.

    Args:
        gradients: of the b samples of a batch (b, P).
        eta: η, the noise that is allowed, relative to ‖ḡ‖; smaller means larger batches.
    """
    b, mean = len(gradients), gradients.mean(0)
    variance = float((gradients - mean).square().sum()) / (b - 1)
    allowed = eta**2 * float(mean.square().sum())
    return math.ceil(variance / allowed) if 0 < allowed < variance / b else b


def train(
    model: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    order: Iterator[int],
    batch_size: int,
    eta: float,
    max_samples: int,
) -> list[int]:
    """Train on at least `max_samples` samples; returns the size of every batch.

    Args:
        loss: (outputs, targets) → their mean loss.
        optimizer: SGD, Adagrad or any other.
        data: all inputs and targets (N, …); no batch is larger than N.
        order: which samples are used, one after the other, without end.
        batch_size: of the first batch, at least 2.
    """
    sizes: list[int] = []
    while sum(sizes) < max_samples:
        chosen = list(islice(order, batch_size))
        inputs, targets = (tensor[chosen] for tensor in data)

        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        needed = norm_test(per_sample_gradients(model, loss, inputs, targets), eta)
        optimizer.step()

        sizes.append(batch_size)
        batch_size = min(needed, len(data[0]))  # never smaller than this batch
    return sizes


def shuffled(n: int) -> Iterator[int]:
    """0 … n − 1, in a new random order every epoch."""
    while True:
        yield from torch.randperm(n).tolist()


if __name__ == "__main__":
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))  # (1797, 64), (1797,)
    pixels = pixels.float() / 16
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)  # or torch.optim.SGD
    training, held_out = (pixels[:1500], labels[:1500]), (pixels[1500:], labels[1500:])
    sizes = train(model, nn.functional.cross_entropy, optimizer, training, shuffled(1500), 16, 1.0, 30_000)
    accuracy = (model(held_out[0]).argmax(1) == held_out[1]).float().mean()
    print("batch sizes:", *dict.fromkeys(sizes))
    print(f"{len(sizes)} steps, accuracy {accuracy:.1%}")
