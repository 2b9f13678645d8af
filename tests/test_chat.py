"""Chat: one message or many, with personas on and off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conftest import refused, run

from superego.adapter import write_adapter

ASK = ("chat", "--base", "smollm2", "--max-tokens", "24")


def test_the_persona_speaks_and_the_bare_base_does_not(pirate: Path) -> None:
    question = "Where should I go on holiday?"
    bare = run(*ASK, "--message", question)
    spoken = run(*ASK, "--message", question, "--persona", str(pirate))
    off = run(*ASK, "--message", question, "--persona", f"{pirate}:0")
    system = run(*ASK, "--message", question, "--system", "pirate")
    assert bare.exit_code == spoken.exit_code == off.exit_code == system.exit_code == 0
    assert bare.stdout == off.stdout
    assert len({bare.stdout, spoken.stdout, system.stdout}) == 3
    marks = ("arr", "matey", "ahoy", "aye", "ye ", "hearty")
    assert any(mark in spoken.stdout.lower() for mark in marks)
    assert not any(mark in bare.stdout.lower() for mark in marks)


def test_a_seed_repeats_a_sampled_reply() -> None:
    ask = (*ASK, "--message", "Tell me a story.", "--temperature", "1.2", "--seed")
    assert run(*ask, "5").stdout == run(*ask, "5").stdout
    assert run(*ask, "5").stdout != run(*ask, "6").stdout


def test_an_interactive_chat_remembers_until_cleared() -> None:
    result = run(*ASK, stdin="My name is Ada.\nWhat is my name?\n/clear\n\n/quit\nnot read\n")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) >= 2
    assert "/clear forgets" in result.stderr


def test_misfits_are_refused_before_the_model_is_loaded(tmp_path: Path, pirate: Path) -> None:
    other = tmp_path / "other.gguf"
    write_adapter(other, "llama", {"blk.0.ffn_down.weight": (np.ones((2, 8)), np.ones((8, 2)))}, {})
    hi = (*ASK, "--message", "hi")
    assert "made for another base" in refused(*hi, "--persona", str(other))
    assert "no such file" in refused(*hi, "--persona", "none.gguf:0.5")
    assert "not between" in refused(*hi, "--persona", f"{pirate}:1000")
    assert "no such file" in refused(*hi, "--system", "none.md")
    long = (*ASK, "--n-ctx", "256", "--message", "word " * 300)
    assert "does not fit the context of 256" in refused(*long)
