"""A base's slot is looked for once; a damaged or missing file costs the search alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from superego.converters.slot import Slot, Slots
from superego.converters.slot_cache import KeptSlot
from superego.converters.streams import Change, Conversation, Prefixes

PREFIXES = Prefixes([1, 2, 3, 9], [1, 4, 9])
SEEN = [Conversation([5, 6], [7]), Conversation([5], [8])]


class Stub:
    """What of a base is in the key."""

    dtype = torch.float32
    device = torch.device("cpu")


def kept(fingerprint: str = "f", seen: list[Conversation] = SEEN) -> KeptSlot:
    base: Any = Stub()
    return KeptSlot(base, fingerprint, PREFIXES, seen)


@pytest.fixture
def slots() -> Slots:
    change = Change(torch.randn(1, 6), torch.randn(6, 1))
    keys = {2: torch.randn(3, 1, 4)}
    return {(1, 4, 9): Slot((1,), 0, (5,), torch.randn(1, 6), keys, {(0, "ffn_gate"): change})}


def test_what_was_found_is_read_again_bit_for_bit(slots: Slots) -> None:
    assert not kept("new").read_into({})
    kept("new").keep(slots)
    again: Slots = {}
    assert kept("new").read_into(again)
    first, second = slots[1, 4, 9], again[1, 4, 9]
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


def test_that_there_is_none_is_kept_too() -> None:
    kept("none").keep({(1, 4, 9): None})
    again: Slots = {}
    assert kept("none").read_into(again)
    assert again == {(1, 4, 9): None}


def test_another_base_or_other_prompts_have_their_own(slots: Slots) -> None:
    kept("one").keep(slots)
    assert not kept("two").read_into({})
    assert not kept("one", SEEN[:1]).read_into({})


@pytest.mark.parametrize("content", [b"", b"no such thing", b"PK\x03\x04" + bytes(50)])
def test_a_damaged_file_is_no_slot(slots: Slots, content: bytes) -> None:
    place = kept("damaged")
    place.keep(slots)
    place.path.write_bytes(content)
    assert not place.read_into({})
    whole = kept("damaged")
    whole.keep(slots)
    assert whole.read_into({})
