"""Enqueue: write new keys into the ring queue. Normalise, cast, write, refuse, one visit per key.

Key i goes to slot (pointer + i) mod K. A slot takes its keys in order (i, i + K, i + 2 K, ...), so
the outcome is that of enqueuing the keys one by one, also for N > K. A key that holds a NaN or an
infinity, or whose norm is below 1e-12, is refused: its slot keeps the row it held, and the counter
goes up by one.

Tiling: BLOCK_SLOTS slots per program; no two programs write one row. Traffic: every key in once,
every row out once. The counter is an integer, so adding to it atomically is deterministic.
"""

import torch
import triton
import triton.language as tl

from .launch import launch as launch_kernel
from .numerics import NORM_FLOOR, round_like, widen


@triton.jit(do_not_specialize=["N", "K", "pointer"])
def enqueue_kernel(
    keys_ptr,  # (N, D)
    queue_ptr,  # (K, D) out
    refused_ptr,  # () int64, added to
    N,
    K,
    pointer,
    NORMALIZE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.program_id(0) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    d = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = queue_ptr.dtype.element_ty
    row = (pointer + slot) % K
    rows = queue_ptr + row.to(tl.int64)[:, None] * D + d[None, :]
    for start in tl.range(0, N, K):
        i = start + slot
        # The slots of this pass: K of them, fewer in the last one.
        exists = (slot < K) & (i < N)
        mask = exists[:, None] & (d < D)[None, :]
        x = widen(tl.load(keys_ptr + i.to(tl.int64)[:, None] * D + d[None, :], mask, other=0.0))
        if not NORMALIZE:
            x = round_like(x, dtype)
        # The largest element taken out, so that squares neither overflow nor vanish.
        top = tl.max(tl.abs(x), 1)
        unit = tl.where(top > 0.0, top, 1.0)[:, None]
        scaled = tl.div_rn(x, tl.broadcast_to(unit, x.shape))
        norm = tl.sqrt_rn(tl.sum(scaled * scaled, 1))
        # A NaN fails every comparison; an infinity gives a NaN, as infinity over infinity.
        accepted = exists & (top * norm >= NORM_FLOOR) & (norm < float("inf"))
        if NORMALIZE:
            x = tl.div_rn(scaled, tl.broadcast_to(norm[:, None], x.shape))
        tl.store(rows, round_like(x, dtype).to(dtype), mask=mask & accepted[:, None])
        refused = tl.sum((exists & (accepted == 0)).to(tl.int64), 0)
        tl.atomic_add(refused_ptr, refused, mask=refused > 0, sem="relaxed")


# ------------------------------------------------------------------------------------------ launch


def launch(
    keys: torch.Tensor,  # (N, D) contiguous
    queue: torch.Tensor,  # (K, D) contiguous, changed in place
    refused: torch.Tensor,  # () int64, on the same device, added to
    pointer: int,
    normalize: bool,
) -> None:
    """Write the keys from slot ``pointer`` on. Nothing waits for the device."""
    (N, D), K = keys.shape, queue.shape[0]
    if N == 0:
        return
    block_d = max(16, 1 << (D - 1).bit_length())
    block_slots = max(1, min(16, 8192 // block_d))
    launch_kernel(
        enqueue_kernel,
        (-(-min(N, K) // block_slots), 1),
        (keys, queue, refused, N, K, pointer),
        (normalize, block_slots, D, block_d),
        num_warps=4,
    )
