"""Tensors between the host and a device, without a host that waits.

A copy from or to pageable memory keeps the host until it is done, so that the device runs dry.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """x in memory that a copy to ``device`` can be started from; itself where no copy will be."""
    return x if x.device.type != "cpu" or device.type == "cpu" else x.pin_memory()


def moved(x: Tensor, device: torch.device) -> Tensor:
    """x on a device."""
    return pinned(x, device).to(device, non_blocking=True)


def copy_to_host(x: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy under way from a GPU to the host, and the event after which it is there."""
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    copy.copy_(x, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record()
    return copy, arrival
