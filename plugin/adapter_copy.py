"""Copies of adapters that llama.cpp multiplies alike however many columns there are.

Knows how llama.cpp multiplies a LoRA's matrices. Does not know who is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from superego.adapter import Adapter, read_adapter
from superego.pairs import read_pairs, write_copy

_TILE = 4  # llama.cpp's tiled product takes matrices whose rows are a multiple of this


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
    for name, (a, b) in read_pairs(adapter).items():  # B times alpha / rank
        halves = [tensor.type.name == "F16" for tensor in adapter.pairs[name]]
        extra = 0 if len(a) % _TILE else 1
        fits = np.abs(b).max(initial=0) < 6e4
        matrices[f"{name}.lora_a"] = _typed(np.pad(a, ((0, extra), (0, 0))), halves[0])
        matrices[f"{name}.lora_b"] = _typed(np.pad(b, ((0, 0), (0, extra))), halves[1] and fits)
    write_copy(adapter, path, {"adapter.lora.alpha": 0.0}, matrices)


def _typed(matrix: np.ndarray, half: bool) -> np.ndarray:
    return matrix.astype(np.float16) if half else matrix


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
