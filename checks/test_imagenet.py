"""Data of ImageNet's form: image folder, ffcv files and the converter; what is refused; a full-size data set's cost."""

import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import batches
import data
from adadagrad.order import SampleOrder
from checks.conftest import ROOT, column, train
from imagenet import convert, folders, sources
from options.errors import UsageError

CLASSES, TRAIN, VAL = 3, 8, 3  # images a class
FULL_SIZE = 1_281_167  # ImageNet's training set


def write_folder(root: Path) -> Path:
    """Coarse noise, another one for each image; the class is the brightest channel."""
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (4, 4, 3), dtype=np.uint8)
                pixels[..., label] += 100
                size = (int(rng.integers(40, 90)), int(rng.integers(40, 90)))
                Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.JPEG", quality=95)
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="session")
def ffcv():
    """The package, where it is installed."""
    try:
        return sources.import_ffcv()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def ffcv_dir(folder, ffcv, tmp_path_factory) -> Path:
    """The images of `folder`, half of them as JPEG."""
    out = tmp_path_factory.mktemp("ffcv")
    assert convert.main([str(folder), str(out), "--num_workers=2"]) == 0
    return out


def stream_of(data_dir: Path, shuffle: bool = True, **options) -> batches.LoadedStream:
    return batches.build(data.load("imagenet", data_dir), 1, shuffle, torch.device("cpu"), torch.float32, **options)


def test_ffcv_files_hold_the_images_of_the_folder(folder, ffcv_dir):
    """Another encoding and another way to resize, but the same order, crops, flips and labels."""
    assert sorted(path.name for path in ffcv_dir.iterdir()) == ["train_500_0.50_90.ffcv", "val_500_0.50_90.ffcv"]
    of_folder, of_ffcv = data.load("imagenet", folder), data.load("imagenet", ffcv_dir)
    assert isinstance(of_ffcv.train, sources.FfcvImages) and isinstance(of_folder.train, sources.FolderImages)
    assert {int(entry["mode"]) for entry in of_ffcv.train.entries} == {0, 1}  # JPEG and plain
    for loaded in (of_folder, of_ffcv):
        assert (loaded.num_classes, loaded.input_shape) == (CLASSES, (3, 224, 224))
        assert (len(loaded.train), len(loaded.val)) == (CLASSES * TRAIN, CLASSES * VAL)
    (x, labels), (y, ffcv_labels) = (stream_of(place).read(range(CLASSES * TRAIN)) for place in (folder, ffcv_dir))
    assert torch.equal(labels, ffcv_labels)
    distance, to_another = (x - y).abs().flatten(1).mean(1), (x - y.roll(1, 0)).abs().flatten(1).mean(1)
    assert distance.max() < 0.15 < 0.3 < to_another.min()
    val = [torch.cat([inputs for inputs, _ in stream_of(place).validation(0, 1, 6)]) for place in (folder, ffcv_dir)]
    assert (val[0] - val[1]).abs().flatten(1).mean(1).max() < 0.15


@pytest.mark.parametrize("source", ["folder", pytest.param("ffcv_dir", marks=pytest.mark.long)])
def test_crops_belong_to_the_position(source, request):
    """The same position gives the same pixels from any process and in any chunk; another position another crop."""
    data_dir, n = request.getfixturevalue(source), CLASSES * TRAIN
    here = stream_of(data_dir, shuffle=False)
    expected = here.read(range(5, 3 * n, 2))[0]
    by_workers = stream_of(data_dir, shuffle=False, num_workers=2)
    cuts = [range(5, 19, 2), range(19, 21, 2), range(21, 3 * n, 2)]
    assert torch.equal(torch.cat([inputs for inputs, _ in by_workers.take(cuts)]), expected)
    assert torch.equal(next(by_workers.take([range(19, 41, 2)]))[0], expected[7:18])  # a resumed run
    assert not torch.equal(here.read(range(5, 6))[0], here.read(range(5 + n, 6 + n))[0])  # the next epoch


def test_centre_crop_of_the_validation_images(folder, ffcv_dir):
    """A white frame of less than (1 − 224/256)/2 of the side is cut away, nothing more."""
    for kind, place in (("folder", folder), ("ffcv", ffcv_dir)):
        loaded = data.load("imagenet", place).val
        image = np.zeros((64, 128, 3), np.uint8)
        image[:, :36], image[:, -36:], image[:4], image[-4:] = 255, 255, 255, 255
        if kind == "folder":
            assert loaded.transform(Image.fromarray(image)).float().mean() < 3
        else:
            top, left, height, width = loaded._crop(64, 128)
            assert image[top : top + height, left : left + width].max() == 0 and (height, width) == (56, 56)


