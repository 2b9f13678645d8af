"""Tags many documents: one JSON line each, in order, picked up again where a run broke off.

Knows inputs, checkpoints and what is reported. Does not know file formats or header texts.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import superego
from superego.atomic import check_writable, replacing
from superego.documents import SUFFIXES, Found, read_documents
from superego.errors import SuperegoError
from superego.provenance import Document, check_kind

_EVERY = 1.0  # seconds between checkpoints
_LISTED = 100  # of what was skipped or undated; the rest is counted
_CHARS = "*?["


@dataclass(frozen=True)
class Label:
    """What the user says of all documents; None leaves it to each document."""

    source: str | None = None
    kind: str | None = None
    date: str | None = None


@dataclass
class Tally:
    """What a run has done so far."""

    documents: int = 0
    undated: int = 0
    skipped: int = 0
    skipped_list: list[str] = field(default_factory=list)
    undated_list: list[str] = field(default_factory=list)


def find_inputs(inputs: Sequence[str], output: Path) -> tuple[list[Path], int]:
    """Files of the inputs in order, and how many in folders are of no known type.

    An input is a file, a folder (searched through, hidden files left out, sorted) or a pattern
    (`**` goes through folders). `output` is never its own input. Raises SuperegoError where an
    input does not exist or nothing is found.
    """
    found: list[Path] = []
    passed = 0
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = [
                p
                for p in sorted(path.rglob("*"))
                if p.is_file() and not any(n.startswith(".") for n in p.relative_to(path).parts)
            ]
            known = [p for p in files if p.suffix.lower() in SUFFIXES]
            passed += len(files) - len(known)
            found += known
        elif path.exists():
            found.append(path)
        elif any(c in text for c in _CHARS):
            matches = [Path(p) for p in sorted(glob.glob(text, recursive=True))]
            found += [p for p in matches if p.is_file()]
        else:
            raise SuperegoError(f"{text}: no such file or folder")
    own = {output.absolute(), part_of(output).absolute()}
    files = [p for p in dict.fromkeys(found) if p.absolute() not in own]
    if not files:
        raise SuperegoError(
            f"{', '.join(inputs)}: no documents found (expected {', '.join(sorted(SUFFIXES))})"
        )
    return files, passed


def part_of(output: Path) -> Path:
    """The file that an unfinished run fills."""
    return output.with_name(f".{output.name}.part")


def _journal_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.journal")


class _Checkpoint:
    """Where a run stands: how much of its part is good, and what to read next."""

    def __init__(self, output: Path, files: Sequence[Path], label: Label) -> None:
        self.part, self.journal = part_of(output), _journal_of(output)
        stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        what = [superego.__version__, label.source, label.kind, label.date, stats]
        self.key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        self.index = self.offset = self.line = self.bytes = 0
        self.tally = Tally()

    def load(self) -> bool | None:
        """True: go on from it. None: there is none. False: it is of another run."""
        try:
            saved = json.loads(self.journal.read_text("utf-8"))
            size = self.part.stat().st_size
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return False
        try:
            if saved["key"] != self.key or not 0 <= saved["bytes"] <= size:
                return False
            self.index, self.offset = int(saved["index"]), int(saved["offset"])
            self.line, self.bytes = int(saved["line"]), int(saved["bytes"])
            self.tally = Tally(**saved["tally"])
        except (KeyError, TypeError, ValueError):
            return False
        return True

    def save(self) -> None:
        values = {k: getattr(self, k) for k in ("key", "index", "offset", "line", "bytes")}
        with replacing(self.journal) as temporary:
            temporary.write_text(json.dumps({**values, "tally": vars(self.tally)}), "utf-8")

    def remove(self) -> None:
        for path in (self.part, self.journal):
            with contextlib.suppress(OSError):
                path.unlink()


def tag_documents(
    files: Sequence[Path],
    output: Path,
    label: Label,
    strict: bool = False,
    progress: Callable[[float, float], None] = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write one JSON line a document to `output`, whole or not at all; returns the report.

    An interrupted run leaves what it has beside `output` and is gone on with where inputs and
    label are the same: the result is byte for byte that of a run in one go. A document that
    cannot be read is skipped and reported, with `strict` it ends the run. Raises SuperegoError
    for an output that cannot be written, for the first bad document with `strict`, and where
    no document at all could be read.
    """
    check_writable(output)
    try:
        checkpoint = _Checkpoint(output, files, label)
        sizes = [p.stat().st_size for p in files]
    except OSError as error:
        raise SuperegoError(f"{error.filename}: cannot be read: {error.strerror}") from None
    resumed = checkpoint.load()
    if resumed:
        note(f"going on behind document {checkpoint.tally.documents:,} of the run before")
    elif resumed is False:
        note("a run before was of other inputs or options: starting anew")
    tally = checkpoint.tally
    before, total = sum(sizes[: checkpoint.index]), sum(sizes)
    try:
        with checkpoint.part.open("r+b" if resumed else "wb") as out:
            out.truncate(checkpoint.bytes)
            out.seek(checkpoint.bytes)

            def keep() -> None:
                out.flush()
                os.fsync(out.fileno())
                checkpoint.bytes = out.tell()
                checkpoint.save()

            keep()
            last = time.monotonic()
            for index, path in enumerate(files):
                if index < checkpoint.index:
                    continue
                for found in read_documents(path, checkpoint.offset, checkpoint.line):
                    out.write(_tagged(found, path, label, tally, strict))
                    # Only `keep` makes this count: what an interruption leaves behind the last
                    # checkpoint is cut off when the run goes on.
                    checkpoint.offset, checkpoint.line = found.end, found.line
                    if time.monotonic() - last > _EVERY:
                        keep()
                        last = time.monotonic()
                        progress(before + checkpoint.offset, total)
                before += sizes[index]
                checkpoint.index, checkpoint.offset, checkpoint.line = index + 1, 0, 0
                progress(before, total)
            keep()
        if not tally.documents:
            raise _Refused(f"no document could be read; first: {tally.skipped_list[0]}")
        os.replace(checkpoint.part, output)
        checkpoint.remove()
    except _Refused as error:
        checkpoint.remove()
        raise SuperegoError(str(error)) from None
    except OSError as error:
        raise SuperegoError(
            f"{output}: cannot be written: {error.strerror or error}; what is done is kept in "
            f"{checkpoint.part}, the same command goes on with it"
        ) from None
    return {
        "output": str(output),
        "files": len(files),
        "documents": tally.documents,
        "bytes": output.stat().st_size,
        "undated": tally.undated,
        "undated_list": tally.undated_list,
        "skipped": tally.skipped,
        "skipped_list": tally.skipped_list,
        "resumed": bool(resumed),
    }


