"""llama.cpp's sequence-state file (`ggsq`), read and checked in Python before C++ sees it.

Knows the bytes of version 3 for key-value caches in one stream: one cache, or two where some
layers see a window only. Does not know what the cells mean or which manifesto they came from.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from superego.architectures import ARCHITECTURES, layer_windows
from superego.errors import SuperegoError
from superego.gguf_file import Header

MAGIC, VERSION = 0x67677371, 3
KV_TYPES = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}
# Metadata of caches whose state is laid out otherwise: windows, recurrence, compression.
_OTHER_CACHES = (
    "attention.sliding_window",
    "attention.kv_lora_rank",
    "rope.dimension_sections",
    "ssm.state_size",
    "wkv.head_size",
)


@dataclass(frozen=True)
class Cache:
    """One of a model's caches: its layers, and how many tokens back it is kept (0: all)."""

    layers: tuple[int, ...]
    window: int

    def cells(self, n: int) -> int:
        """Cells of a text of n tokens that a state holds."""
        return min(n, self.window) if self.window else n


@dataclass(frozen=True)
class Layout:
    """Bytes of one cell's keys and values in every layer, and the caches they are in."""

    kv_type: GGMLQuantizationType
    key_bytes: tuple[int, ...]  # one a layer
    value_bytes: tuple[int, ...]
    n_vocab: int
    caches: tuple[Cache, ...]

    @property
    def cell_bytes(self) -> int:
        """Bytes a token takes in the file, its places included, while windows are not full."""
        return 12 * len(self.caches) + sum(self.key_bytes) + sum(self.value_bytes)

    def file_bytes(self, n_tokens: int) -> int:
        """The exact size of a file of so many tokens."""
        size = 12 + 4 * n_tokens
        for cache in self.caches:
            row = sum(self.key_bytes[i] + self.value_bytes[i] for i in cache.layers)
            size += 16 + 24 * len(cache.layers) + cache.cells(n_tokens) * (12 + row)
        return size


@dataclass(frozen=True)
class State:
    """A state file's contents: the last cell of a layer holds the text's last position."""

    tokens: list[int]
    keys: list[np.ndarray]  # a layer: (cells, bytes of a key row) uint8
    values: list[np.ndarray]
    body: bytes  # what llama.cpp reads behind the tokens


def layout(header: Header, kv_type: str) -> Layout:
    """The layout of a base's cells; raises SuperegoError for caches of another kind."""
    architecture = header.text("general.architecture")
    value = header.metadata.get
    odd = [key for key in _OTHER_CACHES if value(f"{architecture}.{key}")]
    if odd and architecture not in ARCHITECTURES:
        raise SuperegoError(
            f"{header.path}: sessions need a plain key-value cache; '{architecture}' with "
            f"{odd[0]} keeps another kind of state"
        )
    try:
        n_layer = int(value(f"{architecture}.block_count", 0))
        n_head = int(value(f"{architecture}.attention.head_count", 0))
        d_model = int(value(f"{architecture}.embedding_length", 0))
        kv = value(f"{architecture}.attention.head_count_kv", n_head)
        if not 0 < n_layer < 10_000:
            raise ValueError(f"block_count is {n_layer}")
        heads = [int(h) for h in kv] if isinstance(kv, list) else [int(kv)] * n_layer
        head_dim = d_model // n_head
        key = int(value(f"{architecture}.attention.key_length", head_dim))
        val = int(value(f"{architecture}.attention.value_length", head_dim))
        n_vocab = header.tensors["token_embd.weight"].shape[0]
    except (TypeError, ValueError, ArithmeticError, KeyError) as error:
        raise SuperegoError(f"{header.path}: its metadata gives no cache sizes: {error}") from None
    if len(heads) != n_layer:
        raise SuperegoError(f"{header.path}: head_count_kv has {len(heads)} of {n_layer} layers")
    kind = KV_TYPES[kv_type]
    block, size = GGML_QUANT_SIZES[kind]

    def row(n: int) -> int:
        if n % block:
            raise SuperegoError(
                f"{header.path}: rows of {n} values do not divide into {kv_type} blocks of {block}"
            )
        return n // block * size

    return Layout(
        kind,
        tuple(row(h * key) for h in heads),
        tuple(row(h * val) for h in heads),
        n_vocab,
        _caches(header, n_layer),
    )


