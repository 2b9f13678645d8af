"""The closed form: one walk over the layers, a ridge regression at every residual write.

Knows least squares and rank cuts. Does not know manifestos, files or templates. The
nearest published relative is layer-by-layer ridge regression of prompt-conditioned
activations; the rank cut is reduced-rank regression (Izenman 1975).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from superego.converters.linear_algebra import factor_, leading
from superego.converters.linear_algebra import solve as solve_with
from superego.converters.slot import Probe, Slots, write_cells
from superego.converters.streams import (
    WRITES,
    Change,
    Changes,
    Conversation,
    Pack,
    Prefixes,
    Streams,
    behind,
    changed_layer,
    token_kl,
)
from superego.converters.transformer import Base
from superego.converters.unfinished import Unfinished
from superego.errors import SuperegoError

_CELL = ("attn_k", "attn_v")  # that a slot's cell is written by
_GRAM_CHUNK = 2048  # rows multiplied at once; sums of chunks are kept in float32
_GRAM_BLOCK = 512
# The same in bfloat16 where outputs are many: adding to float32 takes its time. Half as many in
# float32, which are as many bytes.
GRAM_ROWS = 8192
LARGE = 1536  # outputs from which on eigenvectors are found by iteration
_ANCHOR_CAP = 3.0  # an anchored row counts at most as one of this many median norms
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
    the streams that the walk ends with.
    """
    aside = unseen.conversations if unseen else ()
    teacher = Streams(base, Pack(conversations, prefixes.teacher, aside))
    student = Streams(base, Pack(conversations, prefixes.student, aside))
    # with the slot alone; for its prefix
    bare = Streams(base, Pack(conversations[:1], prefixes.student))
    untouched = Streams(base, Pack(aside, prefixes.student)) if aside else None
    n = student.pack.fitted_rows  # what is behind them is not fitted to
    own = len(prefixes.student) - prefixes.common  # prefix rows without a twin: kept as they are
    weight = (_PREFIX_WEIGHT * len(conversations)) ** 0.5
    slot = (slots or Slots()).of(base, [c.prompt for c in conversations], prefixes)
    changes: Changes = dict(slot.changes) if slot else {}
    if slot:
        probe = Probe(teacher, prefixes, slot.positions)
        basis = slot.basis()
    done = unfinished.layers if unfinished else 0
    kept = (
        {key: Change(*(m.to(base.device) for m in pair)) for key, pair in unfinished.found.items()}
        if unfinished
        else {}
    )
    for index in range(base.shape.n_layer):
        layer = base.layer(index)
        solved: Changes = {}
        if slot:
            if index < done:
                written = {m: kept[index, m] for m in _CELL if (index, m) in kept}
            elif index > slot.layer:
                cells = probe.cells(index, student.prefix, slot.keys[index])
                written = write_cells(base, layer, student, slot, cells)
            else:
                written = {}
            solved.update({(index, matrix): found for matrix, found in written.items()})
            changes.update(solved)
            if unfinished and index + 1 == done:
                probe.generator.set_state(unfinished.aside["generator"])
        changed = changed_layer(base, index, changes)
        for write in WRITES:
            matrix = getattr(layer, write)
            teacher.add(teacher.inputs(layer, write), matrix)
            if untouched:
                untouched.add(untouched.inputs(layer, write), matrix)
            own_inputs = bare.inputs(changed, write)
            bare.add(own_inputs, matrix)
            inputs = student.inputs(changed, write)
            student.add(inputs, matrix)
            if matrix.weight is None:  # experts: no matrix of theirs is adapted
                continue
            if index < done:  # walked again, the same operations in the same order
                mark, change = changes.get((index, write)), kept[index, write]
                if slot and mark:
                    bare.add_change(own_inputs, mark)
                    student.add_change(inputs, mark)
                student.add_change(inputs, change)
                changes[index, write] = _both(mark, change) if mark else change
                continue
            rows, prefix = inputs[0][:n], inputs[1]
            mark = changes.get((index, write))
            if slot and mark:
                bare.add_change(own_inputs, mark)
                student.add_change(inputs, mark)
                for each in inputs:  # the fit must not read the neurons, and so gives them nothing
                    each[:, list(slot.neurons)] = 0
            # An attention sink's input is huge; uncapped it would drive the whole fit.
            norms = _norms(prefix[:own])
            cap = (_ANCHOR_CAP * _norms(rows).median() / norms).clamp(max=1)
            scale = torch.cat([weight * cap, torch.full((prefixes.common,), weight)])[:, None]
            lacking = torch.cat(
                [
                    bare.prefix[:own] - student.prefix[:own],
                    teacher.prefix[len(prefixes.teacher) - prefixes.common :]
                    - student.prefix[own:],
                ]
            )
            reachable, lacking = student.reachable(teacher.rows[:n] - student.rows[:n], lacking)
            wanted = [reachable, lacking * scale]
            del reachable
            if slot:  # noise in a mark's direction would be read as the mark
                for each in wanted:
                    each -= (each @ basis) @ basis.T
            wanted = [each.to(rows.dtype) for each in wanted]
            read = student.weigh(rows, (prefix.float() * scale).to(rows.dtype))
            try:
                change = fit(read, wanted, rank, ridges[write])
            except torch.linalg.LinAlgError:
                raise SuperegoError(
                    f"{base.path}: the fit of blk.{index}.{write} cannot be solved: its inputs are "
                    "not finite or vanish; try another --effort, whose ridge differs, or another "
                    "quantization of this model"
                ) from None
            del read, wanted
            change = behind(matrix, change)
            student.add_change(inputs, change)
            solved[index, write] = change
            changes[index, write] = _both(mark, change) if mark else change
            del inputs, own_inputs, rows, prefix  # or they would lie beside the next ones
        del layer, changed, matrix
        if unfinished and index >= done:
            found = {key: (each.a.cpu(), each.b.cpu()) for key, each in solved.items()}
            state = {"generator": probe.generator.get_state()} if slot else {}
            unfinished.add(index, found, state)
        progress(index + 1, base.shape.n_layer)
    if unseen and untouched:
        unseen.walked(teacher, untouched, student)
    return changes


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """(n, in) -> the length of each row, (n,) float32."""
    return torch.cat([part.float().norm(dim=1) for part in rows.split(_GRAM_CHUNK)])


