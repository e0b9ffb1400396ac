"""Exponentials per second of a GPU: a Triton kernel that does nothing else for long.

A program loads BLOCK numbers and adds up REPEATS x UNROLL exponentials of each,

    sum_i 2^(x - i / 64)

none of which waits for another. An exponential costs an addition before it and one after it, as in
the loss; a multiprocessor does 128 additions but 16 exponentials a clock, so the exponentials bind
(tests/test_bench_tools.py counts the instructions). Nothing is read or written in the loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, UNROLL, NUM_WARPS = 1024, 16, 4
REPEATS = 256
STEP = tl.constexpr(1.0 / 64.0)


@triton.jit
def exponentials_kernel(
    x_ptr,  # (programs x BLOCK,)
    sums_ptr,  # the same
    repeats,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(repeats):
        for i in tl.static_range(UNROLL):
            total += tl.exp2(x - i * STEP)
        x -= UNROLL * STEP
    tl.store(sums_ptr + places, total)


def add_exponentials(x: Tensor, repeats: int) -> Tensor:
    """sum_i 2^(x - i / 64) for i < repeats x UNROLL, of float32 x whose size BLOCK divides."""
    sums = torch.empty_like(x)
    grid = (x.numel() // BLOCK,)
    exponentials_kernel[grid](x, sums, repeats, BLOCK, UNROLL, num_warps=NUM_WARPS)
    return sums


def machine_code(target: str) -> str:
    """The kernel's assembly for "sm_90" or another of NVIDIA's architectures, without a GPU."""
    from triton.compiler import ASTSource

    from softcl.kernels.aot import TARGETS, cuobjdump

    types = {"x_ptr": "*fp32", "sums_ptr": "*fp32", "repeats": "i32"}
    types |= dict.fromkeys(("BLOCK", "UNROLL"), "constexpr")
    constants = {"BLOCK": BLOCK, "UNROLL": UNROLL}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(2)}
    made = ASTSource(exponentials_kernel, types, constants, aligned)
    compiled = triton.compile(made, target=TARGETS[target], options={"num_warps": NUM_WARPS})
    return cuobjdump(compiled.asm["cubin"], "-sass")
