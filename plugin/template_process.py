"""The process that renders chat templates, started when first needed and ended with this one.

Knows processes, pipes and time limits. Does not know jinja2 or what a template means.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("template_worker.py")
_SECONDS = 10.0  # of waiting; the worker itself ends after 2 of processor time


class Failed(Exception):
    """A template that cannot be compiled or rendered; says why."""


class Refused(Failed):
    """The template refuses these messages with an error of its own."""


class Limit(Failed):
    """The template takes more time or memory than any real one."""


class _Process:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._numbers: dict[str, int] = {}  # of the templates that it has compiled

    def ask(self, source: str, values: dict[str, Any] | None) -> str:
        """The rendered text, or "" where there are no values: the template is only compiled."""
        with self._lock:
            if source not in self._numbers or not self._alive():
                self._start()
                self._numbers[source] = self._answer({"source": source})["number"]
            if values is None:
                return ""
            return str(self._answer({"number": self._numbers[source], "values": values})["text"])

    def _alive(self) -> bool:
        # a fork shares the pipes of its parent, whose answers they would mix up
        return (
            self._process is not None
            and self._owner == os.getpid()
            and self._process.poll() is None
        )

    def _start(self) -> None:
        if self._alive():
            return
        self._numbers.clear()
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise AssertionError("asked before it was started")
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(_SECONDS, end)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            process.kill()
            code = process.wait()
            self._numbers.clear()
            if late.is_set() or code == -27:  # SIGPROF
                raise Limit("takes more than 2 s")
            raise Limit(f"ended the process that rendered it (code {code})")
        answer: dict[str, Any] = json.loads(line)
        for kind, error in (("limit", Limit), ("refused", Refused), ("error", Failed)):
            if kind in answer:
                raise error(answer[kind])
        return answer

    def close(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            with contextlib.suppress(OSError):
                if self._process.stdin is not None:
                    self._process.stdin.close()
            self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()


_process = _Process()
atexit.register(_process.close)


def check(source: str) -> None:
    """Compile a template; raises Failed where that fails or takes too much."""
    _process.ask(source, None)


def render(source: str, values: dict[str, Any]) -> str:
    """A template rendered with these values; raises Failed, also for what it may not do."""
    return _process.ask(source, values)
