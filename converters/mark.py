"""The direction of a slot's mark: streams hold little of it, and layers read it as they should.

Knows what layers read of the base's own streams. Does not know neurons, or how cells are found. A
cell's key and value are written by way of the mark, and what other rows hold of the mark draws
attention to them, and adds to their values, as the cell's change does. That is small where streams
vary little in the mark's direction, and again where the key and value that a layer reads from the
mark anyway are near those that a cell asks for, so that little is left to change. Cells of
different manifestos are alike enough that one manifesto's can be aimed at for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from superego.converters.streams import Streams
from superego.converters.transformer import Base, rms_norm, rotate

PREFIX_SHARE = 0.3  # of the prefix among the rows that are not to answer
_RIDGE = 1e-3  # of covariances, times the mean diagonal
_FEW = 0.1  # the same for the direction, which is found from few rows
_DIFFER = 3.0  # squared scores that cells of manifestos differ from that by, a head
_VALUE = 2.0  # of what a value is off, in squared lengths of values, against a squared score
_APART = 0.3  # of a row that is another mark, among the rows that are not to answer
_NUMBERS = 1 << 27  # that the layers looked at may hold together; of a large base, not all are
_ITERATIONS, _HISTORY = 40, 20


@dataclass(frozen=True)
class Reading:
    """What one layer makes of a mark m of length 1 at each of n places, with g the norm's gains.

    inverse (d_model, d_model): the mark's leak onto other rows is (mᵀ inverse m)^-1/2.
    by_key (n, n_head_kv, head_dim, d_model), bias (n, n_head_kv, head_dim): at each place the key
    by_key m + bias, less the one asked for; by_value (n_head_kv, head_dim, d_model) and value_bias
    (n, n_head_kv, head_dim) the same for the value, which does not depend on the place.
    gram (n_head_kv, head_dim, head_dim): for what a key is off, kᵀ gram k is the mean square of
    what queries' scores for it are off. spread (n_head_kv,): of values, squared.
    """

    inverse: torch.Tensor
    by_key: torch.Tensor
    bias: torch.Tensor
    gram: torch.Tensor
    by_value: torch.Tensor
    value_bias: torch.Tensor
    spread: torch.Tensor

    def off(self, place: int) -> Off:
        """What is off at the `place`-th place, as a function of the mark."""
        scaled = (_VALUE / self.spread).sqrt()[:, None]
        key, value = self.by_key[place], self.by_value * scaled[..., None]
        rows = torch.cat([(self.gram @ key).flatten(0, 1), value.flatten(0, 1)])
        square = rows.T @ torch.cat([key.flatten(0, 1), value.flatten(0, 1)])
        bias, value_bias = self.bias[place], self.value_bias[place] * scaled
        scores = (self.gram @ bias[..., None])[..., 0]
        constant = (scores * bias).sum() + value_bias.square().sum() + _DIFFER * len(bias)
        return Off(square, rows.T @ torch.cat([bias, value_bias]).flatten(), constant)


@dataclass(frozen=True)
class Off:
    """mᵀ square m + 2 linearᵀm + constant: squared scores and values, and what cells differ by."""

    square: torch.Tensor  # (d_model, d_model)
    linear: torch.Tensor  # (d_model,)
    constant: torch.Tensor


def covariance(rows: torch.Tensor) -> torch.Tensor:
    """(n, d) -> the mean of x xᵀ, (d, d), with a little on the diagonal."""
    gram = rows.T @ rows / len(rows)
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    return gram


def answering(rows: torch.Tensor, prefix: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """The covariance of all rows that must not answer the marks at `places` of the prefix.

    rows (n, d) and prefix (p, d), both as the layer's matrices read them.
    """
    others = prefix[[i for i in range(len(prefix)) if i not in places]]
    return covariance(rows) + PREFIX_SHARE * others.T @ others / len(others)


def looked_at(base: Base) -> set[int]:
    """The layers whose readings are to be taken: all, or as many as memory bears, evenly."""
    shape = base.shape
    n, width = shape.n_layer, shape.n_head_kv * shape.head_dim
    most = max(_NUMBERS // (shape.d_model * (shape.d_model + 3 * width)), 1)
    return {n - 1 - i * n // min(n, most) for i in range(min(n, most))}


def reading(
    base: Base,
    streams: Streams,
    index: int,
    places: Sequence[int],
    query: torch.Tensor,
    cells: tuple[torch.Tensor, torch.Tensor],
) -> Reading:
    """What layer `index` reads at `places` of the prefix, with the base's own streams in front.

    query (n_head_kv, q, head_dim), scaled and rotated; `cells` are the keys, rotated, and the
    values that are asked for, (n_head_kv, n, head_dim) each.
    """
    shape, layer = base.shape, base.layer(index)
    eps = shape.rms_eps
    prefix = rms_norm(streams.prefix, layer.attn_norm, eps, torch.float32)
    rows = rms_norm(streams.rows, layer.attn_norm, eps, torch.float32)
    # a row that is the mark and nothing else, behind the norm
    gain = layer.attn_norm.float() * shape.d_model**0.5
    others = answering(rows, prefix, places)
    others.diagonal().add_(_FEW * others.diagonal().mean())
    inverse = torch.linalg.inv(others) * gain * gain[:, None]
    width = shape.n_head_kv * shape.head_dim
    heads = (shape.n_head_kv, shape.head_dim)
    turn = base.rotation(torch.tensor(places), index)
    _, by_key, by_value = layer.qkv.float().split([len(layer.qkv) - 2 * width, width, width])
    biases = torch.zeros(2, width)
    if layer.qkv_bias is not None:
        biases = layer.qkv_bias.float()[-2 * width :].view(2, width)
    # by_key's columns turned to each place: (n, d_model, n_head_kv, head_dim) -> by_key's layout
    columns = (by_key * gain).T.unflatten(1, heads)
    turned = torch.stack(
        [
            rotate(columns, cos[None], sin[None], shape).permute(1, 2, 0).contiguous()
            for cos, sin in zip(*turn, strict=True)
        ]
    )
    bias = rotate(biases[0].view(1, *heads).expand(len(places), *heads), *turn, shape)
    values = F.linear(rows, by_value).unflatten(1, heads)
    return Reading(
        inverse,
        turned,
        bias - cells[0].transpose(0, 1),
        query.transpose(1, 2) @ query / query.shape[1],
        (by_value * gain).unflatten(0, heads),
        biases[1].view(heads) - cells[1].transpose(0, 1),
        (values - values.mean(0)).square().sum(-1).mean(0) + 1e-9,
    )


def apart(each: Reading, mark: torch.Tensor) -> Reading:
    """The same where another mark (d_model,) is not to answer either: by Sherman and Morrison."""
    solved = each.inverse @ mark
    less = _APART / (1 + _APART * (mark @ solved)) * torch.outer(solved, solved)
    return replace(each, inverse=each.inverse - less)


def directions(readings: Sequence[Reading]) -> torch.Tensor:
    """A mark for each place, (n, d_model), each of length 1, one after another kept apart."""
    readings, found = list(readings), []
    for place in range(len(readings[0].by_key)):
        found.append(direction(readings, place))
        for i, each in enumerate(readings):  # one by one: of a large base they are large
            readings[i] = apart(each, found[-1])
    return torch.stack(found)


def direction(readings: Sequence[Reading], place: int) -> torch.Tensor:
    """The mark (d_model,), of length 1, that costs least: leak² times what keys and values are
    off, squared, summed over heads and layers.

    Found by L-BFGS from where streams vary least, on the side that costs less.
    """

    offs = [each.off(place) for each in readings]

    def cost(mark: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Its logarithm, and the gradient by the mark: by hand, as reading the matrices again for
        a backward pass would take as long as all else."""
        length = mark.norm()
        unit = mark / length
        total, gradient = torch.zeros(()), torch.zeros_like(unit)
        for each, off in zip(readings, offs, strict=True):
            read, answer = off.square @ unit, each.inverse @ unit
            leak = 1 / (answer @ unit)  # squared
            this = ((read + 2 * off.linear) @ unit + off.constant) * leak
            total += this
            gradient += 2 * leak * (read + off.linear - this * answer)
        gradient = gradient / total
        return total.log(), (gradient - (gradient @ unit) * unit) / length

    total = torch.zeros_like(readings[0].inverse)
    for each in readings:
        total += each.inverse
    start = torch.linalg.eigh(total).eigenvectors[:, -1]
    mark = start if cost(start)[0] < cost(-start)[0] else -start
    return F.normalize(_descend(cost, mark), dim=0)


