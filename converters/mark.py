"""The direction of a slot's mark: streams hold little of it, and keys read it as they should.

Knows what layers read of the base's own streams. Does not know neurons, manifestos or cells. A
cell's key is written by way of the mark, and what other rows hold of the mark draws attention to
them as the cell's change does: a hundredth of a key's length there costs two hundredths of what is
recovered. That is small where streams vary little in the mark's direction, and again where the
key that the layer reads from the mark anyway is near the one that a cell asks for, so that little
is left to change. Values may leak: over all rows it evens out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from superego.converters.cells import Attended, queries
from superego.converters.streams import Streams
from superego.converters.transformer import Base, project_qkv, rms_norm, rotate

PREFIX_SHARE = 0.3  # of the prefix among the rows that are not to answer
_RIDGE = 1e-3  # of covariances, times the mean diagonal
_FEW = 0.1  # the same for the direction, which is found from few rows
_SHARE = 1.5  # a cell is expected to draw e to the minus this of what all else draws
_DIFFER = 25.0  # squared scores that cells of manifestos differ from that by, a head
_NUMBERS = 1 << 27  # that the layers looked at may hold together; of a large base, not all are
_ITERATIONS = 40


@dataclass(frozen=True)
class Reading:
    """What one layer makes of a mark m of length 1 at the slot, with g the norm's gains.

    inverse (d_model, d_model): the mark's leak onto other rows is (mᵀ inverse m)^-1/2.
    by_key (n_head_kv, head_dim, d_model), bias (n_head_kv, head_dim): the key by_key m + bias.
    gram (n_head_kv, head_dim, head_dim), cross (n_head_kv, head_dim), square (n_head_kv,): for a
    key k, kᵀ gram k - 2 crossᵀk + square is the mean square of what a query's score for it is
    off from what is asked for.
    """

    inverse: torch.Tensor
    by_key: torch.Tensor
    bias: torch.Tensor
    gram: torch.Tensor
    cross: torch.Tensor
    square: torch.Tensor


def covariance(rows: torch.Tensor) -> torch.Tensor:
    """(n, d) -> the mean of x xᵀ, (d, d), with a little on the diagonal."""
    gram = rows.T @ rows / len(rows)
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    return gram


def answering(rows: torch.Tensor, prefix: torch.Tensor, position: int) -> torch.Tensor:
    """The covariance of all rows that must not answer the mark at `position` of the prefix.

    rows (n, d) and prefix (p, d), both as the layer's matrices read them.
    """
    others = torch.cat([prefix[:position], prefix[position + 1 :]])
    return covariance(rows) + PREFIX_SHARE * others.T @ others / len(others)


def looked_at(base: Base) -> set[int]:
    """The layers whose readings are to be taken: all, or as many as memory bears, evenly."""
    n = base.shape.n_layer
    most = max(_NUMBERS // base.shape.d_model**2, 1)
    return {n - 1 - i * n // min(n, most) for i in range(min(n, most))}


def reading(
    base: Base, streams: Streams, index: int, position: int, generator: torch.Generator
) -> Reading:
    """What layer `index` reads, with the base's own streams in front of it."""
    shape, layer = base.shape, base.layer(index)
    eps = shape.rms_eps
    prefix = rms_norm(streams.prefix, layer.attn_norm, eps, torch.float32)
    rows = rms_norm(streams.rows, layer.attn_norm, eps, torch.float32)
    # a row that is the mark and nothing else, behind the norm
    gain = layer.attn_norm.float() * shape.d_model**0.5
    others = answering(rows, prefix, position)
    others.diagonal().add_(_FEW * others.diagonal().mean())
    inverse = torch.linalg.inv(others) * gain * gain[:, None]
    width = shape.n_head_kv * shape.head_dim
    heads = (shape.n_head_kv, shape.head_dim)
    place = base.rotation(torch.tensor([position]), index)
    matrix = layer.qkv.float()[-2 * width : -width] * gain  # (n_head_kv * head_dim, d_model)
    by_key = rotate(matrix.T.unflatten(1, heads), *place, shape).permute(1, 2, 0)
    bias = torch.zeros(heads)
    if layer.qkv_bias is not None:
        given = layer.qkv_bias.float()[-2 * width : -width]
        bias = rotate(given.view(1, *heads), *place, shape)[0]
    turn = streams.prefix_rotations[index]
    _, key, value = project_qkv(base, layer, prefix.to(base.dtype), turn)
    key, value = (each.float().transpose(0, 1) for each in (key, value))
    query, own = queries(
        base, streams.rows, streams.pack.rows, streams.rotations[index], index, generator
    )
    there = torch.stack(
        [Attended.of(q, k, v).mass for q, k, v in zip(query, key, value, strict=True)]
    )
    asked = torch.logaddexp(there, own.mass) - _SHARE  # (n_head_kv, n)
    n = query.shape[1]
    return Reading(
        inverse,
        by_key.contiguous(),
        bias,
        query.transpose(1, 2) @ query / n,
        (query * asked[..., None]).mean(1),
        asked.square().mean(1),
    )


def direction(readings: Sequence[Reading]) -> torch.Tensor:
    """The mark (d_model,), of length 1, that costs least: leak² times what keys are off, squared,
    summed over heads and layers.

    Found by L-BFGS from where streams vary least, on the side that keys like better.
    """
    # one tensor a field: (layers, ...)
    inverse, by_key, bias, gram, cross, square = (
        torch.stack([getattr(each, field) for each in readings])
        for field in ("inverse", "by_key", "bias", "gram", "cross", "square")
    )

    def cost(mark: torch.Tensor) -> torch.Tensor:
        unit = F.normalize(mark, dim=0)
        key = by_key @ unit + bias
        seen = (gram @ key[..., None])[..., 0]
        off = ((seen - 2 * cross) * key).sum(-1) + square + _DIFFER
        return (off.sum(-1) / ((inverse @ unit) * unit).sum(-1)).sum().log()

    start = torch.linalg.eigh(inverse.sum(0)).eigenvectors[:, -1]
    mark = (start if cost(start) < cost(-start) else -start).clone().requires_grad_()
    search = torch.optim.LBFGS(
        [mark],
        max_iter=_ITERATIONS,
        history_size=20,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        search.zero_grad()
        found = cost(mark)
        found.backward()
        return found

    with torch.enable_grad():
        search.step(closure)
    return F.normalize(mark.detach(), dim=0)
