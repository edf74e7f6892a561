"""Models by name: two small ones for any image shape, every torchvision classifier, a GPT, and a user's own."""

import inspect
import warnings
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from adadagrad.gradients import Loss, couples_samples, drawing_from, listed, preserving_state, random_states
from adadagrad.gradients.samples import some
from options.errors import UsageError, in_one_line
from options.names import import_object, unknown
from options.schema import Config
from text.gpt import GPT

ImageShape = tuple[int, int, int]
"""Channels, height, width."""


def logistic(image_shape: ImageShape, num_classes: int) -> nn.Module:
    """Multinomial logistic regression on the pixels."""
    channels, height, width = image_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes))


def cnn(image_shape: ImageShape, num_classes: int) -> nn.Module:
    """A small convolutional network.

    Grey images: conv 5×5/16, pool, conv 5×5/32, pool, linear (28,938 parameters on 28×28).
    Colour images: conv 3×3/16, /32, /64, each pooled, linear 500, linear (541,094 parameters on 32×32).
    """
    channels, height, width = image_shape
    kernel, widths, hidden = (5, (16, 32), None) if channels == 1 else (3, (16, 32, 64), 500)
    layers: list[nn.Module] = []
    for features in widths:
        layers += [nn.Conv2d(channels, features, kernel, padding=kernel // 2), nn.ReLU(), nn.MaxPool2d(2)]
        channels, height, width = features, height // 2, width // 2
    features = channels * height * width
    layers.append(nn.Flatten())
    if hidden:
        layers += [nn.Linear(features, hidden), nn.ReLU()]
        features = hidden
    return nn.Sequential(*layers, nn.Linear(features, num_classes))


OWN = {"logistic": logistic, "cnn": cnn, "gpt": GPT}


def names() -> list[str]:
    """All names that `build` knows."""
    return [*OWN, *torchvision.models.list_models(module=torchvision.models)]


def build(
    name: str, input_shape: Any, num_outputs: int, arguments: dict[str, Any] | None = None, example: Any = None
) -> nn.Module:
    """The model of that name; weights are random (set the seed before).

    An import path `package.module:function` names a function `(input_shape, num_outputs, **arguments) -> nn.Module`.
    If a model's output has `.logits`, they are used as its output.

    Args:
        input_shape: of one input, (channels, height, width) of an image; nested as the input is.
        num_outputs: the number of classes, of tokens, or what else the data set says.
        arguments: further ones of the model.
        example: an input, where the samples are not images to be classified; the output is then what the loss takes.

    Raises:
        UsageError: unknown name, arguments that the model does not take, or a model that cannot take such inputs.
    """
    if ":" in name:
        create = import_object("model", name)
    elif name in OWN:
        create = OWN[name]
    elif name in names():
        create = _torchvision_factory(name)
    else:
        raise UsageError(unknown("model", name))
    images = isinstance(input_shape, tuple) and len(input_shape) == 3
    if ":" not in name and images == (name == "gpt"):
        kind, other = ("images", "digits") if name != "gpt" else ("text", "stdlib")
        raise UsageError(f"--model={name} is for {kind}: choose another one, or such as --dataset={other}")
    of_shape = f"inputs of shape {input_shape}"
    if images:
        of_shape = f"images of {'×'.join(map(str, input_shape))} (channels × height × width)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision announces changes of its initialisers
            model = create(input_shape, num_outputs, **(arguments or {}))
            if not isinstance(model, nn.Module):
                raise TypeError(f"it gives {type(model).__name__}, not torch.nn.Module")
            example_or_image = torch.zeros(input_shape) if example is None else example
            output = _dry_output(model, example_or_image, 2)
            if hasattr(output, "logits"):
                model.register_forward_hook(lambda module, inputs, output: output.logits)
                output = output.logits
            if example is None and not isinstance(output, Tensor):
                raise TypeError(f"its output is {type(output).__name__}, not a tensor of logits")
    except Exception as error:  # a user's model raises what it likes
        given = " ".join(f"--model_args.{key}={value}" for key, value in (arguments or {}).items())
        raise UsageError(
            f"--model={name}{' ' * bool(given)}{given} does not work on {of_shape}: {in_one_line(error)}: "
            "choose another --model or --dataset"
        ) from None
    if example is None and tuple(output.shape) != (2, num_outputs):
        raise UsageError(
            f"--model={name} gives an output of shape {tuple(output.shape)} for 2 images, not (2, {num_outputs}): "
            "choose another --model, or end it in one number for each class"
        )
    return model


def choose_memory_format(model: nn.Module, input_shape: Any) -> torch.memory_format:
    """Choose the memory format of images for this model, and move its weights to it.

    With channels last, convolutions take about two thirds of the time on CPUs, and on GPUs use tensor cores without a
    copy. GroupNorm is slower with it, on a CPU also BatchNorm in small micro-batches, and some models do not support it
    (`view` of maps as vectors): a pass checks that.
    """
    layers = list(model.modules())
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d) and "weight" in layer._parameters]
    images = isinstance(input_shape, tuple) and len(input_shape) == 3
    if not (images and convolutions):
        return torch.contiguous_format
    before = [layer.weight.data for layer in convolutions]
    device, dtype = before[0].device, before[0].dtype
    slower = (nn.GroupNorm, nn.BatchNorm2d) if device.type == "cpu" else (nn.GroupNorm,)
    if any(isinstance(layer, slower) for layer in layers):
        return torch.contiguous_format
    example = torch.rand((2, *input_shape), generator=torch.Generator().manual_seed(0))
    example = example.to(device, dtype, memory_format=torch.channels_last)
    modes = [(layer, layer.training) for layer in layers]
    try:
        for layer in convolutions:
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        with preserving_state(model), drawing_from(random_states(device), device):
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad(model.train()(example).sum(), trained, allow_unused=True)
    except Exception:  # a user's model raises what it likes
        for layer, weight in zip(convolutions, before):
            layer.weight.data = weight
        return torch.contiguous_format
    finally:
        for layer, mode in modes:
            layer.training = mode
    return torch.channels_last


