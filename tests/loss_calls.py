"""How tests call a backend's loss, and what they ask of its ranks. Not a test file."""

from __future__ import annotations

import torch

from softcl.testing import Problem


def run_loss(backend, p: Problem, rule, temperature=0.1, teacher_temperature=0.05, **options):
    """The six results of a backend's ``soft_contrastive``, all wanted if nothing is said."""
    options = {
        "positive": True,
        "normalize": False,
        "gradient": True,
        "diagnostics": True,
        **options,
    }
    return backend.soft_contrastive(
        p.query, p.key, p.queue, rule, temperature, teacher_temperature, **options
    )


def fitting(rule, K):
    """The rule, with no more neighbours than the queue has rows."""
    return type(rule)(K) if rule.num_neighbors > K else rule


def name(rule):
    return f"{rule.name}-{rule.num_neighbors}"


def assert_ranks_close(rank, p, excluded=None):
    """Cosines within 1e-6 of the positive's may count either way; excluded rows do not count."""
    cosines = p.query.double() @ p.queue.double().T
    if excluded is not None:
        rows = (excluded >= 0).nonzero().squeeze(1)
        cosines[rows, excluded[rows]] = -torch.inf
    positive = (p.query.double() * p.key.double()).sum(1, keepdim=True)
    assert bool((rank >= (cosines > positive + 1e-6).sum(1)).all())
    assert bool((rank <= (cosines > positive - 1e-6).sum(1)).all())
