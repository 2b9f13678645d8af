"""Where a text comes from: the header that people and models read, and its JSON fields.

Knows both forms of a tagged document. Does not know files or models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from superego.dates import parse_date

# From the most to the least likely to be right, as the epistemics persona ranks them; `other` is
# what nobody has ranked.
TIERS = (
    ("paper", "reference", "official"),
    ("book", "news"),
    ("blog", "forum", "rumour"),
    ("other",),
)
KINDS = tuple(kind for tier in TIERS for kind in tier)
_LONGEST = 300  # characters of one header value
_HEADER = re.compile(
    r"Source: (?P<source>[^\n]+)\n"
    r"Kind: (?P<kind>[^\n]+)\n"
    r"Date: (?P<date>[^\n]+)\n"
    r"(?:Title: (?P<title>[^\n]+)\n)?"
    r"\n"
)
_FRAME = re.compile(r"^(?=[^\S\n]*\[(?:Document|End of document))", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class Document:
    """A text and where it comes from. `date` is `YYYY`, `YYYY-MM` or `YYYY-MM-DD`."""

    body: str
    source: str = ""
    kind: str = "other"
    date: str | None = None
    title: str | None = None
    date_from: str | None = None  # what in the document gave the date
    undated: str | None = None  # why it has none

    @property
    def header(self) -> str:
        """The provenance header, with the empty line behind it."""
        lines = [
            f"Source: {self.source}",
            f"Kind: {self.kind}",
            f"Date: {self.date or 'unknown'}",
        ]
        if self.title:
            lines.append(f"Title: {self.title}")
        return "\n".join(lines) + "\n\n"

    @property
    def text(self) -> str:
        """Header and body: the plain-text form."""
        return self.header + self.body

    def record(self) -> dict[str, Any]:
        """The JSON form; `text[body_start:]` is the body (in characters)."""
        return {
            "text": self.text,
            "body_start": len(self.header),
            "title": self.title,
            "source": self.source,
            "kind": self.kind,
            "date": self.date,
            "date_from": self.date_from,
        }


def one_line(text: str) -> str:
    """`text` as a header value: no line breaks or control characters, at most 300 characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def check_kind(kind: str) -> str:
    """The kind in lower case; raises ValueError where there is none of that name."""
    found = kind.strip().lower()
    if found not in KINDS:
        raise ValueError(f"unknown kind '{one_line(kind)}' (expected {', '.join(KINDS)})")
    return found


def parse_header(text: str) -> Document | None:
    """A document from its plain-text form; None where the text has no whole header in front."""
    found = _HEADER.match(text)
    if found is None:
        return None
    try:
        kind = check_kind(found["kind"])
        date = None if found["date"] == "unknown" else parse_date(found["date"])
    except ValueError:
        return None
    return Document(
        text[found.end() :],
        one_line(found["source"]),
        kind,
        date,
        one_line(found["title"]) if found["title"] else None,
        "header" if date else None,
    )


def tagged(record: Mapping[str, Any]) -> str | None:
    """The body of a record that `tag` wrote; None where it is another's.

    A `body_start` that does not point behind a header is not believed.
    """
    text, start = record.get("text"), record.get("body_start")
    if not isinstance(text, str) or not isinstance(start, int):
        return None
    found = _HEADER.match(text)
    return text[start:] if found is not None and found.end() == start else None


def best_last(documents: Sequence[Document]) -> list[Document]:
    """The lower kinds first, the older of one tier before the newer, the undated before both."""

    def standing(document: Document) -> tuple[int, str]:
        tier = next(i for i, kinds in enumerate(TIERS) if document.kind in kinds)
        return -tier, document.date or ""

    return sorted(documents, key=standing)


def in_front(documents: Sequence[Document], question: str) -> str:
    """One user turn: the documents, numbered and framed, then the question.

    Lines of a document that look like the frame are quoted, so that no document can end itself
    or open another.
    """
    blocks = []
    for number, document in enumerate(documents, 1):
        body = _FRAME.sub("> ", document.body.strip())
        header = document.header
        blocks.append(f"[Document {number}]\n{header}{body}\n[End of document {number}]")
    return "\n\n".join([*blocks, f"Question: {question}"])
