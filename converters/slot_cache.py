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
from superego.converters.closed_form import REVISION
from superego.converters.slot import LOOKED_AT, PROMPTS, Slot, Slots
from superego.converters.streams import Change, Changes, Prefixes
from superego.converters.transformer import Base
from superego.errors import SuperegoError


class KeptSlots(Slots):
    """Slots that are in the user's cache, or are put there once they are found."""

    def __init__(self, fingerprint: str) -> None:
        """`fingerprint` is the base's."""
        super().__init__()
        self._fingerprint = fingerprint

    def _look(self, base: Base, prompts: Sequence[list[int]], prefixes: Prefixes) -> Slot | None:
        path = slot_path(base, self._fingerprint, prompts, prefixes)
        try:
            kept = torch.load(path, map_location=base.device, weights_only=True)["slot"]
            return None if kept is None else slot_of(kept)
        except (
            OSError,
            RuntimeError,
            KeyError,
            TypeError,
            ValueError,
            EOFError,
            pickle.UnpicklingError,
        ):
            pass
        slot = super()._look(base, prompts, prefixes)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                torch.save({"slot": None if slot is None else plain(slot)}, temporary)
        except (OSError, RuntimeError, SuperegoError):
            pass
        return slot


def slot_path(
    base: Base, fingerprint: str, prompts: Sequence[list[int]], prefixes: Prefixes
) -> Path:
    """Where a slot is kept. What is in the key decides the slot to the bit."""
    parts = [
        superego.__version__,
        REVISION,
        torch.__version__,
        fingerprint,
        [str(base.dtype), base.device.type, torch.get_num_threads()],
        [prefixes.student, prefixes.sample, prefixes.common],
        (prefixes.messages or prompts)[:PROMPTS],
        LOOKED_AT,
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]
    return Path(platformdirs.user_cache_dir("superego")) / "slots" / f"{key}.pt"


def plain(slot: Slot) -> tuple[Any, ...]:
    """A slot as numbers and tensors, as a file may hold it."""
    marks = plain_changes(slot.changes)
    return slot.positions, slot.layer, slot.neurons, slot.directions, slot.keys, marks


def slot_of(kept: tuple[Any, ...]) -> Slot:
    """The slot that `plain` took apart."""
    positions, layer, neurons, directions, keys, marks = kept
    return Slot(positions, layer, neurons, directions, keys, changes_of(marks))


def plain_changes(changes: Changes) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """Changes as tensors, A (r, in) and B (out, r)."""
    return {place: (change.a, change.b) for place, change in changes.items()}


def changes_of(kept: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]) -> Changes:
    """The changes that `plain_changes` took apart."""
    return {place: Change(*pair) for place, pair in kept.items()}
