"""Runs one of our modules as a child that says JSON lines, or any program, and how it ended.

Knows processes. Does not know what is run: a crash, a hang or a broken import of the child's is
an answer here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

_MARK = "superego-child:"  # other lines of its stdout are not ours
# -c puts the current folder in front of the path: what lies there is not ours to import.
_CODE = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; import importlib; "
    "importlib.import_module(sys.argv.pop(1)).main(sys.argv[1:])"
)


@dataclass
class Ended:
    """What a child said before it ended, and how it ended: `why` is empty where it ended well.

    `signal` is the name of the signal that it died by.
    """

    said: list[dict[str, Any]] = field(default_factory=list)
    why: str = ""
    signal: str = ""


def say(**values: Any) -> None:
    """In the child: one line for the parent."""
    print(_MARK + json.dumps(values), flush=True)


def run_module(
    module: str, arguments: Sequence[str], seconds: float, start_seconds: float = 60.0
) -> Ended:
    """Run `module.main(arguments)` in a child.

    It may take `seconds` from its first line on (imports come before that, and a cold disk is
    slow), and `start_seconds` to that line.
    """
    ended = Ended()
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE, module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    readers = [
        threading.Thread(target=_read, args=(process.stdout, ended.said), daemon=True),
        threading.Thread(target=_keep, args=(process.stderr, errors), daemon=True),
    ]
    for reader in readers:
        reader.start()
    begun = time.monotonic()
    limit, first = start_seconds, None
    late = False
    while process.poll() is None:
        now = time.monotonic()
        if first is None and ended.said:
            first, limit = now, seconds
        if now - (first or begun) > limit:
            late = True
            process.kill()
            break
        time.sleep(0.02)
    code = process.wait()
    for reader in readers:
        reader.join(5)
    if late:
        ended.why = f"was not done after {limit:g} s"
    elif code < 0:
        ended.signal = _name(-code)
        ended.why = f"the process died by {ended.signal}"
    elif code:
        words = next((line for line in reversed(errors) if line.strip()), "no word")
        ended.why = f"the process ended with status {code}: {words.strip()}"
    return ended


def said_by(command: Sequence[str], seconds: float = 5.0) -> str | None:
    """What a program prints, on either stream; None where it fails, hangs or prints nothing."""
    with tempfile.TemporaryFile() as output:  # a pipe would be kept open by its own children
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError:
            return None
        try:
            failed = process.wait(seconds) != 0
        except subprocess.TimeoutExpired:
            failed = True
            with suppress(OSError, AttributeError):  # its children too, where there are groups
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        output.seek(0)
        return None if failed else output.read(10_000).decode("utf-8", "replace") or None


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read(pipe: IO[str], said: list[dict[str, Any]]) -> None:
    for line in pipe:
        if line.startswith(_MARK):
            said.append(json.loads(line[len(_MARK) :]))


def _keep(pipe: IO[str], lines: list[str]) -> None:
    for line in pipe:
        lines.append(line)
        del lines[:-20]
