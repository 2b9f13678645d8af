"""Models split over several GGUF files (`NAME-00001-of-00003.gguf`), read as one.

Knows the names and metadata of the parts. Does not know what the tensors mean.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from superego.errors import SuperegoError
from superego.gguf_file import Header, read_header

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def read_model(path: Path) -> Header:
    """The header of a model file, or of a whole split model given any part of it.

    A split model's header has the first part's path and metadata, and the tensors of all
    parts. Raises SuperegoError where a part is missing or belongs to another split.
    """
    header = read_header(path)
    count = _count(header, "split.count", 1)
    if count <= 1:
        return header
    number = _count(header, "split.no", 0)
    name = _NAME.fullmatch(path.name)
    if name is None or (int(name["number"]), int(name["count"])) != (number + 1, count):
        raise SuperegoError(
            f"{path}: is part {number + 1} of a GGUF split in {count}, and llama.cpp finds the "
            f"others by name; expected NAME-{number + 1:05}-of-{count:05}.gguf"
        )
    paths = [
        path.with_name(f"{name['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)
    ]
    missing = [each.name for each in paths if not each.exists()]
    if missing:
        raise SuperegoError(
            f"{path}: is one of {count} parts, and {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more are' if len(missing) > 3 else ''} missing "
            f"beside it; download {'it' if len(missing) == 1 else 'them'} too"
        )
    return join([header if each == path else read_header(each) for each in paths])


def join(parts: list[Header]) -> Header:
    """One header of all parts, in their order; raises SuperegoError where they do not fit."""
    first = parts[0]
    total = _count(first, "split.tensors.count", 0)
    tensors = dict(first.tensors)
    for number, part in enumerate(parts):
        found = [_count(part, f"split.{key}", 0) for key in ("no", "count", "tensors.count")]
        expected = [number, len(parts), total]
        if found != expected:
            raise SuperegoError(
                f"{part.path}: is part {found[0] + 1} of {found[1]} with {found[2]} tensors in "
                f"all, expected part {number + 1} of {len(parts)} with {total}, as "
                f"{first.path.name} says; it is of another split, download all parts again"
            )
        if number:
            twice = next((name for name in part.tensors if name in tensors), None)
            if twice:
                raise SuperegoError(
                    f"{part.path}: tensor '{twice}' is in an earlier part too; the parts are of "
                    "different splits, download all of them again"
                )
            tensors.update(part.tensors)
    if len(tensors) != total:
        raise SuperegoError(
            f"{first.path}: its {len(parts)} parts hold {len(tensors)} tensors, expected {total}; "
            "download them again"
        )
    return replace(first, tensors=tensors, parts=tuple(parts))


def named_links(blobs: Sequence[Path], name: str) -> Path:
    """Links with the names that llama.cpp needs, in the cache, for parts that lie under others.

    Ollama stores each part under its hash. Returns the first part's link; raises SuperegoError
    where the files are no parts of one split or the cache cannot be written.
    """
    import platformdirs

    headers = sorted((read_header(b) for b in blobs), key=lambda h: _count(h, "split.no", 0))
    join(headers)
    key = hashlib.sha256("".join(str(h.path) for h in headers).encode()).hexdigest()[:16]
    folder = Path(platformdirs.user_cache_dir("superego")) / "splits" / key
    links = [
        folder / f"{name}-{i:05}-of-{len(headers):05}.gguf" for i in range(1, len(headers) + 1)
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for link, header in zip(links, headers, strict=True):
            if not link.exists():
                link.unlink(missing_ok=True)  # one whose target is gone
                link.symlink_to(header.path.absolute())
    except OSError as error:
        raise SuperegoError(
            f"{folder}: cannot make links to the parts of a split model: {error.strerror}"
        ) from None
    return links[0]


def _count(header: Header, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if not isinstance(value, int) or not 0 <= value < 1 << 16:
        raise SuperegoError(f"{header.path}: GGUF is damaged: {key} is {value!r}")
    return value
