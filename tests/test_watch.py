"""Watching: every kind of save, on a tiny model; one save on the real one."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import refused, run, tiny_model

import superego
from superego.adapter import read_adapter
from superego.base import BaseModel, open_base
from superego.bundled import bundled
from superego.converters.compile import Settings
from superego.converters.watch import Problem, Turn, Workshop, watch
from superego.history import manifesto_of
from superego.manifesto import parse_manifesto

QUICK = Settings.for_effort("quick", rank=8, speed="slow")


def saved_by_renaming(path: Path, text: str) -> None:
    """As vim and many others save."""
    temporary = path.with_name("4913~")
    temporary.write_text(text)
    os.replace(temporary, path)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    base = open_base(str(tiny_model(tmp_path / "base.gguf", context_length=2048)))
    return Workshop(base, tmp_path / "out.gguf", ["Who?"], QUICK)


def test_watching_goes_on_whatever_is_saved(tmp_path: Path, workshop: Workshop) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    path = folder / "m.md"
    path.write_text("Be kind.")
    stop = threading.Event()
    timer = threading.Timer(60, stop.set)  # a save that is missed must not hang the test
    timer.start()
    events: Iterator[Turn | Problem] = watch(path, workshop, stop)

    def turn() -> Turn:
        event = next(events)
        assert isinstance(event, Turn), event
        assert read_adapter(workshop.output).own["manifesto"] == event.manifesto.body
        return event

    def problem() -> str:
        event = next(events)
        assert isinstance(event, Problem), event
        return event.message

    first = turn()
    assert first.kept == 0
    assert [name for name in first.seconds if name in ("fit", "swap", "reply", "whole")]
    attached = superego.attachments(workshop.llm)
    assert len(attached) == 1

    path.write_text("Be kind. Be brief.")
    assert turn().manifesto.body == "Be kind. Be brief."
    saved_by_renaming(path, "Be kind. Be brief. Be calm.")
    event = turn()
    assert event.kept > 0
    assert event.replies[0][0] == "Who?"
    assert event.seconds["whole"] >= event.seconds["fit"]

    path.write_text("---\nname: x\n")  # half-written
    assert "never closed" in problem()
    path.write_text("---\nnmae: x\n---\nBe kind.")
    assert "front matter key 'nmae'" in problem()
    path.write_bytes(b"\xff\xfe broken")
    assert "not UTF-8" in problem()
    path.write_text("")
    assert "is empty" in problem()
    path.unlink()
    assert "is gone" in problem()
    saved_by_renaming(path, "Be kind. " * 400)
    assert "context of" in problem()
    assert len(superego.attachments(workshop.llm)) == 1  # what was there still is
    saved_by_renaming(path, "Be bold.")
    assert turn().manifesto.body == "Be bold."
    assert len(superego.attachments(workshop.llm)) == 1
    timer.cancel()
    stop.set()
    assert list(events) == []
    assert not list(tmp_path.glob("*.part"))


def test_on_the_real_model_a_save_changes_the_reply(smollm2: BaseModel, tmp_path: Path) -> None:
    few = Settings.for_effort("quick", speed="slow")
    workshop = Workshop(smollm2, tmp_path / "out.gguf", ["What should I have for lunch?"], few)
    first = workshop.turn(bundled()["pirate"])
    (_, before, now) = first.replies[0]
    assert before != now
    assert first.recovered > 0.6
    text = bundled()["pirate"].body + "\n\nAlso: never promise anything."
    second = workshop.turn(parse_manifesto(text, "pirate"))
    assert second.replies[0][1] == now
    assert second.kept > few.messages // 2
    assert second.recovered > 0.6
    assert manifesto_of(read_adapter(workshop.output)).body == text


def test_the_command_prints_one_json_line_a_turn(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base.gguf", context_length=2048)
    path, out = tmp_path / "m.md", tmp_path / "out.gguf"
    path.write_text("Be kind.")
    arguments = ("watch", str(path), "--base", str(base), "--ask", "Who?", "--turns", "1")
    result = run(*arguments, "-o", str(out), "--json")
    assert result.exit_code == 0, result.stderr
    (line,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert line["replies"][0][0] == "Who?"
    assert read_adapter(out).own["manifesto"] == "Be kind."
    shown = run(*arguments)
    assert "before" in shown.stdout
    assert "seconds: notice" in shown.stdout
    assert "no such file" in refused("watch", str(tmp_path / "x.md"), "--base", str(base))
    assert "is the manifesto itself" in refused(*arguments, "-o", str(path))
    assert path.read_text() == "Be kind."
