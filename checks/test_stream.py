"""The sample stream: augmentation against a plain loop, exact micro-batches, coverage of the validation set."""

import os
import random

import numpy as np
import pytest
import torch

import batches
import data
from adadagrad import order
from adadagrad.order import SampleOrder
from batches import loading
from batches.augment import crop_and_flip
from checks.conftest import run
from options.errors import RunError


def test_crop_and_flip_equals_a_plain_loop():
    images = torch.arange(6 * 2 * 5 * 7, dtype=torch.float64).view(6, 2, 5, 7) + 1
    positions = torch.arange(100, 106)
    expected = []
    for image, bits in zip(images, order.position_hash(positions, seed=3).tolist()):
        top, left, flip = bits % 9, bits // 9 % 9, bits // 81 % 2
        padded = torch.zeros(2, 13, 15, dtype=torch.float64)
        padded[:, 4:9, 4:11] = image
        cropped = padded[:, top : top + 5, left : left + 7]
        expected.append(cropped.flip(2) if flip else cropped)
    assert torch.equal(crop_and_flip(images, positions, seed=3), torch.stack(expected))


def test_position_hash_is_uniform_and_seeded():
    positions = torch.arange(50_000)
    bits = order.position_hash(positions, 1)
    assert bits.min() >= 0 and len(bits.unique()) == len(bits)
    for modulus in (2, 9):
        counts = (bits % modulus).bincount().double()
        expected = len(bits) / modulus
        assert ((counts - expected).square() / expected).sum() < 40  # chi-square, at most 8 degrees of freedom
    assert not torch.equal(bits, order.position_hash(positions, 2))


def stream_of(n: int, augment: bool = False, validation_samples: int | None = None) -> batches.InMemoryStream:
    images = torch.arange(n * 3 * 8 * 8, dtype=torch.int64).remainder(251).to(torch.uint8).view(n, 3, 8, 8)
    labels = torch.arange(n) % 5
    sets = torch.utils.data.TensorDataset(images, labels)
    data_set = data.DataSet(sets, sets, 5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_and_flip=augment)
    further = {"validation_samples": validation_samples}
    return batches.build(data_set, 0, False, torch.device("cpu"), torch.float64, **further)


def test_normalisation():
    samples = stream_of(4)
    inputs, targets = next(samples.take([range(4)]))
    expected = (
        samples.train(torch.arange(4))[0].double() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    ) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(inputs, expected, rtol=1e-6, atol=1e-7)
    assert targets.tolist() == [0, 1, 2, 3]


def test_augmentation_belongs_to_the_position_not_to_the_cut():
    samples = stream_of(10, augment=True)
    whole = next(samples.take([range(7, 27)]))[0]
    by_rank = [next(samples.take([range(7 + r, 27, 3)]))[0] for r in range(3)]
    for r in range(3):
        assert torch.equal(whole[r::3], by_rank[r])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_uses_every_sample_once(world_size):
    samples = stream_of(11)
    seen = [x for rank in range(world_size) for inputs, _ in samples.validation(rank, world_size, 3) for x in inputs]
    expected = samples.normalise(samples.val(torch.arange(11))[0])
    assert sorted(x.sum().item() for x in seen) == sorted(x.sum().item() for x in expected) and len(seen) == 11


@pytest.mark.parametrize("taken, expected", [(1, [0]), (4, [0, 2, 5, 8]), (10, [*range(10)]), (11, [*range(11)])])
def test_a_part_of_the_validation_samples_is_spread_evenly(taken, expected):
    samples, elsewhere = stream_of(11, validation_samples=taken), loaded_stream(5, 11, validation_samples=taken)
    images = samples.normalise(samples.val(torch.arange(11))[0])
    seen = [x for rank in range(2) for inputs, _ in samples.validation(rank, 2, 3) for x in inputs]
    assert len(seen) == taken and all(any(torch.equal(x, images[i]) for x in seen) for i in expected)
    read = [n for rank in range(2) for x, _ in elsewhere.validation(rank, 2, 3) for n in words(x)[:, 0].tolist()]
    assert sorted(read) == expected


