"""Batches of indices: pure functions of (seed, epoch, step), every sample once an epoch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softcl.data import batch_indices, num_batches
from softcl.data.stream import _epoch_order


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(1, 500),
    batch_size=st.integers(1, 200),
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 2**40),
)
def test_an_epoch_visits_every_sample_once(num_samples, batch_size, seed, epoch):
    steps = num_batches(num_samples, batch_size)
    assert steps == num_samples // batch_size
    batches = [batch_indices(num_samples, batch_size, seed, epoch, s) for s in range(steps)]
    if not batches:
        return
    assert all(b.shape == (batch_size,) and b.dtype == torch.int64 for b in batches)
    seen = torch.cat(batches)
    assert len(torch.unique(seen)) == steps * batch_size
    assert seen.min() >= 0 and seen.max() < num_samples


def test_a_batch_is_a_pure_function_of_its_numbers():
    first = batch_indices(1000, 64, 3, 7, 11)
    _epoch_order.cache_clear()
    torch.randn(5)
    assert torch.equal(batch_indices(1000, 64, 3, 7, 11), first)
    for other in ((4, 7, 11), (3, 8, 11), (3, 7, 12), (7, 3, 11)):
        assert not torch.equal(batch_indices(1000, 64, *other), first)


def test_the_order_is_written_down():
    # A run resumed elsewhere continues bit for bit only if the order is the same there.
    assert batch_indices(10, 10, 0, 0, 0).tolist() == EXPECTED_ORDER
    assert batch_indices(10, 10, 1, 0, 0).tolist() != EXPECTED_ORDER


EXPECTED_ORDER = [0, 7, 8, 2, 5, 9, 4, 6, 3, 1]


def test_a_batch_can_be_changed_without_harm():
    batch = batch_indices(100, 10, 0, 0, 0)
    expected = batch.clone()
    batch.zero_()
    assert torch.equal(batch_indices(100, 10, 0, 0, 0), expected)


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
        ((100, -3, 0, 0, 0), "batch_size must be at least 1, got -3"),
        ((100, 101, 0, 0, 0), "batch_size=101 is larger than the 100 samples"),
        ((0, 1, 0, 0, 0), "batch_size=1 is larger than the 0 samples"),
        ((-1, 1, 0, 0, 0), "num_samples must be at least 0, got -1"),
        ((100, 10, 0, -1, 0), "epoch must be at least 0, got -1"),
        ((100, 10, 0, 0, -1), r"step must be in \[0, 10\), got -1"),
        ((105, 10, 0, 0, 10), r"step must be in \[0, 10\), got 10"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch_indices(*arguments)
