"""Data sets from small official-format files, and those of a user's own."""

import gzip
import hashlib
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import data
from options.errors import UsageError


def write_mnist(folder: Path, name: str = "MNIST", train: int = 20, val: int = 10) -> None:
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", val)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())


def write_cifar10(folder: Path, monkeypatch) -> np.ndarray:
    """Small batches in the official format; torchvision is told their check sums. Returns the first batch's images."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    generator = np.random.default_rng(0)
    batches = {}

    def write(name, content) -> str:
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        images = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        batches[name] = (images, write(name, {"data": images, "labels": [0, 1, 2, 9]}))
    meta = write("batches.meta", {"label_names": list("abcdefghij")})
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[n, batches[n][1]] for n in batches if n != "test_batch"])
    monkeypatch.setattr(kind, "test_list", [["test_batch", batches["test_batch"][1]]])
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})
    return batches["data_batch_1"][0]


def test_digits_are_split_stratified():
    first, second = data.load("digits", Path()), data.load("digits", Path())
    images, labels = first.train.tensors
    assert (len(first.train), len(first.val)) == (1437, 360)
    assert images.dtype == torch.uint8 and images.max() == 255 and first.input_shape == (1, 8, 8)
    assert torch.equal(images, second.train.tensors[0])
    assert labels.bincount().min() >= 139 and first.val.tensors[1].bincount().min() >= 34


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files(tmp_path, name, folder):
    write_mnist(tmp_path, folder)
    data.prepare(name, tmp_path)
    loaded = data.load(name, tmp_path)
    assert loaded.input_shape == (1, 28, 28) and len(loaded.train) == 20 and len(loaded.val) == 10
    raw = (tmp_path / folder / "raw" / "train-images-idx3-ubyte").read_bytes()[16:]
    assert loaded.train.tensors[0].numpy().tobytes() == raw
    assert loaded.train.tensors[1].tolist() == [i % 10 for i in range(20)]


def test_cifar_files(tmp_path, monkeypatch):
    first = write_cifar10(tmp_path, monkeypatch)
    data.prepare("cifar10", tmp_path)
    loaded = data.load("cifar10", tmp_path)
    assert loaded.input_shape == (3, 32, 32) and len(loaded.train) == 20 and loaded.crop_and_flip
    assert torch.equal(loaded.train.tensors[0][:4], torch.from_numpy(first).view(4, 3, 32, 32))


@pytest.fixture
def no_network(monkeypatch):
    def urlopen(*arguments, **keywords):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_without_a_network(tmp_path, name, no_network):
    with pytest.raises(UsageError, match="no usable copy of") as refused:
        data.prepare(name, tmp_path / "no" / "where")
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "no" / "where").iterdir())  # nothing half-made


def test_corrupt_files(tmp_path, monkeypatch, no_network):
    """Truncated files, without a network: refused, and left where they are."""
    write_mnist(tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    write_cifar10(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"damaged")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    for name in ("mnist", "cifar10"):
        with pytest.raises(UsageError, match=rf"no usable copy of {name} .*no network.*put whole copies of"):
            data.prepare(name, tmp_path)
        with pytest.raises(UsageError, match="check the files there"):
            data.load(name, tmp_path)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_damaged_files_are_downloaded_anew(tmp_path, monkeypatch):
    """The good files come from a folder that stands in for the mirror; they replace the damaged ones when complete."""
    write_mnist(tmp_path / "mirror")
    write_mnist(tmp_path / "data")
    good, here = (tmp_path / where / "MNIST" / "raw" for where in ("mirror", "data"))
    (here / "train-images-idx3-ubyte").write_bytes(b"damaged")

    def fetch(url, download_root, filename, **keywords):
        name = filename.removesuffix(".gz")
        (Path(download_root) / name).write_bytes((good / name).read_bytes())

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fetch)
    data.prepare("mnist", tmp_path / "data")
    assert len(data.load("mnist", tmp_path / "data").train) == 20
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["MNIST"]


def packed(folder: Path, monkeypatch, name: str) -> list[Path]:
    """The small data set as the official files, torchvision knowing their check sums; the files, unpacked ones gone."""
    place, kind = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "."}[name], data.DATASETS[name].kind
    if name == "cifar10":
        write_cifar10(folder, monkeypatch)
        with tarfile.open(folder / kind.filename, "w:gz") as archive:
            archive.add(folder / kind.base_folder, kind.base_folder)
        shutil.rmtree(folder / kind.base_folder)
        monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((folder / kind.filename).read_bytes()).hexdigest())
        return [folder / kind.filename]
    write_mnist(folder, place, train=20 if name == "mnist" else 30)
    files = []
    for path in sorted((folder / place / "raw").iterdir()):
        files.append(path.with_name(f"{path.name}.gz"))
        files[-1].write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    sums = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in files]
    monkeypatch.setattr(kind, "resources", sums)
    return files


@pytest.mark.parametrize("where", ["as torchvision leaves them", "in data_dir"])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_official_archives_without_a_network(tmp_path, monkeypatch, no_network, name, where):
    files = packed(tmp_path, monkeypatch, name)
    if where == "in data_dir":
        files = [path.rename(tmp_path / path.name) for path in files]
    before = {path: path.read_bytes() for path in files}
    data.prepare(name, tmp_path)
    loaded = data.load(name, tmp_path)
    assert len(loaded.train) == (30 if name == "fashion_mnist" else 20)
    assert {path: path.read_bytes() for path in files} == before and not any(path.is_symlink() for path in files)
    assert not list(tmp_path.glob(".*"))


def test_files_of_two_data_sets_with_the_same_names(tmp_path, monkeypatch, no_network):
    """Those of Fashion-MNIST in data_dir, those of MNIST where torchvision has them: told apart by their check sums."""
    for path in packed(tmp_path, monkeypatch, "fashion_mnist"):
        path.rename(tmp_path / path.name)
    packed(tmp_path, monkeypatch, "mnist")
    for name, count in (("mnist", 20), ("fashion_mnist", 30)):
        data.prepare(name, tmp_path)
        assert len(data.load(name, tmp_path).train) == count


def test_partial_archives_are_named(tmp_path, monkeypatch, no_network):
    """One file cut short, one missing, two whole: named are the first two, and the cut one stays as it is."""
    cut, missing, *_ = packed(tmp_path, monkeypatch, "mnist")
    missing.unlink()
    good = cut.read_bytes()
    cut.write_bytes(good[:-20])
    with pytest.raises(UsageError) as refused:
        data.prepare("mnist", tmp_path)
    assert str(refused.value).endswith(
        f"put whole copies of {cut.name}, {missing.name} there, or connect to the network"
    )
    assert cut.read_bytes() == good[:-20] and len(list(cut.parent.iterdir())) == 3
    cut.write_bytes(good)
    with pytest.raises(UsageError, match=f"put whole copies of {missing.name} there"):
        data.prepare("mnist", tmp_path)


def test_a_partial_archive_of_cifar(tmp_path, monkeypatch, no_network):
    (archive,) = packed(tmp_path, monkeypatch, "cifar10")
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UsageError, match=f"put whole copies of {archive.name} there"):
        data.prepare("cifar10", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


def test_only_what_is_missing_is_downloaded(tmp_path, monkeypatch):
    first, *others = packed(tmp_path, monkeypatch, "mnist")
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    first.rename(mirror / first.name)
    fetched = []

    def fetch(url, target, *rest):
        fetched.append(Path(target).name)
        shutil.copy(mirror / Path(target).name, target)

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **keywords: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    data.prepare("mnist", tmp_path)
    assert fetched == [first.name] and len(data.load("mnist", tmp_path).train) == 20
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_a_disk_that_cannot_be_written(tmp_path, monkeypatch, no_network):
    """Whole archives: neither copies of them nor the network would help."""
    packed(tmp_path, monkeypatch, "mnist")

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", full)
    with pytest.raises(UsageError, match="No space left on device.*: make room and allow writing"):
        data.prepare("mnist", tmp_path)


def test_unknown_name():
    with pytest.raises(UsageError, match="did you mean 'cifar10'"):
        data.prepare("cifar-10", Path())


def test_own_data_set(tmp_path, monkeypatch):
    (tmp_path / "own_images.py").write_text(
        "import numpy as np, torch\nfrom torch.utils.data import TensorDataset\nfrom data import DataSet\n\n"
        "def load(data_dir):\n    a = np.load(data_dir / 'own_images.npz')\n"
        "    sets = [TensorDataset(*(torch.from_numpy(a[f'{k}_{s}']) for k in 'xy')) for s in ('train', 'val')]\n"
        "    return DataSet(*sets, num_classes=3)\n\ndef wrong(data_dir):\n    return 1\n"
    )
    x, y = np.zeros((6, 3, 5, 5), np.uint8), np.arange(6) % 3
    np.savez(tmp_path / "own_images.npz", x_train=x, y_train=y, x_val=x, y_val=y)
    monkeypatch.chdir(tmp_path)
    assert data.load("own_images:load", tmp_path).num_classes == 3
    with pytest.raises(UsageError, match=r"must return a data\.DataSet"):
        data.load("own_images:wrong", tmp_path)
    with pytest.raises(UsageError, match="did you mean 'load'"):
        data.load("own_images:laod", tmp_path)
    for kind in (np.uint8, np.int16, np.int32):
        np.savez(tmp_path / "own_images.npz", x_train=x, y_train=y.astype(kind), x_val=x, y_val=y)
        assert data.load("own_images:load", tmp_path).train[0][1].dtype == torch.int64
    for wrong in (y.astype(np.float32), y.reshape(-1, 1)):
        np.savez(tmp_path / "own_images.npz", x_train=x, y_train=wrong, x_val=x, y_val=y)
        with pytest.raises(UsageError, match="train needs labels of whole numbers"):
            data.load("own_images:load", tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UsageError, match=r"cannot import broken \(ZeroDivisionError: .*broken.py:1\)"):
        data.load("broken:load", tmp_path)
    np.savez(tmp_path / "own_images.npz", x_train=x, y_train=y + 7, x_val=x, y_val=y)
    with pytest.raises(UsageError, match="labels outside 0 … 2"):
        data.load("own_images:load", tmp_path)
