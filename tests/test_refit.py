"""Fitting anew within a time: as many references as it bears, and as a fit's own layers bear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from superego.converters import refit
from superego.converters.references import BLOCKS, Prompts
from superego.converters.streams import Conversation, Prefixes
from superego.progress import Steps

LAYERS, SLOT = 30, 5.0  # seconds that a slot is looked for, in front of the first layer
TALKS = [Conversation([i], [i]) for i in range(400)]


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., refit.Fitted | None]:
    """A fit on a machine that takes so many seconds a layer and reference, by its own clock."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(refit, "time", clock)

    def fit(
        each: float,
        until: float,
        least: int = 1,
        slower: Callable[[int], float] = lambda layer: 1.0,
    ) -> refit.Fitted | None:
        clock.now = 0.0

        def solve(base: Any, talks: Sequence[Conversation], *rest: Any, bear: Any) -> Any:
            n = len(talks)
            clock.now = SLOT
            for layer in range(LAYERS):
                clock.now += each * n * slower(layer)
                if layer + 1 < LAYERS:
                    n = min(n, bear(layer + 1, n))
            assert clock.now <= 1.1 * until
            return {}

        monkeypatch.setattr(refit, "solve", solve)
        opened: Any = SimpleNamespace(
            base=SimpleNamespace(shape=SimpleNamespace(d_model=576, n_layer=LAYERS)),
            slots=SimpleNamespace(of=lambda *arguments: None),
        )
        prompts: Any = SimpleNamespace(prefixes=None)
        steps = Steps(quiet=True)
        return refit.fit_again(opened, prompts, TALKS, {"rank": 96}, until, steps, least)

    return fit


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int, float]]:
    """How many references were written, how many of them are to be fitted, and when that is.

    Of a machine that takes `write` and `fit` seconds for each, and is thought to take 0.2 and 0.4.
    """
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(refit, "time", clock)
    monkeypatch.setattr(refit, "_BESIDE", 0.0)
    monkeypatch.setattr(refit, "_MEASURED", 0)
    monkeypatch.setattr(refit, "_EACH", 0.0)
    monkeypatch.setattr(refit, "_KEPT_HEAP", 1.0)
    monkeypatch.setattr(refit, "writing_seconds", lambda shape, rows, rate: 0.2 * rows / 2)
    monkeypatch.setattr(refit, "fit_seconds", lambda shape, rows, rate: 0.4 * rows / 2)
    prompts = Prompts(Prefixes([1], [1]), [[1, 2]] * 4000)

    def write(seconds: float, fit: float, fitted: bool = True) -> tuple[int, int, float]:
        clock.now = 0.0

        def replies(*rest: Any) -> tuple[list[Conversation], int]:
            asked, blocks, before = rest[3], rest[4], rest[-1]
            n = min(sum(BLOCKS[:blocks]), len(asked.rest))
            clock.now += seconds * (n - len(before))
            return [Conversation([1, 2], [1])] * n, 0

        monkeypatch.setattr(refit, "write_replies", replies)
        found, fits = refit.write_within(
            Any,  # type: ignore[arg-type]
            SimpleNamespace(
                base=SimpleNamespace(shape=None), rate=1, sizes=SimpleNamespace(room=1)
            ),  # type: ignore[arg-type]
            SimpleNamespace(fingerprint=""),  # type: ignore[arg-type]
            prompts,
            refit.Allowance(5, 16, 270.0, fitted, 48),
            [],
            False,
            Steps(quiet=True),
        )
        return len(found), fits, clock.now + fit * min(fits, len(found) - 48)

    return write


@pytest.mark.parametrize("pace", [0.75, 0.9, 1.0, 1.2])
def test_as_many_references_are_written_as_a_fit_then_has_time_for(
    written: Callable[..., tuple[int, int, float]], pace: float
) -> None:
    n, fits, done = written(0.2 * pace**2, 0.4 * pace)  # half of what writing is off by
    assert n - 48 <= fits <= n - 48 + refit._FEWEST * 1.5  # none is written for nothing
    assert 0.9 * 270 < done <= 270


def test_what_must_be_written_is_and_a_slow_fit_has_fewer(
    written: Callable[..., tuple[int, int, float]],
) -> None:
    n, fits, done = written(0.4, 0.4 * 2**0.5)
    assert n == sum(BLOCKS[:5])
    assert fits < n - 48
    assert done == pytest.approx(270, rel=0.01)
    blocks, _, _ = written(0.2, 0.4, fitted=False)
    assert blocks == sum(BLOCKS[:9])  # whole ones alone, where their writing has all the time


@pytest.mark.parametrize(("budget", "left"), [(10, 0.8), (60, 4.8), (300, 12), (3600, 78)])
def test_what_is_left_behind_a_fit_is_enough_to_measure_and_write(
    budget: float, left: float
) -> None:
    assert budget - refit.fitting_seconds(budget) == pytest.approx(left)


def test_a_fit_that_is_done_in_time_has_all_references(
    fitted: Callable[..., refit.Fitted | None],
) -> None:
    found = fitted(0.01, 125.0)  # 30 layers of 4 s, and the slot
    assert found is not None
    assert found.references == found.last == found.settings["most"] == len(TALKS)


def test_a_slow_fit_has_fewer_references_in_the_layers_to_come(
    fitted: Callable[..., refit.Fitted | None],
) -> None:
    found = fitted(0.02, 125.0)
    assert found is not None
    assert found.references == len(TALKS)
    assert 130 < found.last < 190  # of 400 that would take twice as long


def test_a_machine_that_gets_slower_is_noticed_on_the_way(
    fitted: Callable[..., refit.Fitted | None],
) -> None:
    found = fitted(0.01, 125.0, slower=lambda layer: 1.0 if layer < 15 else 1.5)
    assert found is not None
    assert 180 < found.last < 300
    # what is nearly done is not thrown away, nor fitted to what is not worth a fit
    last = fitted(0.01, 115.0, 350, slower=lambda layer: 1.0 if layer < 15 else 1.2)
    assert last is not None
    assert last.last == 350


def test_a_fit_to_too_few_references_is_none(
    fitted: Callable[..., refit.Fitted | None],
) -> None:
    assert fitted(0.02, 125.0, least=200) is None
    assert fitted(1.0, 10.0) is None  # the time is over before the first layers are
    # of a start that keeps none of its references, too
    assert fitted(1.0, 10.0, least=refit.least(0)) is None
