"""The Triton loss at the ends of what it takes: temperatures, lengths of rows, a rule's numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from loss_calls import check_statistics, run_statistics, some_long, stretched
from triton_calls import check, on, run

from softcl.labels import (
    AdaptiveSoftLabels,
    DistillationLabels,
    HardLabels,
    LabelRule,
    RelationalLabels,
)
from softcl.ops import triton
from softcl.testing import (
    ENTROPY_TOLERANCE,
    GRADIENT_TOLERANCE,
    LSE_TOLERANCE,
    Problem,
    assert_neighbors_close,
    gradient_error,
    loss_oracle,
    make_problem,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("triton_device")

F, B, H = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("target", ["interpreter", "sm_90"])
@pytest.mark.parametrize("temperatures", [(1e-6, 1e6), (1e6, 1e-6), (1e6, 1e6)], ids=str)
def test_excluded_row_at_any_temperature(triton_device, monkeypatch, target, temperatures):
    """The others' results to the bit: a row that takes no part may hold anything finite."""
    if triton_device == "cpu":
        monkeypatch.setattr(triton, "target_of", lambda device: (target, 40))
    elif target != "interpreter":
        pytest.skip("other architectures' tiles need not fit here")
    p = make_problem(4, 65, 24, dtype=B)
    queue = p.queue.clone()
    queue[64] = 0.25 * p.queue[3]
    others = on(triton_device, Problem(p.query, p.key, queue))
    p = on(triton_device, p)
    excluded = torch.full((4,), 64, device=triton_device)
    for rule in (RelationalLabels(), AdaptiveSoftLabels(3)):
        first, again = (run(x, rule, *temperatures, excluded=excluded) for x in (p, others))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        assert not bool((first.neighbor_indices == 64).any())
        oracle = loss_oracle(
            p, rule, temperature=temperatures[0], teacher_temperature=temperatures[1],
            excluded=excluded,
        )  # fmt: skip
        scale = max(1.0, 0.05 / min(temperatures))
        assert gradient_error(first.dquery, oracle.dquery, temperatures[0]) <= scale * 1e-3
        assert relative_error(first.confidence, oracle.confidence) <= scale * ENTROPY_TOLERANCE


@pytest.mark.parametrize(
    ("temperatures", "multiprocessors"),
    some_long(
        list(itertools.product([(0.1, 1e-4), (1e-4, 1e-4), (0.1, 1e-6)], [1, 40])),
        [((1e-4, 1e-4), 1), ((0.1, 1e-6), 40)].__contains__,
    ),
    ids=str,
)
def test_merge_at_low_temperatures(triton_device, monkeypatch, temperatures, multiprocessors):
    """Cosines are exact, so nothing but the softmax and its merge rounds: as at any temperature.

    The logits are 14427 and 1442695 in base 2. The nearest rows tie, in several splits.
    """
    target, _ = triton.target_of(torch.device(triton_device, 0))
    monkeypatch.setattr(triton, "target_of", lambda device: (target, multiprocessors))
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (200, 16), generator=generator) * 0.5 - 0.25
    queue = signs.clone()
    queue[50:53] = queue[150] = queue[1]
    queue[120] = queue[2]
    key = queue[:6].clone()
    key[0] = -queue[0]
    query = key.clone()
    query[3] = queue[9]
    p = on(triton_device, Problem(query, key, queue))
    for rule in (AdaptiveSoftLabels(7), DistillationLabels()):
        got = run(p, rule, *temperatures)
        oracle = loss_oracle(
            p, rule, temperature=temperatures[0], teacher_temperature=temperatures[1]
        )
        # z.m is a product of rows, whose rounding the temperature divides.
        size = max(1.0, 0.1 / temperatures[0])
        assert relative_error(got.loss / size, oracle.loss / size) <= LSE_TOLERANCE
        assert gradient_error(got.dquery, oracle.dquery, temperatures[0]) <= LSE_TOLERANCE
        assert relative_error(got.confidence, oracle.confidence) <= ENTROPY_TOLERANCE
        assert relative_error(got.entropy, oracle.entropy) <= ENTROPY_TOLERANCE


