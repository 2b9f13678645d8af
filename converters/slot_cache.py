"""A base's slot in the user's cache: looked for once, as it is the same for every manifesto.

Knows files. Does not know how a slot is found. A file that is damaged or cannot be written costs
the search, not the result.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import platformdirs
import torch

import superego
from superego.atomic import replacing
from superego.converters.slot import PROMPTS, Slot, Slots
from superego.converters.streams import Change, Conversation, Prefixes
from superego.converters.transformer import Base
from superego.errors import SuperegoError


class KeptSlot:
    """The place of one slot: of a base, a template and the prompts that it is found from."""

    def __init__(
        self, base: Base, fingerprint: str, prefixes: Prefixes, seen: Sequence[Conversation]
    ) -> None:
        """What is in the key decides the slot to the bit."""
        self._student = tuple(prefixes.student)
        self._device = base.device
        parts = [
            superego.__version__,
            torch.__version__,
            fingerprint,
            [str(base.dtype), base.device.type, torch.get_num_threads()],
            [prefixes.student, prefixes.sample, prefixes.common],
            [c.prompt for c in seen[:PROMPTS]],
        ]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]
        self.path = Path(platformdirs.user_cache_dir("superego")) / "slots" / f"{key}.pt"

    def read_into(self, slots: Slots) -> bool:
        """Put the kept slot, or that there is none, among `slots`; whether it was kept."""
        try:
            kept = torch.load(self.path, map_location=self._device, weights_only=True)
            slots[self._student] = None if kept["slot"] is None else slot_of(kept["slot"])
        except (
            OSError,
            RuntimeError,
            KeyError,
            TypeError,
            ValueError,
            EOFError,
            pickle.UnpicklingError,
        ):
            return False
        return True

    def keep(self, slots: Slots) -> None:
        """Write what a fit has found."""
        slot = slots[self._student]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                torch.save({"slot": None if slot is None else plain(slot)}, temporary)
        except (OSError, RuntimeError, SuperegoError):
            return


def plain(slot: Slot) -> tuple[Any, ...]:
    """A slot as numbers and tensors, as a file may hold it."""
    marks = {place: (change.a, change.b) for place, change in slot.changes.items()}
    return slot.positions, slot.layer, slot.neurons, slot.directions, slot.keys, marks


def slot_of(kept: tuple[Any, ...]) -> Slot:
    """The slot that `plain` took apart."""
    positions, layer, neurons, directions, keys, marks = kept
    changes = {place: Change(*pair) for place, pair in marks.items()}
    return Slot(positions, layer, neurons, directions, keys, changes)