def _caches(header: Header, n_layer: int) -> tuple[Cache, ...]:
    """llama.cpp keeps the layers that see everything in one cache, windowed ones in another."""
    known = header.text("general.architecture") in ARCHITECTURES
    windows = layer_windows(header) if known else (0,) * n_layer
    everything = tuple(i for i, window in enumerate(windows) if not window)
    windowed = tuple(i for i, window in enumerate(windows) if window)
    if not windowed:
        return (Cache(everything, 0),)
    return (Cache(everything, 0), Cache(windowed, max(windows)))


def parse(data: bytes, expected: Layout, path: Path, max_cells: int) -> State:
    """Check every byte that llama.cpp would act on; raises SuperegoError at the first misfit."""

    def need(what: str, found: object, wanted: object) -> None:
        if found != wanted:
            raise SuperegoError(f"{path}: {what} is {found}, expected {wanted}")

    if len(data) < 12:
        raise SuperegoError(f"{path}: {len(data)} bytes are no state file")
    magic, version, n_tokens = struct.unpack_from("<III", data)
    need("magic", f"{magic:08x}", f"{MAGIC:08x}")
    need("state version", version, VERSION)
    if not 0 < n_tokens <= max_cells:
        raise SuperegoError(f"{path}: holds {n_tokens} tokens, expected 1 to {max_cells}")
    need("size in bytes", len(data), expected.file_bytes(n_tokens))
    tokens = np.frombuffer(data, "<i4", n_tokens, 12)
    if tokens.min() < 0 or tokens.max() >= expected.n_vocab:
        raise SuperegoError(f"{path}: holds tokens outside the vocabulary of {expected.n_vocab}")
    at = body = 12 + 4 * n_tokens
    found: dict[str, dict[int, np.ndarray]] = {"key": {}, "value": {}}
    for cache in expected.caches:
        streams, cells = struct.unpack_from("<II", data, at)
        need("number of streams", streams, 1)
        need("number of cells", cells, cache.cells(n_tokens))
        places = np.frombuffer(data, "<i4", 3 * cells, at + 8).reshape(cells, 3)
        positions = np.arange(n_tokens - cells, n_tokens)
        if (places != np.stack([positions, np.ones(cells), np.zeros(cells)], 1)).any():
            raise SuperegoError(
                f"{path}: its cells are not positions {n_tokens - cells} to {n_tokens - 1} of "
                "sequence 0"
            )
        at += 8 + 12 * cells
        transposed, n_layer = struct.unpack_from("<II", data, at)
        need("value transposition", transposed, 0)
        need("number of layers", n_layer, len(cache.layers))
        at += 8
        for what, sizes in (("key", expected.key_bytes), ("value", expected.value_bytes)):
            for index in cache.layers:
                size = sizes[index]
                kind, width = struct.unpack_from("<iQ", data, at)
                need(f"{what} type of layer {index}", kind, int(expected.kv_type))
                need(f"{what} row size of layer {index}", width, size)
                rows = np.frombuffer(data, np.uint8, cells * size, at + 12).reshape(cells, size)
                half = expected.kv_type == GGMLQuantizationType.F16
                if half and not np.isfinite(rows.view("<f2")).all():
                    raise SuperegoError(f"{path}: {what}s of layer {index} are not all finite")
                found[what][index] = rows
                at += 12 + cells * size
    keys, values = ([rows for _, rows in sorted(found[what].items())] for what in found)
    return State(tokens.tolist(), keys, values, data[body:])


def build(
    tokens: list[int], keys: list[np.ndarray], values: list[np.ndarray], shape: Layout
) -> bytes:
    """The bytes of a state file; keys, values: one (cells, row bytes) uint8 array a layer.

    Of models with one cache only.
    """
    assert len(shape.caches) == 1
    n = len(tokens)
    places = np.stack([np.arange(n), np.ones(n), np.zeros(n)], 1).astype("<i4")
    parts = [
        struct.pack("<III", MAGIC, VERSION, n),
        np.asarray(tokens, "<i4").tobytes(),
        struct.pack("<II", 1, n),
        places.tobytes(),
        struct.pack("<II", 0, len(keys)),
    ]
    for sizes, rows in ((shape.key_bytes, keys), (shape.value_bytes, values)):
        for size, row in zip(sizes, rows, strict=True):
            parts += [struct.pack("<iQ", int(shape.kv_type), size), row.tobytes()]
    return b"".join(parts)
