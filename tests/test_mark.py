"""The mark's direction: streams hold little of it, and keys read it as a cell would have it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from superego.converters.mark import Reading, direction

D = 12


def reading(seed: int, vary_least: int, asked: float) -> Reading:
    """A layer whose streams vary least along one coordinate; one head, keys of 4 numbers."""
    drawn = torch.Generator().manual_seed(seed)
    variance = torch.ones(D)
    variance[vary_least] = 0.01
    queries = torch.randn(50, 4, generator=drawn) + 2
    wanted = torch.full((50,), asked)
    return Reading(
        inverse=torch.diag(1 / variance),
        by_key=torch.randn(1, 4, D, generator=drawn),
        bias=torch.zeros(1, 4),
        gram=(queries.T @ queries / 50)[None],
        cross=(queries * wanted[:, None]).mean(0)[None],
        square=wanted.square().mean()[None],
    )


def leak(each: Reading, mark: torch.Tensor) -> float:
    return float((mark @ each.inverse @ mark) ** -0.5)


def off(each: Reading, mark: torch.Tensor) -> float:
    """Root mean square of what scores for the key read from the mark are off."""
    key = each.by_key[0] @ mark
    return float((key @ each.gram[0] @ key - 2 * each.cross[0] @ key + each.square[0]).sqrt())


@pytest.mark.parametrize("asked", [-12.0, 0.0, 12.0])
def test_it_leaks_little_and_is_read_as_asked(asked: float) -> None:
    layers = [reading(seed, 3, asked) for seed in range(4)]
    mark = direction(layers)
    assert float(mark.norm()) == pytest.approx(1, abs=1e-5)
    least = F.one_hot(torch.tensor(3), D).float()  # what varies least, and nothing else

    def cost(m: torch.Tensor) -> float:
        return sum(leak(each, m) ** 2 * (off(each, m) ** 2 + 25) for each in layers)

    assert all(leak(each, mark) < 0.5 for each in layers), "1 for most directions, 0.1 at best"
    assert cost(mark) <= min(cost(least), cost(-least)) * 1.0001


def test_its_sign_is_the_one_that_keys_like_better() -> None:
    """Turned round, every head's score would be as far off as it is right."""
    layers = [reading(seed, 3, 6.0) for seed in range(4)]
    mark = direction(layers)
    assert sum(off(each, mark) for each in layers) < sum(off(each, -mark) for each in layers)
