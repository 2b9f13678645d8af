"""A base's slot is looked for once; a damaged or missing file costs the search alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from superego.converters import slot as slot_module
from superego.converters.slot import Slot, Slots
from superego.converters.slot_cache import KeptSlots, slot_path
from superego.converters.streams import Change, Prefixes

PREFIXES = Prefixes([1, 2, 3, 9], [1, 4, 9])
PROMPTS = [[5, 6], [5]]


class Stub:
    """What of a base is in the key."""

    dtype = torch.float32
    device = torch.device("cpu")


BASE: Any = Stub()


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Slot | None]:
    """What the searches have found, one after another; the tests' next one finds a random slot."""
    found: list[Slot | None] = []

    def search(base: Any, prompts: Any, prefixes: Any) -> Slot:
        change = Change(torch.randn(1, 6), torch.randn(6, 1))
        keys = {2: torch.randn(3, 1, 4)}
        found.append(Slot((1,), 0, (5,), torch.randn(1, 6), keys, {(0, "ffn_gate"): change}))
        return found[-1]

    monkeypatch.setattr(slot_module, "find_slot", search)
    return found


def look(slots: Slots, prompts: list[list[int]] = PROMPTS) -> Slot | None:
    return slots.of(BASE, prompts, PREFIXES)


def test_what_was_found_is_read_again_bit_for_bit(searches: list[Slot | None]) -> None:
    first = look(KeptSlots("new"))
    second = look(KeptSlots("new"))
    assert len(searches) == 1
    assert first is not None
    assert second is not None
    assert (first.positions, first.layer, first.neurons) == (
        second.positions,
        second.layer,
        second.neurons,
    )
    assert torch.equal(first.directions, second.directions)
    assert first.keys.keys() == second.keys.keys()
    assert torch.equal(first.keys[2], second.keys[2])
    (mine,), (theirs,) = first.changes.values(), second.changes.values()
    assert torch.equal(mine.a, theirs.a)
    assert torch.equal(mine.b, theirs.b)


def test_that_there_is_none_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    monkeypatch.setattr(slot_module, "find_slot", lambda *_: searches.append(1))
    assert look(KeptSlots("none")) is None
    assert look(KeptSlots("none")) is None
    assert len(searches) == 1


def test_another_base_or_other_prompts_have_their_own(searches: list[Slot | None]) -> None:
    look(KeptSlots("one"))
    look(KeptSlots("two"))
    look(KeptSlots("one"), PROMPTS[:1])
    assert len(searches) == 3


def test_without_the_cache_it_is_looked_for_once_a_process(searches: list[Slot | None]) -> None:
    slots = Slots()
    assert look(slots) is look(slots)
    assert len(searches) == 1
    look(Slots())
    assert len(searches) == 2


@pytest.mark.parametrize("content", [b"", b"no such thing", b"PK\x03\x04" + bytes(50)])
def test_a_damaged_file_is_no_slot(searches: list[Slot | None], content: bytes) -> None:
    look(KeptSlots("damaged"))
    before = len(searches)
    slot_path(BASE, "damaged", PROMPTS, PREFIXES).write_bytes(content)
    look(KeptSlots("damaged"))
    assert len(searches) == before + 1
    look(KeptSlots("damaged"))
    assert len(searches) == before + 1, "the damaged file was replaced"
