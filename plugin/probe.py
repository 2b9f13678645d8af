"""Imports packages one after the other and says what came of each; the child of `installed`.

Knows how llama.cpp and torch name their devices. A broken package may end this process: the one
that was begun last is to blame.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from superego.child import say

# What Superego calls in llama.cpp beside the Llama class.
_NEEDED = (
    "llama_adapter_lora_init", "llama_set_adapters_lora", "llama_state_seq_get_data",
    "llama_state_seq_set_data", "llama_model_quantize", "llama_vocab_get_attr",
)  # fmt: skip


def main(names: Sequence[str]) -> None:
    """Import each and say its version, or what was wrong with it."""
    for name in names:
        say(begin=name)
        try:
            module = importlib.import_module(name)
            details = _DETAILS[name](module) if name in _DETAILS else {}
        except BaseException as error:  # a broken package may raise anything, SystemExit too
            words = " ".join(str(error).split())
            say(name=name, error=f"{type(error).__name__}: {words}"[:400])
        else:
            say(name=name, version=str(getattr(module, "__version__", "")), **details)


def _llama_cpp(module: Any) -> dict[str, Any]:
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    built = module.llama_print_system_info().decode("utf-8", "replace")
    found: dict[str, Any] = {
        "missing": missing,
        "built for": [
            name.strip().rpartition(":")[2].strip()
            for name, equals, value in (part.partition("=") for part in built.split("|"))
            if equals and value.strip() == "1"
        ],
        "state version": getattr(module, "LLAMA_STATE_SEQ_VERSION", None),
    }
    with contextlib.suppress(AttributeError, OSError):
        found["llama.cpp"] = module.llama_version().decode()
    with contextlib.suppress(AttributeError, OSError, ImportError):
        ggml = importlib.import_module("llama_cpp._ggml").libggml
        found |= _ggml(ggml)
    return found


def _ggml(library: Any) -> dict[str, Any]:
    """ggml's own version and its devices: names, descriptions, memory."""

    def call(name: str, result: Any, *kinds: Any) -> Any:
        function = getattr(library, name)
        function.restype, function.argtypes = result, list(kinds)
        return function

    handle, size = ctypes.c_void_p, ctypes.c_size_t
    commit = call("ggml_commit", ctypes.c_char_p)().decode()
    get = call("ggml_backend_dev_get", handle, size)
    name = call("ggml_backend_dev_name", ctypes.c_char_p, handle)
    description = call("ggml_backend_dev_description", ctypes.c_char_p, handle)
    kind = call("ggml_backend_dev_type", ctypes.c_int, handle)
    memory = call(
        "ggml_backend_dev_memory", None, handle, ctypes.POINTER(size), ctypes.POINTER(size)
    )
    devices = []
    for index in range(call("ggml_backend_dev_count", size)()):
        device = get(index)
        free, total = size(), size()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        devices.append(
            {
                "name": name(device).decode("utf-8", "replace"),
                "description": description(device).decode("utf-8", "replace"),
                "is CPU": kind(device) == 0,
                "memory": total.value,
            }
        )
    return {"build": commit, "devices": devices}


def _torch(module: Any) -> dict[str, Any]:
    devices = []
    if module.cuda.is_available():
        devices += [
            f"cuda:{i} {module.cuda.get_device_name(i)}" for i in range(module.cuda.device_count())
        ]
    if module.backends.mps.is_available():
        devices.append("mps")
    return {"devices": devices, "built for CUDA": module.version.cuda}


_DETAILS: dict[str, Callable[[Any], dict[str, Any]]] = {"llama_cpp": _llama_cpp, "torch": _torch}
