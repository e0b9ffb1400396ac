"""The CUDA kernels' own code, run on the CPU thread by thread, against the float64 oracle.

What this shows and what not: tests/native/cuda/block.h. The instructions are written from the PTX
ISA; nvcc's code and the hardware's timing are not in it.
"""

from __future__ import annotations

import math

import pytest
import torch
from cuda_host import load_host_module
from cuda_parts import MIXES, check, run, statistics, tolerance_of
from loss_calls import case_id, check_statistics, pairs, some_long, stretched

from softcl import native
from softcl.labels import AdaptiveSoftLabels, HardLabels, MixedLabels, NeighborLabels
from softcl.ops import cuda
from softcl.testing import (
    KINDS,
    RULES,
    Problem,
    assert_neighbors_close,
    fitting,
    make_problem,
    random_rules,
    rule_name,
)

HALF = (torch.bfloat16, torch.float16)
# Blocks hold 64 samples, or 128 rows of one kind; tiles 64 queue rows, or 32 for D > 128; steps 32.
# Rows of D not a multiple of 8 are not aligned.
SHAPES = [
    (1, 1, 1),
    (3, 31, 8),
    (65, 65, 33),
    (20, 193, 64),
    (9, 300, 100),
    (17, 1100, 128),
    (5, 97, 130),
    (6, 161, 256),
]
SEEDS = (0, 1, 2)


@pytest.fixture
def host(monkeypatch):
    """The module of the kernels on the CPU, behind softcl.ops.cuda."""
    module = load_host_module()
    monkeypatch.setattr(cuda, "_load", lambda: (module, ""))
    module.set_options(seed=0)
    yield module
    module.set_options(seed=0)


def assert_same(first, second):
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def on_a_diagonal(case):
    """A quarter of the cases, with every rule and every shape among them."""
    return (RULES.index(case[0]) + SHAPES.index(case[1])) % 4 == 0


@pytest.mark.parametrize(
    ("rule", "shape", "dtype", "seed"),
    some_long(pairs(RULES, SHAPES, HALF, SEEDS[1:]), on_a_diagonal),
    ids=case_id,
)
def test_against_oracle(host, rule, shape, dtype, seed):
    """Every rule, and the same bits whatever the order of threads and blocks."""
    N, K, D = shape
    p = make_problem(N, K, D, dtype=dtype, seed=N + D)
    got = check(p, fitting(rule, K))
    host.set_options(seed=seed)
    assert_same(got, run(p, fitting(rule, K)))


PARTS_SHAPES = [
    (1, 1, 1), (65, 65, 33), (20, 193, 64), (17, 400, 128), (5, 97, 130), (6, 161, 256)
]  # fmt: skip
PARTS_RULES = [HardLabels(), MixedLabels(0.3), AdaptiveSoftLabels(7)]


@pytest.mark.parametrize(
    ("shape", "mix", "rule", "kind", "seed"),
    some_long(
        pairs(PARTS_SHAPES, MIXES, PARTS_RULES, KINDS, SEEDS[1:]),
        lambda case: case[2] == PARTS_RULES[PARTS_SHAPES.index(case[0]) % 3],
    ),
    ids=case_id,
)
def test_fp32_and_mixed_types(host, shape, mix, rule, kind, seed):
    N, K, D = shape
    p = make_problem(N, K, D, kind=kind, dtype=mix[0], queue_dtype=mix[1], seed=N + D)
    got = check(p, fitting(rule, K))
    host.set_options(seed=seed)
    assert_same(got, run(p, fitting(rule, K)))


