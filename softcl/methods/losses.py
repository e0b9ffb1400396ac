"""Methods as loss modules, to be used inside any training loop."""

from __future__ import annotations

import torch
from torch import nn

from softcl.methods.ascl import ASCL
from softcl.nn import MemoryQueue
from softcl.ops import soft_contrastive_loss


class ASCLLoss(nn.Module):
    """ASCL's loss, as ``softcl.methods.ascl`` defines it, on raw projections.

    It owns its numbers and, if one is given, refers to a queue. It never writes to the queue:
    enqueue the keys yourself, after the loss.

        queue = MemoryQueue(4096, 128)
        criterion = ASCLLoss(num_neighbors=5)
        loss = criterion(query, key, queue)      # query, key: (N, D)
        loss.backward()
        queue.enqueue(key)

    Args:
        labels, num_neighbors, temperature, teacher_temperature, positive: as in ``ASCL``.
        reduction: "mean", "sum" or "none".
        normalize: divide query and key by their norms first; False if they are unit rows already.
        backend: of ``softcl.soft_contrastive_loss``.
        queue: used when forward gets none.
    """

    def __init__(
        self,
        labels: str = "soft",
        num_neighbors: int = 1,
        temperature: float = 0.1,
        teacher_temperature: float = 0.05,
        *,
        positive: bool = True,
        reduction: str = "mean",
        normalize: bool = True,
        backend: str = "auto",
        queue: MemoryQueue | None = None,
    ) -> None:
        super().__init__()
        method = ASCL(
            labels=labels,
            num_neighbors=num_neighbors,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            positive=positive,
            queue_size=max(num_neighbors, 1),  # the real one is known in forward
        )
        self.rule = method.rule()
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.positive = positive
        self.reduction = reduction
        self.normalize = normalize
        self.backend = backend
        self.queue = queue

    def extra_repr(self) -> str:
        return (
            f"rule={self.rule}, temperature={self.temperature}, "
            f"teacher_temperature={self.teacher_temperature}, positive={self.positive}"
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        queue: MemoryQueue | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of query (N, D) with key (N, D) against the queue; gradient to query alone.

        Args:
            queue: a MemoryQueue (its filled rows take part) or a tensor (K, D) of unit rows; None
                takes the module's own.

        Raises:
            ValueError: no queue was given here or to the constructor, or an empty one.
        """
        queue = self.queue if queue is None else queue
        if queue is None:
            raise ValueError("queue is missing: give one to forward or to the constructor")
        rows, filled = queue, None
        if isinstance(queue, MemoryQueue):
            rows, filled = queue.rows, queue.filled
            if filled == 0:
                raise ValueError(
                    "queue is empty: enqueue keys first, or make it with init='random'"
                )
        return soft_contrastive_loss(
            query,
            key.detach(),
            rows,
            self.rule,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            positive=self.positive,
            reduction=self.reduction,
            normalize=self.normalize,
            filled=filled,
            backend=self.backend,
        )
