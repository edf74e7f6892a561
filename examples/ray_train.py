"""A run of main.py as a job of Ray Train: on as many workers as there are, and on after some are lost or added.

    python examples/ray_train.py --workers=1:4 --gpus --storage=/shared/ray -- --model=resnet18 --dataset=cifar10 …

Options after `--` are main.py's. All machines must see the repository, the storage, and the folder in which this is
typed. The run's folder is STORAGE/NAME/run. Where a worker is lost, or Ray finds an added machine (it looks every
`--look` seconds), it starts another group with the workers that there are then, and the run goes on from its newest
checkpoint with the same samples. The exit status is main.py's.
Needs `pip install -r requirements-ray.txt`.
"""

import argparse
import os
import sys
from pathlib import Path

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from options import command_line  # noqa: E402
from options.errors import REFUSED, UsageError, say_error  # noqa: E402


def train_func(job: dict) -> int:
    """On every worker, in the group that Ray has made; returns the exit status.

    What is raised, such as the loss of another worker, makes Ray start a new group. What would only happen again is
    returned.

    Args:
        job: folder: to be in (Ray's is another); arguments: main.py's.
    """
    os.chdir(job["folder"])
    # Each counts as a machine of its own with one GPU: Ray may have put two on one machine and one on another.
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    from launch import environments

    environments.take_as_given()
    import main

    class Reporting(main.Trainer):
        """Tells Ray of every evaluation, and of the folder that has the checkpoints."""

        def log_step(self, row, evaluation):
            super().log_step(row, evaluation)
            if evaluation:  # so have all workers: `report` waits for them
                told = {name: row[name] for name in ("step", "samples", "batch_size", "world_size")}
                log = self.reporter.log  # the first worker's
                folder = Checkpoint.from_directory(log.folder) if log else None
                ray.train.report(told | evaluation, folder, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)

    main.Trainer = Reporting
    try:
        return main.run(command_line.parse(job["arguments"]))
    except UsageError as error:
        if environments.rank() == 0:
            say_error(str(error))
        return REFUSED


def workers(words: str) -> int | tuple[int, int]:
    """ "4", or "1:4": the least and the most of them."""
    least, _, most = words.partition(":")
    return (int(least), int(most)) if most else int(least)


def main(arguments: list[str] | None = None) -> int:
    """The job from its begin to its end; returns the exit status.

    Raises:
        UsageError: main.py does not take its options.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workers", type=workers, default=1, help="processes, or as 1:4 the least and the most of them"
    )
    parser.add_argument(
        "--look", type=float, default=60.0, help="seconds between looks for machines that were added (default: 60)"
    )
    parser.add_argument("--gpus", action="store_true", help="a GPU for each; default: a CPU core")
    parser.add_argument("--storage", type=Path, required=True, help="folder that all machines see")
    parser.add_argument("--name", default="adadagrad", help="a job of the same name goes on (default: %(default)s)")
    parser.add_argument("arguments", nargs="*", metavar="-- OPTIONS", help="of main.py")
    options = parser.parse_args(arguments)
    storage = options.storage.resolve()
    own = [f"--out_dir={storage / options.name}", "--run_name=run", "--resume=auto"]
    words = [*options.arguments, *own, f"--accelerator={'gpu' if options.gpus else 'cpu'}"]
    timeout = 60 * command_line.parse(words).timeout_minutes
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": path, "TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES": "0"}})
    result = TorchTrainer(
        train_func,
        train_loop_config={"folder": os.getcwd(), "arguments": words},
        torch_config=TorchConfig(backend="nccl" if options.gpus else "gloo", timeout_s=timeout),
        scaling_config=ScalingConfig(
            num_workers=options.workers, use_gpu=options.gpus, elastic_resize_monitor_interval_s=options.look
        ),
        run_config=RunConfig(
            name=options.name, storage_path=str(storage), failure_config=FailureConfig(max_failures=100)
        ),
    ).fit()
    print(f"{result.metrics}, in {result.checkpoint.path}" if result.checkpoint else "nothing was evaluated")
    return result.return_value


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        say_error(str(error))
        sys.exit(REFUSED)
