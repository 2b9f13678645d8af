"""Modelfiles: Ollama's recipe for a model, written so that Ollama reads the same back.

Knows FROM, ADAPTER and SYSTEM lines and their quoting. Does not talk to Ollama.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from superego.errors import SuperegoError

NAME = "Modelfile"


@dataclass(frozen=True)
class Modelfile:
    """What a model is made from. `base` and `adapter` are paths, or `base` a model's name."""

    base: str
    adapter: str | None = None
    system: str | None = None

    def text(self) -> str:
        """The file's text; raises SuperegoError where Ollama could not read it back.

        There is no TEMPLATE line: with one, Ollama no longer uses the model's own template.
        """
        lines = [f"FROM {_one_line(self.base)}"]
        if self.adapter is not None:
            lines.append(f"ADAPTER {_one_line(self.adapter)}")
        if self.system is not None:
            lines.append(f"SYSTEM {quote(self.system)}")
        return "\n".join(lines) + "\n"


def quote(text: str) -> str:
    '''Text between triple quotes; raises SuperegoError where no quoting is right.

    Ollama's parser ends the text at the first line end behind `"""`, and knows no escapes.
    '''
    for number, line in enumerate(text.split("\n"), 1):
        if line.rstrip().endswith('"""') and number <= text.count("\n"):
            raise SuperegoError(
                f'line {number} of the manifesto ends with """, where a Modelfile would end; '
                "put any character behind it"
            )
    return f'"""{text}"""'


def dropped(text: str) -> list[str]:
    """Characters that Ollama's parser leaves out: what cannot be printed, but for white space."""
    return sorted({c for c in text if not c.isprintable() and c not in "\n\r\t"})


def _one_line(path: str) -> str:
    if "\n" in path or "\r" in path or '"' in path:
        raise SuperegoError(f"{path!r}: a Modelfile cannot name this path; rename it")
    return f'"{path}"' if path != path.strip() else path


def read_modelfile(path: Path) -> Modelfile:
    """The FROM, ADAPTER and SYSTEM of a Modelfile; raises SuperegoError for any other line."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise SuperegoError(
            f"{path}: no such file; write the folder with 'superego export ollama'"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SuperegoError(f"{path}: cannot be read as text: {error}") from None
    found: dict[str, str] = {}
    rest = text
    while rest := rest.lstrip(" \t\r\n"):
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        match = re.match(r"([A-Za-z]+)[ \t]+", rest)
        key = match[1].upper() if match else rest.split()[0]
        if match is None or key not in ("FROM", "ADAPTER", "SYSTEM") or key in found:
            raise SuperegoError(
                f"{path}: '{key}' is not one FROM, ADAPTER or SYSTEM line that superego writes; "
                "use 'ollama create' for Modelfiles of your own"
            )
        found[key], rest = _value(rest[match.end() :], path)
    if "FROM" not in found:
        raise SuperegoError(f"{path}: has no FROM line")
    return Modelfile(found["FROM"], found.get("ADAPTER"), found.get("SYSTEM"))


def _value(rest: str, path: Path) -> tuple[str, str]:
    """A value and what follows it: up to the first line end where its quotes are closed."""
    end = -1
    while True:
        end = rest.find("\n", end + 1)
        part = (rest if end < 0 else rest[:end]).strip()
        for mark in ('"""', '"'):
            if part.startswith(mark):
                if len(part) >= 2 * len(mark) and part.endswith(mark):
                    return part[len(mark) : -len(mark)], "" if end < 0 else rest[end:]
                break
        else:
            return part, "" if end < 0 else rest[end:]
        if end < 0:
            raise SuperegoError(f"{path}: a quoted text is never closed")
