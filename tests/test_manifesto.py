"""Manifestos: what is read from them, and how each broken one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from superego.errors import SuperegoError
from superego.manifesto import parse_manifesto, read_manifesto


def test_front_matter_is_split_from_the_body() -> None:
    text = "---\nname: calm\nversion: 1.2\nexamples:\n  - Hello?\n---\n\nYou are calm.\n\nAlways.\n"
    manifesto = parse_manifesto(text, "file")
    assert (manifesto.name, manifesto.version, manifesto.examples) == ("calm", "1.2", ["Hello?"])
    assert manifesto.body == "You are calm.\n\nAlways."


def test_without_front_matter_the_file_names_the_persona(tmp_path: Path) -> None:
    path = tmp_path / "kind.md"
    path.write_bytes(b"\xef\xbb\xbfBe kind.\r\nAlways.\r\n")
    manifesto = read_manifesto(path)
    assert (manifesto.name, manifesto.body) == ("kind", "Be kind.\nAlways.")


def test_the_hash_is_of_the_body_alone() -> None:
    a = parse_manifesto("---\nname: a\n---\nBe kind.", "x")
    b = parse_manifesto("Be kind.\n", "y")
    assert a.sha256 == b.sha256
    assert a.sha256 != parse_manifesto("Be kind!", "y").sha256


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"---\nname: x\n---\n \n", "empty"),
        (b"---\nname: x\nBe kind.", "never closed"),
        (b"---\nname: [x\n---\nBe kind.", "broken on line"),
        (b"---\n- a\n---\nBe kind.", "found a list"),
        (b"---\nnmae: x\n---\nBe kind.", "'nmae'"),
        (b"---\nexamples: one\n---\nBe kind.", "'examples'"),
        (b"Be\x00kind", "looks binary"),
        (b"caf\xe9", "not UTF-8"),
        (b"GGUF\x03\x00\x00\x00", "GGUF file"),
        (b"x" * 1_000_001, "over 1,000,000 bytes"),
    ],
)
def test_each_broken_manifesto_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "m.md"
    path.write_bytes(content)
    with pytest.raises(SuperegoError) as error:
        read_manifesto(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SuperegoError, match="no such file"):
        read_manifesto(tmp_path / "none.md")
