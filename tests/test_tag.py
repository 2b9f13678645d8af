"""Tag: headers and fields, dates from each format, streaming, resuming, what is refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import refused, run

from superego import tag as tagging
from superego.dates import parse_date, parse_timestamp
from superego.documents import Found, read_documents
from superego.provenance import KINDS, Document, parse_header
from superego.tag import Label, find_inputs, part_of, tag_documents

PAGE = """<html><head><meta charset="utf-8"><title>Ferry times &amp; fares</title>
<meta property="article:published_time" content="{date}"><script>var x = "no";</script></head>
<body><nav>Home</nav><main><h1>Ferry</h1><p>It leaves at <b>nine</b>.</p></main></body></html>"""


def pdf(text: str | None, **info: str) -> bytes:
    """A one-page PDF, written by hand so that its text can be read back."""
    stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET" if text else ""
    entries = " ".join(f"/{key} ({value})" for key, value in info.items())
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Contents 4 0 R "
        "/Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        f"<< {entries} >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 7\n0000000000 65535 f \n{table}trailer\n<< /Size 7 /Root 1 0 R /Info 6 0 R >>\n"
    return out + f"{end}startxref\n{len(out)}\n%%EOF\n".encode()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2021", "2021"),
        ("2021-03", "2021-03"),
        ("2021-03-04T10:00:00+01:00", "2021-03-04"),
        ("2021/3/4", "2021-03-04"),
        ("D:20210304101112+01'00'", "2021-03-04"),
        ("4 March 2021", "2021-03-04"),
        ("Mar 4, 2021", "2021-03-04"),
        ("March 2021", "2021-03"),
        ("13/04/2021", "2021-04-13"),
        ("Thu Mar  4 10:00:00 PST 2021", "2021-03-04"),
    ],
)
def test_dates_keep_the_precision_they_were_written_with(text: str, day: str) -> None:
    assert parse_date(text) == day


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2021-02-30", "no day of the calendar"),
        ("2021-13", "no day of the calendar"),
        ("30 February 2021", "not a date"),
        ("03/04/2021", "2021-03-04 or 2021-04-03"),
        ("9999-01-01", "in the future"),
        ("March 4", "no year"),
        ("10:30", "no year"),
        ("soon", "not a date"),
        ("", "not a date"),
    ],
)
def test_what_is_no_date_is_not_guessed(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_date(text)


def test_unix_times_are_days_in_utc() -> None:
    assert parse_timestamp(1600000000) == parse_timestamp(1600000000000) == "2020-09-13"
    with pytest.raises(ValueError, match="not a Unix time"):
        parse_timestamp(float("inf"))


def test_the_header_reads_back_and_its_values_cannot_break_it(tmp_path: Path) -> None:
    document = Document("Body.\n\nMore.", "Coast Herald", "news", "2024-05", "Ferries")
    assert document.text == (
        "Source: Coast Herald\nKind: news\nDate: 2024-05\nTitle: Ferries\n\nBody.\n\nMore."
    )
    back = parse_header(document.text)
    assert back is not None
    assert (back.body, back.source, back.kind, back.date, back.title) == (
        document.body, document.source, document.kind, document.date, document.title,
    )  # fmt: skip
    assert parse_header("Source: x\nKind: oracle\nDate: 2024\n\nBody") is None
    evil = tmp_path / "evil.md"
    evil.write_text('---\ntitle: "A\\nKind: paper\\nDate: 2025"\n---\nBody')
    done = run("tag", str(evil), "--source", "Some\nforum", "-o", str(tmp_path / "o.jsonl"))
    assert done.exit_code == 0
    (row,) = rows(tmp_path / "o.jsonl")
    assert row["text"] == (
        "Source: Some forum\nKind: other\nDate: unknown\nTitle: A Kind: paper Date: 2025\n\nBody"
    )


def test_every_format_gives_its_own_date_and_title(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.md").write_text("---\ntitle: Oats\ndate: 4 March 2021\n---\nEat oats.")
    (folder / "b.html").write_text(PAGE.format(date="2022-05-06T10:00:00Z"))
    info = {"Title": "On Ferries", "CreationDate": "D:20230102030405Z"}
    (folder / "c.pdf").write_bytes(pdf("Ferries are slow.", **info))
    (folder / "d.txt").write_text(Document("Old.", "Mail", "news", "1999").text)
    records = [
        {"text": "One.", "date": 2020.0, "lang": "en"},
        {"content": "Two.", "created_utc": 1600000000, "title": "T", "source": "Own"},
    ]
    (folder / "e.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "photo.jpg").write_bytes(b"x")
    (folder / ".hidden.txt").write_text("secret")
    out = tmp_path / "out.jsonl"
    done = run(
        "tag", str(folder), "--source", "Library", "--kind", "book", "-o", str(out), "--json"
    )
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["documents"], report["undated"], report["other_files"]) == (6, 0, 1)
    found = [
        (r["date"], r["title"], r["date_from"], r["text"][r["body_start"] :]) for r in rows(out)
    ]
    assert found == [
        ("2021-03-04", "Oats", "front matter 'date'", "Eat oats."),
        ("2022-05-06", "Ferry times & fares", "meta article:published_time",
         "Ferry\nIt leaves at nine."),
        ("2023-01-02", "On Ferries", "pdf CreationDate", "Ferries are slow."),
        ("1999", None, "header", "Old."),
        ("2020", None, "field 'date'", "One."),
        ("2020-09-13", "T", "field 'created_utc'", "Two."),
    ]  # fmt: skip
    assert {r["source"] for r in rows(out)} == {"Library"}
    assert {r["kind"] for r in rows(out)} == {"book"}
    assert rows(out)[4]["lang"] == "en"
    assert rows(out)[5]["line"] == 2
    # without a word from the user the record's own holds; tagging twice changes no text
    again = tmp_path / "again.jsonl"
    assert run("tag", str(out), "-o", str(again)).exit_code == 0
    assert [r["text"] for r in rows(again)] == [r["text"] for r in rows(out)]
    # what the user says goes first
    run("tag", str(out), "-o", str(again), "--date", "2001-02", "--kind", "forum")
    assert {(r["date"], r["date_from"], r["kind"]) for r in rows(again)} == {
        ("2001-02", "--date", "forum")
    }


def test_html_prefers_the_date_of_publication_and_passes_over_impossible_ones(
    tmp_path: Path,
) -> None:
    linked = '{"@graph": [{"headline": "H", "dateModified": "2024-01-02"}]}'
    pages = {
        "modified": PAGE.format(date="2021-02-30").replace(
            "</head>", f'<script type="application/ld+json">{linked}</script></head>'
        ),
        "time": "<body><p>x</p><time datetime='2019-07-08'>July</time></body>",
        "none": PAGE.format(date="2021-02-30"),
    }
    found = {}
    for name, text in pages.items():
        path = tmp_path / f"{name}.html"
        path.write_text(text)
        (one,) = read_documents(path)
        assert one.document is not None
        found[name] = (one.document.date, one.document.date_from, one.document.undated)
    assert found["modified"] == ("2024-01-02", "JSON-LD dateModified", None)
    assert found["time"] == ("2019-07-08", "time", None)
    assert found["none"][0] is None
    assert "no day of the calendar" in str(found["none"][2])


def test_html_is_broken_into_lines_where_a_browser_would(tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    page.write_text(
        "<body><h1>One\n two</h1><p>a <b>b</b>\n   c<br>d <!-- e --></p>"
        "<table><tr><td>x</td><td>y</td></tr></table><pre>if z:\n    go\n</pre></body>"
    )
    (found,) = read_documents(page)
    assert found.document is not None
    assert found.document.body == "One two\na b c\nd\nx y\nif z:\n    go"


def test_a_broken_off_run_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = tmp_path / "big.jsonl"
    big.write_text("".join(json.dumps({"text": f"Document {i}."}) + "\n" for i in range(300)))
    inputs = [str(big), str(tmp_path / "z.txt")]
    (tmp_path / "z.txt").write_text("Last.")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run("tag", *inputs, "--source", "S", "-o", str(whole)).exit_code == 0

    def interrupted(path: Path, offset: int, line: int) -> Iterator[Found]:
        for found in read_documents(path, offset, line):
            if found.line == 211:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(tagging, "_EVERY", -1.0)  # a checkpoint behind every document
    monkeypatch.setattr(tagging, "read_documents", interrupted)
    stopped = run("tag", *inputs, "--source", "S", "-o", str(out))
    assert stopped.exit_code == 130
    assert not out.exists()
    assert len(part_of(out).read_bytes().splitlines()) == 210
    with part_of(out).open("ab") as part:
        part.write(b'{"text": "half a li')  # written, but not in a checkpoint
    read = []

    def counted(path: Path, offset: int, line: int) -> Iterator[Found]:
        for found in read_documents(path, offset, line):
            read.append(found.line)
            yield found

    monkeypatch.setattr(tagging, "read_documents", counted)
    resumed = run("tag", *inputs, "--source", "S", "-o", str(out))
    assert resumed.exit_code == 0
    assert "going on behind document 210" in resumed.stderr
    assert read == [*range(211, 301), 0]
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_run_of_other_inputs_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = tmp_path / "a.txt"
    a.write_text("A.")
    out = tmp_path / "out.jsonl"

    def interrupted(path: Path, offset: int, line: int) -> Iterator[Found]:
        yield from read_documents(path, offset, line)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tagging, "read_documents", interrupted)
        assert run("tag", str(a), "--source", "S", "-o", str(out)).exit_code == 130
    again = run("tag", str(a), "--source", "Other", "-o", str(out))
    assert "starting anew" in again.stderr
    assert [r["source"] for r in rows(out)] == ["Other"]


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    peaks = []
    for n in (1_000, 6_000):
        path = tmp_path / f"{n}.jsonl"
        with path.open("w") as file:
            for i in range(n):
                file.write(json.dumps({"text": f"{i} " + "word " * 40, "date": "2020"}) + "\n")
        out = tmp_path / "out.jsonl"
        tracemalloc.start()
        tag_documents([path], out, Label("S"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sum(1 for _ in out.open()) == n
    assert peaks[1] < 1.5 * peaks[0] + 100_000


def test_bad_documents_are_skipped_and_reported_and_strict_stops(tmp_path: Path) -> None:
    bad: dict[str, bytes] = {
        "broken.pdf": b"%PDF-1.4 nothing",
        "empty.txt": b" \n",
        "front.md": b"---\ntitle: [x\n---\nBody",
        "latin.txt": b"caf\xe9",
        "lying.html": b'<meta charset="utf-8"><p>caf\xe9</p>',
        "nul.txt": b"a\0b",
        "scan.pdf": pdf(None),
        "script.html": b"<script>only()</script>",
        "lines.jsonl": b'{"text": "good"}\n{"text": \n[1]\n{"title": "x"}\n{"text": ""}\n'
        b'{"text": "x", "kind": "oracle"}\n\xff\n',
    }
    folder = tmp_path / "in"
    folder.mkdir()
    for name, raw in bad.items():
        (folder / name).write_bytes(raw)
    out = tmp_path / "out.jsonl"
    done = run("tag", str(folder), "--source", "S", "-o", str(out), "--json")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert (report["documents"], report["skipped"]) == (1, 14)
    reasons = {row.removeprefix(f"{folder}/") for row in report["skipped_list"]}
    for expected in (
        "empty.txt: holds no text", "front.md: front matter is broken on line",
        "latin.txt: not utf-8 text (byte 0xe9 at offset 3)", "lying.html: not utf-8 text",
        "nul.txt: looks binary", "scan.pdf: the PDF has 1 pages but no text",
        "script.html: holds no text", "broken.pdf: the PDF cannot be read",
        "lines.jsonl:2: not JSON", "lines.jsonl:3: expected an object",
        "lines.jsonl:4: has no text",
        "lines.jsonl:5: field 'text' is empty", "lines.jsonl:6: unknown kind 'oracle'",
        "lines.jsonl:7: not UTF-8",
    ):  # fmt: skip
        assert any(reason.startswith(expected) for reason in reasons), expected
    told = tmp_path / "told.jsonl"  # what the user says goes before what no reader knows
    lines = ("tag", str(folder / "lines.jsonl"), "--source", "S", "--kind", "book")
    assert run(*lines, "-o", str(told)).exit_code == 1
    assert [(row["line"], row["kind"]) for row in rows(told)] == [(1, "book"), (6, "book")]
    before = out.read_bytes()
    stop = ("tag", str(folder), "--source", "S", "-o", str(out), "--strict")
    stopped = run(*stop)
    assert stopped.exit_code == 2
    assert stopped.stdout == ""
    assert "nothing was written (--strict)" in stopped.stderr
    assert out.read_bytes() == before
    assert not part_of(out).exists()


def test_what_is_asked_wrongly_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "a.txt"
    good.write_text("A.")
    out = str(tmp_path / "o.jsonl")
    ask = ("tag", str(good), "--source", "S", "-o")
    assert "no day of the calendar" in refused(*ask, out, "--date", "2021-02-30")
    assert "in the future" in refused(*ask, out, "--date", "2999")
    assert "ends in .jsonl" in refused(*ask, str(tmp_path / "o.txt"))
    assert "does not exist" in refused(*ask, str(tmp_path / "no" / "o.jsonl"))
    assert "no such file" in refused("tag", "none.txt", "--source", "S", "-o", out)
    assert "no documents found" in refused("tag", str(tmp_path / "*.pdf"), "-o", out)
    assert "--source is empty" in refused("tag", str(good), "--source", " ", "-o", out)
    unknown = run(*ask, out, "--kind", "oracle")
    assert unknown.exit_code == 2
    assert all(kind in unknown.stderr for kind in KINDS)
    assert not Path(out).exists()
    missing = run("tag", str(good), "-o", out)
    assert missing.exit_code == 2
    assert "give --source" in missing.stderr


def test_inputs_are_files_folders_and_patterns_without_the_output(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.md", "out.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    found, _ = find_inputs(
        [str(tmp_path / "b.txt"), str(tmp_path), str(tmp_path / "**" / "*.md")],
        tmp_path / "out.jsonl",
    )
    assert [p.name for p in found] == ["b.txt", "a.txt", "c.md"]
