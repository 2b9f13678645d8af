"""An adapter's file as the changes that a walk or a training knows, and the way back.

Knows which of its pairs make a slot. Does not know how either was found.
"""

from __future__ import annotations

import numpy as np
import torch

from superego.adapter import Adapter
from superego.converters.checkpoint import Origin
from superego.converters.slot import CELL, Slot
from superego.converters.streams import Change, Changes
from superego.converters.student import MATRICES
from superego.errors import SuperegoError
from superego.pairs import read_pairs, slot_marks, slot_ranks


def changes_of(adapter: Adapter) -> Origin:
    """An adapter's pairs as changes, and its slot where it has one."""
    changes: Changes = {}
    for name, (a, b) in read_pairs(adapter).items():
        parts = name.split(".")
        if len(parts) != 4 or parts[0] != "blk" or parts[2] not in MATRICES:
            raise SuperegoError(
                f"{adapter.path}: adapts {name}; training knows {', '.join(MATRICES)} of a layer"
            )
        changes[int(parts[1]), parts[2]] = Change(_tensor(a), _tensor(b))
    written, ranks = slot_marks(adapter), slot_ranks(adapter)
    if written is None:
        return changes, None
    marks: dict[tuple[int, str], Change] = {}
    for name, chosen in ranks.items():
        index, matrix = int(name.split(".")[1]), name.split(".")[2]
        change = changes[index, matrix]
        if matrix in CELL:
            changes[index, matrix] = _uncorrected(change)
            continue
        keep = _tensor(np.flatnonzero(chosen))
        rest = _tensor(np.flatnonzero(~chosen))
        marks[index, matrix] = Change(change.a[keep], change.b[:, keep])
        order = torch.cat([keep, rest])  # a mark's ranks stand first
        changes[index, matrix] = Change(change.a[order], change.b[:, order])
    layer, directions = int(written.matrix.split(".")[1]), _tensor(written.directions)
    return changes, Slot((), layer, written.neurons, directions, {}, marks)


def _uncorrected(cells: Change) -> Change:
    """Without what makes up for llama.cpp's rounding (runtime_cells.py): torch has none of it.

    These ranks have the detectors of ranks in front of them.
    """
    first = {row.numpy().tobytes(): i for i, row in reversed(list(enumerate(cells.a.cpu())))}
    kept = sorted(first.values())
    return Change(cells.a[kept], cells.b[:, kept])


def pairs(changes: Changes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Changes under llama.cpp's tensor names: A (r, in), B (out, r)."""
    return {
        f"blk.{layer}.{write}.weight": (change.a.cpu().numpy(), change.b.cpu().numpy())
        for (layer, write), change in changes.items()
    }


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(torch.get_default_device())
