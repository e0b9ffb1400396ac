"""Loss and gradient of every label rule: the backends that run here, and their peers.

    pytest bench/bench_soft_contrastive.py --benchmark-only [--shapes main] [--rule NAME] ...

Each contender is first held to the float64 oracle, on some rows of the same inputs (rows do not
depend on each other), then timed in turn with ours: forward and backward, through the public
function. All run with malloc told to keep its pages, which favours those that make N x K matrices;
"eager as it comes" is the eager formula in a process without that (see memory.py).
"""

from __future__ import annotations

import pytest
import torch

from bench.machine import conditions
from bench.memory import available_memory, cuda_peak_increase, fresh_process, peak_increase
from bench.peers import AS_IT_COMES, PEERS, absent
from bench.shapes import DENSE, GRID, MAIN, QUICK, RULES, Shape, eager_bytes, loss_cost
from bench.table import OURS, Row
from bench.timing import measure
from softcl import RelationalLabels, soft_contrastive_loss
from softcl.ops.backends import BACKENDS
from softcl.testing import (
    Problem,
    assert_loss_close,
    available_backends,
    loss_oracle,
    make_problem,
)
from softcl.train.parts import keep_freed_pages

TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.05
DTYPES = ("float32", "bfloat16", "float16")

# Peers are not bound by this project's promises: they must agree, not excel. In half precision most
# of them round logits, losses and gradients to the dtype: bounds in units of its last bit, of which
# 1.6 were seen in losses, 5 in gradients (where labels are clipped, after a sum of larger ones).
PEER_SCALE = 10.0
PEER_UNITS = 8.0
CHECKED_ROWS = 64
SECONDS = 3.0  # of a contender and ours together


def chosen_backends(option) -> list[str]:
    smallest = make_problem(2, 8, 4, device=option("--device"))
    return option("--backend") or available_backends(smallest, RULES[DENSE])


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    full, wanted = option("--full"), option("--shapes")
    shapes = {"quick": QUICK, "main": MAIN, "grid": GRID}[wanted or ("grid" if full else "quick")]
    rules = option("--rule") or (RULES if full else (DENSE,))
    on_cpu = option("--device") == "cpu"
    backends = chosen_backends(option)
    peers = option("--peer") or (*PEERS, *((AS_IT_COMES,) if on_cpu else ()))
    known = (*BACKENDS, *PEERS, AS_IT_COMES)  # other files have peers of their own
    contenders = [x for x in (*backends, *peers) if x in known]
    dtypes = option("--dtype") or (DTYPES if full else ("float32",) if on_cpu else ("bfloat16",))
    metafunc.parametrize("shape", shapes, ids=str)
    metafunc.parametrize("rule", [r for r in rules if r in RULES])
    metafunc.parametrize("dtype", dtypes)
    metafunc.parametrize("contender", contenders, ids=lambda x: x.replace(" ", "-"))


class Step:
    """Forward and backward of one contender on the inputs of a shape, which are kept for the next.

    Global state, so that the other process can be told which step to do by its arguments alone.
    """

    inputs: tuple[tuple, Problem] | None = None

    def __init__(self, shape: Shape, rule, contender: str, dtype: str, device: str) -> None:
        if Step.inputs is None or Step.inputs[0] != (shape, dtype, device):
            Step.inputs = None  # before there are new ones
            problem = make_problem(*shape, dtype=getattr(torch, dtype), device=device)
            Step.inputs = (shape, dtype, device), problem
        self.problem = Step.inputs[1]
        self.query = self.problem.query.detach().requires_grad_()
        self.rule, self.contender = rule, contender

    def __call__(self) -> torch.Tensor:
        self.query.grad = None
        rows = loss_rows(
            self.contender, self.query, self.problem.key, self.problem.queue, self.rule
        )
        rows.sum().backward()
        return rows


def loss_rows(contender, query, key, queue, rule):
    positive = rule != RelationalLabels()  # as ReSSL has it
    temperatures = (TEMPERATURE, TEACHER_TEMPERATURE)
    peer = "eager" if contender == AS_IT_COMES else contender
    if peer in PEERS:
        return PEERS[peer](query, key, queue, rule, *temperatures, positive)
    return soft_contrastive_loss(
        query,
        key,
        queue,
        rule,
        temperature=TEMPERATURE,
        teacher_temperature=TEACHER_TEMPERATURE,
        positive=positive,
        reduction="none",
        backend=contender,
    )


def keeps_weights(shape: Shape) -> bool:
    """Whether the CPU backend does: then it is what the floor of all contenders counts."""
    try:
        from softcl import _C
    except ImportError:
        return False
    return _C.cpu_keeps_weights(*shape, torch.get_num_threads())


