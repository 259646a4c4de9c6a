"""What the kernel keeps of files in memory, and how to have it let go."""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import closing


def forget(file: int) -> int:
    """Ask the kernel to drop an open file from the page cache.

    Returns:
        bytes that are in memory all the same (a file system in memory; pages that others map).
    """
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    size = os.fstat(file).st_size
    if not size:
        return 0
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    # A private map may be written to, which ctypes wants before it gives an address.
    with closing(mmap.mmap(file, size, flags=mmap.MAP_PRIVATE)) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages
        )
        del first  # or the map cannot be closed
    return 0 if failed else min(size, mmap.PAGESIZE * sum(page & 1 for page in pages))
