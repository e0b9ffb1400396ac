"""Sets decoded on demand: the same pixels as resident ones, in the order asked for."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from softcl.data import DataError, ImageSet, batch_indices, batches, load_dataset

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path):
    """Two classes of 100 small images each, all different."""
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(100):
            pixels = torch.randint(0, 256, (5, 7, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / name / f"{i:03d}.png")
    return tmp_path


def lazily(folder, workers: int = 2, **options) -> ImageSet:
    data = load_dataset(str(folder), "all", memory_limit=0, workers=workers, **options)
    assert not data.resident and "on demand" in data.describe()
    return data


@pytest.mark.parametrize("workers", [0, 1, 5])
@pytest.mark.parametrize("image_size", [None, 4])
def test_same_pixels_as_a_resident_set(folder, workers, image_size):
    resident = load_dataset(str(folder), "all", image_size=image_size)
    lazy = lazily(folder, workers, image_size=image_size)
    assert len(lazy) == len(resident) == 200 and torch.equal(lazy.labels, resident.labels)
    indices = torch.tensor([3, 199, 0, 3, 57])
    assert torch.equal(lazy.batch(indices), resident.batch(indices))
    assert lazy.batch(torch.tensor([], dtype=torch.int64)).shape == (0, *resident.images.shape[1:])


def test_the_memory_limit_decides(folder):
    exact = 200 * 3 * 5 * 7
    assert load_dataset(str(folder), "all", memory_limit=exact).resident
    assert not load_dataset(str(folder), "all", memory_limit=exact - 1).resident


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("memory_limit", [None, 0])
def test_batches_come_in_order(folder, workers, depth, memory_limit):
    data = load_dataset(str(folder), "all", memory_limit=memory_limit, workers=workers)
    everything = load_dataset(str(folder), "all").images
    order = [batch_indices(200, 16, 0, 0, step) for step in range(12)]
    result = list(batches(data, iter(order), depth=depth))
    assert len(result) == 12
    for (indices, images), expected in zip(result, order, strict=True):
        assert torch.equal(indices, expected) and torch.equal(images, everything[expected])


def test_no_more_than_depth_batches_are_taken_ahead(folder):
    taken = []

    def order():
        for i in range(10):
            taken.append(i)
            yield torch.tensor([i])

    stream = batches(lazily(folder), order(), depth=2)
    next(stream)
    assert len(taken) == 3
    next(stream)
    assert len(taken) == 4
    stream.close()


def test_without_workers_no_thread_is_started(folder):
    before = set(threading.enumerate())
    stream = batches(lazily(folder, 0), (torch.tensor([i]) for i in range(100)))
    next(stream)
    assert set(threading.enumerate()) <= before
    stream.close()


def test_a_stream_left_early_stops_its_thread(folder):
    stream = batches(lazily(folder), (torch.tensor([i]) for i in range(100)))
    next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while any(t.name.startswith("softcl-prefetch") for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_unreadable_image_is_replaced_by_the_next_of_its_class(folder):
    (folder / "a" / "099.png").write_bytes(b"junk")
    (folder / "a" / "040.png").write_bytes(b"junk")
    good = load_dataset(str(folder), "all")
    lazy = lazily(folder)
    images = lazy.batch(torch.tensor([40, 99, 41, 0]))
    assert torch.equal(images[0], images[2]) and torch.equal(images[1], images[3])
    assert sorted(line.split(":")[0] for line in lazy.skipped) == ["a/040.png", "a/099.png"]
    lazy.batch(torch.tensor([40]))
    assert len(lazy.skipped) == 2 and len(good.skipped) == 2


def test_too_many_unreadable_images_raise_at_their_batch(folder):
    for i in (10, 20, 30):
        (folder / "a" / f"0{i}.png").write_bytes(b"junk")
    order = [torch.tensor([0, 1]), torch.tensor([10, 20]), torch.tensor([30]), torch.tensor([5])]
    stream = batches(lazily(folder), order)
    for _ in range(2):
        next(stream)
    with pytest.raises(DataError, match="3 of 200 images cannot be read"):
        next(stream)


def test_depth_is_checked(folder):
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        next(batches(lazily(folder), [], depth=0))
