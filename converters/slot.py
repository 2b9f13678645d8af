"""Tokens of the student's prefix whose keys and values are made to stand for the manifesto.

Knows how a token is told from all others, marked and rewritten by low-rank changes. Does not
know the closed form. A matrix that is to write at one token and nowhere else leaks onto the
others: in d dimensions by about d**-0.5 of what it writes. So a neuron of an early feed-forward,
which the model hardly uses, first marks the token with a large vector in a direction that is
made for it (mark.py); read by that mark, the leak is a tenth as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from superego.converters.cells import Attended, queries, stand_in
from superego.converters.mark import (
    Reading,
    answering,
    covariance,
    directions,
    looked_at,
    reading,
)
from superego.converters.streams import (
    WRITES,
    Change,
    Changes,
    Conversation,
    Pack,
    Prefixes,
    Streams,
)
from superego.converters.transformer import (
    Base,
    Layer,
    Rotation,
    Rows,
    halves_to_pairs,
    project_qkv,
    rms_norm,
    rotate,
)

CELL = ("attn_k", "attn_v")  # that a slot's cell is written by
_CONVERSATIONS = 64  # whose queries a cell is fitted to
PROMPTS = 24  # that the token is found from
LOOKED_AT = 8  # of them, that its mark and cells are found from
_CELLS = 2  # at most: what the marks of more leak is as much as these would gain
_LAYERS = 3  # the first ones, in which tokens may be marked
_FLOOR = 3.0  # the detector is 1 at the token and, fitted, minus this elsewhere
_HIGHEST = -0.5  # that the detector may reach elsewhere; the neuron is shut below 0
_RANDOM = (128, 64)  # sequences and tokens of random text, for what conversations do not hold
_GATE, _UP = 20.0, 8.0  # the detector's factors before the neuron's gate and its product
_TOKEN_WEIGHT = 30.0  # of the token in a detector's fit, against the mean over all others
_MARK = 5000.0  # the mark's length; streams have some tens to hundreds


@dataclass(frozen=True)
class Slot:
    """The marked tokens, one or a few, and the changes that mark them."""

    positions: tuple[int, ...]  # in the student's prefix
    layer: int  # whose feed-forward marks them; keys and values are written behind it
    neurons: tuple[int, ...]  # one a position
    directions: torch.Tensor  # (n, d_model), each of length 1
    # of layers behind it, the keys that the sample's cells have, (n_head_kv, n, head_dim)
    keys: dict[int, torch.Tensor]
    changes: Changes

    def basis(self) -> torch.Tensor:
        """Orthonormal columns (d_model, n) that span the marks' directions."""
        return torch.linalg.qr(self.directions.T)[0]


class Slots:
    """The slots of one base, each looked for once."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], Slot | None] = {}  # by the student's prefix

    def of(self, base: Base, prompts: Sequence[list[int]], prefixes: Prefixes) -> Slot | None:
        """The slot of this student's prefix; see `find_slot`."""
        key = tuple(prefixes.student)
        if key not in self._found:
            self._found[key] = self._look(base, prompts, prefixes)
        return self._found[key]

    def _look(self, base: Base, prompts: Sequence[list[int]], prefixes: Prefixes) -> Slot | None:
        return find_slot(base, prompts, prefixes)


