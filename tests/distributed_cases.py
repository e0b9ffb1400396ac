"""What several processes check together, against one process's results, on gloo.

Every process makes the whole problem from a seed, computes the expected result alone, and takes its
own rows, ``whole[rank::W]``, for the common one. Each case is called by all processes.
"""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

import softcl
from bench import traffic
from softcl.distributed import ShardedQueue, ShardedRows, World
from softcl.labels import AdaptiveSoftLabels, HardLabels, MixedLabels
from softcl.nn import MemoryQueue
from softcl.testing import (
    RULES,
    Problem,
    dense_labels,
    gradient_error,
    loss_oracle,
    make_problem,
    random_rules,
    relative_error,
)

FUSED = "cpu"
T = TypeVar("T")


def some(world: World, cases: Iterable[T]) -> list[T]:
    """Two processes try every case. One and four go the same ways, and try every third."""
    return list(cases)[:: 1 if world.size == 2 else 3]


def own(world: World, whole: Tensor) -> Tensor:
    return whole[world.rank :: world.size].clone()


def shard(world: World, whole: Tensor) -> ShardedRows:
    return ShardedRows(own(world, whole), world, len(whole))


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def has_native() -> bool:
    try:
        from softcl import _C  # noqa: F401
    except ImportError:
        return False
    return True


