"""Shorter sessions: a manifesto's keys and values summed up in fewer cells.

Knows attention matching. Does not know how states are stored. Each cell stands for a
cluster of the manifesto's tokens: its key is fitted to the cluster's attention mass, its
value to the whole attention output, both by least squares over reference queries.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType, dequantize, quantize

from superego.atomic import check_writable
from superego.base import BaseModel
from superego.converters.references import BLOCKS, prepare, seeds, write_replies
from superego.converters.streams import WRITES, Pack, Streams
from superego.converters.transformer import (
    Base,
    probe_dtype,
    project_qkv,
    read_shape,
    rms_norm,
    rotate,
)
from superego.errors import SuperegoError
from superego.manifesto import Manifesto
from superego.progress import Steps
from superego.session import kv_type_of, prefill, prefix_of, state_bytes, write_session
from superego.state_file import build, layout, parse
from superego.template import ChatTemplate

if TYPE_CHECKING:
    from llama_cpp import Llama

_CONVERSATIONS = 48  # whose queries are matched
_QUERIES = 600  # rows of them, a layer
_ROUNDS = 3  # of clustering
_KEY_RIDGE, _VALUE_RIDGE = 0.05, 0.02  # times the mean diagonal


@dataclass
class _Cells:
    """One key-value head's cells: key (n, head_dim), value (n, head_dim), and each one's token."""

    key: torch.Tensor
    value: torch.Tensor
    token: torch.Tensor


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
    check_writable(path)
    started = time.perf_counter()
    torch.set_num_threads(llm.n_threads_batch)
    torch.set_grad_enabled(False)
    read_shape(model.header)
    prompts = prepare(llm, model, manifesto, seeds(0)[: BLOCKS[0]])
    prefix = prefix_of(llm, ChatTemplate(model.header), manifesto.body)
    if prefix != prompts.prefixes.teacher:
        raise SuperegoError("this chat template has no fixed text in front of a message")
    common = prompts.prefixes.common
    front = 1  # the attention sink
    while prefix[front] == prompts.prefixes.student[front]:
        front += 1
    least = front + common + 1
    if not least <= cells < len(prefix):
        raise SuperegoError(
            f"--compact {cells}: expected {least} to {len(prefix) - 1} cells for manifesto "
            f"'{manifesto.name}' of {len(prefix)} tokens"
        )
    base = Base(model.header, probe_dtype()[0], resident=True)
    conversations, _ = write_replies(
        llm,
        base,
        model.fingerprint,
        prompts,
        1,
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
    turn = base.rotation(torch.tensor([shift]))
    keys, values = [], []
    order: list[int] = []
    for index in range(base.shape.n_layer):
        layer = base.layer(index)
        key, value = (_rows(base, rows[index], shape.kv_type) for rows in (full.keys, full.values))
        key = _halves(base, key)  # (n_head_kv, tokens, head_dim)
        query, outside = _queries(base, streams, index, key, front, common, generator)
        found = [
            _match(query[h], outside[h], key[h, body], value[h, body], cells - front - common)
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
        new_key = rotate(new_key, *turn, base.shape)
        keys.append(_bytes(_pairs(base, new_key), shape.kv_type))
        values.append(_bytes(new_value, shape.kv_type))
        for write in WRITES:
            streams.add(streams.inputs(layer, write), getattr(layer, write))
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


def _queries(
    base: Base,
    streams: Streams,
    index: int,
    key: torch.Tensor,
    front: int,
    common: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled queries of a layer and the log of the attention mass outside the manifesto.

    Returns (n_head_kv, n, head_dim), scaled and rotated, and (n_head_kv, n).
    """
    shape, pack, layer = base.shape, streams.pack, base.layer(index)
    hidden = rms_norm(streams.rows, layer.attn_norm, shape.rms_eps, base.dtype)
    rotation = base.rotation(pack.rows.positions)
    query, own_key, _ = project_qkv(base, layer, hidden, rotation)
    query = query.float() * shape.head_dim**-0.5
    own_key = own_key.float()
    group = shape.n_head // shape.n_head_kv
    own = torch.empty(len(query), shape.n_head)
    for start, stop, gather, scatter in pack.rows.chunks:
        q = query[start:stop][gather].transpose(1, 2)  # (batch, n_head, width, head_dim)
        k = own_key[start:stop][gather].transpose(1, 2).repeat_interleave(group, 1)
        width = gather.shape[1]
        scores = (q @ k.transpose(2, 3)).masked_fill(
            ~torch.ones(width, width, dtype=torch.bool).tril(), float("-inf")
        )
        mass = scores.logsumexp(-1).transpose(1, 2).reshape(-1, shape.n_head)
        own[start:stop] = mass[scatter]
    n = min(_QUERIES, len(query))
    rows = torch.randperm(len(query), generator=generator)[:n]
    by_head = query[rows].view(n, shape.n_head_kv, group, -1).transpose(0, 1).flatten(1, 2)
    outer = torch.cat([key[:, :front], key[:, key.shape[1] - common :]], 1)
    kept = (by_head @ outer.transpose(1, 2)).logsumexp(-1)  # (n_head_kv, n · group)
    own = own[rows].view(n, shape.n_head_kv, group).transpose(0, 1).flatten(1, 2)
    return by_head, torch.logaddexp(kept, own)


