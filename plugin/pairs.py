"""An adapter's matrices as arrays, and copies of adapters with other metadata or strength.

Knows the tensors' bytes. Does not know what they mean to a model.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType

from superego.adapter import Adapter, read_adapter, write_adapter
from superego.atomic import replacing
from superego.errors import SuperegoError
from superego.gguf_copy import Value, copy_gguf
from superego.gguf_file import TensorInfo, check_unchanged, read_tensor

_ALIKE = 0.8  # cosine of two marks; those of one version are at 0.95 and above
_SLOT_MATRICES = ("ffn_gate.weight", "ffn_up.weight", "attn_k.weight", "attn_v.weight")


def read_pairs(
    adapter: Adapter, names: Iterable[str] | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs as float32, A (r, in) and B (out, r), B times alpha/rank: ΔW = B A at scale 1.

    All of them, or those named.
    """
    found = {}
    for name in adapter.pairs if names is None else names:
        a, b = adapter.pairs[name]
        # alpha 0 means that llama.cpp does not divide by the rank
        scale = adapter.alpha / b.shape[1] if adapter.alpha else 1.0
        first, second = (np.array(read_tensor(half), np.float32) for half in (a, b))
        found[name] = first, second * np.float32(scale)
    return found


def has_slot(adapter: Adapter) -> bool:
    """Whether it has one; other tools' adapters of ffn_gate have not."""
    return bool(slot_ranks(adapter))


def slot_ranks(adapter: Adapter) -> dict[str, np.ndarray]:
    """The ranks (r,) of each pair that make a slot: mark, keys, values; empty without a slot.

    They act at scale 1 only: they replace what the mark makes of the token's keys and values,
    and a key a tenth too long draws several times the attention. All other ranks can be
    weakened. A slot is known by the few neurons whose gate and up rows are replaced.
    """
    marking = _marking(adapter)
    if marking is None:
        return {}
    mark, neurons = marking
    found = {}
    for name, (a, _) in adapter.pairs.items():
        if name.endswith(_SLOT_MATRICES):
            found[name] = np.ones(a.shape[0], bool)
        elif name == mark:
            found[name] = (read_pairs(adapter, [name])[name][0][:, neurons] != 0).any(axis=1)
    return found


def _marking(adapter: Adapter) -> tuple[str, np.ndarray] | None:
    """The matrix that writes a slot's marks, and the neurons (n,) that it does so for.

    A blend has the ranks of all its parts, and so each neuron more than once.
    """
    gates = [name for name in adapter.pairs if name.endswith("ffn_gate.weight")]
    if len(gates) != 1:
        return None
    _, b = read_pairs(adapter, gates)[gates[0]]
    if (np.count_nonzero(b, axis=0) != 1).any():
        return None
    neurons = np.array(list(dict.fromkeys(np.abs(b).argmax(axis=0).tolist())))
    mark = gates[0].replace("ffn_gate", "ffn_down")
    return (mark, neurons) if mark in adapter.pairs else None


@dataclass(frozen=True)
class Marks:
    """What a slot's neurons write: in which matrix, from which neurons, in which directions."""

    matrix: str
    neurons: tuple[int, ...]
    directions: np.ndarray  # (n, d_model), each of length 1


def slot_marks(adapter: Adapter) -> Marks | None:
    """An adapter's marks, or None where it has no slot."""
    marking = _marking(adapter)
    if marking is None:
        return None
    name, neurons = marking
    a, b = read_pairs(adapter, [name])[name]
    written = (b @ a[:, neurons]).T
    lengths = np.linalg.norm(written, axis=1, keepdims=True)
    return Marks(name, tuple(neurons.tolist()), written / np.maximum(lengths, 1e-9))


def check_marks(parts: Sequence[tuple[str, Marks | None]]) -> None:
    """Raises SuperegoError where slots are not the same: together they would be no slot.

    A base has one, but other versions found another. `parts` are adapters' names and marks.
    """
    marked = [(name, marks) for name, marks in parts if marks is not None]
    for name, marks in marked[1:]:
        first, other = marked[0]
        same = (marks.matrix, marks.neurons) == (other.matrix, other.neurons)
        if not same or float((marks.directions * other.directions).sum(1).min()) < _ALIKE:
            raise SuperegoError(
                f"{name}: its slot is not marked as that of {first} is, which was made by another "
                "version; to use both, compile or amend them with this one"
            )


def write_slot(adapter: Adapter, output: Path) -> bool:
    """Write an adapter's slot alone, as an adapter; False, and no file, where it has none."""
    ranks = slot_ranks(adapter)
    if not ranks:
        return False
    pairs = read_pairs(adapter, ranks)
    alone = {name: (pairs[name][0][r], pairs[name][1][:, r]) for name, r in ranks.items()}
    write_adapter(output, adapter.header.text("general.architecture"), alone, {})
    return True


def net_scales(files: Sequence[Hashable], scales: Sequence[float]) -> list[float]:
    """The scales, those of one file added up at its first place: opposite ones leave nothing."""
    net = [0.0] * len(scales)
    first: dict[Hashable, int] = {}
    for i, (file, scale) in enumerate(zip(files, scales, strict=True)):
        if scale:
            net[first.setdefault(file, i)] += scale
    return net


def slot_scales(scales: Sequence[float], slotted: Sequence[bool]) -> list[float]:
    """What each adapter's slot alone is added with when the adapters act at `scales`.

    A scale means the fit's strength. The slot is there as a whole or not at all: of several
    adapters' each gets the share of its scale, and together they are one.
    """
    total = sum(s for s, has in zip(scales, slotted, strict=True) if has and s > 0)
    shares = [max(s, 0.0) / total if total else 0.0 for s in scales]
    return [
        share - s if has else 0.0 for s, share, has in zip(scales, shares, slotted, strict=True)
    ]


def write_copy(
    adapter: Adapter,
    path: Path,
    changed: Mapping[str, Value],
    matrices: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write an adapter again with changed metadata, atomically; raises SuperegoError.

    `matrices` (full tensor name -> F16 or F32) replace tensors; the others stay bit for bit.
    `path` may be the adapter's own.
    """
    matrices = matrices or {}
    kinds = {
        name: GGMLQuantizationType.F16 if m.dtype == np.float16 else GGMLQuantizationType.F32
        for name, m in matrices.items()
    }

    def write(file: BinaryIO, tensor: TensorInfo, kind: GGMLQuantizationType) -> None:
        file.write(matrices[tensor.name].tobytes())

    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    check_unchanged(adapter.header)
    with replacing(path) as temporary:
        copy_gguf(adapter.header, temporary, changed, kinds, write, shapes=shapes)
        check_unchanged(adapter.header)
    read_adapter(path)


def copy_adapter(
    adapter: Adapter,
    output: Path,
    metadata: Mapping[str, Value],
    strength: float = 1.0,
) -> None:
    """Write the same tensors with some metadata replaced, and scale 1 meaning `strength`.

    The strength goes into the B matrices, which every runtime applies, those of a slot apart.
    `output` may be the adapter's own file. Raises SuperegoError for errors of the file system.
    """
    matrices = {}
    if strength != 1.0:
        fixed = slot_ranks(adapter)
        for name, (_, b) in adapter.pairs.items():
            kept = fixed.get(name, np.zeros(b.shape[1], bool))
            values = read_tensor(b) * np.where(kept, 1.0, strength)
            half = b.type == GGMLQuantizationType.F16
            matrices[b.name] = values.astype(np.float16 if half else np.float32)
    write_copy(adapter, output, metadata, matrices)
