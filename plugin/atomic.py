"""Files that appear whole under their final name or not at all.

Knows the file system. Does not know what is written.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from superego.errors import SuperegoError


def check_writable(path: Path) -> None:
    """Refuse an output that cannot be written, before minutes of work; raises SuperegoError."""
    if path.is_dir():
        raise SuperegoError(f"{path}: is a directory; give a file name with -o")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise SuperegoError(f"{path}: folder {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK):
        raise SuperegoError(f"{path}: folder {parent} is not writable")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well.

    Raises SuperegoError for errors of the file system such as a full disk.
    """
    check_writable(path)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise SuperegoError(
            f"{path}: cannot be written: {error.strerror or error}; nothing was changed"
        ) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
