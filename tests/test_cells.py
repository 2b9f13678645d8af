"""A cell that stands for many tokens gives queries what these gave them."""

from __future__ import annotations

import torch

from superego.converters.cells import Attended, stand_in

WIDTH = 16


def drawn(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


def none(queries: torch.Tensor) -> Attended:
    empty = torch.empty(0, WIDTH)
    return Attended.of(queries, empty, empty)


def answer(queries: torch.Tensor, *cells: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    keys, values = (torch.cat(each) for each in zip(*cells, strict=True))
    return Attended.of(queries, keys, values).output


def test_a_cell_that_stands_for_one_token_is_that_token() -> None:
    queries, key, value = drawn(200, 0) / 4, drawn(1, 1), drawn(1, 2)
    shared = Attended.of(queries, drawn(5, 3), drawn(5, 4))
    found = stand_in(queries, shared, key, value, none(queries))
    assert torch.allclose(found[0], key[0], atol=1e-4)
    assert torch.allclose(found[1], value[0], atol=1e-4)


def test_what_cannot_be_removed_is_counted() -> None:
    """A student's prefix keeps its template's own text in the manifesto's place."""
    queries = drawn(400, 0) / 4
    front, manifesto, instead = ((drawn(n, n), drawn(n, 100 + n)) for n in (5, 24, 9))
    shared = Attended.of(queries, *front)
    wanted = answer(queries, front, manifesto)
    left = []
    for counted in (Attended.of(queries, *instead), none(queries)):
        key, value = stand_in(queries, shared, *manifesto, counted)
        cell = key[None], value[None]
        left.append(float((answer(queries, front, cell, instead) - wanted).square().mean()))
    without = float((answer(queries, front, instead) - wanted).square().mean())
    assert left[0] < 0.9 * left[1]
    assert left[0] < 0.8 * without
