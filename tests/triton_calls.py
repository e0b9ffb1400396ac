"""Calls of the Triton backend, and what float64 holds them to. Not a test file."""

from __future__ import annotations

import functools

from loss_calls import check_loss, run_loss

from softcl.ops import triton
from softcl.testing import GRADIENT_TOLERANCE, Problem

run = functools.partial(run_loss, triton)


def check(p, *arguments, **options):
    """See check_loss; the gradient as the query's dtype promises it."""
    tolerance = GRADIENT_TOLERANCE[p.query.dtype]
    return check_loss(triton, p, *arguments, gradient_tolerance=tolerance, **options)


def on(device, p: Problem) -> Problem:
    """The problem on a device."""
    return Problem(p.query.to(device), p.key.to(device), p.queue.to(device))