@pytest.mark.parametrize(("mix", "D"), pairs(MIXES, (40, 256)), ids=str)
def test_parts_of_raw_projections_and_statistics(host, mix, D):
    """normalize=True rounds unit rows to their own type; queue_statistics' five results."""
    p = make_problem(20, 150, D, dtype=mix[0], queue_dtype=mix[1])
    check(stretched(p), HardLabels(), normalize=True)
    tolerance = tolerance_of(p, HardLabels())
    check_statistics(cuda, p.query, p.queue, 0.1, 5, mean_tolerance=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_rules_without_a_name(host, kind):
    p = make_problem(20, 193, 64, kind=kind, dtype=torch.bfloat16)
    for i, rule in enumerate(random_rules(8, seed=KINDS.index(kind))):
        # As in test_sharp_labels.
        check(p, rule, positive=i % 2 > 0, scale=2.0)


@pytest.mark.parametrize("kind", ["clustered", "duplicates"])
def test_sharp_labels(host, kind):
    """Few large labels, clipped ones among them, and ties between the nearest rows."""
    p = make_problem(33, 1200, 64, kind=kind, dtype=torch.bfloat16)
    for i, rule in enumerate(RULES):
        # Cosines near 1 and few labels: no averaging takes the rounding of a cosine away.
        check(p, rule, positive=(i + (kind == "duplicates")) % 2 > 0, scale=2.0)


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_running_maximum(host, rule):
    """Temperatures at which 2^x would overflow, and similarities that keep rising."""
    p = make_problem(20, 700, 64, dtype=torch.bfloat16)
    order = (p.query[0].float() @ p.queue.float().T).argsort()
    p = Problem(p.query, p.key, p.queue[order].contiguous())
    check(p, rule, 0.01, 0.008)


@pytest.mark.parametrize(
    ("shape", "dtype", "rule"),
    pairs([(70, 200, 40), (5, 70, 33), (9, 100, 256)], HALF, [HardLabels(), AdaptiveSoftLabels(5)]),
    ids=case_id,
)
def test_normalize(host, shape, dtype, rule):
    """Raw projections give the loss of their rounded unit rows, and the gradient of the chain."""
    check(stretched(make_problem(*shape, dtype=dtype)), rule, normalize=True)


@pytest.mark.parametrize("length", [1e19, 1e30, 1e-10])
def test_normalize_rows_of_any_norm(host, length):
    """Squares over- and underflow; the norms do not. Rows of 0 have no gradient."""
    p = make_problem(5, 60, 8)
    p = Problem(p.query * length, p.key * length, p.queue)
    p.query[2] = 0.0
    got = check(p, AdaptiveSoftLabels(3), normalize=True)
    assert not bool(got.dquery[2].any())


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_fewer_results(host, rule):
    """What is not asked for is not computed, and changes nothing."""
    p = make_problem(10, 500, 48, dtype=torch.bfloat16)
    first = run(p, rule)
    loss, dquery, *extra = run(p, rule, gradient=False, diagnostics=False)
    assert torch.equal(loss, first[0])
    assert [x.numel() for x in (dquery, *extra)] == [0] * 5
    assert torch.equal(run(p, rule, diagnostics=False)[1], first[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_equal_rows_do_not_outrank_the_positive(host, dtype):
    """A queue row with the bits of the key is not more similar than the positive."""
    p = make_problem(40, 90, 100, dtype=dtype)
    queue = torch.cat([p.queue, p.key, p.key])
    for rule in (HardLabels(), AdaptiveSoftLabels(2)):
        got = run(Problem(p.query, p.key, queue), rule)
        alone = run(p, rule)
        own = (p.query.double() @ p.key.double().T) > (p.query.double() * p.key.double()).sum(
            1, keepdim=True
        )
        own.fill_diagonal_(False)
        assert torch.equal(got[4], alone[4] + 2 * own.sum(1))


@pytest.mark.parametrize(
    ("rule", "value"),
    some_long(
        pairs(RULES, [math.nan, math.inf, -math.inf]),
        lambda case: case[0].num_neighbors in (5, 7),
    ),
    ids=case_id,
)
def test_non_finite_rows(host, rule, value):
    """A row gives NaN in its own results; a queue row that matters gives NaN losses; indices stay
    in range."""
    p = make_problem(35, 200, 20, dtype=torch.bfloat16)
    clean = run(p, rule)
    for broken in ("query", "key"):
        rows = getattr(p, broken).clone()
        rows[17, 3] = value
        got = run(Problem(**{**p.__dict__, broken: rows}), rule)
        others = torch.arange(35) != 17
        for x, y in zip(got[:2], clean[:2], strict=True):
            assert bool(x[17].isnan().all())
            assert torch.equal(x[others], y[others])
        assert torch.equal(got[5][others], clean[5][others])
        assert bool(((got[5] >= 0) & (got[5] < 200)).all())
    queue = p.queue.clone()
    queue[199, 19] = value
    broken = Problem(p.query, p.key, queue)
    got = run(broken, rule)
    assert bool(got[0].isnan().all()) and bool(got[1].isnan().all())
    assert bool(((got[5] >= 0) & (got[5] < 200)).all())
    # Its product is minus infinity for half of the rows: no weight, but not unseen.
    for temperature in (0.1, 0.01):
        loss = run(broken, rule, temperature, gradient=False, diagnostics=False)[0]
        assert bool(loss.isnan().all())
    for parts in (torch.float32, torch.float16):
        loss = run(Problem(p.query.to(parts), p.key.to(parts), queue), rule, gradient=False)[0]
        assert bool(loss.isnan().all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_queue_rows_in_statistics(host, value):
    """NaN sums, wanted together or alone; of the neighbours it is the last."""
    p = make_problem(35, 200, 20, dtype=torch.bfloat16)
    p.queue[123, 7] = value
    for wanted in (("lse",), ("entropy",), ("mean",), ("lse", "mean"), ("lse", "mean", "entropy")):
        for result, x in statistics_of(host, p, wanted).items():
            assert bool(x.isnan().all()), (wanted, result)
    *_, indices = statistics(p.query, p.queue, 0.1, 5)
    assert bool(((indices >= 0) & (indices < 200)).all())


def statistics_of(host, p, wanted):
    """Those of lse (N,), mean (N, D) and entropy (N,) that are wanted, no neighbours."""
    (n, d), k = p.query.shape, len(p.queue)
    shapes = {"lse": (n,), "mean": (n, d), "entropy": (n,)}
    results = {name: torch.zeros(shapes[name]) for name in wanted}
    addresses = {name: results[name].data_ptr() for name in wanted}
    workspace = torch.empty(1 << 22, dtype=torch.uint8)
    host.cuda_run(
        query=p.query.data_ptr(), queue=p.queue.data_ptr(), vector_type=1, queue_type=1,
        num_queries=n, queue_size=k, dim=d, temperature=0.1, **addresses, device=0, stream=0,
        workspace=workspace.data_ptr(), workspace_bytes=workspace.numel(),
    )  # fmt: skip
    return results


# ---- queue_statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "temperature", "dtype"),
    pairs([(1, 1, 1), (130, 97, 65), (6, 1500, 64), (3, 90, 256)], (0.01, 0.1, 1.0), HALF),
    ids=str,
)
def test_queue_statistics(host, shape, temperature, dtype):
    p = make_problem(*shape, dtype=dtype)
    k = min(shape[1], 20)
    got = check_statistics(cuda, p.query, p.queue, temperature, k, mean_tolerance=1e-3)
    alone = statistics(p.query, p.queue, temperature, k, sums=False)
    assert_same(got[3:], alone[3:])


COUNTS = [1, 3, 17, 64, 65, 1000]
ORDERS = ["random", "ascending", "descending", "equal", "repeated"]


@pytest.mark.parametrize(
    ("order", "k"),
    some_long(
        pairs(ORDERS, COUNTS),
        lambda case: (ORDERS.index(case[0]) + COUNTS.index(case[1])) % 3 == 0,
    ),
)
def test_neighbors_in_every_order(host, order, k):
    """An exact top-k whatever order the best rows come in; k = K included."""
    p = make_problem(5, 1000, 24, dtype=torch.bfloat16)
    similarity = p.query[0].float() @ p.queue.float().T
    queue = {
        "random": p.queue,
        "ascending": p.queue[similarity.argsort()],
        "descending": p.queue[similarity.argsort(descending=True)],
        "equal": p.queue[:1].repeat(1000, 1),
        "repeated": p.queue[:50].repeat(20, 1),
    }[order].contiguous()
    *_, logits, indices = statistics(p.query, queue, 0.1, k, sums=False)
    assert_neighbors_close(logits, indices, p.query, queue, 0.1)
    if order == "equal":  # the lowest rows
        assert torch.equal(indices, torch.arange(k).expand(5, k))


def test_most_neighbors(host):
    p = make_problem(2, 3000, 16, dtype=torch.bfloat16)
    *_, logits, indices = statistics(p.query, p.queue, 0.1, 1024, sums=False)
    assert_neighbors_close(logits, indices, p.query, p.queue, 0.1)


# ---- enqueue -------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_enqueue_agrees_with_cpu(host, normalize):
    module, reason = native.load()
    if module is None:
        pytest.skip(reason)
    types = native.ELEMENT_TYPES
    generator = torch.Generator().manual_seed(0)
    for N, K, D, pointer in [(0, 3, 4, 1), (1, 1, 1, 0), (5, 8, 33, 6), (20, 7, 128, 3)]:
        for key_dtype in types:
            for queue_dtype in types:
                keys = torch.randn(N, D, generator=generator).to(key_dtype)
                for row, value in [(0, float("nan")), (3, 0.0), (5, float("inf"))]:
                    if row < N:
                        keys[row] = value
                queue = torch.randn(K, D, generator=generator).to(queue_dtype)
                ours, refused = queue.clone(), torch.zeros(1, dtype=torch.int64)
                arguments = dict(
                    keys=keys.data_ptr(),
                    num_keys=N,
                    queue_size=K,
                    dim=D,
                    pointer=pointer,
                    key_type=types[key_dtype],
                    queue_type=types[queue_dtype],
                    normalize=normalize,
                )
                host.cuda_enqueue(
                    **arguments,
                    queue=ours.data_ptr(),
                    refused=refused.data_ptr(),
                    device=0,
                    stream=0,
                )
                assert int(refused) == module.cpu_enqueue(**arguments, queue=queue.data_ptr())
                # The sums of squares may differ in the last bit of double: one ulp after the cast.
                tolerance = torch.finfo(queue_dtype).eps if normalize else 0.0
                torch.testing.assert_close(ours, queue, rtol=tolerance, atol=0.0)


# ---- The proof that a missing barrier shows ------------------------------------------------------


def workloads():
    """Calls that between them meet every barrier and wait of the kernels."""
    paired = make_problem(70, 500, 128, dtype=torch.bfloat16)
    wide = make_problem(70, 200, 256, dtype=torch.float16)
    odd = make_problem(140, 300, 60, dtype=torch.bfloat16)
    parts = make_problem(70, 200, 128)
    return [
        lambda: run(paired, AdaptiveSoftLabels(3), normalize=True),
        lambda: run(wide, AdaptiveSoftLabels(3)),
        lambda: run(odd, HardLabels()),
        lambda: run(parts, HardLabels()),
        lambda: run(parts, AdaptiveSoftLabels(3)),
        lambda: run(odd, NeighborLabels(40)),
        lambda: statistics(paired.query, paired.queue, 0.1, 30),
    ]


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.long)])
def test_every_barrier_and_wait_is_needed_and_missed(host, stride):
    """Leave out each one in turn, or some: something must notice, in a race, a deadlock or a wrong
    bit."""
    calls = workloads()
    sites, good = [], []
    for call in calls:
        host.set_options(seed=0)
        good.append(call())
        sites.append(host.sites())
    every = sorted(set().union(*sites))
    assert len(every) >= 14
    unnoticed = []
    for site in every[::stride]:
        if not any(
            notices(host, call, site, result, seed)
            for call, met, result in zip(calls, sites, good, strict=True)
            if site in met
            for seed in SEEDS
        ):
            unnoticed.append(site)
    assert not unnoticed, unnoticed


