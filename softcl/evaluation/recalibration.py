"""Batch norm of an untrained network, recalibrated: statistics of the data in place of 0 and 1.

Not by `torch.optim.swa_utils.update_bn`, which works in train mode: drop-out would be on, splits
would have to divide the images, and synchronised norms would wait for processes that measure
nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from softcl.data import ImageSet, center_view
from softcl.evaluation.features import PIECE, eval_mode, sampled

_NORMS = nn.modules.batchnorm._BatchNorm  # of any dimension, split and synchronised ones included


@contextlib.contextmanager
def recalibrated(
    encoder: nn.Module, images: ImageSet, size: int, device: torch.device
) -> Iterator[nn.Module]:
    """Context in which the encoder's batch norms have the statistics of the images.

    A new network's running mean and variance are 0 and 1, which belong to no data: in eval mode its
    features then share one large direction, which hides what tells images apart, and any training,
    even against noise, changes the statistics and uncovers it. What a random initialisation is
    worth is therefore measured with the weights as they are and statistics of at most PIECE images,
    drawn by a fixed seed and seen whole. In one forward pass each norm takes the mean and the
    (biased) variance of its own input before it divides by them, as it does in train mode.

    Statistics and modes are restored after it; nothing is exchanged between processes.
    """
    norms = [module for module in encoder.modules() if isinstance(module, _NORMS)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    kept = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    try:
        if norms:
            batch = images.batch(sampled(len(images), PIECE)).to(device)
            _observe(encoder, norms, center_view(batch, size, images.mean, images.std))
        yield encoder
    finally:
        for norm, (mean, variance) in zip(norms, kept, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)


@torch.no_grad()
def _observe(encoder: nn.Module, norms: list[nn.Module], views: Tensor) -> None:
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    try:
        with eval_mode(encoder):  # so that drop-out and stochastic depth do nothing
            encoder.features(views)
    finally:
        for hook in hooks:
            hook.remove()


def _take_statistics(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Of inputs (N, C) or (N, C, ...), for each of the C channels."""
    (values,) = inputs
    axes = [axis for axis in range(values.dim()) if axis != 1]
    variance, mean = torch.var_mean(values.float(), axes, correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
