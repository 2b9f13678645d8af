"""Manifestos: Markdown with optional YAML front matter, read and checked.

Knows the document's form. Does not know about models, tokens or adapters.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from superego.errors import SuperegoError

if TYPE_CHECKING:
    from superego.front_matter import FrontMatter

MAX_BYTES = 1_000_000  # beyond any context; refused before it is decoded
MAX_FRONT_MATTER = 16_000  # characters; YAML is read slowly, in time that grows faster than it


@dataclass(frozen=True)
class Manifesto:
    """A manifesto: its body is the system message, word for word."""

    name: str
    body: str
    description: str = ""
    version: str = ""
    license: str = ""
    examples: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """Hash of the body alone: what the model reads."""
        return hashlib.sha256(self.body.encode()).hexdigest()


def read_manifesto(path: Path) -> Manifesto:
    """Read a manifesto file; raises SuperegoError for what cannot be one."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SuperegoError(f"{path}: no such file (expected a Markdown manifesto)") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        reason = getattr(error, "strerror", None) or error
        raise SuperegoError(f"{path}: cannot be read: {reason}") from None
    if len(raw) > MAX_BYTES:
        raise SuperegoError(
            f"{path}: manifesto is over {MAX_BYTES:,} bytes; a manifesto must fit the context"
        )
    if raw.startswith(b"GGUF"):
        raise SuperegoError(f"{path}: this is a GGUF file; a manifesto is plain text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SuperegoError(
            f"{path}: not UTF-8 text (byte {raw[error.start]:#04x} at offset {error.start}); "
            "save the manifesto as UTF-8"
        ) from None
    control = next((c for c in text if ord(c) < 32 and c not in "\n\r\t\f"), None)
    if control is not None:
        offset = text.index(control)
        raise SuperegoError(
            f"{path}: looks binary (control character {control!r} at character {offset}); "
            "a manifesto is plain text"
        )
    return parse_manifesto(text, default_name=path.stem, where=str(path))


def parse_manifesto(text: str, default_name: str, where: str = "manifesto") -> Manifesto:
    """Split front matter from body; raises SuperegoError naming `where`."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    front: FrontMatter | None = None
    if lines[0].rstrip() == "---":
        end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
        if end is None:
            raise SuperegoError(
                f"{where}: front matter opens with '---' on line 1 but is never closed; "
                "add a line '---' after it"
            )
        front = _front_matter("\n".join(lines[1:end]), where)
        lines = lines[end + 1 :]
    body = "\n".join(lines).strip()
    if not body:
        raise SuperegoError(f"{where}: the manifesto is empty; write what the persona believes")
    plain_name = "".join(c if c.isprintable() else "_" for c in default_name)
    if front is None:
        return Manifesto(plain_name, body)
    return Manifesto(
        name=front.name or plain_name,
        body=body,
        description=front.description,
        version=front.version,
        license=front.license,
        examples=front.examples,
    )


def _front_matter(text: str, where: str) -> FrontMatter:
    import yaml
    from pydantic import ValidationError

    from superego.front_matter import FrontMatter, PlainLoader

    if len(text) > MAX_FRONT_MATTER:
        raise SuperegoError(
            f"{where}: front matter has {len(text):,} characters, expected at most "
            f"{MAX_FRONT_MATTER:,}; what the model is to read goes below it"
        )
    try:
        loaded = yaml.load(text, Loader=PlainLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # +2: the mark counts from zero, and the opening '---' is line 1
        line = f" on line {mark.line + 2}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise SuperegoError(f"{where}: front matter is broken{line}: {problem}") from None
    except RecursionError:
        raise SuperegoError(f"{where}: front matter is broken: it is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # PyYAML lets through what impossible numbers and dates make it raise
        raise SuperegoError(f"{where}: front matter is broken: {error}") from None
    if loaded is None:
        return FrontMatter()
    if not isinstance(loaded, dict):
        raise SuperegoError(
            f"{where}: front matter must be 'key: value' lines, found a {type(loaded).__name__}"
        )
    try:
        return FrontMatter.model_validate(loaded)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(FrontMatter.model_fields)
        raise SuperegoError(
            f"{where}: front matter key '{key}': {first['msg'].lower()} (keys: {known})"
        ) from None
