"""One process at a time: a lock on a folder that ends with the process that holds it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


class FolderLock:
    """An advisory lock (flock) on a folder itself: no file is left behind, not even by kill -9.

    Where the system or the file system has no such locks, nothing is locked.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, folder: Path) -> bool:
        """Whether the folder is now ours; False where another process holds it."""
        if fcntl is None or self._descriptor is not None:
            return True
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            # Anything else means that locks do not work here (EBADF and ENOLCK on some NFS).
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
