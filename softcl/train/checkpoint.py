"""Checkpoints that are either whole or refused, and the backbone in one.

    last.pt       the newest
    last-1.pt     the one before it
    best.pt       the one with the highest k-NN accuracy
    set-aside.pt  a last.pt that was damaged, or that a run was not continued from

All but the newest are further names (hard links) of files that were last.pt once, so they cost no
writing, and last.pt is a whole checkpoint at every moment.

A checkpoint is one file, an ordinary ``torch.save`` archive (a zip file) whose zip comment holds
the SHA-256 of every byte before it. It is written under a temporary name, flushed to the disk and
then renamed, so the file under the final name is at every moment the old checkpoint or the new
one. Any changed, missing or extra byte is found on reading. Plain ``torch.load`` reads it too.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcl.data.given import is_object
from softcl.errors import CheckpointError, ConfigError
from softcl.files import name_too, open_file, read_file, replace_file
from softcl.nn import build_backbone
from softcl.train.config import TrainConfig

LAST, PREVIOUS, BEST, SET_ASIDE = "last.pt", "last-1.pt", "best.pt", "set-aside.pt"
NETWORKS = ("student", "teacher")
# What a run goes on from, and of which kind each is; see loop.py.
ENTRIES: dict[str, type | tuple[type, ...]] = {
    **{"step": int, "config": dict, "fingerprint": object, "best": list, "evaluated_step": int},
    **{name: dict for name in (*NETWORKS, "queues", "optimizer", "heads")},
    **{"accuracy": (float, type(None)), "seconds": float},
}

_TAG = b"softcl-sha256:"
_COMMENT_BYTES = len(_TAG) + 64  # the tag and 64 hexadecimal digits
# A zip file ends with the length of its comment (two bytes) and the comment.
_TRAILER_BYTES = 2 + _COMMENT_BYTES


def seal(archive: bytes) -> bytes:
    """Add the checksum of a zip archive that has no comment, as its zip comment."""
    if archive[-2:] != b"\0\0":
        raise ValueError("archive must be a zip file without a comment")
    body = archive[:-2]
    digest = hashlib.sha256(body).hexdigest().encode()
    return body + struct.pack("<H", _COMMENT_BYTES) + _TAG + digest


def unseal(data: bytes) -> bytes:
    """Return the archive inside `data` after checking it against its checksum.

    Raises:
        ValueError: with the reason, when the checksum is absent or differs.
    """
    body, trailer = data[:-_TRAILER_BYTES], data[-_TRAILER_BYTES:]
    if not body or trailer[:-64] != struct.pack("<H", _COMMENT_BYTES) + _TAG:
        raise ValueError("it has no checksum at its end (cut short, or not a softcl checkpoint)")
    if hashlib.sha256(body).hexdigest().encode() != trailer[-64:]:
        raise ValueError("its checksum does not match its content (damaged)")
    return body + b"\0\0"


def is_checkpoint(path: Path) -> bool:
    """Whether a file ends as `seal` makes it end; its content may be damaged."""
    try:
        with open_file(path) as file:
            file.seek(-_TRAILER_BYTES, os.SEEK_END)
            return file.read(2 + len(_TAG)) == struct.pack("<H", _COMMENT_BYTES) + _TAG
    except OSError:  # absent, or shorter than that
        return False


def write_checkpoint(path: Path, state: dict) -> None:
    """Write `state` (nested dicts and lists of tensors, numbers and strings) to `path`, atomically.

    The checkpoint of that name before it becomes PREVIOUS, when the new one is on the disk.

    Raises:
        CheckpointError: when the disk refuses it; whatever was under `path` is still there.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    before = path.exists()

    def keep_previous() -> None:
        if before:
            name_too(path, path.with_name(PREVIOUS))

    try:
        replace_file(path, seal(buffer.getvalue()), keep_previous)
    except OSError as error:
        kept = "; the checkpoint before it is kept" if before else ""
        raise CheckpointError(f"{path}: cannot write: {error.strerror or error}{kept}") from error


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU, checksum verified, without unpickling arbitrary objects.

    Raises:
        CheckpointError: when the file is missing, unreadable, damaged or something else.
    """
    try:
        data = read_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from error
    try:
        archive = unseal(data)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    try:
        state = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds: the reason matters, not the kind
        reason = str(error).strip().splitlines()
        raise CheckpointError(f"{path}: cannot load: {reason[0] if reason else error!r}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__} where a dict is expected")
    return state


def check_content(
    file: Path, content: dict[str, Any], entries: Mapping[str, type | tuple[type, ...]]
) -> None:
    """Refuse a checkpoint that lacks an entry, or has something else in its place.

    Raises:
        CheckpointError: naming the entry.
    """
    for name, kind in entries.items():
        if name not in content:
            raise CheckpointError(f"{file}: not a training checkpoint (without {name!r})")
        if not isinstance(content[name], kind):
            found = type(content[name]).__name__
            raise CheckpointError(
                f"{file}: not a training checkpoint ({name!r} is of type {found})"
            )


def config_of(file: Path, content: dict[str, Any]) -> TrainConfig:
    """The configuration of the run that a checkpoint is of.

    Raises:
        CheckpointError: it is not one of this version.
    """
    try:
        return TrainConfig.of(**content["config"])
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{file}: its configuration cannot be used: {error}") from error


# ------------------------------------------------------------------------- the checkpoints of a run


def holds_checkpoint(folder: Path) -> bool:
    """Whether a folder has a checkpoint to go on from."""
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def read_newest(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest checkpoint that is whole.

    Returns:
        Its path, its content and, where the newest was passed over, the reason in a line.

    Raises:
        CheckpointError: none is whole; the reason is that of the newest.
    """
    refused: list[CheckpointError] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists() and holds_checkpoint(folder):
            continue
        try:
            return path, read_checkpoint(path), list(map(str, refused))
        except CheckpointError as error:
            refused.append(error)
    raise refused[0]


