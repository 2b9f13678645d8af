"""Amendments: a sentence joins an adapter's manifesto, and what it changes is compiled anew.

Knows what an existing adapter can give to its successor: the manifesto, the settings and
the references. The layers are always solved from the base: a start from the old adapter's
matrices was measured to be no better and no faster, and refitting cannot drift.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from superego.adapter import Adapter
from superego.base import BaseModel
from superego.converters.compile import SPEEDS, Opened, Settings, compile_manifesto
from superego.converters.kept import Known
from superego.errors import SuperegoError
from superego.exchanges import kept_references
from superego.gguf_file import Header
from superego.history import manifesto_of, with_entry
from superego.manifesto import Manifesto, parse_manifesto, read_manifesto
from superego.progress import Steps

_TEXT_SUFFIXES = (".md", ".txt", ".markdown")


def amendment(text_or_file: str) -> str:
    """An amendment's text, from a file where there is one of that name.

    Raises SuperegoError for an empty or unreadable one, and for a file name without a file.
    """
    text = text_or_file.strip()
    if not text:
        raise SuperegoError("the amendment is empty; write what is to be added")
    path = Path(text_or_file)
    try:
        there = path.exists()
    except (OSError, ValueError):  # a text longer than a name may be
        there = False
    if there:
        return read_manifesto(path).body
    if path.suffix.lower() in _TEXT_SUFFIXES and not any(c.isspace() for c in text):
        raise SuperegoError(f"{path}: no such file (expected an amendment's text or file)")
    if any(ord(c) < 32 and c not in "\n\r\t" for c in text):
        raise SuperegoError("the amendment holds control characters; it must be plain text")
    return parse_manifesto("\n" + text, "amendment", "amendment").body


def amended(manifesto: Manifesto, text: str) -> Manifesto:
    """The manifesto with one more paragraph."""
    return replace(manifesto, body=f"{manifesto.body}\n\n{text}")


def settings_of(adapter: Adapter, effort: str | None = None) -> Settings:
    """The settings that the adapter was compiled with, or another effort with its seed."""
    try:
        found = json.loads(adapter.own.get("settings", "{}"))
        seed = int(found.get("seed", 0))
        own = found.get("effort", "quick")
        rank = None if effort not in (None, own) else found.get("rank")
        if not 0 <= seed < 1 << 31 or not (rank is None or 1 <= rank <= 512):
            raise ValueError
        speed = found.get("speed", "slow" if found.get("slow") is True else "fast")
        if speed not in SPEEDS:
            raise ValueError
        return Settings.for_effort(effort or own, rank, seed, speed)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise SuperegoError(f"{adapter.path}: superego.settings is damaged") from None


def known_replies(adapter: Adapter, base: Header) -> Known:
    """The adapter's references by prompt; none for a base with another vocabulary."""
    return {tuple(prompt): reply for prompt, reply in kept_references(adapter, base)}


def amend(
    adapter: Adapter,
    text: str,
    model: BaseModel,
    output: Path,
    effort: str | None = None,
    by: str | None = None,
    threads: int | None = None,
    steps: Steps | None = None,
    opened: Opened | None = None,
) -> dict[str, Any]:
    """Compile the adapter's manifesto with `text` added, from the references it keeps.

    Returns compile's report. `output` may be the adapter's own file. Raises SuperegoError
    where the adapter has no manifesto or the longer one does not fit the context.
    """
    before = manifesto_of(adapter)
    after = amended(before, text)
    history = with_entry(
        adapter,
        "amend",
        by,
        text=text,
        **{"sha256 before": before.sha256, "sha256 after": after.sha256},
    )
    return compile_manifesto(
        after,
        model,
        output,
        settings_of(adapter, effort),
        threads=threads,
        steps=steps,
        opened=opened,
        known=known_replies(adapter, model.header),
        extra={"superego.history": history},
    )
