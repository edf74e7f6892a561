"""How fast the sample stream reads images of ImageNet's form, for one micro-batch size and for one that always changes.

    python -m benchmarks.stream

Images are made for it: smooth noise of about 500×375 pixels, JPEGs of some 40 kB. Each source is read by one stream
from first to last, in turns: a stretch of micro-batches of one size, a stretch in which each has another size. ffcv's
own Loader, which knows one size only, stands beside. The second table is what the stream keeps for a training set of
ImageNet's size.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from PIL import Image

import batches
import data
from adadagrad.order import SampleOrder
from batches.augment import Normalise
from benchmarks.cases import RESULTS, provenance
from imagenet import convert, sources

FIXED = 64
CHANGING = (1, 127, 40, 88, 13, 115, 64, 3, 125, 31, 97, 64)  # their mean is 64, too
FULL_SIZE = 1_281_167


def write_images(folder: Path, classes: int = 4, train: int = 200, val: int = 4) -> None:
    rng = np.random.default_rng(0)
    for split, images in (("train", train), ("val", val)):
        for label in range(classes):
            (folder / split / f"class{label}").mkdir(parents=True)
            for i in range(images):
                pixels = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                size = int(rng.integers(450, 550)), int(rng.integers(330, 420))
                pixels = np.asarray(pixels.resize(size, Image.Resampling.BICUBIC)) // 8 * 7
                pixels += rng.integers(0, 20, pixels.shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{i}.JPEG", quality=90)


def micro_batches(start: int, sizes: Iterator[int], samples: int) -> Iterator[range]:
    stop = start + samples
    while start < stop:
        end = min(start + next(sizes), stop)
        yield range(start, end)
        start = end


def rates(data_dir: Path, num_workers: int, samples: int, rounds: int) -> dict[str, list[float]]:
    """Samples a second in each stretch of `samples`."""
    loaded = data.load("imagenet", data_dir)
    source = batches.build(loaded, 0, True, torch.device("cpu"), torch.float32, num_workers)
    result = {"fixed": [], "changing": []}
    for start, kind in zip(count(0, samples), ["fixed", *["fixed", "changing"] * rounds]):  # the first one warms up
        sizes = cycle((FIXED,) if kind == "fixed" else CHANGING)
        started = time.perf_counter()
        for _ in source.take(micro_batches(start, sizes, samples)):
            pass
        result[kind].append(samples / (time.perf_counter() - started))
    result["fixed"].pop(0)
    return result


def rates_of_ffcv_loader(path: Path, num_workers: int, rounds: int) -> list[float]:
    """Samples a second in each epoch of ffcv's own Loader, which decodes, crops and flips in the usual way."""
    from ffcv.fields.decoders import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    side = sources.RESOLUTION
    image = [RandomResizedCropRGBImageDecoder((side, side)), RandomHorizontalFlip(), ToTensor(), ToTorchImage(False)]
    pipelines = {"image": image, "label": [IntDecoder(), ToTensor()]}
    options = {"order": OrderOption.RANDOM, "drop_last": False, "pipelines": pipelines}
    loader = Loader(str(path), FIXED, num_workers, **options)
    torch.set_num_threads(1)
    normalise = Normalise(data.load("imagenet", path.parent), torch.device("cpu"), torch.float32)
    result = []
    for _ in range(rounds + 1):
        started, samples = time.perf_counter(), 0
        for images, labels in loader:
            normalise(images)  # as the stream does
            samples += len(labels)
        result.append(samples / (time.perf_counter() - started))
    return result[1:]  # the first one compiles


def bookkeeping() -> dict[str, float]:
    """Bytes and seconds of the sample order of a training set of ImageNet's size."""
    order = SampleOrder(FULL_SIZE, 0, True)
    started = time.perf_counter()
    for epoch in range(3):
        order.samples(range(epoch * FULL_SIZE, epoch * FULL_SIZE + 32))
    seconds = (time.perf_counter() - started) / 3
    return {"bytes_an_epoch": order._permutation(2).nbytes, "seconds_an_epoch": seconds}


def summary(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"


def table(results: dict[str, dict[str, list[float]]], order: dict[str, float]) -> str:
    lines = [
        f"| source | micro-batches of {FIXED} | sizes from {min(CHANGING)} to {max(CHANGING)} | ratio |",
        "|---|---|---|---|",
    ]
    for name, rates_of in results.items():
        fixed, changing = rates_of["fixed"], rates_of.get("changing")
        ratio = statistics.median(changing) / statistics.median(fixed) if changing else None
        cells = (summary(changing), f"{ratio:.3f}") if changing else ("–", "–")
        lines.append(f"| {name} | {summary(fixed)} | {cells[0]} | {cells[1]} |")
    lines.append("\nSamples a second, median (least–most) of the stretches.\n")
    lines.append(
        f"Order of {FULL_SIZE:,} samples: {order['bytes_an_epoch'] / 1e6:.1f} MB and "
        f"{order['seconds_an_epoch']:.3f} s an epoch, at most two epochs at a time."
    )
    return "\n".join(lines)


def main(num_workers: int = 2, samples: int = 1600, rounds: int = 5, out: Path = RESULTS) -> None:
    """Samples a second of the sample stream from an image folder and from ffcv files.

    Args:
        num_workers: worker processes (threads for ffcv's own Loader).
        samples: in each stretch that is timed.
        rounds: stretches of each kind.
        out: folder for stream.md and stream.json.
    """
    torch.set_num_threads(1)
    order = bookkeeping()
    with tempfile.TemporaryDirectory() as temporary:
        folder, ffcv = Path(temporary) / "folder", Path(temporary) / "ffcv"
        write_images(folder)
        convert.main([str(folder), str(ffcv), f"--num_workers={os.cpu_count()}"])
        results = {
            "ffcv files": rates(ffcv, num_workers, samples, rounds),
            "image folder": rates(folder, num_workers, samples, rounds),
        }
        # In a process of its own: it changes the number of threads and leaves compiled code behind.
        script = "import sys, json, pathlib; from benchmarks import stream; "
        script += "print(json.dumps(stream.rates_of_ffcv_loader(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))))"
        path = sources.find_ffcv_files(ffcv)[0]
        command = [sys.executable, "-c", script, str(path), str(num_workers), str(rounds)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout
        results["ffcv's own Loader"] = {"fixed": json.loads(said.splitlines()[-1])}
    text = f"{table(results, order)}\n\n`python -m benchmarks.stream --num_workers={num_workers}` on {provenance()}.\n"
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": provenance(), "num_workers": num_workers, "order": order, "rates": results}
    (out / "stream.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "stream.md").write_text(text)
    print(text)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
