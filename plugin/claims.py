"""One writer for an output: a second command that would write it is told at once.

Knows locks on a file in the user's cache. Does not know what is written; files are whole
without this too (superego.atomic), and where the system has no such locks the last one wins.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from superego.errors import SuperegoError

_counts: dict[int, int] = {}  # this process's claims, by the byte that is locked
_handles: dict[int, int] = {}  # process -> the open lock file: closing it would drop all locks


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold `path` as this process's to write; raises SuperegoError where another one's is."""
    place = int.from_bytes(hashlib.sha256(os.fsencode(os.path.realpath(path))).digest()[:7], "big")
    held = _take(place, path)
    try:
        yield
    finally:
        if held:
            _give(place)


def _take(place: int, path: Path) -> bool:
    try:
        import fcntl  # not on Windows
    except ImportError:
        return False
    try:
        fcntl.lockf(_handle(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise SuperegoError(
                f"{path}: another superego is writing it at this moment; wait for it, or give "
                "another -o"
            ) from None
        return False
    _counts[place] = _counts.get(place, 0) + 1
    return True


def _give(place: int) -> None:
    import fcntl

    _counts[place] -= 1
    if not _counts[place]:
        del _counts[place]
        with contextlib.suppress(OSError):
            fcntl.lockf(_handle(), fcntl.LOCK_UN, 1, place)


def _handle() -> int:
    if os.getpid() not in _handles:
        import platformdirs

        path = Path(platformdirs.user_cache_dir("superego")) / "outputs.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _handles[os.getpid()] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OSError(errno.ENOLCK, f"no lock file: {error.strerror}") from None
    return _handles[os.getpid()]
