"""The memory queue of which every process keeps a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from softcl.distributed.shards import ShardedRows, local_count
from softcl.distributed.world import World
from softcl.nn import MemoryQueue

_PIECE_ROWS = 1 << 16  # of initial rows drawn at a time


class ShardedQueue(nn.Module):
    """A `MemoryQueue` of K rows whose row j is row j // W of process j % W.

    It is called as a `MemoryQueue` is, by all processes together, and holds what that would hold:
    the same initial rows, and after each ``enqueue`` the keys of all processes in the batch's order
    (key i of the batch is key i // W of process i % W). Every process keeps ceil(K / W) rows at
    most.

    ``state_dict`` has the form of a `MemoryQueue`'s: the first process gets all the rows, on the
    CPU, the others none. Any number of processes, and a `MemoryQueue`, can load it. Saving,
    loading and reading ``refused`` exchange data: all processes do it together.

    Args:
        size, dim, dtype, init, seed, device: as of `MemoryQueue`; size at least W.
        world: the processes.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        world: World,
        *,
        dtype: torch.dtype = torch.float32,
        init: str = "random",
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if size < world.size:
            raise ValueError(f"size must be at least {world.size}, a row per process, got {size}")
        self.size, self.dim, self.world = size, dim, world
        self._seed = seed
        shard = MemoryQueue(1, dim, dtype=dtype, init=init, seed=seed, device=device)
        rows = torch.cat([piece for piece in self._initial_rows()])
        shard.rows = rows.to(device=device, dtype=dtype)
        # Not a child: its entries in the state_dict would be those of one process.
        self._held = (shard,)
        self.pointer = 0
        self.filled = size if init == "random" else 0
        shard.filled = local_count(self.filled, world)

    def _initial_rows(self) -> Iterator[Tensor]:
        """This process's rows among those that one process would draw, never all at once."""
        generator = torch.Generator().manual_seed(self._seed)
        # PyTorch draws normal numbers by 16, the last 16 apart: pieces of 16 rows, the last of them
        # not short, give the numbers of one large draw.
        for start in range(0, max(self.size // _PIECE_ROWS, 1) * _PIECE_ROWS, _PIECE_ROWS):
            left = self.size - start
            count = left if left < 2 * _PIECE_ROWS else _PIECE_ROWS
            rows = torch.randn(count, self.dim, generator=generator)
            rows /= rows.norm(dim=1, keepdim=True)
            yield rows[(self.world.rank - start) % self.world.size :: self.world.size].clone()

    @property
    def shard(self) -> MemoryQueue:
        """What this process keeps."""
        return self._held[0]

    @property
    def rows(self) -> ShardedRows:
        """All the rows (K, D), for the operator."""
        return ShardedRows(self.shard.rows, self.world, self.size)

    @property
    def refused(self) -> int:
        """Number of keys refused so far, in all processes together."""
        return sum(self.world.all_of(self.shard.refused))

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, {self.world}, filled={self.filled}"

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedQueue:
        self.shard._apply(function)
        return self

    def enqueue(self, keys: Tensor, normalize: bool = True) -> None:
        """Write the keys (n, D) of every process over the oldest rows, as `MemoryQueue` does.

        A key travels to the process that keeps it, and to no other.
        """
        self.shard._check(keys)
        world, count = self.world, keys.shape[0] * self.world.size
        owners = (torch.arange(self.pointer, self.pointer + count) % self.size) % world.size
        wanted = [(owners == rank).nonzero().flatten() for rank in range(world.size)]
        self.shard.enqueue(world.distribute(keys, wanted), normalize)
        self.pointer = (self.pointer + count) % self.size
        self.filled = min(self.size, self.filled + count)

    # --------------------------------------------------------------------------------- saving

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        destination = {} if destination is None else destination
        refused = self.refused
        # Of one length everywhere, so that one exchange collects them.
        mine = self.shard.rows.detach().cpu()
        longest = -(-self.size // self.world.size)
        padded = torch.cat([mine, mine.new_zeros(longest - len(mine), self.dim)])
        parts = self.world.collect(padded)
        rows = mine.new_empty((0, self.dim))
        if parts is not None:
            rows = torch.stack(parts, 1).flatten(0, 1)[: self.size]
        destination[prefix + "rows"] = rows
        state = torch.tensor([self.pointer, self.filled, refused], dtype=torch.int64)
        destination[prefix + "_extra_state"] = state
        return destination

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        name = prefix.rstrip(".") or "ShardedQueue"
        rows, state = state_dict.get(prefix + "rows"), state_dict.get(prefix + "_extra_state")
        if rows is None or state is None:
            names = (prefix + entry for entry in ("rows", "_extra_state"))
            missing_keys.extend(entry for entry in names if entry not in state_dict)
            return
        if tuple(rows.shape) != (self.size, self.dim):
            saved, here = tuple(rows.shape), (self.size, self.dim)
            error_msgs.append(
                f"{name}: the saved queue has shape (size, dim) = {saved}, not {here}"
            )
            return
        mine, (pointer, filled, refused) = rows[self.world.rank :: self.world.size], state.tolist()
        if not mine.isfinite().all():
            error_msgs.append(f"{name}: the saved queue has non-finite rows")
            return
        if not (0 <= pointer < self.size and 0 <= filled <= self.size and refused >= 0):
            error_msgs.append(f"{name}: the saved [pointer, filled, refused] is out of range")
            return
        self.pointer, self.filled = pointer, filled
        self.shard.rows.copy_(mine)
        self._place_shard()
        self.shard.refused_rows.fill_(refused if self.world.is_first else 0)
        self.shard._warned = refused > 0

    def _place_shard(self) -> None:
        """Pointer and fill count of this process's ring, which follow from those of the whole."""
        self.shard.filled = local_count(self.filled, self.world)
        # The next slot that is ours: the slots from 0 to it are the first ones of our ring.
        self.shard.pointer = local_count(self.pointer, self.world) % self.shard.size