# The first and the fourth are of a short run in the interpreter.
WIDE = [
    (768, (F, F), "sm_90"),
    (768, (H, H), "gfx942"),
    (600, (H, B), "sm_100"),
    (1024, (B, B), "sm_80"),
    (1024, (F, B), "sm_86"),
    (768, (B, F), "sm_100"),
    (520, (B, H), "sm_90"),
]


@pytest.mark.parametrize(("D", "dtypes", "target"), some_long(WIDE, WIDE[:4].__contains__), ids=str)
def test_wide_rows(triton_device, monkeypatch, D, dtypes, target):
    """D up to 1024, whose pieces are not kept: distillation from raw rows by a cold teacher, other
    rules, neighbours. The last piece is not full, or is not there; two splits; excluded rows."""
    if triton_device == "cpu":
        monkeypatch.setattr(triton, "target_of", lambda device: (target, 2))
    p = make_problem(3, 70, D, kind="clustered", dtype=dtypes[0], queue_dtype=dtypes[1])
    p = on(triton_device, p)
    excluded = torch.tensor([69, -1, 0], device=triton_device)
    check(stretched(p), DistillationLabels(), 0.2, 1e-4, normalize=True)
    check(p, AdaptiveSoftLabels(2), 0.1, 0.05, excluded=excluded)
    check(p, HardLabels(), 0.1)
    tolerance = 2 * GRADIENT_TOLERANCE[dtypes[0]]
    check_statistics(triton, p.query, p.queue, 0.07, 9, mean_tolerance=tolerance)
    got = run_statistics(triton, p.query, p.queue, 0.07, 9, sums=False)
    assert_neighbors_close(got.neighbor_logits, got.neighbor_indices, p.query, p.queue, 0.07)


@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_clipped_labels_at_low_temperatures(triton_device, kind):
    """What clips a label is a sum of the neighbours' own: it fits theirs at any temperature."""
    p = on(triton_device, make_problem(5, 300, 40, kind=kind))
    check(p, AdaptiveSoftLabels(7), 0.1, 1e-4)
    check(p, AdaptiveSoftLabels(7), 1e-4, 1e-4, positive=False)


def test_tiny_rows_have_no_direction(triton_device):
    """Norms up to 1e-12 are taken for 1e-12, and such rows get no gradient."""
    p = make_problem(5, 10, 4)
    lengths = torch.tensor([1.0, 0.0, 1e-20, 0.5e-12, 4e-12])[:, None]
    p = on(triton_device, Problem(p.query * lengths, p.key * lengths.flip(0), p.queue))
    got = check(p, AdaptiveSoftLabels(2), normalize=True, scale=2.0)
    assert not bool(got.dquery[1:4].any())


@pytest.mark.parametrize("dtype", [F, B], ids=str)
def test_rows_of_any_length(triton_device, dtype):
    """Squares of 1e19 are beyond fp32, and so is the norm of the last row of the keys."""
    p = make_problem(7, 150, 40, dtype=dtype)
    # A gradient of 1e-38 has lost its last bits: the longest query is of 1e30.
    lengths = torch.tensor([1e-11, 1.0, 1e15, 2e15, 1e19, 1e30, 1e25], dtype=F)[:, None]
    query, key = (p.query.float() * lengths).to(dtype), (p.key.float() * lengths).to(dtype)
    key[6] = 3e38
    p = on(triton_device, Problem(query, key, p.queue))
    check(p, AdaptiveSoftLabels(2), normalize=True, scale=2.0)


def test_scale_of_the_numbers_does_not_matter(triton_device):
    """Beyond fp32 too."""
    p = on(triton_device, make_problem(3, 70, 8))
    numbers = dict(positive=0.5, confident_mean=2.0, mean=0.25)
    plain = run(p, LabelRule(**numbers))
    for factor in (2.0**-900, 2.0**900):
        scaled = run(p, LabelRule(**{name: x * factor for name, x in numbers.items()}))
        assert all(torch.equal(x, y) for x, y in zip(plain, scaled, strict=True))
