"""Cholesky factors, solves and leading eigenvectors of large matrices, made of matrix products.

Knows blocks. Does not know what is solved. LAPACK's own factorization and trsm reach a quarter
and a half of the matrix product's speed at these sizes, and its eigenvectors are all of them where
a few are wanted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_BLOCK = 256
EXTRA = 32  # columns beyond those wanted, that the last of these converge too
_ROUNDS = 3  # of subspace iteration, after the first product


def factor_(gram: torch.Tensor) -> torch.Tensor:
    """gram (n, n), of which the upper half is read, becomes U with Uᵀ U = gram; in place.

    The lower half is left as it is. Raises torch.linalg.LinAlgError where gram is not positive
    definite.
    """
    n = len(gram)
    for start in range(0, n, _BLOCK):
        here = slice(start, min(start + _BLOCK, n))
        corner = torch.linalg.cholesky(gram[here, here].mT, upper=False).mT  # reads its lower half
        gram[here, here] = corner
        if here.stop == n:
            break
        panel = gram[here, here.stop :]
        panel.copy_(torch.linalg.solve_triangular(corner.mT, panel, upper=False))
        for left in range(here.stop, n, 2 * _BLOCK):
            right = min(left + 2 * _BLOCK, n)
            mine = panel[:, left - here.stop : right - here.stop]
            gram[left:right, left:].addmm_(mine.mT, panel[:, left - here.stop :], alpha=-1)
    return gram


def solve(upper: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(Uᵀ U)⁻¹ right (n, k), with the factor in the upper half of `upper`; a new matrix."""
    n = len(upper)
    out = right.clone(memory_format=torch.contiguous_format)
    starts = range(0, n, _BLOCK)
    for start in starts:  # Uᵀ y = right
        here = slice(start, min(start + _BLOCK, n))
        corner = upper[here, here].triu()
        out[here] = torch.linalg.solve_triangular(corner.mT, out[here], upper=False)
        out[here.stop :].addmm_(upper[here, here.stop :].mT, out[here], alpha=-1)
    for start in reversed(starts):  # U x = y
        here = slice(start, min(start + _BLOCK, n))
        out[here].addmm_(upper[here, here.stop :], out[here.stop :], alpha=-1)
        corner = upper[here, here].triu()
        out[here] = torch.linalg.solve_triangular(corner, out[here], upper=True)
    return out


def leading(
    apply: Callable[[torch.Tensor], torch.Tensor], n: int, rank: int, rounds: int = _ROUNDS
) -> torch.Tensor:
    """About the `rank` leading eigenvectors (n, rank) of a symmetric operator, strongest last.

    Subspace iteration from a fixed random start, with a Rayleigh quotient at the end. Where
    eigenvalues fall slowly they hold a third of a percent less than the exact ones
    (test_linear_algebra). `apply` maps (n, k) to (n, k).
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(n, min(n, rank + EXTRA), generator=generator, device="cpu")
    found = apply(start.to(torch.get_default_device()))
    for _ in range(rounds):
        basis = torch.linalg.qr(found).Q
        found = apply(basis)
    small = basis.mT @ found
    _, vectors = torch.linalg.eigh((small + small.mT) / 2)
    return (basis @ vectors)[:, -rank:]
