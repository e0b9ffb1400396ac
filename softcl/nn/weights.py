"""Weights that other programs wrote, as tensors by key: from a file, or from timm's.

A file holds dictionaries of tensors, one inside the other; all of them are kept, for which one has
the network is found out by softcl.nn.pretrained. Nothing in a file is run.
"""

from __future__ import annotations

import argparse
import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softcl.errors import WeightsError
from softcl.files import open_file

TIMM = "timm:"  # how the specs begin that name timm's published weights
# Until a file says otherwise: what torchvision's, MoCo's and DINO's weights were trained with.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SHOWN = 3  # names that a line has room for

Triple = tuple[float, float, float]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """Weights as they were found.

    Attributes:
        spec: what names them.
        holders: the tensors by key, for each dictionary of the file that has some.
        arch, image_size: of the backbone, where that is known.
        mean, std: of the images that it was trained on.
        normalisation: where the latter come from, in words.
    """

    spec: str
    holders: dict[str, Tensors]
    arch: str | None = None
    image_size: int | None = None
    mean: Triple = IMAGENET[0]
    std: Triple = IMAGENET[1]
    normalisation: str = "ImageNet's normalisation, for the weights name none"


def named(keys: Sequence[str]) -> str:
    """The first few of some keys, for a line."""
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")


def first_line(error: Exception) -> str:
    """What an error of another library says, cut short."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else repr(error)


def read_file(path: Path) -> Weights:
    """The tensors of a safetensors file or of one that torch.save wrote; no code of it is run.

    Raises:
        WeightsError: it cannot be read, needs code, or holds no tensors.
    """
    content, metadata = _read_content(path)
    holders: dict[str, Tensors] = {}
    _collect(content, "", holders)
    if not holders:
        raise WeightsError(f"{path}: holds no tensors by name")
    return Weights(str(path), holders, **_known_of(path, metadata))


def _read_content(path: Path) -> tuple[Any, dict[str, str]]:
    """What a file holds, and a safetensors file's metadata."""
    try:
        with open_file(path) as file:
            head = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path}: cannot read: {error.strerror or error}") from error
    # Its first eight bytes are the length of a header in JSON.
    if path.suffix == ".safetensors" or head[8:] == b"{":
        return _read_safetensors(path)
    try:
        # DINO keeps the arguments of its command beside the weights: a record without code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: {_needed_code(path) or 'no file of weights'}") from error
    except Exception as error:  # torch.load raises many kinds: the reason matters, not the kind
        raise WeightsError(f"{path}: no file of weights: {first_line(error)}") from error


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a whole safetensors file: {first_line(error)}") from error


def _needed_code(path: Path) -> str | None:
    """Why an unpickler that runs no code refuses the file; None if that is not why."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a format before zip files, or damaged
        return None
    if not names:
        return None
    return f"refused: its pickle runs code ({named(names)}); save its state_dict alone"


def _collect(content: Any, name: str, holders: dict[str, Tensors]) -> None:
    """Every dictionary that has tensors, by its path in the file."""
    if not isinstance(content, Mapping):
        return
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        holders[name] = tensors
    for key, value in content.items():
        _collect(value, f"{name}{key}.", holders)


def _known_of(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata of a file, or timm's config.json beside it, say about the network."""
    found: dict[str, Any] = {"arch": metadata.get("arch")}
    mean, std, size = (metadata.get(name) for name in ("mean", "std", "image_size"))
    try:
        if mean is not None and std is not None:
            mean, std = json.loads(mean), json.loads(std)
        elif (path.parent / "config.json").is_file():
            config = json.loads((path.parent / "config.json").read_text())
            stored = config["pretrained_cfg"]
            found["arch"] = config["architecture"]
            mean, std, size = stored["mean"], stored["std"], stored["input_size"][-1]
        if mean is not None:
            found |= {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
            found["normalisation"] = "normalised as the weights were trained"
        if size is not None:
            found["image_size"] = int(size)
    except (KeyError, TypeError, ValueError, OSError):
        return {"arch": metadata.get("arch")}  # another program's config.json
    return found


def read_timm(name: str) -> Weights:
    """timm's published weights of "NAME" or "NAME.TAG", by timm's own loading.

    Raises:
        WeightsError: there are none, or they are neither in timm's cache nor to be had.
    """
    import timm

    spec = f"{TIMM}{name}"
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)  # without a network it warns a dozen times before it fails
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except OSError as error:
        reason = "cannot be downloaded, and is not in the cache; a file of weights needs no network"
        raise WeightsError(f"{spec}: {reason}") from error
    except Exception as error:  # timm's, of several kinds
        raise WeightsError(f"{spec}: cannot be loaded: {first_line(error)}") from error
    finally:
        client.setLevel(level)
    stored = model.pretrained_cfg
    return Weights(
        spec,
        {"": model.state_dict()},
        name,
        stored["input_size"][-1],
        tuple(stored["mean"]),
        tuple(stored["std"]),
        "normalised as timm says",
    )