def smallest_micro_batch(model: nn.Module, input_shape: Any, example: Any = None) -> int:
    """Fewest samples in a training pass: two where BatchNorm has maps of a single position, else one."""
    if not couples_samples(model):
        return 1
    try:
        _dry_output(model, torch.zeros(input_shape) if example is None else example, 1, training=True)
    except Exception as error:  # whatever else is wrong with the model is said where it is trained
        return 2 if "more than 1 value per channel" in str(error) else 1
    return 1


def refuse_loss(model: nn.Module, loss: Loss, inputs: Any, targets: Any, config: Config) -> None:
    """Try the loss on two samples.

    Raises:
        UsageError: it fails on the model's outputs, returns neither one loss per sample nor their mean, or returns
            their sum, with which the step would depend on how a batch is cut.
    """
    name = f"--loss={config.loss}" if config.loss else f"--dataset={config.dataset}: its loss"
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), preserving_state(model), drawing_from(random_states(device), device):
            outputs = model.eval()(inputs)
            losses = loss(outputs, targets)
    except Exception as error:  # a user's loss raises what it likes
        raise UsageError(f"{name} does not work on what {config.model} gives: {in_one_line(error)}") from None
    if not isinstance(losses, Tensor) or tuple(losses.shape) not in ((), (2,)):
        given = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise UsageError(f"{name} gives {given} for 2 samples: give their losses (2,), or the mean of these ()")
    if losses.dim() == 0 and _adds_up(loss, outputs, targets, losses):
        raise UsageError(
            f"{name} gives the sum of the samples' losses: give their losses (2,), or the mean of these ()"
        )


