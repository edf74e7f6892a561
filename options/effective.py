"""Options as they take effect: what they come to with this data set, this model and these devices, or a refusal."""

from dataclasses import replace
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

from options.errors import UsageError
from options.schema import Config


def resolve(
    config: Config, fabric: Fabric, training_samples: int, validation_samples: int, defaults: dict[str, Any]
) -> Config:
    """The options as they take effect: defaults that depend on the data, and the devices that Fabric really uses.

    Args:
        defaults: values that suit the data set better than the general ones, where the options say nothing.

    Raises:
        UsageError: the options do not fit the data or the devices.
    """
    world_size = fabric.world_size
    if config.validation_samples and config.validation_samples > validation_samples:
        raise UsageError(
            f"--validation_samples={config.validation_samples}: --dataset={config.dataset} has {validation_samples} "
            "samples for validation: lower it, or leave it out to take all"
        )
    general = {"max_samples": 30 * training_samples}
    effective = {name: value for name, value in (general | defaults).items() if getattr(config, name) is None}
    if "validation_samples" in effective:
        effective["validation_samples"] = min(effective["validation_samples"], validation_samples)
    if config.stagewise_ramp_up:
        sizes = config.global_batch_sizes
        effective["batch_size"] = sizes[0]
        length = effective.get("max_samples", config.max_samples)
        if config.training_type == "iter" and any(isinstance(stage, str) for stage in config.samples_stages):
            raise UsageError(
                "--samples_stages: shares such as 25% are of max_samples, and --training_type=iter ends by steps: give "
                "numbers of samples"
            )
        stages = config.samples_stages or [length // len(sizes)] * len(sizes)
        effective["samples_stages"] = [
            round(float(stage[:-1]) / 100 * length) if isinstance(stage, str) else stage for stage in stages
        ]
    unit = {"sample": "samples", "iter": "iters"}[config.lr_decay_type]
    if config.decay_lr and config.scheduler != "multistep" and getattr(config, f"lr_decay_{unit}") is None:
        effective[f"lr_decay_{unit}"] = effective.get(f"max_{unit}", getattr(config, f"max_{unit}"))
    if config.max_batch_size is None:
        effective["max_batch_size"] = max([training_samples, *config.global_batch_sizes])
    if training_samples < world_size:
        raise UsageError(
            f"--dataset={config.dataset} has {training_samples} training samples for {world_size} devices: "
            "use fewer --devices"
        )
    option, smallest = smallest_batch(config)
    if smallest < world_size:
        raise UsageError(
            f"--{option}: a batch of {smallest} cannot be shared by {world_size} devices: "
            "raise it or use fewer --devices"
        )
    return replace(
        config,
        **effective,
        accelerator="cpu" if fabric.device.type == "cpu" else "cuda",
        devices=world_size // getattr(fabric.strategy, "num_nodes", 1),
        num_nodes=getattr(fabric.strategy, "num_nodes", 1),
        strategy=strategy_name(fabric),
        precision=fabric._precision.precision,
    )


def smallest_batch(config: Config) -> tuple[str, int]:
    """The option that says it, and its samples."""
    if config.stagewise_ramp_up:
        return "global_batch_sizes", min(config.global_batch_sizes)
    return "batch_size", config.batch_size


def strategy_name(fabric: Fabric) -> str:
    """As `--strategy` has it: what Fabric really uses."""
    if isinstance(fabric.strategy, ModelParallelStrategy):
        return "fsdp"
    if not isinstance(fabric.strategy, DDPStrategy):
        return "auto"
    finds_unused = fabric.strategy._ddp_kwargs.get("find_unused_parameters")
    return "ddp_find_unused_parameters_true" if finds_unused else "ddp"


def refuse_single_samples(config: Config, world_size: int, least: int) -> None:
    """Where BatchNorm meets maps of one position, a micro-batch of one sample has nothing to normalise by.

    Args:
        least: samples that a training pass of the model needs.

    Raises:
        UsageError: a device would get fewer.
    """
    option, smallest = smallest_batch(config)
    if least > 1 and smallest // world_size < least:
        raise UsageError(
            f"--{option}: {config.model} has BatchNorm on 1×1 maps of these images and needs at least {least} "
            f"samples a device: use {least * world_size} or more, or fewer --devices"
        )
    if least > 1 and config.max_micro_batch_size != "auto" and config.max_micro_batch_size < 3:
        raise UsageError(f"--max_micro_batch_size: {config.model} has BatchNorm on 1×1 maps and needs 3 or more")


def refuse_a_single_worker(config: Config, world_size: int) -> None:
    """
    Raises:
        UsageError: nothing to compare.
    """
    if config.test_gradients == "worker" and world_size * config.gradient_accumulation_steps < 2:
        raise UsageError(
            "--test_gradients=worker compares the gradients of workers, and here is one: take micro_batch, or "
            "--gradient_accumulation_steps=2 or more"
        )


def refuse_unequal_numbers(config: Config, module: torch.nn.Module, least: int) -> None:
    """SyncBatchNorm exchanges statistics in every micro-batch, shards are gathered: ranks need the same number of them.

    Args:
        least: samples that a training pass of the model needs.

    Raises:
        UsageError: micro-batches are so small that a rank with a sample less may have one less of them.
    """
    synchronised = any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in module.modules())
    who = "SyncBatchNorm needs" if synchronised else "shards need"
    size = config.max_micro_batch_size
    if (synchronised or config.strategy == "fsdp") and size != "auto" and size < 2 * least:
        raise UsageError(
            f"--max_micro_batch_size={size}: {who} as many micro-batches on every rank: take {2 * least} or more"
        )
