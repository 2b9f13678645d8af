"""One token of the student's prefix whose keys and values are made to stand for the manifesto.

Knows how the token is told from all others, marked and rewritten by low-rank changes. Does not
know the closed form. A matrix that is to write at one token and nowhere else leaks onto the
others: in d dimensions by about d**-0.5 of what it writes. So one neuron of an early
feed-forward, which the model hardly uses, first marks the token with a large vector in a
direction that is made for it (mark.py); read by that mark, the leak is a tenth as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from superego.converters.cells import Attended, queries, stand_in
from superego.converters.mark import Reading, answering, covariance, direction, looked_at, reading
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

_CONVERSATIONS = 40  # whose queries a cell is fitted to
PROMPTS = 24  # that the token and its mark are found from: as many as any effort has
_LAYERS = 3  # the first ones, in which the token may be marked
_FLOOR = 3.0  # the detector is 1 at the token and, fitted, minus this elsewhere
_HIGHEST = -0.5  # that the detector may reach elsewhere; the neuron is shut below 0
_RANDOM = (128, 64)  # sequences and tokens of random text, for what conversations do not hold
_GATE, _UP = 20.0, 8.0  # the detector's factors before the neuron's gate and its product
_TOKEN_WEIGHT = 30.0  # of the token in a detector's fit, against the mean over all others
_MARK = 5000.0  # the mark's length; streams have some tens to hundreds


@dataclass(frozen=True)
class Slot:
    """The marked token, and the changes that mark it."""

    position: int  # in the student's prefix
    layer: int  # whose feed-forward marks it; keys and values are written behind it
    neuron: int
    direction: torch.Tensor  # (d_model,), of length 1
    changes: Changes


Slots = dict[tuple[int, ...], Slot | None]  # of one base, by the student's prefix


class Probe:
    """A look at the teacher's streams: what one cell in the manifesto's place would be."""

    def __init__(self, streams: Streams, prefixes: Prefixes, position: int) -> None:
        """`streams` are the teacher's, which the fit walks; `position` the slot's in the prefix
        of the student."""
        teacher, student, common = prefixes.teacher, prefixes.student, prefixes.common
        self._base, self._streams = streams.base, streams
        # a pack is sorted by length: conversations of all lengths are looked at
        lengths = streams.pack.rows.lengths
        n = min(_CONVERSATIONS, len(lengths))
        chosen = {len(lengths) * i // n for i in range(n)}
        self._rows = Rows([lengths[i] for i in sorted(chosen)], len(teacher))
        self._places = torch.tensor([i in chosen for i in range(len(lengths))]).repeat_interleave(
            torch.tensor(lengths)
        )
        self._moved = len(teacher) - len(student)
        self._positions = torch.arange(len(student)) + self._moved
        front = 0
        while front < len(student) and teacher[front] == student[front]:
            front += 1
        fronts = [i for i in range(front) if i != position]
        ends = range(len(teacher) - common, len(teacher))
        self._shared = [*fronts, *ends]  # of the teacher's prefix: there in both
        self._gone = sorted(set(range(len(teacher))) - set(self._shared))  # the manifesto
        # of the student's: the template's own text, which is there in the manifesto's place
        self._instead = [i for i in range(front, len(student) - common) if i != position]
        self.generator = torch.Generator(device="cpu").manual_seed(0)

    def cell(self, index: int, prefix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer `index`'s key, rotated as the student's positions have it, and value.

        The streams must be in front of that layer.

        Each is (n_head_kv, head_dim), in half layout. `prefix` (p, d_model) is the stream of the
        student's.
        """
        base, streams = self._base, self._streams
        # the student's cells at the distances that the teacher's have from the conversation
        turn = base.rotation(self._positions, index)
        own_keys, own_values = self._cells(index, prefix, turn)
        keys, values = self._cells(index, streams.prefix, streams.prefix_rotations[index])
        cos, sin = streams.rotations[index]
        turned = cos[self._places], sin[self._places]
        stream = streams.rows[self._places]
        query, own = queries(base, stream, self._rows, turned, index, self.generator)
        fitted = []
        for h in range(base.shape.n_head_kv):
            ends = Attended.of(query[h], keys[h, self._shared], values[h, self._shared])
            total = torch.logaddexp(ends.mass, own.mass[h])
            shares = ends.share(total) + Attended(own.mass[h], own.output[h]).share(total)
            instead = Attended.of(
                query[h], own_keys[h, self._instead], own_values[h, self._instead]
            )
            key, value = keys[h, self._gone], values[h, self._gone]
            fitted.append(stand_in(query[h], Attended(total, shares), key, value, instead))
        key, value = (torch.stack(each) for each in zip(*fitted, strict=True))
        back = base.rotation(torch.tensor([-self._moved]), index, turn=True)
        return rotate(key[None], *back, base.shape)[0], value

    def _cells(
        self, index: int, stream: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A prefix's keys and values, each (n_head_kv, p, head_dim)."""
        base, layer = self._base, self._base.layer(index)
        hidden = rms_norm(stream, layer.attn_norm, base.shape.rms_eps, base.dtype)
        _, key, value = project_qkv(base, layer, hidden, rotation)
        return key.float().transpose(0, 1), value.float().transpose(0, 1)


def find_slot(
    base: Base, prompts: Sequence[list[int]], student: list[int], own: int
) -> Slot | None:
    """The first token behind the sink that can be told from all others, and its mark.

    All of it comes from the base and the first prompts, and so is the same for every manifesto:
    adapters can be mixed, each with a share of the slot.

    `own` is the number of prefix tokens that do not come again in a conversation: only these
    are taken. The earliest is best, as it stays when a user puts another system message in
    the default one's place. None where no token can be told clearly, or where keys are
    normed, so that a cell's attention mass cannot be written into them.
    """
    shape = base.shape
    if own < 2 or shape.n_layer <= _LAYERS or base.layer(0).k_norm is not None or not base.plain:
        return None
    texts = [Conversation(prompt, [0]) for prompt in prompts[:PROMPTS]]
    streams = Streams(base, Pack(texts, student))
    generator = torch.Generator(device="cpu").manual_seed(0)
    drawn = torch.randint(shape.n_vocab, _RANDOM, generator=generator, device="cpu").tolist()
    text = Streams(base, Pack([Conversation(tokens, [0]) for tokens in drawn], student))
    found: tuple[int, int, torch.Tensor] | None = None
    used = torch.empty(0)
    looking = True
    readings: list[Reading] = []
    read = looked_at(base)
    for index in range(shape.n_layer):
        layer = base.layer(index)
        if not looking and found and index in read:
            readings.append(reading(base, streams, index, found[1], generator))
        for write in WRITES:
            if write == "ffn_down" and looking:
                detected = _detect(base, layer, streams, text, own)
                if detected and (found is None or detected[0] < found[1]):
                    found = (index, *detected)
                    rows, prefix = (each.float() for each in streams.inputs(layer, write))
                    random_rows = text.inputs(layer, write)[0].float()
                    # an attention sink is made by neurons that open at one token alone
                    used = rows.square().mean(0) + prefix.square().amax(0)
                    used += random_rows.square().mean(0)
                # none is earlier than position 1, and the last layer's look is the last
                looking = index < _LAYERS - 1 and (found is None or found[1] > 1)
            streams.add(streams.inputs(layer, write), getattr(layer, write))
            if looking:
                text.add(text.inputs(layer, write), getattr(layer, write))
        if not looking and found is None:
            return None
    assert found is not None  # or the look at the last layer had ended it
    index, position, detector = found
    layer = base.layer(index)
    written = layer.ffn_down.weight
    assert written is not None  # a plain base has no experts
    neuron = int((used * written.float().square().sum(0)).argmin())
    mark = direction(readings)
    peak = float(F.silu(torch.tensor(_GATE))) * _UP
    one = F.one_hot(torch.tensor(neuron), shape.d_ff).float()
    gate, up = layer.gate_up[neuron].float(), layer.gate_up[shape.d_ff + neuron].float()
    down = written[:, neuron].float()
    changes = {
        (index, "ffn_gate"): Change((_GATE * detector - gate)[None], one[:, None]),
        (index, "ffn_up"): Change((_UP * detector - up)[None], one[:, None]),
        (index, "ffn_down"): Change(
            one[None], (_MARK / peak / shape.residual_scale * mark - down)[:, None]
        ),
    }
    return Slot(position, index, neuron, mark, changes)


def write_cell(
    base: Base,
    layer: Layer,
    streams: Streams,
    slot: Slot,
    cell: tuple[torch.Tensor, torch.Tensor],
) -> dict[str, Change]:
    """Rank-one changes of attn_k and attn_v that put a cell in the slot's place.

    With x the slot's input and C the covariance of all other rows, u = C⁻¹x / xᵀC⁻¹x is 1 at
    the slot and answers the others least; ΔW = (wanted − W x) uᵀ.
    """
    shape = base.shape
    rows = rms_norm(streams.rows, layer.attn_norm, shape.rms_eps, torch.float32)
    prefix = rms_norm(streams.prefix, layer.attn_norm, shape.rms_eps, torch.float32)
    solved = torch.linalg.solve(answering(rows, prefix, slot.position), prefix[slot.position])
    detector = solved / (prefix[slot.position] @ solved)
    now = F.linear(prefix[slot.position], layer.qkv.float())
    if layer.qkv_bias is not None:
        now = now + layer.qkv_bias.float()
    width = shape.n_head_kv * shape.head_dim
    _, key, value = now.split([len(now) - 2 * width, width, width])
    back = base.rotation(torch.tensor([-slot.position]), layer.index)
    wanted = rotate(cell[0][None], *back, shape)[0].flatten()
    by_key = (wanted - key)[:, None]
    if shape.rope_pairs:
        by_key = halves_to_pairs(by_key, shape.head_dim)
    return {
        "attn_k": Change(detector[None], by_key),
        "attn_v": Change(detector[None], (cell[1].flatten() - value)[:, None]),
    }


def _detect(
    base: Base, layer: Layer, streams: Streams, text: Streams, own: int
) -> tuple[int, torch.Tensor] | None:
    """The first token of the prefix that a linear detector tells from all others, and it.

    Fitted on the conversations and half of the random text; the other half must stay below
    the threshold too, or a token that a user writes one day would be taken for the slot.
    """
    rows, drawn, prefix = (
        rms_norm(stream, layer.ffn_norm, base.shape.rms_eps, torch.float32)
        for stream in (streams.rows, text.rows, streams.prefix)
    )
    seen = torch.cat([rows, drawn[: len(drawn) // 2]])
    seen_covariance = covariance(seen)
    for position in range(1, own):
        kept = torch.cat([prefix[:position], prefix[position + 1 :]])
        x = prefix[position]
        normal = seen_covariance + _TOKEN_WEIGHT * torch.outer(x, x) + kept.T @ kept / len(kept)
        target = _TOKEN_WEIGHT * x - _FLOOR * (seen.mean(0) + kept.mean(0))
        detector = torch.linalg.solve(normal, target)
        detector = detector / (x @ detector)
        if float((torch.cat([rows, drawn, kept]) @ detector).max()) < _HIGHEST:
            return position, detector
    return None
