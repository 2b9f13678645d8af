"""Residual streams of conversations, walked layer by layer, with an adapter's changes.

Knows the layer arithmetic of packed conversations behind one shared prefix. Does not
know how changes are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from superego.converters.products import linear
from superego.converters.transformer import (
    CHUNK,
    Base,
    KeyValue,
    Layer,
    Rows,
    Write,
    attend,
    attention,
    feed_forward,
    pairs_to_halves,
    project_qkv,
    rms_norm,
)

# The matrices that write to the residual stream, in the order of a layer's arithmetic.
WRITES = ("attn_output", "ffn_down")
_LOGITS = 1 << 26  # that lie in memory at once
_STEPS = 6  # of Newton's method, for what is reachable behind a norm


@dataclass(frozen=True)
class Change:
    """A low-rank change of one matrix: W + B A, with A (rank, in) and B (out, rank)."""

    a: torch.Tensor
    b: torch.Tensor


# (layer, matrix) -> its change, with rows as the GGUF has them
Changes = dict[tuple[int, str], Change]


def changed_layer(
    base: Base, index: int, changes: Changes, dtype: torch.dtype = torch.float32
) -> Layer:
    """Layer `index` with the changes of the matrices that read the stream folded in, in `dtype`.

    Those of WRITES are left to `Streams.add_change`.
    """
    layer, shape = base.layer(index), base.shape
    width = shape.n_head_kv * shape.head_dim
    queries = shape.n_head * shape.head_dim
    places = {
        "attn_qkv": ("qkv", 0),
        "attn_q": ("qkv", 0),
        "attn_k": ("qkv", queries),
        "attn_v": ("qkv", queries + width),
        "ffn_gate": ("gate_up", 0),
        "ffn_up": ("gate_up", shape.d_ff),
    }
    rotated = {"attn_q": queries, "attn_k": width, "attn_qkv": queries + width}
    folded: dict[str, Any] = {}
    for matrix, (name, start) in places.items():
        change = changes.get((index, matrix))
        if change is None:
            continue
        delta = change.b.float() @ change.a.float()
        if shape.rope_pairs and matrix in rotated:
            turned = delta[: rotated[matrix]]
            delta = torch.cat([pairs_to_halves(turned, shape.head_dim), delta[rotated[matrix] :]])
        # a fused ffn_up holds the gate's rows first
        if name == "gate_up" and len(delta) == 2 * shape.d_ff:
            start = 0
        if name not in folded:
            folded[name] = getattr(layer, name).to(torch.float32, copy=True)
        folded[name][start : start + len(delta)] += delta
    return replace(layer, **{name: whole.to(dtype) for name, whole in folded.items()})


@dataclass(frozen=True)
class Prefixes:
    """The teacher's and student's shared tokens; the last `common` of both are the same.

    `sample` is what the teacher's would be with a manifesto that every compile knows (sample.txt),
    and `messages` are user messages that every compile knows, as they stand behind a prefix: what
    all manifestos have in common is found from these.
    """

    teacher: list[int]
    student: list[int]
    sample: list[int] = field(default_factory=list)
    messages: list[list[int]] = field(default_factory=list)

    @property
    def common(self) -> int:
        """Trailing tokens that are the same in both and so have twins to be matched with."""
        n = 0
        shortest = min(len(self.teacher), len(self.student))
        while n < shortest and self.teacher[-1 - n] == self.student[-1 - n]:
            n += 1
        return n


@dataclass(frozen=True)
class Conversation:
    """One exchange as tokens: what follows the prefix up to the reply, and the reply."""

    prompt: list[int]
    reply: list[int]


class Pack:
    """Conversations sorted by length and packed row after row behind one prefix.

    Behind them, sorted apart, those `aside`: walked with the others, and not fitted to.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        prefix: Sequence[int],
        aside: Sequence[Conversation] = (),
    ) -> None:
        self.conversations = [*_by_length(conversations), *_by_length(aside)]
        self.n_fitted = len(conversations)  # these come first
        self.fitted_rows = sum(len(c.prompt) + len(c.reply) - 1 for c in conversations)
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


def _by_length(conversations: Sequence[Conversation]) -> list[Conversation]:
    return sorted(conversations, key=lambda c: len(c.prompt) + len(c.reply))


