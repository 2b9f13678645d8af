"""Reads documents (text, Markdown, HTML, JSON lines, PDF) with the date and title they state.

Knows file formats and where each keeps its metadata. Does not know what is done with them.
A file's own modification time is no date of publication and is never used.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from superego.dates import parse_date, parse_timestamp
from superego.errors import SuperegoError
from superego.manifesto import MAX_FRONT_MATTER
from superego.provenance import Document, one_line, parse_header, tagged

_TEXT = {".txt", ".text", ".md", ".markdown"}
_HTML = {".html", ".htm", ".xhtml"}
_LINES = {".jsonl", ".ndjson"}
SUFFIXES = frozenset(_TEXT | _HTML | _LINES | {".pdf"})
MAX_BYTES = 64 << 20  # of one document: a file, or a line of a .jsonl

_BODIES = ("text", "body", "content")
_DATES = (
    "date", "published", "published_at", "date_published", "datePublished", "publication_date",
    "created", "created_at", "created_utc", "timestamp", "year",
)  # fmt: skip
_FRONT_DATES = ("date", "published", "pubdate", "publishdate", "created", "updated", "lastmod")
_META_DATES = (
    "citation_publication_date", "citation_date", "article:published_time", "datepublished",
    "dc.date.issued", "dcterms.issued", "dc.date", "dcterms.date", "dcterms.created",
    "parsely-pub-date", "sailthru.date", "pubdate", "publishdate", "publish-date", "date",
)  # fmt: skip
_META_CHANGED = ("article:modified_time", "og:updated_time", "dcterms.modified", "last-modified")
_META_TITLES = ("citation_title", "og:title", "dc.title", "dcterms.title", "twitter:title")
_NO_TEXT = ("script", "style", "noscript", "template", "nav", "footer", "aside", "form", "svg",
            "iframe", "button", "head")  # fmt: skip
_BLOCKS = ("p", "div", "section", "article", "main", "br", "hr", "li", "ul", "ol", "table", "tr",
           "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "figure", "header", "dt",
           "dd")  # fmt: skip


@dataclass(frozen=True)
class Found:
    """One document of a file, or why it could not be read.

    `line` counts from 1 in a .jsonl and is 0 elsewhere; `end` is the byte behind it. `extra`
    are a record's own further fields.
    """

    document: Document | None
    problem: str | None
    line: int
    end: int
    extra: Mapping[str, Any]


class _Unreadable(Exception):
    """Why a document cannot be read."""


def read_documents(path: Path, offset: int = 0, line: int = 0) -> Iterator[Found]:
    """Every document of a file, in order; a .jsonl from byte `offset`, behind line `line`.

    Documents have the source and kind that their record or header names, unchecked, or none. A
    damaged document is yielded with its problem. Memory is that of the largest document. Raises
    SuperegoError where a library is missing.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in _LINES:
            yield from _lines(path, offset, line)
            return
        if suffix not in SUFFIXES:
            known = ", ".join(sorted(SUFFIXES))
            raise _Unreadable(f"files of type '{suffix}' are not read (only {known})")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise _Unreadable(f"{size:,} bytes; a document may have {MAX_BYTES:,}")
        raw = path.read_bytes()
        if suffix == ".pdf":
            document = _pdf(path)
        elif suffix in _HTML:
            document = _html(raw)
        else:
            document = _plain(_decoded(raw), markdown=suffix in {".md", ".markdown"})
        if not document.body.strip():
            raise _Unreadable("holds no text")
        yield Found(document, None, 0, size, {})
    except _Unreadable as error:
        yield Found(None, f"{path}: {error}", 0, offset, {})
    except OSError as error:
        yield Found(None, f"{path}: cannot be read: {error.strerror or error}", 0, offset, {})


