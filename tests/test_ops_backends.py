"""Every backend that runs here against the float64 oracle, and the identities each must keep."""

from __future__ import annotations

import pytest
import torch

from softcl import (
    AdaptiveNeighborLabels,
    AdaptiveSoftLabels,
    HardLabels,
    MixedLabels,
    NeighborLabels,
    RelationalLabels,
    queue_statistics,
    soft_contrastive_loss,
)
from softcl.testing import (
    ENTROPY_TOLERANCE,
    KINDS,
    LSE_TOLERANCE,
    RULES,
    assert_loss_close,
    assert_neighbors_close,
    available_backends,
    gradient_error,
    loss_oracle,
    make_problem,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

BACKENDS = available_backends(make_problem(2, 3, 4), AdaptiveSoftLabels(1))
# One row, one column, widths that fill no vector register, K below and just above a tile, D of use.
SHAPES = [(1, 1, 1), (1, 7, 3), (3, 129, 32), (17, 64, 96), (33, 1000, 128), (70, 257, 130)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


def run(p, rule, backend, **options):
    """Loss rows and gradient of the sum; the query becomes a fresh leaf."""
    query = p.query.detach().clone().requires_grad_()
    options = {"temperature": 0.1, "teacher_temperature": 0.05, **options}
    loss = soft_contrastive_loss(
        query, p.key, p.queue, rule, reduction="none", backend=backend, **options
    )
    loss.sum().backward()
    return loss.detach(), query.grad


def rule_name(rule):
    return f"{rule.name}-{rule.num_neighbors}"


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradient(backend, rule, shape, dtypes):
    N, K, D = shape
    if rule.num_neighbors > K:
        rule = type(rule)(K)  # k = K
    for kind in KINDS:
        p = make_problem(N, K, D, kind=kind, dtype=dtypes[0], queue_dtype=dtypes[1], seed=N + K)
        for positive in (True, False):
            oracle = loss_oracle(p, rule, positive=positive)
            query = p.query.clone().requires_grad_()
            loss, shown = soft_contrastive_loss(
                query,
                p.key,
                p.queue,
                rule,
                temperature=0.1,
                teacher_temperature=0.05,
                positive=positive,
                reduction="none",
                diagnostics=True,
                backend=backend,
            )
            loss.sum().backward()
            # Clustered rows have cosines near 1 and few large labels: one rounding of a cosine,
            # 6e-8, moves a label by 6e-8 / 0.05 of itself, and nothing averages it out.
            scale = 1.0 if kind == "random" else 2.0
            if dtypes[0] == torch.float32:
                assert_loss_close(loss, query.grad, oracle, dtypes[0], scale=scale)
            else:
                # The gradient comes back in bfloat16: its own rounding is the larger error.
                assert relative_error(loss, oracle[0]) <= scale * LSE_TOLERANCE
                assert gradient_error(query.grad, oracle[1], 0.1) <= 2**-8
            if rule.needs_softmax:
                assert relative_error(shown.entropy, oracle[3]) <= ENTROPY_TOLERANCE
                assert relative_error(shown.confidence, oracle[2]) <= ENTROPY_TOLERANCE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_queue_statistics(backend, temperature, shape):
    N, K, D = shape
    for kind in KINDS:
        for dtypes in DTYPES:
            p = make_problem(N, K, D, kind=kind, dtype=dtypes[0], queue_dtype=dtypes[1])
            k = min(K, 10)
            got = queue_statistics(p.query, p.queue, temperature, num_neighbors=k, backend=backend)
            want = queue_statistics(
                p.query.double(), p.queue.double(), temperature, backend="reference"
            )
            assert relative_error(got.lse, want.lse) <= LSE_TOLERANCE
            # One rounding of a cosine moves a logit by 6e-8 / temperature; the promises are for
            # temperatures in use, and below them that rounding is all that is left.
            scale = max(1.0, 0.05 / temperature)
            assert relative_error(got.entropy, want.entropy) <= scale * ENTROPY_TOLERANCE
            assert gradient_error(got.mean, want.mean) <= 2 * scale * LSE_TOLERANCE
            assert_neighbors_close(
                got.neighbor_logits, got.neighbor_indices, p.query, p.queue, temperature
            )


@pytest.mark.parametrize("num_neighbors", [1, 2, 31, 64, 65, 200, 1000])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "equal"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbors_in_adversarial_orders(backend, order, num_neighbors):
    """Exact top-k whatever order the best rows come in; k = K included."""
    p = make_problem(6, 1000, 24)
    similarity = p.query[0] @ p.queue.T
    queue = {
        "random": p.queue,
        "ascending": p.queue[similarity.argsort()],
        "descending": p.queue[similarity.argsort(descending=True)],
        "equal": p.queue[:1].repeat(1000, 1),
    }[order].contiguous()
    got = queue_statistics(p.query, queue, 0.1, num_neighbors=num_neighbors, backend=backend)
    assert_neighbors_close(got.neighbor_logits, got.neighbor_indices, p.query, queue, 0.1)


@pytest.mark.parametrize("backend", BACKENDS)
class TestIdentities:
    def test_no_neighbors_is_moco(self, backend):
        p = make_problem(9, 120, 32, kind="clustered")
        moco = run(p, HardLabels(), backend)
        for rule in (AdaptiveSoftLabels(0), AdaptiveNeighborLabels(0), NeighborLabels(0)):
            for a, b in zip(moco, run(p, rule, backend), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    def test_mixture_ends(self, backend):
        p = make_problem(9, 120, 32, kind="clustered")
        for a, b in zip(
            run(p, MixedLabels(1.0), backend), run(p, HardLabels(), backend), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        for a, b in zip(
            run(p, MixedLabels(0.0), backend), run(p, RelationalLabels(), backend), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("rule", RULES, ids=rule_name)
    def test_order_of_the_queue_does_not_matter(self, backend, rule):
        p = make_problem(9, 333, 32, kind="clustered")
        shuffled = type(p)(p.query, p.key, p.queue[torch.randperm(333)])
        for a, b in zip(run(p, rule, backend), run(shuffled, rule, backend), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("rule", RULES, ids=rule_name)
    def test_fill_count_is_a_shorter_queue(self, backend, rule):
        p = make_problem(9, 333, 32, kind="clustered")
        poisoned = p.queue.clone()
        poisoned[100:] = torch.nan
        young = type(p)(p.query, p.key, poisoned)
        short = type(p)(p.query, p.key, p.queue[:100].clone())
        for a, b in zip(
            run(young, rule, backend, filled=100), run(short, rule, backend), strict=True
        ):
            assert torch.equal(a, b)

    def test_every_row_twice(self, backend):
        """Doubling the queue adds log 2 to the denominator and changes no mean."""
        p = make_problem(9, 150, 32)
        one = queue_statistics(p.query, p.queue, 0.1, backend=backend)
        two = queue_statistics(p.query, torch.cat([p.queue, p.queue]), 0.1, backend=backend)
        torch.testing.assert_close(two.lse, one.lse + torch.tensor(2.0).log())
        torch.testing.assert_close(two.entropy, one.entropy + torch.tensor(2.0).log())
        torch.testing.assert_close(two.mean, one.mean, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("rule", RULES, ids=rule_name)
    def test_fused_normalisation(self, backend, rule):
        p = make_problem(9, 150, 32, kind="clustered")
        lengths = torch.linspace(1.0, 7.0, 9)[:, None]
        raw = type(p)(p.query * lengths, p.key * lengths.flip(0), p.queue)
        loss, gradient = run(raw, rule, backend, normalize=True)
        oracle = loss_oracle(raw, rule, normalize=True)
        assert_loss_close(loss, gradient, oracle, torch.float32)
        # A length carries no information: the gradient is orthogonal to the row.
        assert float((gradient * raw.query).sum(1).abs().max()) < 1e-5

    def test_same_inputs_same_bits(self, backend):
        p = make_problem(65, 3000, 64, kind="clustered")
        first = run(p, AdaptiveSoftLabels(5), backend)
        for _ in range(5):
            for a, b in zip(first, run(p, AdaptiveSoftLabels(5), backend), strict=True):
                assert torch.equal(a, b)

    def test_inputs_are_not_modified(self, backend):
        p = make_problem(9, 150, 32)
        before = [x.clone() for x in (p.query, p.key, p.queue)]
        run(p, AdaptiveSoftLabels(5), backend, normalize=True)
        for a, b in zip(before, (p.query, p.key, p.queue), strict=True):
            assert torch.equal(a, b)

    def test_strided_inputs(self, backend):
        """Transposed and sliced views give what their copies give."""
        p = make_problem(9, 150, 32)
        wide = torch.cat([p.query, p.query], 1)[:, ::2]
        for view in (p.query.T.contiguous().T, wide):
            strided = type(p)(view, p.key, p.queue.T.contiguous().T)
            copied = type(p)(view.contiguous(), p.key, p.queue)
            for a, b in zip(
                run(strided, HardLabels(), backend), run(copied, HardLabels(), backend), strict=True
            ):
                assert torch.equal(a, b)

    def test_not_finite_rows_are_named(self, backend):
        p = make_problem(9, 150, 32)
        for name in ("query", "key", "queue"):
            tensors = {"query": p.query, "key": p.key, "queue": p.queue}
            broken = tensors[name].clone()
            broken[4, 3] = torch.nan
            tensors[name] = broken
            with pytest.raises(ValueError, match=f"{name} has 1 row.* the first is row 4"):
                soft_contrastive_loss(
                    tensors["query"],
                    tensors["key"],
                    tensors["queue"],
                    AdaptiveSoftLabels(5),
                    temperature=0.1,
                    teacher_temperature=0.05,
                    backend=backend,
                )
