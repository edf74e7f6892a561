"""Image folders: which files are images of which class, and reading one as 8-bit RGB.

    train/CLASS/…, val/CLASS/…        images below the class folders, however deep
    val/val_annotations.txt           Tiny-ImageNet: the classes of the images in val/images

The program, `imagenet.convert` and `imagenet.check` all read by this module.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from options.errors import UsageError, in_one_line

SPLITS = ("train", "val")
HIDDEN = (".", "__MACOSX")
"""Prefix of files that operating systems and notebooks leave behind."""
ANNOTATIONS = "val_annotations.txt"
ORIENTATION = 0x0112
"""EXIF tag of the camera's orientation."""


@dataclass(frozen=True)
class ImageFiles:
    """The images of a split: `names[i]` below `root` is of class `classes[labels[i]]`.

    Names are bytes in one array, which worker processes share: ImageNet has 1,281,167 of them.
    """

    root: Path
    classes: list[str]
    names: np.ndarray
    labels: np.ndarray
    in_class_folders: bool = True

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        place = self.classes[self.labels[index]] if self.in_class_folders else ""
        return os.path.join(self.root, place, os.fsdecode(self.names[index]))


def find(folder: Path) -> dict[str, ImageFiles]:
    """The images of the training and the validation set, in the order of their names.

    Raises:
        UsageError: the folder does not have the expected layout.
    """
    for split in SPLITS:
        if not (folder / split).is_dir():
            raise UsageError(f"{folder} has no folder {split}: it needs train/CLASS/*.JPEG and val/CLASS/*.JPEG")
    train, hidden = _in_class_folders(folder / "train")
    if (folder / "val" / ANNOTATIONS).is_file() and (folder / "val" / "images").is_dir():
        val, hidden_in_val = _annotated(folder / "val", train.classes), []
    else:
        val, hidden_in_val = _in_class_folders(folder / "val")
    _refuse_hidden(folder, hidden + hidden_in_val)
    for files in (train, val):
        _refuse_without_classes(files)
    refuse_unlike_classes(folder, train.classes, val.classes)
    for files in (train, val):
        counts = np.bincount(files.labels, minlength=len(files.classes))
        if empty := [files.classes[label] for label in np.flatnonzero(counts == 0)]:
            raise UsageError(
                f"{files.root} has no images for {_some(empty)} (files that end in {', '.join(IMG_EXTENSIONS)}): "
                "put some there, or remove the class from train and val"
            )
    return {"train": train, "val": val}


def _in_class_folders(root: Path) -> tuple[ImageFiles, list[str]]:
    """The images below the class folders of a split, and the names of hidden files there.

    Raises:
        UsageError: a link leads nowhere, or back to a folder that it lies in.
    """
    entries = _entries(root)
    folders = [entry.name for entry in entries if entry.is_dir()]
    classes = [name for name in folders if not name.startswith(HIDDEN)]
    names, labels, hidden = [], [], [name for name in folders if name.startswith(HIDDEN)]
    for label, name in enumerate(classes):
        before, number = len(os.path.join(root, name, "")), len(names)
        for path in _images(os.path.join(root, name), (_identity(root),)):
            if os.path.basename(path).startswith(HIDDEN):
                hidden.append(os.path.join(name, path[before:]))
            else:
                names.append(os.fsencode(path[before:]))
        labels += [label] * (len(names) - number)
    files = ImageFiles(root, classes, np.array(names, dtype=np.bytes_), np.array(labels, dtype=np.int32))
    return files, [os.path.join(root.name, name) for name in hidden]


