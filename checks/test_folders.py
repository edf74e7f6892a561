"""Image folders as people have them: layouts, left-over files, and every kind of image, from real files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

import data
from checks.conftest import ROOT
from imagenet import check, folders, sources
from options.errors import UsageError

CLASSES = ("cat", "dog")


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes, three images each to train on, two to validate by."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in CLASSES:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.jpg")
    return tmp_path / "images"


def refused(root: Path) -> str:
    with pytest.raises(UsageError) as error:
        data.load("imagenet", root)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_order_is_that_of_torchvision(root):
    """Runs that were begun with its ImageFolder go on with the same samples."""
    (root / "train" / "cat" / "below" / "b").mkdir(parents=True)
    for name in ("below/z.png", "below/b/a.JPEG", "B.webp", "10.jpg"):
        Image.new("RGB", (8, 8)).save(root / "train" / "cat" / name)
    (root / "train" / "bird").symlink_to(root / "train" / "cat", target_is_directory=True)
    shutil.copytree(root / "val" / "cat", root / "val" / "bird")
    theirs, ours = ImageFolder(str(root / "train")), folders.find(root)["train"]
    assert [(ours.path(i), ours.labels[i]) for i in range(len(ours))] == theirs.samples


def test_files_that_do_no_harm(root):
    for place in ("train/.DS_Store", "train/cat/.DS_Store", "val/Thumbs.db", "train/dog/notes.txt", "train/list.txt"):
        (root / place).write_bytes(b"x")
    train, val, classes = sources.load(root)
    assert (len(train), len(val), classes) == (6, 4, 2)


@pytest.mark.parametrize(
    "place",
    ["train/.ipynb_checkpoints", "train/cat/.ipynb_checkpoints", "val/__MACOSX", "train/cat/._0.jpg", "val/dog/.x.png"],
)
def test_hidden_copies_are_named(root, place):
    if "." in Path(place).name[1:] and Path(place).suffix:
        (root / place).write_bytes(b"\0\5\x16\7" + bytes(80))
    else:
        (root / place).mkdir()
        shutil.copy(root / "train/cat/0.jpg", root / place / "0-checkpoint.jpg")
    assert f"({place}): remove them" in refused(root)


@pytest.mark.parametrize("place", ["train/owl", "train/cat/more", "val/dog/9.jpg"])
def test_links_that_lead_nowhere_are_named(root, place):
    (root / place).symlink_to("/not/mounted/here")
    assert f"lead nowhere ({root / place} to /not/mounted/here)" in refused(root)


def test_links_are_followed_but_not_round_in_a_circle(root):
    (root / "train" / "cat" / "dogs").symlink_to(root / "val" / "dog")
    assert len(sources.load(root)[0]) == 8
    (root / "train" / "cat" / "up").symlink_to("..")
    assert f"{root}/train/cat/up is a link to a folder that it lies in" in refused(root)


def test_layouts_that_are_refused(root):
    (root / "val" / "eel").mkdir()
    assert "(eel only in val)" in refused(root)
    (root / "train" / "eel").mkdir()
    assert "train has no images for eel" in refused(root)
    for split in ("train", "val"):
        (root / split / "eel").rmdir()
    for path in sorted((root / "val").glob("*/*.jpg")):
        path.rename(root / "val" / f"{path.parent.name}{path.name}")
    for name in CLASSES:
        (root / "val" / name).rmdir()
    said = refused(root)
    assert "val has 4 images, but no class folders: sort its images into val/CLASS/" in said
    shutil.rmtree(root / "val")
    assert "has no folder val" in refused(root)


def test_tiny_imagenet(root):
    """train/CLASS/images/*, val/images/* and val/val_annotations.txt."""
    expected = {}
    (root / "val" / "images").mkdir()
    for i, path in enumerate(sorted((root / "val").glob("*/*.jpg"), reverse=True)):
        expected[f"val_{i}.jpg"] = path.parent.name
        path.rename(root / "val" / "images" / f"val_{i}.jpg")
    for name in CLASSES:
        (root / "val" / name).rmdir()
        (root / "train" / name / "images").mkdir()
        for path in (root / "train" / name).glob("*.jpg"):
            path.rename(path.parent / "images" / path.name)
        (root / "train" / name / f"{name}_boxes.txt").write_text("0.jpg\t0\t0\t1\t1\n")
    lines = [f"{name}\t{label}\t0\t32\t44\t62\n" for name, label in expected.items()]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    files = folders.find(root)
    assert len(files["train"]) == 6 and files["train"].labels.tolist() == [0, 0, 0, 1, 1, 1]
    val = files["val"]
    assert {Path(val.path(i)).name: CLASSES[val.labels[i]] for i in range(4)} == expected
    assert sources.load(root)[1][0][0].shape == (3, 224, 224)
    (root / "val" / "val_annotations.txt").write_text("val_0.jpg\teel\n")
    assert "'val_0.jpg eel' names no class of train" in refused(root)


def grey(value: np.ndarray) -> np.ndarray:
    return np.repeat(np.round(value).astype(int)[..., None], 3, axis=2)


def test_sixteen_bits(tmp_path):
    """All of the range, in every file format that has it: 65535 becomes 255."""
    values = np.linspace(0, 65535, 48 * 32).reshape(48, 32).round().astype(np.uint16)
    expected = grey(values / 257)
    image = Image.fromarray(values)
    for name in ("a.png", "b.tif"):
        image.save(tmp_path / name)
        assert np.array_equal(np.asarray(folders.read(tmp_path / name)), expected), name
    Image.fromarray(values.astype(">u2")).save(tmp_path / "c.tif")
    assert np.array_equal(np.asarray(folders.read(tmp_path / "c.tif")), expected)
    (tmp_path / "d.pgm").write_bytes(b"P5 32 48 65535\n" + values.astype(">u2").tobytes())
    assert np.abs(np.asarray(folders.read(tmp_path / "d.pgm")) - expected).max() <= 1


