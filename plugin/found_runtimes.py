"""Which runtimes are on this machine, and which of Superego's outputs each of them takes.

Knows their programs, packages, folders and limits. Starts none of them but to ask its version.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from superego.child import said_by

OUTPUTS = ("adapter", "session", "merged", "control vector", "PEFT folder")
STATE_VERSION = 3  # of the session files that the pinned llama.cpp writes
_OTHER_STATE_FROM = (2026, 10)  # xllamacpp, whose llama.cpp has another version of them


@dataclass(frozen=True)
class Runtime:
    """One runtime: where it was found (empty: it was not), and what it takes of ours."""

    name: str
    where: str
    version: str
    takes: dict[str, str]  # output -> "yes", "no", or what it depends on
    notes: list[str] = field(default_factory=list)


def found_runtimes(state_version: int | None = None) -> list[Runtime]:
    """All of them that we know. `state_version` is that of our own llama.cpp."""
    return [
        _llama_cpp_python(),
        _llama_server(),
        _xllamacpp(state_version or STATE_VERSION),
        _ollama(),
        _llm(),
        _merged_only(
            "LM Studio",
            ["lms"],
            ["~/.lmstudio", "~/.cache/lm-studio", "/Applications/LM Studio.app"],
        ),
        _merged_only(
            "Jan",
            ["jan", "Jan"],
            ["/Applications/Jan.app", "~/jan", "~/.config/Jan", "~/.local/share/Jan",
             "~/Library/Application Support/Jan", "~/AppData/Roaming/Jan"],
        ),
        _package("vLLM", "vllm", "vllm", _takes(peft="yes")),
        _package("peft", "peft", None, _takes(peft="yes")),
    ]  # fmt: skip


def _takes(
    adapter: str = "no",
    session: str = "no",
    merged: str = "no",
    vector: str = "no",
    peft: str = "no",
) -> dict[str, str]:
    return dict(zip(OUTPUTS, (adapter, session, merged, vector, peft), strict=True))


def _llama_cpp_python() -> Runtime:
    version = _version("llama-cpp-python")
    where = "this Python" if version else ""
    takes = _takes("yes", "yes", "yes", "yes")
    return Runtime("Superego (llama-cpp-python)", where, version, takes)


def _llama_server() -> Runtime:
    path = shutil.which("llama-server")
    takes = _takes("yes", f"if state v{STATE_VERSION}", "yes", "yes")
    if path is None:
        return Runtime("llama-server", "", "", takes)
    said = said_by([path, "--version"])
    match = re.search(r"version:\s*(\S+)", said or "")
    notes = [] if said is not None else [f"{path} --version says nothing"]
    return Runtime("llama-server", path, match[1] if match else "", takes, notes)


def _xllamacpp(state_version: int) -> Runtime:
    version = _version("xllamacpp")
    theirs = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    same = state_version == STATE_VERSION and theirs < _OTHER_STATE_FROM
    takes = _takes("yes", "yes" if same or not version else "no", "yes", "no")
    notes = []
    if version and not same:
        notes = [
            "its llama.cpp has another state version: sessions are refused there, and "
            "have to be made with that llama.cpp"
        ]
    where = "this Python" if version else ""
    return Runtime("xllamacpp's llama-server", where, version, takes, notes)


def _ollama() -> Runtime:
    from superego.base import ollama_models, ollama_store
    from superego.errors import SuperegoError
    from superego.ollama_server import address, parse_version, takes_adapters

    notes, version, where = [], "", []
    path = shutil.which("ollama")
    if path:
        where.append(path)
    try:
        at = address()
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"{at}/api/version", timeout=2
        ) as answer:
            version = str(json.loads(answer.read(1 << 16))["version"])
        where.append(f"server {at}")
    except SuperegoError as error:
        notes.append(str(error))
    except (OSError, ValueError, KeyError, TypeError, urllib.error.URLError):
        if path:
            notes.append(f"no server answers at {at}; start it with 'ollama serve'")
    if path and not version:
        # "ollama version is 0.30.1", or "Warning: client version is 0.30.1" without a server
        match = re.search(r"version is (\S+)", said_by([path, "--version"]) or "")
        version = match[1] if match else ""
    store, models = ollama_store(), ollama_models()
    if store.is_dir():
        where.append(f"store {store}")
        if models:
            few = ", ".join(f"ollama:{name}" for name in models[:3])
            notes.append(f"{len(models)} models in its store, usable as --base {few}")
        else:
            notes.append(f"its store {store} holds no models yet; run 'ollama pull NAME'")
    adapter = "if < 0.34.1"
    if version:
        try:
            adapter = "yes" if takes_adapters(parse_version(version)) else "no"
        except SuperegoError:
            notes.append(f"its version is '{version}'")
    if adapter == "no":
        notes.append("this version refuses adapters; 'superego export ollama' merges")
    return Runtime("Ollama", "; ".join(where), version, _takes(adapter, merged="yes"), notes)


def _llm() -> Runtime:
    version = _version("llm")
    path = shutil.which("llm") or ""
    notes = []
    ours = version and any(
        point.value.startswith("superego.")
        for point in importlib.metadata.entry_points(group="llm")
    )
    own = Path(sys.executable).parent
    if path and (not ours or Path(path).parent.resolve() not in (own, own.resolve())):
        notes.append(
            f"{path} may run in another Python than this one: there, run 'llm install superego'"
        )
    takes = _takes("yes")  # through `superego add`
    where = path or ("this Python" if version else "")
    return Runtime("llm", where, version, takes, notes)


def _merged_only(name: str, programs: Sequence[str], folders: Sequence[str]) -> Runtime:
    places = [shutil.which(program) for program in programs]
    places += [each for each in map(os.path.expanduser, folders) if Path(each).exists()]
    return Runtime(name, next(filter(None, places), ""), "", _takes(merged="yes"))


def _package(name: str, package: str, program: str | None, takes: dict[str, str]) -> Runtime:
    version = _version(package)
    path = shutil.which(program) if program else None
    return Runtime(name, path or ("this Python" if version else ""), version, takes)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