def put_back(folder: Path, path: Path) -> None:
    """Make the checkpoint `path` the newest again; the last.pt in its place is set aside."""
    if path.name == LAST:
        return
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / SET_ASIDE)
    name_too(path, folder / LAST)


# ------------------------------------------------------------------------------------- its backbone


@dataclass(frozen=True)
class Stored:
    """A backbone in eval mode, and the run that it comes from.

    Attributes:
        path: of the checkpoint.
        config: of the run.
        content: of the checkpoint.
    """

    path: Path
    backbone: nn.Module
    config: TrainConfig
    content: dict[str, Any]


def find_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a path names: a file, or a run folder's best.pt or else newest.

    Raises:
        CheckpointError: there is none that is whole.
    """
    if not path.is_dir():
        return path, read_checkpoint(path)
    if (path / BEST).exists():
        return path / BEST, read_checkpoint(path / BEST)
    newest, content, _ = read_newest(path)
    return newest, content


def load_backbone(path: Path, network: str = "student") -> Stored:
    """Read a checkpoint and build its backbone: plain batch norm, eval mode, on the CPU.

    Args:
        path: a checkpoint or a run folder.
        network: "student" or "teacher".

    Raises:
        CheckpointError: there is none, it is damaged, or of another version.
    """
    file, content = find_checkpoint(path)
    check_content(file, content, {"step": int, "config": dict, network: dict})
    config, stored = config_of(file, content), content[network]
    if is_object(config.arch):
        reason = (
            f"its backbone {config.arch} was a module, which softcl.train.fit(resume=...) needs"
        )
        raise CheckpointError(f"{file}: {reason}")
    if "digest" in stored:
        reason = f"the frozen teacher is not kept here: it is {config.teacher}"
        raise CheckpointError(f"{file}: {reason}")
    try:
        backbone = build_backbone(config.arch, config.image_size)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: --arch {config.arch}: {error}") from error
    try:
        backbone.load_state_dict(backbone_weights(stored))
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file}: does not fit {config.arch}: {reason}") from error
    return Stored(file, backbone.eval().requires_grad_(False), config, content)


def backbone_weights(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone's part of an encoder's state."""
    prefix = "backbone."
    return {k.removeprefix(prefix): v for k, v in encoder.items() if k.startswith(prefix)}


def features_of(backbone: nn.Module, device: torch.device) -> nn.Module:
    """The backbone on a device, in the memory order that convolutions like."""
    return backbone.to(device).to(memory_format=torch.channels_last)
