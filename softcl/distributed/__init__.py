"""Many processes on PyTorch's own engine: ``torchrun`` and ``torch.distributed``.

    World            the processes of a run: who they are, and what they send each other
    ShardedRows      a set of rows of which every process holds a part, as the operator takes it
    ShardedQueue     the memory queue, sharded

Everywhere, element i of what W processes hold together (row i of a batch, of a queue) is element
i // W of process i % W. Stacked views, parts of an accumulated batch, split batch norm and a queue
that is still filling are then divided evenly with no further rule, and what W processes compute is
what one process computes, for any W.

A single process never initialises ``torch.distributed``: its world is ``ALONE``, in which every
exchange gives back what it got.
"""

from softcl.distributed import operator as _operator  # noqa: F401  (registers with softcl.ops)
from softcl.distributed.queue import ShardedQueue
from softcl.distributed.shards import ShardedRows
from softcl.distributed.world import ALONE, PeerError, World

__all__ = ["ALONE", "PeerError", "ShardedQueue", "ShardedRows", "World"]