def test_refused_folders(tmp_path, folder):
    with pytest.raises(UsageError, match=r"neither ffcv files .* nor an image folder"):
        data.load("imagenet", tmp_path)
    (tmp_path / "train").symlink_to(folder / "train")
    (tmp_path / "val" / "class0").mkdir(parents=True)
    (tmp_path / "val" / "class0" / "0.JPEG").symlink_to(folder / "val" / "class0" / "0.JPEG")
    with pytest.raises(
        UsageError, match=r"2 class folders \(class1, class2 only in train\) are in only one of train and val"
    ):
        data.load("imagenet", tmp_path)
    (tmp_path / "train_1.ffcv").touch()
    with pytest.raises(UsageError, match=r"one train\*.ffcv and one val\*.ffcv, but has train_1.ffcv"):
        data.load("imagenet", tmp_path)


def test_ffcv_files_without_ffcv(tmp_path, monkeypatch):
    for split in ("train", "val"):
        (tmp_path / f"{split}_500_0.50_90.ffcv").touch()
    monkeypatch.setitem(sys.modules, "ffcv", None)  # as where it is not installed
    with pytest.raises(UsageError, match=r"apt-get install .*libturbojpeg0-dev.*pip install -r requirements-imagenet"):
        data.load("imagenet", tmp_path)
    assert (ROOT / "requirements-imagenet.txt").exists()
    assert sources.INSTALL.split(" (")[0] in (ROOT / "docs" / "imagenet.md").read_text()


@pytest.mark.parametrize("cut", ["in the images", "in the table", "unfinished"])
def test_half_written_ffcv_files(tmp_path, ffcv_dir, cut, capfd, folder):
    """Refused by the program, and written anew by the converter."""
    for path in ffcv_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    half = tmp_path / "train_500_0.50_90.ffcv"
    content = bytearray(half.read_bytes())
    if cut == "unfinished":
        content[16:24] = bytes(8)  # where the table of contents will be: ffcv writes it last
    half.write_bytes(content if cut == "unfinished" else content[: {"in the images": 2**23, "in the table": -9}[cut]])
    with pytest.raises(UsageError, match="is not whole"):
        data.load("imagenet", tmp_path)
    if cut == "in the table":
        before = (tmp_path / "val_500_0.50_90.ffcv").stat().st_mtime_ns
        assert convert.main([str(folder), str(tmp_path), "--num_workers=1"]) == 0
        assert len(data.load("imagenet", tmp_path).train) == CLASSES * TRAIN
        assert (tmp_path / "val_500_0.50_90.ffcv").stat().st_mtime_ns == before
        assert "already exists and is complete" in capfd.readouterr().out


def test_converter_leaves_out_and_names_what_it_cannot_read(tmp_path, ffcv, capfd):
    source = write_folder(tmp_path / "images")
    damaged = [source / "train" / "class1" / f"{i}.JPEG" for i in (3, 7)]
    damaged[0].write_bytes(damaged[0].read_bytes()[:300])
    damaged[1].write_text("not an image")
    options = ["--resolution=48", "--jpeg_share=0", "--quality=70", "--num_workers=2"]
    assert convert.main([str(source), str(tmp_path / "out"), *options]) == 0
    said = capfd.readouterr()
    assert said.out.count("train_48_0.00_70.ffcv: 24 images") == 1 and "again" not in said.out  # written once
    for path in damaged:
        assert f"left out: {path}: " in said.out
    assert "train_48_0.00_70.ffcv: 22 images written, 2 left out" in said.out and "100%" in said.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "train_48_0.00_70.ffcv",
        "val_48_0.00_70.ffcv",
    ]
    loaded = data.load("imagenet", tmp_path / "out")
    assert np.bincount(loaded.train.labels).tolist() == [TRAIN, TRAIN - 2, TRAIN]
    assert max(loaded.train.entries["width"].max(), loaded.train.entries["height"].max()) == 48
    assert loaded.train.entries["mode"].min() > 0  # none as JPEG
    kept = [path for path in sorted((source / "train").rglob("*.JPEG")) if path not in damaged]
    for index in (3, 10, 15, 21):  # before, between and after those that are left out
        image = folders.read(kept[index])
        assert loaded.train._image(index).shape[:2] == pytest.approx(
            np.array(image.size[::-1]) * 48 / max(image.size), abs=1
        )
    reader = ffcv.reader.Reader(str(loaded.train.path))  # ffcv's own reader finds its way, too
    assert len(reader.metadata) == 22 and sorted(reader.alloc_table["sample_id"]) == list(range(22))


def test_converter_ends_with_its_workers(tmp_path, ffcv, folder, monkeypatch):
    """A worker process that the system kills: an error, and no file."""
    images = folders.find(folder)["train"]
    monkeypatch.setattr(folders, "read", lambda path: time.sleep(1) or os._exit(9))
    with pytest.raises(UsageError, match="exit code 9"):
        convert.convert(images, tmp_path / "train.ffcv", workers=2, **sources.DEFAULTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_converter_leaves_nothing(tmp_path, ffcv, number):
    """A signal to all processes of the group, as a terminal's Ctrl-C."""
    out = tmp_path / "out"
    slowly = "import time; from imagenet import convert, folders; folders.read = lambda path: time.sleep(60)\n"
    slowly += "convert.run()"
    program = subprocess.Popen(
        [sys.executable, "-c", slowly, write_folder(tmp_path / "images"), out],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob(".*.unreadable")):
        assert time.monotonic() < deadline and program.poll() is None
        time.sleep(0.1)
    time.sleep(1)  # its worker processes are at work
    os.killpg(program.pid, number)
    assert "imagenet.convert: interrupted" in program.communicate(timeout=60)[1]
    assert program.returncode == 128 + number and not list(out.iterdir())


def test_converter_refuses(tmp_path, ffcv, capfd):
    assert convert.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "has no folder train" in capfd.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="2"):
        convert.main(["a", "b", "--quality=101"])
    assert "number from 1 to 100" in capfd.readouterr().err


