"""What the CUDA kernels promise where rows or queue are fp32, which they take in two parts, and for
bf16 and fp16 mixed. Not a test file.
"""

from __future__ import annotations

import functools

import torch
from loss_calls import check_loss, run_loss, run_statistics

from softcl.ops import cuda
from softcl.testing import GRADIENT_TOLERANCE

# Types of rows and queue.
MIXES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float16),
]


def tolerance_of(p, rule) -> float:
    """Of the gradient: that of 16 bits where there is no fp32; else fp32's on the CPU, three times
    that where labels are clipped.

    A clipped row takes q_j Q_j - 1 Q_j out of a mu, and what products and exponentials have rounded
    of q_j comes back a times. Measured over MIXES, three kinds of problems and D >= 33, with sums
    cut off as tensor cores do: 4.2e-6, and 1.7e-6 for the other rules; with exact sums 1.6e-6 for
    all.
    """
    if torch.float32 not in (p.query.dtype, p.queue.dtype):
        return GRADIENT_TOLERANCE[p.query.dtype]
    return (3.0 if rule.clip else 1.0) * GRADIENT_TOLERANCE[torch.float32]


def check(p, rule, *temperatures, **options):
    """One call of the CUDA loss against the oracle: see check_loss."""
    tolerance = tolerance_of(p, rule)
    return check_loss(cuda, p, rule, *temperatures, gradient_tolerance=tolerance, **options)


run = functools.partial(run_loss, cuda)
statistics = functools.partial(run_statistics, cuda)
