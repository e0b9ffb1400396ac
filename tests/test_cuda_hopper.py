"""The Hopper streaming kernel's own code, run on the CPU, against the float64 oracle.

What this shows and what not: tests/native/cuda/block.h and warpgroup.h. Copies, barriers with
phases and products of warpgroups are written from the PTX ISA; nvcc's code and the hardware's
timing are not in it. tests/test_cuda_hopper_build.py looks at nvcc's code.
"""

from __future__ import annotations

import math

import pytest
import torch
from cuda_host import ROOT, load_host_module
from cuda_parts import MIXES, check, run, statistics, tolerance_of
from loss_calls import case_id, check_statistics, pairs, some_long, stretched

from softcl.labels import (
    AdaptiveNeighborLabels,
    AdaptiveSoftLabels,
    HardLabels,
    MixedLabels,
    NeighborLabels,
    RelationalLabels,
)
from softcl.ops import cuda
from softcl.testing import (
    LSE_TOLERANCE,
    RULES,
    Problem,
    fitting,
    make_problem,
    random_rules,
    relative_error,
    rule_name,
)

HALF = (torch.bfloat16, torch.float16)
# Blocks hold 64 samples, or 128 where nobody wants means or rows are of one kind; tiles 128 queue
# rows, or 64 for D > 128. The fourth and the last give a split more tiles than there are stages.
SHAPES = [(1, 1, 8), (65, 129, 64), (9, 300, 104), (66, 1300, 40), (5, 97, 136), (3, 600, 256)]
SEEDS = (0, 1)


@pytest.fixture
def host(monkeypatch):
    """The module of the kernels on the CPU, on a device of compute capability 9.0."""
    module = load_host_module()
    monkeypatch.setattr(cuda, "_load", lambda: (module, ""))
    module.set_options(seed=0)
    module.set_capability(90)
    yield module
    module.set_options(seed=0)
    module.set_capability(80)
    module.cuda_allow_hopper(True)


def took_hopper(host):
    return any(site.startswith("stream_hopper") for site in host.sites())


def check_all_ways(host, p, rule):
    """Against the oracle; in another order of threads, copies and blocks the same bits; and without
    means the same loss but for the order of its sums, for other warpgroups hold other rows."""
    got = check(p, rule)
    assert took_hopper(host)
    host.set_options(seed=1)
    for x, y in zip(got, run(p, rule), strict=True):
        assert torch.equal(x, y)
    loss, *rest = run(p, rule, gradient=False, diagnostics=False)
    assert relative_error(loss, got.loss) <= LSE_TOLERANCE
    assert [x.numel() for x in rest] == [0] * 5


def on_a_diagonal(shapes):
    """A third of the cases, with every rule and every shape among them."""
    return lambda case: (RULES.index(case[0]) + shapes.index(case[1])) % 3 == 0


@pytest.mark.parametrize(
    ("rule", "shape", "dtype"),
    some_long(pairs(RULES, SHAPES, HALF), on_a_diagonal(SHAPES)),
    ids=case_id,
)
def test_against_oracle(host, rule, shape, dtype):
    """Every rule, and the same bits whatever the order of threads, copies and blocks."""
    N, K, D = shape
    check_all_ways(host, make_problem(N, K, D, dtype=dtype, seed=N + D), fitting(rule, K))


# ---- fp32 and mixed types: every number in two parts ---------------------------------------------

# Tiles hold 128 queue rows, or 64 without means for D > 64; the third and the last have more tiles
# than there are stages.
PARTS_SHAPES = [(1, 1, 8), (65, 129, 64), (9, 700, 40), (5, 97, 72), (3, 600, 128)]


@pytest.mark.parametrize(
    ("rule", "shape"),
    some_long(pairs(RULES, PARTS_SHAPES), on_a_diagonal(PARTS_SHAPES)),
    ids=case_id,
)
def test_fp32_against_oracle(host, rule, shape):
    """As test_against_oracle; the gradient as fp32 promises it."""
    N, K, D = shape
    check_all_ways(host, make_problem(N, K, D, seed=N + D), fitting(rule, K))


@pytest.mark.parametrize(
    ("mix", "rule", "case"),
    pairs(
        MIXES[1:],
        [HardLabels(), MixedLabels(0.3), AdaptiveSoftLabels(7)],
        [((20, 193, 64), "random"), ((17, 400, 104), "clustered")],
    ),
    ids=case_id,
)
def test_mixed_types(host, mix, rule, case):
    """A queue of 16-bit numbers is taken apart where it lies, one of fp32 across two boxes."""
    shape, kind = case
    check(make_problem(*shape, kind=kind, dtype=mix[0], queue_dtype=mix[1]), rule)
    assert took_hopper(host)


def test_parts_of_clusters_at_low_temperature(host):
    """Sharp labels; then temperatures at which 2^x would overflow."""
    for rule in RULES:
        check(make_problem(33, 300, 64, kind="clustered"), rule, positive=False)
    for rule in (HardLabels(), AdaptiveSoftLabels(7)):
        check(make_problem(20, 300, 64), rule, 0.01, 0.008)


