"""Sessions: restored exactly, rebuilt where they do not fit, never trusted."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import refused, run, tiny_model

import superego
from superego.base import BaseModel, open_base
from superego.bundled import bundled
from superego.errors import SuperegoError
from superego.evaluate import bundled as lines
from superego.manifesto import Manifesto
from superego.runtime import load, tokenize
from superego.session import open_session, prefix_of, save_session, sidecar_path, state_bytes
from superego.state_file import build, layout, parse
from superego.template import ChatTemplate, conversation

STEWARD = bundled()["steward"]
SHORT = Manifesto("short", "You speak like a lighthouse keeper. Mention the sea.")


def generate(llm: Any, tokens: list[int], n: int = 16) -> list[int]:
    return list(itertools.islice(llm.generate(tokens, temp=0.0), n))


def fresh(llm: Any) -> None:
    superego.detach(llm)
    llm.reset()
    llm._ctx.kv_cache_clear()


@pytest.fixture(scope="module")
def steward(smollm2: BaseModel, llm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("session") / "steward.session"
    fresh(llm)
    save_session(llm, smollm2, STEWARD, path)
    fresh(llm)
    return path


def test_the_file_is_the_one_that_llama_cpp_writes(
    llm: Any, smollm2: BaseModel, tmp_path: Path
) -> None:
    import llama_cpp

    fresh(llm)
    tokens = prefix_of(llm, ChatTemplate(smollm2.header), SHORT.body)
    llm.eval(tokens)
    file = tmp_path / "own.bin"
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    llama_cpp.llama_state_seq_save_file(llm._ctx.ctx, str(file).encode(), 0, array, len(tokens))
    data = file.read_bytes()
    assert data == state_bytes(llm, tokens)
    shape = layout(smollm2.header, "f16")
    state = parse(data, shape, file, 4096)
    assert build(state.tokens, state.keys, state.values, shape) == data


def test_replies_after_a_restore_are_those_after_a_prefill(
    llm: Any, smollm2: BaseModel, steward: Path
) -> None:
    template = ChatTemplate(smollm2.header)
    prompts = [
        tokenize(llm, template.render(conversation(STEWARD.body, message)))
        for message in lines("heldout")
    ]
    fresh(llm)
    llm.eval(prefix_of(llm, template, STEWARD.body))  # by itself, as chat reads it
    read = [generate(llm, prompt, 12) for prompt in prompts]
    fresh(llm)
    session = open_session(llm, smollm2, steward)
    assert session.note == ""
    restored = []
    for prompt in prompts:
        restored.append(generate(llm, prompt, 12))
        assert prompt[: len(session.tokens)] == session.tokens
    assert restored == read


def test_a_restored_session_leaves_only_the_message_to_read(
    llm: Any, smollm2: BaseModel, steward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh(llm)
    attachment = superego.attach(llm, steward)
    assert attachment.session is not None
    assert attachment.attached
    prompt = tokenize(
        llm, ChatTemplate(smollm2.header).render(conversation(STEWARD.body, "Who are you?"))
    )
    read: list[int] = []
    whole = type(llm).eval
    monkeypatch.setattr(
        type(llm), "eval", lambda self, tokens: (read.append(len(tokens)), whole(self, tokens))[1]
    )
    generate(llm, prompt, 1)
    assert read[0] == len(prompt) - len(attachment.session.tokens)
    with pytest.raises(SuperegoError, match="a session has no scale"):
        attachment.set_scale(0.5)
    attachment.detach()
    assert not attachment.attached
    assert llm.n_tokens == 0


def test_the_command_saves_what_chat_starts_from(tmp_path: Path, pirate: Path) -> None:
    out = tmp_path / "steward.session"
    made = run("session", "steward", "--base", "smollm2", "-o", str(out), "--json")
    assert made.exit_code == 0
    report = json.loads(made.stdout)
    assert report["bytes"] == out.stat().st_size
    assert report["bytes a token"] * report["tokens"] < report["bytes"]
    assert f"--session {out}" in made.stderr
    assert "slots/0?action=restore" in made.stderr
    ask = ("chat", "--base", "smollm2", "--max-tokens", "16", "--message", "Who are you?")
    restored = run(*ask, "--session", str(out))
    assert restored.stdout == run(*ask, "--system", "steward").stdout
    assert "Note" not in restored.stderr
    # made without the adapter: its keys and values must not be used with it
    both = run(*ask, "--session", str(out), "--persona", str(pirate))
    assert both.stdout == run(*ask, "--system", "steward", "--persona", str(pirate)).stdout
    assert "adapters: made with none" in both.stderr
    mine = tmp_path / "with.session"
    run("session", "steward", "--base", "smollm2", "-o", str(mine), "--with", str(pirate))
    warm = run(*ask, "--session", str(mine), "--persona", str(pirate))
    assert warm.stdout == both.stdout
    assert "Note" not in warm.stderr
    both = run(*ask, "--session", str(out), "--system", "terse")
    assert "is of another manifesto, 'steward'" in both.stderr
    assert both.stdout == run(*ask, "--system", "terse").stdout
    sidecar_path(out).unlink()
    rebuilt = run(*ask, "--session", str(out), "--system", "steward")
    assert "is missing; the manifesto was read anew and the session saved again" in rebuilt.stderr
    again = run(*ask, "--session", str(out))
    assert again.stdout == rebuilt.stdout == restored.stdout
    assert "Note" not in again.stderr


def test_a_quantized_cache_is_restored_too(tmp_path: Path) -> None:
    out = tmp_path / "q8.session"
    run("session", "terse", "--base", "smollm2", "-o", str(out), "--kv-type", "q8_0")
    ask = ("chat", "--base", "smollm2", "--max-tokens", "12", "--message", "Who are you?")
    result = run(*ask, "--session", str(out))
    assert result.exit_code == 0
    assert "Note" not in result.stderr
    assert result.stdout.strip()


def test_a_folder_gives_the_adapter_and_then_its_session(
    llm: Any, smollm2: BaseModel, pirate: Path, tmp_path: Path
) -> None:
    fresh(llm)
    shutil.copy(pirate, tmp_path / "pirate.gguf")
    attachment = superego.attach(llm, tmp_path)
    assert attachment.session is None
    assert attachment.adapter is not None
    save_session(llm, smollm2, SHORT, tmp_path / "x.session", [(attachment.adapter, 1.0)])
    prompt = tokenize(
        llm, ChatTemplate(smollm2.header).render(conversation(SHORT.body, "Who are you?"))
    )
    fresh(llm)
    superego.attach(llm, tmp_path / "pirate.gguf")
    expected = generate(llm, prompt)
    fresh(llm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = superego.attach(llm, tmp_path)
    assert both.session is not None
    assert llm.n_tokens == len(both.session.tokens)
    assert generate(llm, prompt) == expected
    superego.detach(llm)
    with pytest.raises(SuperegoError, match="neither an adapter"):
        superego.attach(llm, tmp_path.parent / tmp_path.name / "..")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, BaseModel, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    model = open_base(str(tiny_model(folder / "t.gguf")))
    llm = load(model, n_ctx=256)
    path = folder / "t.session"
    save_session(llm, model, SHORT, path)
    return llm, model, path


def copied(path: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for each in (path, sidecar_path(path)):
        shutil.copy(each, folder / each.name)
    return folder / path.name


def lie(path: Path, **values: Any) -> None:
    beside = sidecar_path(path)
    beside.write_text(json.dumps({**json.loads(beside.read_text()), **values}))


def test_what_does_not_fit_is_rebuilt_with_the_reason(
    tiny: tuple[Any, BaseModel, Path], tmp_path: Path
) -> None:
    llm, model, good = tiny
    expected = open_session(llm, model, good)
    assert expected.note == ""
    other = open_base(str(tiny_model(tmp_path / "other.gguf", seed=1)))
    assert "base" in open_session(load(other, n_ctx=256), other, good).note
    path = copied(good, tmp_path / "version")
    lie(path, state_version=2)
    session = open_session(llm, model, path)
    assert "state version: made with 2, here 3" in session.note
    assert "saved again" in session.note
    assert open_session(llm, model, path).note == ""  # it was

    path = copied(good, tmp_path / "cut")
    path.write_bytes(path.read_bytes()[:-100])
    assert "size in bytes" in open_session(llm, model, path).note
    path = copied(good, tmp_path / "flip")
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    assert "SHA-256 differs" in open_session(llm, model, path).note
    assert path.read_bytes() == good.read_bytes()  # saved again as it was

    path = copied(good, tmp_path / "link")
    path.unlink()
    path.symlink_to(good)
    assert "symbolic link" in open_session(llm, model, path).note
    path = copied(good, tmp_path / "text")
    lie(path, manifesto="You are somebody else.")
    session = open_session(llm, model, path)
    assert "manifesto as tokens" in session.note
    assert session.tokens == prefix_of(llm, ChatTemplate(model.header), "You are somebody else.")

    path = copied(good, tmp_path / "bare")
    sidecar_path(path).unlink()
    with pytest.raises(SuperegoError, match="is missing; a session cannot be used without it"):
        open_session(llm, model, path)
    sidecar_path(path).write_text('{"format": 1}')
    with pytest.raises(SuperegoError, match="Field required"):
        open_session(llm, model, path)


def test_damaged_sessions_never_reach_llama_cpp(
    tiny: tuple[Any, BaseModel, Path], tmp_path: Path
) -> None:
    """Half with an honest sidecar, half with one that vouches for the damaged bytes."""
    import hashlib

    llm, model, good = tiny
    whole, beside = good.read_bytes(), sidecar_path(good).read_text()
    tokens = open_session(llm, model, good).tokens
    rng = np.random.default_rng(0)
    path = tmp_path / "f.session"
    head = 12 + 4 * len(tokens) + 16 + 12 * len(tokens)
    outcomes = {"used": 0, "rebuilt": 0, "refused": 0}
    for case in range(2000):
        data = bytearray(whole)
        text = beside
        kind = case % 5
        if kind == 0:
            data = data[: rng.integers(0, len(data))]
        elif kind == 1:
            for at in rng.integers(0, len(data), rng.integers(1, 20)):
                data[at] ^= 1 << rng.integers(8)
        elif kind == 2:  # numbers of the front, where lengths and types are
            at = int(rng.integers(0, head // 4)) * 4
            struct.pack_into("<I", data, at, int(rng.choice([0, 1, 2**31, 2**32 - 1, 77, 3])))
        elif kind == 3:
            data += rng.bytes(int(rng.integers(1, 4096)))
        else:
            at = int(rng.integers(0, len(text)))
            text = text[:at] + chr(rng.integers(32, 127)) + text[at + int(rng.integers(0, 9)) :]
        path.write_bytes(data)
        sidecar_path(path).write_text(text)
        if case % 2 and kind != 4:
            lie(path, state_sha256=hashlib.sha256(data).hexdigest(), state_bytes=len(data))
        try:
            session = open_session(llm, model, path)
        except SuperegoError:
            outcomes["refused"] += 1
            continue
        outcomes["rebuilt" if session.note else "used"] += 1
        assert llm.n_tokens == len(session.tokens) <= llm.n_ctx()
        if kind != 4 and not (case % 2 and kind == 1):
            assert session.tokens == tokens
    assert sum(outcomes.values()) == 2000
    assert outcomes["rebuilt"] > 1000
    assert outcomes["refused"] > 50
    assert generate(llm, [*tokens, 5], 4)  # the process lives, and so does the model


SERVER = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.slot_save_path, port = sys.argv[1:4]
p.port, p.n_ctx, p.n_parallel, p.cache_ram_mib = int(port), 1024, 1, 0
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 2
p.endpoint_slots, p.warmup = True, False
server = xllamacpp.Server(p)
print(server.listening_address, flush=True)
time.sleep(600)
"""


