"""One manifesto's conversations, walked with the base, the teacher and the student side by side.

Knows what the student's streams lack of the teacher's at each residual write, and which rows say
how much about it. Does not know how a change is found from that, nor of other manifestos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from superego.converters.slot import Probe, Slot, write_cells
from superego.converters.streams import (
    Change,
    Changes,
    Conversation,
    Pack,
    Prefixes,
    Streams,
    changed_layer,
    token_kl,
)
from superego.converters.transformer import Base, Layer

_CHUNK = 2048  # rows whose lengths are taken at once
_ANCHOR_CAP = 3.0  # an anchored row counts at most as one of this many median norms
_ROW_CAP = 20.0  # median norms of what is lacking; a row that lacks more counts as one of so many
_PROMPT_WEIGHT = 0.33  # of a row of a prompt, which only later rows read
_PREFIX_WEIGHT = 0.25  # of a prefix row, as a share of the number of conversations


class Aside:
    """Conversations that a fit does not see, and how far their replies are from the teacher's."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self.conversations = conversations

    def walked(self, teacher: Streams, bare: Streams, student: Streams) -> None:
        """These streams are behind the last layer; `bare`, the base's own, has unseen rows alone.

        The others have them behind the rows that were fitted to.
        """
        self._base, self._weight = bare.base, bare.pack.reply_weight
        self._ends = [
            each.rows[-bare.pack.rows.total :][bare.pack.predicts]
            for each in (teacher, bare, student)
        ]

    def kl(self) -> tuple[float, float]:
        """KL(teacher‖bare base) and KL(teacher‖with the changes), as `streams.mean_kl`."""
        target, *students = self._ends
        bare, changed = (
            float((each * self._weight).sum()) for each in token_kl(self._base, target, *students)
        )
        return bare, changed


@dataclass(frozen=True)
class Asked:
    """What a fit is asked for: rows of conversations, and rows of the prefix.

    Two each: (n, in) and (p, in), (n, d_model) and (p, d_model) in the base's type, (n,) and (p,)
    in float32.
    """

    inputs: list[torch.Tensor]
    lacking: list[torch.Tensor]
    lengths: list[torch.Tensor]  # of a row, that it is to count as


