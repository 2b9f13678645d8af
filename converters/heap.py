"""What the allocator does with memory that is given back: kept for the next product, or not.

Knows glibc's mallopt. Does not know what the memory is for. Walks allocate hundreds of megabytes
between two products; glibc asks the system for each anew, which hands out zeroed pages of 4 KB.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_NEVER = -1
_AHEAD = 64 << 20  # bytes that the heap grows by
# what glibc comes to by itself where large blocks were given back
_USUAL = {_TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 128 << 10, _MMAP_THRESHOLD: 32 << 20,
          _MMAP_MAX: 65536}  # fmt: skip


@contextlib.contextmanager
def kept_heap() -> Iterator[None]:
    """Within it, memory that is given back stays in the process for what is allocated next.

    Elsewhere than with glibc it changes nothing.
    """
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return
    for option, value in {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: _AHEAD}.items():
        libc.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _USUAL.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)
