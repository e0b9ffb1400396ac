"""The student's optimiser, and which parameters decay.

A method's lr and weight decay are for the optimiser that they were published with. Under another
one they come from STANDARD, unless given.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import nn

OPTIMIZERS = ("sgd", "lars", "adamw")
_BATCH = 256  # the batch that a rate of STANDARD is for; it grows in proportion


class Standard(NamedTuple):
    rate: float  # for a batch of 256
    weight_decay: float


# MoCo v3's settings, github.com/facebookresearch/moco-v3: LARS for ResNet-50, AdamW for ViT. SGD:
# MoCo's.
STANDARD = {
    "sgd": Standard(0.03, 1e-4),
    "lars": Standard(0.6, 1e-6),
    "adamw": Standard(1.5e-4, 0.1),
}


def standard_settings(optimizer: str, batch_size: int) -> dict[str, float]:
    """lr, scaled to the batch, and weight decay for an optimiser that a method has none for."""
    standard = STANDARD[optimizer]
    return {"lr": standard.rate * batch_size / _BATCH, "weight_decay": standard.weight_decay}


def build_optimizer(
    student: nn.Module,
    optimizer: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    decay_norms: bool,
    layer_decay: float | None = None,
) -> torch.optim.Optimizer:
    """The optimiser of the student's parameters.

    Args:
        optimizer: "sgd", "lars" (timm's: You et al., arXiv 1708.03888) or "adamw" (betas 0.9 and
            0.999).
        momentum: of SGD and LARS.
        decay_norms: whether biases and the weights of norms decay too. LARS adapts the rate of
            exactly those parameters that decay.
        layer_decay: the rate of a backbone's layer over that of the next one. A group has its share
            of the rate as "lr_scale", which whoever sets rates multiplies by.

    Raises:
        ValueError: an unknown optimiser.
    """
    if layer_decay is None:
        groups = parameter_groups(student, weight_decay, decay_norms=decay_norms)
    else:
        groups = layer_groups(student, weight_decay, layer_decay, decay_norms=decay_norms)
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if optimizer == "lars":
        from timm.optim import Lars

        for group in groups:  # timm takes a decay of 0 for "do not adapt"
            group["always_adapt"] = group.pop("decays")
        return Lars(groups, lr=lr, momentum=momentum)
    raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")


def parameter_groups(
    module: nn.Module, weight_decay: float, *, decay_norms: bool
) -> list[dict[str, Any]]:
    """Parameters that decay and, with ``decay_norms`` False, those that do not.

    The latter are vectors and scalars (biases, weights of norms) and what a backbone names in
    ``no_weight_decay()``, such as the position embedding of timm's vision transformers.
    """
    if decay_norms:
        return [{"params": list(module.parameters()), "weight_decay": weight_decay, "decays": True}]
    named = set()
    for prefix, part in module.named_modules():
        if callable(getattr(part, "no_weight_decay", None)):
            named |= {f"{prefix}.{name}".lstrip(".") for name in part.no_weight_decay()}
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay, "decays": True},
        {"params": [], "weight_decay": 0.0, "decays": False},
    ]
    for name, parameter in module.named_parameters():
        groups[parameter.ndim <= 1 or name in named]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def layer_groups(
    module: nn.Module, weight_decay: float, layer_decay: float, *, decay_norms: bool
) -> list[dict[str, Any]]:
    """`parameter_groups`, with those of the backbone divided by layers, as timm divides them.

    A layer's rate is layer_decay ** (layers above it in the backbone); all else has the full one.
    """
    from timm.optim import param_groups_layer_decay

    backbone = module.student.backbone
    spared = set() if decay_norms else getattr(backbone, "no_weight_decay", set)()
    # A decay of 1 tells those that decay from the others, whatever the real one is.
    groups = param_groups_layer_decay(
        backbone,
        weight_decay=1.0,
        no_weight_decay_list=spared,
        weight_decay_exclude_1d=not decay_norms,
        layer_decay=layer_decay,
    )
    for group in groups:
        group["decays"] = group["weight_decay"] > 0
        group["weight_decay"] = weight_decay * group["decays"]
    rest = nn.ModuleList(
        [part for name, part in module.student.named_children() if name != "backbone"]
    )
    rest.extend(part for name, part in module.named_children() if name != "student")
    return groups + parameter_groups(rest, weight_decay, decay_norms=decay_norms)


def freeze_parts(backbone: nn.Module, parts: str) -> None:
    """Train these parts of a backbone no more: no gradients, and norms keep their statistics.

    Args:
        parts: names of modules or parameters, and "stem" for what timm counts as such; with commas.

    Raises:
        ValueError: the backbone has no such part.
    """
    names = [name for name, _ in backbone.named_parameters()]
    frozen: set[str] = set()
    for part in filter(None, (word.strip() for word in parts.split(","))):
        found = [name for name in names if _is_of(name, part, backbone)]
        if not found:
            known = ", ".join(dict.fromkeys(["stem", *(n.partition(".")[0] for n in names)]))
            raise ValueError(f"the backbone has no part {part!r}; it has {known}")
        frozen.update(found)
    for name in frozen:
        backbone.get_parameter(name).requires_grad_(False)
    for prefix, module in backbone.named_modules():
        own = {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
        if own and own <= frozen:
            module.eval()


def _is_of(name: str, part: str, backbone: nn.Module) -> bool:
    """Whether a parameter belongs to a part."""
    if part != "stem" or not hasattr(backbone, "group_matcher"):
        return f"{name}.".startswith(f"{part}.")
    stem = backbone.group_matcher(coarse=True)["stem"]
    patterns = [stem] if isinstance(stem, str) else [pattern for pattern, *_ in stem]
    return any(re.match(pattern, name) for pattern in patterns)