def test_a_stock_llama_server_restores_it(
    llm: Any, smollm2: BaseModel, steward: Path, tmp_path: Path
) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shutil.copy(steward, tmp_path / "steward.session")
    arguments = [str(smollm2.path), f"{tmp_path}/", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert address, "llama-server did not start"
        prompt = tokenize(
            llm, ChatTemplate(smollm2.header).render(conversation(STEWARD.body, "Who are you?"))
        )
        body = {"prompt": prompt, "n_predict": 12, "temperature": 0, "id_slot": 0}
        with httpx.Client(base_url=address, timeout=120) as client:
            cold = client.post("/completion", json=body).json()
            client.post("/slots/0?action=erase").raise_for_status()
            done = client.post("/slots/0?action=restore", json={"filename": "steward.session"})
            assert done.status_code == 200, done.text
            kept = json.loads(sidecar_path(steward).read_text())["cells"]
            assert done.json()["n_restored"] == kept
            warm = client.post("/completion", json=body).json()
        assert cold["timings"]["prompt_n"] == len(prompt)
        assert warm["timings"]["prompt_n"] == len(prompt) - kept
        assert warm["content"] == cold["content"]
    finally:
        server.kill()
        server.wait()


def test_bad_input_is_refused_in_one_line(tmp_path: Path, smollm2: BaseModel) -> None:
    make = ("session", "steward", "--base", "smollm2")
    assert "ends in .session" in refused(*make, "-o", str(tmp_path / "x.bin"))
    assert "does not exist" in refused(*make, "-o", str(tmp_path / "no" / "x.session"))
    out = str(tmp_path / "x.session")
    assert "does not fit the context of 256" in refused(
        "session", str(long_manifesto(tmp_path)), "--base", "smollm2", "-o", out, "--n-ctx", "256"
    )
    assert "no such file" in refused(*make, "-o", out, "--with", "none.gguf")
    ask = ("chat", "--base", "smollm2", "--message", "hi", "--session")
    assert "make it again" in refused(*ask, out)
    (tmp_path / "odd.session.json").write_text("{")
    assert "make it again" in refused(*ask, str(tmp_path / "odd.session"))
    windowed = tiny_model(
        tmp_path / "g.gguf", "cohere2", **{"cohere2__attention__sliding_window": 8}
    )
    assert "plain key-value cache" in refused(
        "session", "steward", "--base", str(windowed), "-o", out
    )


def long_manifesto(folder: Path) -> Path:
    path = folder / "long.md"
    path.write_text("Say what you know. " * 200)
    return path