@torch.no_grad()
def _adds_up(loss: Loss, outputs: Any, targets: Any, of_both: Tensor) -> bool:
    """The loss of two samples is the sum of their losses, and not the mean."""
    try:
        singles = [loss(*(some(tree, slice(i, i + 1)) for tree in (outputs, targets))) for i in range(2)]
    except Exception:  # a user's loss raises what it likes, as of a single sample
        return False
    total = sum(float(single) for single in singles)
    return abs(float(of_both) - total) < 0.1 * abs(float(of_both) - total / 2)


def refuse_unused_parameters(model: nn.Module, loss: Loss, inputs: Any, targets: Any, config: Config) -> None:
    """Refuse unused parameters: DDP waits for the gradient of every parameter.

    Raises:
        UsageError: the loss of these samples does not depend on some.
    """
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    device = parameters[0].device
    with preserving_state(model), drawing_from(random_states(device), device):
        outputs = model.train()(inputs)  # some heads are there in training only
        of_loss = torch.autograd.grad(loss(outputs, targets), parameters, allow_unused=True)
    unused = [name for name, gradient in zip(names, of_loss) if gradient is None]
    if unused:
        raise UsageError(
            f"--strategy: {config.model} does not use {listed(unused)}, and --devices={config.devices} would wait for "
            "the gradient: add --strategy=ddp_find_unused_parameters_true"
        )


def _dry_output(model: nn.Module, example: Any, n: int, training: bool = False) -> Any:
    """One forward pass on n noise inputs shaped like the example; integers are repeated instead.

    The model is unchanged, except that lazy layers are initialised.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(part: Any) -> Tensor:
        part = torch.as_tensor(part)
        if part.is_floating_point() or (part.dtype == torch.uint8 and part.dim() == 3):
            return torch.rand((n, *part.shape), generator=generator)
        return part.expand(n, *part.shape)

    inputs = tree_map(noise, example)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.train(training)
            if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
                model.eval()(inputs)
                model.train(training)
            cpu = torch.device("cpu")
            with preserving_state(model), drawing_from(random_states(cpu), cpu):
                return model(inputs)
    finally:
        for module, mode in modes:
            module.training = mode


def _torchvision_factory(name: str):
    def create(image_shape: ImageShape, num_classes: int, **arguments) -> nn.Module:
        builder = torchvision.models.get_model_builder(name)
        arguments = {**_size_arguments(name, image_shape), **arguments}
        model = builder(weights=None, num_classes=num_classes, **arguments)
        for auxiliary in ("AuxLogits", "aux1", "aux2"):  # no auxiliary heads
            if hasattr(model, auxiliary):
                setattr(model, auxiliary, None)
        channels, height, width = image_shape
        if isinstance(model, torchvision.models.ResNet) and max(height, width) <= 32:
            model.conv1 = nn.Conv2d(channels, model.conv1.out_channels, 3, stride=1, padding=1, bias=False)
            model.maxpool = nn.Identity()
        if channels != 3:
            _change_input_channels(model, channels)
        return model

    return create


def _size_arguments(name: str, image_shape: ImageShape) -> dict:
    """Arguments for torchvision's builders: image sizes of transformers, and no auxiliary heads."""
    _, height, width = image_shape
    if name.startswith("vit_"):
        if height != width:
            raise ValueError("vision transformers need square images")
        return {"image_size": height}
    if name.startswith("maxvit"):
        return {"input_size": (height, width)}
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {}


def _change_input_channels(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one that takes `channels` channels instead of three."""
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels == 3:
                arguments = {
                    key: getattr(module, key) for key in inspect.signature(nn.Conv2d).parameters if hasattr(module, key)
                }
                arguments |= {"in_channels": channels, "bias": module.bias is not None}
                parent_name, _, child_name = module_name.rpartition(".")
                setattr(model.get_submodule(parent_name), child_name, nn.Conv2d(**arguments))
            return
