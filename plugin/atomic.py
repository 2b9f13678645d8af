"""Files that appear whole under their final name or not at all, and what they are made in.

Knows the file system. Does not know what is written. What a killed process leaves behind is
removed by the next one that writes the same file, or needs a temporary folder: all of it is
locked while its process lives.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from superego.errors import SuperegoError

_RANDOM = "[a-z0-9_]{8}"  # as tempfile makes them
_LONGEST = 200  # bytes of a name that go into a temporary one's


def check_writable(path: Path, *inputs: Path) -> None:
    """Refuse an output that cannot be written, before minutes of work; raises SuperegoError.

    `inputs` are files that must not be overwritten.
    """
    try:
        if path.is_dir():
            raise SuperegoError(f"{path}: is a directory; give a file name with -o")
        target = _target(path)
        parent = target.absolute().parent
        if not parent.is_dir():
            raise SuperegoError(f"{path}: folder {parent} does not exist; create it first")
        if target.exists():
            mode = target.stat().st_mode
            if not stat.S_ISREG(mode):  # it would be replaced, not written to
                raise SuperegoError(f"{path}: is not a regular file; give another -o")
            if not mode & 0o222:
                raise SuperegoError(f"{path}: is read-only; give another -o, or chmod u+w it")
            for each in inputs:
                if each.exists() and target.samefile(each):
                    raise SuperegoError(f"{path}: is {each} itself, an input; give another -o")
    except OSError as error:
        raise SuperegoError(f"{path}: cannot be written: {error.strerror}") from None
    if not os.access(parent, os.W_OK):
        raise SuperegoError(f"{path}: folder {parent} is not writable")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well.

    A link is followed. Raises SuperegoError for errors of the file system such as a full disk.
    """
    check_writable(path)
    target = _target(path)
    temporary: Path | None = None
    handle = -1
    try:
        prefix = _prefix(target)
        _sweep(target.parent, prefix, ".part")
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=".part", dir=target.parent)
        temporary = Path(name)
        _lock(handle)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(_mode(target))
        os.replace(temporary, target)
        temporary = None
        _settle(target.parent)
    except OSError as error:
        raise SuperegoError(
            f"{path}: cannot be written: {_reason(error)}; nothing was changed"
        ) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if handle >= 0:
            os.close(handle)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, for what is too large for elsewhere."""
    parent = path.absolute().parent
    with _folder(parent, _prefix(path), ".parts") as folder:
        yield folder


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder where the system keeps temporary files; raises SuperegoError where it has none."""
    try:
        parent = Path(tempfile.gettempdir())
    except OSError:
        raise SuperegoError(
            "no folder for temporary files can be written to; set TMPDIR to one that can"
        ) from None
    with _folder(parent, "superego-", ".tmp") as folder:
        yield folder


@contextlib.contextmanager
def _folder(parent: Path, prefix: str, suffix: str) -> Iterator[Path]:
    handle = -1
    try:
        _sweep(parent, prefix, suffix)
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=parent))
        if os.name == "posix":
            handle = os.open(folder, os.O_RDONLY)
            _lock(handle)
    except OSError as error:
        raise SuperegoError(
            f"{parent}: no temporary folder can be made there: {error.strerror}"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle >= 0:
            os.close(handle)


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _prefix(path: Path) -> str:
    return os.fsdecode(b"." + os.fsencode(path.name)[:_LONGEST] + b".")


def _mode(target: Path) -> int:
    """The permissions of the file that is replaced, else what a new file gets."""
    with contextlib.suppress(OSError):
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _reason(error: OSError) -> str:
    if error.strerror:
        return error.strerror
    # numpy says how many items it wrote, and not why it stopped
    return f"writing stopped early ({error}); is the disk full?"


def _settle(folder: Path) -> None:
    """Have the folder itself on the disk: a rename is not, until then."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _lock(handle: int) -> bool:
    """Whether an open file or folder is ours alone; it is until `handle` is closed."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another's, or a file system without locks
        return False
    return True


def _sweep(folder: Path, prefix: str, suffix: str) -> None:
    """Remove what killed processes have left: what nobody holds a lock on."""
    name = re.compile(re.escape(prefix) + _RANDOM + re.escape(suffix))
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if name.fullmatch(entry.name) and not entry.is_symlink():
                with contextlib.suppress(OSError):
                    _remove_if_left(Path(entry.path))


def _remove_if_left(path: Path) -> None:
    if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        if _lock(handle):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
    finally:
        os.close(handle)
