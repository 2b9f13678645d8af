"""Reads a GGUF file's header in plain Python, trusting none of its numbers.

Knows the container format. Does not know what the metadata means. Everything is
checked here, before gguf-py allocates from a length field or C++ sees the file.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superego.errors import SuperegoError

if TYPE_CHECKING:
    import numpy as np
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
UINT32, FLOAT32 = 4, 6  # values of `Header.types`
_MAX_DIMS = 4
# What a header may hold at most, several times what the largest models have: without these the
# bytes of a large file, read as metadata, would become Python objects of many times their size.
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 16
_MAX_NAME = 1 << 12  # bytes of a key or a tensor's name
_MAX_VALUES = 1 << 22  # in all arrays together
_BLOCK = 1 << 20  # read at once, of strings
_MAX_BYTES = 1 << 28  # of the whole header


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
    types: dict[str, int]  # of the metadata, as the format numbers them; an array's is its own
    modified: int  # nanoseconds since 1970, when it was read
    parts: tuple[Header, ...] = ()  # each file's own, where the model is split over several

    def text(self, key: str, default: str = "") -> str:
        """A string value, or the default where the key is absent or not a string."""
        value = self.metadata.get(key, default)
        return value if isinstance(value, str) else default


class _Reader:
    def __init__(self, file: BufferedReader, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size
        self.values = 0  # of all arrays so far

    def damaged(self, problem: str) -> SuperegoError:
        return SuperegoError(f"{self.path}: GGUF is damaged: {problem}")

    def take(self, n: int, what: str) -> bytes:
        at = self.file.tell()
        if n > self.size - at:
            raise SuperegoError(
                f"{self.path}: GGUF is truncated or damaged: {what} needs {n:,} bytes at offset "
                f"{at:,}, the file ends at {self.size:,}"
            )
        if at + n > _MAX_BYTES:
            raise self.damaged(
                f"{what} ends behind the {_MAX_BYTES:,} bytes that a header may have"
            )
        found = self.file.read(n)
        if len(found) != n:
            raise SuperegoError(f"{self.path}: ended early; did something else change it?")
        return found

    def scalar(self, kind: int, what: str) -> Any:
        code, width = _SCALARS[kind]
        return struct.unpack(code, self.take(width, what))[0]

    def string(self, what: str) -> str:
        return self.take(self.scalar(10, what), what).decode("utf-8", "replace")

    def strings(self, count: int, what: str) -> list[str]:
        """As `string` so many times, out of blocks: a vocabulary is 100,000 short ones."""
        found: list[str] = []
        while len(found) < count:
            start, at = self.file.tell(), 0
            block = self.file.read(min(_BLOCK, max(_MAX_BYTES - start, 0)))
            while len(found) < count and at + 8 <= len(block):
                text = at + 8
                end = text + int.from_bytes(block[at:text], "little")
                if end > len(block):
                    break
                found.append(block[text:end].decode("utf-8", "replace"))
                at = end
            self.file.seek(start + at)
            if len(found) < count:  # it crosses the block's end, or is not all there
                found.append(self.string(what))
        return found

    def name(self, what: str) -> str:
        length = self.scalar(10, what)
        if length > min(_MAX_NAME, self.size):
            self.take(length, what)  # says so where the file is shorter
            raise self.damaged(f"a {what} of {length:,} bytes")
        return self.take(length, what).decode("utf-8", "replace")

    def count(self, what: str, most: int) -> int:
        found = self.scalar(10, what)
        if found > most:
            raise self.damaged(f"{what} is {found:,}, expected at most {most:,}")
        return int(found)

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(kind, key)
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key)
        raise self.damaged(f"metadata key '{key}' has unknown type {kind}")

    def array(self, key: str) -> list[Any]:
        item, count = self.scalar(4, key), self.scalar(10, key)
        if item not in _SCALARS and item != _STRING:
            raise self.damaged(f"metadata key '{key}' is an array of unknown type {item}")
        # a string takes at least its length field: bounds the count before looping
        code, width = _SCALARS.get(item, ("", 8))
        if count * width > self.size - self.file.tell():
            self.take(count * width, key)  # says where the file ends
        self.values += count
        if self.values > _MAX_VALUES:
            raise self.damaged(
                f"its arrays up to '{key}' hold {self.values:,} values, expected at most "
                f"{_MAX_VALUES:,}"
            )
        if item == _STRING:
            return self.strings(count, key)
        return list(struct.unpack(f"<{count}{code[1]}", self.take(width * count, key)))


def read_header(path: Path) -> Header:
    """Parse and check the header; raises SuperegoError for anything but a whole GGUF."""
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise SuperegoError(f"{path}: is a directory (expected a GGUF file)")
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
            raise SuperegoError(f"{path}: is not a regular file (expected a GGUF file)")
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            return _parse(_Reader(file, path, found.st_size), found.st_mtime_ns)
    except FileNotFoundError:
        raise SuperegoError(f"{path}: no such file (expected a GGUF)") from None
    except OSError as error:
        raise SuperegoError(f"{path}: cannot be read: {error.strerror}") from None
    except (struct.error, MemoryError, OverflowError, ValueError) as error:
        raise SuperegoError(f"{path}: GGUF is damaged: {error}") from None


def check_unchanged(*headers: Header) -> None:
    """Raise SuperegoError where a file is not the one any more that its header was read from.

    Told by size and time of change. To be asked before what was computed from it is written.
    """
    for header in headers:
        for part in header.parts or (header,):
            try:
                now = os.stat(part.path)
            except OSError as error:
                raise SuperegoError(
                    f"{part.path}: was removed while it was in use ({error.strerror}); nothing "
                    "was written"
                ) from None
            if (now.st_size, now.st_mtime_ns) != (part.size, part.modified):
                raise SuperegoError(
                    f"{part.path}: was changed while it was in use ({part.size:,} bytes before, "
                    f"{now.st_size:,} now); nothing was written, run the command again"
                )


def read_raw(tensor: TensorInfo, first: int = 0, rows: int | None = None) -> np.ndarray:
    """A tensor's bytes, (rows, bytes a row) uint8, all or `rows` of its innermost from `first`.

    Read, not mapped: a file that is cut short meanwhile is a SuperegoError here, where a
    mapped one ends the process.
    """
    import numpy as np
    from gguf.quants import quant_shape_to_byte_shape

    *outer, width = quant_shape_to_byte_shape(tensor.shape, tensor.type)
    whole = int(np.prod(outer, dtype=np.int64))
    rows = whole - first if rows is None else rows
    found = np.empty((rows, width), np.uint8)
    try:
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset + first * width)
            view, done = found.reshape(-1).data, 0
            while done < found.nbytes:
                n = file.readinto(view[done:])
                if not n:
                    raise SuperegoError(
                        f"{tensor.path}: ended inside tensor '{tensor.name}'; something else cut "
                        "it short"
                    )
                done += n
    except OSError as error:
        raise SuperegoError(f"{tensor.path}: cannot be read: {error.strerror}") from None
    return found


def read_tensor(tensor: TensorInfo) -> np.ndarray:
    """A tensor's values in its shape, of the type that its dequantization gives.

    Raises SuperegoError where the file cannot be read or gguf cannot dequantize the type.
    """
    import numpy as np
    from gguf import dequantize
    from gguf.quants import quant_shape_to_byte_shape

    raw = read_raw(tensor).reshape(quant_shape_to_byte_shape(tensor.shape, tensor.type))
    try:
        return np.asarray(dequantize(raw, tensor.type)).reshape(tensor.shape)
    except (NotImplementedError, ValueError) as error:
        raise SuperegoError(
            f"{tensor.path}: tensor '{tensor.name}' of type {tensor.type.name} cannot be read: "
            f"{error}"
        ) from None


def metadata_spans(header: Header) -> dict[str, tuple[int, int]]:
    """Where each metadata entry lies in the file, its key included: start and end byte."""
    spans = {}
    with header.path.open("rb") as file:
        reader = _Reader(file, header.path, header.size)
        reader.take(16, "counts")
        for _ in range(reader.scalar(10, "key count")):
            start = file.tell()
            key = reader.name("metadata key")
            reader.value(reader.scalar(4, key), key)
            spans[key] = (start, file.tell())
    return spans


def _parse(reader: _Reader, modified: int) -> Header:
    from gguf import GGML_QUANT_SIZES  # its import takes longer than a header

    path = reader.path
    magic = reader.file.read(4)
    if magic != b"GGUF":
        raise SuperegoError(
            f"{path}: not a GGUF file (starts with {magic!r}, expected b'GGUF'); "
            "give a model or an adapter as llama.cpp loads it"
        )
    version = reader.scalar(4, "version")
    if version not in (2, 3):
        raise SuperegoError(f"{path}: GGUF version {version} is not supported (expected 2 or 3)")
    n_tensors = reader.count("tensor count", _MAX_TENSORS)
    metadata: dict[str, Any] = {}
    types = {}
    for _ in range(reader.count("key count", _MAX_KEYS)):
        key = reader.name("metadata key")
        if key in metadata:
            raise reader.damaged(f"two metadata keys '{key}'")
        kind = reader.scalar(4, key)
        metadata[key] = reader.value(kind, key)
        types[key] = kind
    found = []
    for _ in range(n_tensors):
        name = reader.name("tensor name")
        n_dims = reader.scalar(4, name)
        if n_dims > _MAX_DIMS:
            raise reader.damaged(f"tensor '{name}' has {n_dims} dimensions")
        shape = tuple(reader.scalar(10, name) for _ in range(n_dims))[::-1] or (1,)
        if 0 in shape:
            raise reader.damaged(f"tensor '{name}' is empty: {shape}")
        kind = reader.scalar(4, name)
        found.append((name, shape, _type(path, name, kind), reader.scalar(10, name)))
    table_bytes = reader.file.tell()
    alignment = metadata.get("general.alignment", 32)
    if (
        types.get("general.alignment", UINT32) != UINT32
        or not 0 < alignment <= 1 << 20
        or alignment & (alignment - 1)
    ):
        raise reader.damaged(f"alignment {alignment!r}, expected a power of two")
    data = -(-table_bytes // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in found:
        block, width = GGML_QUANT_SIZES[kind]
        count = 1
        for n in shape:
            count *= n
        if shape[-1] % block:
            raise reader.damaged(
                f"rows of tensor '{name}' have {shape[-1]} values, not a multiple of "
                f"{kind.name}'s block of {block}"
            )
        if offset % alignment:
            raise reader.damaged(f"tensor '{name}' is not aligned to {alignment} bytes")
        n_bytes = count // block * width
        if data + offset + n_bytes > reader.size:
            raise SuperegoError(
                f"{path}: GGUF is truncated: tensor '{name}' ends at byte "
                f"{data + offset + n_bytes:,}, the file at {reader.size:,}; download it again"
            )
        if name in tensors:
            raise reader.damaged(f"two tensors named '{name}'")
        tensors[name] = TensorInfo(name, shape, kind, data + offset, n_bytes, path)
    return Header(path, metadata, tensors, reader.size, table_bytes, types, modified)


def _type(path: Path, name: str, kind: int) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind)
    except ValueError:
        raise SuperegoError(
            f"{path}: tensor '{name}' has unknown quantization type {kind}; "
            "update the gguf package or re-quantize the model"
        ) from None
