"""What a manifesto's front matter may say.

Knows the keys, their types, and what of YAML is read. Does not know the manifesto behind it.
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, field_validator

_MAX_NAME = 200  # characters


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not read; write the value out",
                problem_mark=self.peek_event().start_mark,
            )
        return super().compose_node(parent, index)


class FrontMatter(BaseModel):
    """What the front matter may say; unknown keys are refused so that typos are seen."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    description: str = ""
    version: str = ""
    license: str = ""
    examples: list[str] = []

    @field_validator("name", "description", "version", "license", "examples")
    @classmethod
    def _plain(cls, value: str | list[str] | None) -> str | list[str] | None:
        # YAML has escapes for characters that no file of text holds
        for text in value if isinstance(value, list) else [value or ""]:
            odd = next((c for c in text if not (c.isprintable() or c in "\n\t")), None)
            if odd is not None and (ord(odd) < 160 or 0xD800 <= ord(odd) < 0xE000):
                raise ValueError(f"holds the character {odd!r}, expected plain text")
        return value

    @field_validator("name")
    @classmethod
    def _short(cls, value: str | None) -> str | None:
        if value is not None and (len(value) > _MAX_NAME or "\n" in value):
            raise ValueError(f"expected one line of at most {_MAX_NAME} characters")
        return value

    @field_validator("version", mode="before")
    @classmethod
    def _version_as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, (int, float)) else value
