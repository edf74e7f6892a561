"""ImageNet, or any data set of its form: ffcv files, or a folder of images.

In `data_dir`, the first of these that is there is used:
    train*.ffcv, val*.ffcv                                 as the ffcv-imagenet tools and imagenet.convert write them
    train/CLASS/*.JPEG, val/CLASS/*.JPEG                   an image folder (folders.py)

Both are map-style data sets for the sample stream: 224×224 uint8 images, in training a random-resized crop, flipped at
random, both drawn by torch's generator, which the stream seeds for every sample; in validation the centre.

The ffcv files are read by ffcv's own reader and decoded by its own library, but not through its Loader: that one draws
crops which do not depend on the position alone, keeps hundreds of bytes of Python objects for each sample, and
leaves the program hanging when its thread meets an error.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from imagenet import folders
from options.errors import UsageError, in_one_line

RESOLUTION = 224
CENTRE = 224 / 256
"""In validation: side of the crop over the shorter side of the image."""
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""In training: area of the crop over that of the image, and its width over its height."""

FFCV_NAME = "{split}_{resolution}_{jpeg_share:.2f}_{quality}.ffcv"
DEFAULTS = {"resolution": 500, "jpeg_share": 0.5, "quality": 90}
INSTALL = (
    "apt-get install pkg-config libopencv-dev libturbojpeg0-dev (or these libraries by another way), "
    "then pip install -r requirements-imagenet.txt"
)


def load(data_dir: Path) -> tuple[Dataset, Dataset, int]:
    """Training and validation samples, and the number of classes: of the folder, or that of the file's labels.

    Raises:
        UsageError: neither ffcv files nor an image folder is there, or ffcv is not installed.
    """
    if files := find_ffcv_files(data_dir):
        train, val = FfcvImages(files[0], train=True), FfcvImages(files[1], train=False)
        return train, val, int(train.labels.max(initial=0)) + 1
    if not any((data_dir / split).is_dir() for split in folders.SPLITS):
        raise UsageError(
            f"--data_dir={data_dir} has neither ffcv files (train*.ffcv and val*.ffcv, made by "
            "`python -m imagenet.convert`) nor an image folder (train/CLASS/*.JPEG and val/CLASS/*.JPEG): "
            "put one of them there"
        )
    files = folders.find(data_dir)
    train, val = FolderImages(files["train"], train=True), FolderImages(files["val"], train=False)
    return train, val, len(files["train"].classes)


def find_ffcv_files(data_dir: Path) -> tuple[Path, Path] | None:
    """The pair of ffcv files; the default names come first.

    Raises:
        UsageError: one of the pair is missing, or there are several pairs.
    """
    preferred = [data_dir / FFCV_NAME.format(split=split, **DEFAULTS) for split in ("train", "val")]
    if all(path.is_file() for path in preferred):
        return tuple(preferred)
    found = [sorted(data_dir.glob(f"{split}*.ffcv")) for split in ("train", "val")]
    if not any(found):
        return None
    if [len(files) for files in found] != [1, 1]:
        names = ", ".join(path.name for files in found for path in files)
        raise UsageError(f"--data_dir={data_dir} needs one train*.ffcv and one val*.ffcv, but has {names}")
    return found[0][0], found[1][0]


class FolderImages(Dataset):
    """The images of a folder."""

    def __init__(self, files: folders.ImageFiles, train: bool):
        self.files = files
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(RESOLUTION, SCALE, RATIO),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
            ]
            if train
            else [
                transforms.Resize(round(RESOLUTION / CENTRE)),
                transforms.CenterCrop(RESOLUTION),
                transforms.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.files.path(index)
        with folders.naming(path):
            return self.transform(folders.read(path)), int(self.files.labels[index])


class FfcvImages(Dataset):
    """The images of an ffcv file; 21 bytes a sample are held in memory, and the file itself is mapped."""

    def __init__(self, path: Path, train: bool):
        ffcv = import_ffcv()
        self.path, self.train = path, train
        self._decode_jpeg, self._resize_crop = ffcv.libffcv.imdecode, ffcv.libffcv.resize_crop
        self._centre_crop = ffcv.fields.rgb_image.get_center_crop
        self._jpeg = ffcv.fields.rgb_image.IMAGE_MODES["jpg"]
        header = np.fromfile(path, ffcv.types.HeaderType, count=1)
        whole = len(header) and 0 < header["alloc_table_ptr"][0] < path.stat().st_size  # that table is written last
        if whole:
            reader = ffcv.reader.Reader(str(path))
            image, label = (f"f{reader.field_names.index(name)}" for name in ("image", "label"))
            self.entries = np.ascontiguousarray(reader.metadata[image])
            self.labels = reader.metadata[label].astype(np.int32)
            self.sizes = _sizes(reader.alloc_table, self.entries["data_ptr"])
        if not whole or self.sizes is None:
            raise UsageError(f"{path} is not whole: the program that wrote it was interrupted: write it again")
        self.bytes = np.asarray(np.memmap(path, np.uint8, "r"))

    def __reduce__(self):
        return type(self), (self.path, self.train)  # a worker process that is not forked opens the file itself

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._image(index)
        top, left, height, width = self._crop(*image.shape[:2])
        crop = np.empty((RESOLUTION, RESOLUTION, 3), np.uint8)
        self._resize_crop(image, top, top + height, left, left + width, crop)
        crop = torch.from_numpy(crop).permute(2, 0, 1)
        if self.train and torch.rand(1) < 0.5:
            crop = crop.flip(2)
        return crop, int(self.labels[index])

    def _image(self, index: int) -> np.ndarray:
        """As it is in the file: uint8 (height, width, 3)."""
        mode, width, height, start = self.entries[index].item()
        content = self.bytes[start : start + int(self.sizes[index])]
        if mode != self._jpeg:
            return content.reshape(height, width, 3)
        image = np.empty((height, width, 3), np.uint8)
        if self._decode_jpeg(content, image, height, width, height, width, 0, 0, 1, 1, False, False):
            raise OSError(f"{self.path}: damaged JPEG")
        return image

    def _crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height, width."""
        if not self.train:
            return self._centre_crop(height, width, None, CENTRE)
        shape_only = torch.empty((3, height, width), dtype=torch.uint8, device="meta")
        return transforms.RandomResizedCrop.get_params(shape_only, SCALE, RATIO)


def _sizes(table: np.ndarray, starts: np.ndarray) -> np.ndarray | None:
    """Bytes of the images that begin at `starts`, from an ffcv file's allocation table; None where one is not in it."""
    order = np.argsort(table["ptr"])
    known = table["ptr"][order]
    at = np.searchsorted(known, starts)
    if len(known) == 0 or at.max(initial=0) == len(known) or (known[at] != starts).any():
        return None
    return table["size"][order][at].astype(np.uint32)


def import_ffcv():
    """The package, and what is used of it.

    Raises:
        UsageError: it is not installed, or a library that it needs is missing.
    """
    threads = torch.get_num_threads()
    try:
        import ffcv
        import ffcv.fields.rgb_image
        import ffcv.libffcv
        import ffcv.reader
        import ffcv.writer
    except (ImportError, OSError) as error:
        raise UsageError(f"ffcv files need ffcv ({in_one_line(error)}): {INSTALL}") from None
    finally:
        torch.set_num_threads(threads)  # ffcv sets it to 1
    return ffcv
