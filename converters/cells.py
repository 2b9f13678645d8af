"""Few cells that stand for many: attention matching.

Knows keys, values and queries. Does not know where the cells are put. Each cell stands for a
cluster of the manifesto's tokens: its key is fitted to the cluster's attention mass, its
value to the whole attention output, both by least squares over reference queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from superego.converters.streams import Streams
from superego.converters.transformer import Base, project_qkv, rms_norm

_QUERIES = 600  # rows of them, a layer
_ROUNDS = 3  # of clustering
_KEY_RIDGE, _VALUE_RIDGE = 0.05, 0.02  # times the mean diagonal


@dataclass
class Cells:
    """One key-value head's cells: key (n, head_dim), value (n, head_dim), and each one's token."""

    key: torch.Tensor
    value: torch.Tensor
    token: torch.Tensor


def queries(
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
    query, own_key, _ = project_qkv(base, layer, hidden, streams.rotations[index])
    query = query.float() * shape.attention_scale
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
    rows = torch.randperm(len(query), generator=generator, device="cpu")[:n]
    by_head = query[rows].view(n, shape.n_head_kv, group, -1).transpose(0, 1).flatten(1, 2)
    outer = torch.cat([key[:, :front], key[:, key.shape[1] - common :]], 1)
    kept = (by_head @ outer.transpose(1, 2)).logsumexp(-1)  # (n_head_kv, n · group)
    own = own[rows].view(n, shape.n_head_kv, group).transpose(0, 1).flatten(1, 2)
    return by_head, torch.logaddexp(kept, own)


def match(
    query: torch.Tensor, outside: torch.Tensor, key: torch.Tensor, value: torch.Tensor, n: int
) -> Cells:
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
    return Cells(new_key, new_value, token)
