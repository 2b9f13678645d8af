"""An adapter's manifesto and its history: what was done to it, by whom, in order.

Knows the keys that hold them. Does not know how an adapter is made.
"""

from __future__ import annotations

import datetime
import getpass
import json
import os
from collections.abc import Mapping
from typing import Any

from superego.errors import SuperegoError, printable
from superego.manifesto import Manifesto
from superego.persona import Persona


def manifesto_of(adapter: Persona) -> Manifesto:
    """The manifesto that the adapter was compiled from; raises SuperegoError without one."""
    own, text = adapter.own, adapter.header.text
    if "blend" in own:
        parts = " and ".join(f"{p['name']} × {p['scale']:g}" for p in blend_parts(adapter))
        raise SuperegoError(
            f"{adapter.path}: is a blend of {parts} and has no manifesto of its own; "
            "give one of its parts"
        )
    body = own.get("manifesto")
    if not isinstance(body, str) or not body.strip():
        raise SuperegoError(
            f"{adapter.path}: holds no manifesto (metadata key superego.manifesto); expected an "
            "adapter that 'superego compile' wrote, or 'superego import' with --manifesto"
        )
    manifesto = Manifesto(
        name=adapter.name,
        body=body,
        description=text("general.description"),
        version=text("general.version"),
        license=text("general.license"),
    )
    if own.get("manifesto.sha256", manifesto.sha256) != manifesto.sha256:
        raise SuperegoError(
            f"{adapter.path}: its manifesto does not have the hash it was compiled with; the "
            "file was changed: compile the manifesto anew"
        )
    return manifesto


def blend_parts(adapter: Persona) -> list[dict[str, Any]]:
    """What a blend is made of: name, scale, file hash and manifesto hash of each part."""
    return _entries(adapter, "blend", {"name": str, "scale": (int, float)})


def history_of(adapter: Persona) -> list[dict[str, Any]]:
    """What was done after the first compile, oldest first; empty where nothing was."""
    return _entries(adapter, "history", {"action": str, "date": str})


def _entries(adapter: Persona, key: str, needed: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        found = json.loads(adapter.own.get(key, "[]"))
    except (ValueError, TypeError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(
        isinstance(e, dict) and all(isinstance(e.get(k), kind) for k, kind in needed.items())
        for e in found
    ):
        raise SuperegoError(f"{adapter.path}: superego.{key} is damaged (expected a JSON list)")
    return found


def with_entry(adapter: Persona | None, action: str, by: str | None, **details: Any) -> str:
    """The text for `superego.history` with one more entry, dated now (UTC).

    `adapter` None begins a history. `by` None is the user's login name, "" nobody.
    SOURCE_DATE_EPOCH, where it is set, is the date, so that builds can be repeated byte for byte.
    """
    entry: dict[str, Any] = {"action": action, "date": _now()}
    name = _login() if by is None else by
    if name:
        entry["by"] = printable(name)
    before = history_of(adapter) if adapter is not None else []
    return json.dumps([*before, {**entry, **details}], ensure_ascii=False)


def _now() -> str:
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    if fixed.isdigit():
        moment = datetime.datetime.fromtimestamp(int(fixed), datetime.timezone.utc)
    else:
        moment = datetime.datetime.now(datetime.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such user, as in some containers
        return ""
