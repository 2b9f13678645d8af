"""Blocked factors and solves, and eigenvectors by iteration, against LAPACK's."""

from __future__ import annotations

import pytest
import torch

from superego.converters import regression
from superego.converters.linear_algebra import factor_, leading, solve
from superego.converters.regression import _penalty, fit


def test_a_blocked_solve_reads_the_upper_half_alone_and_solves() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(900, 700, generator=generator)  # 700: no multiple of the block
    gram = rows.T @ rows
    right = torch.randn(700, 5, generator=generator)
    upper = factor_(gram.triu())
    assert torch.allclose(gram @ solve(upper, right), right, atol=1e-3)


def test_leading_vectors_hold_what_the_exact_ones_hold() -> None:
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(400, 400, generator=generator)).Q
    values = torch.logspace(0, -3, 400)
    matrix = basis @ torch.diag(values) @ basis.T
    found = leading(lambda x: matrix @ x, 400, 40)
    assert torch.allclose(found.T @ found, torch.eye(40), atol=1e-4)
    assert float((found.T @ matrix @ found).trace() / values[:40].sum()) > 0.995


def test_a_large_fit_explains_as_much_as_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(2000, 600, generator=generator) @ torch.diag(torch.logspace(0, -2, 600))
    turn = torch.randn(600, 300, generator=generator) @ torch.diag(torch.logspace(0, -2, 300))
    wanted = inputs @ turn + 0.1 * torch.randn(2000, 300, generator=generator)
    left = []
    for large in (1, 10_000):
        regression.LARGE, before = large, regression.LARGE
        try:
            change = fit([inputs], [wanted], 32, 0.3)
        finally:
            regression.LARGE = before
        left.append(float((wanted - inputs @ change.a.T @ change.b.T).norm()))
    assert abs(left[0] / left[1] - 1) < 0.002


@pytest.mark.parametrize(("rows", "outputs"), [(60, 40), (60, 90), (25, 90)])
def test_a_fit_to_fewer_rows_than_inputs_is_the_one_by_inputs(rows: int, outputs: int) -> None:
    """Solved by rows: against ΔW = RᵀX (XᵀX + Λ)⁻¹ in double, cut to the rank."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(rows, 100, generator=generator)
    inputs[:, 7] = 0  # one that never is anything
    turn = torch.randn(100, 8, generator=generator) @ torch.randn(8, outputs, generator=generator)
    wanted = inputs @ turn + 0.01 * torch.randn(rows, outputs, generator=generator)
    rank, ridge = 30, 0.4
    change = fit([inputs[:20], inputs[20:]], [wanted[:20], wanted[20:]], rank, ridge)
    x, r = inputs.double(), wanted.double()
    gram = x.T @ x
    whole = torch.linalg.solve(gram + torch.diag(_penalty(gram.diagonal(), ridge)), x.T @ r).T
    left, values, _ = torch.linalg.svd(whole @ x.T, full_matrices=False)
    top = left[:, :rank]
    assert change.a.shape == (rank, 100)
    assert change.b.shape == (outputs, rank)
    assert torch.allclose(change.b.T @ change.b, torch.eye(rank), atol=1e-4)
    found = (change.b @ change.a).double()
    off = (found - top @ top.T @ whole) @ x.T
    assert float(off.norm()) < 1e-3 * float(values.norm())


def test_a_fit_bears_inputs_that_have_nearly_everything_in_common() -> None:
    """A product in bfloat16 would round away the ridge of such rows."""
    generator = torch.Generator().manual_seed(4)
    common = 5 * torch.randn(600, generator=generator)
    inputs = (common + 0.05 * torch.randn(1500, 600, generator=generator)).bfloat16()
    wanted = torch.randn(1500, 40, generator=generator).bfloat16()
    change = fit([inputs], [wanted], 40, 0.02)
    exact = fit([inputs.float()], [wanted.float()], 40, 0.02)
    left, least = (
        float((wanted.float() - inputs.float() @ each.a.T @ each.b.T).norm())
        for each in (change, exact)
    )
    assert left < 1.01 * least


def test_rows_that_come_in_parts_are_fitted_as_one() -> None:
    generator = torch.Generator().manual_seed(5)
    inputs, wanted = (torch.randn(300, n, generator=generator) for n in (50, 40))
    whole = fit([inputs], [wanted], 40, 0.3)
    parts = fit(inputs.split([270, 30]), wanted.split([270, 30]), 40, 0.3)
    assert torch.allclose(whole.b @ whole.a, parts.b @ parts.a, atol=1e-4)
    alone = fit([inputs[:270]], [wanted[:270]], 40, 0.3)
    assert not torch.allclose(whole.b @ whole.a, alone.b @ alone.a, atol=1e-3)


@pytest.mark.parametrize("rows", [60, 300])  # fewer than inputs, and more
def test_a_rows_length_is_what_it_is_multiplied_by(rows: int) -> None:
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(rows, 100, generator=generator)
    wanted = torch.randn(rows, 40, generator=generator)
    lengths = torch.rand(rows, generator=generator)
    parts = [0, rows - 20], [rows - 20, rows]
    cut = [slice(*part) for part in parts]
    given = fit(
        [inputs[c] for c in cut], [wanted[c] for c in cut], 40, 0.3, [lengths[c] for c in cut]
    )
    by_hand = fit([inputs * lengths[:, None]], [wanted * lengths[:, None]], 40, 0.3)
    found, asked = given.b @ given.a, by_hand.b @ by_hand.a
    assert torch.allclose(found, asked, atol=1e-4 * float(asked.abs().max()))
    plain = fit([inputs], [wanted], 40, 0.3)
    assert not torch.allclose(found, plain.b @ plain.a, atol=0.1 * float(asked.abs().max()))
