"""The OpenAI-compatible address in front of llama-server: checks, routing, figures.

Knows HTTP and OpenAI's forms. Does not know how personas are read or processes are run.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from superego.llama_server import LlamaServer
from superego.roster import Persona, Refused, Roster

_OPEN = ("/health",)  # answered without a key, for watchdogs
_LOCAL_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost")


@dataclass(frozen=True)
class Limits:
    """Who may ask and for how much. `key` None means that none is needed."""

    key: str | None = None
    host_names: Sequence[str] = ()  # accepted in the Host header beside addresses and localhost
    body_bytes: int = 4 << 20


class Figures:
    """What /metrics shows."""

    def __init__(self, server: LlamaServer) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "superego_requests", "Requests answered.", ["persona", "status"], **made
        )
        self.seconds = Histogram(
            "superego_request_seconds", "Seconds to the end of a reply.", ["persona"], **made
        )
        self.first = Histogram(
            "superego_first_piece_seconds",
            "Seconds to a stream's first piece.",
            ["persona"],
            **made,
        )
        self.active = Gauge("superego_requests_active", "Requests being answered.", **made)
        up = Gauge("superego_llama_server_up", "Whether llama-server answers.", **made)
        up.set_function(lambda: float(server.ready))
        starts = Gauge("superego_llama_server_restarts", "Times it was started again.", **made)
        starts.set_function(lambda: float(server.restarts))


def failure(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = {401: "authentication_error", 404: "not_found_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )
    headers = {"Retry-After": "1"} if status == 503 else None
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)


class Gate:
    """Refuses, before anything is read, what comes under a strange name or without the key.

    A page in a browser reaches a loopback address through a name of its own that it points
    there; its Host header then holds that name, which no address and no name of ours is.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(Request(scope))
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> JSONResponse | None:
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not self._known(hosts[0]):
            return failure(
                403, f"Host {', '.join(hosts) or '(none)'!r} is not served here; "
                "see superego serve --allow-host", "host_not_allowed",
            )  # fmt: skip
        key = self._limits.key
        if key is not None and request.url.path not in _OPEN:
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
                return failure(401, "the API key is missing or wrong", "invalid_api_key")
        return None

    def _known(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.rstrip(".").lower()
        if name in _LOCAL_NAMES or name in self._limits.host_names:
            return True
        with suppress(ValueError):
            ipaddress.ip_address(name.strip("[]"))
            return True
        return False


@dataclass
class Router:
    """The routes, over one roster and one llama-server."""

    roster: Roster
    server: LlamaServer
    limits: Limits
    client: httpx.AsyncClient = field(
        default_factory=lambda: httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=5),
            # llama-server closes idle connections, perhaps just as we send on one
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,
        )
    )

    def __post_init__(self) -> None:
        self.figures = Figures(self.server)
        self.started = int(time.time())

    def app(self) -> ASGIApp:
        """The ASGI application."""
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
            HTTPException: self._http_error,
            Refused: self._refused,
            Exception: self._failed,
        }
        return Gate(Starlette(routes=routes, exception_handlers=handlers), self.limits)

    async def _http_error(self, request: Request, error: HTTPException) -> Response:
        what = {404: "no such path", 405: "method not allowed"}.get(error.status_code, error.detail)
        return failure(error.status_code, f"{what}: {request.method} {request.url.path}")

    async def _refused(self, request: Request, error: Refused) -> Response:
        self.figures.requests.labels("", str(error.status)).inc()
        return failure(error.status, error.message, error.code, error.param)

    async def _failed(self, request: Request, error: Exception) -> Response:
        return failure(500, "superego serve failed; its output says why")

    async def _health(self, request: Request) -> Response:
        up = self.server.ready
        return JSONResponse({"status": "ok" if up else "starting"}, 200 if up else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.figures.registry), media_type="text/plain")

    def _card(self, persona: Persona) -> dict[str, Any]:
        own: dict[str, Any] = {"kind": persona.kind}
        if persona.adapter is not None:
            own["scale"] = persona.scale
        return {
            "id": persona.name,
            "object": "model",
            "created": self.started,
            "owned_by": "superego",
            "superego": own,
        }

    async def _models(self, request: Request) -> Response:
        cards = [self._card(persona) for persona in self.roster.personas.values()]
        return JSONResponse({"object": "list", "data": cards})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        persona, scale = self.roster.choose(name)
        card = self._card(persona)
        if persona.adapter is not None:
            card["superego"]["scale"] = scale
        return JSONResponse({**card, "id": name})

    async def _body(self, request: Request) -> dict[str, Any]:
        """The request's JSON object within the limits; raises Refused."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers ask first before they send this elsewhere
            raise Refused(415, f"content type '{kind}', expected application/json")
        most = self.limits.body_bytes
        raw = bytearray()
        async for block in request.stream():
            raw += block
            if len(raw) > most:
                raise Refused(413, f"the request is over {most:,} bytes", "request_too_large")
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            reason = str(error) or "nested too deeply"
            raise Refused(400, f"the request is not JSON: {reason}") from None
        if not isinstance(body, dict):
            raise Refused(400, f"the request is a JSON {type(body).__name__}, expected an object")
        return body

    async def _complete(self, request: Request) -> Response:
        try:
            body = await self._body(request)
        except ClientDisconnect:
            return Response(status_code=499)
        model = body.get("model")
        chat = request.url.path.endswith("/chat/completions")
        persona = self.roster.rewrite(body, chat)
        if not self.server.ready:
            raise Refused(503, "llama-server is being started; try again")
        begun = time.monotonic()
        try:
            content = json.dumps(body, allow_nan=False).encode()
        except ValueError as error:  # Python reads NaN and 1e999, which JSON does not have
            raise Refused(400, f"the request is not JSON: {error}") from None
        asked = self.client.build_request(
            "POST",
            self.server.address + request.url.path,
            content=content,
            headers={**self.server.headers, "Content-Type": "application/json"},
        )
        self.figures.active.inc()
        try:
            reply = await self._unless_gone(request, self.client.send(asked, stream=True))
            if reply is None:
                return self._ended(persona, 499, begun)
            if reply.status_code != 200 or "event-stream" not in reply.headers["content-type"]:
                whole = await self._unless_gone(request, reply.aread())
                await reply.aclose()
                if whole is None:
                    return self._ended(persona, 499, begun)
                return self._ended(persona, reply.status_code, begun, whole, model)
        except httpx.HTTPError:
            return self._ended(persona, 502, begun)
        except BaseException:
            self.figures.active.dec()
            raise
        first = self.figures.first.labels(persona.name)
        return _Relay(
            reply,
            model,
            lambda: first.observe(time.monotonic() - begun),
            lambda status: self._count(persona, status, begun),
        )

    async def _unless_gone(self, request: Request, work: Awaitable[Any]) -> Any:
        """The work's result; None, and the work given up, where the client hangs up first."""

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
        try:
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for each in (task, watch):
                if not each.done():
                    each.cancel()
                    with suppress(asyncio.CancelledError, httpx.HTTPError):
                        await each

    def _ended(
        self, persona: Persona, status: int, begun: float, raw: bytes = b"", model: object = None
    ) -> Response:
        self._count(persona, status, begun)
        if status == 499:  # nobody is there to read it
            return Response(status_code=499)
        if status == 502:
            return failure(502, "llama-server ended before it replied; it is started again")
        try:
            found = json.loads(raw)
        except ValueError:
            return failure(502, "llama-server's reply is not JSON")
        if status == 200:
            return JSONResponse({**found, "model": model})
        error = found.get("error", {}) if isinstance(found, dict) else {}
        return JSONResponse({"error": _translated(error)}, status)

    def _count(self, persona: Persona, status: int, begun: float) -> None:
        self.figures.active.dec()
        self.figures.requests.labels(persona.name, str(status)).inc()
        self.figures.seconds.labels(persona.name).observe(time.monotonic() - begun)


