"""Copies of adapter files in which some metadata or the matrices' shape is another.

Knows GGUF files and how llama.cpp multiplies a LoRA's matrices. Does not know who is served.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, ReaderField

from superego.adapter import Adapter, read_adapter, write_out
from superego.atomic import replacing
from superego.errors import SuperegoError
from superego.gguf_file import check_unchanged, read_raw, read_tensor

# key -> value, its type, and its elements' type where it is an array
Metadata = Mapping[str, tuple[Any, GGUFValueType, GGUFValueType | None]]
_TILE = 4  # llama.cpp's tiled product takes matrices whose rows are a multiple of this


def write_copy(
    adapter: Adapter,
    path: Path,
    changed: Metadata,
    matrices: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write an adapter again with changed metadata, atomically; raises SuperegoError.

    `matrices` (full tensor name -> F16 or F32) replace tensors; the others stay bit for bit.
    `path` may be the adapter's own.
    """
    matrices = matrices or {}
    check_unchanged(adapter.header)
    try:
        reader = GGUFReader(adapter.path)
    except (ValueError, LookupError, TypeError) as error:  # stricter than ours in places
        raise SuperegoError(f"{adapter.path}: GGUF is damaged: {error}") from None
    with replacing(path) as temporary:
        writer = GGUFWriter(temporary, adapter.header.text("general.architecture"))
        for key, field in reader.fields.items():
            if key.startswith("GGUF.") or key == "general.architecture" or key in changed:
                continue
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, _contents(adapter, key, field), field.types[0], inner)
        for key, (value, kind, inner) in changed.items():
            writer.add_key_value(key, value, kind, inner)
        for tensor in reader.tensors:
            if tensor.name in matrices:
                writer.add_tensor(tensor.name, matrices[tensor.name])
            else:
                raw = read_raw(adapter.header.tensors[tensor.name])
                writer.add_tensor(tensor.name, raw, raw_dtype=tensor.tensor_type)
        try:
            write_out(writer, temporary)
        except (ValueError, struct.error) as error:  # metadata that gguf reads but cannot write
            raise SuperegoError(f"{adapter.path}: its metadata is damaged: {error}") from None
        check_unchanged(adapter.header)
    read_adapter(path)


def _contents(adapter: Adapter, key: str, field: ReaderField) -> Any:
    try:
        return field.contents()
    except (ValueError, LookupError, TypeError) as error:
        raise SuperegoError(f"{adapter.path}: metadata key '{key}' is damaged: {error}") from None


def is_batch_invariant(adapter: Adapter) -> bool:
    """Whether llama.cpp on a CPU multiplies by its matrices alike for one column and for many.

    For several columns it takes a tiled product that sums in another order, where the rows
    are a multiple of 4 and the columns of its vector's width; a rank that is no multiple of 4
    keeps both A (r, in) and B (out, r) from it.
    """
    return all(a.shape[0] % _TILE for a, _ in adapter.pairs.values())


def write_batch_invariant(adapter: Adapter, path: Path) -> None:
    """Write an adapter that does the same, each rank raised to no multiple of 4 with zeros.

    alpha / rank goes into B, and alpha becomes 0 (llama.cpp: the user's scale alone).
    """
    matrices = {}
    for name, halves in adapter.pairs.items():
        a, b = map(read_tensor, halves)
        rank = len(a)
        extra = 0 if rank % _TILE else 1
        factor = adapter.alpha / rank if adapter.alpha else 1.0
        scaled = b.astype(np.float32) * factor
        kind = b.dtype if np.abs(scaled).max(initial=0) < 6e4 else np.dtype(np.float32)
        matrices[f"{name}.lora_a"] = np.pad(a, ((0, extra), (0, 0)))
        matrices[f"{name}.lora_b"] = np.pad(scaled, ((0, 0), (0, extra))).astype(kind)
    alpha = {"adapter.lora.alpha": (0.0, GGUFValueType.FLOAT32, None)}
    write_copy(adapter, path, alpha, matrices)


def batch_invariant(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Batch-invariant adapters in the same order: those that are as they are, else copies."""
    found = []
    for i, path in enumerate(paths):
        adapter = read_adapter(path)
        if is_batch_invariant(adapter):
            found.append(path)
        else:
            found.append(folder / f"{i}.gguf")
            write_batch_invariant(adapter, found[-1])
    return found
