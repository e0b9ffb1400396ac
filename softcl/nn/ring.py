"""Where a queue writes next, and how much of it is filled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softcl.nn.arguments import as_int


class Ring(nn.Module):
    """Base of the queues: ``pointer`` in [0, size) and ``filled`` in [0, size].

    torch.compile takes an int that a module holds for a constant and compiles anew whenever it has
    changed. So the pointer is a tensor, which ``softcl::enqueue`` reads and moves unseen, and the
    fill count is the length of a tensor without elements: a length may vary from call to call, and
    ``rows[:filled]`` then has it too. Both stay on the CPU, wherever the rows are.
    """

    size: int
    _pointer: Tensor  # () int64
    _fill: Tensor  # (filled, 0)

    def __init__(self) -> None:
        super().__init__()
        self._pointer = torch.zeros((), dtype=torch.int64, device="cpu")
        self._set_filled(0)

    @property
    def pointer(self) -> int:
        """The row that the next key goes to."""
        return int(self._pointer)

    @pointer.setter
    def pointer(self, value: int) -> None:
        value = as_int("pointer", value, least=0)
        if value >= self.size:
            raise ValueError(f"pointer must be below the queue's size {self.size}, got {value}")
        self._pointer.fill_(value)

    @property
    def filled(self) -> int:
        """Number of rows that may take part in a loss."""
        return self._fill.shape[0]

    @filled.setter
    def filled(self, value: int) -> None:
        value = as_int("filled", value, least=0)
        if value > self.size:
            raise ValueError(f"filled must be at most the queue's size {self.size}, got {value}")
        self._set_filled(value)

    def _set_filled(self, value: int) -> None:
        self._fill = torch.empty((value, 0), device="cpu")
