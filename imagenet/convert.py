"""Turn an image folder into ffcv files for --dataset=imagenet.

    python -m imagenet.convert /data/imagenet /data/imagenet-ffcv

reads IMAGE_FOLDER/train/CLASS/*.JPEG and IMAGE_FOLDER/val/CLASS/*.JPEG as the training does, and writes
train_500_0.50_90.ffcv and val_500_0.50_90.ffcv (resolution, share of JPEG, quality) into OUT_DIR. A file gets its name
when it is whole, and one that is whole already is left alone: after an interruption, the same command begins anew the
file that it was at, no other. Images that cannot be read are left out and named (`python -m imagenet.check` finds them
before). Exit status: 0 done, 2 refused, 130 or 143 interrupted.
"""

import _thread
import argparse
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imagenet import folders
from imagenet.sources import DEFAULTS, FFCV_NAME, FfcvImages, import_ffcv
from launch.terminals import show_what_can_be_shown
from options.errors import UsageError, in_one_line
from options.names import expanded

SMALLEST_PAGE = 2**23  # bytes; an image has to fit into one page of the file


class RecordedImages:
    """Images of a folder and their labels; those that cannot be read are recorded and stood in for, not raised.

    ffcv's writer, whose processes read them, would wait for ever for one that an exception has ended.
    """

    def __init__(self, files: folders.ImageFiles, record: Path):
        self.files, self.record = files, record
        record.write_text("", encoding="utf-8")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        label = int(self.files.labels[index])
        try:
            return np.asarray(folders.read(self.files.path(index))), label
        except Exception as error:  # memory, too, may not suffice
            with open(self.record, "a", encoding="utf-8") as file:
                file.write(f"{index} {in_one_line(error)}\n")
            return np.zeros((1, 1, 3), np.uint8), label

    def unreadable(self) -> dict[int, str]:
        """Index → reason."""
        lines = self.record.read_text(encoding="utf-8").splitlines()
        return {int(index): reason for index, reason in (line.split(maxsplit=1) for line in lines)}


