"""Loss and gradient of ASCL: every backend that runs here, and the N x K formula in eager PyTorch.

    pytest bench/ --benchmark-only

Each contender is first held to the float64 oracle on the same inputs, then timed.
"""

from __future__ import annotations

import math

import pytest
import torch

from softcl import AdaptiveSoftLabels, soft_contrastive_loss
from softcl.testing import assert_loss_close, available_backends, loss_oracle, make_problem

SHAPES = [(256, 4096, 128), (256, 16384, 128)]  # N, K, D
RULE = AdaptiveSoftLabels(5)
TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.05
CONTENDERS = [*available_backends(make_problem(2, 8, 4), RULE), "eager"]


def eager_loss(query, key, queue):
    """ASCL with every N x K matrix written out, as its authors' formula reads; rows (N,)."""
    with torch.no_grad():
        soft = (key @ queue.T / TEACHER_TEMPERATURE).softmax(1)
        entropy = -(soft * soft.clamp(min=1e-30).log()).sum(1, keepdim=True)
        confidence = 1 - entropy / math.log(len(queue))
        labels = (confidence * RULE.num_neighbors * soft).clamp(max=1.0)
        labels = torch.cat([torch.ones_like(entropy), labels], 1)
        labels /= labels.sum(1, keepdim=True)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / TEMPERATURE
    return -(labels * logits.log_softmax(1)).sum(1)


def loss_rows(contender, query, key, queue):
    if contender == "eager":
        return eager_loss(query, key, queue)
    return soft_contrastive_loss(
        query,
        key,
        queue,
        RULE,
        temperature=TEMPERATURE,
        teacher_temperature=TEACHER_TEMPERATURE,
        reduction="none",
        backend=contender,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("contender", CONTENDERS)
def bench_loss_and_gradient(benchmark, contender, shape):
    problem = make_problem(*shape)
    query = problem.query.requires_grad_()

    def step():
        query.grad = None
        rows = loss_rows(contender, query, problem.key, problem.queue)
        rows.sum().backward()
        return rows

    rows = step()
    oracle = loss_oracle(problem, RULE, diagnostics=False)
    assert_loss_close(rows, query.grad, oracle, torch.float32)
    N, K, D = shape
    benchmark.group = str(shape)
    benchmark.extra_info.update(
        threads=torch.get_num_threads(), torch=torch.__version__, flop=8 * N * K * D
    )
    benchmark.pedantic(step, rounds=7, warmup_rounds=1)