class Walk:
    """Streams of one manifesto's teacher and student, a residual write at a time.

    At each layer `begin` and in the end `leave`; at each write `step` and in the end `apply`, and
    in between `asked` for what the write is to give.
    """

    def __init__(
        self,
        base: Base,
        conversations: Sequence[Conversation],
        prefixes: Prefixes,
        slot: Slot | None,
        aside: Sequence[Conversation] = (),
    ) -> None:
        """`aside` conversations are walked with the others, and asked nothing of."""
        self._base, self._prefixes, self._slot = base, prefixes, slot
        self.teacher = Streams(base, Pack(conversations, prefixes.teacher, aside))
        self.student = Streams(base, Pack(conversations, prefixes.student, aside))
        # with the slot alone; for its prefix
        self._bare = Streams(base, Pack(conversations[:1], prefixes.student))
        self.untouched = Streams(base, Pack(aside, prefixes.student)) if aside else None
        # prefix rows without a twin: kept as they are
        self._own = len(prefixes.student) - prefixes.common
        self._basis = slot.basis() if slot else None
        self._count()

    @property
    def n_fitted(self) -> int:
        """Of how many conversations changes are asked."""
        return self.student.pack.n_fitted

    def narrow(self, n: int) -> None:
        """From here on n of the conversations alone are walked and fitted to, of all lengths."""
        if n >= self.n_fitted:
            return
        kept = [self.n_fitted * i // n for i in range(n)]
        for each in (self.teacher, self.student):
            each.narrow(kept)
        before = self.probe
        self._count()
        if before and self.probe:
            self.probe.generator = before.generator

    def _count(self) -> None:
        """What follows from the conversations that are walked."""
        self._n = self.student.pack.fitted_rows  # what is behind them is not fitted to
        self._weight = (_PREFIX_WEIGHT * self.n_fitted) ** 0.5
        positions = self._slot.positions if self._slot else ()
        self.probe = Probe(self.teacher, self._prefixes, positions) if positions else None

    def cells(self, layer: Layer) -> dict[str, Change]:
        """The changes of attn_k and attn_v that put the manifesto's cells in the slot's places.

        None in front of the layer that marks them.
        """
        if self.probe is None or self._slot is None or layer.index <= self._slot.layer:
            return {}
        near = self._slot.keys[layer.index]
        cells = self.probe.cells(layer.index, self.student.prefix, near)
        return write_cells(self._base, layer, self.student, self._slot, cells)

    def begin(self, layer: Layer, changes: Changes) -> None:
        """The student goes through `layer` with these changes of what reads the stream."""
        self._layer = layer
        self._changed = changed_layer(self._base, layer.index, changes)

    def step(self, write: str) -> None:
        """All streams are given what the base's own matrix `write` has for them."""
        layer, matrix = self._layer, getattr(self._layer, write)
        self.teacher.add(self.teacher.inputs(layer, write), matrix)
        if self.untouched:
            self.untouched.add(self.untouched.inputs(layer, write), matrix)
        self._own_inputs = self._bare.inputs(self._changed, write)
        self._bare.add(self._own_inputs, matrix)
        self._inputs = self.student.inputs(self._changed, write)
        self.student.add(self._inputs, matrix)

    def mark(self, change: Change) -> None:
        """The slot's own change of this write, which is the student's without a fit too."""
        self._bare.add_change(self._own_inputs, change)
        self.student.add_change(self._inputs, change)

    def asked(self, shut: Sequence[int] = ()) -> Asked:
        """What the write reads, and what its stream lacks: rows of conversations, of the prefix.

        Neurons that are `shut` must not be read, and so are given nothing.
        """
        student, own, common = self.student, self._own, self._prefixes.common
        for each in self._inputs:
            each[:, list(shut)] = 0
        rows, prefix = self._inputs[0][: self._n], self._inputs[1]
        # An attention sink's input is huge; uncapped it would drive the whole fit.
        cap = _at_most(_ANCHOR_CAP * _norms(rows).median(), _norms(prefix[:own]))
        length = torch.cat([self._weight * cap, torch.full((common,), self._weight)])
        lacking = torch.cat(
            [
                self._bare.prefix[:own] - student.prefix[:own],
                self.teacher.prefix[len(self._prefixes.teacher) - common :] - student.prefix[own:],
            ]
        )
        missing = self.teacher.rows[: self._n] - student.rows[: self._n]
        wanted = list(student.reachable(missing, lacking))
        del missing
        if self._basis is not None:  # noise in a mark's direction would be read as the mark
            for each in wanted:
                each -= (each @ self._basis) @ self._basis.T
        # A token that is an attention sink with the manifesto and none without it lacks a hundred
        # times as much as others; such a row in a hundred would be most of what is fitted.
        norms = _norms(wanted[0])
        count = _at_most(_ROW_CAP * norms.median(), norms)
        count[~student.pack.predicts[: self._n]] *= _PROMPT_WEIGHT**0.5
        lengths = [count, length]
        wanted = [each.to(rows.dtype) for each in wanted]
        return Asked(student.weigh(rows, prefix), wanted, lengths)

    def apply(self, change: Change | None) -> None:
        """The student gets this change of the write, if any; what was read is let go of."""
        if change is not None:
            self.student.add_change(self._inputs, change)
        del self._inputs, self._own_inputs  # or they would lie beside the next ones

    def leave(self) -> None:
        """The layer is let go of: the next one is read without it in memory."""
        del self._layer, self._changed


def _at_most(most: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """What rows of these norms (n,) are multiplied by, so that none is longer than `most`."""
    return (most / norms.clamp(min=1e-30)).clamp(max=1)


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """(n, in) -> the length of each row, (n,) float32."""
    return torch.cat([part.float().norm(dim=1) for part in rows.split(_CHUNK)])