def _descend(
    cost: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], at: torch.Tensor
) -> torch.Tensor:
    """Where L-BFGS (Nocedal and Wright, algorithm 7.5; Armijo's condition) comes to from `at`.

    Written out, as the first use of an optimizer of torch's imports its compiler for 3 seconds.
    """
    value, gradient = cost(at)
    pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # steps, changes, 1 / both
    for _ in range(_ITERATIONS):
        way, taken = gradient.clone(), []
        for step, change, inverse in reversed(pairs):
            taken.append(inverse * (step @ way))
            way -= taken[-1] * change
        if pairs:
            _, change, inverse = pairs[-1]
            way /= inverse * (change @ change)
        else:
            way /= gradient.abs().sum().clamp(min=1)
        for (step, change, inverse), share in zip(pairs, reversed(taken), strict=True):
            way += (share - inverse * (change @ way)) * step
        slope, length = gradient @ way, 1.0
        found = cost(at - way)
        while not found[0] <= value - 1e-4 * length * slope:
            length /= 2
            if length < 1e-6:  # no better within float32
                return at
            found = cost(at - length * way)
        step, change = -length * way, found[1] - gradient
        at = at + step
        value, gradient = found
        if step @ change > 0:
            pairs = [*pairs[-_HISTORY + 1 :], (step, change, 1 / (step @ change))]
    return at
