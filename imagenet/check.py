"""Name the images of a folder that --dataset=imagenet could not read, before a training meets them.

    python -m imagenet.check /data/imagenet            headers and ends of files, some thousand images a second
    python -m imagenet.check /data/imagenet --whole    decode every image

looks through FOLDER/train and FOLDER/val. Exit status: 0 all can be read, 1 some cannot (one line each on standard
output), 2 the folder is not laid out as it has to be.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from imagenet import folders
from launch.terminals import show_what_can_be_shown
from options.errors import UsageError
from options.names import expanded

CHUNK = 4096
"""Images that are handed out at once."""


def check(folder: Path, whole: bool, workers: int) -> int:
    """Print a line for each image that cannot be read; returns their number.

    Raises:
        UsageError: this is no image folder.
    """
    unreadable = 0
    for split, files in folders.find(folder).items():
        # Threads: Python waits while the disk and Pillow's decoders work.
        with ThreadPoolExecutor(workers) as pool, tqdm(total=len(files), desc=split, unit=" images") as bar:
            for first in range(0, len(files), CHUNK):
                paths = [files.path(index) for index in range(first, min(first + CHUNK, len(files)))]
                for path, problem in zip(paths, pool.map(partial(folders.problem, whole=whole), paths)):
                    bar.update()
                    if problem:
                        unreadable += 1
                        with tqdm.external_write_mode():
                            print(f"{path}: {problem}", flush=True)
    return unreadable


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m imagenet.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--whole", action="store_true", help="decode every image, which takes as long as an epoch")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="threads (default: all cores)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program on these arguments (default: `sys.argv`); returns the exit status."""
    show_what_can_be_shown()
    options = parse(arguments)
    try:
        unreadable = check(expanded("folder", options.folder), options.whole, max(1, options.num_workers))
    except UsageError as error:
        print(f"imagenet.check: error: {error}", file=sys.stderr, flush=True)
        return 2
    print(f"{unreadable:,} images cannot be read" + ": repair or remove them" * bool(unreadable), flush=True)
    return int(unreadable > 0)


if __name__ == "__main__":
    sys.exit(main())