def _images(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """The images below a folder, in the order of their names; hidden ones, and hidden folders, are among them.

    Args:
        above: identities of the folders that it lies in; links are followed, but not round in a circle.
    """
    if (own := _identity(folder)) in above:
        raise UsageError(f"{folder} is a link to a folder that it lies in: remove it")
    entries = _entries(folder)
    below = [entry for entry in entries if entry.is_dir()]
    for entry in entries:
        if entry.name.lower().endswith(IMG_EXTENSIONS) and not entry.is_dir():
            yield entry.path
    for entry in below:
        if entry.name.startswith(HIDDEN):
            yield entry.path
        else:
            yield from _images(entry.path, (*above, own))


def _entries(folder: str | Path) -> list[os.DirEntry]:
    """What lies in a folder, by name."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    if lost := [entry.path for entry in entries if entry.is_symlink() and not os.path.exists(entry.path)]:
        raise UsageError(
            f"{len(lost)} links in {folder} lead nowhere ({lost[0]} to {os.readlink(lost[0])}): make what they lead to "
            "accessible here (in a container: mount it), or remove them"
        )
    return entries


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _refuse_without_classes(files: ImageFiles) -> None:
    if not files.classes:
        root, split = files.root, files.root.name
        flat = sum(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in os.scandir(root))
        what = f"{flat:,} images, but no class folders" if flat else "no class folders"
        raise UsageError(
            f"{root} has {what}: sort its images into {split}/CLASS/ by their labels (for the official archives of "
            f"ImageNet torchvision.datasets.ImageNet(FOLDER, split='{split}') does it)"
        )


def _refuse_hidden(folder: Path, hidden: list[str]) -> None:
    """Refuse hidden folders and images, which would count as classes and images; other hidden files are ignored."""
    if hidden:
        raise UsageError(
            f"{folder} has {len(hidden)} hidden folders or images among the others, which a file manager or a notebook "
            f"has left there ({_some(hidden)}): remove them"
        )


def _annotated(root: Path, classes: list[str]) -> ImageFiles:
    """Tiny-ImageNet's validation set: lines of a file's name and its class, then a box, with tabs between."""
    number = {name: label for label, name in enumerate(classes)}
    rows = [line.split("\t") for line in (root / ANNOTATIONS).read_text(encoding="utf-8").splitlines() if line.strip()]
    for row in rows:
        if len(row) < 2 or row[1] not in number:
            raise UsageError(f"{root / ANNOTATIONS}: '{' '.join(row)[:80]}' names no class of train: repair the file")
    rows.sort()
    names = np.array([os.fsencode(os.path.join("images", row[0])) for row in rows], dtype=np.bytes_)
    labels = np.array([number[row[1]] for row in rows], dtype=np.int32)
    return ImageFiles(root, classes, names, labels, in_class_folders=False)


def refuse_unlike_classes(folder: Path, train: list[str], val: list[str]) -> None:
    """Classes are numbered in the order of their names: train and val need the same ones."""
    only = {"train": sorted(set(train) - set(val)), "val": sorted(set(val) - set(train))}
    if words := " and ".join(f"{_some(names)} only in {split}" for split, names in only.items() if names):
        count = sum(map(len, only.values()))
        raise UsageError(
            f"{folder}: {count} class folders ({words}) are in only one of train and val: both need the same ones"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + ", …" * (len(names) > 3)


def read(path: str | Path) -> Image.Image:
    """An image in 8-bit RGB, upright; the first one of several in a file.

    16-bit grey values are scaled by 255/65535. The range of 32-bit integers and floating-point numbers is not defined:
    0 to 255 is used as it is, floating-point numbers from 0 to 1 are multiplied by 255.

    Raises:
        OSError: it is no image, damaged, too large, or its values have no known white. Says why; names no file.
    """
    with _opened(path) as (_, image):
        image.load()
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return _rgb(image)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[IO[bytes], Image.Image]]:
    """The file, and the image opened from its header. Raises: OSError, without the file's name."""
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of EXIF data and of what Pillow finds large: it raises where that is too much
        try:
            with Image.open(file) as image:
                yield file, image
        except Image.DecompressionBombError:
            limit = 2 * Image.MAX_IMAGE_PIXELS
            raise OSError(f"it has more than {limit:,} pixels, Pillow's limit: make it smaller") from None
        except UnidentifiedImageError:
            raise OSError("it is empty" if not file.seek(0, os.SEEK_END) else "it is no image") from None
        except OSError:
            raise
        except Exception as error:  # Pillow raises whatever a damaged file leads it to
            raise OSError(in_one_line(error)) from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float32) * (255 / 65535))
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, which older versions of Pillow widen
            return _grey(values * (255 / 65535))
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 255):
            raise OSError(f"its values, {low:g} to {high:g}, are not 8-bit: save it as 8-bit or 16-bit")
        return _grey(values * 255.0 if image.mode == "F" and high <= 1 else values)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(values).astype(np.uint8)).convert("RGB")


def problem(path: str | Path, whole: bool = False) -> str:
    """Why an image cannot be read, "" where it can, as far as header and end tell; `whole`: decode it."""
    try:
        if not whole:
            with _opened(path) as (file, image):
                whole = _may_be_cut_short(file, image.format) or image.mode in ("I", "F")
        if whole:
            read(path)
    except OSError as error:
        return in_one_line(error)
    return ""


def _may_be_cut_short(file: IO[bytes], kind: str | None) -> bool:
    """JPEG and PNG files have a mark at their end; but some programs write more behind it."""
    mark = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(kind, b"")
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 4096))
    return mark not in file.read()


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Raises: OSError with the file's name, and how to find all such files."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path}: {in_one_line(error)} (`python -m imagenet.check FOLDER` names all such files)"
        ) from None