def _both(first: Change, second: Change) -> Change:
    """The sum of two changes of one matrix."""
    return Change(torch.cat([first.a, second.a]), torch.cat([first.b, second.b], dim=1))


def fit(
    inputs: Sequence[torch.Tensor], lacking: Sequence[torch.Tensor], rank: int, ridge: float
) -> Change:
    """Reduced-rank ridge regression of `lacking` (n, out) on `inputs` (n, in).

    Both come in parts, a few rows of one for the same rows of the other: together in one matrix
    the inputs, a fit's largest arrays, would be there twice.

    The Cholesky solve and the eigenvectors are float32. The change is U Uᵀ ΔW with U the top
    eigenvectors of ΔW XᵀX ΔWᵀ: what it keeps is what the rows see most of. As
    ΔW (XᵀX + Λ) = RᵀX, that product is (RᵀX − ΔW Λ) ΔWᵀ, which needs no square of the input width.
    """
    if sum(map(len, inputs)) < inputs[0].shape[1]:
        return _dual(inputs, lacking, rank, ridge)
    out = lacking[0].shape[1]
    large = out >= LARGE and out > 2 * rank
    rows = 2 * GRAM_ROWS // inputs[0].element_size() if large else _GRAM_CHUNK
    gram, cross = _moments(inputs, lacking, rows)
    diagonal = gram.diagonal()
    penalty = _penalty(diagonal, ridge)
    diagonal += penalty
    if large:
        return _large(gram, cross, penalty, rank)
    delta = _solved(gram, cross.T).T  # (out, in)
    seen = (cross - delta * penalty) @ delta.T  # (out, out), symmetric but for rounding
    _, vectors = torch.linalg.eigh((seen + seen.T) / 2)
    b = vectors[:, -min(rank, out) :]  # (out, rank), strongest last
    return Change((b.T @ delta).contiguous(), b.contiguous())


def _penalty(diagonal: torch.Tensor, ridge: float) -> torch.Tensor:
    """Λ's diagonal (in,), from that of XᵀX."""
    return ridge * diagonal + 1e-6 * diagonal.mean() + 1e-12


