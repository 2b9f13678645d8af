"""Loads a base in llama.cpp and turns text into tokens.

Knows llama-cpp-python. Does not know about manifestos or measures.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING, Any

import jinja2
import psutil

from superego.base import BaseModel
from superego.errors import SuperegoError
from superego.loadable import check_loadable
from superego.state_file import KV_TYPES, layout
from superego.template import check_templates

if TYPE_CHECKING:
    from llama_cpp import Llama

_callbacks: list[Any] = []  # ctypes callbacks must outlive their registration


def default_threads() -> int:
    """Processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)


def silence() -> None:
    """Silence llama.cpp's log: one warning per adapter tensor is no news to a user."""
    import llama_cpp

    if not _callbacks:
        callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
        _callbacks.append(callback)
        llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))


def load(
    base: BaseModel,
    n_ctx: int = 4096,
    threads: int | None = None,
    gpu_layers: int = -1,
    vocab_only: bool = False,
    seed: int = 0,
    kv_type: str = "f16",
) -> Llama:
    """A `llama_cpp.Llama` on this base; raises SuperegoError where llama.cpp cannot load it.

    Flash attention is on, as stock llama.cpp has it. `gpu_layers` -1 means all, which has
    an effect only where llama.cpp was built for a GPU (Metal on macOS). `kv_type` is that of
    the cached keys and values, f16 or q8_0.
    """
    import llama_cpp

    silence()
    check_loadable(base.header)
    _check_context(base, n_ctx, kv_type)
    check_templates(base.header)  # which llama-cpp-python compiles, without limits
    try:
        return llama_cpp.Llama(
            str(base.path),
            # llama.cpp pads contexts to 256 cells, llama-cpp-python's own buffers it does not
            n_ctx=-(-n_ctx // 256) * 256,
            n_threads=threads or default_threads(),
            n_threads_batch=threads or default_threads(),
            n_gpu_layers=gpu_layers,
            vocab_only=vocab_only,
            flash_attn=True,
            swa_full=True,  # windowed layers keep all cells: llama-cpp-python goes back in them
            type_k=int(KV_TYPES[kv_type]),
            type_v=int(KV_TYPES[kv_type]),
            seed=seed,
            verbose=False,
        )
    except (ValueError, RuntimeError, OSError, jinja2.TemplateError) as error:
        raise SuperegoError(f"{base.path}: llama.cpp cannot load it: {error}") from None


def _check_context(base: BaseModel, n_ctx: int, kv_type: str) -> None:
    """Refuse a context whose keys and values do not fit the memory that is free."""
    import llama_cpp

    if llama_cpp.llama_supports_gpu_offload():
        return  # they lie in another memory
    try:
        needed = n_ctx * layout(base.header, kv_type).cell_bytes
    except SuperegoError:  # llama.cpp may know caches that sessions do not
        return
    free = psutil.virtual_memory().available
    if needed > free:
        raise SuperegoError(
            f"a context of {n_ctx:,} tokens takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
            "of memory are free; give a smaller --n-ctx"
        )


def tokenize(llm: Llama, text: str) -> list[int]:
    """Tokens of text that a chat template rendered: special tokens parsed, none added."""
    return llm.tokenize(text.encode(), add_bos=False, special=True)


def stop_tokens(llm: Llama) -> set[int]:
    """Every token that ends a reply."""
    import llama_cpp

    vocab = llm._model.vocab
    return {t for t in range(llm.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, t)}


def peak_memory() -> int:
    """Bytes this process has held at most."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
