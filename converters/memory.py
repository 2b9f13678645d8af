"""What a compile needs in memory, and what of the base is kept there.

Knows sizes. Does not measure what a process has. Nothing here decides what is computed, but for
one thing: how many replies are written at once, where all of them would not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from superego.base import BaseModel
from superego.converters.decode import ROOM, batches, cell_bytes
from superego.converters.linear_algebra import EXTRA
from superego.converters.products import has_light
from superego.converters.references import REPLY, blocks_of
from superego.converters.regression import GRAM_ROWS, LARGE
from superego.converters.shape import Shape, read_shape
from superego.converters.transformer import CHUNK, TABLE_PART, WHOLE_TABLE, gated_rows
from superego.errors import SuperegoError

_LEAST_ROOM = 64 << 20
_LIBRARIES = 400 << 20  # that torch and its threads take once they work, beside what is there
_SPARE = 0.9  # of the free memory may be used


@dataclass(frozen=True)
class Plan:
    """Bytes of each part of a compile, and what of the base is kept in memory."""

    budget: int
    writing: int  # peak while replies are written
    fitting: int  # peak of the walks
    layers: int  # kept while replies are written; all of them: all the time
    tables: bool
    room: int  # of keys and values at once
    batches: int  # that replies are written in

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return max(self.writing, self.fitting)


def layer_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """One layer's matrices in the compute type."""
    experts = max(1, shape.n_expert)
    return dtype.itemsize * (_attention(shape) + 3 * shape.d_model * shape.d_ff * experts)


def light_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """One layer's light matrices, which lie beside it while replies are written."""
    if not has_light(dtype, torch.get_default_device()):
        return 0
    feed_forward = 0 if shape.n_expert else 3 * shape.d_model * shape.d_ff
    return torch.float16.itemsize * (_attention(shape) + feed_forward)


def _attention(shape: Shape) -> int:
    """Weights of a layer's attention."""
    return shape.d_model * shape.head_dim * 2 * (shape.n_head + shape.n_head_kv)


def plan_memory(
    model: BaseModel,
    dtype: torch.dtype,
    prompts: Sequence[list[int]],
    prefix: int,
    rank: int,
    memory: float | None = None,
    free: int | None = None,
) -> Plan:
    """What a compile of these prompts (tokens) behind a prefix of so many tokens will need.

    `memory` is the most that the process may have, in GB (10⁹ bytes); without it, most of what is
    free. Raises SuperegoError where even the least that works is more.
    """
    shape = read_shape(model.header)
    here = psutil.Process().memory_info().rss
    own = here + _LIBRARIES
    if memory is not None:
        budget = int(memory * 1e9)
    else:
        budget = here + int(_SPARE * (psutil.virtual_memory().available if free is None else free))
    width, layer = dtype.itemsize, layer_bytes(shape, dtype)
    n_tables = 2 if "output.weight" in model.header.tensors else 1
    table = shape.n_vocab * shape.d_model * width
    part = table if table <= WHOLE_TABLE * width else TABLE_PART * width
    everything = shape.n_layer * layer + n_tables * table
    light = light_bytes(shape, dtype)
    rows = sum(len(prompt) + REPLY for prompt in prompts)
    fit = own + _fitting(shape, width, rows, prefix, rank)
    room = ROOM
    while True:
        write, parts = _writing(shape, dtype, prompts, prefix, room)
        write += own
        if max(write + part, fit) + layer <= budget or room <= _LEAST_ROOM:
            break
        room //= 2
    least = max(write + part, fit) + layer  # a fit reads no part of the output matrix
    if least > budget:
        raise SuperegoError(
            f"{model.path}: a compile of it needs {least / 1e9:.1f} GB of memory, "
            + (
                f"and --memory allows {memory:g}; give more"
                if memory is not None
                else f"and {(budget - here) / 1e9:.1f} GB are free; close programs"
            )
            + ", or take a smaller base, rank or effort"
        )
    whole = write + everything + shape.n_layer * light
    if max(whole, fit + everything) <= budget:
        return Plan(budget, whole, fit + everything, shape.n_layer, True, room, parts)
    spare = budget - write - layer
    tables = spare >= n_tables * table
    spare -= n_tables * table if tables else part
    layers = max(0, min(spare // (layer + light), shape.n_layer))
    kept = layers * (layer + light) + (n_tables * table if tables else part)
    return Plan(budget, write + layer + kept, fit + layer, layers, tables, room, parts)


def _writing(
    shape: Shape, dtype: torch.dtype, prompts: Sequence[list[int]], prefix: int, room: int
) -> tuple[int, int]:
    """Bytes beside the weights while replies are written, and the number of batches."""
    cell, width = cell_bytes(shape, dtype), dtype.itemsize
    heads = shape.head_dim * (shape.n_head + 2 * shape.n_head_kv)
    peak = parts = 0
    for block in blocks_of(prompts):
        order = sorted(range(len(block)), key=lambda i: (len(block[i]), i))
        start = 0
        for size in batches([block[i] for i in order], [REPLY] * len(block), room // cell):
            mine = order[start : start + size]
            start += size
            parts += 1
            capacity = max(len(block[i]) + REPLY for i in mine)
            rows = sum(len(block[i]) for i in mine)
            gated = 3 * width * shape.d_ff * min(rows, gated_rows(shape))
            peak = max(
                peak,
                size * capacity * cell
                + rows * (8 * shape.d_model + width * (4 * heads + shape.d_ff))
                + gated
                + 2 * width * size * shape.n_vocab,
            )
    return peak + 2 * prefix * cell, parts


def _fitting(shape: Shape, width: int, rows: int, prefix: int, rank: int) -> int:
    """Bytes beside the weights at the widest point of a fit."""
    d, heads = shape.d_model, shape.head_dim * shape.n_head
    wide = heads if shape.n_expert else shape.d_ff
    large = d >= LARGE
    streams = 2 * 4 * rows * d
    seen = width * rows * wide
    gated = 3 * width * shape.d_ff * min(rows, gated_rows(shape))
    projected = shape.head_dim * (shape.n_head + 2 * shape.n_head_kv)
    attending = width * (rows * heads + min(rows, CHUNK) * (d + 2 * projected + 2 * heads))
    widened = 0 if width == 4 else 4 * 2 * shape.d_ff * d  # gate and up, for the prefix
    walking = max(seen + gated + widened + width * rows * d, attending) + 4 * rows * d
    columns = rank + EXTRA
    lacking = (4 + width) * rows * d
    solving = (
        seen + lacking + 4 * (wide * wide + d * wide)
        + (2 * GRAM_ROWS * (wide + d) + 2 * GRAM_ROWS * wide // 4 + 16 * wide * columns
           if large else 4 * 4 * d * wide + 2 * 4 * wide * wide)
    )  # fmt: skip
    detecting = 4 * rows * d * 2 + 4 * 4 * d * d  # the covariance of all rows, in float32
    pairs = 2 * (heads + d) + (0 if shape.n_expert else shape.d_ff + d)
    found = 4 * shape.n_layer * rank * pairs
    return streams + found + max(walking, solving, detecting) + 4 * 8 * prefix * wide