class Numbered(torch.utils.data.Dataset):
    """Image i says which sample it is, which process read it, and what three random generators gave; label i mod 5."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        drawn = torch.rand(1).item(), np.random.rand(), random.random()
        words = (i, os.getpid(), *(int(2**31 * value) for value in drawn))
        return torch.tensor(words, dtype=torch.int32).view(torch.uint8).view(1, 4, 5), i % 5


def loaded_stream(
    n: int, val: int = 11, shuffle: bool = True, num_workers: int = 0, validation_samples: int | None = None
) -> batches.LoadedStream:
    data_set = data.DataSet(Numbered(n), Numbered(val), 5)
    further = {"num_workers": num_workers, "validation_samples": validation_samples}
    return batches.build(data_set, 3, shuffle, torch.device("cpu"), torch.float64, **further)


def words(inputs: torch.Tensor) -> torch.Tensor:
    """What the samples say of themselves: (n, 5)."""
    return (inputs * 255).round().to(torch.uint8).flatten(1).contiguous().view(torch.int32)


SIZES = (4, 61, 4, 130, 3, 200, 90, 8)  # global batches; chunks have 32 samples a rank


@pytest.mark.parametrize("world_size, num_workers", [(1, 2), (2, 2), (3, 0)])
def test_loaded_stream_of_changing_batches(world_size, num_workers):
    """Exact batches over several epochs: each sample once an epoch, in the order of a data set in memory, and read by
    the same processes from first to last."""
    n, order = 77, SampleOrder(77, 3, True)
    ranks = [loaded_stream(n, num_workers=num_workers) for _ in range(world_size)]
    start, seen, readers = 0, {}, [set() for _ in ranks]
    for size in SIZES:
        plan = batches.cut(start, size, world_size, 40)
        for rank, samples in enumerate(ranks):
            micro_batches = plan.micro_batches(rank)
            for positions, (inputs, targets) in zip(micro_batches, samples.take(micro_batches), strict=True):
                said = words(inputs)
                seen |= dict(zip(positions, said[:, [0, 2, 3, 4]].tolist(), strict=True))
                readers[rank] |= set(said[:, 1].tolist())
                assert targets.tolist() == (said[:, 0] % 5).tolist()
        start += size
    assert sorted(seen) == list(range(sum(SIZES))) and sum(SIZES) > 6 * n
    assert [seen[p][0] for p in range(start)] == order.samples(range(start)).tolist()
    assert seen[0][1:] != seen[1][1:]
    drawn = words(ranks[0].read(range(start))[0])[:, [0, 2, 3, 4]]  # by one process, in one chunk
    assert drawn.tolist() == [seen[p] for p in range(start)]
    assert [len(pids) for pids in readers] == [max(num_workers, 1)] * world_size
    assert (os.getpid() in readers[0]) == (num_workers == 0)


def test_loaded_stream_starts_anywhere():
    samples, elsewhere = loaded_stream(50, num_workers=1), loaded_stream(50)
    readers = set()
    for positions in (range(40, 90), range(90, 91), range(7, 67, 2), range(67, 69, 2)):
        got = words(next(samples.take([positions]))[0])
        assert torch.equal(got[:, [0, 2, 3, 4]], words(elsewhere.read(positions)[0])[:, [0, 2, 3, 4]])
        readers |= set(got[:, 1].tolist())
    assert len(readers) == 1  # going elsewhere keeps the worker process


@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (2, 2), (3, 1)])
def test_loaded_validation_uses_every_sample_once(world_size, num_workers):
    for n in (1, 71):
        ranks = [loaded_stream(5, n, num_workers=num_workers) for _ in range(world_size)]
        for _ in range(2):  # as often as is asked for
            batches = [list(s.validation(rank, world_size, 10)) for rank, s in enumerate(ranks)]
            assert sorted(words(x)[i, 0].item() for b in batches for x, _ in b for i in range(len(x))) == [*range(n)]
            assert all(len(targets) <= 10 for b in batches for _, targets in b)


def test_reading_leaves_the_programs_own_random_numbers_alone():
    samples = loaded_stream(50)
    states = []
    for read in (False, True):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        if read:
            next(samples.take([range(40)]))
            list(samples.validation(0, 1, 4))
        states.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert states[0] == states[1]


@pytest.mark.long
def test_crop_and_flip_of_loaded_samples():
    """Pixels of one value but for the padding: what is drawn is that of the same positions in memory."""
    images, labels = torch.full((9, 3, 8, 8), 200, dtype=torch.uint8), torch.arange(9) % 5
    in_memory = torch.utils.data.TensorDataset(images, labels)
    streams = [
        batches.build(
            data.DataSet(samples, in_memory, 5, crop_and_flip=True), 0, True, torch.device("cpu"), torch.float64
        )
        for samples in (in_memory, torch.utils.data.Subset(in_memory, range(9)))
    ]
    assert [type(s) for s in streams] == [batches.InMemoryStream, batches.LoadedStream]
    (x, targets), (y, other) = (next(s.take([range(3, 43, 2)])) for s in streams)
    assert torch.equal(x, y) and torch.equal(targets, other) and x.min() == 0


class Broken(torch.utils.data.Dataset):
    """Sample 6 is not as the contract says."""

    def __init__(self, sample):
        self.sample = sample

    def __len__(self) -> int:
        return 9

    def __getitem__(self, i: int):
        good = torch.zeros(3, 8, 8, dtype=torch.uint8)
        if i != 6:
            return good, 1
        if isinstance(self.sample, Exception):
            raise self.sample
        return self.sample(good)


@pytest.mark.parametrize(
    "sample, said",
    [
        (ValueError("two\nlines"), "ValueError: two lines"),
        (lambda good: (good.float(), 1), r"its image is torch.float32 \(3, 8, 8\), not uint8 \(3, 8, 8\)"),
        (lambda good: (good[:, 1:], 1), r"its image is torch.uint8 \(3, 7, 8\), not uint8 \(3, 8, 8\)"),
        (lambda good: (good.numpy(), 1), "its image is ndarray"),
        (lambda good: (good, 5), "its label 5 is none of 0 … 4"),
        (lambda good: good, "ValueError"),
    ],
)
def test_samples_against_the_contract(sample, said):
    samples = batches.build(data.DataSet(Broken(sample), Broken(None), 5), 0, False, torch.device("cpu"), torch.float32)
    with pytest.raises(RunError, match=f"sample 6 of the training set cannot be read: .*{said}") as refused:
        list(samples.take([range(9)]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("train", [[], [(np.zeros((8, 8, 3)), 1)], [(torch.zeros(3, 8, 8), 1)]])
def test_data_sets_against_the_contract(train):
    with pytest.raises(ValueError, match="no samples|needs an image, uint8"):
        data.DataSet(train, train, 5)


BROKEN = """
import os
import torch
from data import DataSet

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 300

    def __getitem__(self, i):
        if i == 100:
            raise OSError("torn page")
        if i == 101:
            os._exit(9)
        return torch.full((3, 8, 8), i % 7, dtype=torch.uint8), i % 7

