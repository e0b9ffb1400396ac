"""The memory queue against a deque of rows, its state, its refusals and its arguments."""

from __future__ import annotations

import copy
import io
import random
import warnings
from collections import deque

import pytest
import torch

from softcl import native
from softcl.nn import MemoryQueue, enqueue

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "native"])
def code(request, monkeypatch):
    """Run a test with the PyTorch code and with the compiled code, where it is built."""
    if request.param == "torch":
        monkeypatch.setattr(native, "load", lambda: (None, "left out"))
    elif native.load()[0] is None:
        pytest.skip("softcl._C is not built")
    return request.param


def stored(keys: torch.Tensor, dtype: torch.dtype, normalize: bool = True) -> torch.Tensor:
    """The rows keys become: unit rows in float64, rounded to fp32, then to the storage type."""
    wide = keys.double()
    if normalize:
        wide = wide / wide.square().sum(1, keepdim=True).sqrt()
    return wide.float().to(dtype)


def assert_same_rows(rows: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to one rounding step of the storage type."""
    torch.testing.assert_close(rows, expected, rtol=torch.finfo(rows.dtype).eps, atol=1e-7)


class DequeModel:
    """The specification: a deque whose left end is the oldest row; a refused key keeps that row."""

    def __init__(self, queue: MemoryQueue) -> None:
        self.rows = deque(queue.rows.clone(), maxlen=queue.size)
        self.count = self.refused = 0

    def enqueue(self, keys: torch.Tensor, dtype: torch.dtype) -> None:
        bad = ~keys.isfinite().all(1) | (keys == 0).all(1)
        for refused, row in zip(bad.tolist(), stored(keys, dtype), strict=True):
            self.refused += refused
            self.count += 1
            self.rows.append(self.rows[0] if refused else row)

    def check(self, queue: MemoryQueue, first_filled: int) -> None:
        oldest_first = queue.rows.roll(-queue.pointer, dims=0)
        assert_same_rows(oldest_first, torch.stack(list(self.rows)))
        assert queue.pointer == self.count % queue.size
        assert queue.filled == min(queue.size, first_filled + self.count)
        assert queue.refused == self.refused


def batch_size(rng: random.Random, size: int) -> int:
    edges = [0, 1, size - 1, size, size + 1, 2 * size, 3 * size + 1]
    return rng.choice(edges) if rng.random() < 0.5 else rng.randrange(2 * size + 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", ["random", "empty"])
@pytest.mark.parametrize("size", [1, 2, 7, 32])
@pytest.mark.filterwarnings("ignore:MemoryQueue refused")
def test_thousands_of_batches_follow_a_deque(size, init, dtype, code):
    rng = random.Random(size)
    generator = torch.Generator().manual_seed(size)
    queue = MemoryQueue(size, 5, dtype=dtype, init=init)
    model, address, first = DequeModel(queue), queue.rows.data_ptr(), queue.filled
    for step in range(400):
        keys = torch.randn(batch_size(rng, size), 5, generator=generator)
        keys *= 10.0 ** rng.uniform(-6, 6)
        for row in range(len(keys)):
            if rng.random() < 0.03:
                bad = rng.choice([float("nan"), float("inf"), -float("inf")])
                keys[row, rng.randrange(5)] = bad
            elif rng.random() < 0.02:
                keys[row] = 0
        queue.enqueue(keys)
        model.enqueue(keys, dtype)
        model.check(queue, first)
        if step == 200:  # continue from a saved state
            state = copy.deepcopy(queue.state_dict())
            queue = MemoryQueue(size, 5, dtype=dtype, init="empty", seed=9)
            queue.load_state_dict(state)
            assert queue.rows.data_ptr() != address
            address = queue.rows.data_ptr()
        assert queue.rows.data_ptr() == address
    assert model.refused > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_batch_equals_its_pieces(dtype, code):
    keys = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    keys[[3, 19, 20, 49]] = float("nan")
    whole, pieces = MemoryQueue(8, 6, dtype=dtype), MemoryQueue(8, 6, dtype=dtype)
    with pytest.warns(RuntimeWarning):
        whole.enqueue(keys)
    with pytest.warns(RuntimeWarning):
        for piece in keys.split(3):
            pieces.enqueue(piece)
    assert torch.equal(whole.rows, pieces.rows)
    assert (whole.pointer, whole.refused) == (pieces.pointer, pieces.refused) == (50 % 8, 4)


@pytest.mark.parametrize("key_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_unit_rows_of_the_storage_type(dtype, key_dtype, code):
    keys = torch.randn(20, 33, generator=torch.Generator().manual_seed(1)).to(key_dtype)
    queue = MemoryQueue(16, 33, dtype=dtype)
    queue.enqueue(keys)
    assert queue.rows.dtype == dtype
    norms = queue.rows.double().norm(dim=1)
    assert (norms - 1).abs().max() <= torch.finfo(dtype).eps
    assert_same_rows(queue.rows[:4], stored(keys[16:], dtype))


def test_strided_keys_and_keys_with_gradient(code):
    keys = torch.randn(9, 4, generator=torch.Generator().manual_seed(2)).T.requires_grad_()
    before = keys.detach().clone()
    queue = MemoryQueue(6, 9)
    queue.enqueue(keys)
    assert_same_rows(queue.rows[:4], stored(before, torch.float32))
    assert not queue.rows.requires_grad and queue.rows.grad_fn is None
    assert torch.equal(keys, before)


def test_without_normalize_rows_are_stored_as_they_are(code):
    keys = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    queue = MemoryQueue(2, 2)
    queue.enqueue(keys, normalize=False)
    assert torch.equal(queue.rows, keys)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "bad", [[float("nan"), 1, 1], [1, float("inf"), 1], [-float("inf")] * 3, [0, 0, 0], [1e-13] * 3]
)
def test_a_key_without_direction_is_refused(bad, normalize, code):
    queue = MemoryQueue(4, 3)
    before = queue.rows.clone()
    keys = torch.tensor([[0.6, 0.8, 0.0], bad, [0.0, 0.6, 0.8]])
    with pytest.warns(RuntimeWarning, match="refused 1 key"):
        queue.enqueue(keys, normalize)
    assert_same_rows(queue.rows[[0, 2]], keys[[0, 2]])
    assert torch.equal(queue.rows[[1, 3]], before[[1, 3]])
    assert (queue.pointer, queue.filled, queue.refused) == (3, 4, 1)


def test_large_and_small_finite_keys_are_accepted(code):
    keys = torch.tensor([[3e38, 3e38], [2e-12, 0.0], [-1e-6, 1e-6]])
    queue = MemoryQueue(3, 2)
    queue.enqueue(keys)
    half = 0.5**0.5
    assert_same_rows(queue.rows, torch.tensor([[half, half], [1.0, 0.0], [-half, half]]))
    assert queue.refused == 0


def test_a_value_too_large_for_the_storage_is_refused_without_normalize(code):
    queue = MemoryQueue(2, 2, dtype=torch.float16)
    with pytest.warns(RuntimeWarning):
        queue.enqueue(torch.tensor([[1e5, 0.0]]), normalize=False)
    assert queue.refused == 1 and queue.rows.isfinite().all()


def test_rows_of_the_queue_itself_may_be_enqueued(code):
    queue = MemoryQueue(6, 3)
    before = queue.rows.clone()
    queue.enqueue(queue.rows[1:], normalize=False)
    assert torch.equal(queue.rows, torch.cat([before[1:], before[5:]]))


def test_autograd_notices_that_the_rows_changed(code):
    """A backward pass that needs the rows as they were must fail, not use the new ones."""
    queue = MemoryQueue(6, 3)
    weight = torch.ones(3, requires_grad=True)
    output = (queue.rows * weight).sum()
    queue.enqueue(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("key_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_and_torch_code_agree(dtype, key_dtype, normalize):
    module, _ = native.load()
    if module is None:
        pytest.skip("softcl._C is not built")
    generator = torch.Generator().manual_seed(0)
    results = []
    keys = torch.randn(45, 37, generator=generator).to(key_dtype)
    keys[[4, 5, 30]] = torch.tensor([float("nan"), float("inf"), 0.0]).to(key_dtype)[:, None]
    for write in (enqueue.enqueue_torch, lambda *rest: enqueue.enqueue_native(module, *rest)):
        rows = MemoryQueue(20, 37, dtype=dtype).rows
        refused = torch.tensor(7)
        write(keys, rows, refused, 13, normalize)
        results.append((rows, refused.item()))
    assert results[0][1] == results[1][1] == 10
    assert_same_rows(results[1][0], results[0][0])


def test_refusals_warn_once():
    queue = MemoryQueue(4, 2)
    bad = torch.full((3, 2), float("nan"))
    with pytest.warns(RuntimeWarning, match="refused 3 key"):
        queue.enqueue(bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        queue.enqueue(bad)
        assert queue.refused == 6


def test_filled_counts_slots_that_were_written():
    queue = MemoryQueue(5, 2, init="empty")
    assert (queue.filled, queue.pointer) == (0, 0)
    for count, filled in ((0, 0), (2, 2), (2, 4), (2, 5), (9, 5)):
        queue.enqueue(torch.ones(count, 2))
        assert queue.filled == filled
    assert MemoryQueue(5, 2).filled == 5


def test_initial_rows_depend_on_the_seed_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = MemoryQueue(64, 16, seed=3)
    torch.manual_seed(1)
    two = MemoryQueue(64, 16, seed=3, init="empty")
    assert torch.equal(one.rows, two.rows)
    assert torch.equal(one.rows.bfloat16(), MemoryQueue(64, 16, seed=3, dtype=torch.bfloat16).rows)
    assert not torch.equal(one.rows, MemoryQueue(64, 16, seed=4).rows)
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(one.rows.norm(dim=1), torch.ones(64))
    # Directions are uniform: cosines of distinct rows have mean 0 and variance 1/D.
    cosines = (one.rows @ one.rows.T)[~torch.eye(64, dtype=torch.bool)]
    assert abs(cosines.mean()) < 0.02 and abs(cosines.var() * 16 - 1) < 0.1


@pytest.mark.filterwarnings("ignore:MemoryQueue refused")
def test_state_goes_through_a_file_of_plain_tensors():
    queue = MemoryQueue(6, 3, dtype=torch.bfloat16, init="empty")
    queue.enqueue(torch.tensor([[1.0, 2.0, 3.0], [float("nan"), 0.0, 0.0]]))
    file = io.BytesIO()
    torch.save(torch.nn.ModuleDict({"queue": queue}).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert sorted(state) == ["queue._extra_state", "queue.rows"]
    loaded = MemoryQueue(6, 3, dtype=torch.bfloat16, seed=5)
    torch.nn.ModuleDict({"queue": loaded}).load_state_dict(state)
    assert torch.equal(loaded.rows, queue.rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the saved queue has warned already
        assert (loaded.pointer, loaded.filled, loaded.refused) == (2, 2, 1)


def test_a_loaded_queue_shares_nothing_with_the_state():
    queue = MemoryQueue(4, 2)
    state = copy.deepcopy(queue.state_dict())
    loaded = MemoryQueue(4, 2, seed=1)
    loaded.load_state_dict(state)
    loaded.enqueue(torch.ones(2, 2))
    assert torch.equal(state["rows"], queue.rows)
    assert torch.equal(state["_extra_state"], queue.state_dict()["_extra_state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.ones(5, 2)}, r"saved queue has shape .*\(5, 2\), this one \(4, 2\)"),
        ({"rows": torch.ones(4, 3)}, r"saved queue has shape .*\(4, 3\), this one \(4, 2\)"),
        ({"rows": torch.full((4, 2), float("nan"))}, "non-finite rows"),
        ({"_extra_state": torch.tensor([4, 4, 0])}, "out of range"),
        ({"_extra_state": torch.tensor([0, 5, 0])}, "out of range"),
        ({"_extra_state": torch.tensor([0, 4, -1])}, "out of range"),
        ({"_extra_state": torch.tensor([0, 4])}, "pointer, filled, refused"),
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(change, message):
    queue = MemoryQueue(4, 2)
    queue.enqueue(torch.ones(3, 2))
    state = {**MemoryQueue(4, 2, seed=1).state_dict(), **change}
    before = queue.rows.clone()
    with pytest.raises(RuntimeError, match=message):
        queue.load_state_dict(state)
    assert torch.equal(queue.rows, before)
    assert (queue.pointer, queue.filled, queue.refused) == (3, 4, 0)


def test_missing_state_is_reported():
    with pytest.raises(RuntimeError, match="rows"):
        MemoryQueue(4, 2).load_state_dict({"_extra_state": torch.tensor([0, 4, 0])})


def test_module_to_and_deepcopy():
    queue = MemoryQueue(4, 2)
    queue.enqueue(torch.ones(3, 2))
    rows = queue.rows.clone()
    moved = copy.deepcopy(queue).to(torch.bfloat16)
    assert moved.rows.dtype == torch.bfloat16 and moved.pointer == 3
    moved.enqueue(torch.ones(2, 2))
    assert (moved.pointer, moved.rows.dtype) == (1, torch.bfloat16)
    assert torch.equal(queue.rows, rows) and queue.pointer == 3
    on_meta = MemoryQueue(4, 2).to("meta")
    assert on_meta.rows.device.type == on_meta.refused_rows.device.type == "meta"


def test_no_parameters():
    assert not list(MemoryQueue(4, 2).parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"size": 4.0}, TypeError, "size must be an int, got 4.0"),
        ({"dim": -1}, ValueError, "dim must be at least 1, got -1"),
        ({"dim": True}, TypeError, "dim must be an int, got True"),
        ({"dtype": torch.int8}, ValueError, "dtype must be .* got torch.int8"),
        ({"init": "zeros"}, ValueError, "init must be .* got 'zeros'"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got 0.5"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        MemoryQueue(**{"size": 4, "dim": 2, **arguments})


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ([[1.0, 0.0]], TypeError, "keys must be a tensor, got list"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "keys must be floating-point"),
        (torch.ones(2), ValueError, r"keys must have shape \(N, 2\), got \(2,\)"),
        (torch.ones(2, 3), ValueError, r"keys must have shape \(N, 2\), got \(2, 3\)"),
        (torch.ones(2, 2, device="meta"), ValueError, "keys are on meta, the queue is on cpu"),
    ],
)
def test_wrong_keys_change_nothing(keys, error, message):
    queue = MemoryQueue(4, 2)
    before = queue.rows.clone()
    with pytest.raises(error, match=message):
        queue.enqueue(keys)
    assert torch.equal(queue.rows, before) and queue.pointer == 0
