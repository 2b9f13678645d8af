"""The weights of a base with an adapter in them, some rows of a matrix at a time.

Knows adapter pairs and quantized tensors. Does not round.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gguf import dequantize

from superego.adapter import Adapter
from superego.errors import SuperegoError
from superego.gguf_file import Header, read_raw, read_tensor
from superego.pairs import slot_ranks

_ROWS = 1024  # of a matrix, held at once


class MergedWeights:
    """W + scale · alpha / rank · B A of each matrix that the adapter has a pair for.

    A slot is there as a whole, whatever the scale (pairs.py).
    Raises SuperegoError for pairs that are not finite.
    """

    def __init__(self, base: Header, adapter: Adapter, scale: float) -> None:
        self._tensors = base.tensors
        self._adapter = adapter
        self._scale = scale
        self._slot = slot_ranks(adapter) if scale != 1.0 else {}
        for name in adapter.pairs:
            self._pair(name)

    def _pair(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A (r, in) with the whole scale in it, and B (out, r)."""
        a, b = (np.asarray(read_tensor(half), np.float32) for half in self._adapter.pairs[name])
        for suffix, half in (("a", a), ("b", b)):
            if not np.isfinite(half).all():
                raise SuperegoError(
                    f"{self._adapter.path}: {name}.lora_{suffix} holds values that are not finite"
                )
        alpha = self._adapter.alpha
        whole = self._slot.get(name, np.zeros(len(a), bool)) & (self._scale > 0)
        strength = np.where(whole, 1.0, self._scale) * (alpha / len(a) if alpha else 1.0)
        return a * strength[:, None].astype(np.float32), b

    def raw(self, name: str) -> np.ndarray:
        """The base's own bytes of a matrix, (out, bytes a row)."""
        return read_raw(self._tensors[name])

    def parts(self, name: str) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Rows, their base weights and their change, each (n, in) float32."""
        tensor = self._tensors[name]
        raw = self.raw(name)
        a, b = self._pair(name)
        for start in range(0, tensor.shape[0], _ROWS):
            rows = slice(start, min(start + _ROWS, tensor.shape[0]))
            yield rows, np.asarray(dequantize(raw[rows], tensor.type), np.float32), b[rows] @ a
