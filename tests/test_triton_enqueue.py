"""The Triton enqueue kernel against one key at a time, and the memory queue that uses it."""

from __future__ import annotations

import math

import pytest
import torch

from softcl import native
from softcl.nn import MemoryQueue
from softcl.nn import enqueue as enqueue_module

pytestmark = pytest.mark.usefixtures("triton_device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def enqueue(keys, queue, pointer, normalize=True):
    """Run the kernel; the number of refused keys."""
    from softcl.kernels import enqueue as kernel

    refused = torch.zeros((), dtype=torch.int64, device=queue.device)
    kernel.launch(keys, queue, refused, pointer, normalize)
    return int(refused)


def one_at_a_time(keys, queue, pointer, normalize=True):
    refused = 0
    for i, key in enumerate(keys):
        row = key.double() if normalize else key.to(queue.dtype).double()
        norm = row.norm()
        if norm >= 1e-12 and norm.isfinite():
            row = (row / norm).float() if normalize else row
            queue[(pointer + i) % len(queue)] = row.to(queue.dtype)
        else:
            refused += 1
    return refused


def assert_same_rows(rows, expected, normalize):
    """Equal bits where nothing is computed, else up to one rounding step of the storage type."""
    if not normalize:
        assert torch.equal(rows, expected)
    torch.testing.assert_close(rows, expected, rtol=torch.finfo(rows.dtype).eps, atol=1e-7)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("queue_dtype", DTYPES)
@pytest.mark.parametrize("key_dtype", DTYPES)
def test_against_one_at_a_time(triton_device, key_dtype, queue_dtype, normalize):
    """Wrapped, larger than K, of one row, one column, and with refused keys in between."""
    generator = torch.Generator().manual_seed(1)
    for N, K, D, pointer in [(1, 1, 1, 0), (5, 7, 5, 4), (40, 7, 33, 6), (20, 64, 16, 60)]:
        queue = torch.randn(K, D, generator=generator).to(queue_dtype)
        keys = torch.randn(N, D, generator=generator).to(key_dtype)
        if N > 1:
            keys[1] = 0.0
            keys[2, D // 2] = math.nan
            keys[4, 0] = -math.inf
        expected = queue.clone()
        refused = one_at_a_time(keys, expected, pointer, normalize)
        queue = queue.to(triton_device)
        assert enqueue(keys.to(triton_device), queue, pointer, normalize) == refused
        assert_same_rows(queue.cpu(), expected, normalize)


@pytest.mark.parametrize("length", [1e-30, 1e-13, 1e-11, 1e30, 3e38])
def test_extreme_lengths(triton_device, length):
    """Squares neither overflow nor vanish; a norm below 1e-12 is refused."""
    keys = torch.full((2, 4), length)
    queue = torch.zeros(3, 4)
    expected = queue.clone()
    refused = one_at_a_time(keys, expected, 2)
    queue = queue.to(triton_device)
    assert enqueue(keys.to(triton_device), queue, 2) == refused
    assert_same_rows(queue.cpu(), expected, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_queue_uses_the_kernel(triton_device, dtype, monkeypatch):
    """The same rows as the PyTorch code's, strided keys, and the autograd version counted."""
    monkeypatch.setattr(native, "load", lambda: (None, "left out"))
    calls = []
    launch = enqueue_module._triton().launch
    monkeypatch.setattr(
        enqueue_module._triton(), "launch", lambda *a: (calls.append(a), launch(*a))[1]
    )
    queue, plain = (MemoryQueue(7, 6, dtype=dtype, device=triton_device) for _ in range(2))
    generator = torch.Generator().manual_seed(2)
    version = queue.rows._version
    for N in (3, 0, 9, 5):
        keys = torch.randn(6, N, generator=generator).to(triton_device).T
        queue.enqueue(keys)
        with monkeypatch.context() as patch:
            patch.setattr(enqueue_module, "_triton", lambda: None)
            plain.enqueue(keys)
        assert_same_rows(queue.rows.cpu(), plain.rows.cpu(), True)
    assert len(calls) == 3 and queue.pointer == plain.pointer == 17 % 7  # not for no keys
    assert queue.rows._version > version


def test_keys_may_be_rows_of_the_queue(triton_device, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: (None, "left out"))
    queue = MemoryQueue(5, 4, device=triton_device)
    before = queue.rows.clone()
    queue.enqueue(queue.rows[1:4])
    torch.testing.assert_close(queue.rows[:3], before[1:4])
    assert torch.equal(queue.rows[3:], before[3:])
