"""Sessions: a manifesto's warmed-up state on disk, checked, restored or built anew.

Knows llama.cpp's state calls and the sidecar beside each file. A session is a cache: where
anything does not fit, the manifesto's text is read again and the file is not used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pydantic

import superego
from superego.atomic import check_writable, replacing
from superego.base import BaseModel
from superego.dialogue import encode
from superego.errors import SuperegoError
from superego.gguf_file import check_unchanged
from superego.manifesto import Manifesto
from superego.persona import Persona
from superego.state_file import KV_TYPES, MAGIC, VERSION, State, layout, parse
from superego.template import ChatTemplate

if TYPE_CHECKING:
    from llama_cpp import Llama

_SIDECAR_LIMIT = 8 << 20  # bytes; a manifesto is far smaller
_MAX_CELLS = 1 << 20
Adapters = Sequence[tuple[Persona, float]]  # attached ones, with their scales


class Unfit(SuperegoError):
    """A session that must not be used here. `useless`: no runtime of this version could."""

    def __init__(self, reason: str, useless: bool = False) -> None:
        super().__init__(reason)
        self.useless = useless


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class SessionAdapter(_Strict):
    """An adapter that was attached when the state was made."""

    file: str
    sha256: str
    scale: float


class Sidecar(_Strict):
    """What llama.cpp does not check, kept as JSON in `FILE.json`."""

    format: Literal[1] = 1
    superego: str
    llama_cpp_python: str
    name: str
    manifesto: str
    base: str
    base_fingerprint: str
    template_sha256: str
    prefix_sha256: str  # of the rendered tokens
    prefix_tokens: int = pydantic.Field(gt=0)
    cells: int = pydantic.Field(gt=0)  # fewer than prefix_tokens where compacted
    adapters: list[SessionAdapter]
    n_ctx: int = pydantic.Field(gt=0)
    kv_type: Literal["f16", "q8_0"]
    flash_attention: bool
    state_version: int
    state_bytes: int = pydantic.Field(gt=0)
    state_sha256: str


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of a session file lies."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> Sidecar:
    """The sidecar of session `path`; raises Unfit where it is missing or damaged."""
    beside = sidecar_path(path)
    try:
        if beside.is_symlink():
            raise Unfit(f"{beside}: is a symbolic link")
        if beside.stat().st_size > _SIDECAR_LIMIT:
            raise Unfit(f"{beside}: is larger than {_SIDECAR_LIMIT:,} bytes", useless=True)
        return Sidecar.model_validate_json(beside.read_bytes())
    except FileNotFoundError:
        raise Unfit(f"{beside}: is missing", useless=True) from None
    except OSError as error:
        raise Unfit(f"{beside}: cannot be read: {error.strerror}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise Unfit(f"{beside}: {where}: {first['msg']}", useless=True) from None


def check_session_writable(path: Path, *inputs: Path) -> None:
    """Refuse a session file that cannot be written, or whose sidecar cannot be."""
    check_writable(path, *inputs)
    check_writable(sidecar_path(path), *inputs)


def prefix_of(llm: Llama, template: ChatTemplate, manifesto: str) -> list[int]:
    """The tokens that every conversation under this manifesto starts with."""
    return encode(llm, template, manifesto, []).prefix


def save_session(
    llm: Llama,
    model: BaseModel,
    manifesto: Manifesto,
    path: Path,
    adapters: Adapters = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Prefill the manifesto and save its state with a sidecar; returns what it cost.

    `llm` is on `model` with flash attention and with `adapters` attached. Raises
    SuperegoError for a manifesto that does not fit the context.
    """
    check_session_writable(path, *model.files)
    tokens = prefix_of(llm, ChatTemplate(model.header), manifesto.body)
    prefill(llm, tokens, progress)
    return _save(llm, model, manifesto, tokens, path, adapters)


def _save(
    llm: Llama,
    model: BaseModel,
    manifesto: Manifesto,
    tokens: list[int],
    path: Path,
    adapters: Adapters,
) -> dict[str, Any]:
    """Save what is in the cache: the manifesto's tokens and nothing else."""
    shape = layout(model.header, kv_type_of(llm))
    started = time.perf_counter()
    data = state_bytes(llm, tokens)
    parse(data, shape, path, _MAX_CELLS)  # what we write must be what we would accept
    write_session(path, data, model, llm, manifesto, tokens, len(tokens), adapters)
    return {
        "session": str(path),
        "bytes": len(data),
        "manifesto": manifesto.name,
        "tokens": len(tokens),
        "cells": len(tokens),
        "bytes a token": shape.cell_bytes + 4,
        "save seconds": round(time.perf_counter() - started, 4),
    }


