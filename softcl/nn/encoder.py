"""Projector, and the encoder made of a backbone and a projector."""

from __future__ import annotations

import torch
from torch import nn


class Projector(nn.Sequential):
    """Linear(in_dim, hidden_dim), ReLU, Linear(hidden_dim, out_dim); no batch norm.

    The head of MoCo v2 and ASCL (arXiv 2207.11163, released code). Its output is not normalised:
    the operator does that with ``normalize=True``.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        for name, value in (("in_dim", in_dim), ("hidden_dim", hidden_dim), ("out_dim", out_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        super().__init__(
            nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim)
        )


class Encoder(nn.Module):
    """projector(backbone(images)): (N, 3, H, W) -> (N, D), not normalised.

    ``features`` gives the backbone's output (N, F), which is what evaluation reads.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.projector(self.backbone(images))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, F), before the projector."""
        return self.backbone(images)