def test_races_in_global_memory_are_noticed(host):
    """Thread t of four blocks writes element (its block * stride + t) and reads that of thread
    t ^ 1, after a barrier or not; blocks that share elements race too."""
    for seed in SEEDS:
        host.set_options(seed=seed)
        host.exchange_in_global_memory(block_stride=64, synchronize=True)
        with pytest.raises(RuntimeError, match="race: global memory .* with no barrier"):
            host.exchange_in_global_memory(block_stride=64, synchronize=False)
        with pytest.raises(RuntimeError, match="two blocks share global memory"):
            host.exchange_in_global_memory(block_stride=63, synchronize=True)


def notices(host, call, site, good, seed):
    host.set_options(seed=seed, omit=site)
    try:
        got = call()
    except RuntimeError:
        return True
    return not all(torch.equal(x, y) for x, y in zip(got, good, strict=True))


# ---- Arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("query", 0),
        ("queue", 0),
        ("loss", 0),
        ("workspace", 0),
        ("workspace_bytes", 256),
        ("vector_type", 3),
        ("queue_type", -1),
        ("num_queries", 0),
        ("queue_size", 0),
        ("dim", 257),
        ("rule", {"num_neighbors": 11}),
        ("rule", {"mean": math.nan}),
        ("rule", {"teacher_positive": 3}),
        ("excluded", 64),
        ("temperature", 0.0),
        ("teacher_temperature", math.nan),
    ],
)
def test_bad_arguments_name_themselves(host, argument, value):
    p = make_problem(2, 10, 8, dtype=torch.bfloat16)
    loss, workspace = torch.empty(2), torch.empty(1 << 20, dtype=torch.uint8)
    good = dict(
        query=p.query.data_ptr(),
        key=p.key.data_ptr(),
        queue=p.queue.data_ptr(),
        vector_type=1,
        queue_type=1,
        num_queries=2,
        queue_size=10,
        dim=8,
        rule={"neighbor": 1.0, "num_neighbors": 3},
        temperature=0.1,
        teacher_temperature=0.1,
        loss=loss.data_ptr(),
        device=0,
        stream=0,
        workspace=workspace.data_ptr(),
        workspace_bytes=workspace.numel(),
    )
    host.cuda_run(**good)
    assert bool(loss.isfinite().all())
    with pytest.raises(ValueError, match=argument):
        host.cuda_run(**{**good, argument: value})


def test_failing_call_is_named(host):
    p = make_problem(2, 10, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"csrc/cuda/stream\.cu:\d+: cudaDevice"):
        host.cuda_run(
            query=p.query.data_ptr(), queue=p.queue.data_ptr(), vector_type=1, queue_type=1,
            num_queries=2, queue_size=10, dim=8, temperature=0.1, device=7, stream=0, workspace=0,
            workspace_bytes=0,
        )  # fmt: skip
