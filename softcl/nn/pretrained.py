"""A backbone of ours with weights that other programs wrote (softcl.nn.weights).

The keys are timm's (torchvision's are the same for ResNets) behind a prefix, which differs from
program to program: ``module.encoder_q.`` in MoCo's files, ``teacher`` and ``backbone.`` in DINO's,
``backbone.`` in solo-learn's. So the prefix is found, not listed: it is the one behind which most
of the backbone's keys stand. Lightly numbers the parts of a ResNet (``backbone.0.weight`` is
conv1's); those names are tried too.

What a backbone for small images has in another size is fitted: the centre of a 7x7 stem, and
patches and positions of vision transformers by timm's own functions. Every key that was not used or
not found is reported; weights of another architecture are refused.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softcl.nn.backbones import ALIASES, OWN_RESNETS, TINY_IMAGE, build_backbone
from softcl.nn.weights import Tensors, Triple, Weights, WeightsError, first_line, named

DEFAULT_SIZE = 224
# Of networks in one file that have the same keys, the ones that their authors evaluate.
PREFERRED = ("teacher", "ema")
AVOIDED = ("momentum", "encoder_k", "student", "target")
# What `likely_arch` tries, besides our own.
KNOWN_ARCHS = """
    resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2 resnext50_32x4d
    vit_tiny_patch16_224 vit_small_patch16_224 vit_small_patch8_224 vit_base_patch16_224
    vit_base_patch8_224 vit_large_patch16_224 vit_small_patch14_dinov2 vit_base_patch14_dinov2
    vit_large_patch14_dinov2 convnext_tiny convnext_small convnext_base
    swin_tiny_patch4_window7_224 efficientnet_b0 mobilenetv3_large_100
