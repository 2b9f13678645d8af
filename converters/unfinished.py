"""What an interrupted fit has found so far, kept until the same fit is done.

Knows files in the user's cache. Does not know how changes are found. What is kept is the changes
of whole layers, not the streams: these are walked anew with the changes, the same operations in
the same order, so that what follows is the same to the bit. It takes twice the adapter's bytes at
most, and no more than `MOST` unfinished fits are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import platformdirs
import torch

from superego.atomic import replacing
from superego.errors import SuperegoError

MOST = 3
EVERY = 2.0  # seconds between files: fits that take as long altogether write none or one

Found = dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]  # (layer, matrix) -> A, B


def folder() -> Path:
    """Where unfinished fits are kept, each in a folder named by what decides its result."""
    return Path(platformdirs.user_cache_dir("superego")) / "unfinished"


class Unfinished:
    """One fit's kept layers: `layers` are done, `found` their changes.

    `aside` holds what else the next layer needs, plain values and tensors.
    """

    def __init__(self, *decides: Any) -> None:
        """`decides`: everything that decides the result, as JSON can hold it."""
        key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:40]
        self.path = folder() / key
        self.layers = 0
        self.found: Found = {}
        self.aside: dict[str, Any] = {}
        self._pending: Found = {}
        self._saved = time.monotonic()
        for file in sorted(self.path.glob("*.pt")):
            try:
                part = torch.load(file, map_location="cpu", weights_only=True)
                if part["from"] != self.layers:
                    break
                self.found.update(part["found"])
                self.layers, self.aside = part["to"], part["aside"]
            except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError):
                break  # a damaged file, and what came after it, is done again
        self._from = self.layers

    def add(self, index: int, found: Found, aside: dict[str, Any]) -> None:
        """Layer `index` is done; written to the disk with those before it every few seconds."""
        self._pending.update(found)
        if time.monotonic() - self._saved < EVERY:
            return
        part = {"from": self._from, "to": index + 1, "found": self._pending, "aside": aside}
        # a cache that cannot be written costs time, not the result
        with contextlib.suppress(OSError, SuperegoError, RuntimeError):
            self.path.mkdir(parents=True, exist_ok=True)
            with replacing(self.path / f"{self._from:04}.pt") as temporary:
                torch.save(part, temporary)
            self._from, self._pending = index + 1, {}
            self._drop_oldest()
        self._saved = time.monotonic()

    def remove(self) -> None:
        """The fit is done and its result written."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _drop_oldest(self) -> None:
        others = [each for each in folder().iterdir() if each != self.path]
        others.sort(key=lambda each: each.stat().st_mtime)
        for each in others[: max(0, len(others) - MOST + 1)]:
            shutil.rmtree(each, ignore_errors=True)
