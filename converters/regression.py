"""Reduced-rank ridge regression.

Knows least squares and rank cuts. Does not know layers, streams or manifestos. The rank cut is
reduced-rank regression (Izenman 1975).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from superego.converters.linear_algebra import factor_, leading
from superego.converters.linear_algebra import solve as solve_with
from superego.converters.streams import Change

_GRAM_CHUNK = 2048  # rows multiplied at once; sums of chunks are kept in float32
_GRAM_BLOCK = 512
_DUAL_BLOCK = 256  # the same where rows are fewer than inputs
# The same in bfloat16 where outputs are many: adding to float32 takes its time. Half as many in
# float32, which are as many bytes.
GRAM_ROWS = 8192
LARGE = 1536  # outputs from which on eigenvectors are found by iteration


def fit(
    inputs: Sequence[torch.Tensor],
    lacking: Sequence[torch.Tensor],
    rank: int,
    ridge: float,
    lengths: Sequence[torch.Tensor] | None = None,
) -> Change:
    """Reduced-rank ridge regression of `lacking` (n, out) on `inputs` (n, in).

    Both come in parts, a few rows of one for the same rows of the other: together in one matrix
    the inputs, a fit's largest arrays, would be there twice. `lengths` (n,), in the same parts, are
    what rows of both are multiplied by first, so that a row counts by its square.

    The Cholesky solve and the eigenvectors are float32. The change is U Uᵀ ΔW with U the top
    eigenvectors of ΔW XᵀX ΔWᵀ: what it keeps is what the rows see most of. As
    ΔW (XᵀX + Λ) = RᵀX, that product is (RᵀX − ΔW Λ) ΔWᵀ, which needs no square of the input width.
    """
    if sum(map(len, inputs)) < inputs[0].shape[1]:
        return _dual(inputs, lacking, rank, ridge, lengths)
    out = lacking[0].shape[1]
    large = out >= LARGE and out > 2 * rank
    rows = 2 * GRAM_ROWS // inputs[0].element_size() if large else _GRAM_CHUNK
    gram, cross = _moments(inputs, lacking, rows, lengths)
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
    inputs: Sequence[torch.Tensor],
    lacking: Sequence[torch.Tensor],
    rank: int,
    ridge: float,
    lengths: Sequence[torch.Tensor] | None,
) -> Change:
    """The change of `fit` where rows are fewer than inputs: solved by rows, all in float32.

    With Y = X Λ^-½ and α = (Y Yᵀ + I)⁻¹ R it is ΔW = αᵀ Y Λ^-½ (kernel ridge regression), and
    what it gives the rows is X ΔWᵀ = R − α, whose leading directions of the outputs are kept.
    """
    x = torch.cat([part.float() for part in inputs])
    wanted = torch.cat([part.float() for part in lacking])
    if lengths is not None:
        length = torch.cat(list(lengths))[:, None]
        x *= length
        wanted *= length
    scale = _penalty(x.square().sum(0), ridge).rsqrt()
    x *= scale
    n, out = wanted.shape
    kernel = x.new_zeros(n, n)
    for top in range(0, n, _DUAL_BLOCK):  # upper blocks: nothing reads the others
        kernel[top : top + _DUAL_BLOCK, top:] = x[top : top + _DUAL_BLOCK] @ x[top:].T
    kernel.diagonal().add_(1)
    alpha = _solved(kernel, wanted)  # (n, out)
    given = wanted - alpha
    if rank <= n < out:  # the same directions, from the smaller square
        _, vectors = torch.linalg.eigh(given @ given.T)
        b, _ = torch.linalg.qr(given.T @ vectors[:, -rank:])
    else:
        _, vectors = torch.linalg.eigh(given.T @ given)
        b = vectors[:, -min(rank, out) :]  # (out, rank), strongest last
    return Change(((alpha @ b).T @ x * scale).contiguous(), b.contiguous())


def _moments(
    inputs: Sequence[torch.Tensor],
    lacking: Sequence[torch.Tensor],
    chunk: int,
    lengths: Sequence[torch.Tensor] | None,
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
    if lengths is None:
        lengths = [ones[: len(part)] for part in inputs]
    lengths = [each.to(dtype) for each in lengths]
    sums = torch.stack([(each @ part).float() for each, part in zip(lengths, inputs, strict=True)])
    mean = (sums.sum(0) / n).to(dtype)
    total, wanted = (torch.zeros(columns, device=device) for columns in (width, out))
    for part, missing, length in zip(inputs, lacking, lengths, strict=True):
        for start in range(0, len(part), chunk):
            rows = slice(start, start + chunk)
            x, r, long = part[rows], missing[rows], length[rows, None]
            if chunk > _GRAM_CHUNK:  # copied to a layout that wide products are faster in
                x, r = (each.T.clone(memory_format=torch.contiguous_format).T for each in (x, r))
                torch.addcmul(-mean, x, long, out=x)
                r *= long
            else:
                x, r = torch.addcmul(-mean, x, long), r * long
            wanted += r.float().sum(0)
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
