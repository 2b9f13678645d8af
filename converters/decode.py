"""Greedy decoding of many sequences at once after one shared prefix, in torch.

Knows how to keep a key-value cache and to drop finished sequences.
Does not know what the tokens mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from superego.converters.shape import Shape
from superego.converters.transformer import (
    Base,
    KeyValue,
    Rows,
    attend,
    capped,
    feed_forward,
    project_qkv,
    rms_norm,
)

ROOM = 4 << 30  # bytes of keys and values at once; batches decide bits, so this is the same for all


def prefill(base: Base, tokens: list[int]) -> list[KeyValue]:
    """Each layer's keys and values of a prefix of tokens."""
    rows = Rows([len(tokens)], 0)
    stream = base.embed(torch.tensor(tokens))
    rotations = base.rotations(rows.positions)
    cache = []
    for index in range(base.shape.n_layer):
        layer = base.layer(index, passing=True)
        hidden = rms_norm(stream, layer.attn_norm, base.shape.rms_eps, base.dtype)
        query, key, value = project_qkv(base, layer, hidden, rotations[index])
        cache.append(KeyValue(key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()))
        stream += layer.attn_output(attend(base, layer, query, key, value, rows, None))
        stream += layer.ffn_down(feed_forward(base, layer, stream))
    return cache


class _Cache:
    """Own keys and values of a batch: per layer (batch, n_head_kv, capacity, head_dim)."""

    def __init__(self, base: Base, batch: int, capacity: int) -> None:
        shape = base.shape
        size = (batch, shape.n_head_kv, capacity, shape.head_dim)
        self.keys = [torch.zeros(size, dtype=base.dtype) for _ in range(shape.n_layer)]
        self.values = [torch.zeros(size, dtype=base.dtype) for _ in range(shape.n_layer)]

    def keep(self, rows: torch.Tensor) -> None:
        for index in range(len(self.keys)):  # one at a time: all together would be there twice
            self.keys[index] = self.keys[index][rows]
            self.values[index] = self.values[index][rows]


def _first_tokens(
    base: Base, prompts: list[list[int]], prefix: list[KeyValue], cache: _Cache
) -> torch.Tensor:
    """Reads the prompts into the cache; the argmax token after each of them, (batch,)."""
    rows = Rows([len(p) for p in prompts], prefix[0].key.shape[1])
    stream = base.embed(torch.tensor([t for p in prompts for t in p]))
    rotations = base.rotations(rows.positions)
    sequence = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(rows.lengths))
    within = rows.positions - rows.prefix_length
    for index in range(base.shape.n_layer):
        layer = base.layer(index, passing=True)
        hidden = rms_norm(stream, layer.attn_norm, base.shape.rms_eps, base.dtype)
        query, key, value = project_qkv(base, layer, hidden, rotations[index])
        cache.keys[index][sequence, :, within] = key
        cache.values[index][sequence, :, within] = value
        stream += layer.attn_output(attend(base, layer, query, key, value, rows, prefix[index]))
        stream += layer.ffn_down(feed_forward(base, layer, stream))
    last = torch.tensor(rows.lengths).cumsum(0) - 1
    return base.logits(stream[last]).argmax(-1)


