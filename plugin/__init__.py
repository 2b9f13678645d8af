"""Superego: an identity layer for quantized local language models.

The public names are loaded when they are first used: the command line starts without numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from superego.errors import SuperegoError

if TYPE_CHECKING:
    from superego.attachment import Attachment, attach, attachments, detach, set_scale, swap
    from superego.minds import Personas

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "Personas",
    "SuperegoError",
    "__version__",
    "attach",
    "attachments",
    "detach",
    "set_scale",
    "swap",
]
_HOME = {"Personas": "superego.minds"} | dict.fromkeys(
    ("Attachment", "attach", "attachments", "detach", "set_scale", "swap"), "superego.attachment"
)


def __getattr__(name: str) -> object:
    """Load a public name (PEP 562). None of them is also a module's: that would win."""
    if name not in _HOME:
        raise AttributeError(f"module 'superego' has no attribute '{name}'")
    import importlib

    module = importlib.import_module(_HOME[name])
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