def write_session(
    path: Path,
    data: bytes,
    model: BaseModel,
    llm: Llama,
    manifesto: Manifesto,
    prefix: list[int],
    cells: int,
    adapters: Adapters,
) -> None:
    """Write a state and its sidecar: both whole, then both at once.

    Between the two moves the sidecar's hash is another state's: such a session is made anew from
    the text that the sidecar holds when it is opened.
    """
    check_unchanged(model.header, *(adapter.header for adapter, _ in adapters))
    sidecar = Sidecar(
        superego=superego.__version__,
        llama_cpp_python=package_version("llama_cpp_python"),
        name=manifesto.name,
        manifesto=manifesto.body,
        base=model.name,
        base_fingerprint=model.fingerprint,
        template_sha256=_sha256(ChatTemplate(model.header).source.encode()),
        prefix_sha256=_sha256(_token_bytes(prefix)),
        prefix_tokens=len(prefix),
        cells=cells,
        adapters=[
            SessionAdapter(
                file=adapter.path.name, sha256=_sha256(adapter.path.read_bytes()), scale=scale
            )
            for adapter, scale in adapters
            if scale  # at 0 an adapter takes no part
        ],
        n_ctx=llm.n_ctx(),
        kv_type=kv_type_of(llm),
        flash_attention=True,
        state_version=VERSION,
        state_bytes=len(data),
        state_sha256=_sha256(data),
    )
    with replacing(sidecar_path(path)) as beside:
        beside.write_text(sidecar.model_dump_json(indent=1) + "\n", "utf-8")
        with replacing(path) as temporary:
            temporary.write_bytes(data)


def check_session(
    llm: Llama,
    model: BaseModel,
    template: ChatTemplate,
    path: Path,
    sidecar: Sidecar,
    prefix: list[int],
    adapters: Adapters,
) -> State:
    """Compare a session with the live model it is meant for; raises Unfit with the reason.

    `prefix` are the tokens of the sidecar's manifesto as this model's template renders it.
    """
    import llama_cpp

    def need(what: str, found: object, wanted: object, useless: bool = False) -> None:
        if found != wanted:  # hashes are compared whole and shown short
            made, here = str(found)[:12], str(wanted)[:12]
            raise Unfit(f"{path}: {what}: made with {made}, here {here}", useless)

    need("state version", sidecar.state_version, llama_cpp.LLAMA_STATE_SEQ_VERSION, True)
    need("base fingerprint", sidecar.base_fingerprint, model.fingerprint)
    need("chat template", sidecar.template_sha256, _sha256(template.source.encode()))
    need("key-value type", sidecar.kv_type, kv_type_of(llm))
    need("flash attention", sidecar.flash_attention, _flash(llm))
    if sidecar.cells > llm.n_ctx():
        raise Unfit(f"{path}: {sidecar.cells} cells do not fit the context of {llm.n_ctx()}")
    made = [(a.sha256, a.scale) for a in sidecar.adapters]
    here = [(_sha256(a.path.read_bytes()), scale) for a, scale in adapters if scale]
    if made != here:
        listed = ", ".join(f"{a.file}:{a.scale:g}" for a in sidecar.adapters) or "none"
        raise Unfit(f"{path}: adapters: made with {listed}, here {len(here)} that differ")
    need("manifesto as tokens", sidecar.prefix_sha256, _sha256(_token_bytes(prefix)))
    try:
        if path.is_symlink():
            raise Unfit(f"{path}: is a symbolic link")
        size = path.stat().st_size
        need("size in bytes", sidecar.state_bytes, size, True)
        data = path.read_bytes()
    except OSError as error:
        raise Unfit(f"{path}: cannot be read: {error.strerror}", useless=True) from None
    if _sha256(data) != sidecar.state_sha256:
        raise Unfit(f"{path}: its bytes are not those that were saved (SHA-256 differs)", True)
    try:
        state = parse(data, layout(model.header, sidecar.kv_type), path, llm.n_ctx())
    except SuperegoError as error:
        raise Unfit(str(error), useless=True) from None
    need("number of cells", sidecar.cells, len(state.tokens), True)
    if sidecar.cells == sidecar.prefix_tokens and state.tokens != prefix:
        raise Unfit(f"{path}: its tokens are not its manifesto's", useless=True)
    return state


class Session:
    """A manifesto's state in a live model: `tokens` are in its cache, `prefix` is the text."""

    def __init__(
        self, name: str, manifesto: str, prefix: list[int], tokens: list[int], note: str
    ) -> None:
        self.name = name
        self.manifesto = manifesto
        self.prefix = prefix
        self.tokens = tokens
        self.note = note  # why it was rebuilt; empty where it was restored

    def shorten(self, tokens: list[int]) -> list[int]:
        """A rendered conversation with the cells' tokens in the place of the manifesto's.

        The same list unless the session was compacted. Raises SuperegoError where the
        conversation does not start with this manifesto.
        """
        n = len(self.prefix)
        if tokens[:n] != self.prefix:
            raise SuperegoError(f"the conversation does not start with session '{self.name}'")
        return self.tokens + tokens[n:]