def _hidden(
    position: torch.Tensor, prefix_length: int, capacity: int, window: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What a new token at `position` (batch,) cannot see: 0, and -inf where hidden.

    Of the prefix (batch, prefix_length), None where all of it is seen, and of the sequence's
    own cells (batch, capacity), those ahead of it included.
    """
    columns = torch.arange(prefix_length + capacity)
    unseen = columns > position[:, None]
    if window:  # a token sees itself and the window - 1 before it
        unseen |= columns <= position[:, None] - window
    hide = torch.zeros(unseen.shape).masked_fill(unseen, float("-inf"))
    return (hide[:, :prefix_length] if window else None), hide[:, prefix_length:]


def _attend_step(
    base: Base,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: KeyValue,
    hide: tuple[torch.Tensor | None, torch.Tensor],
) -> torch.Tensor:
    """One new token a sequence: query (batch, n_head, head_dim) over prefix and own cache.

    key, value: (batch, n_head_kv, width, head_dim); hide: see `_hidden`.
    """
    shape = base.shape
    batch, group = query.shape[0], shape.n_head // shape.n_head_kv
    q = (query * shape.attention_scale).view(batch, shape.n_head_kv, group, shape.head_dim)
    by_head = q.transpose(0, 1).reshape(shape.n_head_kv, batch * group, shape.head_dim)
    to_prefix = torch.bmm(by_head, prefix.key.transpose(1, 2))  # (n_head_kv, batch·group, P)
    p = prefix.key.shape[1]
    to_prefix = to_prefix.view(shape.n_head_kv, batch, group, p).transpose(0, 1)
    to_own = torch.matmul(q, key.transpose(2, 3))  # (batch, n_head_kv, group, width)
    to_own = capped(to_own.float(), shape.attention_cap) + hide[1][:, None, None]
    to_prefix = capped(to_prefix.float(), shape.attention_cap)
    if hide[0] is not None:
        to_prefix = to_prefix + hide[0][:, None, None]
    weights = torch.cat([to_prefix, to_own], dim=-1).softmax(-1).to(base.dtype)
    from_own = torch.matmul(weights[..., p:], value)
    w = weights[..., :p].transpose(0, 1).reshape(shape.n_head_kv, batch * group, p)
    from_prefix = torch.bmm(w, prefix.value).view(shape.n_head_kv, batch, group, shape.head_dim)
    return (from_own + from_prefix.transpose(0, 1)).reshape(batch, -1)


def cell_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * shape.n_layer * shape.n_head_kv * shape.head_dim * dtype.itemsize


def batches(prompts: list[list[int]], limits: list[int], cells: int) -> list[int]:
    """Sizes of the runs of prompts whose caches have at most so many cells, at least one each."""
    sizes, widest = [0], 0
    for prompt, limit in zip(prompts, limits, strict=True):
        widest = max(widest, len(prompt) + limit)
        if sizes[-1] and widest * (sizes[-1] + 1) > cells:
            sizes.append(0)
            widest = len(prompt) + limit
        sizes[-1] += 1
    return sizes


def greedy(
    base: Base,
    prompts: list[list[int]],
    prefix: list[KeyValue],
    limits: list[int],
    stop: set[int],
    progress: Callable[[int], None],
    room: int = ROOM,
) -> list[list[int]]:
    """Greedy replies, each of at most its limit, the stop token included where it was reached.

    `progress` is told the number of tokens written, those saved by an early stop included.
    Where the caches of all would take more than `room` bytes, as many as fit go at once.
    """
    replies: list[list[int]] = []
    for size in batches(prompts, limits, room // cell_bytes(base.shape, base.dtype)):
        part = slice(len(replies), len(replies) + size)
        done = sum(limits[: part.start])

        def told(tokens: int, done: int = done) -> None:
            progress(done + tokens)

        replies += _greedy(base, prompts[part], prefix, limits[part], stop, told)
    return replies


def _greedy(
    base: Base,
    prompts: list[list[int]],
    prefix: list[KeyValue],
    limits: list[int],
    stop: set[int],
    progress: Callable[[int], None],
) -> list[list[int]]:
    capacity = max(len(p) + n for p, n in zip(prompts, limits, strict=True))
    cache = _Cache(base, len(prompts), capacity)
    limit = torch.tensor(limits)
    token = _first_tokens(base, prompts, prefix, cache)
    replies: list[list[int]] = [[] for _ in prompts]
    alive = torch.arange(len(prompts))
    length = torch.tensor([len(p) for p in prompts])  # cells used by each living sequence
    prefix_length = prefix[0].key.shape[1]
    for step in range(max(limits)):
        for i, t in zip(alive.tolist(), token.tolist(), strict=True):
            replies[i].append(t)
        progress(int(limit.clamp(max=step + 1).sum()))
        going = torch.tensor([t not in stop for t in token.tolist()]) & (limit[alive] > step + 1)
        if not going.any():
            break
        if going.sum() < len(going):  # drop what has ended
            rows = going.nonzero()[:, 0]
            cache.keep(rows)
            alive, token, length = alive[rows], token[rows], length[rows]
        batch = torch.arange(len(alive))
        # The whole capacity is attended to, hidden where unread: slices would be copied.
        hide = {
            window: _hidden(length + prefix_length, prefix_length, capacity, window)
            for window in set(base.shape.windows)
        }
        stream = base.embed(token)
        rotations = base.rotations(length + prefix_length)
        for index in range(base.shape.n_layer):
            layer = base.layer_for(index, len(alive))
            hidden = rms_norm(stream, layer.attn_norm, base.shape.rms_eps, base.dtype)
            query, key, value = project_qkv(base, layer, hidden, rotations[index])
            cache.keys[index][batch, :, length] = key
            cache.values[index][batch, :, length] = value
            attended = _attend_step(
                base,
                query,
                cache.keys[index],
                cache.values[index],
                prefix[index],
                hide[base.shape.windows[index]],
            )
            stream += layer.attn_output(attended)
            stream += layer.ffn_down(feed_forward(base, layer, stream))
        token = base.logits(stream).argmax(-1)
        length = length + 1
    return replies