def load(data_dir):
    return DataSet(Images(), torch.utils.data.Subset(Images(), range(9)), 7)
"""


@pytest.mark.parametrize(
    "rank, said",
    [(0, "sample 100 of the training set cannot be read"), (1, "--num_workers: where memory or shared memory")],
)
def test_a_rank_that_cannot_read_ends_the_run(tmp_path, rank, said):
    """An error of the data set on rank 0, a killed worker process of rank 1: one clear line, on any rank, no hang."""
    bad = {0: 101, 1: 100}[rank]  # the other rank's
    (tmp_path / "broken.py").write_text(BROKEN.replace(f"i == {bad}", "False"))
    options = ["--dataset=broken:load", "--model=logistic", "--test=False", "--shuffle=False", "--num_workers=1"]
    done = run(f"--out_dir={tmp_path}", *options, processes=2, PYTHONPATH=str(tmp_path), timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("main.py: error:")]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert sum(said in line for line in lines) == 1 and len(lines) <= 2, done.stderr


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_worker_that_is_dying_is_a_lost_worker(error):
    """Its sockets are closed before it counts as dead: torch then gives what the connection gives."""

    def chunks():
        yield 1
        raise error("by peer")

    read = loading._from_workers(chunks())
    assert next(read) == 1
    with pytest.raises(RuntimeError, match="DataLoader worker"):  # as torch says it of one that is dead
        next(read)
