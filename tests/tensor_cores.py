"""Products in Triton's interpreter as tensor cores make them. Not a test file.

Tensor cores add eight exact products to the sum so far with the sums' last bits cut off, not
rounded: each number is aligned to the largest of them, and what lies below one bit under its last
place is gone; so is, then, what does not fit in fp32. As measurements of the hardware have found,
and as tests/native/cuda/emulated_ptx.h has it. The interpreter rounds, which hides what that costs.
"""

from __future__ import annotations

import numpy as np

TOGETHER = 8
KEPT = np.uint64(0xFFFF_FFFF_E000_0000)  # a float64's bits that fp32 has room for


def add_products(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``c + a b`` of 16-bit numbers a (M, B), b (B, N) and c (M, N), all held in fp32."""
    if not all(np.isfinite(x).all() for x in (a, b, c)):
        return a @ b + c
    for k in range(0, a.shape[1], TOGETHER):
        products = a[:, k : k + TOGETHER, None] * b[None, k : k + TOGETHER]
        largest = np.maximum(np.abs(products).max(1), np.abs(c))
        exponent = np.frexp(largest)[1] - 25
        # Below 2^-87 sums are as they are: no power of two stands for their last place.
        shift = np.ldexp(np.float32(1.0), np.minimum(-exponent, 112)).astype(np.float32)
        total = np.trunc(c * shift).astype(np.int32)
        total += (products * shift[:, None]).astype(np.int32).sum(1, dtype=np.int32)
        kept = (total.astype(np.float64).view(np.uint64) & KEPT).view(np.float64)
        c = (kept / shift).astype(np.float32)
    return c


def cut_off_sums(monkeypatch) -> None:
    """Every product of the interpreter's from here on."""
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (x.data.astype(np.float32) for x in (a, b))
        return interpreter.TensorHandle(add_products(a, b, d.data), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
