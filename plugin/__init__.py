"""Superego: an identity layer for quantized local language models."""

from superego.attach import Attachment, attach, attachments, detach, set_scale, swap
from superego.errors import SuperegoError
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
