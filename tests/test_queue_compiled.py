"""The memory queue inside torch.compile and beside CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.library import opcheck

from softcl import AdaptiveSoftLabels, HardLabels, soft_contrastive_loss
from softcl.methods.losses import MoCoLoss
from softcl.nn import MemoryQueue

K, N, D = 64, 8, 16


class Counting:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self, then=aot_eager) -> None:
        self.graphs, self.then = 0, then

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.then(graph, inputs)


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()


def batches(steps: int, rows: int = N) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, D, generator=generator) for _ in range(steps)]


def run(queue: MemoryQueue, keys: list[torch.Tensor], compiled=None, count_graphs=None):
    """Losses, and rows, pointer, fill count and graphs after each step."""

    def step(query, key):
        loss = soft_contrastive_loss(
            query, key, queue.rows[: queue.filled], AdaptiveSoftLabels(3), normalize=True,
            temperature=0.1, teacher_temperature=0.05,
        )  # fmt: skip
        queue.enqueue(key)
        return loss

    step = step if compiled is None else torch.compile(step, fullgraph=True, backend=compiled)
    seen, graphs = [], []
    for key in keys:
        query = (key + 1).requires_grad_()
        loss = step(query, key)
        loss.backward()
        seen.append((loss.detach(), query.grad, queue.rows.clone(), queue.pointer, queue.filled))
        graphs.append(getattr(compiled, "graphs", 0))
    return seen, graphs


def assert_same(seen, expected) -> None:
    for number, (one, two) in enumerate(zip(seen, expected, strict=True)):
        torch.testing.assert_close(one[:2], two[:2], msg=f"step {number}")
        assert torch.equal(one[2], two[2]) and one[3:] == two[3:], number


@pytest.mark.parametrize("size", [K, 60])  # the batch divides the one, and wraps within the other
def test_a_queue_that_fills_is_compiled_twice(size):
    results = []
    for backend in (Counting(), None):
        queue = MemoryQueue(size, D, init="empty")
        queue.enqueue(batches(1)[0])
        results.append(run(queue, batches(30), backend))
    (seen, graphs), (expected, _) = results
    assert_same(seen, expected)
    assert graphs[-1] <= 2 and graphs[2:] == graphs[2:3] * 28, graphs


class Trained(nn.Module):
    """A queue that is a child of what is compiled, and a loss that asks whether it is empty."""

    def __init__(self, queue: MemoryQueue) -> None:
        super().__init__()
        self.queues = nn.ModuleDict({"queue": queue})
        self.loss = MoCoLoss()

    def forward(self, query, key):
        queue = self.queues["queue"]
        loss = self.loss(query, key, queue)
        loss = loss + soft_contrastive_loss(
            query, key, queue.rows, HardLabels(), filled=queue.filled, normalize=True,
            temperature=0.1, teacher_temperature=0.1,
        )  # fmt: skip
        queue.enqueue(key)
        return loss


def test_a_queue_inside_a_compiled_module():
    modules = [Trained(MemoryQueue(K, D, init="empty")) for _ in range(2)]
    backend = Counting()
    compiled = torch.compile(modules[0], fullgraph=True, backend=backend)
    for module in modules:
        module.queues["queue"].enqueue(batches(1)[0])
    for key in batches(20):
        query = (key + 1).requires_grad_()
        torch.testing.assert_close(compiled(query, key), modules[1](query, key))
    one, two = (module.queues["queue"] for module in modules)
    assert torch.equal(one.rows, two.rows)
    assert (one.pointer, one.filled) == (two.pointer, two.filled) == (21 * N % K, K)
    assert backend.graphs <= 2


def test_a_full_queue_is_compiled_once():
    backend = Counting()
    seen, _ = run(MemoryQueue(K, D), batches(20), backend)
    assert_same(seen, run(MemoryQueue(K, D), batches(20))[0])
    assert backend.graphs == 1


def test_an_empty_queue_and_batches_of_any_size():
    """Enqueue first, as MSF does; the last batch of an epoch is short."""
    sizes = [N, N, N, N - 3, N, 2 * K + 5, N, N - 2] * 3
    keys = [torch.randn(n, D, generator=torch.Generator().manual_seed(n)) for n in sizes]
    counting, results = Counting(), []
    for backend in (counting, None):
        queue = MemoryQueue(K, D, init="empty", dtype=torch.bfloat16)

        def step(key, queue=queue):
            queue.enqueue(key)
            return queue.rows[: queue.filled].float().sum()

        if backend is not None:
            step = torch.compile(step, fullgraph=True, backend=backend)
        results.append([(step(key), queue.rows.clone(), queue.pointer) for key in keys])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one[0], two[0])
        assert torch.equal(one[1], two[1]) and one[2] == two[2]
    assert counting.graphs <= 4


def test_inductor_writes_in_place():
    queue, plain = MemoryQueue(K, D, init="empty"), MemoryQueue(K, D, init="empty")
    for one in (queue, plain):
        one.enqueue(batches(1)[0])
    address = queue.rows.data_ptr()
    assert_same(run(queue, batches(12), "inductor")[0], run(plain, batches(12))[0])
    assert queue.rows.data_ptr() == address


@pytest.mark.filterwarnings("ignore:MemoryQueue refused")
def test_a_compiled_queue_saves_loads_and_counts_as_another():
    keys = batches(5)
    keys[3][1] = float("nan")
    queue, plain = MemoryQueue(K, D, init="empty"), MemoryQueue(K, D, init="empty")
    enqueue = torch.compile(lambda key: queue.enqueue(key), fullgraph=True, backend=aot_eager)
    for key in keys[:4]:
        enqueue(key)
        plain.enqueue(key)
    assert queue.state_dict()["_extra_state"].tolist() == [4 * N, 4 * N, 1]
    queue.load_state_dict(plain.state_dict())
    enqueue(keys[4])
    plain.enqueue(keys[4])
    assert torch.equal(queue.rows, plain.rows) and queue.pointer == plain.pointer == 5 * N


def test_rows_of_the_queue_itself_may_be_enqueued_when_compiled():
    queue = MemoryQueue(6, 3)
    before = queue.rows.clone()
    step = torch.compile(
        lambda: queue.enqueue(queue.rows[1:], False), fullgraph=True, backend=aot_eager
    )
    step()
    assert torch.equal(queue.rows, torch.cat([before[1:], before[5:]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_opcheck(dtype, normalize):
    for start, count in ((0, 5), (5, 4), (2, 0), (1, 20)):
        keys = torch.randn(count, 3, generator=torch.Generator().manual_seed(1))
        keys[1:2] = 0.0
        rows = MemoryQueue(7, 3, dtype=dtype).rows
        refused, pointer = torch.tensor(0), torch.tensor(start)
        opcheck(torch.ops.softcl.enqueue.default, (keys, rows, refused, pointer, normalize))


def test_the_operator_moves_the_pointer_and_bumps_versions():
    rows, refused, pointer = MemoryQueue(7, 3).rows, torch.tensor(0), torch.tensor(5)
    versions = rows._version, pointer._version
    torch.ops.softcl.enqueue(torch.ones(4, 3), rows, refused, pointer, True)
    assert pointer.item() == 9 % 7 and refused.item() == 0
    assert rows._version > versions[0] and pointer._version > versions[1]


def test_a_captured_cuda_graph_is_refused(monkeypatch):
    """A replay would write the same rows again: the pointer is the host's."""
    queue = MemoryQueue(4, 2)
    before = queue.rows.clone()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"MemoryQueue.enqueue cannot be captured") as caught:
        queue.enqueue(torch.ones(2, 2))
    assert "\n" not in str(caught.value)
    assert torch.equal(queue.rows, before)
    assert (queue.pointer, queue.filled, queue.refused) == (0, 4, 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    queue.enqueue(torch.ones(2, 2))
    assert queue.pointer == 2


def test_reduce_overhead_leaves_the_operator_out_of_its_graphs():
    assert torch.Tag.cudagraph_unsafe in torch.ops.softcl.enqueue.default.tags
