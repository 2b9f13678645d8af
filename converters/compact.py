"""Shorter sessions: a manifesto's keys and values summed up in fewer cells.

Knows which cells are kept and where. Does not know how cells are fitted (cells.py) or how
states are stored.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quantize

from superego.base import BaseModel
from superego.converters.cells import match, queries
from superego.converters.products import probe_dtype
from superego.converters.references import BLOCKS, prepare, seeds, write_replies
from superego.converters.runtime_cells import heads, to_halves
from superego.converters.streams import Pack, Streams
from superego.converters.transformer import (
    Base,
    rotate,
)
from superego.errors import SuperegoError
from superego.manifesto import Manifesto
from superego.progress import Steps
from superego.session import (
    check_session_writable,
    kv_type_of,
    prefill,
    prefix_of,
    state_bytes,
    write_session,
)
from superego.state_file import build, layout, parse
from superego.template import ChatTemplate

if TYPE_CHECKING:
    from llama_cpp import Llama

_CONVERSATIONS = 48  # whose queries are matched
_BLOCKS = 3  # of references, which have as many and more


def compact_session(
    llm: Llama,
    model: BaseModel,
    manifesto: Manifesto,
    path: Path,
    cells: int,
    steps: Steps | None = None,
    use_cache: bool = True,
) -> dict[str, Any]:
    """Save a session of `cells` cells; returns what it cost.

    `llm` is the bare base with flash attention. The front (up to where the manifesto begins)
    and the end that every conversation shares are kept as they are. Raises SuperegoError where
    `cells` leaves no room for the manifesto, or is no fewer than it has tokens.
    """
    steps = steps or Steps(quiet=True)
    check_session_writable(path, *model.files)
    started = time.perf_counter()
    torch.set_num_threads(llm.n_threads_batch)
    torch.set_grad_enabled(False)
    base = Base(model.header, probe_dtype()[0], resident=True)
    if not base.plain:
        raise SuperegoError(
            f"{model.path}: sessions of architecture '{base.shape.architecture}' cannot be "
            "compacted; save a whole one, without --compact"
        )
    prompts = prepare(llm, model, manifesto, seeds(0)[: sum(BLOCKS[:_BLOCKS])])
    prefix = prefix_of(llm, ChatTemplate(model.header), manifesto.body)
    if prefix != prompts.prefixes.teacher:
        raise SuperegoError("this chat template has no fixed text in front of a message")
    common = prompts.prefixes.common
    front = 1  # the attention sink
    student = prompts.prefixes.student
    while front < len(student) and prefix[front] == student[front]:
        front += 1
    least = front + common + 1
    if not least <= cells < len(prefix):
        raise SuperegoError(
            f"--compact {cells}: expected {least} to {len(prefix) - 1} cells for manifesto "
            f"'{manifesto.name}' of {len(prefix)} tokens"
        )
    conversations, _ = write_replies(
        llm,
        base,
        model.fingerprint,
        prompts,
        _BLOCKS,
        use_cache,
        lambda done, total: steps.update("writing references", done, total),
    )
    prefill(llm, prefix)
    shape = layout(model.header, kv_type_of(llm))
    full = parse(state_bytes(llm, prefix), shape, path, len(prefix))
    pack = Pack(conversations[:_CONVERSATIONS], prefix)
    streams = Streams(base, pack)
    generator = torch.Generator().manual_seed(0)
    body = slice(front, len(prefix) - common)
    shift = cells - len(prefix)  # every cell moves by as much as the conversation does
    keys, values = [], []
    order: list[int] = []
    for index in range(base.shape.n_layer):
        layer = base.layer(index)
        key, value = (heads(base, rows[index], shape.kv_type) for rows in (full.keys, full.values))
        key = to_halves(base, key)  # (n_head_kv, tokens, head_dim)
        query, own = queries(
            base, streams.rows, pack.rows, streams.rotations[index], index, generator
        )
        kept = torch.cat([key[:, :front], key[:, body.stop :]], 1)
        outside = torch.logaddexp((query @ kept.transpose(1, 2)).logsumexp(-1), own.mass)
        found = [
            match(query[h], outside[h], key[h, body], value[h, body], cells - front - common)
            for h in range(base.shape.n_head_kv)
        ]
        if not order:
            order = sorted(int(t) + front for t in found[0].token)
        sequences = [head.token.argsort() for head in found]
        fitted_key = torch.stack([c.key[s] for c, s in zip(found, sequences, strict=True)])
        fitted_value = torch.stack([c.value[s] for c, s in zip(found, sequences, strict=True)])
        new_key, new_value = (
            torch.cat([old[:, :front], fitted, old[:, body.stop :]], 1).transpose(0, 1)
            for old, fitted in ((key, fitted_key), (value, fitted_value))
        )  # (cells, n_head_kv, head_dim)
        turn = base.rotation(torch.tensor([shift]), index, turn=True)
        new_key = rotate(new_key, *turn, base.shape)
        keys.append(_bytes(_pairs(base, new_key), shape.kv_type))
        values.append(_bytes(new_value, shape.kv_type))
        streams.through(layer)
        steps.update("compacting layers", index + 1, base.shape.n_layer)
    tokens = prefix[:front] + [prefix[i] for i in order] + prefix[body.stop :]
    data = build(tokens, keys, values, shape)
    parse(data, shape, path, len(tokens))
    write_session(path, data, model, llm, manifesto, prefix, cells, ())
    return {
        "session": str(path),
        "bytes": len(data),
        "manifesto": manifesto.name,
        "tokens": len(prefix),
        "cells": cells,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _pairs(base: Base, key: torch.Tensor) -> torch.Tensor:
    if not base.shape.rope_pairs:
        return key
    return key.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _bytes(heads: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """(cells, n_head_kv, head_dim) -> stored rows (cells, bytes) uint8."""
    rows = heads.flatten(1).clamp(-65000, 65000).contiguous().numpy()  # float16 ends at 65504
    return quantize(rows, kind).view(np.uint8)
