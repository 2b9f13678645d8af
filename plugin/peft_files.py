"""A PEFT folder's tensor file: read without running anything in it, written as PEFT reads it.

Knows safetensors. Does not know what the tensors mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from superego.atomic import replacing
from superego.errors import SuperegoError

TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_KINDS: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_KEY = re.compile(r"(superego|general|adapter)\.[a-z0-9_.]{1,100}")
Metadata = dict[str, str | int | float]


def _safetensors(name: str = "safetensors") -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SuperegoError(
            f"this command needs {error.name}, which is not installed; pip install 'superego[peft]'"
        ) from None


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], Metadata]:
    """Tensors as float32 or float16 arrays, and what GGUF metadata the file carries.

    Raises SuperegoError for anything but a whole safetensors file of F32, F16 and BF16.
    """
    library = _safetensors()
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SuperegoError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        found = library.deserialize(raw)
    except library.SafetensorError as error:
        raise SuperegoError(f"{path}: not a whole safetensors file: {error}") from None
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in found:
        kind, data = str(tensor["dtype"]), bytes(tensor["data"])
        values: np.ndarray
        if kind == "BF16":  # the upper half of a float32
            bits = np.frombuffer(data, np.dtype("<u2")).astype(np.uint32) << 16
            values = bits.view(np.float32)
        elif kind in _KINDS:
            values = np.frombuffer(data, _KINDS[kind])
        else:
            raise SuperegoError(
                f"{path}: tensor '{name}' has type {kind}, expected F32, F16 or BF16"
            )
        tensors[name] = values.reshape(tensor["shape"])
    # the header has been checked by the library
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return tensors, _metadata(header.get("__metadata__", {}))


def _metadata(text: Mapping[str, str]) -> Metadata:
    """GGUF metadata among a header's own; what is not of a kind that GGUF takes is left out."""
    found: Metadata = {}
    for key, value in text.items():
        if _KEY.fullmatch(key):
            try:
                parsed = json.loads(value)
            except ValueError:
                continue
            whole = type(parsed) is int and 0 <= parsed < 2**32
            if isinstance(parsed, str) or whole or (type(parsed) is float and parsed - parsed == 0):
                found[key] = parsed
    return found


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Metadata) -> None:
    """Write float16 and float32 arrays, and GGUF metadata as JSON texts, atomically."""
    text = {"format": "pt", **{key: json.dumps(value) for key, value in metadata.items()}}
    library, save = _safetensors(), _safetensors("safetensors.numpy").save_file
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save(whole, temporary, metadata=text)
        except library.SafetensorError as error:  # also where the disk is full
            raise SuperegoError(f"{path}: cannot be written: {error}") from None
