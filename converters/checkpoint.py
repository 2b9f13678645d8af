"""The file that an interrupted training goes on from.

Knows what it holds and that it may be damaged. Does not know how a student is trained. Tensors,
numbers and plain containers are all that it may hold: what is read is a file, not a program.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from superego.atomic import replacing
from superego.converters.slot import Slot
from superego.converters.slot_cache import changes_of, plain, plain_changes, slot_of
from superego.converters.streams import Changes
from superego.errors import SuperegoError

Origin = tuple[Changes, Slot | None]  # what a student is made from


@dataclass(frozen=True)
class Checkpoint:
    """A training's state as it was saved."""

    state: dict[str, Any]

    @property
    def references(self) -> int | None:
        """How many references were written for it; None where that is not kept."""
        return self._count("references")

    @property
    def fitted(self) -> int:
        """How many of them its student was fitted to, where that was no file's."""
        return self._count("fitted") or 0

    @property
    def last(self) -> int:
        """How many of them its last layers were fitted to; 0 where that is not kept."""
        return self._count("last") or 0

    def _count(self, name: str) -> int | None:
        found = self.state.get(name)
        return found if type(found) is int and found > 0 else None

    def of(self, key: str) -> dict[str, Any] | None:
        """The state, where it was made from what this key stands for."""
        return self.state if self.state.get("key") == key else None

    def origin(self, key: str) -> Origin | None:
        """What the student was made from, where the key is the same and that was no file."""
        kept = (self.of(key) or {}).get("origin")
        if not isinstance(kept, tuple):
            return None
        changes, slot = kept
        return changes_of(changes), None if slot is None else slot_of(slot)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """A checkpoint; None where there is none, or it is damaged."""
    try:
        return Checkpoint(
            dict(torch.load(path, map_location=torch.get_default_device(), weights_only=True))
        )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError):
        return None
    except Exception as error:  # pickle's own, whatever a damaged file makes of it
        if type(error).__name__ != "UnpicklingError":
            raise
        return None


def write_checkpoint(path: Path, origin: Origin | None, state: dict[str, Any]) -> None:
    """Write a training's state, and what its student was made from, atomically."""
    with replacing(path) as temporary:
        try:
            torch.save({**state, "origin": _plain(origin)}, temporary)
        except RuntimeError:  # torch's, where the file system took less than all
            raise SuperegoError(
                f"{path}: the state to go on from cannot be written; is the disk full?"
            ) from None


def _plain(origin: Origin | None) -> Any:
    """An origin as tuples and tensors."""
    if origin is None:
        return None
    changes, slot = origin
    return plain_changes(changes), None if slot is None else plain(slot)