""".split()
_RESIZED = ("patch_embed.proj.weight", "pos_embed")  # by timm, for another size


@dataclass(frozen=True)
class Pretrained:
    """A backbone with weights from elsewhere, and how they fitted.

    Attributes:
        backbone: images (N, 3, image_size, image_size), normalised with mean and std -> (N, F); it
            has `num_features` and `stem_rule`.
        used: how many of the backbone's keys were found.
        unused: keys of the file without a place in the backbone.
        missing: keys of the backbone that the file lacks; they keep their random start.
        changed: what was fitted to the image size, in words.
    """

    spec: str
    backbone: nn.Module
    arch: str
    image_size: int
    mean: Triple
    std: Triple
    normalisation: str
    used: int
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    changed: tuple[str, ...]

    def describe(self) -> Iterator[str]:
        """Lines for a log."""
        yield f"{self.spec}: {self.used} keys used; {self.normalisation}"
        if self.unused:
            yield f"not used   {len(self.unused)}: {named(self.unused)}"
        if self.missing:
            yield f"not found  {len(self.missing)}, at their random start: {named(self.missing)}"
        yield from self.changed


@dataclass(frozen=True)
class _Match:
    """Where the keys of a backbone stand in a file.

    Attributes:
        count: keys of the backbone that were found.
        tensors: what stands behind the prefix, by its name there.
        others: keys of the same dictionary that stand elsewhere.
    """

    count: int
    tensors: Tensors
    others: tuple[str, ...]


def fit_backbone(
    weights: Weights, image_size: int | None = None, arch: str | None = None
) -> Pretrained:
    """Build the backbone that the weights are of, for this image size, and put them in.

    Args:
        image_size: None for the weights' own, or 224.
        arch: None for the one that the weights name, or that their keys and shapes fit.

    Raises:
        WeightsError: they do not fit; the line has the first foreign keys and the likely name.
        ValueError: the backbone is unknown or cannot take images of this size.
    """
    arch = arch or weights.arch or likely_arch(weights)
    size = image_size or weights.image_size or DEFAULT_SIZE
    if arch is None:
        first = named(tuple(next(iter(weights.holders.values()))))
        raise WeightsError(f"{weights.spec}: of no known architecture (keys {first}); name --arch")
    backbone = build_backbone(arch, size)
    expected = backbone.state_dict()
    match = find_keys(weights, expected, list(dict(backbone.named_children())))
    found = _converted(weights, match.tensors, backbone, arch)
    changed = _fit_stem(weights, found, expected, size)
    changed += [
        f"{key} resampled from {_times(match.tensors[key])} to {_times(expected[key])}"
        for key in _RESIZED
        if key in found and key in expected and match.tensors[key].shape != expected[key].shape
    ]
    used = {key: value for key, value in found.items() if key in expected}
    _check_fit(weights, arch, found, expected)
    backbone.load_state_dict(used, strict=False)
    return Pretrained(
        weights.spec,
        backbone,
        arch,
        size,
        weights.mean,
        weights.std,
        weights.normalisation,
        used=len(used),
        unused=(*(key for key in found if key not in expected), *match.others),
        missing=tuple(key for key in expected if key not in used),
        changed=tuple(changed),
    )


def find_keys(weights: Weights, expected: Mapping[str, Any], children: list[str]) -> _Match:
    """The dictionary and the prefix behind which most of a backbone's keys stand.

    Args:
        expected: the backbone's keys.
        children: names of its parts in their order, for files that number them.
    """
    numbers = {name: str(place) for place, name in enumerate(children)}
    numbered = {}
    for key in expected:
        part, _, rest = key.partition(".")
        numbered[f"{numbers[part]}.{rest}" if part in numbers else key] = key
    best, rank = _Match(0, {}, ()), (0, -99, 0)
    for names in ({key: key for key in expected}, numbered):
        for holder, tensors in weights.holders.items():
            for prefix, count in _prefixes(tensors, names).items():
                place = (count, _preference(holder + prefix), -len(holder + prefix))
                if place > rank:
                    best, rank = _behind(holder, prefix, tensors, names, count), place
    return best


def _prefixes(tensors: Tensors, names: Mapping[str, str]) -> Counter[str]:
    """How many of the names stand behind each prefix of the keys."""
    counts: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in names:
                counts["".join(f"{part}." for part in parts[:cut])] += 1
    return counts


def _preference(place: str) -> int:
    liked = any(word in place for word in PREFERRED)
    return liked - any(word in place for word in AVOIDED)


def _behind(
    holder: str, prefix: str, tensors: Tensors, names: Mapping[str, str], count: int
) -> _Match:
    behind, others = {}, []
    for key, value in tensors.items():
        if key.startswith(prefix):
            rest = key.removeprefix(prefix)
            behind[names.get(rest, rest)] = value
        else:
            others.append(holder + key)
    return _Match(count, behind, tuple(others))


def _converted(weights: Weights, tensors: Tensors, backbone: nn.Module, arch: str) -> Tensors:
    """With what timm itself changes in the weights of this kind of network."""
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is None or not tensors:
        return dict(tensors)
    try:
        return dict(convert(dict(tensors), backbone))
    except Exception as error:  # of foreign shapes, in whatever way they do not fit
        raise _refusal(weights, arch, (first_line(error),)) from error


def _fit_stem(
    weights: Weights, found: Tensors, expected: Mapping[str, Tensor], size: int
) -> list[str]:
    """Cut the centre out of a first convolution that is larger than the backbone's, in place.

    Raises:
        WeightsError: it is smaller.
    """
    key = "conv1.weight"
    if key not in found or key not in expected or found[key].shape == expected[key].shape:
        return []
    stored, wanted = found[key], expected[key]
    if stored.ndim != 4 or stored.shape[:2] != wanted.shape[:2]:
        return []  # of another architecture
    words = f"{_times(stored)} stem", f"{_times(wanted)}"
    margin = (stored.shape[-1] - wanted.shape[-1]) // 2
    if margin < 0:
        reason = f"has a {words[0]}, and at {size} px the backbone has {words[1]}"
        raise WeightsError(f"{weights.spec}: {reason}; it fits images of at most 64 px")
    found[key] = stored[:, :, margin : stored.shape[2] - margin, margin : stored.shape[3] - margin]
    return [f"{words[0]} cut to the {words[1]} at its centre, for {size} px images"]


def _times(tensor: Tensor) -> str:
    """The size of a kernel, 7x7, or the number of positions."""
    return "x".join(map(str, tensor.shape[2:])) if tensor.ndim == 4 else str(tensor.shape[1])


def _check_fit(weights: Weights, arch: str, found: Tensors, expected: Mapping[str, Tensor]) -> None:
    """Refuse weights of another architecture.

    A key is foreign that belongs to a part which the backbone has, and is not there or has another
    shape. Where a tenth of the keys is missing the network is another too.

    Raises:
        WeightsError: naming the first foreign or missing keys.
    """
    parts = {key.partition(".")[0] for key in expected}
    foreign = [
        f"{key} {tuple(value.shape)}"
        for key, value in found.items()
        if (key in expected and value.shape != expected[key].shape)
        or (key not in expected and "." in key and key.partition(".")[0] in parts)
    ]
    if foreign:
        raise _refusal(weights, arch, tuple(foreign))
    # Files of old PyTorch lack the counters of batch norms.
    needed = [key for key in expected if not key.endswith("num_batches_tracked")]
    missing = tuple(key for key in needed if key not in found)
    if len(missing) * 10 > len(needed):
        raise _refusal(weights, arch, tuple(f"{key} (missing)" for key in missing))


def _refusal(weights: Weights, arch: str, keys: tuple[str, ...]) -> WeightsError:
    likely = likely_arch(weights)
    hint = f"; they look like {likely}'s" if likely not in (None, arch) else ""
    return WeightsError(f"{weights.spec}: not the weights of {arch}: {named(keys)}{hint}")


def likely_arch(weights: Weights) -> str | None:
    """The known backbone that the keys and shapes are of; None if there is none."""
    # Our own have a stem of other parts for large images.
    own = [(arch, size) for arch in OWN_RESNETS for size in (TINY_IMAGE, DEFAULT_SIZE)]
    for arch, size in (*own, *((arch, None) for arch in KNOWN_ARCHS)):
        shapes, children = _shapes_of(arch, size)
        match = find_keys(weights, shapes, list(children))
        wrong = [
            key
            for key, shape in shapes.items()
            if not key.endswith("num_batches_tracked")
            and (key not in match.tensors or not _same(key, match.tensors[key].shape, shape))
        ]
        parts = {key.partition(".")[0] for key in shapes}
        more = [k for k in match.tensors if k not in shapes and k.partition(".")[0] in parts]
        if not wrong and not more:
            return next((short for short, full in ALIASES.items() if full == arch), arch)
    return None


def _same(key: str, found: torch.Size, known: torch.Size) -> bool:
    """Whether the shapes are of one architecture: stems and positions follow the image size."""
    if key == "conv1.weight":
        return found[:2] == known[:2]
    return found[-1] == known[-1] if key == "pos_embed" else found == known


@functools.cache
def _shapes_of(arch: str, image_size: int | None) -> tuple[dict[str, torch.Size], tuple[str, ...]]:
    """Keys and shapes of a backbone, and its parts by name; without a size as timm defines it."""
    import timm

    with torch.device("meta"):
        if image_size is None:
            model = timm.create_model(arch, num_classes=0)
        else:
            model = build_backbone(arch, image_size)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    return shapes, tuple(dict(model.named_children()))
