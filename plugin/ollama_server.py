"""A running Ollama server: its address, its version, and models made on it.

Knows Ollama's HTTP API. Does not know how a model's files are made.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from superego.errors import SuperegoError
from superego.modelfile import Modelfile

if TYPE_CHECKING:
    import httpx

Version = tuple[int, int, int]
NO_ADAPTERS_FROM: Version = (0, 34, 1)  # refuses new adapters
_PORT = 11434
_BLOCK = 1 << 20
Progress = Callable[[str, float, float], None]


def _httpx() -> Any:
    try:
        import httpx
    except ModuleNotFoundError:
        raise SuperegoError(
            "this command needs httpx, which is not installed; pip install 'superego[ollama]'"
        ) from None
    return httpx


def address() -> str:
    """Where Ollama listens: OLLAMA_HOST as Ollama's own client reads it, else the default."""
    wanted = os.environ.get("OLLAMA_HOST", "").strip().strip("\"'")
    scheme, separator, rest = wanted.rpartition("://")
    scheme = scheme or "http"
    default = {"http": 80, "https": 443}.get(scheme, _PORT) if separator else _PORT
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname or "127.0.0.1", parts.port or default
    except ValueError as error:
        raise SuperegoError(f"OLLAMA_HOST={wanted!r}: not an address: {error}") from None
    if scheme not in ("http", "https"):
        raise SuperegoError(f"OLLAMA_HOST={wanted!r}: expected http or https")
    if host in ("0.0.0.0", "::"):  # where a server listens is not where a client connects
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{port}{parts.path.rstrip('/')}"


def parse_version(text: str) -> Version:
    """0.34.1, v0.34.1 or 0.34.1-rc2 as numbers; raises SuperegoError."""
    match = re.fullmatch(r"v?(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?(?:[-+].*)?", text.strip())
    if match is None:
        raise SuperegoError(f"Ollama version {text!r}: expected one such as 0.34.1")
    return int(match[1]), int(match[2]), int(match[3] or 0)


def server_version(timeout: float = 2.0) -> Version:
    """The running server's version; raises SuperegoError where none answers or says one."""
    httpx = _httpx()
    where = address()
    try:
        answer = httpx.get(f"{where}/api/version", timeout=timeout)
        answer.raise_for_status()
        found = parse_version(str(answer.json()["version"]))
    except httpx.HTTPError as error:
        raise SuperegoError(
            f"no Ollama server answers at {where} ({type(error).__name__}); start it, set "
            "OLLAMA_HOST, or say --ollama-version"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise SuperegoError(
            f"{where}/api/version does not answer as Ollama does; say --ollama-version"
        ) from None
    if found == (0, 0, 0):
        raise SuperegoError(
            f"the Ollama at {where} is a development build (0.0.0); say --ollama-version"
        )
    return found


def takes_adapters(version: Version) -> bool:
    """Whether this version creates models with an ADAPTER line."""
    return version < NO_ADAPTERS_FROM


def check_name(name: str) -> None:
    """Refuse what Ollama would not take as a model's name; raises SuperegoError."""
    part = r"[A-Za-z0-9_][\w.-]*"
    if not re.fullmatch(rf"({part}(:\d+)?/)?({part}/)?{part}(:{part})?", name, re.ASCII):
        raise SuperegoError(
            f"{name!r}: not a model name for Ollama (expected [NAMESPACE/]NAME[:TAG])"
        )


def push(
    folder: Path, recipe: Modelfile, name: str, progress: Progress = lambda label, done, total: None
) -> list[str]:
    """Create `name` on the server from an exported folder; the statuses it reported.

    Files that the server has already are not sent again. Raises SuperegoError.
    """
    httpx = _httpx()
    check_name(name)
    request: dict[str, Any] = {"model": name, "stream": True}
    base = _file(folder, recipe.base)
    if base is None:
        check_name(recipe.base)
        request["from"] = recipe.base
    if recipe.system is not None:
        request["system"] = recipe.system
    adapter = None
    if recipe.adapter is not None:
        adapter = _file(folder, recipe.adapter)
        if adapter is None:
            raise SuperegoError(f"{folder}: ADAPTER {recipe.adapter}: no such file")
        version = server_version()
        if not takes_adapters(version):
            raise SuperegoError(
                f"Ollama {'.'.join(map(str, version))} takes no adapters (none from 0.34.1 on); "
                "export again for this version: a merged model"
            )
    try:
        with httpx.Client(base_url=address(), timeout=httpx.Timeout(10, read=None)) as client:
            for key, path in (("files", base), ("adapters", adapter)):
                if path is not None:
                    request[key] = {path.name: _send(client, path, progress)}
            return _create(client, request, progress)
    except httpx.HTTPError as error:
        raise SuperegoError(
            f"{address()}: {type(error).__name__}: {error}; nothing was created"
        ) from None


def _file(folder: Path, name: str) -> Path | None:
    """The file that a FROM or ADAPTER stands for; None for a model's name."""
    path = folder / name  # an absolute name stays as it is
    if path.is_file():
        return path
    if name.startswith(("/", "./", "~")) or name.endswith(".gguf"):
        raise SuperegoError(f"{path}: no such file, though the Modelfile names it")
    return None


def _send(client: httpx.Client, path: Path, progress: Progress) -> str:
    size, done = path.stat().st_size, 0
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            progress(f"reading {path.name}", done, size)
    name = f"sha256:{digest.hexdigest()}"
    answer = client.head(f"/api/blobs/{name}")
    if answer.status_code == 200:
        return name
    if answer.status_code != 404:
        raise SuperegoError(f"Ollama answered {answer.status_code} when asked for {path.name}")

    def blocks() -> Iterator[bytes]:
        sent = 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block
                sent += len(block)
                progress(f"sending {path.name}", sent, size)

    answer = client.post(
        f"/api/blobs/{name}", content=blocks(), headers={"Content-Length": str(size)}
    )
    if answer.status_code not in (200, 201):
        raise SuperegoError(f"Ollama refused {path.name}: {_said(answer)}")
    return name


def _create(client: httpx.Client, request: dict[str, Any], progress: Progress) -> list[str]:
    statuses: list[str] = []
    with client.stream("POST", "/api/create", json=request) as answer:
        if answer.status_code != 200:
            answer.read()
            raise SuperegoError(f"Ollama refused to create {request['model']}: {_said(answer)}")
        for line in answer.iter_lines():
            if not line.strip():
                continue
            try:
                said = json.loads(line)
            except ValueError:
                raise SuperegoError(f"Ollama answered what is not JSON: {line[:80]!r}") from None
            if not isinstance(said, dict):
                raise SuperegoError(f"Ollama answered what is not a status: {line[:80]!r}")
            if "error" in said:
                raise SuperegoError(f"Ollama refused to create {request['model']}: {said['error']}")
            status = str(said.get("status", ""))
            total = said.get("total") or 1
            progress(status, said.get("completed", 1), total)
            statuses.append(status)
    if not statuses or statuses[-1] != "success":
        raise SuperegoError(
            f"Ollama ended without 'success' (last: {statuses[-1] if statuses else 'nothing'})"
        )
    return statuses


def _said(answer: httpx.Response) -> str:
    try:
        return f"{answer.json()['error']} ({answer.status_code})"
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}"