class _Refused(Exception):
    """The run ends and leaves nothing."""


def _tagged(found: Found, path: Path, label: Label, tally: Tally, strict: bool) -> bytes:
    """The output line of a document, empty for a skipped one; counts either."""
    document, problem = found.document, found.problem
    where = f"{path}:{found.line}" if found.line else str(path)
    if document is not None:
        try:
            document = _labelled(document, label)
        except ValueError as error:
            problem = f"{where}: {error}; give --kind"
        else:
            if not document.source:
                problem = f"{where}: names no source; give --source"
    if problem is not None or document is None:
        if strict:
            raise _Refused(f"{problem}; nothing was written (--strict)")
        tally.skipped += 1
        _list(tally.skipped_list, problem or where)
        return b""
    tally.documents += 1
    if document.date is None:
        tally.undated += 1
        _list(tally.undated_list, f"{where}: {document.undated}")
    record = {**found.extra, **document.record(), "path": str(path)}
    if found.line:
        record["line"] = found.line
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _list(rows: list[str], row: str) -> None:
    if len(rows) < _LISTED:
        rows.append(row)


def _labelled(document: Document, label: Label) -> Document:
    """What the user says goes before what the document says; ValueError for an unknown kind."""
    document = replace(
        document,
        source=label.source or document.source,
        kind=check_kind(label.kind or document.kind or "other"),
    )
    if label.date:
        document = replace(document, date=label.date, date_from="--date", undated=None)
    return document


def open_documents(paths: Sequence[Path]) -> Iterator[Document]:
    """The documents of files for a chat; one without a source has its file's name as source.

    Raises SuperegoError for the first that cannot be read.
    """
    for path in paths:
        if not path.is_file():
            raise SuperegoError(f"{path}: no such file (expected a document or a tagged .jsonl)")
        count = 0
        for found in read_documents(path):
            if found.document is None:
                raise SuperegoError(str(found.problem))
            count += 1
            try:
                yield _labelled(found.document, Label(source=found.document.source or path.name))
            except ValueError as error:
                raise SuperegoError(f"{path}:{found.line}: {error}") from None
        if not count:
            raise SuperegoError(f"{path}: holds no documents")
