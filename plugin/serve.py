"""Serving from start to end: the socket, llama-server, the router, and an orderly stop.

Knows the order of things. Does not know what is in a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from superego.errors import SuperegoError
from superego.llama_server import LlamaServer
from superego.roster import Roster
from superego.router import Limits, Router

_GRACE = 5  # seconds that replies have to end in when we are told to stop


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; raises SuperegoError where the address is taken or not ours."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, OverflowError) as error:
        raise SuperegoError(f"--host {host}: not an address of this machine: {error}") from None
    sock = socket.socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise SuperegoError(
            f"{host}:{port}: cannot listen there: {error.strerror}; choose another --port"
        ) from None
    return sock


class _Server(uvicorn.Server):
    """Signals are handled below: uvicorn would raise them again before llama-server is ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    sock: socket.socket,
    roster: Roster,
    child: LlamaServer,
    limits: Limits,
    ready: Callable[[str], None],
) -> None:
    router = Router(roster, child, limits)
    web = _Server(
        uvicorn.Config(
            router.app(),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE,
        )
    )
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C ends asyncio.run
            loop.add_signal_handler(number, stopped.set)
    tasks: list[asyncio.Task[object]] = []
    try:
        start = asyncio.create_task(child.start())
        stop = asyncio.create_task(stopped.wait())
        tasks = [start, stop]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            return
        await start  # raises what kept it from starting
        tasks.append(asyncio.create_task(child.watch()))
        serving = asyncio.create_task(web.serve([sock]))
        host, port = sock.getsockname()[:2]
        ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        await asyncio.wait((serving, stop), return_when=asyncio.FIRST_COMPLETED)
        web.should_exit = True
        await serving
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await child.stop()
        await router.client.aclose()


def serve(
    sock: socket.socket,
    roster: Roster,
    child: LlamaServer,
    limits: Limits,
    ready: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM; `ready` is told the address once replies can be had.

    Raises SuperegoError where llama-server does not start.
    """
    asyncio.run(_serve(sock, roster, child, limits, ready))
