"""Batches: pure functions of (seed, epoch, step), the same from memory and from files."""

from __future__ import annotations

import threading
import time
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softcl.data import DataError, ImageSet, batch_indices, batches, load_dataset
from softcl.data.stream import LANES, WINDOW, _epoch_order

Image = pytest.importorskip("PIL.Image")

# ------------------------------------------------------------------------------------------- order


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(1, 500),
    batch_size=st.integers(1, 200),
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 2**40),
)
def test_an_epoch_visits_every_sample_once(num_samples, batch_size, seed, epoch):
    steps = num_samples // batch_size
    made = [batch_indices(num_samples, batch_size, seed, epoch, s) for s in range(steps)]
    if not made:
        return
    assert all(b.shape == (batch_size,) and b.dtype == torch.int64 for b in made)
    seen = torch.cat(made)
    assert len(torch.unique(seen)) == steps * batch_size
    assert seen.min() >= 0 and seen.max() < num_samples


def test_a_batch_is_a_pure_function_of_its_numbers():
    first = batch_indices(1000, 64, 3, 7, 11)
    expected = first.clone()
    first.zero_()  # which harms nobody
    assert torch.equal(batch_indices(1000, 64, 3, 7, 11), expected)
    _epoch_order.cache_clear()
    torch.randn(5)
    assert torch.equal(batch_indices(1000, 64, 3, 7, 11), expected)
    for other in ((4, 7, 11), (3, 8, 11), (3, 7, 12), (7, 3, 11)):
        assert not torch.equal(batch_indices(1000, 64, *other), expected)


def test_the_order_is_written_down():
    # A run resumed elsewhere continues bit for bit only if the order is the same there.
    assert batch_indices(10, 10, 0, 0, 0).tolist() == [0, 7, 8, 2, 5, 9, 4, 6, 3, 1]


def starts_of(lengths: list[int]) -> tuple[int, ...]:
    return tuple(accumulate([0, *lengths[:-1]]))


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), epoch=st.integers(0, 9))
def test_an_epoch_in_shards_visits_every_sample_once(lengths, epoch):
    size, shards = sum(lengths), starts_of(lengths)
    order = batch_indices(size, size, 3, epoch, 0, shards)
    assert torch.equal(order.sort().values, torch.arange(size))
    _epoch_order.cache_clear()
    assert torch.equal(batch_indices(size, size, 3, epoch, 0, shards), order)


def test_shards_are_read_nearly_from_front_to_back_and_few_at_a_time():
    lengths = [2000 + 10 * number for number in range(40)]
    size, shards = sum(lengths), starts_of(lengths)
    order = batch_indices(size, size, 0, 0, 0, shards).numpy()
    owner = np.searchsorted(shards, order, side="right") - 1
    for start in range(0, size - 256, 997):
        batch = owner[start : start + 256]
        assert len(set(batch)) <= 2 * LANES
        if start < size - LANES * 2000:  # of the last ones some lanes are done
            assert np.bincount(batch).max() < 256 / 3
    for shard, length in enumerate(lengths):
        read = order[owner == shard] - shards[shard]
        late = np.arange(length) - read  # against reading it in its order
        assert np.abs(late).max() < WINDOW and np.abs(late).mean() > WINDOW / 10
        # what is still to come lies at most a window before what was read
        assert (np.maximum.accumulate(read) - read).max() <= WINDOW
    other = batch_indices(size, size, 0, 1, 0, shards).numpy()
    first, second = (dict.fromkeys(np.searchsorted(shards, x, "right")) for x in (order, other))
    assert list(first) != list(second)  # shards in another order
    assert batch_indices(10, 10, 0, 0, 0, (0, 4)).tolist() == [0, 5, 4, 2, 7, 8, 1, 6, 3, 9]


