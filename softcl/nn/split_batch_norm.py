"""Batch norm over splits of the batch, as if each split ran on a device of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from softcl.nn.arguments import as_int


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose batch statistics are taken over ``num_splits`` interleaved parts of the
    batch.

    In train mode image i belongs to split i % num_splits, and each split is normalised by its own
    mean and variance. Running statistics move towards the mean of the splits' means and (unbiased)
    variances. In eval mode, and with num_splits = 1, it is nn.BatchNorm2d. Parameters, buffers and
    state_dict keys are those of nn.BatchNorm2d.

    MoCo trains on 8 devices without synchronised batch norm and shuffles the teacher's batch, so
    that two views of an image see different statistics; on one device this module stands in for
    that. The interleaved split is a view for contiguous input: (N, C, H, W) -> (N/splits, splits C,
    H, W). channels_last input is copied there and back, and comes out as channels_last.

    Raises:
        TypeError: num_splits is no int.
        ValueError: num_splits < 1, or in train mode N is no multiple of num_splits.
    """

    def __init__(self, num_features: int, num_splits: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.num_splits = as_int("num_splits", num_splits, least=1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_splits={self.num_splits}"

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # (N, C, H, W)
        if not self.training or self.num_splits == 1:
            return super().forward(images)
        self._check_input_dim(images)
        splits = self.num_splits
        N, C, H, W = images.shape
        if N % splits:
            raise ValueError(f"the batch size must be a multiple of num_splits={splits}, got N={N}")
        mean = var = None
        factor = 0.0 if self.momentum is None else self.momentum
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                factor = 1.0 / float(self.num_batches_tracked)
            mean, var = self.running_mean.repeat(splits), self.running_var.repeat(splits)
        weight = None if self.weight is None else self.weight.repeat(splits)
        bias = None if self.bias is None else self.bias.repeat(splits)
        grouped = images.contiguous().view(N // splits, splits * C, H, W)
        output = F.batch_norm(grouped, mean, var, weight, bias, True, factor, self.eps)
        if mean is not None:
            # Every split started from the same running value, so the mean of the updated values is
            # the update by the mean.
            self.running_mean.copy_(mean.view(splits, C).mean(0))
            self.running_var.copy_(var.view(splits, C).mean(0))
        # Not a view to autograd: a ReLU in place on a view would copy its gradient twice.
        output = torch.ops.aten._unsafe_view(output, (N, C, H, W))
        if not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last):
            output = output.contiguous(memory_format=torch.channels_last)
        return output


class SplitBatchNormAct2d(SplitBatchNorm2d):
    """SplitBatchNorm2d followed by timm's ``drop`` and ``act`` layers (its BatchNormAct2d)."""

    def __init__(
        self, num_features: int, num_splits: int, drop: nn.Module, act: nn.Module, **options: Any
    ) -> None:
        super().__init__(num_features, num_splits, **options)
        self.drop = drop
        self.act = act

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(images)))


def convert_split_batch_norm(module: nn.Module, num_splits: int) -> nn.Module:
    """Replace every 2-D batch norm inside ``module`` by one over ``num_splits`` splits; return it.

    Parameters and buffers are the same tensors as before, so weights are kept, state_dict keys do
    not change and an optimizer made earlier stays valid. nn.BatchNorm2d, timm's BatchNormAct2d and
    split batch norms are handled. A module without 2-D batch norm comes back unchanged.

    Raises:
        ValueError: num_splits < 1.
        TypeError: num_splits is no int; or a module inside is a subclass of nn.BatchNorm2d that is
            not known, or nn.SyncBatchNorm. Nothing is replaced then.
    """
    num_splits = as_int("num_splits", num_splits, least=1)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a module, got {module!r}")
    norms = [x for x in module.modules() if isinstance(x, nn.BatchNorm2d | nn.SyncBatchNorm)]
    for norm in norms:
        _check_kind(norm)
    converted = {norm: _convert_one(norm, num_splits) for norm in norms}
    for parent in list(module.modules()):
        # Not named_children(), which leaves out a module that stands in a second place.
        for name, child in list(parent._modules.items()):
            if child in converted:
                setattr(parent, name, converted[child])
    return converted.get(module, module)


def _is_timms(norm: nn.Module) -> bool:
    kind = type(norm)
    return kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.")


def _check_kind(norm: nn.Module) -> None:
    kind = type(norm)
    if not (kind is nn.BatchNorm2d or isinstance(norm, SplitBatchNorm2d) or _is_timms(norm)):
        raise TypeError(
            f"cannot convert {kind.__module__}.{kind.__name__} to split batch norm; "
            "only nn.BatchNorm2d and timm's BatchNormAct2d are supported"
        )


def _convert_one(norm: nn.BatchNorm2d, num_splits: int) -> nn.Module:
    if isinstance(norm, SplitBatchNorm2d):
        norm.num_splits = num_splits
        return norm
    options = {
        "eps": norm.eps,
        "momentum": norm.momentum,
        "affine": norm.affine,
        "track_running_stats": norm.track_running_stats,
        "device": "meta",  # no memory: the tensors are replaced below
    }
    if _is_timms(norm):
        split = SplitBatchNormAct2d(norm.num_features, num_splits, norm.drop, norm.act, **options)
    else:
        split = SplitBatchNorm2d(norm.num_features, num_splits, **options)
    for name in [*split._parameters, *split._buffers]:  # None where the norm has none
        setattr(split, name, getattr(norm, name))
    return split.train(norm.training)
