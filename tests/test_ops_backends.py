"""Every backend that runs here against the float64 oracle, and the identities each must keep."""

from __future__ import annotations

import pytest
import torch

from softcl import (
    AdaptiveNeighborLabels,
    AdaptiveSoftLabels,
    HardLabels,
    LabelRule,
    MixedLabels,
    NeighborLabels,
    RelationalLabels,
    label_mean,
    queue_statistics,
    soft_contrastive_loss,
)
from softcl.testing import (
    ENTROPY_TOLERANCE,
    GRADIENT_TOLERANCE,
    KINDS,
    LSE_TOLERANCE,
    RULES,
    assert_loss_close,
    assert_neighbors_close,
    available_backends,
    fitting,
    gradient_error,
    loss_oracle,
    make_problem,
    random_rules,
    relative_error,
    rule_name,
)

BACKENDS = available_backends(make_problem(2, 3, 4), AdaptiveSoftLabels(1))
# One row, one column, widths that fill no vector register, K below and just above a tile, D of use.
SHAPES = [(1, 1, 1), (1, 7, 3), (3, 129, 32), (17, 64, 96), (33, 1000, 128), (70, 257, 130)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
UNNAMED = LabelRule(positive=0.5, mean=0.25, confident_neighbor=0.5, num_neighbors=4)


def run(p, rule, backend, **options):
    """Loss rows and gradient of the sum; the query becomes a fresh leaf."""
    query = p.query.detach().clone().requires_grad_()
    options = {"temperature": 0.1, "teacher_temperature": 0.05, **options}
    loss = soft_contrastive_loss(
        query, p.key, p.queue, rule, reduction="none", backend=backend, **options
    )
    loss.sum().backward()
    return loss.detach(), query.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", [*RULES, *random_rules(5, seed=2)], ids=rule_name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradient(backend, rule, shape):
    """Every kind of rows and, over the rules, every pair of dtypes with either denominator."""
    (N, K, D), rule = shape, fitting(rule, shape[1])
    for place, kind in enumerate(KINDS):
        pair = DTYPES[(place + N + len(repr(rule))) % len(DTYPES)]
        p = make_problem(N, K, D, kind=kind, dtype=pair[0], queue_dtype=pair[1], seed=N + K)
        for positive in (True, False):
            oracle = loss_oracle(p, rule, positive=positive)
            query = p.query.clone().requires_grad_()
            loss, shown = soft_contrastive_loss(
                query, p.key, p.queue, rule, temperature=0.1, teacher_temperature=0.05,
                positive=positive, reduction="none", diagnostics=True, backend=backend,
            )  # fmt: skip
            loss.sum().backward()
            # Clustered rows have cosines near 1 and few large labels: one rounding of a cosine,
            # 6e-8, moves a label by 6e-8 / 0.05 of itself, and nothing averages it out.
            scale = 1.0 if kind == "random" else 2.0
            if pair[0] == torch.float32:
                assert_loss_close(loss, query.grad, oracle, pair[0], scale=scale)
            else:
                # The gradient comes back in bfloat16: its own rounding is the larger error.
                assert relative_error(loss, oracle.loss) <= scale * LSE_TOLERANCE
                assert gradient_error(query.grad, oracle.dquery, 0.1) <= 2**-8
            if rule.needs_softmax:
                assert relative_error(shown.entropy, oracle.entropy) <= ENTROPY_TOLERANCE
                assert relative_error(shown.confidence, oracle.confidence) <= ENTROPY_TOLERANCE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_queue_statistics(backend, temperature, shape):
    N, K, D = shape
    for place, kind in enumerate(KINDS):
        pair = DTYPES[(place + N) % len(DTYPES)]
        p = make_problem(N, K, D, kind=kind, dtype=pair[0], queue_dtype=pair[1])
        got = queue_statistics(
            p.query, p.queue, temperature, num_neighbors=min(K, 10), backend=backend
        )
        queue = p.queue.double()
        logits = p.query.double() @ queue.T / temperature
        share = logits.softmax(1)
        entropy = -torch.special.xlogy(share, share).sum(1)
        assert relative_error(got.lse, logits.logsumexp(1)) <= LSE_TOLERANCE
        # One rounding of a cosine moves a logit by 6e-8 / temperature; the promises are for
        # temperatures in use, and below them that rounding is all that is left.
        scale = max(1.0, 0.05 / temperature)
        assert relative_error(got.entropy, entropy) <= scale * ENTROPY_TOLERANCE
        assert gradient_error(got.mean, share @ queue) <= 2 * scale * LSE_TOLERANCE
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
def test_equal_rows_go_by_the_lowest(backend):
    e = torch.eye(32)
    found = queue_statistics(e[:1], e.repeat(4, 1), 0.1, num_neighbors=6, backend=backend)
    assert found.neighbor_indices.tolist() == [[0, 32, 64, 96, 1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_label_mean_is_that_of_the_loss(backend, rule):
    """Through the loss's gradient: dloss/dz = (g - m) / temperature, so m follows from it."""
    p = make_problem(9, 120, 32, kind="clustered")
    got = label_mean(
        rule, 3 * p.key, p.queue, teacher_temperature=0.05, normalize=True, backend=backend
    )
    hard, soft = loss_oracle(p, HardLabels()), loss_oracle(p, rule)
    expected = 0.1 * (hard.dquery - soft.dquery) + p.key.double()
    assert float((got.mean - expected).abs().max()) < 3e-6
    if rule.needs_softmax:
        assert relative_error(got.entropy, soft.entropy) < 1e-5
        assert relative_error(got.confidence, soft.confidence) < 1e-5
    else:
        assert got.entropy is None and got.confidence is None
    assert (got.neighbor_indices is None) == (rule.num_neighbors == 0)
    assert not got.mean.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_have_the_queues_gradient(backend, kind):
    p = make_problem(7, 40, 16, kind=kind)
    leaves = [x.clone().requires_grad_() for x in (p.query, p.queue)]
    exact = [x.double().requires_grad_() for x in (p.query, p.queue)]
    lse = queue_statistics(*leaves, 0.1, backend=backend).lse
    expected = (exact[0] @ exact[1].T / 0.1).logsumexp(1)
    weights = torch.linspace(0.5, 2.0, 7)
    found = torch.autograd.grad((lse * weights).sum(), leaves)
    for a, b in zip(found, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        assert gradient_error(a, b) <= GRADIENT_TOLERANCE[torch.float32]


# One row of length 1e19 to 1e30 (their squares are beyond float32), short rows, and zeros.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1e30, 1e19, 1e-9])
def test_rows_of_any_length_are_normalised(backend, length):
    p = make_problem(5, 33, 8, kind="clustered")
    oracle = loss_oracle(p, AdaptiveSoftLabels(3))
    raw = type(p)(p.query * length, p.key * length, p.queue)
    loss, gradient = run(raw, AdaptiveSoftLabels(3), backend, normalize=True)
    z = p.query.double()
    z = z / z.norm(dim=1, keepdim=True)
    expected = oracle.dquery - z * (z * oracle.dquery).sum(1, keepdim=True)
    assert relative_error(loss, oracle.loss) <= 4 * LSE_TOLERANCE
    assert gradient_error(gradient.double() * length, expected, 0.1) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [HardLabels(), AdaptiveSoftLabels(2)], ids=rule_name)
@pytest.mark.parametrize("name", ["query", "key", "queue"])
def test_a_long_row_that_is_not_normalised_is_right_or_refused_by_name(backend, rule, name):
    """With a gradient and without: a loss of rows beyond float32's precision once came out wrong
    where nothing but the gradient was not finite."""
    p = make_problem(6, 400, 16)
    for exponent in range(10, 38):
        rows = {"query": p.query, "key": p.key, "queue": p.queue}
        rows[name] = rows[name].clone()
        rows[name][2] *= -(10.0**exponent) if exponent % 2 else 10.0**exponent
        oracle = loss_oracle(type(p)(**rows), rule)
        for gradient in (True, False):
            query = rows["query"].clone().requires_grad_(gradient)
            try:
                loss = soft_contrastive_loss(
                    query, rows["key"], rows["queue"], rule, temperature=0.1,
                    teacher_temperature=0.05, reduction="none", backend=backend,
                )  # fmt: skip
            except ValueError as error:
                assert f"{name} has a row of norm 1e+{exponent}" in str(error)
            else:
                # Of the logits, whose differences the loss is.
                error = float((loss - oracle.loss).detach().abs().max()) / 10.0 ** (exponent + 1)
                assert error < 1e-5, (exponent, gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_zeros_has_no_direction_and_no_gradient(backend):
    p = make_problem(5, 33, 8, kind="clustered")
    p.query[1] = 0.0
    loss, gradient = run(p, AdaptiveSoftLabels(3), backend, normalize=True)
    assert torch.equal(gradient[1], torch.zeros(8)) and bool(gradient.isfinite().all())
    others = torch.tensor([0, 2, 3, 4])
    rest = type(p)(p.query[others], p.key[others], p.queue)
    oracle = loss_oracle(rest, AdaptiveSoftLabels(3), normalize=True)
    assert_loss_close(loss[others], gradient[others], oracle, torch.float32, scale=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1e6, 0.1, 1e-3])
def test_an_excluded_row_never_leaks(backend, temperature):
    p = make_problem(5, 33, 8, kind="clustered")
    excluded = torch.tensor([0, 1, 2, -1, 32])
    options = dict(temperature=temperature, teacher_temperature=temperature, excluded=excluded)
    for rule in (AdaptiveSoftLabels(3), UNNAMED):
        loss, gradient = run(p, rule, backend, **options)
        oracle = loss_oracle(p, rule, **options)
        scale = max(1.0, 0.1 / temperature)
        assert relative_error(loss, oracle.loss) <= scale * LSE_TOLERANCE
        assert gradient_error(gradient, oracle.dquery, temperature) <= 4e-6 * scale


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_and_key_of_two_types(backend):
    """A student under autocast, a teacher that is not: the wider type, exactly."""
    p = make_problem(6, 40, 16)
    for low in (torch.bfloat16, torch.float16):
        for query, key in ((p.query.to(low), p.key), (p.query, p.key.to(low))):
            mixed = type(p)(query, key, p.queue)
            oracle = loss_oracle(mixed, AdaptiveSoftLabels(3))
            loss, gradient = run(mixed, AdaptiveSoftLabels(3), backend)
            assert relative_error(loss, oracle.loss) <= LSE_TOLERANCE
            assert gradient.dtype == query.dtype
            assert gradient_error(gradient, oracle.dquery, 0.1) <= 2**-8


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

    @pytest.mark.parametrize("rule", [AdaptiveSoftLabels(7), UNNAMED], ids=rule_name)
    def test_order_of_the_queue_does_not_matter(self, backend, rule):
        p = make_problem(9, 333, 32, kind="clustered")
        shuffled = type(p)(p.query, p.key, p.queue[torch.randperm(333)])
        for a, b in zip(run(p, rule, backend), run(shuffled, rule, backend), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("rule", [AdaptiveSoftLabels(7), UNNAMED], ids=rule_name)
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
