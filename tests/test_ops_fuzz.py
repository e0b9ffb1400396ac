"""Random shapes, rules, temperatures and options: every backend against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from softcl import AdaptiveSoftLabels, soft_contrastive_loss
from softcl.testing import (
    GRADIENT_TOLERANCE,
    KINDS,
    LSE_TOLERANCE,
    available_backends,
    fitting,
    gradient_error,
    loss_oracle,
    make_problem,
    random_rules,
    relative_error,
)

RULES = random_rules(60, seed=3)
BACKENDS = available_backends(make_problem(2, 3, 4), AdaptiveSoftLabels(1))


@st.composite
def calls(draw):
    K = draw(st.integers(1, 400))
    return {
        "N": draw(st.integers(1, 40)),
        "K": K,
        "D": draw(st.integers(1, 140)),
        "kind": draw(st.sampled_from(KINDS)),
        "seed": draw(st.integers(0, 1000)),
        "rule": fitting(draw(st.sampled_from(RULES)), K),
        "temperature": draw(st.sampled_from([0.02, 0.05, 0.1, 0.2, 1.0, 5.0])),
        "teacher_temperature": draw(st.sampled_from([0.01, 0.04, 0.1, 1.0])),
        "positive": draw(st.booleans()),
        "normalize": draw(st.booleans()),
        "filled": draw(st.one_of(st.none(), st.integers(max(1, K // 2), K))),
    }


SHARP = {  # few rows, clustered: labels and gradients are small differences of rounded numbers
    **{"N": 29, "K": 11, "D": 127, "kind": "clustered", "seed": 0},
    **{"rule": AdaptiveSoftLabels(4), "temperature": 0.1, "teacher_temperature": 0.1},
    **{"positive": False, "normalize": False, "filled": None},
}


@pytest.mark.parametrize("backend", BACKENDS)
@example(call=SHARP)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(call=calls())
def test_any_call(backend, call):
    p = make_problem(call["N"], call["K"], call["D"], kind=call["kind"], seed=call["seed"])
    rule, filled = call["rule"], call["filled"]
    if filled is not None and rule.num_neighbors > filled:
        filled = None
    options = {
        name: call[name] for name in ("temperature", "teacher_temperature", "positive", "normalize")
    }
    query = p.query.clone().requires_grad_()
    loss = soft_contrastive_loss(
        query, p.key, p.queue, rule, reduction="none", filled=filled, backend=backend, **options
    )
    loss.sum().backward()
    oracle = loss_oracle(type(p)(p.query, p.key, p.queue[:filled]), rule, **options)
    # These are extremes, so the bounds follow the float32 rounding u of one cosine: it moves a
    # teacher logit, hence a label, by u / teacher_temperature, and the loss, a difference of
    # numbers of size 1 / temperature, by that much of their size.
    size = max(1.0, 1.0 / call["temperature"])
    scale = max(1.0, 0.1 / min(call["temperature"], call["teacher_temperature"]))
    assert relative_error(loss / size, oracle[0] / size) <= scale * LSE_TOLERANCE
    error = gradient_error(query.grad, oracle[1], call["temperature"])
    # Clustered rows as in test_sharp_labels: over 720 such calls at temperatures of 0.1, rounding
    # float32 sums left 1e-6 in the median, in rare calls 5e-6 (cpu) and 8e-6 (reference).
    allowed = scale if call["kind"] == "random" else 2.0 * scale
    assert error <= allowed * GRADIENT_TOLERANCE[torch.float32]