def _decoded(raw: bytes, declared: str | None = None) -> str:
    """Text by its byte order mark, else by what it declares, else as UTF-8."""
    marks = {
        codecs.BOM_UTF8: "utf-8-sig",
        codecs.BOM_UTF16_LE: "utf-16",
        codecs.BOM_UTF16_BE: "utf-16",
    }
    encoding = next((name for mark, name in marks.items() if raw.startswith(mark)), declared)
    try:
        text = raw.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        raise _Unreadable(
            f"not {error.encoding} text (byte {raw[error.start]:#04x} at offset {error.start}); "
            "save it as UTF-8"
        ) from None
    except LookupError:
        raise _Unreadable(f"declares an unknown encoding '{one_line(str(encoding))}'") from None
    control = next((c for c in text if ord(c) < 32 and c not in "\n\r\t\f\v"), None)
    if control is not None:
        raise _Unreadable(
            f"looks binary (control character {control!r} at character {text.index(control)})"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _dated(document: Document, candidates: Iterable[tuple[str, object]]) -> Document:
    """The document with the first date among (where, value) that is one, else with the reason."""
    reason = None
    for where, value in candidates:
        try:
            if isinstance(value, (int, float)) and abs(value) > 9999:
                day = parse_timestamp(value)
            else:  # a year may be 2021.0 where a table was read as numbers
                day = parse_date(f"{value:g}" if isinstance(value, float) else str(value))
        except ValueError as error:
            reason = reason or f"{where}: {error}"
            continue
        return replace(document, date=day, date_from=where)
    return replace(document, undated=reason or "states no date")


def _plain(text: str, markdown: bool) -> Document:
    """Text in the tagged form, Markdown with front matter, or anything else as it is."""
    header = parse_header(text)
    if header is not None:
        return header if header.date else replace(header, undated="its header says 'unknown'")
    lines = text.split("\n")
    title, dates = None, []
    if markdown:
        front, start = _front_matter(lines)
        lines = lines[start:]
        title = next((front[key] for key in ("title", "name") if front.get(key)), None)
        dates = [(f"front matter '{key}'", front[key]) for key in _FRONT_DATES if front.get(key)]
        heading = next((line for line in lines if line.strip()), "")
        if title is None and heading.startswith("# "):
            title = heading[2:].strip(" #")
    document = Document("\n".join(lines).strip(), title=one_line(title) if title else None)
    return _dated(document, dates)


def _front_matter(lines: list[str]) -> tuple[dict[str, str], int]:
    """The scalar keys of YAML front matter, lower case, and the line where the text begins."""
    if not lines or lines[0].rstrip() != "---":
        return {}, 0
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        return {}, 0  # a rule, not front matter
    if sum(map(len, lines[1:end])) > MAX_FRONT_MATTER:
        raise _Unreadable(f"front matter of more than {MAX_FRONT_MATTER:,} characters")
    try:
        # BaseLoader leaves dates as they were written, impossible ones too
        loaded = yaml.load("\n".join(lines[1:end]), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or "not valid YAML"
        mark = getattr(error, "problem_mark", None)
        # +2: the mark counts from zero, and the opening '---' is line 1
        where = f" on line {mark.line + 2}" if mark else ""
        raise _Unreadable(f"front matter is broken{where}: {one_line(problem)}") from None
    if not isinstance(loaded, dict):
        return {}, 0
    return {
        str(k).lower(): v for k, v in loaded.items() if isinstance(v, str) and v.strip()
    }, end + 1


def _html(raw: bytes) -> Document:
    try:
        from bs4 import BeautifulSoup
        from bs4.dammit import EncodingDetector
    except ModuleNotFoundError as error:
        raise _missing(error, "HTML") from None
    declared = EncodingDetector.find_declared_encoding(raw, is_html=True)
    text = _decoded(raw, declared)
    try:
        soup = BeautifulSoup(text, "html.parser")
        return _of_soup(soup)
    except (RecursionError, AssertionError, ValueError) as error:
        raise _Unreadable(f"the HTML cannot be read: {type(error).__name__}") from None


def _of_soup(soup: Any) -> Document:
    """Metadata first, in the order from the most explicit to the least; then the main text."""
    metas: dict[str, str] = {}
    for tag in soup.find_all("meta"):
        name = tag.get("property") or tag.get("name") or tag.get("itemprop")
        name = name or tag.get("http-equiv")
        content = tag.get("content")
        if isinstance(name, str) and isinstance(content, str) and content.strip():
            metas.setdefault(name.lower(), content.strip())
    linked = list(_linked_data(soup))

    def stated(key: str) -> list[tuple[str, object]]:
        return [(f"JSON-LD {key}", item[key]) for item in linked if isinstance(item.get(key), str)]

    times = [
        ("time", tag.get("datetime") or tag.get_text())
        for tag in sorted(soup.find_all("time"), key=lambda tag: not tag.has_attr("pubdate"))
    ]
    dates: list[tuple[str, object]] = [
        *stated("datePublished"),
        *((f"meta {name}", metas[name]) for name in _META_DATES if name in metas),
        *times[:1],
        *stated("dateCreated"),
        *stated("dateModified"),
        *((f"meta {name}", metas[name]) for name in _META_CHANGED if name in metas),
    ]
    titles = [
        *(metas[name] for name in _META_TITLES if name in metas),
        *(str(value) for _, value in stated("headline")),
        *(tag.get_text() for tag in (soup.title, soup.h1) if tag is not None),
    ]
    title = next((one_line(t) for t in titles if t.strip()), None)
    for tag in soup.find_all(_NO_TEXT):
        tag.decompose()
    articles = soup.find_all("article")
    root = articles[0] if len(articles) == 1 else (soup.main or soup.body or soup)
    return _dated(Document(_lines_of(root), title=title), dates)


def _lines_of(root: Any) -> str:
    """The text as a browser would break it: at blocks, not where the source has a new line."""
    from bs4.element import NavigableString

    held = "\N{NO-BREAK SPACE}"  # stands for the spaces of <pre>, which stay
    for text in root.find_all(string=True):
        if type(text) is NavigableString:  # not a comment
            if text.find_parent("pre"):
                text.replace_with(text.expandtabs().replace(" ", held))
            else:
                text.replace_with(re.sub(r"\s+", " ", text))
    for tag in root.find_all(["td", "th"]):
        tag.insert_after(" ")
    for tag in root.find_all(_BLOCKS):
        tag.insert_before("\n")
        tag.insert_after("\n")
    lines = (re.sub(" +", " ", line).strip(" ") for line in root.get_text().split("\n"))
    return "\n".join(line.replace(held, " ").rstrip() for line in lines if line.strip())


def _linked_data(soup: Any) -> Iterator[Mapping[str, Any]]:
    """The objects of a page's JSON-LD, those of a `@graph` too; damaged ones are passed over."""
    for tag in soup.find_all("script", type="application/ld+json"):
        try:
            items = [json.loads(tag.get_text())]
        except (ValueError, RecursionError):
            continue
        for _ in range(2):  # a list of objects, each perhaps with a graph
            flat: list[Any] = []
            for item in items:
                flat += item if isinstance(item, list) else [item]
            graphs = [item.get("@graph") for item in flat if isinstance(item, dict)]
            items = [item for item in flat if item is not None] + graphs
        yield from (item for item in items if isinstance(item, dict))


def _pdf(path: Path) -> Document:
    try:
        import pypdf
    except ModuleNotFoundError as error:
        raise _missing(error, "PDF") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its warnings are no news to a user
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise _Unreadable("the PDF needs a password")
        pages = [page.extract_text() for page in reader.pages]
        info = dict(reader.metadata or {})
    except _Unreadable:
        raise
    except Exception as error:  # pypdf lets through whatever a damaged file makes it raise
        reason = one_line(str(error)) or type(error).__name__
        raise _Unreadable(f"the PDF cannot be read: {reason}") from None
    body = "\n\n".join(page.strip() for page in pages if page.strip())
    if not body:
        raise _Unreadable(f"the PDF has {len(pages)} pages but no text (scanned? use OCR first)")
    title = info.get("/Title")
    document = Document(body, title=one_line(str(title)) if title else None)
    keys = ("/CreationDate", "/ModDate")
    return _dated(document, [(f"pdf {key[1:]}", str(info[key])) for key in keys if info.get(key)])


def _missing(error: ModuleNotFoundError, form: str) -> SuperegoError:
    return SuperegoError(
        f"reading {form} needs {error.name}, which is not installed; "
        "pip install 'superego[sources]'"
    )


def _lines(path: Path, offset: int, number: int) -> Iterator[Found]:
    with path.open("rb") as file:
        file.seek(offset)
        first = number
        while raw := file.readline(MAX_BYTES + 1):
            number += 1
            extra: dict[str, Any] = {}
            document = problem = None
            if len(raw) > MAX_BYTES:
                problem = f"{path}:{number}: a line of more than {MAX_BYTES:,} bytes"
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_BYTES)
            elif not raw.strip():
                continue
            else:
                try:
                    document, extra = _record(raw)
                except _Unreadable as error:
                    problem = f"{path}:{number}: {error}"
            yield Found(document, problem, number, file.tell(), extra)
            first = -1
        if first == 0:
            raise _Unreadable("holds no documents")


def _record(raw: bytes) -> tuple[Document, dict[str, Any]]:
    """A record's document, and the fields that are not part of one."""
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _Unreadable(f"not UTF-8 text (byte {raw[error.start]:#04x})") from None
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise _Unreadable(f"expected an object with a text, found a {type(record).__name__}")
    body = tagged(record)
    used = {"body_start"} if body is not None else set()
    key = next((k for k in _BODIES if isinstance(record.get(k), str)), None)
    if key is None:
        raise _Unreadable(f"has no text (expected one of the fields {', '.join(_BODIES)})")
    if body is None:
        body = record[key]
    if not body.strip():
        raise _Unreadable(f"field '{key}' is empty")
    if "\0" in body:
        raise _Unreadable(f"field '{key}' holds a NUL character")
    source, kind, title = record.get("source"), record.get("kind"), record.get("title")
    document = Document(
        body,
        one_line(source) if isinstance(source, str) else "",
        one_line(kind) if isinstance(kind, str) else "",
        title=one_line(title) if isinstance(title, str) and title.strip() else None,
    )
    known = [(f"field '{k}'", record[k]) for k in _DATES if record.get(k) not in (None, "")]
    dates = [(where, value) for where, value in known if isinstance(value, (str, int, float))]
    document = _dated(document, dates)
    before = record.get("date_from")
    if document.date and "body_start" in used and isinstance(before, str):
        document = replace(document, date_from=before)  # read the first time it was tagged
    used |= {key, "source", "kind", "title", "date", "date_from"}
    return document, {k: v for k, v in record.items() if k not in used}
