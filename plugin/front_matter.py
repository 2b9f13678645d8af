"""What a manifesto's front matter may say.

Knows the keys and their types. Does not know YAML or the manifesto behind it.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, field_validator


class FrontMatter(BaseModel):
    """What the front matter may say; unknown keys are refused so that typos are seen."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    description: str = ""
    version: str = ""
    license: str = ""
    examples: list[str] = []

    @field_validator("version", mode="before")
    @classmethod
    def _version_as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, (int, float)) else value
