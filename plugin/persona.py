"""What can be put on a base by file: a LoRA adapter or a control vector, read and checked alike.

Knows which is which. Does not know what either does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from superego.adapter import Adapter, check_fit, mismatches, read_adapter, split_scale
from superego.control_vector import ControlVector, is_vector, read_vector, vector_mismatches
from superego.errors import SuperegoError
from superego.gguf_file import Header, read_header

Persona: TypeAlias = Adapter | ControlVector


def read_persona(path: Path) -> Persona:
    """Read an adapter or a control vector; raises SuperegoError."""
    return read_vector(path) if is_vector(read_header(path)) else read_adapter(path)


def read_scaled(text: str) -> tuple[Persona, float]:
    """FILE or FILE:SCALE, of an adapter or a control vector."""
    path, scale = split_scale(text)
    return read_persona(path), 1.0 if scale is None else scale


def persona_mismatches(persona: Persona, base: Header) -> list[str]:
    """Everything that keeps it from fitting this base: expected and found."""
    if isinstance(persona, Adapter):
        return mismatches(persona, base)
    return vector_mismatches(persona, base)


def check_persona(persona: Persona, base: Header) -> None:
    """Raise SuperegoError with every mismatch between it and a base."""
    if isinstance(persona, Adapter):
        check_fit(persona, base)
    elif found := vector_mismatches(persona, base):
        raise SuperegoError(
            f"{persona.path}: was made for another base than {base.path}: {'; '.join(found)}"
        )
