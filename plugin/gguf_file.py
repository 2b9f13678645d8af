"""Reads a GGUF file's header in plain Python, trusting none of its numbers.

Knows the container format. Does not know what the metadata means. Everything is
checked here, before gguf-py allocates from a length field or C++ sees the file.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superego.errors import SuperegoError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_SCALARS = {
    0: ("<B", 1),
    1: ("<b", 1),
    2: ("<H", 2),
    3: ("<h", 2),
    4: ("<I", 4),
    5: ("<i", 4),
    6: ("<f", 4),
    7: ("<?", 1),
    10: ("<Q", 8),
    11: ("<q", 8),
    12: ("<d", 8),
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place: `shape` as numpy has it, outermost first (the file has it reversed)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    n_bytes: int
    path: Path  # of the file that holds it: split models have several


@dataclass(frozen=True)
class Header:
    """A GGUF's metadata and tensor table. Long arrays are kept as lists of their values."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    size: int  # bytes of the file
    table_bytes: int  # bytes up to the end of the tensor table
    parts: tuple[Header, ...] = ()  # each file's own, where the model is split over several

    def text(self, key: str, default: str = "") -> str:
        """A string value, or the default where the key is absent or not a string."""
        value = self.metadata.get(key, default)
        return value if isinstance(value, str) else default


class _Reader:
    def __init__(self, file: BufferedReader, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.file.tell():
            raise SuperegoError(
                f"{self.path}: GGUF is truncated or damaged: {what} needs {n:,} bytes at offset "
                f"{self.file.tell():,}, the file ends at {self.size:,}"
            )
        return self.file.read(n)

    def scalar(self, kind: int, what: str) -> Any:
        code, width = _SCALARS[kind]
        return struct.unpack(code, self.take(width, what))[0]

    def string(self, what: str) -> str:
        return self.take(self.scalar(10, what), what).decode("utf-8", "replace")

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(kind, key)
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY and depth == 0:
            item, count = self.scalar(4, key), self.scalar(10, key)
            if item in _SCALARS:
                code, width = _SCALARS[item]
                raw = self.take(width * count, key)
                return list(struct.unpack(f"<{count}{code[1]}", raw))
            # a string takes at least its length field: bounds the count before looping
            if 8 * count > self.size - self.file.tell():
                self.take(8 * count, key)
            return [self.value(item, key, depth + 1) for _ in range(count)]
        raise SuperegoError(
            f"{self.path}: GGUF is damaged: metadata key '{key}' has unknown type {kind}"
        )


def read_header(path: Path) -> Header:
    """Parse and check the header; raises SuperegoError for anything but a whole GGUF."""
    try:
        size = os.stat(path).st_size
        with path.open("rb") as file:
            return _parse(_Reader(file, path, size))
    except FileNotFoundError:
        raise SuperegoError(f"{path}: no such file (expected a GGUF)") from None
    except IsADirectoryError:
        raise SuperegoError(f"{path}: is a directory (expected a GGUF file)") from None
    except OSError as error:
        raise SuperegoError(f"{path}: cannot be read: {error.strerror}") from None
    except (struct.error, MemoryError, OverflowError) as error:
        raise SuperegoError(f"{path}: GGUF is damaged: {error}") from None


def metadata_spans(header: Header) -> dict[str, tuple[int, int]]:
    """Where each metadata entry lies in the file, its key included: start and end byte."""
    spans = {}
    with header.path.open("rb") as file:
        reader = _Reader(file, header.path, header.size)
        reader.take(16, "counts")
        for _ in range(reader.scalar(10, "key count")):
            start = file.tell()
            key = reader.string("metadata key")
            reader.value(reader.scalar(4, key), key)
            spans[key] = (start, file.tell())
    return spans


def _parse(reader: _Reader) -> Header:
    from gguf import GGML_QUANT_SIZES  # its import takes longer than a header

    path = reader.path
    magic = reader.file.read(4)
    if magic != b"GGUF":
        raise SuperegoError(
            f"{path}: not a GGUF file (starts with {magic!r}, expected b'GGUF'); "
            "give the model file that llama.cpp or Ollama loads"
        )
    version = reader.scalar(4, "version")
    if version not in (2, 3):
        raise SuperegoError(f"{path}: GGUF version {version} is not supported (expected 2 or 3)")
    n_tensors, n_keys = reader.scalar(10, "tensor count"), reader.scalar(10, "key count")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = reader.string("metadata key")
        metadata[key] = reader.value(reader.scalar(4, key), key)
    found = []
    for _ in range(n_tensors):
        name = reader.string("tensor name")
        n_dims = reader.scalar(4, name)
        if n_dims > _MAX_DIMS:
            raise SuperegoError(f"{path}: GGUF is damaged: tensor '{name}' has {n_dims} dimensions")
        shape = tuple(reader.scalar(10, name) for _ in range(n_dims))[::-1]
        kind = reader.scalar(4, name)
        found.append((name, shape, _type(path, name, kind), reader.scalar(10, name)))
    table_bytes = reader.file.tell()
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise SuperegoError(f"{path}: GGUF is damaged: alignment {alignment!r}")
    data = -(-table_bytes // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in found:
        block, width = GGML_QUANT_SIZES[kind]
        count = 1
        for n in shape:
            count *= n
        if shape and shape[-1] % block:
            raise SuperegoError(
                f"{path}: GGUF is damaged: rows of tensor '{name}' have {shape[-1]} values, "
                f"not a multiple of {kind.name}'s block of {block}"
            )
        n_bytes = count // block * width
        if data + offset + n_bytes > reader.size:
            raise SuperegoError(
                f"{path}: GGUF is truncated: tensor '{name}' ends at byte "
                f"{data + offset + n_bytes:,}, the file at {reader.size:,}; download it again"
            )
        if name in tensors:
            raise SuperegoError(f"{path}: GGUF is damaged: two tensors named '{name}'")
        tensors[name] = TensorInfo(name, shape, kind, data + offset, n_bytes, path)
    return Header(path, metadata, tensors, reader.size, table_bytes)


def _type(path: Path, name: str, kind: int) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind)
    except ValueError:
        raise SuperegoError(
            f"{path}: tensor '{name}' has unknown quantization type {kind}; "
            "update the gguf package or re-quantize the model"
        ) from None
