"""The compiled enqueue against one key at a time in Python."""

from __future__ import annotations

import math

import pytest
import torch

_C = pytest.importorskip("softcl._C", reason="softcl._C is not built")
from softcl.native import ELEMENT_TYPES  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def enqueue(keys, queue, pointer, normalize=True):
    return _C.cpu_enqueue(
        keys=keys.data_ptr(),
        queue=queue.data_ptr(),
        num_keys=len(keys),
        queue_size=len(queue),
        dim=queue.shape[1],
        pointer=pointer,
        key_type=ELEMENT_TYPES[keys.dtype],
        queue_type=ELEMENT_TYPES[queue.dtype],
        normalize=normalize,
    )


def one_at_a_time(keys, queue, pointer, normalize=True):
    refused = 0
    for i, key in enumerate(keys):
        row = key if normalize else key.to(queue.dtype)
        norm = row.double().norm()
        if norm >= 1e-12 and norm.isfinite():
            row = (key.double() * (1.0 / norm)).float() if normalize else row
            queue[(pointer + i) % len(queue)] = row.to(queue.dtype)
        else:
            refused += 1
    return refused


def accepted(keys, dtype):
    """Which one-element keys are, once stored in ``dtype``, finite and not zero."""
    stored = keys.to(dtype).float()
    return stored.isfinite() & (stored.abs() >= 1e-12)


def bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("queue_dtype", DTYPES)
@pytest.mark.parametrize("key_dtype", DTYPES)
def test_same_bits(key_dtype, queue_dtype, normalize):
    generator = torch.Generator().manual_seed(1)
    for K, D in ((1, 1), (7, 5), (64, 33)):
        queue = torch.randn(K, D, generator=generator).to(queue_dtype)
        expected = queue.clone()
        pointer = 0
        for N in (0, 1, K - 1, K, K + 1, 3 * K + 2):
            keys = torch.randn(N, D, generator=generator).to(key_dtype)
            # A NaN, an infinity, a zero row and one whose squares overflow float32.
            for i, value in enumerate((math.nan, -math.inf, 0.0, 3e4)):
                if i + 2 < N:
                    keys[i + 2] = value if i != 1 else keys[i + 2]
                    keys[i + 2, D - 1] = value
            refused = enqueue(keys, queue, pointer, normalize)
            assert refused == one_at_a_time(keys, expected, pointer, normalize)
            assert torch.equal(bits(queue), bits(expected))
            pointer = (pointer + N) % K


def test_values_that_round_to_infinity_are_refused():
    queue = torch.ones(2, 3, dtype=torch.float16)
    keys = torch.tensor([[1e5, 0.0, 0.0], [1.0, 2.0, 3.0]])
    assert enqueue(keys, queue, 0, normalize=False) == 1
    assert torch.equal(queue[0], torch.ones(3, dtype=torch.float16))
    assert enqueue(keys, queue, 0, normalize=True) == 0  # (1, 0, 0) is a fine unit row


@pytest.mark.parametrize("queue_dtype", DTYPES)
def test_every_half_and_every_rounding(queue_dtype):
    """All halves, and fp32 values around every boundary of rounding, convert as torch does."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        keys = halves.view(dtype)[:, None].contiguous()
        queue = torch.full((len(keys), 1), 7.0, dtype=queue_dtype)
        expected = torch.where(accepted(keys, queue_dtype), keys.to(queue_dtype), queue)
        enqueue(keys, queue, 0, normalize=False)
        assert torch.equal(bits(queue), bits(expected))
    # Halfway points between neighbouring halves, and the fp32 values on either side of them.
    finite = halves.view(torch.float16).float()
    finite = finite[finite.isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    keys = torch.cat([middle, middle.nextafter(finite[1:]), middle.nextafter(finite[:-1])])[:, None]
    keys = keys[accepted(keys, queue_dtype).squeeze(1)].contiguous()
    queue = torch.zeros(len(keys), 1, dtype=queue_dtype)
    assert enqueue(keys, queue, 0, normalize=False) == 0
    assert torch.equal(bits(queue), bits(keys.to(queue_dtype)))


@pytest.mark.parametrize("name, value", [("pointer", 4), ("dim", 0), ("key_type", 9)])
def test_bad_arguments_name_themselves(name, value):
    rows = torch.ones(4, 2)
    good = {
        "keys": rows.data_ptr(),
        "queue": rows.clone().data_ptr(),
        "num_keys": 0,
        "queue_size": 4,
        "dim": 2,
        "pointer": 0,
        "key_type": 0,
        "queue_type": 0,
        "normalize": True,
    }
    assert _C.cpu_enqueue(**good) == 0
    with pytest.raises(ValueError, match=name):
        _C.cpu_enqueue(**{**good, name: value})
