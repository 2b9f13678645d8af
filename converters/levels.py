"""Quantized rows as integer levels on a grid: weight = step · level + offset, and back.

Knows how blocks of the linear quantization types are laid out. Does not choose levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import Q4_K

Type = GGMLQuantizationType
_NIBBLES = np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)


@dataclass
class Grid:
    """(n, in) levels between `low` and `high`, with each weight's step and offset, float32."""

    levels: np.ndarray
    step: np.ndarray
    offset: np.ndarray
    low: int
    high: int

    def weights(self) -> np.ndarray:
        """The weights that the levels stand for, (n, in) float32."""
        return self.step * self.levels + self.offset


def _half(raw: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of each block, (n_blocks, 1) float32."""
    return raw[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(raw: np.ndarray, width: int) -> np.ndarray:
    """Low nibbles of each `width` bytes, then their high ones: (n_blocks, 2 · bytes)."""
    n = len(raw)
    return ((raw.reshape(n, -1, 1, width) >> _NIBBLES) & 0x0F).reshape(n, -1)


def _from_nibbles(levels: np.ndarray, width: int) -> np.ndarray:
    pairs = levels.reshape(len(levels), -1, 2, width)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(len(levels), -1)


def _bits(raw: np.ndarray) -> np.ndarray:
    """The 32 bits of four bytes: (n_blocks, 32)."""
    return np.unpackbits(raw, axis=-1, bitorder="little")


def _sub(values: np.ndarray, width: int) -> np.ndarray:
    return np.repeat(values, width, axis=1)


def _k_scales(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale, minimum = Q4_K.get_scale_min(raw[:, 4:16])
    return (
        _sub(_half(raw, 0) * scale.astype(np.float32), 32),
        _sub(-_half(raw, 2) * minimum.astype(np.float32), 32),
    )


def _read(raw: np.ndarray, kind: Type) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n_blocks, bytes) -> unsigned levels, step and offset, each (n_blocks, block)."""
    n = len(raw)
    if kind in (Type.Q4_0, Type.Q5_0):
        levels = _nibbles(raw[:, -16:], 16)
        middle = 8
        if kind == Type.Q5_0:
            levels, middle = levels | (_bits(raw[:, 2:6]) << 4), 16
        step = _sub(_half(raw, 0), 32)
        return levels, step, -middle * step
    if kind in (Type.Q4_1, Type.Q5_1):
        levels = _nibbles(raw[:, -16:], 16)
        if kind == Type.Q5_1:
            levels = levels | (_bits(raw[:, 4:8]) << 4)
        return levels, _sub(_half(raw, 0), 32), _sub(_half(raw, 2), 32)
    if kind == Type.Q8_0:
        step = _sub(_half(raw, 0), 32)
        return raw[:, 2:] ^ 0x80, step, -128 * step
    if kind == Type.Q4_K:
        return _nibbles(raw[:, 16:], 32), *_k_scales(raw)
    if kind == Type.Q5_K:
        high = (raw[:, 16:48].reshape(n, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None]) & 1
        return _nibbles(raw[:, 48:], 32) | (high.reshape(n, -1) << 4), *_k_scales(raw)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)  # Q6_K
    high = ((raw[:, 128:192].reshape(n, 2, 1, 32) >> shifts) & 3).reshape(n, -1)
    scale = raw[:, 192:208].copy().view(np.int8).astype(np.float32)
    step = _sub(_half(raw, 208) * scale, 16)
    return _nibbles(raw[:, :128], 64) | (high << 4), step, -32 * step


def _write(raw: np.ndarray, levels: np.ndarray, kind: Type) -> None:
    """Put unsigned levels (n_blocks, block) into blocks, leaving scales as they are."""
    n = len(raw)
    if kind == Type.Q8_0:
        raw[:, 2:] = levels ^ 0x80
    elif kind == Type.Q6_K:
        raw[:, :128] = _from_nibbles(levels & 0x0F, 64)
        shifted = (levels >> 4).reshape(n, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
        raw[:, 128:192] = np.bitwise_or.reduce(shifted, axis=2).reshape(n, 64)
    elif kind in (Type.Q4_K, Type.Q5_K):
        raw[:, -128:] = _from_nibbles(levels & 0x0F, 32)
        if kind == Type.Q5_K:
            shifted = (levels >> 4).reshape(n, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
            raw[:, 16:48] = np.bitwise_or.reduce(shifted, axis=1)
    else:
        raw[:, -16:] = _from_nibbles(levels & 0x0F, 16)
        if kind in (Type.Q5_0, Type.Q5_1):
            raw[:, -20:-16] = np.packbits(levels >> 4, axis=-1, bitorder="little")


_HIGHEST = {
    Type.Q4_0: 15,
    Type.Q4_1: 15,
    Type.Q5_0: 31,
    Type.Q5_1: 31,
    Type.Q8_0: 255,
    Type.Q4_K: 15,
    Type.Q5_K: 31,
    Type.Q6_K: 63,
}
LINEAR = frozenset(_HIGHEST)


def read_grid(rows: np.ndarray, kind: Type) -> tuple[Grid, Callable[[np.ndarray], np.ndarray]]:
    """(n, bytes a row) uint8 of a LINEAR type -> its grid, and levels -> the same rows anew."""
    block, size = GGML_QUANT_SIZES[kind]
    n = len(rows)
    raw = np.ascontiguousarray(rows).reshape(-1, size)
    levels, step, offset = (part.reshape(n, -1) for part in _read(raw, kind))

    def pack(chosen: np.ndarray) -> np.ndarray:
        out = raw.copy()
        _write(out, chosen.astype(np.uint8).reshape(-1, block), kind)
        return out.reshape(n, -1)

    return Grid(levels.astype(np.int16), step, offset, 0, _HIGHEST[kind]), pack
