"""The bundled personas: which there are, and their manifestos.

Knows the personas folder. Does not know adapters.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from superego.manifesto import Manifesto, parse_manifesto, read_manifesto


def bundled_names() -> list[str]:
    """Their names, sorted; reads no file."""
    folder = importlib.resources.files("superego.personas")
    names = (file.name for file in folder.iterdir())
    return sorted(name.removesuffix(".md") for name in names if name.endswith(".md"))


def bundled() -> dict[str, Manifesto]:
    """Every bundled manifesto by name, sorted."""
    folder = importlib.resources.files("superego.personas")
    found = {}
    for stem in bundled_names():
        text = folder.joinpath(f"{stem}.md").read_text("utf-8")
        found[stem] = parse_manifesto(text, stem, f"{stem}.md")
    return found


def find_manifesto(name_or_path: str) -> Manifesto:
    """A bundled persona by name, else a file; raises SuperegoError."""
    if not Path(name_or_path).exists() and "/" not in name_or_path:
        persona = bundled().get(name_or_path)
        if persona is not None:
            return persona
    return read_manifesto(Path(name_or_path))