def test_positions_are_uniform():
    # Each of 20 samples at each of 20 positions over 4000 epochs: 361 degrees of freedom, where
    # chi-square exceeds 470 with probability 1e-4.
    orders = torch.stack([batch_indices(20, 20, 5, epoch, 0) for epoch in range(4000)])
    counts = torch.stack([torch.bincount(orders[:, p], minlength=20) for p in range(20)]).double()
    assert ((counts - 200) ** 2 / 200).sum() < 470
    # and neighbours in one order are not related to neighbours in the next
    follows = (orders[:, :-1] + 1 == orders[:, 1:]).double().mean()
    assert abs(follows - 1 / 20) < 4 * (0.05 * 0.95 / orders[:, 1:].numel()) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 0, 0, 0, 0), "batch_size must be at least 1, got 0"),
        ((100, 101, 0, 0, 0), "batch_size=101 is larger than the 100 samples"),
        ((0, 1, 0, 0, 0), "batch_size=1 is larger than the 0 samples"),
        ((100, 10, 0, -1, 0), "epoch must be at least 0, got -1"),
        ((100, 10, 0, 0, -1), r"step must be in \[0, 10\), got -1"),
        ((105, 10, 0, 0, 10), r"step must be in \[0, 10\), got 10"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch_indices(*arguments)


# ------------------------------------------------------------------------------------- from files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 100 small images each, all different."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        (root / name).mkdir()
        for i in range(100):
            pixels = torch.randint(0, 256, (5, 7, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{i:03d}.png")
    return root


@pytest.fixture
def damaged(folder):
    """A function that damages the images of these numbers of class a, until the test ends."""
    before = {}

    def damage(*numbers: int) -> None:
        for path in (folder / "a" / f"{number:03d}.png" for number in numbers):
            before[path] = path.read_bytes()
            path.write_bytes(b"junk")

    yield damage
    for path, content in before.items():
        path.write_bytes(content)


def lazily(folder, workers: int = 2, **options) -> ImageSet:
    data = load_dataset(str(folder), "all", memory_limit=0, workers=workers, **options)
    assert not data.resident and "on demand" in data.describe()
    return data


@pytest.mark.parametrize(("workers", "image_size"), [(0, None), (1, 4), (5, None)])
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


@pytest.mark.parametrize(("workers", "memory_limit"), [(0, 0), (1, 0), (4, 0), (4, None)])
def test_batches_come_in_order(folder, workers, memory_limit):
    data = load_dataset(str(folder), "all", memory_limit=memory_limit, workers=workers)
    everything = load_dataset(str(folder), "all").images
    order = [batch_indices(200, 16, 0, 0, step) for step in range(12)]
    result = list(batches(data, iter(order)))
    assert len(result) == 12
    for (indices, images), expected in zip(result, order, strict=True):
        assert torch.equal(indices, expected) and torch.equal(images, everything[expected])


def test_two_batches_are_taken_ahead(folder):
    taken = []

    def order():
        for i in range(10):
            taken.append(i)
            yield torch.tensor([i])

    stream = batches(lazily(folder), order())
    next(stream)
    assert len(taken) == 3
    next(stream)
    assert len(taken) == 4
    stream.close()


def test_threads_are_started_where_they_are_wanted_and_end_with_the_stream(folder):
    def running() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("softcl-prefetch")]

    for workers in (0, 2):
        before = set(threading.enumerate())
        data = lazily(folder, workers)
        stream = batches(data, (torch.tensor([i]) for i in range(100)))
        next(stream)
        assert (set(threading.enumerate()) <= before) == (workers == 0)
        stream.close()
        deadline = time.monotonic() + 10
        while running():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_an_unreadable_image_is_replaced_by_the_next_of_its_class(folder, damaged):
    damaged(99, 40)
    good, lazy = load_dataset(str(folder), "all"), lazily(folder)
    images = lazy.batch(torch.tensor([40, 99, 41, 0]))
    assert torch.equal(images[0], images[2]) and torch.equal(images[1], images[3])
    assert sorted(line.split(":")[0] for line in lazy.skipped) == ["a/040.png", "a/099.png"]
    lazy.batch(torch.tensor([40]))
    assert len(lazy.skipped) == 2 and len(good.skipped) == 2


def test_too_many_unreadable_images_raise_at_their_batch(folder, damaged):
    damaged(10, 20, 30)
    order = [torch.tensor([0, 1]), torch.tensor([10, 20]), torch.tensor([30]), torch.tensor([5])]
    stream = batches(lazily(folder), order)
    for _ in range(2):
        next(stream)
    with pytest.raises(DataError, match="3 of 200 images cannot be read"):
        next(stream)
