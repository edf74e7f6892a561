"""Models by name: two small ones for any image shape, every torchvision classifier, and a user's own."""

import inspect
import warnings

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradients import Loss, couples_samples, drawing_from, listed, random_states, untouched
from launch.options import Config, UsageError, import_object, in_one_line, nearest

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


OWN = {"logistic": logistic, "cnn": cnn}


def names() -> list[str]:
    """All names that `build` knows."""
    return [*OWN, *torchvision.models.list_models(module=torchvision.models)]


def build(name: str, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """The model of that name, for images of this shape; weights are random (set the seed before).

    An import path `package.module:function` names a function `(image_shape, num_classes) -> nn.Module`.

    Raises:
        UsageError: unknown name, or a model that cannot take such images.
    """
    if ":" in name:
        create = import_object("model", name)
    elif name in OWN:
        create = OWN[name]
    elif name in names():
        create = _torchvision_factory(name)
    else:
        raise UsageError(
            f"--model={name} is unknown{nearest(name, names())} (logistic, cnn or a torchvision classifier)"
        )
    size = "×".join(map(str, image_shape))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision announces changes of its initialisers
            model = create(image_shape, num_classes)
            if not isinstance(model, nn.Module):
                raise TypeError(f"it gives {type(model).__name__}, not torch.nn.Module")
            output_shape = _output_shape(model, (2, *image_shape))
    except Exception as error:  # a user's model raises what it likes
        raise UsageError(
            f"--model={name} does not work on images of {size} (channels × height × width): {in_one_line(error)}: "
            "choose another --model or --dataset"
        ) from None
    if output_shape != (2, num_classes):
        raise UsageError(
            f"--model={name} gives an output of shape {output_shape} for 2 images, not (2, {num_classes}): "
            "choose another --model, or end it in one number for each class"
        )
    return model


def smallest_micro_batch(model: nn.Module, image_shape: ImageShape) -> int:
    """Samples that a training pass needs at least: two where BatchNorm meets maps of a single position, else one."""
    if not couples_samples(model):
        return 1
    try:
        _output_shape(model, (1, *image_shape), training=True)
    except Exception as error:  # whatever else is wrong with the model is said where it is trained
        return 2 if "more than 1 value per channel" in str(error) else 1
    return 1


def refuse_unused_parameters(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, config: Config) -> None:
    """DDP waits for the gradient of every parameter, unless it is told not to.

    Raises:
        UsageError: the loss of these samples does not depend on some.
    """
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    model.eval()  # running statistics stay as they are
    of_loss = torch.autograd.grad(loss(model(inputs), targets), parameters, allow_unused=True)
    unused = [name for name, gradient in zip(names, of_loss) if gradient is None]
    if unused:
        raise UsageError(
            f"--strategy: {config.model} does not use {listed(unused)}, and --devices={config.devices} would wait for "
            "the gradient: add --strategy=ddp_find_unused_parameters_true"
        )


def _output_shape(model: nn.Module, input_shape: tuple[int, ...], training: bool = False) -> tuple[int, ...]:
    """One forward pass on noise; the model is left as it was, but that lazy layers now have their parameters."""
    images = torch.rand(input_shape, generator=torch.Generator().manual_seed(0))
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.train(training)
            if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
                model.eval()(images)
                model.train(training)
            cpu = torch.device("cpu")
            with untouched(model), drawing_from(random_states(cpu), cpu):
                output = model(images)
        if not isinstance(output, Tensor):
            raise TypeError(f"its output is {type(output).__name__}, not a tensor of logits")
        return tuple(output.shape)
    finally:
        for module, mode in modes:
            module.training = mode


def _torchvision_factory(name: str):
    def create(image_shape: ImageShape, num_classes: int) -> nn.Module:
        builder = torchvision.models.get_model_builder(name)
        model = builder(weights=None, num_classes=num_classes, **_size_arguments(name, image_shape))
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
    """What torchvision's builders need to be told: image sizes of transformers, and no auxiliary heads."""
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
