"""Files that commands read and write: whole or not at all, and nothing but regular files.

A file is written under a random name beside its place, flushed to the disk and renamed, so that
under its own name there is at every moment the old content or the new. A link is followed, and what
it points to replaced; a folder, a pipe or a device is refused (a rename would put a file in the
place of /dev/null). The mode of a file that is replaced stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".*.tmp"  # what a process that was killed may leave


def user_path(text: str | Path) -> Path:
    """The path that a user wrote, with ~ expanded.

    Raises:
        OSError: it cannot be that of a file.
    """
    try:
        if b"\0" in os.fsencode(text):
            raise OSError(errno.EINVAL, "has a zero byte, which no path can have", str(text))
        return Path(text).expanduser()
    except UnicodeEncodeError:
        raise OSError(errno.EINVAL, "is no text that a path can be", str(text)) from None
    except RuntimeError:
        raise OSError(errno.ENOENT, "there is no such user", str(text)) from None


def open_file(path: Path) -> BinaryIO:
    """A regular file, to read; a pipe or a device, which may never end, is not opened.

    Raises:
        OSError: naming the path.
    """
    _check_regular(path, os.stat(path))
    return open(path, "rb")


def read_file(path: Path) -> bytes:
    """The content of a regular file, as `open_file`."""
    with open_file(path) as file:
        return file.read()


def check_target(path: Path) -> None:
    """Refuse a path that `replace_file` would refuse; call it before the work.

    Raises:
        OSError: naming the path.
    """
    with _naming(path):
        target, _ = _target(path)
        descriptor, temporary = _open_temporary(target)
        os.close(descriptor)
        temporary.unlink()


def check_folder(path: Path) -> None:
    """Refuse a folder in which no file can be written; one that is missing must be possible.

    Raises:
        OSError: naming the path.
    """
    with _naming(path):
        folder = Path(os.path.abspath(path))
        while not os.path.lexists(folder):
            folder = folder.parent
        descriptor, temporary = _open_temporary(folder / "folder")
        os.close(descriptor)
        temporary.unlink()


def cache_folder() -> Path:
    """Where softcl keeps what it can make again; ``XDG_CACHE_HOME`` moves it.

    Raises:
        RuntimeError: the user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softcl"


def replace_file(
    path: Path,
    data: bytes | Sequence[bytes | memoryview],
    before_replacing: Callable[[], None] | None = None,
) -> None:
    """Put `data`, or its parts one after the other, under the name `path`.

    A crash leaves the old file or the new one.

    Flushes the file and, after the rename, the folder, without which the rename itself may be lost
    with the power. On failure the temporary file is removed and the old file is untouched.
    `before_replacing` is called when the new data is on the disk and has no name yet.

    Raises:
        OSError: naming `path`.
    """
    with _naming(path):
        target, mode = _target(path)
        descriptor, temporary = _open_temporary(target)
        try:
            with open(descriptor, "wb") as file:
                if mode is not None:
                    os.fchmod(descriptor, mode)
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(descriptor)
            if before_replacing is not None:
                before_replacing()
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(target.parent)


def name_too(path: Path, other: Path) -> None:
    """Make `other` a further name of the file `path`, replacing what had it, in one moment."""
    temporary = _temporary_name(other)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    try:
        os.replace(temporary, other)
    finally:
        # Where both were names of one file, rename does nothing and leaves the temporary name.
        temporary.unlink(missing_ok=True)


def _target(path: Path) -> tuple[Path, int | None]:
    """The file that a path means, links followed, and its mode; None where there is no file yet."""
    target = Path(os.path.realpath(path))
    try:
        found = os.stat(path)  # of a loop of links, an error that says so
    except FileNotFoundError:
        return target, None
    _check_regular(path, found)
    return target, stat.S_IMODE(found.st_mode)


def _check_regular(path: Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def _temporary_name(path: Path) -> Path:
    # Of a name that is as long as names may be, the beginning.
    return path.with_name(TEMPORARY.replace("*", f"{path.name[:40]}.{secrets.token_hex(8)}"))


def _open_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, which nobody else has opened or put there."""
    temporary = _temporary_name(path)
    return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), temporary


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the file system name the file that is meant."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


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
