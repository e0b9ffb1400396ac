"""Where the memory queue's rows live: meta device, copies, conversions, assigned states."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from softcl.distributed import ALONE, ShardedQueue
from softcl.nn import MemoryQueue

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sharded(size: int, dim: int, **options) -> ShardedQueue:
    return ShardedQueue(size, dim, ALONE, **options)


def rows_of(queue: nn.Module) -> torch.Tensor:
    return queue.shard.rows if isinstance(queue, ShardedQueue) else queue.rows


def in_context(kind, *sizes, **options):
    with torch.device("meta"):
        return kind(*sizes, **options)


def by_argument(kind, *sizes, **options):
    return kind(*sizes, device="meta", **options)


def used(kind=MemoryQueue, **options) -> nn.Module:
    """A queue that holds keys and has refused one."""
    queue = kind(6, 3, seed=4, **options)
    keys = torch.tensor([[1.0, 2.0, 3.0], [float("nan"), 0.0, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        queue.enqueue(keys)
    return queue


@pytest.mark.parametrize("kind", [MemoryQueue, sharded])
@pytest.mark.parametrize("init", ["random", "empty"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [in_context, by_argument])
def test_a_queue_of_the_meta_device_draws_its_rows(make, dtype, init, kind):
    queue = make(kind, 6, 3, dtype=dtype, init=init, seed=4)
    assert rows_of(queue).is_meta
    expected = kind(6, 3, dtype=dtype, init=init, seed=4)
    for draw in (lambda: nn.ModuleDict({"queue": queue}).to_empty(device="cpu"),
                 queue.reset_parameters):  # fmt: skip
        draw()
        assert rows_of(queue).dtype == dtype
        assert torch.equal(rows_of(queue), rows_of(expected))
        assert (queue.pointer, queue.filled, queue.refused) == (0, expected.filled, 0)
    queue.enqueue(torch.ones(2, 3))
    expected.enqueue(torch.ones(2, 3))
    assert torch.equal(rows_of(queue), rows_of(expected)) and queue.pointer == 2


@pytest.mark.parametrize("kind", [MemoryQueue, sharded])
def test_reset_parameters_starts_afresh(kind):
    queue, fresh = used(kind), kind(6, 3, seed=4)
    address = rows_of(queue).data_ptr()
    queue.reset_parameters()
    assert torch.equal(rows_of(queue), rows_of(fresh)) and rows_of(queue).data_ptr() == address
    assert (queue.pointer, queue.filled, queue.refused) == (0, 6, 0)
    with pytest.warns(RuntimeWarning, match="refused 1 key"):  # another queue's warning
        queue.enqueue(torch.zeros(1, 3))


@pytest.mark.parametrize("kind", [MemoryQueue, sharded])
def test_a_queue_moved_to_the_meta_device_and_back_starts_afresh(kind):
    queue = used(kind).to("meta").to_empty(device="cpu")
    assert torch.equal(rows_of(queue), rows_of(kind(6, 3, seed=4)))
    assert (queue.pointer, queue.filled, queue.refused) == (0, 6, 0)


def test_a_queue_on_the_meta_device_takes_no_keys():
    queue = in_context(MemoryQueue, 4, 2)
    with pytest.raises(RuntimeError, match="MemoryQueue.enqueue: the queue is on the meta device"):
        queue.enqueue(torch.ones(1, 2, device="meta"))
    queue.reset_parameters()
    state = queue.state_dict()
    assert state["rows"].is_meta and state["_extra_state"].tolist() == [0, 4, 0]


@pytest.mark.parametrize("kind", [MemoryQueue, sharded])
def test_a_queue_works_under_another_default_device(kind):
    queue, plain = used(kind, init="empty"), used(kind, init="empty")
    keys = torch.ones(3, 3)
    with torch.device("meta"):
        queue.enqueue(keys)
        state = queue.state_dict()
    plain.enqueue(keys)
    assert state["_extra_state"].tolist() == [5, 5, 1]
    assert torch.equal(state["rows"], plain.state_dict()["rows"])


def test_the_rows_do_not_depend_on_the_default_dtype():
    expected = MemoryQueue(6, 3).rows
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(MemoryQueue(6, 3).rows, expected)
        assert torch.equal(rows_of(sharded(6, 3)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("make", [MemoryQueue, in_context])
@pytest.mark.parametrize("kind", [MemoryQueue, sharded])
def test_a_state_is_assigned(kind, make):
    """With assign=True the rows are those of the state, in its dtype, on its device."""
    source = used(dtype=torch.bfloat16)
    state = copy.deepcopy(source.state_dict())
    queue = kind(6, 3) if make is MemoryQueue else make(kind, 6, 3)
    queue.load_state_dict(state, assign=True)
    assert type(rows_of(queue)) is torch.Tensor and rows_of(queue).dtype == torch.bfloat16
    assert torch.equal(rows_of(queue), source.rows)
    if kind is MemoryQueue:
        assert queue.rows.data_ptr() == state["rows"].data_ptr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (queue.pointer, queue.filled, queue.refused) == (2, 6, 1)
        for one in (queue, source):
            one.enqueue(torch.ones(3, 3))
    assert torch.equal(rows_of(queue), source.rows) and queue.pointer == 5
    assert queue.to(torch.float32).refused == 1


def test_assigned_rows_are_a_contiguous_buffer():
    """The backends read memory as it lies, and a queue has no parameters."""
    rows = MemoryQueue(3, 6, seed=9).rows.T
    for given in (rows, nn.Parameter(rows)):
        queue = MemoryQueue(6, 3)
        queue.load_state_dict({**queue.state_dict(), "rows": given}, assign=True)
        assert torch.equal(queue.rows, rows) and queue.rows.is_contiguous()
        assert not list(queue.parameters()) and not queue.rows.requires_grad


@pytest.mark.parametrize("kind", [MemoryQueue, sharded])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.ones(6, 3, dtype=torch.float64)}, "bfloat16 or float16, got torch.float64"),
        ({"rows": torch.ones(6, 3, dtype=torch.int8)}, "numbers in memory, got torch.int8"),
        ({"rows": torch.ones(6, 3, device="meta")}, "numbers in memory, got .* on meta"),
        ({"rows": [[1.0]]}, "saved rows must be a tensor, got list"),
        ({"_extra_state": torch.tensor([0.0, 6.0, 0.0])}, "pointer, filled, refused"),
        ({"_extra_state": None}, "pointer, filled, refused"),
    ],
)
def test_a_state_that_cannot_be_assigned_changes_nothing(kind, change, message):
    queue = used(kind)
    before = rows_of(queue).clone()
    with pytest.raises(RuntimeError, match=message):
        queue.load_state_dict({**MemoryQueue(6, 3).state_dict(), **change}, assign=True)
    assert torch.equal(rows_of(queue), before)
    assert (queue.pointer, queue.filled) == (2, 6)


@pytest.mark.parametrize("kind", [MemoryQueue, sharded])
def test_a_queue_on_the_meta_device_is_loaded_by_assignment_alone(kind):
    queue = in_context(kind, 6, 3, init="empty")
    with pytest.raises(RuntimeError, match="queue on the meta device .* assign=True"):
        queue.load_state_dict(used().state_dict())
    assert (queue.pointer, queue.filled) == (0, 0)


@pytest.mark.parametrize("missing", ["rows", "_extra_state"])
@pytest.mark.parametrize("kind", [MemoryQueue, sharded])
def test_half_a_state_is_not_loaded(kind, missing):
    queue = kind(6, 3, seed=1, init="empty")
    before = rows_of(queue).clone()
    state = used().state_dict()
    del state[missing]
    assert queue.load_state_dict(state, strict=False).missing_keys == [missing]
    assert torch.equal(rows_of(queue), before) and (queue.pointer, queue.filled) == (0, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda queue: pickle.loads(pickle.dumps(queue))])
@pytest.mark.parametrize("kind", [MemoryQueue, sharded])
def test_a_copy_goes_on_by_itself(kind, copied):
    queue = used(kind, init="empty")
    other = copied(queue)
    assert (other.pointer, other.filled, other.refused) == (2, 2, 1)
    other.enqueue(torch.ones(2, 3))
    assert (other.pointer, other.filled, queue.pointer, queue.filled) == (4, 4, 2, 2)
    assert not torch.equal(rows_of(other), rows_of(queue))


@pytest.mark.parametrize("kind", [MemoryQueue, sharded])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_a_dtype_that_no_backend_reads_is_refused(dtype, kind):
    queue = used(kind)
    before = rows_of(queue)
    with pytest.raises(TypeError, match=f"dtype of a MemoryQueue .* got {dtype}") as caught:
        queue.to(dtype)
    assert "\n" not in str(caught.value)
    assert rows_of(queue) is before and queue.refused == 1


@pytest.mark.parametrize("kind", [MemoryQueue, sharded])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_conversion_keeps_the_counters(dtype, kind):
    for convert in (nn.Module.to, nn.Module.type):  # the second takes every buffer along
        queue = convert(used(kind), dtype)
        queue.enqueue(torch.ones(2, 3))
        assert rows_of(queue).dtype == dtype
        assert (queue.pointer, queue.filled, queue.refused) == (4, 6, 1)
        shard = queue.shard if kind is sharded else queue
        assert shard.refused_rows.dtype == torch.int64


@pytest.mark.parametrize("kind", [MemoryQueue, sharded])
@pytest.mark.parametrize("number", [np.int64, np.uint8, np.array, torch.tensor])
def test_integers_of_numpy_and_of_tensors(kind, number):
    queue = kind(number(6), number(3), seed=number(4))
    assert torch.equal(rows_of(queue), rows_of(kind(6, 3, seed=4)))
    assert (queue.size, queue.dim) == (6, 3) and type(queue.size) is type(queue.dim) is int
    queue.pointer, queue.filled = number(2), number(5)
    assert (queue.pointer, queue.filled) == (2, 5)


@pytest.mark.parametrize("name", ["size", "dim", "seed"])
@pytest.mark.parametrize("kind", [MemoryQueue, sharded])
@pytest.mark.parametrize(
    "value",
    [True, np.True_, torch.tensor(True), 4.0, np.float32(4), torch.tensor(4.0), torch.tensor([4]),
     np.array([4]), torch.tensor(4, device="meta"), "4", None],
)  # fmt: skip
def test_what_is_no_integer_is_refused(kind, name, value):
    arguments = {"size": 6, "dim": 3, "seed": 0, name: value}
    with pytest.raises(TypeError, match=f"{name} must be an int, got "):
        kind(**arguments)


@pytest.mark.parametrize("kind", [MemoryQueue, sharded])
def test_positions_and_seeds_out_of_range(kind):
    queue = kind(6, 3)
    for name, value, message in (
        ("pointer", 6, "pointer must be below the queue's size 6, got 6"),
        ("pointer", -1, "pointer must be at least 0, got -1"),
        ("filled", 7, "filled must be at most the queue's size 6, got 7"),
        ("filled", -1, "filled must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            setattr(queue, name, value)
    assert (queue.pointer, queue.filled) == (0, 6)
    with pytest.raises(ValueError, match=f"seed must fit in 64 bits, got {1 << 64}"):
        kind(6, 3, seed=1 << 64)
    with pytest.raises(ValueError, match="device must be .* got 'gpu'"):
        kind(6, 3, device="gpu")


def test_the_sharded_queue_refuses_what_the_other_does(monkeypatch):
    with pytest.raises(TypeError, match="world must be a World, got None"):
        ShardedQueue(6, 3, None)
    queue = sharded(6, 3)
    for kind in (queue, MemoryQueue(6, 3)):
        with pytest.raises(TypeError, match="normalize must be True or False, got 'yes'"):
            kind.enqueue(torch.ones(2, 3), "yes")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="ShardedQueue.enqueue cannot be captured"):
        queue.enqueue(torch.ones(2, 3))
    assert queue.pointer == 0
