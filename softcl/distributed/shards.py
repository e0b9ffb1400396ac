"""Rows that no process holds all of."""

from __future__ import annotations

import torch
from torch import Tensor

from softcl.distributed.world import World


class ShardedRows:
    """K rows of dimension D, of which row j is row j // W of process j % W.

    ``softcl.queue_statistics``, ``softcl.soft_contrastive_loss`` and ``softcl.label_mean`` take it
    where they take a queue (K, D); every process calls them with its own vectors. It is indexed as
    a tensor is: ``rows[:k]`` for its first k, ``rows[indices]`` for the rows themselves.

    Args:
        local: the rows of this process, (K_local, D).
        world: the processes.
        size: K; each process then has ceil((K - rank) / W) rows. None where all have as many.

    Raises:
        ValueError: size and the number of local rows do not agree, or a process has no row.
    """

    def __init__(self, local: Tensor, world: World, size: int | None = None) -> None:
        size = len(local) * world.size if size is None else size
        if size < world.size:
            raise ValueError(
                f"sharded rows must be at least one for each of {world.size} processes, got {size}"
            )
        expected = local_count(size, world)
        if len(local) != expected:
            raise ValueError(
                f"local must have {expected} of {size} rows in {world}, got {tuple(local.shape)}"
            )
        self.local, self.world, self.size = local, world, size

    @property
    def shape(self) -> torch.Size:
        """(K, D) of all the rows."""
        return torch.Size((self.size, self.local.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        return self.local.device

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"ShardedRows({tuple(self.shape)}, {self.dtype}, {self.world})"

    def __getitem__(self, places: slice | Tensor) -> ShardedRows | Tensor:
        """The first rows (a slice from 0 on), still sharded; or rows by index, (..., D)."""
        if isinstance(places, slice):
            start, stop, step = places.indices(self.size)
            if start != 0 or step != 1:
                raise ValueError(f"sharded rows can be cut at their end alone, got {places}")
            return ShardedRows(self.local[: local_count(stop, self.world)], self.world, stop)
        return self._fetch(places)

    @torch.no_grad()
    def _fetch(self, indices: Tensor) -> Tensor:
        """Rows (..., D) of ``indices`` (...), which differ from process to process."""
        wanted = self.world.all_gather(indices.flatten())  # (W, n)
        rows, owned = self._owned(wanted)
        found = self.world.exchange(rows * owned[:, :, None])  # all but one of W are zero
        return found.sum(0, dtype=self.dtype).view(*indices.shape, -1)

    @torch.no_grad()
    def weighted_sum(self, indices: Tensor, weights: Tensor) -> Tensor:
        """sum_k weights_nk row_(indices_nk), (n, D), of indices and weights (n, k) of one's own.

        Added where the rows are: W times D numbers arrive per row, and not k times D.
        """
        wanted, scales = self.world.all_gather(indices), self.world.all_gather(weights)  # (W, n, k)
        rows, owned = self._owned(wanted)
        part = torch.einsum("wnk,wnkd->wnd", scales * owned, rows.to(weights.dtype))
        return self.world.exchange(part).sum(0)

    def _owned(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Local rows (..., D) for indices (...), and which of them are meant."""
        owned = indices % self.world.size == self.world.rank
        places = torch.where(owned, indices // self.world.size, torch.zeros_like(indices))
        return self.local[places], owned


def local_count(size: int, world: World) -> int:
    """How many of ``size`` elements this process holds."""
    return (size - world.rank + world.size - 1) // world.size
