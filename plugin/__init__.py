"""Superego: an identity layer for quantized local language models."""

from superego.attach import Attachment, attach, attachments, detach, set_scale
from superego.errors import SuperegoError

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "SuperegoError",
    "__version__",
    "attach",
    "attachments",
    "detach",
    "set_scale",
]
