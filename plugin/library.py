"""The user's own personas, kept under a name: an adapter, its base and its scale.

Knows one folder: SUPEREGO_PERSONAS, else the platform's place for a user's data. Does not
load models.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from superego.errors import SuperegoError


@dataclass(frozen=True)
class Entry:
    """A kept persona. `base` is as on the command line, a file's path made absolute."""

    name: str
    base: str
    scale: float = 1.0

    @property
    def adapter(self) -> Path:
        """The library's own copy of the adapter."""
        return folder() / f"{self.name}.gguf"


def folder() -> Path:
    """Where personas are kept: NAME.gguf and NAME.json each."""
    import platformdirs

    own = os.environ.get("SUPEREGO_PERSONAS")
    return Path(own) if own else Path(platformdirs.user_data_dir("superego")) / "personas"


def entries() -> tuple[list[Entry], list[str]]:
    """Every kept persona by name, and a line for each entry that is damaged."""
    found, wrong = [], []
    for path in sorted(folder().glob("*.json")):
        try:
            held = json.loads(path.read_text("utf-8"))
            entry = Entry(path.stem, str(held["base"]), float(held["scale"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            wrong.append(f"{path}: is damaged ({error!r}); add the persona again or remove it")
            continue
        if entry.adapter.is_file():
            found.append(entry)
        else:
            wrong.append(f"{path}: {entry.adapter.name} is missing; add the persona again")
    return found, wrong


def find(name: str) -> Entry:
    """One of them; raises SuperegoError with the list."""
    found, _ = entries()
    for entry in found:
        if entry.name == name:
            return entry
    known = ", ".join(e.name for e in found) or "none yet"
    raise SuperegoError(f"no persona '{name}' in {folder()}; there are: {known}")


def keep(adapter: Path, name: str, base: str, scale: float) -> Entry:
    """Copy an adapter into the library under a name; raises SuperegoError."""
    from superego.atomic import replacing

    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name, re.ASCII):
        raise SuperegoError(f"name '{name}': expected letters, digits, '.', '_' and '-'; --name")
    if not base.startswith("ollama:") and Path(base).exists():
        base = str(Path(base).resolve())
    entry = Entry(name, base, scale)
    try:
        folder().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SuperegoError(f"{folder()}: cannot be made: {error.strerror}") from None
    with replacing(entry.adapter) as temporary:
        shutil.copyfile(adapter, temporary)
    values = {key: value for key, value in asdict(entry).items() if key != "name"}
    with replacing(entry.adapter.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(values), "utf-8")
    return entry


def forget(name: str) -> None:
    """Remove one of them; raises SuperegoError where there is none or it cannot be removed."""
    entry = find(name)
    try:
        entry.adapter.with_suffix(".json").unlink()
        entry.adapter.unlink()
    except OSError as error:
        raise SuperegoError(f"{entry.adapter}: cannot be removed: {error.strerror}") from None
