"""The closed form: one walk over the layers, a ridge regression at every residual write.

Knows the order of a fit. Does not know which rows say what, files or templates. The nearest
published relative is layer-by-layer ridge regression of prompt-conditioned activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from superego.converters.regression import fit
from superego.converters.slot import CELL, Slots
from superego.converters.streams import (
    WRITES,
    Change,
    Changes,
    Conversation,
    Prefixes,
    behind,
)
from superego.converters.transformer import Base, Write
from superego.converters.unfinished import Unfinished
from superego.converters.walk import Aside, Walk
from superego.errors import SuperegoError

# Of what a fit finds: it changes with the code, and a fit that was interrupted under another one is
# begun anew.
REVISION = 3


def solve(
    base: Base,
    conversations: Sequence[Conversation],
    prefixes: Prefixes,
    rank: int,
    ridges: Mapping[str, float],
    progress: Callable[[int, int], None] = lambda done, total: None,
    slots: Slots | None = None,
    unfinished: Unfinished | None = None,
    unseen: Aside | None = None,
    bear: Callable[[int, int], int] | None = None,
) -> Changes:
    """Changes of every residual write that make the student's streams the teacher's.

    At each write, with X (n, in) the student's inputs and R (n, d_model) what its stream
    lacks of the teacher's, ΔW = Rᵀ X (XᵀX + ridge·diag(XᵀX))⁻¹ with the write's own ridge,
    cut to `rank` and applied before the walk goes on, so that later writes mend what earlier
    ones left.

    Where the student's prefix has tokens that can be told from all others, their keys and
    values are first made to stand for the manifesto's (slot.py), and the fit mends the rest.
    `slots` has those of earlier fits on this base: without it every fit looks for its own.
    `unfinished` holds the layers that an interrupted fit has solved, and is given those that this
    one solves. `unseen` conversations are walked with the others and not fitted to; they are given
    the streams that the walk ends with. `bear` is told how many layers are done and how many
    conversations they were fitted to, and says how many the rest is to be fitted to: no more.
    """
    slot = (slots or Slots()).of(base, [c.prompt for c in conversations], prefixes)
    aside = unseen.conversations if unseen else ()
    walk = Walk(base, conversations, prefixes, slot, aside)
    changes: Changes = dict(slot.changes) if slot else {}
    done = unfinished.layers if unfinished else 0
    kept = (
        {key: Change(*(m.to(base.device) for m in pair)) for key, pair in unfinished.found.items()}
        if unfinished
        else {}
    )
    for index in range(base.shape.n_layer):
        layer = base.layer(index)
        if index < done:  # walked again, the same operations in the same order
            written = {m: kept[index, m] for m in CELL if (index, m) in kept}
        else:
            written = walk.cells(layer)
        solved = {(index, matrix): found for matrix, found in written.items()}
        changes.update(solved)
        if walk.probe and unfinished and index + 1 == done:
            walk.probe.generator.set_state(unfinished.aside["generator"])
        walk.begin(layer, changes)
        for write in WRITES:
            matrix: Write = getattr(layer, write)
            walk.step(write)
            if matrix.weight is None:  # experts: no matrix of theirs is adapted
                walk.apply(None)
                continue
            mark = changes.get((index, write))
            if mark:
                walk.mark(mark)
            if index < done:
                change = kept[index, write]
            else:
                # it must not read the neurons that mark, and so gives them nothing
                asked = walk.asked(slot.neurons if slot and mark else ())
                try:
                    fitted = fit(asked.inputs, asked.lacking, rank, ridges[write], asked.lengths)
                    change = behind(matrix, fitted)
                except torch.linalg.LinAlgError:
                    raise SuperegoError(
                        f"{base.path}: the fit of blk.{index}.{write} cannot be solved: its inputs "
                        "are not finite or vanish; try another --effort, whose ridge differs, or "
                        "another quantization of this model"
                    ) from None
                del asked
            walk.apply(change)
            solved[index, write] = change
            changes[index, write] = _both(mark, change) if mark else change
        walk.leave()
        del layer, matrix
        if unfinished and index >= done:
            found = {key: (each.a.cpu(), each.b.cpu()) for key, each in solved.items()}
            state = {"generator": walk.probe.generator.get_state()} if walk.probe else {}
            unfinished.add(index, found, state)
        progress(index + 1, base.shape.n_layer)
        if bear and index + 1 < base.shape.n_layer:
            walk.narrow(bear(index + 1, walk.n_fitted))
    if unseen and walk.untouched:
        unseen.walked(walk.teacher, walk.untouched, walk.student)
    return changes


def _both(first: Change, second: Change) -> Change:
    """The sum of two changes of one matrix."""
    return Change(torch.cat([first.a, second.a]), torch.cat([first.b, second.b], dim=1))
