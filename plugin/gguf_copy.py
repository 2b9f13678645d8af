"""A GGUF written anew: what is not changed is copied byte for byte.

Knows the container format. Does not know why a tensor changes, or to what.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from superego.errors import SuperegoError
from superego.gguf_file import Header, TensorInfo, metadata_spans

_BLOCK = 8 << 20  # bytes copied at once
# Written as text, a bool, a float32, a u32 (i64 where it does not fit), an array of u32.
Value = str | int | float | bool | list[int]
# Writes a changed tensor's bytes, all of them, at the file's position.
Write = Callable[[BinaryIO, TensorInfo, GGMLQuantizationType], None]


def size_of(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor of this shape and type."""
    block, width = GGML_QUANT_SIZES[kind]
    count = 1
    for n in shape:
        count *= n
    return count // block * width


def copy_gguf(
    source: Header,
    target: Path,
    keys: Mapping[str, Value],
    changed: Mapping[str, GGMLQuantizationType],
    write: Write,
    progress: Callable[[int, int], None] = lambda done, total: None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Write `source` to `target`: `keys` replaced or added, `changed` tensors by `write`.

    `shapes` are those of changed tensors that get another one. Everything else is copied in its
    order. Raises OSError where the disk is full, SuperegoError where `source` was cut short.
    """
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()} | dict(shapes or {})
    spans = metadata_spans(source)
    alignment = source.metadata.get("general.alignment", 32)
    with source.path.open("rb") as old, target.open("wb") as new:
        version = old.read(8)[4:]
        kept = [span for key, span in spans.items() if key not in keys]
        new.write(b"GGUF" + version)
        new.write(struct.pack("<QQ", len(source.tensors), len(kept) + len(keys)))
        for start, end in kept:
            _copy(old, new, start, end - start)
        for key, value in keys.items():
            new.write(_text(key) + _value(value))
        place = 0
        for tensor in source.tensors.values():
            kind = changed.get(tensor.name, tensor.type)
            shape = shapes[tensor.name]
            new.write(_text(tensor.name) + struct.pack("<I", len(shape)))
            new.write(struct.pack(f"<{len(shape)}Q", *reversed(shape)))
            new.write(struct.pack("<IQ", int(kind), place))
            place += -(-size_of(shape, kind) // alignment) * alignment
        for done, tensor in enumerate(source.tensors.values()):
            new.write(bytes(-new.tell() % alignment))
            before = new.tell()
            kind = changed.get(tensor.name, tensor.type)
            if tensor.name in changed:
                write(new, tensor, kind)
            else:
                _copy(old, new, tensor.offset, tensor.n_bytes)
            if new.tell() - before != size_of(shapes[tensor.name], kind):
                raise AssertionError(f"{tensor.name}: wrote {new.tell() - before} bytes")
            progress(done + 1, len(source.tensors))
        new.write(bytes(-new.tell() % alignment))


def _copy(old: BinaryIO, new: BinaryIO, start: int, length: int) -> None:
    old.seek(start)
    while length:
        block = old.read(min(length, _BLOCK))
        if not block:
            raise SuperegoError(f"{old.name}: ended early; did something else change it?")
        new.write(block)
        length -= len(block)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        return struct.pack(f"<IIQ{len(value)}I", 9, 4, len(value), *value)
    if isinstance(value, int):
        fits = 0 <= value < 2**32
        return struct.pack("<II" if fits else "<Iq", 4 if fits else 11, value)
    return struct.pack("<If", 6, value)