class _Relay(StreamingResponse):
    """llama-server's events under the persona's name.

    However it ends, and if it never began, `ended` is told the status and llama-server's
    reply is closed, which frees its slot.
    """

    def __init__(
        self,
        reply: httpx.Response,
        model: object,
        begun: Callable[[], None],
        ended: Callable[[int], None],
    ) -> None:
        self._reply, self._model, self._begun, self._ended = reply, model, begun, ended
        self._status = 499
        super().__init__(self._pieces(), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended(self._status)
            await asyncio.shield(self._reply.aclose())  # we may be cancelled just now

    async def _pieces(self) -> AsyncIterator[bytes]:
        rest, first = b"", True
        try:
            async for block in self._reply.aiter_raw():
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    if first and line.startswith(b"data:"):
                        self._begun()
                        first = False
                    yield _renamed(line, self._model) + b"\n"
            self._status = 200
        except httpx.HTTPError:
            self._status = 502
            error = _translated({"message": "llama-server ended in the middle of the reply"})
            yield b"data: " + json.dumps({"error": error}).encode() + b"\n\n"


def _renamed(line: bytes, model: object) -> bytes:
    if not line.startswith(b"data: {"):
        return line
    try:
        event = json.loads(line[6:])
    except ValueError:
        return line
    if "error" in event:
        event["error"] = _translated(event["error"])
    elif "model" in event:
        event["model"] = model
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def _translated(error: Any) -> dict[str, Any]:
    """llama-server's error in OpenAI's form."""
    error = error if isinstance(error, dict) else {}
    code = {"exceed_context_size_error": "context_length_exceeded"}.get(str(error.get("type")))
    status = error.get("code", 500)
    client = isinstance(status, int) and 400 <= status < 500
    return {
        "message": str(error.get("message", "llama-server reported an error")),
        "type": "invalid_request_error" if client else "server_error",
        "param": None,
        "code": code,
    }