def full_size_ffcv_file(folder: Path, ffcv) -> Path:
    """A file with the table of contents of 1,281,167 images."""
    Image.new("RGB", (8, 8)).save(folder / "one.png")
    small, large = folder / "small.ffcv", folder / "large.ffcv"
    fields = {"image": ffcv.fields.RGBImageField(), "label": ffcv.fields.IntField()}
    ffcv.writer.DatasetWriter(str(small), fields, num_workers=1).from_indexed_dataset([(np.zeros((8, 8, 3), "u1"), 7)])
    reader = ffcv.reader.Reader(str(small))
    entries, table = np.repeat(reader.metadata, FULL_SIZE), np.repeat(reader.alloc_table, FULL_SIZE)
    table["sample_id"] = np.arange(FULL_SIZE)
    entries["f0"]["data_ptr"] = table["ptr"] = table["ptr"] + 192 * np.arange(FULL_SIZE, dtype=np.uint64)
    header = reader.header.copy()
    header["num_samples"] = FULL_SIZE
    header["alloc_table_ptr"] = header.nbytes + reader.field_descriptors.nbytes + entries.nbytes
    large.write_bytes(b"".join(part.tobytes() for part in (header, reader.field_descriptors, entries, table)))
    return large


def full_size_image_folder(folder: Path) -> Path:
    """1,281,167 names: a thousand links to a folder of 1,281, and one to a folder of the rest."""
    for name, count in (("many", 1281), ("rest", FULL_SIZE - 1000 * 1281)):
        (folder / name).mkdir()
        for i in range(count):
            (folder / name / f"n01440764_{i:05d}.JPEG").touch()
    (folder / "train").mkdir()
    for i in range(1000):
        (folder / "train" / f"n{i:08d}").symlink_to(folder / "many")
    (folder / "train" / "n99999999").symlink_to(folder / "rest")
    return folder / "train"


def assert_bookkeeping_is_small(samples: torch.utils.data.Dataset, held: int) -> None:
    """Under 50 MB a rank: `held` bytes for the samples' names or places, and the orders of two epochs."""
    assert len(samples) == FULL_SIZE
    order = SampleOrder(len(samples), 1, True)
    order.samples(range(FULL_SIZE - 5, FULL_SIZE + 5))
    held += sum(order._permutation(epoch).nbytes for epoch in (0, 1))
    assert FULL_SIZE * 16 < held < 50e6


def test_bookkeeping_of_a_full_size_image_folder(tmp_path):
    root = full_size_image_folder(tmp_path)
    samples = sources.FolderImages(folders._in_class_folders(root)[0], train=True)
    assert_bookkeeping_is_small(samples, held=len(pickle.dumps(samples)))  # all that it refers to


def test_bookkeeping_of_a_full_size_ffcv_file(tmp_path, ffcv):
    path = full_size_ffcv_file(tmp_path, ffcv)
    tracemalloc.start()
    samples = sources.FfcvImages(path, train=True)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert_bookkeeping_is_small(samples, held)


RESNET = """
from torchvision.models.resnet import BasicBlock, ResNet

def build(image_shape, num_classes):
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
"""


@pytest.mark.long
def test_training_from_both_sources(tmp_path, folder, ffcv_dir):
    """A small ResNet, two processes, batches that grow from step to step; the sources hold the same images."""
    (tmp_path / "small_resnet.py").write_text(RESNET)
    options = ["--dataset=imagenet", "--model=small_resnet:build", "--num_workers=1", "--eta=0.3"]
    options += ["--test_gradients=micro_batch", "--test_groups=4", "--batch_size=6", "--max_samples=30"]
    options += ["--optimizer=sgd", "--learning_rate=0.01", "--max_micro_batch_size=8"]
    runs = [
        train(tmp_path / "out", *options, f"--data_dir={place}", processes=2, name=name, PYTHONPATH=str(tmp_path))
        for name, place in (("folder", folder), ("ffcv", ffcv_dir))
    ]
    for run in runs:
        sizes = column(run, "batch_size")
        assert sizes[0] == 6 and sizes[-1] > 6 and len(set(sizes)) > 1
        assert run.summary["samples"] == sum(sizes) >= 30 > CLASSES * TRAIN  # into the second epoch
        assert column(run, "val_loss")[-1] > 0 and "val_top5_accuracy" not in run.rows[0]
    first = [column(run, "train_loss")[0] for run in runs]
    assert first[0] == pytest.approx(first[1], rel=0.05)
