"""Softmax statistics over parts of a queue, made into those over the whole.

With lse_w, mean_w and H_w of part w, and s_w = exp(lse_w - lse) its share of the softmax,

    lse  = logsumexp_w lse_w
    mean = sum_w s_w mean_w
    H    = sum_w s_w (H_w - log s_w)

which is the addition of the parts' sums, each scaled by the largest lse, so that it holds at any
temperature. The k nearest rows of the whole are among the k nearest of the parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A share of exp(-1e4) is 0 in any dtype, and 0 times this is 0 where 0 times infinity is not.
_NO_SHARE = -1e4


def merge_sums(
    lse: Tensor,  # (W, N)
    mean: Tensor | None,  # (W, N, D)
    entropy: Tensor | None,  # (W, N)
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """lse (N,), mean (N, D) and entropy (N,) of the whole, in float64 where the device has it.

    Differentiable in every part.
    """
    dtype = lse.dtype if lse.device.type == "mps" else torch.float64
    lse = lse.to(dtype)
    whole = lse.logsumexp(0)
    log_share = (lse - whole).clamp(min=_NO_SHARE)
    share = log_share.exp()  # (W, N)
    if mean is not None:
        mean = (share[:, :, None] * mean.to(dtype)).sum(0)
    if entropy is not None:
        entropy = (share * (entropy.to(dtype) - log_share)).sum(0)
    return whole, mean, entropy


def merge_neighbors(logits: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the candidates (N, M), descending, equal ones by lowest index."""
    indices, order = indices.sort(dim=1)
    logits, by_value = logits.gather(1, order).sort(dim=1, descending=True, stable=True)
    return logits[:, :k], indices.gather(1, by_value)[:, :k]