def open_session(
    llm: Llama,
    model: BaseModel,
    path: Path,
    adapters: Adapters = (),
    manifesto: Manifesto | None = None,
) -> Session:
    """Restore a session, or rebuild it from its manifesto with a note that says why.

    `manifesto` is what the session should be of, where the caller knows it: then it is also
    rebuilt where the sidecar is missing or holds another. Raises SuperegoError where there is
    no text to rebuild from.
    """
    template = ChatTemplate(model.header)
    sidecar: Sidecar | None = None
    reason: Unfit
    try:
        sidecar = read_sidecar(path)
        if manifesto is not None and sidecar.manifesto != manifesto.body:
            raise Unfit(f"{path}: is of another manifesto, '{sidecar.name}'")
        prefix = prefix_of(llm, template, sidecar.manifesto)
        state = check_session(llm, model, template, path, sidecar, prefix, adapters)
        put_state(llm, state)
        return Session(sidecar.name, sidecar.manifesto, prefix, state.tokens, "")
    except Unfit as error:
        reason = error
    if manifesto is None:
        if sidecar is None:
            raise SuperegoError(
                f"{reason}; a session cannot be used without it, and its manifesto's text is in "
                "it; give the manifesto too (chat: --system MANIFESTO), or make it again: "
                f"superego session MANIFESTO --base BASE -o {path}"
            ) from None
        manifesto = Manifesto(sidecar.name, sidecar.manifesto)
    prefix = prefix_of(llm, template, manifesto.body)
    prefill(llm, prefix)
    note = f"{reason}; the manifesto was read anew"
    if sidecar is not None and sidecar.cells < sidecar.prefix_tokens:
        note += f" in full ({len(prefix)} cells instead of {sidecar.cells})"
    elif reason.useless and os.access(path.absolute().parent, os.W_OK):
        _save(llm, model, manifesto, prefix, path, adapters)
        note += " and the session saved again"
    return Session(manifesto.name, manifesto.body, prefix, prefix, note)


def put_state(llm: Llama, state: State) -> None:
    """Put a checked state into sequence 0 of a live model, as if it had just been read."""
    llm.reset()
    llm._ctx.kv_cache_clear()
    put_cells(llm._ctx.ctx, state)
    llm.input_ids[: len(state.tokens)] = state.tokens
    llm.n_tokens = len(state.tokens)
    llm._requires_eval = True


def put_cells(context: Any, state: State) -> None:
    """Put a checked state into sequence 0 of an emptied llama.cpp context; raises Unfit."""
    import llama_cpp as c

    # the bytes that were checked, not the file: it could change between check and use
    data = _state(context)[:8] + state.body
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    if c.llama_state_seq_set_data(context, buffer, len(data), 0) != len(data):
        c.llama_memory_clear(c.llama_get_memory(context), True)
        raise Unfit("llama.cpp refused the state", useless=True)


def state_bytes(llm: Llama, tokens: list[int]) -> bytes:
    """A state file of sequence 0, as `llama_state_seq_save_file` writes it, in memory."""
    front = struct.pack("<III", MAGIC, VERSION, len(tokens)) + _token_bytes(tokens)
    return front + _state(llm._ctx.ctx)[8:]


def _state(context: Any) -> bytes:
    """llama.cpp's in-memory state of sequence 0: a magic of its own, the sequence, the cells."""
    import llama_cpp as c

    size = c.llama_state_seq_get_size(context, 0)
    buffer = (ctypes.c_uint8 * size)()
    if c.llama_state_seq_get_data(context, buffer, size, 0) != size or size < 8:
        raise SuperegoError("llama.cpp could not save its state")
    return bytes(buffer)


def prefill(
    llm: Llama, tokens: list[int], progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Read a manifesto into an emptied cache; raises SuperegoError where it is too long."""
    if len(tokens) >= llm.n_ctx():
        raise SuperegoError(
            f"manifesto of {len(tokens)} tokens does not fit the context of {llm.n_ctx()}; give "
            "a larger --n-ctx or shorten it"
        )
    llm.reset()
    llm._ctx.kv_cache_clear()
    for start in range(0, len(tokens), llm.n_batch):  # the pieces that eval would make
        llm.eval(tokens[start : start + llm.n_batch])
        progress(min(start + llm.n_batch, len(tokens)), len(tokens))


def kv_type_of(llm: Llama) -> Literal["f16", "q8_0"]:
    """The type of a live model's cached keys and values; raises Unfit for any other."""
    params = llm.context_params
    for name, kind in KV_TYPES.items():
        if params.type_k == kind and params.type_v == kind:
            return "f16" if name == "f16" else "q8_0"
    raise Unfit(f"key-value types {params.type_k} and {params.type_v}: expected f16 or q8_0 both")


def _flash(llm: Llama) -> bool:
    import llama_cpp

    return bool(llm.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED)


def _token_bytes(tokens: list[int]) -> bytes:
    return np.asarray(tokens, "<i4").tobytes()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
