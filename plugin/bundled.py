"""The bundled personas: which there are, and their manifestos.

Knows the personas folder. Does not know adapters.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from superego.manifesto import Manifesto, parse_manifesto, read_manifesto


def bundled() -> dict[str, Manifesto]:
    """Every bundled manifesto by name, sorted."""
    folder = importlib.resources.files("superego.personas")
    found = {}
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".md"):
            stem = file.name.removesuffix(".md")
            found[stem] = parse_manifesto(file.read_text("utf-8"), stem, file.name)
    return found


def find_manifesto(name_or_path: str) -> Manifesto:
    """A bundled persona by name, else a file; raises SuperegoError."""
    if not Path(name_or_path).exists() and "/" not in name_or_path:
        persona = bundled().get(name_or_path)
        if persona is not None:
            return persona
    return read_manifesto(Path(name_or_path))
