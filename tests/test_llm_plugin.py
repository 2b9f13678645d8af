"""The plugin for llm, through llm's own command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import llm
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import documented, refused, run, tiny_model
from llama_cpp import Llama
from llm.cli import cli
from llm.plugins import load_plugins

from superego.adapter import write_adapter
from superego.bundled import bundled
from superego.llm_plugin import load_template

MESSAGE = "What should I have for lunch?"


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor fill the user's llm folder and personas."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.setenv("SUPEREGO_PERSONAS", str(tmp_path / "personas"))


def in_llm(*args: str) -> Result:
    load_plugins()
    result = CliRunner().invoke(cli, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_a_persona_that_was_added_answers_as_in_chat(pirate: Path) -> None:
    said = in_llm("superego", "add", str(pirate), "--base", "smollm2")
    assert "llm -m persona/pirate" in said.stderr
    assert "persona/pirate" in in_llm("models", "list").stdout
    options = ["--base", "smollm2", "--message", MESSAGE, "--max-tokens", "24"]
    limits = ["-o", "max_tokens", "24", "-o", "n_ctx", "1024"]
    alone = run("chat", "--persona", str(pirate), *options).stdout
    bare = run("chat", *options).stdout
    first = in_llm("-m", "persona/pirate", MESSAGE, *limits)
    assert first.stdout == alone
    assert first.stderr == ""
    assert in_llm("-m", "persona/pirate", MESSAGE, *limits, "--no-stream").stdout == alone
    assert in_llm("-m", "persona/pirate", MESSAGE, *limits, "-o", "scale", "0").stdout == bare
    assert alone != bare
    on_top = ["--system", "Answer in French.", *limits, "-o", "scale", "0"]
    assert in_llm("-m", "persona/pirate", MESSAGE, *on_top).stdout != bare
    again = in_llm("-c", "And for dinner?", *limits)
    fresh = in_llm("-m", "persona/pirate", "And for dinner?", *limits)
    assert again.stdout != fresh.stdout  # the first message and its reply were read
    in_llm("superego", "remove", "pirate")
    assert "persona/pirate" not in in_llm("models", "list").stdout


def test_replies_are_streamed(pirate: Path) -> None:
    in_llm("superego", "add", str(pirate), "--base", "smollm2", "--name", "two")
    reply = llm.get_model("persona/two").prompt(MESSAGE, max_tokens=12, n_ctx=1024)
    pieces = list(reply)
    assert len(pieces) > 3
    assert "".join(pieces) == reply.text()


def test_a_template_is_the_manifesto_word_for_word(tmp_path: Path) -> None:
    for name, manifesto in bundled().items():
        assert load_template(name).evaluate("hi") == ("hi", manifesto.body)
    base = tiny_model(tmp_path / "base.gguf")
    rng = np.random.default_rng(0)
    pair = (rng.standard_normal((4, 64)), rng.standard_normal((64, 4)))
    path, body = tmp_path / "cheap.gguf", "It costs $5, not $name or $$."
    write_adapter(path, "llama", {"blk.0.attn_output.weight": pair}, {"superego.manifesto": body})
    in_llm("superego", "add", str(path), "--base", str(base))
    assert load_template("cheap").evaluate("hi") == ("hi", body)
    shown = in_llm("-m", "persona/cheap", "-t", "persona:pirate", "hi", "-o", "max_tokens", "1")
    assert shown.exit_code == 0
    logged = json.loads(in_llm("logs", "-n", "1", "--json").stdout)[0]
    assert logged["system"] == bundled()["pirate"].body


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(tmp_path / "base.gguf")
    assert "no persona 'nobody'" in refused("remove", "nobody")
    load_plugins()
    mounted = CliRunner().invoke(cli, ["superego", "remove", "nobody"])
    assert (mounted.exit_code, mounted.stdout) == (2, "")
    assert mounted.stderr.startswith("Error: no persona 'nobody'")
    assert "--effort" in in_llm("superego", "compile", "--help").stdout
    unknown = CliRunner().invoke(cli, ["-t", "persona:nobody", "hi"])
    assert unknown.exit_code == 1
    assert "bundled ones: clinician" in unknown.stderr
    rng = np.random.default_rng(0)
    pair = (rng.standard_normal((4, 64)), rng.standard_normal((64, 4)))
    path = tmp_path / "a.gguf"
    write_adapter(path, "llama", {"blk.0.attn_output.weight": pair}, {})
    common = ["add", str(path), "--base", str(base)]
    assert "expected letters" in refused(*common, "--name", "a/b")
    run(*common)
    base.unlink()
    gone = CliRunner().invoke(cli, ["-m", "persona/a", "hi"])
    assert gone.exit_code == 1
    assert "no such file" in gone.stderr
    entry = tmp_path / "personas" / "a.json"
    entry.write_text("{")
    assert "is damaged" in in_llm("models", "list").stderr
    monkeypatch.setenv("SUPEREGO_PERSONAS", str(path / "below-a-file"))
    assert "cannot be made" in refused("add", str(path), "--base", str(tiny_model(base)))


def test_llm_finds_the_plugin_and_starts_light(tmp_path: Path) -> None:
    code = (
        "import sys, llm.plugins\n"
        "llm.plugins.load_plugins()\n"
        "assert 'superego.llm_plugin' in sys.modules\n"
        "assert not {'torch', 'llama_cpp', 'superego.cli'} & set(sys.modules)\n"
    )
    environment = {"LLM_LOAD_PLUGINS": "superego", "LLM_USER_PATH": str(tmp_path), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)


def test_a_process_of_its_own_says_nothing_but_the_reply(tmp_path: Path) -> None:
    """Neither llama.cpp's log nor complaints at Python's end reach the terminal."""
    base = tiny_model(tmp_path / "base.gguf")
    rng = np.random.default_rng(0)
    pair = (rng.standard_normal((4, 64)), rng.standard_normal((64, 4)))
    write_adapter(tmp_path / "a.gguf", "llama", {"blk.0.attn_output.weight": pair}, {})
    run("add", str(tmp_path / "a.gguf"), "--base", str(base))
    command = [sys.executable, "-m", "llm", "-m", "persona/a", "hi", "-o", "max_tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_the_documented_commands_run(
    pirate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but installing, compiling (done once for all tests) and the interactive one."""
    complete = Llama.create_chat_completion
    # llm's own SmolLM2 knows no limit and writes until its context is full
    monkeypatch.setattr(Llama, "create_chat_completion", partialmethod(complete, max_tokens=16))
    shutil.copy(pirate, tmp_path / "pirate.gguf")
    monkeypatch.chdir(tmp_path)
    ran = []
    for program, *words in documented("llm.md"):
        if program == "pip" or words[0] in ("compile", "chat"):
            continue
        if program == "superego":
            assert run(*words).exit_code == 0
        else:
            limit = ["-o", "max_tokens", "8"] if "persona/pirate" in words else []
            in_llm(*words, *limit)
        ran.append((program, words[0]))
    assert ran == [
        ("superego", "add"), ("llm", "-m"), ("llm", "-c"), ("superego", "remove"), ("llm", "-m"),
    ]  # fmt: skip
