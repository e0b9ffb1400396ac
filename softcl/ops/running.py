"""What the reference keeps of the rows it has seen: a softmax's sums, the largest logits.

Both take the queue in pieces, in order, and hold O(N D) and O(N k), whatever its length. The
running maximum takes the place of a bound on the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scalar_dtype(tensor: Tensor) -> torch.dtype:
    """Of one number per row: float64 where the device has it."""
    return tensor.dtype if tensor.device.type == "mps" else torch.float64


class RunningSoftmax:
    """One softmax reduction over the queue: running maximum, sum, sum of e*x, sum of e*Q."""

    def __init__(self, vectors: Tensor, with_mean: bool) -> None:
        n, d = vectors.shape
        dtype = scalar_dtype(vectors)
        self.maximum = vectors.new_full((n, 1), -torch.inf)
        self.sum = vectors.new_zeros((n, 1), dtype=dtype)
        self.shifted = vectors.new_zeros((n, 1), dtype=dtype)  # sum of e (x - maximum)
        self.rows = vectors.new_zeros((n, d), dtype=dtype) if with_mean else None

    def add(self, logits: Tensor, rows: Tensor) -> None:  # (N, piece), (piece, D)
        maximum = torch.maximum(self.maximum, logits.amax(1, keepdim=True))
        # exp(-inf) at the first piece is 0, so nothing is carried over from the empty state.
        drop = (self.maximum - maximum).to(self.sum.dtype)
        carry = torch.exp(drop)
        drop = torch.where(carry > 0, drop, torch.zeros_like(carry))
        below = logits - maximum
        weights = below.exp()
        self.shifted = carry * (self.shifted + drop * self.sum)
        self.shifted += (weights * below).sum(1, keepdim=True)
        self.sum = carry * self.sum + weights.sum(1, keepdim=True)
        if self.rows is not None:
            self.rows = carry * self.rows + weights @ rows
        self.maximum = maximum

    def lse(self) -> Tensor:
        # In float64: rounded to float32, a value of 10 would move every share taken of it by 5e-7.
        return (self.maximum + self.sum.log()).squeeze(1)

    def entropy(self) -> Tensor:
        # log sum - E[x - max]: both terms are small where lse - E[x] would cancel.
        return (self.sum.log() - self.shifted / self.sum).squeeze(1)

    def mean(self) -> Tensor:
        return self.rows / self.sum


class RunningTopk:
    """The k largest logits of each row and their queue rows, kept over the pieces."""

    def __init__(self, vectors: Tensor, k: int) -> None:
        self.k = k
        self.values = vectors.new_empty((len(vectors), 0))
        self.indices = torch.empty((len(vectors), 0), dtype=torch.int64, device=vectors.device)

    def add(self, logits: Tensor, start: int) -> None:
        if self.k == 0:
            return
        values, local = logits.topk(min(self.k, logits.shape[1]), dim=1)
        values = torch.cat([self.values, values], 1)
        indices = torch.cat([self.indices, local + start], 1)
        self.values, chosen = values.topk(min(self.k, values.shape[1]), dim=1)
        self.indices = indices.gather(1, chosen)

    def result(self) -> tuple[Tensor, Tensor]:
        """Values (N, k) descending, equal ones by lowest index, and indices (N, k)."""
        indices, order = self.indices.sort(dim=1)
        values, by_value = self.values.gather(1, order).sort(dim=1, descending=True, stable=True)
        return values, indices.gather(1, by_value)