def exchanges(world: World, folder: Path) -> None:
    """Order, content and gradient of each exchange."""
    W = world.size
    whole = torch.randn(3 * W, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    part = own(world, whole).requires_grad_()
    gathered = world.all_gather_rows(part)
    assert torch.equal(gathered, whole)
    # Process r's loss is (r + 1) times the sum of c x: the gradient is the sum over processes.
    factor = torch.randn(3 * W, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ((world.rank + 1) * factor * gathered).sum().backward()
    same(part.grad, own(world, factor) * sum(range(1, W + 1)))
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        assert torch.equal(world.all_gather_rows(own(world, whole).to(dtype)), whole.to(dtype))

    part = own(world, whole).requires_grad_()
    sent = part[:1].expand(W, 5) * torch.arange(1, W + 1)[:, None]
    came = world.exchange(sent)
    assert torch.equal(came, whole[:W] * (world.rank + 1))
    (came * (world.rank + 2)).sum().backward()
    coefficient = sum(w * (w + 1) for w in range(1, W + 1))  # (w + 1) where it went, w its factor
    same(part.grad[0], torch.full((5,), float(coefficient), dtype=torch.float64))

    order = torch.randperm(3 * W, generator=torch.Generator().manual_seed(2))
    images = whole.view(3 * W, 1, 5).to(torch.float32)
    mixed = world.permute(own(world, images), order)
    assert torch.equal(mixed, images[order][world.rank :: W])
    assert torch.equal(world.permute(mixed, order.argsort()), own(world, images))
    nothing = torch.zeros(0, dtype=torch.int64)
    wanted = [torch.arange(3 * W - 1), *[nothing] * (W - 1)]  # all but one row to one process
    found = world.distribute(own(world, whole), wanted)
    assert torch.equal(found, whole[:-1] if world.is_main_process else whole[:0])
    assert (
        world.all_gather_object(world.rank) == list(range(W))
        and world.start_max(world.rank)() == W - 1
    )
    assert world.on_main_process(lambda: 7) == 7
    try:
        world.on_main_process(lambda: 1 // 0)
    except ZeroDivisionError as error:
        assert getattr(error, "reported", False) != world.is_main_process
    else:
        raise AssertionError("the first process's error did not come through")


def uneven(world: World, folder: Path) -> None:
    """Batches of different lengths are an error in every process, not a hang."""
    p = make_problem(4, 5 * world.size, 6, dtype=torch.float64)
    rows, n = shard(world, p.queue), 3 + (world.rank == 1)
    calls = {
        "vectors": lambda: softcl.queue_statistics(p.query[:n], rows, 0.1),
        "query": lambda: softcl.soft_contrastive_loss(
            p.query[:n], p.key[:n], rows, HardLabels(), temperature=0.1, teacher_temperature=0.1
        ),
        "key": lambda: softcl.label_mean(HardLabels(), p.key[:n], rows, teacher_temperature=0.1),
    }
    counts = [3 + (rank == 1) for rank in range(world.size)]
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            assert str(error) == f"{name} must have as many rows in every process, got {counts}"
        else:
            raise AssertionError(f"{name}: accepted")


def statistics(world: World, folder: Path) -> None:
    """Statistics over a sharded queue are those over the whole, gradients and indices included."""
    N, K, D = 3 * world.size, 7 * world.size + 3, 6
    for kind, temperature, k in itertools.product(("random", "duplicates"), (0.1, 0.01), (0, 9)):
        p = make_problem(N, K, D, kind=kind, dtype=torch.float64, seed=4)
        whole, queue = p.query.clone().requires_grad_(), p.queue.clone().requires_grad_()
        expected = softcl.queue_statistics(
            whole, queue, temperature, num_neighbors=k, backend="reference"
        )
        vectors = own(world, p.query).requires_grad_()
        rows = shard(world, p.queue)
        rows.local.requires_grad_()
        found = softcl.queue_statistics(
            vectors, rows, temperature, num_neighbors=k, backend="reference"
        )
        for name in ("lse", "mean", "entropy", "neighbor_logits"):
            same(getattr(found, name), own(world, getattr(expected, name)), 1e-10)
        if kind == "random":
            assert torch.equal(found.neighbor_indices, own(world, expected.neighbor_indices))
        # Any function of all of them; its gradient reaches vectors and rows in their processes.
        weights = torch.randn(N, 3 + D, generator=torch.Generator().manual_seed(5)).double()

        for s, w in ((expected, weights), (found, own(world, weights))):
            columns = (s.lse * w[:, 0], s.entropy * w[:, 1], s.neighbor_logits.sum(1) * w[:, 2])
            (sum(x.sum() for x in columns) + (s.mean * w[:, 3:]).sum()).backward()
        same(vectors.grad, own(world, whole.grad), 1e-9)
        if kind == "random":  # equal rows may be told apart otherwise
            same(rows.local.grad, own(world, queue.grad), 1e-9)
        search = softcl.queue_statistics(
            vectors, rows, temperature, num_neighbors=max(k, 1), sums=False, backend="reference"
        )
        assert search.lse.shape == (0,) and search.mean.shape == (0, D)
        if kind == "random" and k:
            assert torch.equal(search.neighbor_indices, own(world, expected.neighbor_indices))
            same(search.neighbor_logits, found.neighbor_logits)
        if k:
            taken = rows[found.neighbor_indices]
            assert torch.equal(taken, p.queue[found.neighbor_indices])
    e = torch.eye(32)  # of rows equal to the last bit, the lowest of the whole queue
    equal = softcl.queue_statistics(e[:1], shard(world, e.repeat(4, 1)), 0.1, num_neighbors=6)
    assert equal.neighbor_indices.tolist() == [[0, 32, 64, 96, 1, 2]]
    half = rows[: K - 3]
    assert len(half) == K - 3 and torch.equal(half.local, own(world, p.queue[: K - 3]))


def _loss(query: Tensor, key: Tensor, queue, rule, options: dict, backend: str):
    options = {"temperature": 0.1, "teacher_temperature": 0.05, **options}
    return softcl.soft_contrastive_loss(
        query, key, queue, rule, reduction="none", diagnostics=True, backend=backend, **options
    )


def losses(world: World, folder: Path) -> None:
    """Every rule and option, loss and gradient, in float64; with the fused backend in float32."""
    W = world.size
    options = [
        {},
        {"positive": False, "temperature": 0.02, "teacher_temperature": 0.015},
        {"normalize": True, "filled": 5 * W + 2},
        {"excluded": torch.arange(3 * W) - 1},  # -1: none for the first row
    ]
    cases = [(rule, o) for rule in (*RULES, *random_rules(5, seed=4)) for o in options]
    cases += [(AdaptiveSoftLabels(0), {}), (MixedLabels(0.4, teacher_positive="zero"), {})]
    backends = [("reference", torch.float64)] + [(FUSED, torch.float32)] * has_native()
    for (rule, option), (backend, dtype) in some(world, itertools.product(cases, backends)):
        p = make_problem(3 * W, 9 * W + 1, 8, kind="clustered", dtype=dtype, seed=6)
        raw, key = p.query * 2.5 if option.get("normalize") else p.query, p.key
        mine = own(world, raw).requires_grad_()
        filled = option.get("filled", len(p.queue))
        oracle = loss_oracle(
            Problem(raw, key, p.queue[:filled]), rule,
            **{name: value for name, value in option.items() if name != "filled"},
        )  # fmt: skip
        expected, shown = oracle.loss, oracle
        here = {x: own(world, v) if x == "excluded" else v for x, v in option.items()}
        found, seen = _loss(mine, own(world, key), shard(world, p.queue), rule, here, backend)
        assert found.dtype == dtype
        weights = torch.linspace(0.5, 2.0, len(expected)).double()
        (found * own(world, weights).to(dtype)).sum().backward()
        dquery = weights[:, None] * oracle.dquery
        exact = dtype == torch.float64
        name = f"{rule} {option} {backend}"
        # In float32 one process is off as well, by more the lower the temperature: measured here.
        # And logits and lse of the parts are rounded on their way, by half of the last place.
        rounding = 1e-6 + 2 * 6e-8 / option.get("teacher_temperature", 0.05)
        alone = raw.clone().requires_grad_()
        one, _ = _loss(alone, key, p.queue, rule, option, backend)
        (one * weights.to(dtype)).sum().backward()
        error, usual = relative_error(found, own(world, expected)), relative_error(one, expected)
        bound = 1e-11 if exact else rounding + 2 * usual
        assert error <= bound, f"{name}: loss is off by {error:.2e}, one process's by {usual:.2e}"
        error = gradient_error(mine.grad, own(world, dquery), 0.1)
        usual = gradient_error(alone.grad, dquery, 0.1)
        bound = 1e-10 if exact else rounding + 2 * usual
        assert error <= bound, f"{name}: gradient is off by {error:.2e}, alone by {usual:.2e}"
        for field in ("confidence", "entropy"):
            a, b = getattr(seen, field), getattr(shown, field)
            assert (a is not None) == rule.needs_softmax, field
            if a is not None:
                same(a.double(), own(world, b).double(), 1e-9 if exact else 2e-5)
        if exact:
            for field in ("positive_rank", "neighbor_indices"):
                a, b = getattr(seen, field), getattr(shown, field)
                assert a is None or torch.equal(a, own(world, b)), field
            assert (seen.neighbor_indices is None) == (rule.num_neighbors == 0)
        with torch.no_grad():
            assert torch.equal(
                _loss(mine, own(world, key), shard(world, p.queue), rule, here, backend)[0], found
            ), f"{name}: another result without gradient"


def derivatives(world: World, folder: Path) -> None:
    """torch.func differentiates among processes as it does in one; nobody differentiates twice."""
    p = make_problem(3 * world.size, 9 * world.size, 8, dtype=torch.float64)
    rule, (query, key) = random_rules(1, seed=5)[0], (own(world, x) for x in (p.query, p.key))

    def rows(query: Tensor) -> Tensor:
        return _loss(query, key, shard(world, p.queue), rule, {}, "reference")[0]

    dquery = own(world, loss_oracle(p, rule).dquery)
    world.even = True  # the numbers of rows are compared as objects, which torch.func does not have
    same(torch.func.grad(lambda x: rows(x).sum())(query), dquery, 1e-10)
    _, tangent = torch.func.jvp(rows, (query,), (key,))
    same(tangent, (dquery * key).sum(1), 1e-10)
    world.even = False
    query.requires_grad_()
    (once,) = torch.autograd.grad(rows(query).sum(), query, create_graph=True)
    try:
        torch.autograd.grad(once.square().sum(), query)
    except RuntimeError as error:
        assert "first derivative only" in str(error)
    else:
        raise AssertionError("a second derivative was not refused")


def label_means(world: World, folder: Path) -> None:
    """The mean of the dense labels, over the positive and the rows of all processes."""
    W = world.size
    p = make_problem(4 * W, 8 * W + 1, 8, kind="clustered", dtype=torch.float64)
    logits, own_logit = p.key @ p.queue.T / 0.05, (p.key * p.key).sum(1, keepdim=True) / 0.05
    for rule in some(world, (*RULES, *random_rules(5, seed=6))):
        made = dense_labels(rule, logits, own_logit)
        expected = made.labels[:, :1] * p.key + made.labels[:, 1:] @ p.queue
        for length, more in ((1.0, {}), (3.0, {"normalize": True})):
            found = softcl.label_mean(
                rule, own(world, length * p.key), shard(world, p.queue),
                teacher_temperature=0.05, **more,
            )  # fmt: skip
            same(found.mean, own(world, expected), 1e-9)
            assert (found.neighbor_indices is None) == (rule.num_neighbors == 0)
            assert (found.confidence is None) == (not rule.needs_softmax)
            if rule.needs_softmax:
                same(found.confidence, own(world, made.confidence), 1e-9)
                same(found.entropy, own(world, made.entropy), 1e-9)


def traffic_is_as_derived(world: World, folder: Path) -> None:
    """The bytes counted in a step are those of the formulas."""
    W, n, D = world.size, 3, 8
    for rule, gradient, dtype in itertools.product(
        RULES, (True, False), (torch.float32, torch.float64)
    ):
        p = make_problem(n * W, 7 * W + 4, D, dtype=dtype)
        query = own(world, p.query).requires_grad_(gradient)
        world.received.clear()
        loss, _ = _loss(query, own(world, p.key), shard(world, p.queue), rule, {}, "reference")
        size = dtype.itemsize
        expected = traffic.sharded_loss(
            rule, W, n, D, vector_bytes=size, sum_bytes=size, gradient=gradient
        )
        assert world.received.total() == expected, (rule, gradient, dtype)
        if gradient:
            loss.sum().backward()
            assert world.received.total() == expected, "the backward pass exchanged something"
    queue = ShardedQueue(5 * W, D, world)
    assert len(queue.shard.rows) == 5  # K / W rows and no more
    keys, most = torch.randn(n, D), traffic.sharded_enqueue(W, n, D)
    moved = []
    for _ in range(2 * W):
        world.received.clear()
        queue.enqueue(keys)
        moved.append(world.received.total())
    # n keys from each process: the pointer moves by n W, so every key is at home each time.
    assert moved == [0] * (2 * W), moved
    queue.pointer = 1
    queue._place_shard()
    world.received.clear()
    queue.enqueue(keys)
    assert world.received.total() == most
    world.received.clear()
    world.all_gather_rows(keys)
    assert world.received.total() == traffic.replicated_enqueue(W, n, D)


def queues(world: World, folder: Path) -> None:
    """A sharded queue holds what one queue would, and so does each replica."""
    W = world.size
    for K, counts, init in (
        (5 * W, (W, 3 * W, W), "random"),
        (4 * W + 1, (2 * W, W, 3 * W, W), "empty"),
        (W, (3 * W, 2 * W), "random"),  # batches longer than the queue
    ):
        one, replica = (MemoryQueue(K, 6, seed=8, init=init) for _ in range(2))
        sharded = ShardedQueue(K, 6, world, seed=8, init=init)
        generator = torch.Generator().manual_seed(9)
        for number, count in enumerate(counts, start=1):
            keys = torch.randn(count, 6, generator=generator)
            keys[-1, 2] = torch.nan  # refused
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                one.enqueue(keys)
                sharded.enqueue(own(world, keys))
                replica.enqueue(world.all_gather_rows(own(world, keys)))
            assert torch.equal(sharded.shard.rows, own(world, one.rows))
            assert (sharded.pointer, sharded.filled) == (one.pointer, one.filled)
            assert sharded.refused == one.refused == number
            assert len(set(world.all_gather_object(checksum(replica)))) == 1
            if one.filled >= W:
                visible = sharded.rows[: sharded.filled]
                assert torch.equal(visible.local, own(world, one.rows[: one.filled]))
        state = sharded.state_dict()
        stored = world.on_main_process(lambda state=state: state)
        assert all(torch.equal(stored[name], x) for name, x in one.state_dict().items())
        assert len(state["rows"]) == (K if world.is_main_process else 0)
        again = ShardedQueue(K, 6, world)
        again.load_state_dict(stored)
        keys = torch.randn(2 * W, 6, generator=generator)
        again.enqueue(own(world, keys))
        one.enqueue(keys)
        assert torch.equal(again.shard.rows, own(world, one.rows))
        assert (again.pointer, again.filled, again.refused) == (
            one.pointer,
            one.filled,
            one.refused,
        )


def checksum(queue: MemoryQueue) -> int:
    return zlib.crc32(queue.rows.numpy().tobytes())


def half_precision(world: World, folder: Path) -> None:
    """bfloat16 vectors and rows, as on GPUs; half of the bytes, sums in float32."""
    p = make_problem(4 * world.size, 16 * world.size, 8, dtype=torch.bfloat16, seed=2)
    query = own(world, p.query).requires_grad_()
    world.received.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = _loss(query, own(world, p.key), shard(world, p.queue), AdaptiveSoftLabels(5),
                         {}, "reference")  # fmt: skip
    expected = traffic.sharded_loss(AdaptiveSoftLabels(5), world.size, 4, 8, vector_bytes=2)
    assert world.received.total() == expected and found.dtype == torch.float32
    whole, _ = _loss(p.query.double(), p.key.double(), p.queue.double(), AdaptiveSoftLabels(5),
                     {}, "reference")  # fmt: skip
    assert relative_error(found, own(world, whole)) <= 2e-6
    found.sum().backward()
    assert query.grad.dtype == torch.bfloat16
    unit = normalize(p.query.float(), dim=1)
    assert torch.equal(world.all_gather_rows(own(world, unit.bfloat16())), unit.bfloat16())


CASES = {
    name.__name__: name
    for name in (
        exchanges, uneven, statistics, losses, derivatives, label_means, traffic_is_as_derived,
        queues, half_precision,
    )
}  # fmt: skip
