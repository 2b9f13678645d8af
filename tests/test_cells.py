"""A cell that stands for many tokens gives queries what these gave them."""

from __future__ import annotations

import torch

from superego.converters.cells import Attended, settle, stand_in

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
    assert torch.allclose(found[0], key, atol=1e-4)
    assert torch.allclose(found[1], value, atol=1e-4)


def test_what_cannot_be_removed_is_counted() -> None:
    """A student's prefix keeps its template's own text in the manifesto's place."""
    queries = drawn(400, 0) / 4
    front, manifesto, instead = ((drawn(n, n), drawn(n, 100 + n)) for n in (5, 24, 9))
    shared = Attended.of(queries, *front)
    wanted = answer(queries, front, manifesto)
    left = []
    for counted in (Attended.of(queries, *instead), none(queries)):
        cell = stand_in(queries, shared, *manifesto, counted)
        left.append(float((answer(queries, front, cell, instead) - wanted).square().mean()))
    without = float((answer(queries, front, instead) - wanted).square().mean())
    assert left[0] < 0.9 * left[1]
    assert left[0] < 0.8 * without


def test_two_cells_say_more_than_one() -> None:
    queries, shared = drawn(400, 0) / 4, Attended.of(drawn(400, 0) / 4, drawn(5, 3), drawn(5, 4))
    key, value = drawn(24, 1), drawn(24, 2)
    front = drawn(5, 3), drawn(5, 4)
    wanted = answer(queries, front, (key, value))
    left = []
    for n in (1, 2, 6):
        cells = stand_in(queries, shared, key, value, none(queries), n)
        assert cells[0].shape == cells[1].shape == (n, WIDTH)
        left.append(float((answer(queries, front, cells) - wanted).square().mean()))
    assert left[1] < 0.9 * left[0]
    assert left[2] < 0.9 * left[1]


def test_cells_keep_the_order_of_those_they_are_to_be_like() -> None:
    """So that the same token of every manifesto's adapter says about the same."""
    queries = drawn(400, 0) / 4
    shared = Attended.of(queries, drawn(5, 3), drawn(5, 4))
    key, value = drawn(24, 1), drawn(24, 2)
    near, _ = stand_in(queries, shared, key, value, none(queries), 2)
    for order in ([0, 1], [1, 0]):
        found, _ = stand_in(
            queries, shared, key + 0.1 * drawn(24, 7), value, none(queries), 2, near[order]
        )
        distance = torch.cdist(found, near[order])
        assert distance[0, 0] < distance[0, 1]
        assert distance[1, 1] < distance[1, 0]


def test_one_token_can_be_said_by_two_cells() -> None:
    """A manifesto of a single word is a manifesto."""
    queries, key, value = drawn(200, 0) / 4, drawn(1, 1), drawn(1, 2)
    front = drawn(5, 3), drawn(5, 4)
    shared = Attended.of(queries, *front)
    cells = stand_in(queries, shared, key, value, none(queries), 2)
    wanted = answer(queries, front, (key, value))
    left = float((answer(queries, front, cells) - wanted).square().mean())
    assert left < 0.2 * float((answer(queries, front) - wanted).square().mean())


def test_settled_cells_give_more_nearly_what_is_wanted_on_other_queries_too() -> None:
    queries, unseen = drawn(600, 0) / 4, drawn(600, 50) / 4
    front, manifesto = ((drawn(n, n), drawn(n, 100 + n)) for n in (5, 24))
    shared = Attended.of(queries, *front)
    cells = stand_in(queries, shared, *manifesto, none(queries), 2)
    settled = settle(queries, shared, answer(queries, front, manifesto), *cells)

    def left(asked: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor]) -> float:
        wanted = answer(asked, front, manifesto)
        return float((answer(asked, front, found) - wanted).square().mean())

    assert left(queries, settled) < 0.9 * left(queries, cells)
    assert left(unseen, settled) < 0.95 * left(unseen, cells)


def test_cells_that_are_right_are_left_where_they_are() -> None:
    queries = drawn(400, 0) / 4
    front, cells = ((drawn(n, n), drawn(n, 100 + n)) for n in (5, 2))
    wanted = answer(queries, front, cells)
    found = settle(queries, Attended.of(queries, *front), wanted, *cells)
    assert torch.allclose(found[0], cells[0], atol=1e-3)
    assert torch.allclose(found[1], cells[1], atol=1e-2)
    # and found again from a little way off
    found = settle(queries, Attended.of(queries, *front), wanted, cells[0] + 0.1, cells[1])
    assert float((answer(queries, front, found) - wanted).square().mean()) < 0.1 * float(
        (answer(queries, front, (cells[0] + 0.1, cells[1])) - wanted).square().mean()
    )
