"""The memory queue of which every process keeps a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from softcl.distributed.shards import ShardedRows, local_count
from softcl.distributed.world import World
from softcl.nn import MemoryQueue
from softcl.nn.arguments import as_int
from softcl.nn.enqueue import refuse_capture
from softcl.nn.queue import Ring, refuse_rows, refuse_state

_PIECE_ROWS = 1 << 16  # of initial rows drawn at a time


class ShardedQueue(Ring):
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
        if not isinstance(world, World):
            raise TypeError(f"world must be a World, got {world!r}")
        size = as_int("size", size)
        if size < world.size:
            raise ValueError(f"size must be at least {world.size}, a row per process, got {size}")
        shard = MemoryQueue(1, dim, dtype=dtype, init=init, seed=seed, device=device)
        self.size, self.dim, self.world = size, shard.dim, world
        shard.rows = shard.rows.new_empty((local_count(size, world), shard.dim))
        # Not a child: its entries in the state_dict would be those of one process.
        self._held = (shard,)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start afresh, as a `MemoryQueue` does; nothing is exchanged."""
        shard = self.shard
        if not shard.rows.is_meta:
            with torch.no_grad():
                shard.rows.copy_(torch.cat(list(self._initial_rows())))
        shard.refused_rows.zero_()
        shard._warned = False
        self.pointer = 0
        self.filled = self.size if shard._starts_full else 0
        self._place_shard()

    def _initial_rows(self) -> Iterator[Tensor]:
        """This process's rows among those that one process would draw, never all at once."""
        generator = torch.Generator().manual_seed(self.shard._seed)
        # PyTorch draws normal numbers by 16, the last 16 apart: pieces of 16 rows, the last of them
        # not short, give the numbers of one large draw.
        for start in range(0, max(self.size // _PIECE_ROWS, 1) * _PIECE_ROWS, _PIECE_ROWS):
            left = self.size - start
            count = left if left < 2 * _PIECE_ROWS else _PIECE_ROWS
            rows = torch.randn(
                count, self.dim, generator=generator, dtype=torch.float32, device="cpu"
            )
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
        return sum(self.world.all_gather_object(self.shard.refused))

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, {self.world}, filled={self.filled}"

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedQueue:
        undrawn = self.shard.rows.is_meta
        self.shard._apply(function)
        if undrawn and not self.shard.rows.is_meta:
            self.reset_parameters()
        return self

    def enqueue(self, keys: Tensor, normalize: bool = True) -> None:
        """Write the keys (n, D) of every process over the oldest rows, as `MemoryQueue` does.

        A key travels to the process that keeps it, and to no other.
        """
        self.shard._check(keys, normalize)
        refuse_capture("ShardedQueue")  # before the others are waited for
        world, count = self.world, keys.shape[0] * self.world.size
        slots = torch.arange(self.pointer, self.pointer + count, device="cpu") % self.size
        owners = slots % world.size
        wanted = [(owners == rank).nonzero().flatten() for rank in range(world.size)]
        self.shard.enqueue(world.distribute(keys, wanted), normalize)
        self.pointer = (self.pointer + count) % self.size
        self.filled = min(self.size, self.filled + count)

    # --------------------------------------------------------------------------------- saving

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
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
        state = [self.pointer, self.filled, refused]
        state = torch.tensor(state, dtype=torch.int64, device="cpu")
        destination[prefix + "_extra_state"] = state
        return destination

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        name = prefix.rstrip(".") or "ShardedQueue"
        names = [prefix + "rows", prefix + "_extra_state"]
        if not all(entry in state_dict for entry in names):
            missing_keys.extend(entry for entry in names if entry not in state_dict)
            return
        rows, state = (state_dict[entry] for entry in names)
        shard, assign = self.shard, local_metadata.get("assign_to_params_buffers", False)
        reason = refuse_rows(rows, (self.size, self.dim)) or refuse_state(state, self.size)
        reason = reason or shard._refuse_assignment(rows, assign)
        if reason is not None:
            error_msgs.append(f"{name}: {reason}")
            return
        mine = rows.detach()[self.world.rank :: self.world.size]
        if assign:
            shard.rows = mine.clone(memory_format=torch.contiguous_format)
        else:
            shard.rows.copy_(mine)
        self.pointer, self.filled, refused = state.tolist()
        self._place_shard()
        shard._set_refused(refused if self.world.is_main_process else 0)
        shard._warned = refused > 0

    def _place_shard(self) -> None:
        """Pointer and fill count of this process's ring, which follow from those of the whole."""
        self.shard.filled = local_count(self.filled, self.world)
        # The next slot that is ours: the slots from 0 to it are the first ones of our ring.
        self.shard.pointer = local_count(self.pointer, self.world) % self.shard.size
