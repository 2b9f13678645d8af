"""The weights of a base with an adapter in them, some rows of a matrix at a time.

Knows adapter pairs, and a scaling that leaves the model as it is. Does not round.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gguf import dequantize
from gguf.quants import quant_shape_to_byte_shape

from superego.adapter import Adapter
from superego.errors import SuperegoError
from superego.gguf_file import Header, TensorInfo

_ROWS = 1024  # of a matrix, held at once
# Where ffn_down reads act(gate x) · (up x): a factor on a row of ffn_up is undone by its
# inverse on that column of ffn_down.
_GATED = frozenset({"llama", "qwen2", "qwen3"})


class MergedWeights:
    """W + scale · alpha / rank · B A of each matrix that the adapter has a pair for.

    Raises SuperegoError for pairs that are not finite.
    """

    def __init__(self, base: Header, adapter: Adapter, scale: float) -> None:
        self._base = np.memmap(base.path, np.uint8, mode="r")
        self._tensors = base.tensors
        self._adapter = adapter
        self._factors = np.memmap(adapter.path, np.uint8, mode="r")
        self._scale = scale
        for name in adapter.pairs:
            self._pair(name)
        self.neurons: dict[str, np.ndarray] = {}  # ffn_down's name -> factor (in,), of each neuron
        if base.text("general.architecture") in _GATED:
            self._even_out(base)

    def _array(self, raw: np.ndarray, tensor: TensorInfo) -> np.ndarray:
        found = raw[tensor.offset : tensor.offset + tensor.n_bytes]
        shaped = found.reshape(quant_shape_to_byte_shape(tensor.shape, tensor.type))
        return np.asarray(dequantize(shaped, tensor.type), np.float32)

    def _pair(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A (r, in) with the whole scale in it, and B (out, r)."""
        a, b = (self._array(self._factors, half) for half in self._adapter.pairs[name])
        for suffix, half in (("a", a), ("b", b)):
            if not np.isfinite(half).all():
                raise SuperegoError(
                    f"{self._adapter.path}: {name}.lora_{suffix} holds values that are not finite"
                )
        alpha = self._adapter.alpha
        return a * np.float32(self._scale * (alpha / len(a) if alpha else 1.0)), b

    def _even_out(self, base: Header) -> None:
        """Scale neurons whose column of ffn_down an adapter makes far larger than others.

        One such column sets the step of all weights that share its blocks.
        """
        for up in self._adapter.pairs:
            layer, found, _ = up.rpartition("ffn_up.weight")
            down = f"{layer}ffn_down.weight"
            kinds = {f"{layer}ffn_{kind}.weight" for kind in ("gate", "up", "down")}
            others = {n for n in base.tensors if n.startswith(f"{layer}ffn_") and "norm" not in n}
            if not found or others != kinds or down not in self._adapter.pairs:
                continue
            touched = np.flatnonzero(self._pair(up)[1].any(axis=1))
            before = after = np.zeros(base.tensors[down].shape[1], np.float32)
            for _, weights, delta in self.parts(down):
                before = before + (weights**2).sum(0)
                after = after + ((weights + delta) ** 2).sum(0)
            stretch = np.sqrt(after[touched] / max(float(np.median(before)), 1e-30))
            factor = np.ones(len(before), np.float32)
            # powers of two are exact; what is left is one to two times the usual column
            factor[touched] = 2.0 ** np.floor(np.log2(np.maximum(stretch, 1.0)))
            if factor.max() > 1:
                self.neurons[down] = factor

    def raw(self, name: str) -> np.ndarray:
        """The base's own bytes of a matrix, (out, bytes a row)."""
        tensor = self._tensors[name]
        return self._base[tensor.offset : tensor.offset + tensor.n_bytes].reshape(
            tensor.shape[0], -1
        )

    def parts(self, name: str) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Rows, their base weights and their change, each (n, in) float32, neurons scaled."""
        tensor = self._tensors[name]
        raw = self.raw(name)
        a, b = self._pair(name)
        of_rows = self.neurons.get(name.replace("ffn_up", "ffn_down")) if "ffn_up" in name else None
        of_columns = self.neurons.get(name)
        for start in range(0, tensor.shape[0], _ROWS):
            rows = slice(start, min(start + _ROWS, tensor.shape[0]))
            weights, delta = np.asarray(dequantize(raw[rows], tensor.type), np.float32), b[rows] @ a
            if of_rows is not None:
                weights, delta = weights * of_rows[rows, None], delta * of_rows[rows, None]
            if of_columns is not None:
                weights, delta = weights / of_columns, delta / of_columns
            yield rows, weights, delta

    def unchanged(self, name: str, delta: np.ndarray) -> np.ndarray:
        """Which rows (n,) of a part are the base's own."""
        return np.asarray((delta == 0).all(axis=1)) & (name not in self.neurons)

    def moments(self, name: str, found: list[np.ndarray]) -> list[np.ndarray]:
        """Second moments of what a matrix reads, by column groups, with its neurons scaled."""
        factor = self.neurons.get(name)
        if factor is None or not found:
            return found
        ends = np.cumsum([len(gram) for gram in found])
        return [
            gram * np.outer(part, part)
            for gram, part in zip(found, np.split(factor, ends[:-1]), strict=True)
        ]
