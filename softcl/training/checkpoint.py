"""Checkpoints that are either whole or refused.

A checkpoint is one file, an ordinary ``torch.save`` archive (a zip file) whose zip comment holds
the SHA-256 of every byte before it. It is written under a temporary name, flushed to the disk and
then renamed, so the file under the final name is at every moment the old checkpoint or the new
one. Any changed, missing or extra byte is found on reading. Plain ``torch.load`` reads it too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import torch

_TAG = b"softcl-sha256:"
_COMMENT_BYTES = len(_TAG) + 64  # the tag and 64 hexadecimal digits
# A zip file ends with the length of its comment (two bytes) and the comment.
_TRAILER_BYTES = 2 + _COMMENT_BYTES


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the path and the reason."""


def replace_file(
    path: Path, data: bytes, before_replacing: Callable[[], None] | None = None
) -> None:
    """Put `data` under the name `path` so that a crash leaves the old file or the new one.

    Writes ``.NAME.tmp`` beside it, fsyncs, renames, and fsyncs the folder (without which the rename
    itself may be lost with the power). On failure the temporary file is removed and the old file is
    untouched. `before_replacing` is called when the new data is on the disk and has no name yet.

    Raises:
        OSError: as the file system gave it, naming `path`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if before_replacing is not None:
            before_replacing()
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # a failed write does not say which file it was
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # platforms where a folder cannot be opened
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse to sync a folder; a failing disk must be reported.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


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


def write_checkpoint(
    path: Path, state: dict, before_replacing: Callable[[], None] | None = None
) -> None:
    """Write `state` (nested dicts and lists of tensors, numbers and strings) to `path`, atomically.

    `before_replacing` as in `replace_file`.

    Raises:
        CheckpointError: when the disk refuses it; whatever was under `path` is still there.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    kept = "; the checkpoint before it is kept" if path.exists() else ""
    try:
        replace_file(path, seal(buffer.getvalue()), before_replacing)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write: {error.strerror or error}{kept}") from error


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU, checksum verified, without unpickling arbitrary objects.

    Raises:
        CheckpointError: when the file is missing, unreadable, damaged or something else.
    """
    try:
        data = path.read_bytes()
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