@pytest.mark.parametrize(("mix", "D"), pairs(MIXES, (40, 128)), ids=str)
def test_parts_of_raw_projections_and_statistics(host, mix, D):
    """normalize=True rounds unit rows to their own type; queue_statistics' five results."""
    p = make_problem(20, 150, D, dtype=mix[0], queue_dtype=mix[1])
    check(stretched(p), HardLabels(), normalize=True)
    host.set_options(seed=0)
    check_hopper_statistics(host, p, 5, tolerance_of(p, HardLabels()))


def check_hopper_statistics(host, p, k, mean_tolerance):
    got = check_statistics(cuda, p.query, p.queue, 0.1, k, mean_tolerance=mean_tolerance)
    assert took_hopper(host)
    alone = statistics(p.query, p.queue, 0.1, k, sums=False)
    assert torch.equal(alone.neighbor_logits, got.neighbor_logits)
    assert torch.equal(alone.neighbor_indices, got.neighbor_indices)


# ---- Sharp labels, extremes, what is not finite --------------------------------------------------


@pytest.mark.parametrize("kind", ["clustered", "duplicates"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sharp_labels(host, dtype, kind):
    """Few large labels, clipped ones among them, and ties between the nearest rows."""
    start = (dtype == torch.float16) ^ (kind == "duplicates")
    for rule in (*RULES[start::2], *random_rules(2, seed=start)):
        p = make_problem(33, 600, 64, kind=kind, dtype=dtype)
        # Cosines near 1 and few labels: no averaging takes the rounding of a cosine away.
        check(p, rule, positive=False, scale=2.0)


def test_running_maximum(host):
    """fp16 at temperatures at which 2^x would overflow, and similarities that keep rising."""
    p = make_problem(20, 700, 64, dtype=torch.float16)
    order = (p.query[0].float() @ p.queue.float().T).argsort()
    p = Problem(p.query, p.key, p.queue[order].contiguous())
    for rule in (HardLabels(), AdaptiveSoftLabels(7)):
        check(p, rule, 0.01, 0.008)
        assert took_hopper(host)


@pytest.mark.parametrize(("dtype", "D"), [(torch.bfloat16, 40), (torch.float16, 256)], ids=str)
def test_normalize(host, dtype, D):
    """Raw projections give the loss of their rounded unit rows, and the gradient of the chain."""
    check(stretched(make_problem(70, 200, D, dtype=dtype)), AdaptiveSoftLabels(5), normalize=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_equal_rows_do_not_outrank_the_positive(host, dtype):
    """A queue row with the bits of the key is not more similar than the positive."""
    p = make_problem(140, 90, 104, dtype=dtype)
    queue = torch.cat([p.queue, p.key, p.key])
    own = p.query.double() @ p.key.double().T
    own = own > own.diagonal()[:, None]
    for rule, gradient in [(HardLabels(), True), (NeighborLabels(2), True), (HardLabels(), False)]:
        got = run(Problem(p.query, p.key, queue), rule, gradient=gradient)
        alone = run(p, rule, gradient=gradient)
        assert torch.equal(got[4], alone[4] + 2 * own.sum(1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rule", [HardLabels(), AdaptiveSoftLabels(3)], ids=rule_name)
def test_non_finite_rows(host, rule, value):
    """A row gives NaN in its own results; a queue row that matters gives NaN losses."""
    for dtype in (*HALF, torch.float32):
        p = make_problem(35, 200, 24, dtype=dtype)
        clean = run(p, rule)
        for broken in ("query", "key"):
            rows = getattr(p, broken).clone()
            rows[17, 3] = value
            got = run(Problem(**{**p.__dict__, broken: rows}), rule)
            others = torch.arange(35) != 17
            for x, y in zip(got[:2], clean[:2], strict=True):
                assert bool(x[17].isnan().all())
                assert torch.equal(x[others], y[others])
            assert bool(((got[5] >= 0) & (got[5] < 200)).all())
        queue = p.queue.clone()
        queue[199, 19] = math.nan
        got = run(Problem(p.query, p.key, queue), rule)
        assert bool(got[0].isnan().all()) and bool(got[1].isnan().all())


@pytest.mark.parametrize(
    ("shape", "dtype"), pairs([(1, 1, 8), (130, 300, 64), (3, 1500, 256)], HALF), ids=str
)
def test_queue_statistics(host, shape, dtype):
    check_hopper_statistics(host, make_problem(*shape, dtype=dtype), min(shape[1], 20), 1e-3)


# ---- Which kernel --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "hopper"),
    [
        ({}, True),
        ({"capability": 80}, False),
        ({"capability": 100}, False),
        ({"allowed": False}, False),
        ({"D": 60}, False),  # rows of 120 bytes: TMA takes multiples of 16
        ({"temperature": 0.02}, True),
        ({"teacher_temperature": 0.02}, True),
        ({"dtype": torch.float32}, True),
        ({"dtype": torch.float32, "D": 128, "temperature": 0.02}, True),
        ({"dtype": torch.float32, "D": 136}, False),
        ({"queue_dtype": torch.float32}, True),
        ({"queue_dtype": torch.float32, "D": 136}, False),
        ({"queue_dtype": torch.float16, "capability": 80}, False),
    ],
    ids=str,
)
def test_which_kernel_runs(host, change, hopper):
    host.set_capability(change.get("capability", 90))
    host.cuda_allow_hopper(change.get("allowed", True))
    dtype = change.get("dtype", torch.bfloat16)
    p = make_problem(3, 50, change.get("D", 64), dtype=dtype, queue_dtype=change.get("queue_dtype"))
    temperatures = [change.get(key, 0.1) for key in ("temperature", "teacher_temperature")]
    host.set_options(seed=0)
    got = run(p, AdaptiveSoftLabels(3), *temperatures)
    assert took_hopper(host) == hopper
    assert bool(got[0].isfinite().all())


# ---- The proof that a missing barrier or a wrong phase shows -------------------------------------


def workloads():
    """Calls that between them meet every barrier, wait and fence of the kernel."""
    pair = make_problem(20, 1500, 64, dtype=torch.bfloat16)
    half = make_problem(20, 1500, 64, dtype=torch.float16)
    wide = make_problem(20, 700, 256, dtype=torch.bfloat16)
    parts = make_problem(20, 900, 128)
    return [
        lambda: run(parts, HardLabels()),
        lambda: run(parts, RelationalLabels(), gradient=False),
        lambda: run(parts, RelationalLabels()),
        lambda: run(pair, RelationalLabels()),
        lambda: run(pair, AdaptiveNeighborLabels(3)),
        lambda: run(half, RelationalLabels()),
        lambda: run(wide, HardLabels()),
        lambda: run(pair, HardLabels(), gradient=False),
    ]


# The turns are for speed: the order in which warpgroups multiply changes no number.
NOT_NEEDED = ("kTurn",)


def is_needed(site, lines):
    file, line = site.split(":")
    return not any(word in lines[file][int(line) - 1] for word in NOT_NEEDED)


@pytest.fixture(scope="module")
def lines():
    folder = ROOT / "csrc" / "cuda"
    return {path.name: path.read_text().split("\n") for path in folder.glob("*hopper*.h")}


@pytest.mark.parametrize("stride", [8, pytest.param(1, marks=pytest.mark.long)])
def test_every_barrier_and_phase_is_needed_and_missed(host, lines, stride):
    """Leave out each one in turn, or some, and wait for the wrong phase where one waits: a race, a
    deadlock, a report or a wrong bit must follow."""
    calls, sites, good = workloads(), [], []
    for call in calls:
        host.set_options(seed=0)
        good.append(call())
        sites.append({s for s in host.sites() if s.startswith("stream_hopper")})
    unnoticed = []
    every = sorted(s for s in set().union(*sites) if is_needed(s, lines))
    assert len(every) >= 30
    for site in every[::stride]:
        changes = ["omit"]
        file, line = site.split(":")
        if "mbarrier_wait" in lines[file][int(line) - 1]:
            changes.append("flip")
        for change in changes:
            if not any(
                notices(host, call, {change: site}, result, seed)
                for call, met, result in zip(calls, sites, good, strict=True)
                if site in met
                for seed in SEEDS
            ):
                unnoticed.append((change, site, lines[file][int(line) - 1].strip()))
    assert not unnoticed, unnoticed


def notices(host, call, change, good, seed):
    host.set_options(seed=seed, **change)
    try:
        got = call()
    except RuntimeError:
        return True
    return not all(torch.equal(x, y) for x, y in zip(got, good, strict=True))


def test_what_follows_the_stream_waits_for_it(host):
    """Launched early on 9.0, every finishing kernel begins with the wait; without it, a report."""
    p = make_problem(20, 300, 64, dtype=torch.bfloat16)
    calls = [
        lambda: run(p, RelationalLabels()),
        lambda: statistics(p.query, p.queue, 0.1, 2),
    ]
    waits = set()
    for call in calls:
        host.set_options(seed=0)
        call()
        waits |= {s for s in host.sites() if s.startswith(("soft_contrastive", "queue_statistics"))}
    folder = ROOT / "csrc" / "cuda"
    text = {name: (folder / name).read_text().split("\n") for name in FINISHING}
    waits = {s for s in waits if "wait_for_previous_grid" in text[file_of(s)][line_of(s) - 1]}
    assert {file_of(site) for site in waits} == set(FINISHING)
    for site in waits:
        reports = []
        for call in calls:
            host.set_options(seed=0, omit=site)
            try:
                call()
            except RuntimeError as error:
                reports.append(str(error))
        assert reports and all("the grid before may still run" in r for r in reports)


FINISHING = ("soft_contrastive.cu", "queue_statistics.cu")


def file_of(site):
    return site.split(":")[0]


def line_of(site):
    return int(site.split(":")[1])