def check(step: Step, rows: torch.Tensor) -> None:
    """Hold some rows of a step's results to the oracle."""
    p, is_peer = step.problem, step.contender in PEERS or step.contender == AS_IT_COMES
    is_half = p.query.dtype != torch.float32
    some = torch.arange(0, len(rows), max(1, len(rows) // CHECKED_ROWS))
    part = Problem(p.query[some], p.key[some], p.queue)
    oracle = loss_oracle(
        part,
        step.rule,
        positive=step.rule != RelationalLabels(),
        normalize=step.contender == "lightly",  # its gradient goes through a normalisation
    )
    if is_peer and is_half:
        assert_peer_close(rows[some], step.query.grad[some], oracle, step.rule)
        return
    assert_loss_close(
        rows[some],
        step.query.grad[some],
        oracle,
        p.query.dtype,
        temperature=TEMPERATURE,
        # A gradient in half precision is rounded once more, to the dtype of the query.
        scale=PEER_SCALE if is_peer else 3.0 if is_half else 1.0,
    )


def assert_peer_close(loss: torch.Tensor, dquery: torch.Tensor, oracle, rule) -> None:
    """Hold a peer's losses and gradient in half precision to what its rounding allows.

    Where similarities differ by less than that it takes other neighbours, and with them another
    loss: of rules that weigh neighbours alike half of the rows must agree, of others every row.
    """
    share = 0.5 if rule.adds_neighbors and not rule.clip else 1.0
    bound = PEER_UNITS * torch.finfo(dquery.dtype).eps
    for name, got, expected in (
        ("loss", loss[:, None], oracle[0][:, None]),
        ("gradient", dquery, oracle[1]),
    ):
        size = expected.abs().amax().clamp(min=1.0)
        errors = (got.detach().double() - expected).abs().amax(1) / size
        error = float(errors.quantile(share))
        assert error <= bound, f"{name} is off by {error:.2e}"


_step: Step | None = None  # of the other process


def prepare_elsewhere(*arguments) -> int | None:
    """In the other process: make and check a step; returns its peak memory in bytes."""
    global _step
    _step = Step(*arguments)
    check(_step, _step())
    return peak_increase(_step)


def step_elsewhere() -> None:
    _step()


@pytest.fixture(scope="module")
def spare():
    """A process to measure memory in; this one's malloc keeps its pages from here on."""
    keep_freed_pages()
    with fresh_process() as pool:
        yield pool


@pytest.fixture
def elsewhere(contender, spare):
    """Where to prepare a step. glibc adjusts itself to the blocks that a process has freed, so what
    comes as it comes needs a process that has done nothing else."""
    if contender != AS_IT_COMES:
        yield spare
        return
    with fresh_process() as pool:
        yield pool


@pytest.fixture
def ours(request) -> str | None:
    """The backend that takes turns with the others."""
    backends = chosen_backends(request.config.getoption)
    return next((b for b in OURS if b in backends), None)


def bench_loss_and_gradient(
    benchmark, report, ceilings, elsewhere, ours, device, shape, rule, dtype, contender
):
    group = f"{shape} {rule}" + ("" if dtype == "float32" else f" {dtype}")
    name, rule = rule, RULES[rule]
    reason = absent(contender, device, rule)
    if reason:
        report(Row(group, contender, note=reason))
        pytest.skip(reason)
    keeps = device == "cpu" and keeps_weights(shape)
    cost = loss_cost(shape, rule, getattr(torch, dtype).itemsize, keeps)
    needed, free = eager_bytes(shape, rule), available_memory()
    if device == "cpu" and contender in ("eager", "compiled", AS_IT_COMES) and needed > 0.7 * free:
        note = f"not run: needs about {needed / 1e9:.0f} GB"
        report(Row(group, contender, note=note))
        pytest.skip(note)

    work = shape, rule, contender, dtype, device
    peak = None
    if device == "cpu" and contender != "compiled":  # the compiler's own memory would count
        peak = elsewhere.submit(prepare_elsewhere, *work).result()
    if contender == AS_IT_COMES:

        def step():
            elsewhere.submit(step_elsewhere).result()
    else:
        step = Step(*work)
        check(step, step())
    if device == "cuda":
        peak = cuda_peak_increase(step)
    benchmark.group = group
    timing = measure(
        benchmark,
        step,
        None if ours in (None, contender) else Step(shape, rule, ours, dtype, device),
        device=device,
        seconds=SECONDS,
        other_process=contender == AS_IT_COMES,
    )
    if timing is None:  # --benchmark-disable: the check alone
        return
    limits = ceilings(group)
    seconds = timing.seconds
    floor = limits and limits.floor(cost)
    report(Row(group, contender, seconds, cost.flop, floor, peak, over_ours=timing.over_ours))
    benchmark.extra_info.update(
        conditions(device),
        shape=list(shape),
        rule=name,
        dtype=dtype,
        contender=contender,
        flop=cost.flop,
        bytes=cost.bytes,
        exponentials=cost.exponentials,
        gflops=cost.flop / seconds / 1e9,
        over_ours=timing.over_ours,
        peak_bytes=peak,
        **(limits.information(cost, seconds) if limits else {}),
    )
