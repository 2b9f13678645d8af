"""The mark's direction: streams hold little of it, and layers read it as a cell would have it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from superego.converters.mark import Reading, apart, direction

D = 12


def reading(seed: int, vary_least: int, asked: float) -> Reading:
    """A layer whose streams vary least along one coordinate; one head, keys of 4 numbers.

    `asked` is the length of the key and the value that are asked for, against what the layer
    reads of a mark by itself.
    """
    drawn = torch.Generator().manual_seed(seed)
    variance = torch.full((D,), 1e-3)
    variance[vary_least] = 1e-5
    queries = torch.randn(50, 4, generator=drawn) + 2
    key, value = (torch.randn(1, 4, D, generator=drawn) for _ in range(2))
    target = F.normalize(torch.tensor([1.0, 2.0, -1.0, 0.5]), dim=0) * asked
    return Reading(
        inverse=torch.diag(1 / variance),
        by_key=key[None],
        bias=-target[None, None],
        gram=(queries.T @ queries / 50)[None],
        by_value=value,
        value_bias=-target[None, None],
        spread=torch.ones(1),
    )


def leak(each: Reading, mark: torch.Tensor) -> float:
    return float((mark @ each.inverse @ mark) ** -0.5)


def off(each: Reading, mark: torch.Tensor) -> float:
    """What scores for the key read from the mark are off, and values, both squared."""
    key = each.by_key[0, 0] @ mark + each.bias[0, 0]
    value = each.by_value[0] @ mark + each.value_bias[0, 0]
    return float(key @ each.gram[0] @ key + 2 * value @ value)


@pytest.mark.parametrize("asked", [-12.0, 0.0, 12.0])
def test_it_leaks_little_and_is_read_as_asked(asked: float) -> None:
    layers = [reading(seed, 3, asked) for seed in range(4)]
    mark = direction(layers, 0)
    assert float(mark.norm()) == pytest.approx(1, abs=1e-5)
    least = F.one_hot(torch.tensor(3), D).float()  # what varies least, and nothing else

    def cost(m: torch.Tensor) -> float:
        return sum(leak(each, m) ** 2 * (off(each, m) + 3) for each in layers)

    assert all(leak(each, mark) < 0.016 for each in layers), "0.03 for most, 0.003 at best"
    assert cost(mark) < 0.98 * min(cost(least), cost(-least)), "the search gets somewhere"


def test_its_sign_is_the_one_that_layers_like_better() -> None:
    """Turned round, every head's key would be as far off as it is right."""
    layers = [reading(seed, 3, 6.0) for seed in range(4)]
    mark = direction(layers, 0)
    assert sum(off(each, mark) for each in layers) < sum(off(each, -mark) for each in layers)


def test_a_second_mark_keeps_apart_from_the_first() -> None:
    """One that is read as the first would have both cells' changes at both tokens."""
    layers = [reading(seed, 3, 0.0) for seed in range(4)]
    first = direction(layers, 0)
    assert abs(float(direction(layers, 0) @ first)) > 0.99
    second = direction([apart(each, first) for each in layers], 0)
    assert abs(float(second @ first)) < 0.5
    for each in layers:  # what Sherman and Morrison say is the inverse with the mark among the rows
        whole = torch.linalg.inv(torch.linalg.inv(each.inverse) + 0.3 * torch.outer(first, first))
        assert torch.allclose(apart(each, first).inverse, whole, rtol=1e-2, atol=10.0)