class Probe:
    """A look at the teacher's streams: what few cells in the manifesto's place would be."""

    def __init__(self, streams: Streams, prefixes: Prefixes, positions: Sequence[int]) -> None:
        """`streams` are the teacher's, which the fit walks; `positions` the slot's in the prefix
        of the student."""
        teacher, student, common = prefixes.teacher, prefixes.student, prefixes.common
        self._n = len(positions)
        self._base, self._streams = streams.base, streams
        # a pack is sorted by length: conversations of all lengths are looked at
        lengths = streams.pack.rows.lengths[: streams.pack.n_fitted]
        n = min(_CONVERSATIONS, len(lengths))
        chosen = {len(lengths) * i // n for i in range(n)}
        self._rows = Rows([lengths[i] for i in sorted(chosen)], len(teacher))
        taken = torch.tensor([i in chosen for i in range(len(lengths))])
        self._places = taken.repeat_interleave(torch.tensor(lengths)).nonzero()[:, 0]
        self._moved = len(teacher) - len(student)
        self._positions = torch.arange(len(student)) + self._moved
        front = _front(teacher, student)
        fronts = [i for i in range(front) if i not in positions]
        ends = range(len(teacher) - common, len(teacher))
        self._shared = [*fronts, *ends]  # of the teacher's prefix: there in both
        self._gone = sorted(set(range(len(teacher))) - set(self._shared))  # the manifesto
        # of the student's: the template's own text, which is there in the manifesto's place
        self._instead = [i for i in range(front, len(student) - common) if i not in positions]
        self.generator = torch.Generator(device="cpu").manual_seed(0)

    def cells(
        self, index: int, prefix: torch.Tensor, near: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer `index`'s keys, rotated as the student's positions have them, and values.

        The streams must be in front of that layer.

        Each is (n_head_kv, n, head_dim), in half layout, as is `near`: keys that these shall be
        like. `prefix` (p, d_model) is the stream of the student's.
        """
        base, streams = self._base, self._streams
        # the student's cells at the distances that the teacher's have from the conversation
        turn = base.rotation(self._positions, index)
        layer = base.layer(index)
        own_keys, own_values = cells_of(base, layer, prefix, turn)
        theirs = streams.prefix_rotations[index]
        keys, values = cells_of(base, layer, streams.prefix, theirs)
        cos, sin = streams.rotations[index]
        turned = cos[self._places], sin[self._places]
        stream = streams.rows[self._places]
        query, own = queries(base, stream, self._rows, turned, index, self.generator)
        if near is not None:
            near = self._turned(near, index, self._moved)
        fitted = []
        for h in range(base.shape.n_head_kv):
            ends = Attended.of(query[h], keys[h, self._shared], values[h, self._shared])
            total = torch.logaddexp(ends.mass, own.mass[h])
            shares = ends.share(total) + Attended(own.mass[h], own.output[h]).share(total)
            instead = Attended.of(
                query[h], own_keys[h, self._instead], own_values[h, self._instead]
            )
            key, value = keys[h, self._gone], values[h, self._gone]
            like = None if near is None else near[h]
            shared = Attended(total, shares)
            fitted.append(stand_in(query[h], shared, key, value, instead, self._n, like))
        key, value = (torch.stack(each) for each in zip(*fitted, strict=True))
        return self._turned(key, index, -self._moved), value

    def _turned(self, keys: torch.Tensor, index: int, by: int) -> torch.Tensor:
        """Keys (n_head_kv, n, head_dim) as they are at positions that many further on."""
        turn = self._base.rotation(torch.tensor([by] * self._n), index, turn=True)
        return rotate(keys.transpose(0, 1), *turn, self._base.shape).transpose(0, 1)


def cells_of(
    base: Base, layer: Layer, stream: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a prefix's rows, each (n_head_kv, p, head_dim), in float32."""
    hidden = rms_norm(stream, layer.attn_norm, base.shape.rms_eps, torch.float32)
    _, key, value = project_qkv(base, layer, hidden, rotation)
    return key.transpose(0, 1), value.transpose(0, 1)


def find_slot(base: Base, prompts: Sequence[list[int]], prefixes: Prefixes) -> Slot | None:
    """The first tokens behind the sink that can be told from all others, and their marks.

    All of it comes from the base, the messages and the manifesto that every compile knows, and so
    is the same for every manifesto: adapters can be mixed, each with a share of the slot. `prompts`
    and the teacher's prefix stand for these where `prefixes` has none.

    Only prefix tokens that do not come again in a conversation are taken, and beside the first
    one only those that the template puts in front of every system message: they stay when a user
    puts another one in the default one's place. None where no token can be told clearly, or where
    keys are normed, so that a cell's attention mass cannot be written into them.
    """
    shape, student = base.shape, prefixes.student
    own = len(student) - prefixes.common
    if own < 2 or shape.n_layer <= _LAYERS or base.layer(0).k_norm is not None or not base.plain:
        return None
    sample = prefixes.sample or prefixes.teacher
    known = (prefixes.messages or prompts)[:PROMPTS]
    texts = [Conversation(prompt, [0]) for prompt in known]
    streams = Streams(base, Pack(texts, student))
    place = _place(base, streams, own, _front(sample, student))
    if place is None:
        return None
    positions = tuple(sorted(place.detectors))
    texts = texts[:LOOKED_AT]
    streams = Streams(base, Pack(texts, student))
    teacher = Streams(base, Pack(texts, sample))
    probe = Probe(teacher, Prefixes(sample, student), positions)
    generator = torch.Generator(device="cpu").manual_seed(0)
    keys: dict[int, torch.Tensor] = {}
    readings: list[Reading] = []
    read = looked_at(base)
    for index in range(shape.n_layer):
        layer = base.layer(index)
        if index > place.layer:
            key, value = probe.cells(index, streams.prefix)
            keys[index] = key
            if index in read:
                query, _ = queries(
                    base,
                    streams.rows,
                    streams.pack.rows,
                    streams.rotations[index],
                    index,
                    generator,
                )
                readings.append(reading(base, streams, index, positions, query, (key, value)))
        for each in (streams, teacher):
            each.through(layer)
    marks = directions(readings)
    return Slot(positions, place.layer, place.neurons, marks, keys, _marking(base, place, marks))


@dataclass(frozen=True)
class _Place:
    """Where tokens can be marked: in a layer's feed-forward, each by a neuron of its own."""

    layer: int
    detectors: dict[int, torch.Tensor]  # position -> (d_model,), of the stream behind the norm
    neurons: tuple[int, ...]  # in the order of the positions


def _place(base: Base, streams: Streams, own: int, front: int) -> _Place | None:
    """The layer in which the first token can be told, and of such layers the one with most.

    `streams` are the student's, and are walked; its first `own` prefix tokens may be taken, and
    beside the first that is found those of the first `front`.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    drawn = torch.randint(base.shape.n_vocab, _RANDOM, generator=generator, device="cpu").tolist()
    pack = Pack([Conversation(tokens, [0]) for tokens in drawn], streams.pack.prefix.tolist())
    text = Streams(base, pack)
    best: _Place | None = None
    most = min(_CELLS, max(front - 1, 1))
    for index in range(_LAYERS):
        layer = base.layer(index)
        for write in WRITES:
            inputs, others = streams.inputs(layer, write), text.inputs(layer, write)
            if write == "ffn_down":
                detectors = _detect(base, layer, streams, text, own, front)
                if detectors and (best is None or _rank(detectors) < _rank(best.detectors)):
                    # an attention sink is made by neurons that open at one token alone
                    used = sum(each.float().square().mean(0) for each in (inputs[0], others[0]))
                    used = used + inputs[1].float().square().amax(0)
                    assert layer.ffn_down.weight is not None  # a plain base has no experts
                    used = used * layer.ffn_down.weight.float().square().sum(0)
                    neurons = used.topk(len(detectors), largest=False).indices.tolist()
                    best = _Place(index, detectors, tuple(neurons))
                if index == _LAYERS - 1 or (best and _rank(best.detectors) <= (1, -most)):
                    return best
            streams.add(inputs, getattr(layer, write))
            text.add(others, getattr(layer, write))
    raise AssertionError("the last layer's look is the last")


def _rank(detectors: dict[int, torch.Tensor]) -> tuple[int, int]:
    """Less is better: the earlier the first token, and the more of them."""
    return min(detectors), -len(detectors)


def _marking(base: Base, place: _Place, directions: torch.Tensor) -> Changes:
    """The changes that have each of the place's neurons open at its token and write its mark."""
    shape, layer, neurons = base.shape, base.layer(place.layer), list(place.neurons)
    assert layer.ffn_down.weight is not None
    peak = float(F.silu(torch.tensor(_GATE))) * _UP
    one = F.one_hot(torch.tensor(neurons), shape.d_ff).float()  # (n, d_ff)
    detectors = torch.stack([place.detectors[i] for i in sorted(place.detectors)])
    gate, up = layer.gate_up[neurons].float(), layer.gate_up[shape.d_ff :][neurons].float()
    down = layer.ffn_down.weight[:, neurons].float()  # (d_model, n)
    mark = _MARK / peak / shape.residual_scale * directions.T
    return {
        (place.layer, "ffn_gate"): Change(_GATE * detectors - gate, one.T.contiguous()),
        (place.layer, "ffn_up"): Change(_UP * detectors - up, one.T.contiguous()),
        (place.layer, "ffn_down"): Change(one, mark - down),
    }


def write_cells(
    base: Base,
    layer: Layer,
    streams: Streams,
    slot: Slot,
    cells: tuple[torch.Tensor, torch.Tensor],
) -> dict[str, Change]:
    """Changes of attn_k and attn_v, of one rank a cell, that put cells in the slot's places.

    `cells` are keys and values (n_head_kv, n, head_dim). With X (n, d_model) the slot's inputs and
    C the covariance of all other rows, U = (X C⁻¹ Xᵀ)⁻¹ X C⁻¹ is 1 at a cell's own token, 0 at the
    other cells', and answers other rows least; ΔW = (wanted − W Xᵀ) U.
    """
    shape, places = base.shape, list(slot.positions)
    fitted = streams.rows[: streams.pack.fitted_rows]
    rows = rms_norm(fitted, layer.attn_norm, shape.rms_eps, torch.float32)
    prefix = rms_norm(streams.prefix, layer.attn_norm, shape.rms_eps, torch.float32)
    inputs = prefix[places]
    solved = torch.linalg.solve(answering(rows, prefix, places), inputs.T)  # (d_model, n)
    detectors = torch.linalg.solve(inputs @ solved, solved.T)  # (n, d_model)
    now = F.linear(inputs, layer.qkv.float())
    if layer.qkv_bias is not None:
        now = now + layer.qkv_bias.float()
    width = shape.n_head_kv * shape.head_dim
    _, key, value = now.split([now.shape[1] - 2 * width, width, width], dim=1)
    by_key = key_rows(base, unturned(base, cells[0], places, layer.index) - key)
    by_value = (cells[1].transpose(0, 1).flatten(1) - value).T.contiguous()
    found = (Change(detectors, each) for each in (by_key, by_value))
    return dict(zip(CELL, found, strict=True))


def unturned(base: Base, keys: torch.Tensor, places: Sequence[int], index: int) -> torch.Tensor:
    """Keys (n_head_kv, n, head_dim) of layer `index` at `places` as attn_k's products, (n, out).

    In front of the rotation, in half layout.
    """
    back = base.rotation(-torch.tensor(list(places)), index, turn=True)
    found = rotate(keys.transpose(0, 1), *back, base.shape)
    return found.flatten(1) / base.shape.rope_magnitude


def key_rows(base: Base, products: torch.Tensor) -> torch.Tensor:
    """Products of attn_k (n, out) in half layout -> columns (out, n), rows as the GGUF has them."""
    columns = products.T.contiguous()
    return halves_to_pairs(columns, base.shape.head_dim) if base.shape.rope_pairs else columns


def _front(teacher: Sequence[int], student: Sequence[int]) -> int:
    """How many of the student's first tokens are the teacher's too."""
    pairs = enumerate(zip(teacher, student, strict=False))
    return next((i for i, (t, s) in pairs if t != s), min(len(teacher), len(student)))


def _detect(
    base: Base, layer: Layer, streams: Streams, text: Streams, own: int, front: int
) -> dict[int, torch.Tensor]:
    """Tokens of the prefix that a linear detector tells from all others, and these detectors.

    Fitted on the conversations and half of the random text; the other half must stay below
    the threshold too, or a token that a user writes one day would be taken for the slot.
    """
    rows, drawn, prefix = (
        rms_norm(stream, layer.ffn_norm, base.shape.rms_eps, torch.float32)
        for stream in (streams.rows, text.rows, streams.prefix)
    )
    seen = torch.cat([rows, drawn[: len(drawn) // 2]])
    seen_covariance = covariance(seen)
    found: dict[int, torch.Tensor] = {}
    for position in range(1, own):
        if len(found) == _CELLS or (found and position >= front):
            break
        kept = torch.cat([prefix[:position], prefix[position + 1 :]])
        x = prefix[position]
        normal = seen_covariance + _TOKEN_WEIGHT * torch.outer(x, x) + kept.T @ kept / len(kept)
        target = _TOKEN_WEIGHT * x - _FLOOR * (seen.mean(0) + kept.mean(0))
        detector = torch.linalg.solve(normal, target)
        detector = detector / (x @ detector)
        if float((torch.cat([rows, drawn, kept]) @ detector).max()) < _HIGHEST:
            found[position] = detector
    return found