def _dual(
    inputs: Sequence[torch.Tensor], lacking: Sequence[torch.Tensor], rank: int, ridge: float
) -> Change:
    """The change of `fit` where rows are fewer than inputs: solved by rows, all in float32.

    With Y = X Λ^-½ and α = (Y Yᵀ + I)⁻¹ R it is ΔW = αᵀ Y Λ^-½ (kernel ridge regression), and
    what it gives the rows is X ΔWᵀ = R − α, whose leading directions of the outputs are kept.
    """
    x = torch.cat([part.float() for part in inputs])
    wanted = torch.cat([part.float() for part in lacking])
    scale = _penalty(x.square().sum(0), ridge).rsqrt()
    x *= scale
    kernel = x @ x.T
    kernel.diagonal().add_(1)
    alpha = _solved(kernel, wanted)  # (n, out)
    given = wanted - alpha
    n, out = given.shape
    if rank <= n < out:  # the same directions, from the smaller square
        _, vectors = torch.linalg.eigh(given @ given.T)
        b, _ = torch.linalg.qr(given.T @ vectors[:, -rank:])
    else:
        _, vectors = torch.linalg.eigh(given.T @ given)
        b = vectors[:, -min(rank, out) :]  # (out, rank), strongest last
    return Change(((alpha @ b).T @ x * scale).contiguous(), b.contiguous())


def _moments(
    inputs: Sequence[torch.Tensor], lacking: Sequence[torch.Tensor], chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """XᵀX (in, in), its upper half alone, and RᵀX (out, in), both float32.

    Products run in the inputs' type, `chunk` rows at a time, and are summed in float32. A product
    in bfloat16 is rounded to 8 bits: where rows have much in common that error would exceed the
    ridge and leave a matrix that is not positive definite. So what all rows share, m, is taken off
    first: X = C + 1mᵀ, XᵀX = CᵀC + m(s + nm/2)ᵀ + (s + nm/2)mᵀ with s the sum of C's rows.
    """
    width, out = inputs[0].shape[1], lacking[0].shape[1]
    n = sum(map(len, inputs))
    device, dtype = inputs[0].device, inputs[0].dtype
    gram, cross = (torch.zeros(rows, width, device=device) for rows in (width, out))
    ones = inputs[0].new_ones(max(map(len, inputs)))
    sums = torch.stack([(ones[: len(part)] @ part).float() for part in inputs])
    mean = (sums.sum(0) / n).to(dtype)
    total, wanted = (torch.zeros(columns, device=device) for columns in (width, out))
    for part, missing in zip(inputs, lacking, strict=True):
        for start in range(0, len(part), chunk):
            x, r = part[start : start + chunk], missing[start : start + chunk]
            wanted += r.float().sum(0)
            if chunk > _GRAM_CHUNK:  # a layout that wide products are faster in
                x, r = x.T.contiguous().T.sub_(mean), r.T.contiguous().T
            else:
                x = x - mean
            total += ones[: len(x)] @ x
            for left in range(0, width, _GRAM_BLOCK):  # upper blocks: nothing reads the others
                columns = slice(left, left + _GRAM_BLOCK)
                gram[columns, left:] += x[:, columns].T @ x[:, left:]
            for top in range(0, out, _GRAM_BLOCK):
                cross[top : top + _GRAM_BLOCK] += r[:, top : top + _GRAM_BLOCK].T @ x
    common = mean.float()
    half = total + (n / 2) * common
    gram.addr_(common, half).addr_(half, common)
    cross.addr_(wanted, common)
    return gram, cross


def _large(gram: torch.Tensor, cross: torch.Tensor, penalty: torch.Tensor, rank: int) -> Change:
    """The change of `fit` without the whole ΔW: it is only ever applied to a few vectors.

    `gram` is XᵀX + Λ, and becomes its factor. Of 4,096 outputs a solve for some 200 columns at
    a time is a fraction of the work, and all eigenvectors would take longer than the rest.
    """
    upper = factor_(gram)

    def apply(vectors: torch.Tensor) -> torch.Tensor:  # ΔW XᵀX ΔWᵀ
        found = solve_with(upper, cross.T @ vectors)  # ΔWᵀ
        return cross @ (found - solve_with(upper, penalty[:, None] * found))

    b = leading(apply, len(cross), rank)
    return Change(solve_with(upper, cross.T @ b).T.contiguous(), b.contiguous())


def _solved(gram: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """gram⁻¹ right, with gram (n, n) of which the upper half is read; it becomes its factor.

    Nothing of its size is made beside it: of 14,336 inputs it has 0.8 GB.
    """
    lower = gram.mT  # LAPACK's layout, so that it works in place
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(lower, check_errors=True, out=(lower, info))
    half = torch.linalg.solve_triangular(lower, right, upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)
