"""What every file made from a manifesto says of itself: standard keys and Superego's own.

Knows the keys. Does not know how a file was made beyond the method's name.
"""

from __future__ import annotations

import superego
from superego.base import BaseModel
from superego.manifesto import Manifesto

Metadata = dict[str, str | int | float]


def described(manifesto: Manifesto, model: BaseModel, method: str, own: Metadata) -> Metadata:
    """The shared keys and then `own`, without those whose value is an empty text."""
    found: Metadata = {
        "general.name": manifesto.name,
        "general.description": manifesto.description,
        "general.version": manifesto.version,
        "general.license": manifesto.license,
        "general.base_model.count": 1,
        "general.base_model.0.name": model.name,
        "superego.version": superego.__version__,
        "superego.method": method,
        "superego.manifesto": manifesto.body,
        "superego.manifesto.sha256": manifesto.sha256,
        "superego.base.fingerprint": model.fingerprint,
        **own,
    }
    return {key: value for key, value in found.items() if value != ""}