def test_modes(tmp_path):
    """What each file shows, against pixels written down: palettes, grey, CMYK, floating point, several images."""
    rng = np.random.default_rng(0)
    colours, index = rng.integers(0, 256, (7, 3)), rng.integers(0, 7, (20, 30))
    palette = Image.fromarray(index.astype(np.uint8), "P")
    palette.putpalette(colours.astype(np.uint8).tobytes())
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "transparent.png", transparency=bytes([0, 255, 9]))
    palette.save(tmp_path / "palette.gif")
    for name in ("palette.png", "transparent.png", "palette.gif"):
        assert np.array_equal(np.asarray(folders.read(tmp_path / name)), colours[index]), name
    plain = rng.integers(0, 256, (20, 30))
    Image.fromarray(plain.astype(np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(plain.astype(np.int32)).save(tmp_path / "whole.tif")
    Image.fromarray(plain.astype(np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray((plain / 255).astype(np.float32)).save(tmp_path / "unit.tiff")
    for name in ("grey.png", "whole.tif", "float.tiff", "unit.tiff"):
        assert np.array_equal(np.asarray(folders.read(tmp_path / name)), grey(plain)), name
    Image.fromarray(plain > 99).save(tmp_path / "one_bit.png")
    assert np.array_equal(np.asarray(folders.read(tmp_path / "one_bit.png")), grey((plain > 99) * 255))
    red = Image.new("RGB", (20, 30), (200, 30, 40))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(np.asarray(folders.read(tmp_path / "cmyk.jpg")).astype(int) - (200, 30, 40)).max() < 12
    blue = Image.new("RGB", (20, 30), (0, 0, 255))
    red.save(tmp_path / "two.webp", save_all=True, append_images=[blue], lossless=True)
    red.save(tmp_path / "two.png", save_all=True, append_images=[blue])
    for name in ("two.webp", "two.png"):
        assert np.asarray(folders.read(tmp_path / name))[0, 0].tolist() == [200, 30, 40], name
    Image.fromarray((plain * 300).astype(np.int32)).save(tmp_path / "large.tif")
    with pytest.raises(OSError, match="are not 8-bit"):
        folders.read(tmp_path / "large.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, orientation):
    """Marked in a corner; saved as a camera that was held otherwise saves it."""
    upright = Image.new("RGB", (40, 24))
    upright.paste((255, 255, 255), (0, 0, 20, 8))
    turns = Image.Transpose
    held = {2: [turns.FLIP_LEFT_RIGHT], 3: [turns.ROTATE_180], 4: [turns.FLIP_TOP_BOTTOM], 5: [turns.TRANSPOSE],
            6: [turns.ROTATE_90], 7: [turns.TRANSVERSE], 8: [turns.ROTATE_270]}  # fmt: skip
    image = upright
    for turn in held.get(orientation, []):
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(folders.read(tmp_path / "a.png")), np.asarray(upright))


def spoil(root: Path) -> dict[str, str]:
    """Files that cannot be read, by what is to be said of them."""
    cat = root / "train" / "cat"
    good = (cat / "0.jpg").read_bytes()
    (cat / "cut.jpg").write_bytes(good[: len(good) // 2])
    (cat / "words.jpg").write_text("not an image")
    (cat / "empty.png").touch()
    Image.new("1", (20_000, 18_000)).save(cat / "vast.png")
    Image.new("RGB", (300, 300)).save(cat / "short.png")
    (cat / "short.png").write_bytes((cat / "short.png").read_bytes()[:-40])
    return {"cut.jpg": "truncated", "words.jpg": "it is no image", "empty.png": "it is empty",
            "vast.png": "pixels, Pillow's limit", "short.png": ""}  # fmt: skip


def test_check_names_what_cannot_be_read(root, capsys):
    """From headers and ends; trailing bytes, as cameras write them, are no damage."""
    good = root / "train" / "dog" / "0.jpg"
    good.write_bytes(good.read_bytes() + bytes(10_000))
    assert check.main([str(root)]) == 0
    assert "0 images cannot be read" in capsys.readouterr().out
    spoilt = spoil(root)
    for options in ([], ["--whole"]):
        assert check.main([str(root), *options]) == 1
        said = capsys.readouterr()
        lines = dict(line.split(": ", 1) for line in said.out.splitlines()[:-1])
        assert {Path(path).name for path in lines} == set(spoilt)
        for path, words in lines.items():
            assert spoilt[Path(path).name].lower() in words.lower()
        assert "5 images cannot be read: repair or remove them" in said.out and "100%" in said.err


def test_damage_that_only_decoding_finds(root, capsys):
    """Bytes in the middle of a PNG: the header and the end are whole."""
    path = root / "val" / "dog" / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[5000:5400] = bytes(400)
    path.write_bytes(content)
    assert check.main([str(root)]) == 0
    assert check.main([str(root), "--whole"]) == 1
    assert str(path) in capsys.readouterr().out
    samples = sources.load(root)[1]
    with pytest.raises(
        OSError, match=r"val/dog/0\.png: .* \(`python -m imagenet\.check FOLDER` names all such files\)"
    ):
        [samples[i] for i in range(len(samples))]


@pytest.mark.long
def test_check_as_a_program(tmp_path, root):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "IMAGES": str(root)}
    command = [sys.executable, "-m", "imagenet.check"]
    done = subprocess.run([*command, "$IMAGES"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "has no folder train: it needs train/CLASS/*.JPEG" in done.stderr
