"""What the CUDA kernels promise for fp32, and for rows and queue of different types, all of which
they take in two fp16 parts. Not a test file.
"""

from __future__ import annotations

import torch

from softcl.labels import HardLabels
from softcl.ops import cuda, reference
from softcl.testing import (
    ENTROPY_TOLERANCE,
    GRADIENT_TOLERANCE,
    LSE_TOLERANCE,
    Problem,
    assert_loss_close,
    assert_neighbors_close,
    gradient_error,
    relative_error,
)

# Types of rows and queue.
MIXES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
]


def parts_tolerance(rule) -> float:
    """Of the gradient: fp32's on the CPU; three times that where labels are clipped.

    ``adaptive_soft`` takes a q_j Q_j - 1 Q_j of a clipped row out of a mu, and what products and
    exponentials have rounded of q_j comes back a = c n times. Measured over MIXES, three kinds of
    problems and D >= 33, with sums cut off as tensor cores do: 4.2e-6, and 1.7e-6 for the other
    rules; with exact sums 1.6e-6 for all.
    """
    scale = 3.0 if rule.name == "adaptive_soft" else 1.0
    return scale * GRADIENT_TOLERANCE[torch.float32]


def assert_parts_close(got, oracle, rule) -> None:
    """Loss and entropy as fp32 promises them, the gradient within parts_tolerance."""
    assert_loss_close(got[0], None, oracle, torch.float32)
    error = gradient_error(got[1], oracle[1], 0.1)
    assert error <= parts_tolerance(rule), f"gradient is off by {error:.2e}"
    if len(got[3]) > 0:
        assert relative_error(got[3], oracle[3]) <= ENTROPY_TOLERANCE
    assert torch.equal(got[5].sort(1).values, oracle[5].sort(1).values)


def raw_and_unit(p: Problem) -> tuple[Problem, Problem]:
    """The problem with rows of other lengths, and with what normalize=True makes of those: unit
    rows rounded to their own type."""
    dtype = p.query.dtype
    raw = (p.query.double() * 7).to(dtype), (p.key.double() / 9).to(dtype)
    unit = (torch.nn.functional.normalize(x.double(), dim=1).float().to(dtype) for x in raw)
    return Problem(*raw, p.queue), Problem(*unit, p.queue)


def assert_statistics_close(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """queue_statistics' five results against float64; the last two of them."""
    lse, mean, entropy, logits, indices = cuda.queue_statistics(p.query, p.queue, 0.1, 5)
    want = reference.queue_statistics(p.query.double(), p.queue.double(), 0.1, 5)
    assert relative_error(lse, want[0]) <= LSE_TOLERANCE
    assert gradient_error(mean, want[1]) <= parts_tolerance(HardLabels())
    assert relative_error(entropy, want[2]) <= ENTROPY_TOLERANCE
    assert_neighbors_close(logits, indices, p.query, p.queue, 0.1)
    return logits, indices