def convert(images: folders.ImageFiles, target: Path, workers: int, **encoding) -> None:
    """Write the images into the ffcv file `target`, which appears when it is whole.

    Raises:
        UsageError: no image can be read, or one of the worker processes was ended.
    """
    if is_whole(target):
        print(f"{target} already exists and is complete: remove it to write it anew", flush=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished, record = (target.with_name(f".{target.name}.{kind}") for kind in ("unfinished", "unreadable"))
    try:
        print(f"{target}: {len(images):,} images", flush=True)
        unreadable = write(unfinished, record, images, workers, **encoding)
        if len(unreadable) == len(images):
            raise UsageError(f"{images.root}: none of the {len(images):,} images can be read")
        leave_out(unfinished, np.array(list(unreadable), dtype=np.int64))
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
        record.unlink(missing_ok=True)
    for index, reason in sorted(unreadable.items()):
        print(f"left out: {images.path(index)}: {reason}", flush=True)
    print(f"{target}: {len(images) - len(unreadable):,} images written, {len(unreadable):,} left out", flush=True)


def write(
    file: Path,
    record: Path,
    images: folders.ImageFiles,
    workers: int,
    resolution: int,
    jpeg_share: float,
    quality: int,
) -> dict[int, str]:
    """Write all images into an ffcv file, stand-ins for those that cannot be read; these by their index, and why."""
    ffcv = import_ffcv()
    source = RecordedImages(images, record)
    image = ffcv.fields.RGBImageField(
        "proportion", max_resolution=resolution, compress_probability=jpeg_share, jpeg_quality=quality
    )
    page_size = max(SMALLEST_PAGE, 1 << (3 * resolution**2 - 1).bit_length())
    with ended_with_its_workers():
        writer = ffcv.writer.DatasetWriter(
            str(file), {"image": image, "label": ffcv.fields.IntField()}, page_size, workers
        )
        writer.from_indexed_dataset(source)
    return source.unreadable()


def leave_out(file: Path, indices: np.ndarray) -> None:
    """Strike samples from an ffcv file's table of contents and its allocation table, which ends the file, in place."""
    if not len(indices):
        return
    ffcv = import_ffcv()
    reader = ffcv.reader.Reader(str(file))
    kept = np.setdiff1d(np.arange(len(reader.metadata)), indices)
    table = reader.alloc_table[np.isin(reader.alloc_table["sample_id"], kept)].copy()
    table["sample_id"] = np.searchsorted(kept, table["sample_id"])
    header = np.fromfile(file, ffcv.types.HeaderType, count=1)
    header["num_samples"] = len(kept)
    with open(file, "r+b") as content:
        header.tofile(content)
        content.seek(header.nbytes + reader.field_descriptors.nbytes)
        reader.metadata[kept].tofile(content)
        content.seek(int(header["alloc_table_ptr"][0]))
        table.tofile(content)
        content.truncate()


def is_whole(target: Path) -> bool:
    try:
        return target.exists() and len(FfcvImages(target, train=False)) > 0
    except Exception:  # not an ffcv file, or half of one
        return False


class ended_with_its_workers:
    """Ends the block, and the processes started in it, where one is killed (out of memory, …) or a signal comes."""

    def __enter__(self):
        self.program = os.getpid()
        # Of our own, as interrupt_main could not raise what a background job ignores.
        self.handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.over, self.died = threading.Event(), None
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.watch.start()

    def _stop(self, number: int, frame) -> None:
        if os.getpid() != self.program:  # a worker process
            os._exit(128 + number)
        if self.died:
            raise KeyboardInterrupt
        self.over.set()
        print("\nimagenet.convert: interrupted: the same command begins this file anew", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    def _watch(self) -> None:
        workers = set()
        while not self.over.wait(0.05):
            workers |= set(multiprocessing.active_children())
            self.died = next((worker for worker in workers if worker.exitcode), None)
            if self.died:
                _thread.interrupt_main()
                return

    def __exit__(self, kind, error, traceback):
        self.over.set()
        self.watch.join()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind:
            for worker in multiprocessing.active_children():
                worker.terminate()
        if self.died:
            raise UsageError(
                f"a worker process ended with exit code {self.died.exitcode}: is there enough memory and disk space? "
                "Else take fewer --num_workers"
            ) from None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def number(kind, low, high=None):
        def parsed(text: str):
            value = kind(text)
            if value < low or (high is not None and value > high):
                raise ValueError
            return value

        parsed.__name__ = f"number from {low}" + (f" to {high}" if high is not None else "")
        return parsed

    parser = argparse.ArgumentParser(
        prog="python -m imagenet.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="IMAGE_FOLDER")
    add("out_dir", type=Path, metavar="OUT_DIR")
    default = "(default: %(default)s)"
    add("--resolution", type=number(int, 1), default=DEFAULTS["resolution"],
        help=f"images are made smaller where their longer side is above this [pixels] {default}")  # fmt: skip
    add("--jpeg_share", type=number(float, 0, 1), default=DEFAULTS["jpeg_share"],
        help=f"this share of the images is stored as JPEG, the others as they are {default}")  # fmt: skip
    add("--quality", type=number(int, 1, 100), default=DEFAULTS["quality"], help=f"quality of the JPEGs {default}")
    add("--num_workers", type=number(int, 1), default=os.cpu_count(), help="worker processes (default: all cores)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program on these arguments (default: `sys.argv`); returns the exit status."""
    show_what_can_be_shown()
    options = parse(arguments)
    try:
        import_ffcv()
        out_dir = expanded("out_dir", options.out_dir)
        for split, images in folders.find(expanded("folder", options.folder)).items():
            encoding = {name: getattr(options, name) for name in DEFAULTS}
            target = out_dir / FFCV_NAME.format(split=split, **encoding)
            convert(images, target, workers=options.num_workers, **encoding)
    except UsageError as error:
        print(f"imagenet.convert: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def run() -> None:
    """The program, and its end at once: in the interpreter's own, numba's threads (TBB) may wait for each other."""
    try:
        status = main()
    except SystemExit as ending:
        status = ending.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