def _match(
    query: torch.Tensor, outside: torch.Tensor, key: torch.Tensor, value: torch.Tensor, n: int
) -> _Cells:
    """n cells whose attention is that of `key` and `value` (tokens, head_dim) to the queries.

    query (q, head_dim); outside (q,): the log mass of all other cells, which does not change.
    """
    scores = query @ key.T  # (q, tokens)
    total = torch.logaddexp(scores.logsumexp(1), outside)
    weights = (scores - total[:, None]).exp()
    mass = weights.mean(0) + 1e-9
    centred = scores - scores.mean(0)
    token = mass.topk(n).indices
    centre = centred[:, token]
    cluster = torch.zeros(len(key), dtype=torch.long)
    for _ in range(_ROUNDS):  # by how the queries score them
        distance = centre.square().sum(0)[None] - 2 * centred.T @ centre
        cluster = distance.argmin(1)
        cluster[token] = torch.arange(n)  # none is left empty
        share = F.one_hot(cluster, n).float() * mass[:, None]
        share = share / share.sum(0)
        centre = centred @ share
    new_key = share.T @ key
    for j in range(n):
        members = (cluster == j).nonzero()[:, 0]
        target = scores[:, members].logsumexp(1)
        weight = (target - total).exp() + 1e-4
        weighted = query * (weight / weight.mean())[:, None]
        gram = query.T @ weighted
        gram.diagonal().add_(_KEY_RIDGE * gram.diagonal().mean())
        new_key[j] += torch.linalg.solve(gram, weighted.T @ (target - query @ new_key[j]))
    scores = query @ new_key.T
    total = torch.logaddexp(scores.logsumexp(1), outside)
    attended = (scores - total[:, None]).exp()  # (q, n)
    new_value = share.T @ value
    gram = attended.T @ attended
    gram.diagonal().add_(_VALUE_RIDGE * gram.diagonal().mean() + 1e-9)
    lacking = weights @ value - attended @ new_value
    new_value = new_value + torch.linalg.solve(gram, attended.T @ lacking)
    return _Cells(new_key, new_value, token)


def _rows(base: Base, rows: np.ndarray, kind: GGMLQuantizationType) -> torch.Tensor:
    """Stored rows (cells, bytes) -> (n_head_kv, cells, head_dim) float32."""
    found = torch.from_numpy(dequantize(rows, kind).astype(np.float32))
    return found.view(len(rows), base.shape.n_head_kv, -1).transpose(0, 1)


def _halves(base: Base, key: torch.Tensor) -> torch.Tensor:
    """llama.cpp's rotated pairs -> half layout, where the architecture stores pairs."""
    if base.shape.architecture != "llama":
        return key
    return key.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _pairs(base: Base, key: torch.Tensor) -> torch.Tensor:
    if base.shape.architecture != "llama":
        return key
    return key.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _bytes(heads: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """(cells, n_head_kv, head_dim) -> stored rows (cells, bytes) uint8."""
    rows = heads.flatten(1).clamp(-65000, 65000).contiguous().numpy()  # float16 ends at 65504
    return quantize(rows, kind).view(np.uint8)
