"""Residual streams of conversations, walked layer by layer, with an adapter's changes.

Knows the layer arithmetic of packed conversations behind one shared prefix. Does not
know how changes are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from superego.converters.transformer import (
    Base,
    KeyValue,
    Layer,
    Rows,
    attend,
    feed_forward,
    pairs_to_halves,
    project_qkv,
    rms_norm,
)

# The matrices that write to the residual stream, in the order of a layer's arithmetic.
WRITES = ("attn_output", "ffn_down")


@dataclass(frozen=True)
class Change:
    """A low-rank change of one matrix: W + B A, with A (rank, in) and B (out, rank)."""

    a: torch.Tensor
    b: torch.Tensor


# (layer, matrix) -> its change, with rows as the GGUF has them
Changes = dict[tuple[int, str], Change]


def changed_layer(base: Base, index: int, changes: Changes) -> Layer:
    """Layer `index` with the changes of the matrices that read the stream folded in.

    Those of WRITES are left to `Streams.add_change`.
    """
    layer, shape = base.layer(index), base.shape
    width = shape.n_head_kv * shape.head_dim
    queries = shape.n_head * shape.head_dim
    places = {
        "attn_q": ("qkv", 0),
        "attn_k": ("qkv", queries),
        "attn_v": ("qkv", queries + width),
        "ffn_gate": ("gate_up", 0),
        "ffn_up": ("gate_up", shape.d_ff),
    }
    folded: dict[str, torch.Tensor] = {}
    for matrix, (name, start) in places.items():
        change = changes.get((index, matrix))
        if change is None:
            continue
        delta = change.b.float() @ change.a.float()
        if shape.architecture == "llama" and matrix in ("attn_q", "attn_k"):
            delta = pairs_to_halves(delta, shape.head_dim)
        if name not in folded:
            folded[name] = getattr(layer, name).to(torch.float32, copy=True)
        whole = folded[name]
        whole[start : start + len(delta)] += delta
    return replace(layer, **{name: whole.to(base.dtype) for name, whole in folded.items()})


@dataclass(frozen=True)
class Conversation:
    """One exchange as tokens: what follows the prefix up to the reply, and the reply."""

    prompt: list[int]
    reply: list[int]


class Pack:
    """Conversations sorted by length and packed row after row behind one prefix."""

    def __init__(self, conversations: Sequence[Conversation], prefix: Sequence[int]) -> None:
        order = sorted(
            range(len(conversations)),
            key=lambda i: (len(conversations[i].prompt) + len(conversations[i].reply), i),
        )
        self.conversations = [conversations[i] for i in order]
        self.prefix = torch.tensor(list(prefix))
        # the last reply token is only ever predicted, never read
        texts = [c.prompt + c.reply[:-1] for c in self.conversations]
        self.tokens = torch.tensor([t for text in texts for t in text])
        self.rows = Rows([len(t) for t in texts], len(prefix))
        self.prefix_rows = Rows([len(prefix)], 0)
        # rows whose next token is a reply token, and the conversation each belongs to
        self.predicts = torch.tensor(
            [
                i >= len(c.prompt) - 1
                for c, text in zip(self.conversations, texts, strict=True)
                for i in range(len(text))
            ]
        )
        counts = torch.tensor([len(c.reply) for c in self.conversations])
        self.reply_of = torch.repeat_interleave(torch.arange(len(counts)), counts)
        self.reply_weight = (1.0 / counts / len(counts))[self.reply_of]  # mean over replies


class Streams:
    """The residual streams of a pack: `rows` (n, d_model) and `prefix` (p, d_model), float32."""

    def __init__(self, base: Base, pack: Pack) -> None:
        self.base = base
        self.pack = pack
        self.rows = base.embedding[pack.tokens].float()
        self.prefix = base.embedding[pack.prefix].float()
        self._rotation = base.rotation(pack.rows.positions)
        self._prefix_rotation = base.rotation(pack.prefix_rows.positions)

    def inputs(self, layer: Layer, write: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What the matrix `write` reads now: for the rows (n, in) and the prefix (p, in)."""
        if write == "ffn_down":
            return (
                feed_forward(self.base, layer, self.rows),
                feed_forward(self.base, layer, self.prefix),
            )
        base, eps = self.base, self.base.shape.rms_eps
        hidden = rms_norm(self.prefix, layer.attn_norm, eps, base.dtype)
        query, key, value = project_qkv(base, layer, hidden, self._prefix_rotation)
        prefix = attend(base, query, key, value, self.pack.prefix_rows, None)
        shared = KeyValue(key.transpose(0, 1), value.transpose(0, 1))
        hidden = rms_norm(self.rows, layer.attn_norm, eps, base.dtype)
        query, key, value = project_qkv(base, layer, hidden, self._rotation)
        return attend(base, query, key, value, self.pack.rows, shared), prefix

    def add(self, inputs: tuple[torch.Tensor, torch.Tensor], weight: torch.Tensor) -> None:
        """Write `weight` (d_model, in) applied to the inputs onto the streams."""
        self.rows += F.linear(inputs[0], weight)
        self.prefix += F.linear(inputs[1], weight)

    def add_change(self, inputs: tuple[torch.Tensor, torch.Tensor], change: Change) -> None:
        """Write a low-rank change applied to the inputs onto the streams."""
        a, b = change.a.to(self.base.dtype), change.b.to(self.base.dtype)
        self.rows += F.linear(F.linear(inputs[0], a), b)
        self.prefix += F.linear(F.linear(inputs[1], a), b)


def predictions(base: Base, pack: Pack, changes: Changes | None = None) -> torch.Tensor:
    """Walk all layers; the last stream (n, d_model) at the rows that predict replies."""
    streams = Streams(base, pack)
    for index in range(base.shape.n_layer):
        layer = changed_layer(base, index, changes) if changes else base.layer(index)
        for write in WRITES:
            inputs = streams.inputs(layer, write)
            streams.add(inputs, getattr(layer, write))
            if changes and (index, write) in changes:
                streams.add_change(inputs, changes[index, write])
    return streams.rows[pack.predicts]


def mean_kl(
    base: Base, pack: Pack, teacher: torch.Tensor, student: torch.Tensor, chunk: int = 1024
) -> float:
    """KL(teacher‖student) in nats a token, full vocabulary: token mean a reply, then over replies.

    teacher, student: last streams at the rows that predict replies, (n, d_model) each.
    """
    total = 0.0
    for start in range(0, len(teacher), chunk):
        part = slice(start, start + chunk)
        log_p = base.logits(teacher[part]).float().log_softmax(-1)
        log_q = base.logits(student[part]).float().log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        total += float((divergence * pack.reply_weight[part]).sum())
    return total
