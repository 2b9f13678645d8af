"""Few cells that stand for many: attention matching.

Knows keys, values and queries. Does not know where the cells are put. Each cell stands for a
cluster of the manifesto's tokens: its key is fitted to the cluster's attention mass, its
value to the whole attention output, both by least squares over reference queries. From there
both can be moved to what is asked for itself, the output of all cells together (`settle`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from superego.converters.transformer import Base, Rotation, Rows, project_qkv, rms_norm

_QUERIES = 1000  # rows of them, a layer
_ROUNDS = 3  # of clustering
_KEY_RIDGE, _VALUE_RIDGE = 0.05, 0.02  # times the mean diagonal
_STEPS = 3  # of Gauss and Newton, at most
_DAMPING = 0.05  # of a step of the keys, times the mean diagonal; it changes as steps succeed
_PULL = 0.3  # of keys back to where they were, the same
_LEAST = 0.1  # of what a cell stands for, however much of it other cells take


@dataclass
class Cells:
    """One key-value head's cells: key (n, head_dim), value (n, head_dim), and each one's token."""

    key: torch.Tensor
    value: torch.Tensor
    token: torch.Tensor


@dataclass
class Attended:
    """What queries get from some cells: log mass (..., q) and mean value (..., q, head_dim)."""

    mass: torch.Tensor
    output: torch.Tensor

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Attended:
        """query (q, head_dim), scaled; key and value (cells, head_dim), none or more."""
        scores = query @ key.T
        return cls(scores.logsumexp(-1), scores.softmax(-1) @ value)

    def share(self, total: torch.Tensor) -> torch.Tensor:
        """What these cells give to the output where all cells have the log mass `total`."""
        return (self.mass - total).exp()[..., None] * self.output


def queries(
    base: Base,
    stream: torch.Tensor,
    rows: Rows,
    rotation: Rotation,
    index: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, Attended]:
    """Sampled queries of layer `index` and what they get from their own conversation.

    `stream` (n, d_model) and `rotation` are of the packed `rows`. Returns
    (n_head_kv, n, head_dim), scaled and rotated, and the same in front of what they get.
    """
    shape, layer = base.shape, base.layer(index)
    hidden = rms_norm(stream, layer.attn_norm, shape.rms_eps, base.dtype)
    query, own_key, own_value = project_qkv(base, layer, hidden, rotation)
    query = query.float() * shape.attention_scale
    own_key, own_value = own_key.float(), own_value.float()
    group = shape.n_head // shape.n_head_kv
    mass = torch.empty(len(query), shape.n_head)
    output = torch.empty(len(query), shape.n_head, shape.head_dim)
    for start, stop, gather, scatter in rows.chunks:
        q = query[start:stop][gather].transpose(1, 2)  # (batch, n_head, width, head_dim)
        k, v = (
            each[start:stop][gather].transpose(1, 2).repeat_interleave(group, 1)
            for each in (own_key, own_value)
        )
        width = gather.shape[1]
        scores = (q @ k.transpose(2, 3)).masked_fill(
            ~torch.ones(width, width, dtype=torch.bool).tril(), float("-inf")
        )
        mass[start:stop] = scores.logsumexp(-1).transpose(1, 2).flatten(0, 1)[scatter]
        output[start:stop] = (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)[scatter]
    n = min(_QUERIES, len(query))
    drawn = torch.randperm(len(query), generator=generator, device="cpu")[:n]

    def by_head(each: torch.Tensor) -> torch.Tensor:  # -> (n_head_kv, n · group, ...)
        return each[drawn].unflatten(1, (shape.n_head_kv, group)).transpose(0, 1).flatten(1, 2)

    return by_head(query), Attended(by_head(mass), by_head(output))


def stand_in(
    query: torch.Tensor,
    shared: Attended,
    key: torch.Tensor,
    value: torch.Tensor,
    instead: Attended,
    n: int = 1,
    near: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """n cells, keys and values (n, head_dim), for `key` and `value` (tokens, head_dim).

    Where they are, queries get from them and from `shared`; where the cells are, from these, from
    `shared` and from `instead`: cells that are there in their place and cannot be removed. With
    masses Z (a cell's e) and outputs o (a cell's v), of `shared` without a sign, of `instead`
    primed and of what the cells stand for starred, asked for is
    (Z o + Σ e v + Z' o') / (Z + Σ e + Z') = (Z o + Z* o*) / (Z + Z*): the keys are fitted to their
    cluster's part of log(Z* - Z'), the values to what then lacks, both by least squares.

    `near` (n, head_dim) are keys that these shall be like, so that a cell of one manifesto says
    about what that of another does: clusters form around them, and what queries leave open is
    theirs. Then keys and values are settled, too.
    """
    theirs = Attended.of(query, key, value)
    total = torch.logaddexp(shared.mass, theirs.mass)
    wanted = shared.share(total) + theirs.share(total)
    left = (1 - (instead.mass - theirs.mass).exp()).clamp(min=_LEAST).log()
    scores = query @ key.T
    if len(key) < n:  # each token in n parts, of an n-th of its mass
        scores = scores.repeat(1, n) - torch.tensor(float(n)).log()
        key, value = key.repeat(n, 1), value.repeat(n, 1)
    mass = (scores - total[:, None]).exp().mean(0) + 1e-9
    _, cluster, share = _clusters(scores, mass, n, None if near is None else query @ near.T)
    fitted = share.T @ key if near is None else near.clone()
    for j in range(n):
        target = scores[:, cluster == j].logsumexp(1) + left
        _fit_key(fitted[j], query, target, (target - total).exp())
    score = query @ fitted.T
    own = score.logsumexp(1)
    total = torch.logaddexp(torch.logaddexp(shared.mass, own), instead.mass)
    start = share.T @ value
    attended = (score - total[:, None]).exp()  # (q, n)
    lacking = wanted - shared.share(total) - instead.share(total) - attended @ start
    found = start + _value_step(attended, lacking)
    if near is None:
        return fitted, found
    mass = torch.logaddexp(shared.mass, instead.mass)
    beside = Attended(mass, shared.share(mass) + instead.share(mass))
    return settle(query, beside, wanted, fitted, found)


def settle(
    query: torch.Tensor,
    beside: Attended,
    wanted: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells, keys and values (n, head_dim), moved so that queries get more nearly what is `wanted`.

    With attention a_j to the cells, queries get o = beside's share + Σ a_j v_j, and by a cell's
    score o changes by a_j (v_j − o): the keys are moved by Gauss-Newton steps (with Levenberg's
    damping), the values by least squares behind each. `wanted` is (q, head_dim).
    """

    def at(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention to the cells (q, n), and what is lacking of `wanted` (q, head_dim)."""
        score = query @ key.T
        total = torch.logaddexp(beside.mass, score.logsumexp(1))
        attended = (score - total[:, None]).exp()
        return attended, wanted - beside.share(total) - attended @ value

    start, (n, width), damping = key, key.shape, _DAMPING
    attended, lacking = at(key, value)
    pull: torch.Tensor | None = None  # how much of the keys' distance from the start counts
    for _ in range(_STEPS):
        slope = attended[..., None] * (value - (wanted - lacking)[:, None])  # (q, n, head_dim)
        normal = _normal(query, slope)
        scale = normal.diagonal().mean() + 1e-12
        pull = _PULL * scale if pull is None else pull
        towards = (slope @ lacking[..., None])[..., 0].T @ query - pull * (key - start)
        cost = lacking.square().sum() + pull * (key - start).square().sum()
        while damping < 100 * _DAMPING:
            damped = normal.clone()
            damped.diagonal().add_(damping * scale + pull)
            moved = key + torch.linalg.solve(damped, towards.flatten()).view(n, width)
            attended, missing = at(moved, value)
            found = value + _value_step(attended, missing)
            missing = missing + attended @ (value - found)
            if missing.square().sum() + pull * (moved - start).square().sum() < cost:
                break
            damping *= 4
        else:
            break
        key, value, lacking, damping = moved, found, missing, damping / 3
    return key, value


def _normal(query: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Σ over queries of slope_j·slope_k query queryᵀ, for each j and k: (n · width, n · width).

    query (q, width); slope (q, n, head_dim). Blocks that are alike by symmetry are made once.
    """
    n, width = slope.shape[1], query.shape[1]
    both = slope @ slope.mT  # (q, n, n)
    normal = query.new_empty(n, width, n, width)
    for j in range(n):
        for k in range(j + 1):
            block = query.T @ (query * both[:, j, k, None])  # itself symmetric
            normal[j, :, k] = normal[k, :, j] = block
    return normal.view(n * width, n * width)


def _clusters(
    scores: torch.Tensor, mass: torch.Tensor, n: int, near: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens in n clusters by how queries score them: of each (tokens,), and shares (tokens, n).

    In front of these the token (n,) that each cluster formed around.

    scores (q, tokens); mass (tokens,). Clusters form around the n tokens of most mass, or around
    what scores `near` (q, n). None is left empty.
    """
    centred = scores - scores.mean(0)
    if near is None:
        token = mass.topk(n).indices
        centre = centred[:, token]
    else:
        centre = near - near.mean(0)
        distance = _distance(centred, centre)
        first: list[int] = []
        for j in range(n):
            distance[first, j] = torch.inf
            first.append(int(distance[:, j].argmin()))
        token = torch.tensor(first)
    for _ in range(_ROUNDS):
        cluster = _distance(centred, centre).argmin(1)
        cluster[token] = torch.arange(n)
        share = F.one_hot(cluster, n).float() * mass[:, None]
        share = share / share.sum(0)
        centre = centred @ share
    return token, cluster, share


def _distance(centred: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Squared distances (tokens, n), less what is the same for all n."""
    return centre.square().sum(0)[None] - 2 * centred.T @ centre


def _fit_key(
    key: torch.Tensor, query: torch.Tensor, target: torch.Tensor, share: torch.Tensor
) -> None:
    """Move a key (head_dim,) so that queries (q, head_dim) score it with `target` (q,).

    Queries count by the share of attention (q,) that is asked for.
    """
    weight = share + 1e-4
    weighted = query * (weight / weight.mean())[:, None]
    gram = query.T @ weighted
    gram.diagonal().add_(_KEY_RIDGE * gram.diagonal().mean())
    key += torch.linalg.solve(gram, weighted.T @ (target - query @ key))


def _value_step(attended: torch.Tensor, lacking: torch.Tensor) -> torch.Tensor:
    """What values (n, head_dim) are to change so that attention (q, n) to them gives `lacking`."""
    gram = attended.T @ attended
    gram.diagonal().add_(_VALUE_RIDGE * gram.diagonal().mean() + 1e-9)
    return torch.linalg.solve(gram, attended.T @ lacking)


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
    token, cluster, share = _clusters(scores, mass, n, None)
    new_key = share.T @ key
    for j in range(n):
        target = scores[:, cluster == j].logsumexp(1)
        _fit_key(new_key[j], query, target, (target - total).exp())
    scores = query @ new_key.T
    total = torch.logaddexp(scores.logsumexp(1), outside)
    attended = (scores - total[:, None]).exp()  # (q, n)
    new_value = share.T @ value
    new_value = new_value + _value_step(attended, weights @ value - attended @ new_value)
    return Cells(new_key, new_value, token)
