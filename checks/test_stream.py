"""The sample stream: augmentation against a plain loop, exact micro-batches, coverage of the validation set."""

import pytest
import torch

import data
import stream


def test_crop_and_flip_equals_a_plain_loop():
    images = torch.arange(6 * 2 * 5 * 7, dtype=torch.float64).view(6, 2, 5, 7) + 1
    positions = torch.arange(100, 106)
    expected = []
    for image, bits in zip(images, stream.position_hash(positions, seed=3).tolist()):
        top, left, flip = bits % 9, bits // 9 % 9, bits // 81 % 2
        padded = torch.zeros(2, 13, 15, dtype=torch.float64)
        padded[:, 4:9, 4:11] = image
        cropped = padded[:, top : top + 5, left : left + 7]
        expected.append(cropped.flip(2) if flip else cropped)
    assert torch.equal(stream.crop_and_flip(images, positions, seed=3), torch.stack(expected))


def test_position_hash_is_uniform_and_seeded():
    positions = torch.arange(50_000)
    bits = stream.position_hash(positions, 1)
    assert bits.min() >= 0 and len(bits.unique()) == len(bits)
    for modulus in (2, 9):
        counts = (bits % modulus).bincount().double()
        expected = len(bits) / modulus
        assert ((counts - expected).square() / expected).sum() < 40  # chi-square, at most 8 degrees of freedom
    assert not torch.equal(bits, stream.position_hash(positions, 2))


def stream_of(n: int, augment: bool = False) -> stream.InMemoryStream:
    images = torch.arange(n * 3 * 8 * 8, dtype=torch.int64).remainder(251).to(torch.uint8).view(n, 3, 8, 8)
    labels = torch.arange(n) % 5
    sets = torch.utils.data.TensorDataset(images, labels)
    data_set = data.DataSet(sets, sets, 5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_and_flip=augment)
    return stream.InMemoryStream(data_set, 0, False, torch.device("cpu"), torch.float64)


def test_normalisation():
    samples = stream_of(4)
    inputs, targets = next(samples.take([range(4)]))
    expected = (samples.images.double() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(3, 1, 1)
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
    expected = samples.normalise(samples.val_images)
    assert sorted(x.sum().item() for x in seen) == sorted(x.sum().item() for x in expected) and len(seen) == 11