class Streams:
    """The residual streams of a pack: `rows` (n, d_model) and `prefix` (p, d_model), float32.

    The prefix, a few rows that all others read, is computed in float32 whatever the base's type:
    what bfloat16 rounds there is an error that all rows have in common.
    """

    def __init__(self, base: Base, pack: Pack) -> None:
        self.base = base
        self.pack = pack
        self.rows = base.embed(pack.tokens)
        self.prefix = base.embed(pack.prefix)
        self.rotations = base.rotations(pack.rows.positions)  # a layer
        self.prefix_rotations = base.rotations(pack.prefix_rows.positions)
        self._last: _Written | None = None
        self._scale = 1.0  # of the matrix last added

    def narrow(self, kept: Sequence[int]) -> None:
        """Let go, between two layers, of all conversations that are fitted to but those `kept`.

        `kept` are their places among `pack.conversations`, in rising order.
        """
        before, n = self.pack, self.pack.n_fitted
        chosen = [before.conversations[i] for i in kept]
        self.pack = Pack(chosen, before.prefix.tolist(), before.conversations[n:])
        stays = torch.zeros(len(before.conversations), dtype=torch.bool)
        stays[[*kept, *range(n, len(stays))]] = True
        self.rows = self.rows[stays.repeat_interleave(torch.tensor(before.rows.lengths))]
        self.rotations = self.base.rotations(self.pack.rows.positions)

    def inputs(self, layer: Layer, write: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What the matrix `write` reads now: for the rows (n, in), in the base's type, and for the
        prefix (p, in), in float32."""
        exact = torch.float32
        if write == "ffn_down":
            return (
                feed_forward(self.base, layer, self.rows),
                feed_forward(self.base, layer, self.prefix, exact),
            )
        base, eps = self.base, self.base.shape.rms_eps
        hidden = rms_norm(self.prefix, layer.attn_norm, eps, exact)
        query, key, value = project_qkv(base, layer, hidden, self.prefix_rotations[layer.index])
        prefix = attend(base, layer, query, key, value, self.pack.prefix_rows, None)
        shared = KeyValue(*(each.transpose(0, 1).to(base.dtype) for each in (key, value)))
        turn = self.rotations[layer.index]
        return attention(base, layer, self.rows, self.pack.rows, turn, shared), prefix

    def add(self, inputs: tuple[torch.Tensor, torch.Tensor], write: Write) -> None:
        """Write a matrix applied to the inputs onto the streams."""
        self._last = None
        self._scale = write.scale
        if write.norm is not None:
            # behind a norm a later change of the matrix is not simply added to what is there
            self._last = _Written(write, [write.product(each) for each in inputs])
            for stream, product in zip((self.rows, self.prefix), self._last.products, strict=True):
                stream += write.finish(product)
            return
        for stream, each in zip((self.rows, self.prefix), inputs, strict=True):
            for part, rows in zip(stream.split(CHUNK), each.split(CHUNK), strict=True):
                part += write(rows)

    def add_change(self, inputs: tuple[torch.Tensor, torch.Tensor], change: Change) -> None:
        """Write a low-rank change of the matrix last added, applied to the same inputs."""
        for i, stream in enumerate((self.rows, self.prefix)):
            a, b = change.a.to(inputs[i].dtype), change.b.to(inputs[i].dtype)
            if self._last is None:
                for part, rows in zip(stream.split(CHUNK), inputs[i].split(CHUNK), strict=True):
                    added = linear(linear(rows, a), b)
                    part += added if self._scale == 1 else added.float() * self._scale
                continue
            write, products = self._last.write, self._last.products
            before = write.finish(products[i])
            products[i] = products[i] + linear(linear(inputs[i], a), b)
            stream += write.finish(products[i]) - before

    def through(self, layer: Layer, changes: Changes | None = None) -> None:
        """Walk one layer, whose reading matrices have their changes in them; see `inputs`."""
        for write in WRITES:
            inputs = self.inputs(layer, write)
            self.add(inputs, getattr(layer, write))
            if changes and (layer.index, write) in changes:
                self.add_change(inputs, changes[layer.index, write])

    def weigh(self, rows: torch.Tensor, prefix: torch.Tensor) -> list[torch.Tensor]:
        """Inputs (n, in) and (p, in) of the matrix last added as a fit in the stream sees them,
        both in the rows' type.

        The rows may be the first of all, as in `reachable`. Behind a norm a change of the product y
        reaches the stream divided by y's length.
        """
        if self._last is None:
            return [rows, prefix.to(rows.dtype)]
        eps = self._last.write.eps
        return [
            (each.float() * torch.rsqrt(y[: len(each)].float().square().mean(1, True) + eps)).to(
                rows.dtype
            )
            for each, y in zip((rows, prefix), self._last.products, strict=True)
        ]

    def reachable(
        self, rows: torch.Tensor, prefix: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of what the streams lack, what the matrix last added can give them: see `_nearest`."""
        if self._last is None:
            return rows, prefix
        write, products = self._last.write, self._last.products
        first = products[0][: len(rows)]
        return _nearest(write, first, rows), _nearest(write, products[1], prefix)


@dataclass
class _Written:
    """A matrix behind whose products lies a norm, and these: of the rows, of the prefix."""

    write: Write
    products: list[torch.Tensor]


def _nearest(write: Write, products: torch.Tensor, lacking: torch.Tensor) -> torch.Tensor:
    """The step (n, d_model) within reach of a write behind a norm that comes nearest to `lacking`.

    The stream gets g ⊙ u with u = y / rms(y), so |u|² = d always: whatever y is, what is written
    lies on an ellipsoid. With z the wanted point, the nearest u is g z / (g² + μ), where μ ≥ 0
    is such that |u|² ≤ d. Without μ, coordinates of small g would ask for most of y's length
    and take it from the others.
    """
    assert write.norm is not None
    d = products.shape[1]
    y = products.float()
    unit = y * torch.rsqrt(y.square().mean(1, True) + write.eps)
    gain = write.norm * write.scale
    square = gain.square()
    wanted = gain * (gain * unit + lacking)
    mu = torch.full((len(y), 1), 1e-4) * square.mean()
    for _ in range(_STEPS):  # Newton's, on 1 / |u|, which is nearly straight in μ
        shrunk = wanted / (square + mu)
        length = shrunk.square().sum(1, True)
        slope = (shrunk.square() / (square + mu)).sum(1, True)
        mu = (mu + (length.sqrt() * length / d**0.5 - length) / slope).clamp(min=0)
    shrunk = torch.where(square + mu > 0, wanted / (square + mu), unit)
    return gain * (shrunk - unit)


def behind(write: Write, change: Change) -> Change:
    """A change fitted in the stream (inputs weighed, targets reachable) as one of the matrix."""
    b = change.b / write.scale
    if write.norm is not None:
        reached = write.norm.abs() > 1e-6
        b = torch.where(reached, 1 / write.norm.where(reached, torch.ones(())), 0)[:, None] * b
    return Change(change.a, b.contiguous())


def predictions(base: Base, pack: Pack, changes: Changes | None = None) -> torch.Tensor:
    """Walk all layers; the last stream (n, d_model) at the rows that predict replies."""
    streams = Streams(base, pack)
    for index in range(base.shape.n_layer):
        layer = changed_layer(base, index, changes) if changes else base.layer(index)
        streams.through(layer, changes)
    return streams.rows[pack.predicts]


def mean_kl(base: Base, pack: Pack, teacher: torch.Tensor, student: torch.Tensor) -> float:
    """KL(teacher‖student) in nats a token, full vocabulary: token mean a reply, then over replies.

    teacher, student: last streams at the rows that predict replies, (n, d_model) each.
    """
    (found,) = token_kl(base, teacher, student)
    return float((found * pack.reply_weight).sum())


def token_kl(base: Base, teacher: torch.Tensor, *students: torch.Tensor) -> list[torch.Tensor]:
    """KL(teacher‖student) in nats at each row, (n,) a student, of last streams (n, d_model)."""
    found: list[list[torch.Tensor]] = [[] for _ in students]
    n_vocab = base.shape.n_vocab
    chunk = 1024 if 1024 * n_vocab <= _LOGITS else _LOGITS // 4 // n_vocab  # several copies each
    for start in range(0, len(teacher), chunk):
        part = slice(start, start + chunk)
        log_p = base.logits(teacher[part]).float().log_softmax(-1)
        p = log_p.exp()
        for student, mine in zip(students, found, strict=True):
            log_q = base.logits(student[part]).float().log_softmax(-1)
            mine.append((p * (log_p - log_q)).sum(-1))
    return [torch.cat(each) for each in found]
