"""Runs one command and ends it when whoever started this is gone, however that came about.

Run as a file (`python leash.py FOLDER COMMAND…`), with the standard library alone. Knows
processes. Does not know what it runs.

The starter holds the other end of this process's stdin and never writes: end of file means
that it has ended, by SIGKILL too; then FOLDER (may be empty) is removed as well. On Linux the
kernel also ends the command should this very process be killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

_GRACE = 5.0  # seconds between asking the command to end and ending it
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> Callable[[], None] | None:
    """What the command's process does before it starts: ask for SIGKILL at our death."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask


def _end(command: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        command.terminate()
        try:
            command.wait(_GRACE)
        except subprocess.TimeoutExpired:
            command.kill()


def main(arguments: list[str]) -> int:
    """Run the command; its exit status, or 128 + the signal that ended it."""
    folder, *arguments = arguments
    starter, ended = os.getppid(), threading.Event()
    try:
        command = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent()
        )
    except OSError as error:
        print(f"{arguments[0]}: {error.strerror}", file=sys.stderr)
        return 127

    def watch() -> None:
        while os.read(0, 4096):  # a bare read: sys.stdin's lock would be held at exit
            pass
        ended.set()
        _end(command)

    def stop(number: int, frame: object) -> None:
        threading.Thread(target=_end, args=(command,), daemon=True).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: not ours
    threading.Thread(target=watch, daemon=True).start()
    status = command.wait()
    for _ in range(10 if folder else 0):
        if os.getppid() != starter:
            shutil.rmtree(folder, ignore_errors=True)
            break
        if not ended.is_set():
            break
        time.sleep(0.05)  # a process that dies closes its pipes before it leaves its children
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
