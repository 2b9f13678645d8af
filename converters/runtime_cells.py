"""A slot's cells as llama.cpp has them on this machine, and what puts them right there.

Knows llama.cpp's state and the changes that write cells. Does not know how cells are found.
llama.cpp rounds activations to 8 bits in front of a quantized matrix. At a marked token these are
nearly the same numbers whatever the manifesto, and what a layer makes of the mark by itself is
several times as long as the cell that is written over it: so values are some percent off what
the fit counted on, the same in every conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from gguf import GGMLQuantizationType, dequantize

from superego.adapter import write_adapter
from superego.atomic import temporary_folder
from superego.attachment import attach
from superego.base import BaseModel
from superego.converters.adapter_changes import pairs
from superego.converters.slot import CELL, Slot, cells_of, key_rows, unturned
from superego.converters.streams import (
    Change,
    Changes,
    Conversation,
    Pack,
    Streams,
    changed_layer,
)
from superego.converters.transformer import Base
from superego.errors import SuperegoError
from superego.runtime import load
from superego.session import prefill, state_bytes
from superego.state_file import Layout, layout, parse

if TYPE_CHECKING:
    from llama_cpp import Llama

_PASSES = 2
_LEAST = 0.005  # of a value's length; what is less off is left alone
Cells = dict[int, tuple[torch.Tensor, torch.Tensor]]  # layer -> key, value (n_head_kv, n, head_dim)


@dataclass(frozen=True)
class Corrected:
    """Changes whose cells llama.cpp has right, and how far values are off, of their length."""

    changes: Changes
    before: float
    after: float

    def report(self) -> dict[str, list[float]]:
        """As a command's report has it."""
        return {"cells off in llama.cpp": [round(self.before, 4), round(self.after, 4)]}


def correct_cells(
    base: Base,
    model: BaseModel,
    changes: Changes,
    slot: Slot | None,
    student: Sequence[int],
    threads: int | None = None,
    budget: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Corrected | None:
    """The changes with ranks more in attn_k and attn_v that put the slot's cells right.

    llama.cpp is asked for the cells of the `student`'s prefix behind the adapter as it would be
    written; what they lack is added by the detectors that write the cells, and that again, since
    the layers behind see the cells in front: the mean of what the passes found is kept. Rounding
    that differs from pass to pass is not followed, as another machine's would be another.

    None where there is nothing to put right, where llama.cpp keeps another kind of state, where
    the model's file would not fit into `budget` bytes of this process beside what is there, and
    where it did not help. None too where llama.cpp cannot be asked, a full disk say; `tell` is
    then told why.
    """
    layers = [i for i, m in sorted(changes) if m == "attn_k"] if slot else []
    if slot is None or not slot.positions or not layers:
        return None
    size = sum(file.stat().st_size for file in model.files)
    if budget is not None and psutil.Process().memory_info().rss + size > budget:
        return None
    try:
        expected = layout(model.header, "f16")
    except SuperegoError:  # another kind of state
        return None
    wanted = _counted_on(base, changes, slot, student, layers)
    added: dict[tuple[int, str], torch.Tensor] = {}
    off: list[float] = []
    llm: Llama | None = None
    try:
        llm = load(model, n_ctx=len(student) + 1, threads=threads)
        for count in range(1, _PASSES + 2):
            found = _in_llama_cpp(llm, base, expected, _with(changes, added), slot, student, layers)
            if found is None:
                return None
            off.append(_off(wanted, found))
            if off[0] < _LEAST:
                return None
            if count > _PASSES:
                break
            for index in layers:
                lacking = [w - f for w, f in zip(wanted[index], found[index], strict=True)]
                by_key = key_rows(base, unturned(base, lacking[0], slot.positions, index))
                by_value = lacking[1].transpose(0, 1).flatten(1).T
                for matrix, step in zip(CELL, (by_key, by_value), strict=True):
                    before = added.get((index, matrix), torch.zeros(()))
                    added[index, matrix] = before + step / count
    except SuperegoError as error:  # the fit does without
        tell(f"the slot's cells are not put right in llama.cpp: {error}")
        return None
    finally:
        if llm is not None:
            llm.close()
    return Corrected(_with(changes, added), off[0], off[-1]) if off[-1] < off[0] else None


def _with(changes: Changes, added: dict[tuple[int, str], torch.Tensor]) -> Changes:
    """The changes and behind the cells' ranks, with the same detectors, what is added by them."""
    both = {
        place: Change(
            torch.cat([changes[place].a] * 2), torch.cat([changes[place].b, b], 1).contiguous()
        )
        for place, b in added.items()
    }
    return {**changes, **both}


def _off(wanted: Cells, found: Cells) -> float:
    """How far values are from those wanted, root mean square over layers, of their length."""
    each = [
        float(((found[i][1] - value).norm() / value.norm()).square())
        for i, (_, value) in wanted.items()
    ]
    return float(np.mean(each) ** 0.5)


def _counted_on(
    base: Base, changes: Changes, slot: Slot, student: Sequence[int], layers: Sequence[int]
) -> Cells:
    """The slot's cells as the fit's own walk has them."""
    streams = Streams(base, Pack([Conversation([student[-1]], [0])], student))
    places = list(slot.positions)
    found: Cells = {}
    for index in range(max(layers) + 1):
        layer = changed_layer(base, index, changes)
        if index in layers:
            cos, sin = streams.prefix_rotations[index]
            turn = cos[places], sin[places]
            found[index] = cells_of(base, layer, streams.prefix[places], turn)
        streams.through(layer, changes)
    return found


def _in_llama_cpp(
    llm: Llama,
    base: Base,
    expected: Layout,
    changes: Changes,
    slot: Slot,
    student: Sequence[int],
    layers: Sequence[int],
) -> Cells | None:
    """The same as llama.cpp has them; None where a window has let go of them."""
    places, tokens = list(slot.positions), list(student)
    with temporary_folder() as folder:
        path = folder / "adapter.gguf"
        write_adapter(path, base.shape.architecture, pairs(changes), {})
        with attach(llm, path):
            prefill(llm, tokens)
            state = parse(state_bytes(llm, tokens), expected, path, len(tokens))
    if any(len(state.keys[i]) != len(tokens) for i in layers):
        return None
    return {
        i: (
            to_halves(base, heads(base, state.keys[i][places], expected.kv_type)),
            heads(base, state.values[i][places], expected.kv_type),
        )
        for i in layers
    }


def heads(base: Base, rows: np.ndarray, kind: GGMLQuantizationType) -> torch.Tensor:
    """Stored rows (cells, bytes) -> (n_head_kv, cells, head_dim) float32."""
    found = torch.from_numpy(dequantize(rows, kind).astype(np.float32))
    return found.to(base.device).view(len(rows), base.shape.n_head_kv, -1).transpose(0, 1)


def to_halves(base: Base, key: torch.Tensor) -> torch.Tensor:
    """llama.cpp's rotated pairs -> half layout, where the architecture stores pairs."""
    if not base.shape.rope_pairs:
        return key
    return key.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
