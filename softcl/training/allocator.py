"""Keep freed memory inside the process, where the C library is glibc.

glibc maps every large block afresh and returns it to the kernel when it is freed, so each temporary
tensor on the CPU is paid for in page faults. Told to keep its pages it reuses them.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD = -1  # glibc's malloc.h
_M_MMAP_MAX = -4
_LARGEST_INT = 2**31 - 1


def keep_freed_pages() -> bool:
    """Tell glibc's malloc to keep freed memory; call it before the large tensors are made.

    Returns:
        True where it was done, False under another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        libc = ctypes.CDLL(None)
        # mallopt returns 1 on success.
        kept = libc.mallopt(_M_MMAP_MAX, 0) == 1
        return libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT) == 1 and kept
    except (OSError, AttributeError):
        return False
